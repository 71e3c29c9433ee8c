"""Kills add-label, rollback and rename-label with SIGKILL at random moments, on a repository with a real server.

    python tests/benchmarks/kill.py [--moments 200] [--seed 0]

After each kill the repository must open and pin the version before or after the change, and the server must answer
from one of the two. Then ``patcher doctor --repair`` must make repository and server agree, and ``patcher doctor`` must
find nothing. Prints the results as JSON; exits with 1 if a rule was broken.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

from patcher import ModelRepository, TritonServer, doctor, history
from patcher.triton.server import EmbeddedTriton

if TYPE_CHECKING:
    from patcher.classifier import Classifier

VERBS = ("add-label", "rollback", "rename-label")


class Broken(AssertionError):
    """A rule was broken."""


class Killer:
    """Kills verbs on ``classifier``, served at ``url``, and checks the state they leave behind."""

    def __init__(self, classifier: Classifier, url: str, folder: Path, seed: int) -> None:
        self.classifier, self.url, self.folder = classifier, url, folder
        self.location = classifier.repository.location
        self.rng = np.random.default_rng(seed)
        self.numbers = 0
        self.seconds: dict[str, float] = {}
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

    def start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        # Import the heavy modules before the verb begins, so that the kills hit the work and not the imports.
        code = "import sys; from patcher.cli import main; import patcher.labelling, patcher.relabelling, onnxruntime; "
        code += "print('ready', flush=True); sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *arguments, "--repo", str(self.location), "--url", self.url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        return process

    def whole(self, verb: str) -> None:
        """Measure how long a verb takes if it is not killed."""
        process = self.start(self.arguments(verb))
        start = time.perf_counter()
        _, said = process.communicate()
        if process.returncode:
            raise Broken(f"{verb}: {said.decode()}")
        self.seconds[verb] = time.perf_counter() - start

    def one(self, verb: str) -> None:
        """Run a verb, kill it at a random moment, and check what it left."""
        classifier = self.classifier
        before, number = classifier.serving(), classifier.next_version()
        labels = {version: classifier.head(version).labels for version in classifier.versions()}
        arguments = self.arguments(verb)
        after = classifier.head().lineage.parent if arguments[0] == "rollback" else number
        process = self.start(arguments)
        try:
            process.wait(self.rng.uniform(0.0, 1.1 * self.seconds[verb]))
            outcome = "was done already"
        except subprocess.TimeoutExpired:
            outcome = "killed"
        process.kill()
        process.communicate()
        serving = ModelRepository(self.location).classifier().serving()
        with TritonServer(self.url) as server:
            # The server may still be loading what it was told to before the kill.
            answered = {answer.head_version for answer in server.classify(classifier.name, ["anybody?"] * 3)}
            pending = classifier.journal.pending()
            self.counts[outcome] += 1
            if outcome == "killed":
                self.counts["pinned the new one" if serving == after else "pinned the old one"] += 1
                self.counts["journal: interrupted" if pending else "journal: nothing begun, or all done"] += 1
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
            for verb in ("add-label", "rename-label", "rollback"):
                killer.whole(verb)
            number = 0
            while killer.counts["killed"] < moments:  # do not count verbs that had finished already
                killer.one(VERBS[number % len(VERBS)])
                number += 1
                if killer.counts["killed"] % 20 == 0:
                    print(dict(killer.counts), file=sys.stderr, flush=True)
            return {"moments": moments, "seed": seed, **killer.counts, "versions": len(history(classifier))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=200)
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
