"""The faults of a walk: servers and verbs die, two verbs run at once, the disk is full, files are damaged."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from walk_model import Twin, Version, World
from walk_verbs import Plan

from patcher import ModelRepository
from patcher.rollout import on_trial

if TYPE_CHECKING:
    from collections.abc import Callable

    from walk import Walk

__all__ = ["Faults"]

_WRITE = {"add-label", "rename-label", "remove-label", "merge-labels", "remember", "rollback"}
_ON_DAMAGED = _WRITE | {"labels", "history", "diff", "evaluate", "report", "classify"}
_CODES = {0, 1, 2, 3, 4, 130}
_SERVED = "patcher_head_version{"
_ALONE = {"ended": 0.04, "damaged": 0.06}
_RACED = {
    "ended": 0.03, "scraped": 0.01, "deserted": 0.03, "crippled": 0.02, "killed": 0.05, "together": 0.03, "full": 0.02,
    "damaged": 0.03,
}  # fmt: skip
_SEVERAL = {"ended": 0.06, "hung": 0.02}
_OF_SERVERS, _OF_FOLDERS = {"ended", "scraped", "deserted", "crippled", "hung"}, {"full", "damaged"}


class Faults:
    """Each method injects one fault into a walk, and checks that it harms nothing else."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def draw(self) -> Callable[[], None] | None:
        """Draw a fault, or most of the time none; without races, only faults with a deterministic outcome."""
        walk = self.walk
        chances = {**_RACED, **(_SEVERAL if len(walk.world.replicas) > 1 else {})} if walk.raced else _ALONE
        names = [*chances, ""]
        name = str(walk.rng.choice(names, p=[*chances.values(), 1 - sum(chances.values())]))
        possible = walk.world.up or name not in _OF_SERVERS
        possible = possible and (isinstance(walk.location, Path) or name not in _OF_FOLDERS)
        return getattr(self, name) if name and possible else None

    def spawn(self, plan: Plan, before: str = "") -> subprocess.Popen[bytes]:
        """Start a verb in a process of its own, after the code ``before``; returns when the verb is about to begin."""
        # A script's background processes ignore SIGINT, and their children would, too.
        code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code += "from patcher.cli import main; import patcher.labelling, patcher.relabelling, onnxruntime; "
        code += "import patcher.canary, patcher.lifecycle, patcher.founding; "
        code += before + "print('ready', flush=True); sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *self.walk.arguments(plan)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        return process

    def note(self, plan: Plan, what: str, code: int, counted: str) -> None:
        """Add the run to the log and the counts."""
        self.walk.log.append(f"{' '.join(self.walk.arguments(plan))}, {what} -> {code}")
        self.walk.counts[counted] += 1

    def mend(self) -> None:
        """Run ``doctor --repair``, after which servers that are down must be its only faults."""
        walk = self.walk
        away = len(walk.world.up) < len(walk.world.replicas)
        repaired = walk.call(Plan("doctor", ["--repair"], [], {int(away)}))
        faults = [each for each in repaired.document if each["state"] == "fault"]
        faults = [each for each in faults if not (away and ("no server answers" in each["finding"] or _away(each)))]
        mended = repaired.code == int(away) and not faults
        walk.rules.need("doctor mends it", mended, f"{walk.log[-1]}: {repaired.code}, {faults}")

    # -- servers ----------------------------------------------------------------------------------------------------

    def ended(self) -> None:
        """Stop or kill a server."""
        walk = self.walk
        place = int(walk.rng.choice(walk.world.up))
        if walk.rng.random() < 0.5:
            walk.log.append(f"server {place} stops")
            walk.servers.stop(place, walk.world)
        else:
            walk.log.append(f"server {place} is killed")
            walk.counts["a server is killed"] += 1
            walk.servers.kill(place, walk.world)

    def hung(self) -> None:
        """A server hangs during two verbs and then resumes with its old state: behind, and without a restart."""
        walk = self.walk
        place = int(walk.rng.choice(walk.world.up))
        replica = walk.world.replicas[place]
        walk.log.append(f"server {place} hangs")
        walk.counts["a server hangs"] += 1
        walk.servers.hang(place, still=True)
        replica.up = False
        try:
            for _ in range(2):
                walk.verb()
        finally:
            walk.servers.hang(place, still=False)
        replica.up = True
        walk.log.append(f"server {place} goes on")

    def crippled(self) -> None:
        """Kill a process in which a server runs a model; ``sync`` must make the server serve that model again."""
        walk = self.walk
        place = int(walk.rng.choice(walk.world.up))
        if not (there := walk.servers.processes(place)):
            return
        victim = int(walk.rng.choice(there))
        walk.servers.kill_process(victim)
        walk.log.append(f"a process of server {place} is killed")
        walk.counts["a process of a server is killed"] += 1
        plan = Plan("sync", [], [], {0}, named=walk.world.up)
        synced = walk.call(plan)
        walk.rules.need("sync brings a model back whose process died", synced.code == 0, f"{walk.log[-1]}: {synced}")
        walk.world.sync(walk.world.up)

    def deserted(self) -> None:
        """Kill a server during a verb; when the verb has ended, the other servers must serve the pinned version."""
        walk = self.walk
        plan = walk.verbs.draw(walk.world, changing=bool(walk.rng.random() < 0.8))
        victims = [place for place in walk.named(plan) if place in walk.world.up]
        if not victims:
            return
        victim = int(walk.rng.choice(victims))
        process = self.spawn(plan)
        time.sleep(float(walk.rng.uniform(0.0, 0.8)))
        after = walk.world.copy()
        walk.servers.kill(victim, walk.world)
        said = process.communicate()[1].decode()
        self.note(plan, f"server {victim} dies", process.returncode, f"a server dies during {plan.verb}")
        told = f"{walk.log[-1]}: {said}"
        walk.rules.need("no traceback", "Traceback" not in said, told)
        allowed = {*plan.codes, 1, 4} | ({0} if plan.verb == "doctor" else set())  # all servers may be gone
        walk.rules.need("the exit code that the model expects", process.returncode in allowed, told)
        if plan.change and plan.does():
            plan.change(after)
        after.stop(victim)
        if plan.verb in _WRITE and process.returncode in (0, 4) and "--canary" not in plan.options:
            self._served_as_pinned(plan, told)
        if plan.verb == "drop-classifier" and process.returncode == 1:
            self._still_served(plan.words[0], told)
        if plan.verb in ("new-classifier", "drop-classifier") and process.returncode not in (0, 2, 3):
            self.finish(plan)
        self.mend()
        self.settle(plan, after, done=process.returncode == 0)

    def _served_as_pinned(self, plan: Plan, told: str) -> None:
        """Check that the servers that the verb named, and that run, serve exactly the pinned version."""
        walk, name = self.walk, plan.options[-1]
        if "--no-load" in plan.options:
            return
        names = ",".join(walk.world.replicas[place].url for place in walk.named(plan) if place in walk.world.up)
        if not names:
            return
        pinned = ModelRepository(walk.location).classifier(name).serving()
        for url in names.split(","):
            found = walk.rules.version_at(url, name)
            walk.rules.need("a server that lives serves what is pinned", found == pinned, f"{url}: {found}; {told}")

    def _still_served(self, name: str, told: str) -> None:
        """Check that a classifier that could not be dropped everywhere is dropped nowhere."""
        walk = self.walk
        if name not in ModelRepository(walk.location).classifiers():
            return
        for replica in (walk.world.replicas[place] for place in walk.world.up):
            if may := replica.answering.get(name):
                found = walk.rules.version_at(replica.url, name)
                walk.rules.need("what could not be dropped is served", found in may, f"{replica.url}: {found}; {told}")

    def scraped(self) -> None:
        """``metrics`` must report the version that each server answers from, and end on Ctrl-C."""
        walk = self.walk
        process = self.spawn(Plan("metrics", ["--port", "0"], [], {0}))
        assert process.stdout
        place = process.stdout.readline().decode().split()[2].rstrip(";")
        with urllib.request.urlopen(place, timeout=30) as page:  # noqa: S310  it is our own
            text = page.read().decode()
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1].decode()
        walk.log.append(f"metrics -> {process.returncode}")
        walk.counts[f"metrics: {process.returncode}"] += 1
        walk.rules.need("metrics ends by Ctrl-C", process.returncode == 0 and "Traceback" not in said, said)
        for replica in walk.world.replicas:
            where = f'replica="{replica.url}"'
            for name in walk.world.twins:
                lines = [each for each in text.splitlines() if where in each and f'classifier="{name}"' in each]
                up = [each for each in lines if each.startswith("patcher_replica_up{")]
                told = {int(float(each.rsplit(" ", 1)[1])) for each in lines if each.startswith(_SERVED)}
                may, found = replica.answering.get(name, set()), f"{name}: {lines}"
                if not replica.up:
                    walk.rules.need("metrics tell who is away", [each[-3:] for each in up] == ["0.0"], found)
                elif may:
                    walk.rules.need("metrics tell what answers", bool(told) and told <= may, found)

    # -- verbs ------------------------------------------------------------------------------------------------------

    def killed(self) -> None:
        """Send SIGKILL or SIGINT to a verb at a random moment, then have doctor repair."""
        walk = self.walk
        plan = walk.verbs.draw(walk.world, changing=True)
        process = self.spawn(plan)
        sign = signal.SIGKILL if walk.rng.random() < 0.7 else signal.SIGINT
        try:
            process.wait(float(walk.rng.uniform(0.0, 0.6)))
        except subprocess.TimeoutExpired:
            process.send_signal(sign)
        said = process.communicate()[1].decode()
        self.note(plan, sign.name, process.returncode, f"{sign.name}: {plan.verb}")
        told = f"{walk.log[-1]}: {said}"
        walk.rules.need("no traceback", "Traceback" not in said, told)
        if process.returncode >= 0:
            allowed = {*plan.codes, 130}
            walk.rules.need("the exit code that the model expects", process.returncode in allowed, told)
        if plan.verb in ("new-classifier", "drop-classifier") and process.returncode != 0:
            self.finish(plan)
        self.mend()
        after = walk.world.copy()
        if plan.change and plan.does():
            plan.change(after)
        self.settle(plan, after, done=process.returncode in plan.done)

    def finish(self, plan: Plan) -> None:
        """Remove what is left of a half created or half dropped classifier, with ``drop-classifier``."""
        walk, name = self.walk, plan.words[0]
        there = name in ModelRepository(walk.location).classifiers()
        if not walk.world.up or (plan.verb == "new-classifier" and there):
            return
        done = walk.call(Plan("drop-classifier", ["--yes"], [name], {0, 2}, named=walk.world.up))
        walk.rules.need("what is left is dropped", done.code in (0, 2), done.err)

    def settle(self, plan: Plan, after: World, *, done: bool) -> None:
        """Find out whether the killed verb left the state before or the state ``after`` it, and update the model."""
        walk = self.walk
        repository, before = ModelRepository(walk.location), walk.world
        there = {name for name in repository.classifiers() if not name.endswith("_canary")}
        told = f"{walk.log[-1]}: {there}"
        walk.rules.need("a killed verb leaves before or after", there in (set(before.twins), set(after.twins)), told)
        if done:
            walk.rules.need("a verb that is done is done", there == set(after.twins), told)
        for name in set(before.twins) - there:
            walk.rules.forget(name)
        replicas = (after if there == set(after.twins) else before).replicas
        twins = {name: (after.twins if name in after.twins else before.twins)[name] for name in there}
        walk.world = World(twins, replicas)
        for name in there & set(before.twins) & set(after.twins):
            self._settle_one(repository, name, before.twins[name], after.twins[name], done=done)
        walk.world.sync(walk.world.up)
        if plan.verb in ("new-classifier", "drop-classifier") and plan.words[0] not in there and not done:
            for place in walk.world.up:
                walk.world.replicas[place].answering.pop(plan.words[0], None)

    def _settle_one(self, repository: ModelRepository, name: str, first: Twin, then: Twin, *, done: bool) -> None:
        walk = self.walk
        classifier = repository.classifier(name)
        tried = on_trial(classifier)
        trial = None if tried is None else tried.serving()
        told = f"{walk.log[-1]}: {classifier.versions()}, {classifier.serving()} serves, {trial} on trial"
        # A state in between: the new version serves, but `--keep` has not deleted any version: Ctrl-C ends only that.
        middle = dataclasses.replace(then, versions={**first.versions, **then.versions})
        choices = (middle, then) if done else (first, middle, then)
        versions, numbers = set(classifier.versions()), {twin.serving for twin in choices}
        rule = "a killed verb leaves before or after"
        walk.rules.need(rule, versions in [set(each.versions) for each in choices], told)
        walk.rules.need(rule, classifier.serving() in numbers, told)
        walk.rules.need(rule, trial in [each.trial for each in choices], told)
        twin = next(each for each in reversed(choices) if versions == set(each.versions))
        twin.serving, twin.trial = classifier.serving(), trial
        twin.highest = max(twin.highest, classifier.next_version() - 1)
        walk.world.twins[name] = twin

    def together(self) -> None:
        """Run two verbs at once: one must wait for the other or be refused."""
        walk = self.walk
        plans = [walk.verbs.draw(walk.world, changing=True, all_named=True) for _ in range(2)]
        if any(plan.verb in ("new-classifier", "drop-classifier", "prune", "canary") for plan in plans):
            return
        processes = [self.spawn(plan) for plan in plans]
        said = [process.communicate()[1].decode() for process in processes]
        codes = [process.returncode for process in processes]
        walk.log.append(f"{[' '.join(walk.arguments(plan)) for plan in plans]} -> {codes}")
        walk.counts["two at once"] += 1
        for code, words in zip(codes, said, strict=True):
            walk.rules.need("exit codes of the contract", code in _CODES, f"{walk.log[-1]}: {words}")
            walk.rules.need("no traceback", "Traceback" not in words, f"{walk.log[-1]}: {words}")
        self.adopt(pruned=any("--keep" in plan.options for plan in plans))

    def adopt(self, *, pruned: bool) -> None:
        """Add new versions to the model as found in the repository, since it cannot know in which order they came."""
        walk = self.walk
        repository = ModelRepository(walk.location)
        for name, twin in walk.world.twins.items():
            classifier = repository.classifier(name)
            new = sorted(set(classifier.versions()) - set(twin.versions))
            for number in new:
                head, memory = classifier.head(number), classifier.memory(number)
                kinds = dict(twin.versions[head.lineage.parent or 1].kinds)
                for old, later in head.lineage.renamed:
                    kinds = {later if label == old else label: kind for label, kind in kinds.items()}
                joined = tuple(kind for label in head.lineage.removed for kind in kinds.get(label, ()))
                kinds = {label: kinds.get(label) or joined or walk.verbs.kinds_of(label) for label in head.labels}
                counts = None if memory is None else dict(zip(memory.labels, memory.counts.tolist(), strict=True))
                twin.versions[number] = Version(kinds, head.lineage.parent, counts, head.lineage.method)
                twin.reach[number] = head.lineage.parent
            if pruned:
                twin.versions = {number: twin.versions[number] for number in classifier.versions()}
            trial, before = on_trial(classifier), twin.trial
            twin.trial = None if trial is None else trial.serving()
            twin.serving, twin.highest = classifier.serving(), max(twin.highest, classifier.next_version() - 1)
            for replica in (walk.world.replicas[place] for place in walk.world.up):
                if name in replica.answering:
                    replica.answering[name] |= {twin.serving, *new}
                if twin.trial and twin.trial != before:
                    replica.trying[name] = twin.trial

    # -- files ------------------------------------------------------------------------------------------------------

    def full(self) -> None:
        """Run a verb that cannot write files beyond a few bytes, as on a full disk; nothing may change."""
        walk = self.walk
        plan = walk.verbs.draw(walk.world, changing=True)
        if plan.verb not in _WRITE or plan.change is None:  # a dry run writes nothing
            return
        limit = int(walk.rng.choice([0, 10, 300, 700]))
        before = (
            "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.dont_write_bytecode = True; "
        )
        process = self.spawn(plan, f"{before}resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); ")
        said = process.communicate()[1].decode()
        self.note(plan, f"{limit} bytes a file", process.returncode, "a full disk")
        codes = {1} | (plan.codes - {0})
        fits = process.returncode in codes and "Traceback" not in said
        walk.rules.need("what cannot be written fails", fits, f"{walk.log[-1]}, expected {codes}: {said}")
        self.mend()
        walk.world.sync(walk.world.up)
        for name, twin in walk.world.twins.items():  # a version number that was taken is not reused
            twin.highest = ModelRepository(walk.location).classifier(name).next_version() - 1

    def damaged(self) -> None:
        """Flip a bit in a head file: doctor must report it, and no change may be built on that version."""
        walk = self.walk
        name = str(walk.rng.choice(sorted(walk.world.twins)))
        twin = walk.world.twins[name]
        number = twin.serving if walk.rng.random() < 0.6 else int(walk.rng.choice(sorted(twin.versions)))
        path = ModelRepository(walk.location).classifier(name).version_path(number) / "model.onnx"
        data = path.read_bytes()
        place = int(walk.rng.integers(len(data)))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << int(walk.rng.integers(8)))]) + data[place + 1 :])
        walk.log.append(f"byte {place} of version {number} of {name} is another")
        walk.counts["a damaged head"] += 1
        try:
            found = walk.call(Plan("doctor", [], [], {1}))
            seen = found.code == 1 and f"version {number}" in found.out
            walk.rules.need("doctor sees a damaged version", seen, found)
            for _ in range(2):
                plan = walk.verbs.draw(walk.world, classifier=name)
                if plan.verb in _ON_DAMAGED:
                    self._on_damaged(plan, name, number)
                walk.rules.repository(walk.world, damaged=True)
        finally:
            path.write_bytes(data)
        if walk.world.up:
            away = len(walk.world.up) < len(walk.world.replicas)
            synced = walk.call(Plan("sync", [], [], {int(away)}))
            walk.rules.need("sync goes on once it is restored", synced.code == int(away), f"{walk.log[-1]}: {synced}")
            walk.world.sync(walk.world.up)

    def _on_damaged(self, plan: Plan, name: str, number: int) -> None:
        walk = self.walk
        serving = walk.world.twins[name].serving
        done = walk.call(plan)
        walk.log.append(f"{' '.join(walk.arguments(plan))}, damaged -> {done.code}")
        if done.code == 0 and plan.change:
            built = plan.verb != "rollback" and "--canary" not in plan.options and number == serving
            walk.rules.need("no change is built on a damaged version", not built, walk.log[-1])
            walk.take(plan, done.document)
            into = plan.verb != "rollback" or walk.world.twins[name].serving != number
            walk.rules.need("no damaged version is made to serve", into, walk.log[-1])


def _away(check: dict[str, str]) -> bool:
    """Whether a repair reports a server as away."""
    return check["finding"].endswith(": away")
