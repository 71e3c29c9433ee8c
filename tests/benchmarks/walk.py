"""A random walk over the whole life of labels, beside a model of what has to be there, with faults on the way.

    python tests/benchmarks/walk.py [--steps 200] [--seeds 8,9] [--store] [--export]

Verbs are drawn at random and run by the real command line on a repository of tiny classifiers (softmax, sigmoids, in a
head store) that a real server serves; between them servers stop and start, verbs are killed or run two at a time, head
files are damaged and the folder is read-only. After every step the rules of ``walk_model.py`` are looked at. With
``--store`` the repository lies on moto's S3 server; with ``--export`` a checkpoint is exported into it, too.
Prints what was found as JSON; ends with 1 where a rule was broken, and names the seed and the last steps.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import tiny
from walk_model import Broken, Rules, Twin, Version, World
from walk_verbs import Plan, Verbs

from patcher import ModelRepository
from patcher.cli import BUG
from patcher.cli import main as command_line
from patcher.head import MULTI_LABEL
from patcher.memory import Memory
from patcher.rollout import on_trial
from patcher.serve import served_models
from patcher.triton.server import EmbeddedTriton

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results" / "walk.json"
CODES = {0, 1, 2, 3, 4, 130}
_ON_DAMAGED = {
    *("add-label", "rename-label", "remove-label", "merge-labels", "remember", "rollback"),
    *("labels", "history", "diff", "evaluate", "report", "classify"),
}
_WRITE = {"add-label", "rename-label", "remove-label", "merge-labels", "remember", "rollback"}
_SERVED = "patcher_head_version{"
_SHARED = Path("/dev/shm")  # noqa: S108 - where Triton's stubs keep theirs


@dataclass(frozen=True)
class Done:
    """What a verb said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one of ``--json``."""
        return json.loads(self.out)


class Walk:
    """One walk, in ``folder``."""

    def __init__(self, folder: Path, seed: int, location: Path | str | None = None, *, raced: bool = True) -> None:
        self.folder, self.raced = folder, raced
        self.location = folder / "model_repository" if location is None else location
        self.rng = np.random.default_rng(seed)
        self.world = World()
        self.triton: EmbeddedTriton | None = None
        self.log: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.audit = folder / "audit.jsonl"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        (folder / "files").mkdir()
        self._found()
        self.rules = Rules(self.location)
        self.verbs = Verbs(self.rng, folder / "files", self.location, in_folder=location is None)

    def _found(self) -> None:
        """A softmax over words, and beside it sigmoids on the same backbone."""
        first = tiny.make_repository(self.location, self.folder / "scratch")
        kinds = {label: (label,) for label in tiny.OLD}
        counts = dict.fromkeys(tiny.OLD, 40)
        repository = first.repository
        texts = [text for group in tiny.train_set().values() for text in group]
        features = tiny.encode(self.folder / "scratch", texts)
        ids = np.repeat(np.arange(len(tiny.OLD)), 40)
        head = tiny.fitted_head(features, ids, first.fingerprint(), MULTI_LABEL)
        with repository.lock():
            repository.add_classifier(
                "tags", head, Memory.build(features, ids, tiny.OLD, tiny.SPLIT), backbone="intent"
            )
        for name in ("intent", "tags"):
            version = Version(kinds, None, counts, "export")
            self.world.twins[name] = Twin(
                exclusive=name == "intent", in_store=False, versions={1: version}, reach={1: None}
            )

    # -- the server -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a server on what the files say."""
        repository = ModelRepository(self.location)
        served_from = repository.storage.served_from
        log = self.folder / "triton.log"
        self.triton = EmbeddedTriton(served_from, served_models(repository), log_file=log)
        self.triton.start()
        self.world.dropped.clear()
        for twin in self.world.twins.values():
            twin.answering = {twin.serving}

    def stop(self) -> None:
        """Stop it."""
        if self.triton is not None:
            self.triton.stop()
        self.triton = None
        for twin in self.world.twins.values():
            twin.answering = set()
        mine = [entry.name for entry in _SHARED.iterdir() if entry.name.startswith(f"patcher_{os.getpid()}_")]
        self.rules.need("nothing is left in shared memory", not mine, mine)

    @property
    def url(self) -> str:
        """Where the server is; without one, where nobody is."""
        return self.triton.url if self.triton else "127.0.0.1:9"

    # -- a verb -----------------------------------------------------------------------------------------------------

    def arguments(self, plan: Plan) -> list[str]:
        """As they stand on the command line; labels come last, as one may begin with a dash."""
        where = ["--repo", str(self.location), "--url", self.url]
        options = [] if plan.verb == "export" else where[2:]
        return [plan.verb, *plan.options, *where[:2], *options, *(["--", *plan.words] if plan.words else [])]

    def call(self, plan: Plan, *, as_json: bool = True) -> Done:
        """Run a verb here."""
        arguments = self.arguments(plan)
        if as_json:
            arguments.insert(1, "--json")
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command_line(arguments)
        done = Done(code, out.getvalue(), err.getvalue())
        self.look(plan, done, as_json)
        return done

    def look(self, plan: Plan, done: Done, as_json: bool) -> None:
        """What holds of every run of every verb."""
        said = f"{self.arguments(plan)} ended with {done.code}: {done.err[-1500:]}"
        self.rules.need("exit codes of the contract", done.code in CODES, said)
        faults = ("Traceback", BUG, "Warning:")
        self.rules.need("no traceback", not any(word in done.err + done.out for word in faults), said)
        if as_json:
            try:
                json.loads(done.out)
            except ValueError as error:
                raise Broken(f"one JSON document on stdout: {error}: {done.out[:500]!r}; {said}") from error
        if done.code in (1, 2, 3, 4) and plan.verb not in ("doctor", "sync"):
            self.rules.need("an error says why", "error: " in done.err, said)

    def step(self) -> None:
        """One thing: mostly a verb, now and then a fault."""
        fault = self.rng.random() if self.raced else float(self.rng.choice([0.0, 0.12, 0.5], p=[0.04, 0.06, 0.9]))
        if self.triton is None and self.rng.random() < 0.35:
            self.log.append("server starts")
            self.start()
        elif fault < 0.03 and self.triton:
            self.log.append("server stops")
            self.stop()
        elif fault < 0.08:
            self.killed()
        elif fault < 0.11:
            self.together()
        elif fault < 0.14 and isinstance(self.location, Path):
            self.damaged()
        elif 0.2 < fault < 0.22 and isinstance(self.location, Path):
            self.full()
        elif 0.22 < fault < 0.23 and self.triton:
            self.scraped()
        else:
            self.verb()
        self.check()

    def verb(self) -> None:
        """Draw one and run it; the model goes along."""
        plan = self.verbs.draw(self.world, server=self.triton is not None)
        as_json = bool(self.rng.random() < 0.8)
        done = self.call(plan, as_json=as_json)
        self.log.append(f"{' '.join(self.arguments(plan))} -> {done.code}")
        self.counts[f"{plan.verb}: {done.code}"] += 1
        said = f"{self.log[-1]}, expected {plan.codes}: {done.err[-1500:]}"
        self.rules.need("the exit code that the model expects", done.code in plan.codes, said)
        if done.code == 0:
            self.take(plan, done.document if as_json else None)

    def take(self, plan: Plan, document: Any) -> None:
        """A verb was done: the model does it, too."""
        if plan.change:
            before = set(self.world.twins)
            plan.change(self.world)
            for name in before - set(self.world.twins):
                self.rules.forget(name)
        if plan.check and document is not None:
            plan.check(self.rules, self.world, document)

    # -- faults -----------------------------------------------------------------------------------------------------

    def spawn(self, plan: Plan, before: str = "") -> subprocess.Popen[bytes]:
        """A verb in a process of its own, after what is to be done ``before``; when this returns, it begins."""
        code = "import sys; from patcher.cli import main; import patcher.labelling, patcher.relabelling, onnxruntime; "
        code += "import patcher.canary, patcher.lifecycle, patcher.founding; "
        code += before + "print('ready', flush=True); sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *self.arguments(plan)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        return process

    def killed(self) -> None:
        """``kill -9``, or Ctrl-C, at a random moment; then doctor mends."""
        plan = self.verbs.draw(self.world, server=self.triton is not None, changing=True)
        process = self.spawn(plan)
        sign = signal.SIGKILL if self.rng.random() < 0.7 else signal.SIGINT
        try:
            process.wait(float(self.rng.uniform(0.0, 0.6)))
        except subprocess.TimeoutExpired:
            process.send_signal(sign)
        _, said = process.communicate()
        self.log.append(f"{' '.join(self.arguments(plan))}, {sign.name} -> {process.returncode}")
        self.counts[f"{sign.name}: {plan.verb}"] += 1
        self.rules.need("no traceback", b"Traceback" not in said, f"{self.log[-1]}: {said.decode()}")
        if process.returncode >= 0:
            allowed = {*plan.codes, 130}
            told = f"{self.log[-1]}: {said.decode()}"
            self.rules.need("the exit code that the model expects", process.returncode in allowed, told)
        if self.triton and plan.verb in ("new-classifier", "drop-classifier") and process.returncode != 0:
            self.finish(plan)
        repaired = self.call(Plan("doctor", ["--repair"], [], {0}))
        self.rules.need("doctor mends it", repaired.code == 0, f"{self.log[-1]}: {repaired.out}")
        after = self.world.copy()
        if plan.change and 0 in plan.codes:
            plan.change(after)
        self.settle(plan, after, done=process.returncode == 0)

    def finish(self, plan: Plan) -> None:
        """A classifier that was half made or half dropped: what is left of it goes by ``drop-classifier``."""
        name = plan.words[0]
        there = name in ModelRepository(self.location).classifiers()
        if plan.verb == "new-classifier" and there:
            return
        done = self.call(Plan("drop-classifier", ["--yes"], [name], {0, 2}))
        self.rules.need("what is left is dropped", done.code in (0, 2), done.err)

    def settle(self, plan: Plan, after: World, *, done: bool) -> None:
        """Which of the two, before and after, the killed verb left."""
        repository = ModelRepository(self.location)
        before = self.world
        there = {name for name in repository.classifiers() if not name.endswith("_canary")}
        told = f"{self.log[-1]}: {there}"
        self.rules.need("a killed verb leaves before or after", there in (set(before.twins), set(after.twins)), told)
        if done:
            self.rules.need("a verb that is done is done", there == set(after.twins), told)
        for name in set(before.twins) - there:
            self.rules.forget(name)
        self.world = World({name: (after.twins if name in after.twins else before.twins)[name] for name in there})
        self.world.dropped = (after.dropped if there == set(after.twins) else before.dropped) - there
        for name in there & set(before.twins) & set(after.twins):
            self._settle_one(repository, name, before.twins[name], after.twins[name], done=done)
        for twin in self.world.twins.values():
            twin.answering = {twin.serving} if self.triton else set()

    def _settle_one(self, repository: ModelRepository, name: str, first: Twin, then: Twin, *, done: bool) -> None:
        classifier = repository.classifier(name)
        tried = on_trial(classifier)
        trial = None if tried is None else tried.serving()
        told = f"{self.log[-1]}: {classifier.versions()}, {classifier.serving()} serves, {trial} on trial"
        choices = (then,) if done else (first, then)
        versions, numbers = set(classifier.versions()), {twin.serving for twin in choices}
        self.rules.need(
            "a killed verb leaves before or after", versions in [set(each.versions) for each in choices], told
        )
        self.rules.need("a killed verb leaves before or after", classifier.serving() in numbers, told)
        self.rules.need("a killed verb leaves before or after", trial in [each.trial for each in choices], told)
        twin = then if versions == set(then.versions) else first
        twin.serving, twin.trial = classifier.serving(), trial
        twin.highest = max(twin.highest, classifier.next_version() - 1)
        self.world.twins[name] = twin

    def full(self) -> None:
        """No file can be written: whatever is tried, nothing changes."""
        plan = self.verbs.draw(self.world, server=self.triton is not None, changing=True)
        if plan.verb not in _WRITE or plan.change is None:  # a dry run writes nothing
            return
        limit = int(self.rng.choice([0, 10, 300, 700]))
        before = (
            "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.dont_write_bytecode = True; "
        )
        process = self.spawn(plan, f"{before}resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); ")
        said = process.communicate()[1].decode()
        self.log.append(f"{' '.join(self.arguments(plan))}, {limit} bytes a file -> {process.returncode}")
        self.counts["a full disk"] += 1
        codes = {1} | (plan.codes - {0})
        fits = process.returncode in codes and "Traceback" not in said
        self.rules.need("what cannot be written fails", fits, f"{self.log[-1]}, expected {codes}: {said}")
        repaired = self.call(Plan("doctor", ["--repair"], [], {0}))
        self.rules.need("doctor mends it", repaired.code == 0, f"{self.log[-1]}: {repaired.out}")
        for name, twin in self.world.twins.items():
            twin.answering = {twin.serving} if self.triton else set()
            # A number that was begun is not given again.
            twin.highest = ModelRepository(self.location).classifier(name).next_version() - 1

    def scraped(self) -> None:
        """``metrics`` tells the version that each classifier answers from, until Ctrl-C."""
        process = self.spawn(Plan("metrics", ["--port", "0"], [], {0}))
        assert process.stdout
        place = process.stdout.readline().decode().split()[2].rstrip(";")
        with urllib.request.urlopen(place, timeout=30) as page:  # noqa: S310  it is our own
            text = page.read().decode()
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1].decode()
        self.log.append(f"metrics -> {process.returncode}")
        self.counts[f"metrics: {process.returncode}"] += 1
        self.rules.need("metrics ends by Ctrl-C", process.returncode == 0 and "Traceback" not in said, said)
        for name, twin in self.world.twins.items():
            lines = [line for line in text.splitlines() if line.startswith(_SERVED) and f'classifier="{name}"' in line]
            told = {int(float(line.rsplit(" ", 1)[1])) for line in lines}
            if twin.answering:
                self.rules.need("metrics tell what answers", bool(told) and told <= twin.answering, f"{name}: {lines}")

    def together(self) -> None:
        """Two verbs at once: one waits for the other, or is refused."""
        plans = [self.verbs.draw(self.world, server=self.triton is not None, changing=True) for _ in range(2)]
        if any(plan.verb in ("new-classifier", "drop-classifier", "prune", "canary") for plan in plans):
            return
        processes = [self.spawn(plan) for plan in plans]
        said = [process.communicate()[1].decode() for process in processes]
        codes = [process.returncode for process in processes]
        self.log.append(f"{[' '.join(self.arguments(plan)) for plan in plans]} -> {codes}")
        self.counts["two at once"] += 1
        for code, words in zip(codes, said, strict=True):
            self.rules.need("exit codes of the contract", code in CODES, f"{self.log[-1]}: {words}")
            self.rules.need("no traceback", "Traceback" not in words, f"{self.log[-1]}: {words}")
        self.adopt(pruned=any("--keep" in plan.options for plan in plans))

    def adopt(self, *, pruned: bool) -> None:
        """Take new versions into the model as they lie there, where it cannot tell in which order they came."""
        repository = ModelRepository(self.location)
        for name, twin in self.world.twins.items():
            classifier = repository.classifier(name)
            new = sorted(set(classifier.versions()) - set(twin.versions))
            for number in new:
                head, memory = classifier.head(number), classifier.memory(number)
                kinds = dict(twin.versions[head.lineage.parent or 1].kinds)
                for old, new in head.lineage.renamed:
                    kinds = {new if label == old else label: kind for label, kind in kinds.items()}
                joined = tuple(kind for label in head.lineage.removed for kind in kinds.get(label, ()))
                kinds = {label: kinds.get(label) or joined or self.verbs.kinds_of(label) for label in head.labels}
                counts = None if memory is None else dict(zip(memory.labels, memory.counts.tolist(), strict=True))
                twin.versions[number] = Version(kinds, head.lineage.parent, counts, head.lineage.method)
                twin.reach[number] = head.lineage.parent
            if pruned:
                twin.versions = {number: twin.versions[number] for number in classifier.versions()}
            trial = on_trial(classifier)
            twin.trial = None if trial is None else trial.serving()
            twin.serving, twin.highest = classifier.serving(), max(twin.highest, classifier.next_version() - 1)
            if self.triton:
                twin.answering |= {twin.serving, *new}

    def damaged(self) -> None:
        """A byte of a head's file is another: doctor says so, no change is built on it, what serves goes on."""
        name = str(self.rng.choice(sorted(self.world.twins)))
        twin = self.world.twins[name]
        number = twin.serving if self.rng.random() < 0.6 else int(self.rng.choice(sorted(twin.versions)))
        path = ModelRepository(self.location).classifier(name).version_path(number) / "model.onnx"
        data = path.read_bytes()
        place = int(self.rng.integers(len(data)))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << int(self.rng.integers(8)))]) + data[place + 1 :])
        self.log.append(f"byte {place} of version {number} of {name} is another")
        self.counts["a damaged head"] += 1
        try:
            found = self.call(Plan("doctor", [], [], {1}))
            self.rules.need(
                "doctor sees a damaged version", found.code == 1 and f"version {number}" in found.out, found
            )
            for _ in range(2):
                plan = self.verbs.draw(self.world, server=self.triton is not None, classifier=name)
                if plan.verb not in _ON_DAMAGED:
                    continue
                done = self.call(plan)
                self.log.append(f"{' '.join(self.arguments(plan))}, damaged -> {done.code}")
                if done.code == 0 and plan.change:
                    built = plan.verb != "rollback" and "--canary" not in plan.options and number == twin.serving
                    self.rules.need("no change is built on a damaged version", not built, self.log[-1])
                    self.take(plan, done.document)
                    into = plan.verb != "rollback" or self.world.twins[name].serving != number
                    self.rules.need("no damaged version is made to serve", into, self.log[-1])
                self.rules.repository(self.world, damaged=True)
        finally:
            path.write_bytes(data)
        if self.triton:
            self.rules.need(
                "sync goes on once it is restored", self.call(Plan("sync", [], [], {0})).code == 0, self.log[-1]
            )
            for twin in self.world.twins.values():
                twin.answering = {twin.serving}

    # -- rules ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Everything that has to hold after a step."""
        self.rules.repository(self.world)
        if self.triton:
            self.rules.served(self.world, self.triton.url)
        left = [path.name for path in self.temporary.iterdir() if path.name != ".ses"]  # of the server's
        self.rules.need("nothing is left in the temporary folder", not left, left)
        if self.rng.random() < 0.2:
            behind = self.triton and any(twin.answering != {twin.serving} for twin in self.world.twins.values())
            done = self.call(Plan("doctor", [], [], {0, 1}))
            if not behind:
                self.rules.need("doctor finds nothing", done.code == 0, done.out)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """With these in the environment."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    tempfile.tempdir = None
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        tempfile.tempdir = None


def run(
    steps: int, seed: int, location: str | None = None, *, checkpoint: Path | None = None, raced: bool = True
) -> dict[str, Any]:
    """One walk of so many steps, in a folder of its own, or in an empty place of an object store.

    Without ``raced`` nothing is killed and nothing runs at once, so that each run does the same.

    Raises Broken with the steps that led there.
    """
    with tempfile.TemporaryDirectory() as name:
        walk = Walk(Path(name), seed, location, raced=raced)
        walk.verbs.checkpoint = checkpoint
        started = time.perf_counter()
        with environment(TMPDIR=str(walk.temporary), PATCHER_AUDIT_LOG=str(walk.audit), XDG_CACHE_HOME=f"{name}/cache"):
            try:
                walk.start()
                for _ in range(steps):
                    walk.step()
            except Exception as error:
                trail = "\n  ".join(walk.log[-12:])
                raise Broken(
                    f"seed {seed}, after {len(walk.log)} steps:\n  {trail}\n{type(error).__name__}: {error}"
                ) from error
            finally:
                with contextlib.suppress(Broken):
                    walk.stop()
        versions = sum(twin.highest for twin in walk.world.twins.values())
        found = {"seed": seed, "steps": steps, "seconds": round(time.perf_counter() - started), "versions": versions}
        return {**found, "verbs": dict(sorted(walk.counts.items())), "checks": dict(sorted(walk.rules.checks.items()))}


def main() -> int:
    """Run all seeds, and print what they did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", default="8,9")
    parser.add_argument("--store", action="store_true", help="on an object store")
    parser.add_argument("--export", action="store_true", help="with a checkpoint, exported on the way")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = []
    with contextlib.ExitStack() as end:
        location = end.enter_context(store()) if options.store else None
        checkpoint = end.enter_context(exported()) if options.export else None
        for number, seed in enumerate(map(int, options.seeds.split(","))):
            place = f"{location}/{number}" if location else None
            try:
                found.append(run(options.steps, seed, place, checkpoint=checkpoint))
            except Broken as error:
                sys.stderr.write(f"broken: {error}\n")
                return 1
            print({name: found[-1][name] for name in ("seed", "steps", "seconds")}, file=sys.stderr, flush=True)
    document = json.dumps(found, indent=1)
    options.out.write_text(document + "\n")
    print(document)
    return 0


@contextlib.contextmanager
def store() -> Iterator[str]:
    """An object store on this machine, and where a repository may lie in it."""
    import s3_server

    server = s3_server.S3Server()
    server.empty()
    names = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    names |= {"AWS_ENDPOINT_URL": server.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}
    with environment(**names):
        yield f"s3://{s3_server.BUCKET}/walk"
    server.stop()


@contextlib.contextmanager
def exported() -> Iterator[Path]:
    """A tiny checkpoint, to be exported."""
    import checkpoints

    with tempfile.TemporaryDirectory() as name:
        yield checkpoints.save_checkpoint(Path(name) / "checkpoint")


if __name__ == "__main__":
    sys.exit(main())
