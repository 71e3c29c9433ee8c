"""Soak test: mixed traffic for twenty minutes, a change every ten seconds, a server restart every five minutes.

    python tests/benchmarks/soak.py [--minutes 20] [--clients 4]

The changes are patches, rollbacks, renames, trials on a share of the keys, and removals, in a random order with a fixed
seed. Every answer is compared with the head version that it claims to come from: its label, the number of logits, and
the logits themselves. Around a restart a server may refuse requests; at any other time it must answer all of them.
Prints the results and writes them as JSON; exits with 1 if a rule was broken.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

from patcher import ModelRepository, PatchSettings, SplitClient, TritonServer, add_labels, canary, doctor, rollback
from patcher.errors import ServerRefused, ServerUnreachable
from patcher.relabelling import remove_label, rename_label
from patcher.runtime import Encoder
from patcher.triton.server import EmbeddedTriton
from tests.benchmarks.swaps import usage

if TYPE_CHECKING:
    from patcher.classifier import Classifier
    from patcher.head import Head

CHANGE_SECONDS = 10.0
RESULTS = Path(__file__).parent / "results" / "soak.json"
_NEAR_RESTART = 5.0
"""Seconds after a restart in which a client's connection may still be broken."""


@dataclass
class Seen:
    """What all clients together saw."""

    answers: int = 0
    refused: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    versions: collections.Counter[int] = field(default_factory=collections.Counter)
    slowest: float = 0.0


class Day:
    """The server, the changes to it, and the clients that check its answers."""

    def __init__(self, folder: Path, clients: int) -> None:
        self.classifier: Classifier = tiny.make_repository(folder / "model_repository", folder / "scratch")
        self.texts = [tiny.sentences(label, 1, seed=seed)[0] for label in (*tiny.OLD, *tiny.NEW) for seed in range(3)]
        encoder = Encoder(self.classifier.backbone_path, self.classifier.tokenizer_path, threads=1)
        self.features = dict(zip(self.texts, encoder.encode(self.texts), strict=True))
        self.heads: dict[int, Head] = {}
        self.seen, self.stop, self.restarting = Seen(), threading.Event(), 0.0
        self.lock = threading.Lock()
        self.clients = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        ports = tiny.free_ports(3)
        names = ["grpc_port", "http_port", "metrics_port"]
        self.options = {"log_file": folder / "triton.log", **dict(zip(names, ports, strict=True))}

    def start(self) -> EmbeddedTriton:
        """Start a server on the repository in its current state."""
        models = [*self.classifier.repository.classifiers(), "intent_features"]
        return EmbeddedTriton(self.classifier.root, models, **self.options).start()

    def _client(self, number: int) -> None:
        rng = np.random.default_rng(number)
        with TritonServer(f"127.0.0.1:{self.options['grpc_port']}", timeout=30.0) as server:
            split = SplitClient(server, "intent", refresh_seconds=0.5)
            while not self.stop.is_set():
                texts = [self.texts[i] for i in rng.integers(0, len(self.texts), size=int(rng.integers(1, 9)))]
                started = time.monotonic()
                try:
                    if number % 2:
                        answers = split.classify(texts, [f"key-{i}" for i in rng.integers(0, 1000, size=len(texts))])
                    else:
                        answers = server.classify("intent", texts)
                except (ServerUnreachable, ServerRefused) as error:  # a server that shuts down unloads its models
                    near = started <= self.restarting + _NEAR_RESTART
                    with self.lock:
                        if near or self.restarting == np.inf:
                            self.seen.refused += 1
                        else:
                            self.seen.failed.append(f"{time.strftime('%X')} {error}")
                    time.sleep(0.1)
                    continue
                except Exception as error:  # noqa: BLE001  any exception means that a request failed
                    with self.lock:
                        self.seen.failed.append(f"{time.strftime('%X')} {type(error).__name__}: {error}")
                    continue
                self._check(texts, answers, time.monotonic() - started)

    def _check(self, texts: list[str], answers: list[Any], seconds: float) -> None:
        for text, answer in zip(texts, answers, strict=True):
            if answer.head_version not in self.heads:
                self.heads[answer.head_version] = self.classifier.head(answer.head_version)
            head = self.heads[answer.head_version]
            expected = head.logits(self.features[text][None])[0]
            right = (
                answer.logits.shape == expected.shape
                and np.allclose(answer.logits, expected, rtol=1e-3, atol=1e-2)
                and answer.labels[0] == head.labels[int(answer.logits.argmax())]
            )
            with self.lock:
                self.seen.answers += 1
                self.seen.versions[answer.head_version] += 1
                self.seen.slowest = max(self.seen.slowest, seconds)
                if not right:
                    self.seen.wrong.append(f"version {answer.head_version}: {answer.labels[0]} for {text!r}")

    def change(self, rng: np.random.Generator, server: TritonServer) -> str:
        """Make one random change; return its name."""
        classifier = self.classifier
        trial = canary.status(classifier)
        labels = classifier.head().labels
        absent = [label for label in tiny.NEW if label not in labels]
        if trial is not None:
            if rng.random() < 0.5:
                canary.promote(classifier, server)
                return "promote"
            canary.discard(classifier, server)
            return "discard"
        if absent and rng.random() < 0.6:
            label = absent[0]
            settings = PatchSettings(canary=20.0) if rng.random() < 0.3 else PatchSettings()
            examples = tiny.sentences(label, 10, seed=int(rng.integers(1000)))
            add_labels(classifier.repository, {label: examples}, server=server, settings=settings)
            return "trial" if settings.canary else "add-label"
        kind = rng.choice(["rollback", "rename", "remove"])
        if kind == "rename":
            old = str(rng.choice([label for label in labels if label not in tiny.NEW]))
            rename_label(classifier, old, old[:-1] if old.endswith("!") else old + "!", server)
        elif kind == "remove" and not absent:
            remove_label(classifier, tiny.NEW[int(rng.integers(len(tiny.NEW)))], server)
        else:
            kind = "rollback"
            others = [version for version in classifier.versions() if version != classifier.serving()]
            if not others:
                return "nothing"
            rollback(classifier, int(rng.choice(others[-5:])), server)
        return str(kind)


def _row(event: str, begun: float, triton: EmbeddedTriton) -> dict[str, Any]:
    return {"minute": round((time.monotonic() - begun) / 60, 1), "event": event, **usage(triton.pid or 0)}


def run(minutes: float, clients: int, restart_seconds: float = 300.0, seed: int = 0) -> dict[str, Any]:
    """Run the soak test; return the results."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="patcher-soak-") as name:
        day = Day(Path(name), clients)
        changes: collections.Counter[str] = collections.Counter()
        table: list[dict[str, Any]] = []
        triton = day.start()
        begun = time.monotonic()
        next_change, next_restart = begun + CHANGE_SECONDS, begun + restart_seconds
        for thread in day.clients:
            thread.start()
        try:
            while time.monotonic() - begun < 60 * minutes:
                time.sleep(max(0.0, min(next_change, next_restart) - time.monotonic()))
                if time.monotonic() >= next_restart:
                    next_restart += restart_seconds
                    day.restarting = np.inf
                    table.append(_row("restart", begun, triton))
                    triton.stop()
                    triton = day.start()
                    day.restarting = time.monotonic()
                    changes["server restart"] += 1
                else:
                    next_change = max(next_change + CHANGE_SECONDS, time.monotonic())
                    with triton.client() as server:
                        changes[day.change(rng, server)] += 1
                print(dict(changes), day.seen.answers, len(day.seen.failed), file=sys.stderr, flush=True)
        finally:
            day.stop.set()
            for thread in day.clients:
                thread.join()
            table.append(_row("end", begun, triton))
            with triton.client() as server:
                checks = list(doctor.diagnose(day.classifier.root, server, triton.url))
            triton.stop()
        reopened = ModelRepository(day.classifier.root).classifier()
        seen = day.seen
        return {
            "minutes": minutes,
            "clients": clients,
            "answers": seen.answers,
            "versions answered from": len(seen.versions),
            "versions on disk": len(reopened.versions()),
            "changes": dict(changes.most_common()),
            "refused around restarts": seen.refused,
            "failed": len(seen.failed),
            "failures": seen.failed[:10],
            "contradictions": len(seen.wrong),
            "wrong": seen.wrong[:10],
            "slowest answer, s": round(seen.slowest, 2),
            "doctor's faults": [vars(check) for check in checks if check.state == "fault"],
            "memory": table,
        }


def main() -> int:
    """Run the soak test, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--restart-seconds", type=float, default=300.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = run(given.minutes, given.clients, given.restart_seconds)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return int(bool(found["failed"] or found["contradictions"] or found["doctor's faults"]))


if __name__ == "__main__":
    sys.exit(main())
