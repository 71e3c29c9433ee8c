"""A model-based random test: random verbs and faults on real servers, checked against a model after every step.

    python tests/benchmarks/walk.py [--steps 200] [--seeds 8,9] [--servers 2] [--store] [--export]

Verbs are drawn at random and run through the real command line, on a repository of tiny classifiers (softmax, sigmoids,
in a head store) that real servers serve. In between, servers stop, die and start, verbs are killed or run two at a
time, head files are damaged, and the disk is full. After every step the rules in ``walk_model.py`` are checked. With
``--servers 2`` (or more) every verb names several servers, some of which may be down or not named. With ``--store`` the
repository is on moto's S3 server; with ``--export`` a checkpoint is exported into it, too.
Prints the results as JSON. If a rule is broken, exits with 1 and prints the seed and the last steps.

``walk_changes.py`` and ``walk_looks.py`` define the verbs and what each does to the model, ``walk_faults.py`` the
faults.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import tiny
from walk_faults import Faults
from walk_model import Broken, Replica, Rules, Twin, Version, World
from walk_servers import Servers
from walk_verbs import Plan, Verbs

from patcher.cli import BUG
from patcher.cli import main as command_line
from patcher.head import MULTI_LABEL
from patcher.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results" / "walk.json"
CODES = {0, 1, 2, 3, 4, 130}
WATCH = "0.1"
"""Seconds that the first of several servers serves a new version alone."""
_WARNED = {
    *("add-label", "rename-label", "remove-label", "merge-labels", "remember", "rollback", "canary", "new-classifier"),
    *("sync", "classify", "loadtest"),
}
"""The verbs that warn if a server is left out."""


@dataclass(frozen=True)
class Done:
    """The exit code and the output of a verb."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The JSON document that ``--json`` prints."""
        return json.loads(self.out)


class Walk:
    """One walk, in ``folder``, with ``servers`` servers."""

    def __init__(
        self, folder: Path, seed: int, location: Path | str | None = None, *, raced: bool = True, servers: int = 1
    ) -> None:
        self.folder, self.raced = folder, raced
        self.location = folder / "model_repository" if location is None else location
        self.rng = np.random.default_rng(seed)
        self.world = World(replicas=[Replica() for _ in range(servers)])
        self.log: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.audit = folder / "audit.jsonl"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        (folder / "files").mkdir()
        self._found()
        self.rules = Rules(self.location)
        self.servers = Servers(self.location, folder, servers)
        self.faults = Faults(self)
        self.verbs = Verbs(self.rng, folder / "files", self.location, in_folder=location is None)

    def _found(self) -> None:
        """Create the repository: a softmax classifier, and one with sigmoids on the same backbone."""
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

    # -- a verb -----------------------------------------------------------------------------------------------------

    def arguments(self, plan: Plan) -> list[str]:
        """The command-line arguments; labels come last, after ``--``, since one may start with a dash."""
        urls = [self.world.replicas[place].url for place in self.named(plan)]
        options = [] if plan.verb == "export" else ["--url", ",".join(urls), "--watch", WATCH]
        words = ["--", *plan.words] if plan.words else []
        return [plan.verb, *plan.options, "--repo", str(self.location), *options, *words]

    def named(self, plan: Plan) -> tuple[int, ...]:
        """The servers in its ``--url``."""
        return plan.named or tuple(range(len(self.world.replicas)))

    def call(self, plan: Plan, *, as_json: bool = True) -> Done:
        """Run a verb in this process."""
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
        """Check the rules for every run of every verb."""
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
        named = self.named(plan)
        away = [replica.url for replica in (self.world.replicas[place] for place in named) if not replica.up]
        asks = plan.verb in _WARNED and not {"--no-load", "--dry-run"} & {*plan.options}
        if done.code == 0 and asks and 0 < len(away) < len(named):
            warned = all(url in done.err for url in away) and "is left out" in done.err
            self.rules.need("who is left out is named", warned, said)

    def step(self) -> None:
        """Take one step: usually a verb, sometimes a fault or the start of a server that is down."""
        down = sorted(set(range(len(self.world.replicas))) - set(self.world.up))
        fault = self.faults.draw()
        if down and self.rng.random() < (0.15 if self.world.up else 0.35):
            place = int(self.rng.choice(down))
            self.log.append(f"server {place} starts")
            self.servers.start(place, self.world)
        elif fault:
            fault()
        else:
            self.verb()
        self.check()

    def verb(self) -> None:
        """Draw a verb, run it, and apply it to the model."""
        plan = self.verbs.draw(self.world)
        as_json = bool(self.rng.random() < 0.8)
        done = self.call(plan, as_json=as_json)
        self.log.append(f"{' '.join(self.arguments(plan))} -> {done.code}")
        self.counts[f"{plan.verb}: {done.code}"] += 1
        said = f"{self.log[-1]}, expected {plan.codes}: {done.err[-1500:]}"
        self.rules.need("the exit code that the model expects", done.code in plan.codes, said)
        if done.code in plan.done:
            self.take(plan, done.document if as_json else None)

    def take(self, plan: Plan, document: Any) -> None:
        """Apply a completed verb to the model, and check its document."""
        if plan.change:
            before = set(self.world.twins)
            plan.change(self.world)
            for name in before - set(self.world.twins):
                self.rules.forget(name)
        if plan.check and document is not None:
            plan.check(self.rules, self.world, document)

    # -- rules ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check everything that must hold after a step."""
        self.rules.repository(self.world)
        for place in self.world.up:
            self.rules.served(self.world, self.world.replicas[place])
        mine = self.servers.left()
        self.rules.need("nothing is left in shared memory", not mine, mine)
        left = [path.name for path in self.temporary.iterdir() if path.name != ".ses"]  # the servers'
        self.rules.need("nothing is left in the temporary folder", not left, left)
        if self.rng.random() < 0.2:
            done = self.call(Plan("doctor", [], [], {0, 1}))
            self.rules.diagnosis(self.world, done.code, done.document)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set these environment variables for the duration of the block."""
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
    steps: int,
    seed: int,
    location: str | None = None,
    *,
    checkpoint: Path | None = None,
    raced: bool = True,
    servers: int = 1,
) -> dict[str, Any]:
    """Take one walk of ``steps`` steps, in a folder of its own or at an empty location in an object store.

    Without ``raced``, no verb is killed and nothing runs concurrently, so that every run does the same.

    Raises Broken, with the last steps, if a rule is broken.
    """
    with tempfile.TemporaryDirectory() as name:
        walk = Walk(Path(name), seed, location, raced=raced, servers=servers)
        walk.verbs.checkpoint = checkpoint
        started = time.perf_counter()
        with environment(TMPDIR=str(walk.temporary), PATCHER_AUDIT_LOG=str(walk.audit), XDG_CACHE_HOME=f"{name}/cache"):
            try:
                for place in range(servers):
                    walk.servers.start(place, walk.world)
                for _ in range(steps):
                    walk.step()
            except Exception as error:
                trail = "\n  ".join(walk.log[-12:])
                raise Broken(
                    f"seed {seed}, after {len(walk.log)} steps:\n  {trail}\n{type(error).__name__}: {error}"
                ) from error
            finally:
                for place in range(servers):
                    walk.servers.stop(place, walk.world)
        versions = sum(twin.highest for twin in walk.world.twins.values())
        found = {
            "seed": seed,
            "servers": servers,
            "steps": steps,
            "seconds": round(time.perf_counter() - started),
            "versions": versions,
        }
        return {**found, "verbs": dict(sorted(walk.counts.items())), "checks": dict(sorted(walk.rules.checks.items()))}


def main() -> int:
    """Run all seeds and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", default="8,9")
    parser.add_argument("--servers", type=int, default=1, help="how many serve the repository")
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
                found.append(run(options.steps, seed, place, checkpoint=checkpoint, servers=options.servers))
            except Broken as error:
                sys.stderr.write(f"broken: {error}\n")
                return 1
            print(
                {name: found[-1][name] for name in ("seed", "servers", "steps", "seconds")}, file=sys.stderr, flush=True
            )
    document = json.dumps(found, indent=1)
    options.out.write_text(document + "\n")
    print(document)
    return 0


@contextlib.contextmanager
def store() -> Iterator[str]:
    """Run an object store on this machine; yields a URL for a repository in it."""
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
    """Create a tiny checkpoint to export."""
    import checkpoints

    with tempfile.TemporaryDirectory() as name:
        yield checkpoints.save_checkpoint(Path(name) / "checkpoint")


if __name__ == "__main__":
    sys.exit(main())
