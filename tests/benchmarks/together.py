"""Runs several patchers at once on one repository with a live server: no label may be lost.

    python tests/benchmarks/together.py [--patchers 8] [--labels 10]

Each patcher is a process that adds its labels one by one through the command line. Afterwards every label must be
served, every patch must be a version in the lineage, and every version must be reachable by a rollback. Prints the
results as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

from patcher import rollback
from patcher.lifecycle import history
from patcher.triton.server import EmbeddedTriton

# One process per patcher: importing everything again for each label would make collisions rarer.
_PATCHER = """
import sys
from patcher.cli import main
for label in sys.argv[3:]:
    texts = [word for number in range(10) for word in ("--text", f"{label} please {number}")]
    code = main(["add-label", label, *texts, "--force", "--json", "--repo", sys.argv[1], "--url", sys.argv[2]])
    if code:
        sys.exit(code)
"""


def run(patchers: int, labels: int) -> dict[str, Any]:
    """Run the patchers, then check the repository and the server."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classifier = tiny.make_repository(folder / "model_repository", folder / "scratch")
        models = ["intent", "intent_features"]
        wanted = [[f"label-{patcher}-{number}" for number in range(labels)] for patcher in range(patchers)]
        with EmbeddedTriton(classifier.root, models, log_file=folder / "log") as triton, triton.client() as server:
            start = time.perf_counter()
            running = [
                subprocess.Popen(
                    [sys.executable, "-c", _PATCHER, str(classifier.root), triton.url, *mine],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                )
                for mine in wanted
            ]
            failed = [said.decode() for process in running for said in [process.communicate()[1]] if process.returncode]
            seconds = time.perf_counter() - start
            entries = history(classifier)
            served = server.classify("intent", ["anybody?"])[0]
            head = classifier.head(served.head_version)
            reachable = 0
            for entry in entries:
                rollback(classifier, entry.lineage.version, server)
                answer = server.classify("intent", ["anybody?"])[0]
                reachable += (answer.head_version, len(answer.logits)) == (entry.lineage.version, entry.labels)
            return {
                "patchers": patchers,
                "labels_each": labels,
                "failed": failed,
                "seconds": round(seconds, 1),
                "labels_served": sum(label in head.labels for mine in wanted for label in mine),
                "versions": len(entries),
                "parents_in_one_line": [entry.lineage.parent for entry in entries[1:]] == list(range(1, len(entries))),
                "reachable": reachable,
            }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patchers", type=int, default=8)
    parser.add_argument("--labels", type=int, default=10)
    options = parser.parse_args()
    result = run(options.patchers, options.labels)
    print(json.dumps(result, indent=2))
    total = options.patchers * options.labels
    sys.exit(int((result["labels_served"], result["versions"], result["reachable"]) != (total, total + 1, total + 1)))
