"""Kills add-label, remove-label, rollback and rename-label with SIGKILL while they change a repository with a server.

    python tests/benchmarks/kill.py [--moments 130] [--seed 0]

Two kills of three come before a step of the change (``kill_steps.py``), in random order, until each step of each verb
has had its turn. All others come at a random moment between the first step and the last. After each kill the
repository must open and pin the version before or after the change, and the server must answer from one of the two.
Then ``patcher doctor --repair`` must make repository and server agree, and ``patcher doctor`` must find nothing. Prints
the results as JSON; exits with 1 if a rule was broken.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

from patcher import ModelRepository, TritonServer, doctor, history
from patcher.triton.server import EmbeddedTriton

if TYPE_CHECKING:
    from patcher.classifier import Classifier

VERBS = ("add-label", "rollback", "add-label", "rename-label")
"""The turns; a label that is known already is removed instead of added."""
STEPS = str(Path(__file__).parent / "kill_steps.py")


class Broken(AssertionError):
    """A rule was broken."""


class Killer:
    """Kills verbs on ``classifier``, served at ``url``, and checks the state they leave behind."""

    def __init__(self, classifier: Classifier, url: str, folder: Path, seed: int) -> None:
        self.classifier, self.url, self.folder = classifier, url, folder
        self.location = classifier.repository.location
        self.rng = np.random.default_rng(seed)
        self.numbers = 0
        self.times: dict[str, list[float]] = {}
        """By verb, the seconds from the first step of a whole change to each of its steps."""
        self.left: dict[str, list[int]] = {}
        """By verb, the steps before which it has not been killed yet."""
        self.counts: collections.Counter[str] = collections.Counter()

    def arguments(self, verb: str) -> list[str]:
        self.numbers += 1
        if verb == "add-label":
            label = tiny.NEW[self.numbers % len(tiny.NEW)]
            known = self.classifier.head().labels
            file = tiny.write_csv(self.folder / "new.csv", {label: tiny.sentences(label, 10)})
            if label in known:
                return ["remove-label", label]
            return ["add-label", "--force", "--examples", str(file)]
        if verb == "rollback":
            return ["rollback"] if self.classifier.head().lineage.parent else self.arguments("rename-label")
        old = self.classifier.head().labels[0]
        return ["rename-label", old, f"{old.split('-')[0]}-{self.numbers}"]

    def start(self, arguments: list[str], step: int = 0) -> tuple[subprocess.Popen[bytes], IO[str]]:
        """Start a verb that kills itself before ``step``, if that is not 0; also returns what it reports."""
        reading, writing = os.pipe()
        command = [sys.executable, STEPS, str(writing), str(step), *arguments]
        command += ["--repo", str(self.location), "--url", self.url]
        process = subprocess.Popen(command, pass_fds=[writing], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        os.close(writing)
        return process, os.fdopen(reading)

    def whole(self, arguments: list[str]) -> None:
        """Let a verb finish, and note its steps."""
        process, reports = self.start(arguments)
        with reports:
            _, said = process.communicate()
            lines = reports.read().splitlines()
        if process.returncode:
            raise Broken(f"{arguments}: {said.decode()}")
        self.times[arguments[0]] = times = json.loads(lines[-1])
        self.left[arguments[0]] = [int(number) for number in self.rng.permutation(len(times)) + 1]

    def kill(self, arguments: list[str]) -> str:
        """Run a verb and kill it; returns where, or ``was done already``."""
        verb, at_random = arguments[0], self.counts["killed"] % 3 == 2
        step = 0 if at_random or not self.left[verb] else self.left[verb].pop()
        process, reports = self.start(arguments, step)
        with reports:
            reports.readline()  # the first step has come, or the process has ended
            try:
                process.wait(60.0 if step else self.rng.uniform(0.0, self.times[verb][-1]))
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
        if process.returncode != -signal.SIGKILL:
            return "was done already"
        return "killed before a step" if step else "killed at a random moment"

    def one(self, verb: str) -> None:
        """Run a verb, kill it, and check what it left; the first of its kind is only watched."""
        classifier = self.classifier
        before, number = classifier.serving(), classifier.next_version()
        labels = {version: classifier.head(version).labels for version in classifier.versions()}
        arguments = self.arguments(verb)
        if arguments[0] not in self.times:
            self.whole(arguments)
            return
        after = classifier.head().lineage.parent if arguments[0] == "rollback" else number
        outcome = self.kill(arguments)
        serving = ModelRepository(self.location).classifier().serving()
        with TritonServer(self.url) as server:
            # The server may still be loading what it was told to before the kill.
            answered = {answer.head_version for answer in server.classify(classifier.name, ["anybody?"] * 3)}
            pending = classifier.journal.pending()
            self.counts[outcome] += 1
            if outcome.startswith("killed"):
                self.counts["killed"] += 1
                self.counts["pinned the new one" if serving == after else "pinned the old one"] += 1
                ended = "all done" if serving == after else "nothing begun"
                self.counts[f"journal: {'interrupted' if pending else ended}"] += 1
            if serving not in (before, after) or not answered <= {before, after}:
                raise Broken(f"{arguments}: {before} -> {after}, but {serving} is pinned and {answered} answers")
            repaired = [check for check in doctor.repair(self.location, server) if check.state == "fault"]
            faults = [check for check in doctor.diagnose(self.location, server, self.url) if check.state == "fault"]
            if repaired or faults:
                raise Broken(f"{arguments}: doctor finds {repaired + faults}")
            for version, known in labels.items():
                if classifier.head(version).labels != known:
                    raise Broken(f"{arguments}: version {version} has other labels now")
            served = server.classify(classifier.name, ["anybody?"])[0].head_version
            if served != classifier.serving() or served not in (before, after):
                raise Broken(f"{arguments}: {served} serves after the repair; {before} -> {after}")


def run(moments: int, seed: int, location: str | None = None) -> dict[str, Any]:
    """Kill ``moments`` times, in a temporary folder or at an empty ``location`` in an object store."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classifier = tiny.make_repository(location or folder / "model_repository", folder / "scratch")
        models = ["intent", "intent_features"]
        with EmbeddedTriton(classifier.storage.served_from, models, log_file=folder / "log") as triton:
            killer = Killer(classifier, triton.url, folder, seed)
            number = 0
            while killer.counts["killed"] < moments:  # do not count verbs that had finished already
                killer.one(VERBS[number % len(VERBS)])
                number += 1
                if killer.counts["killed"] % 20 == 0:
                    print(dict(killer.counts), file=sys.stderr, flush=True)
            steps = {verb: len(times) for verb, times in killer.times.items()}
            spared = {verb: len(left) for verb, left in killer.left.items() if left}
            found = {**killer.counts, "steps": steps, "steps not killed at": spared}
            return {"moments": moments, "seed": seed, **found, "versions": len(history(classifier))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=130)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill.json")
    options = parser.parse_args()
    try:
        document = json.dumps(run(options.moments, options.seed), indent=1)
        options.out.write_text(document + "\n")
        print(document)
    except Broken as error:
        print(f"broken: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
