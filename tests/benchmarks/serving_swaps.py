"""Measures what clients notice while heads are swapped once a second under load: throughput, p99, failures.

    python tests/benchmarks/serving_swaps.py [--repo DIR [--classifier NAME] --texts FILE] [--seconds 120]
        [--concurrency 8] [--ask-backbone]

Two head versions are pinned and loaded alternately, each verified by a probe, as every patch and rollback does. The
clients are threads of this process, because perf_analyzer ends when a version that it knew is gone. Windows with and
without swaps alternate. Before that, the script measures the start of a server and a swap without load. Without
``--repo`` it serves a tiny classifier: a request then costs nothing but the serving, so a swap is most visible. Prints
JSON. Set PATCHER_SERVER_ONNXRUNTIME=DIR to use Triton's C++ backend, where a version has no process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # before numpy is imported, as the command line does

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

EVERY = 1.0
STARTS = 5
WINDOW = 6.0


@contextlib.contextmanager
def swapping(classifier, triton) -> Iterator[list[float]]:
    """Swap the head once a second; yields a list to which the seconds of each swap are appended."""
    from patcher.lifecycle import rollback

    stop, took, failed = threading.Event(), [], []

    def run() -> None:
        try:
            with triton.client() as server:
                versions = classifier.versions()
                while not stop.is_set():
                    started = time.monotonic()
                    other = next(version for version in versions if version != classifier.serving())
                    rollback(classifier, to=other, server=server)
                    took.append(time.monotonic() - started)
                    stop.wait(max(0.0, EVERY - took[-1]))
        except Exception as error:  # noqa: BLE001  raised again in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


@dataclass(frozen=True)
class Window:
    """What the clients saw in one window of some seconds."""

    throughput: float
    p99_us: float
    failures: int


def load(url: str, model: str, texts: Sequence[str], concurrency: int, seconds: float) -> Window:
    """Ask in a loop with ``concurrency`` clients at once."""
    from patcher import TritonServer
    from patcher.errors import ServerError

    def client(number: int) -> tuple[list[float], int]:
        took, failures = [], 0
        with TritonServer(url) as server:
            for text in itertools.cycle(texts[number:] + texts[:number]):
                started = time.monotonic()
                if started > end:
                    return took, failures
                try:
                    server.classify(model, [text])
                except ServerError:
                    failures += 1
                else:
                    took.append(time.monotonic() - started)
        return took, failures

    end = time.monotonic() + seconds
    with ThreadPoolExecutor(concurrency) as pool:
        found = list(pool.map(client, range(concurrency)))
    took = sorted(each for some, _ in found for each in some)
    return Window(len(took) / seconds, 1e6 * took[int(0.99 * len(took))], sum(failures for _, failures in found))


def measure(
    classifier, texts: list[str], seconds: float, concurrency: int, window: float = WINDOW, *, ask: bool = False
) -> dict[str, Any]:
    """Alternate windows without and with swaps, for ``seconds`` of swapping in total."""
    from patcher import add_label
    from patcher.patch import PatchSettings
    from patcher.triton.server import EmbeddedTriton

    log = classifier.root.parent / "triton.log"
    calm, busy, took = [], [], []
    models = [classifier.ensemble, classifier.features_model, classifier.backbone_model]
    starts = []
    for _ in range(STARTS):
        begun = time.monotonic()
        with EmbeddedTriton(classifier.root, models, log_file=log, encoder_runs_backbone=not ask):
            starts.append(time.monotonic() - begun)
    with EmbeddedTriton(classifier.root, models, log_file=log, encoder_runs_backbone=not ask) as triton:
        if len(classifier.versions()) == 1:
            forced = PatchSettings(force=True)
            add_label(classifier.repository, "swapped in", texts[:10], settings=forced, classifier=classifier.name)
        with swapping(classifier, triton) as idle:
            time.sleep(window)
        load(triton.url, classifier.address, texts, concurrency, window)
        for _ in range(max(1, round(seconds / window))):
            calm.append(load(triton.url, classifier.address, texts, concurrency, window))
            with swapping(classifier, triton) as swaps:
                busy.append(load(triton.url, classifier.address, texts, concurrency, window))
            took += swaps
    ratios = [after.throughput / before.throughput for before, after in zip(calm, busy, strict=True)]
    tails = [after.p99_us / before.p99_us for before, after in zip(calm, busy, strict=True)]
    return {
        "seconds from start to ready, median": statistics.median(starts),
        "seconds a swap without load, median": statistics.median(idle),
        "swaps": len(took),
        "seconds a swap, median": statistics.median(took),
        "texts/s undisturbed": statistics.median(each.throughput for each in calm),
        "texts/s while swapping": statistics.median(each.throughput for each in busy),
        "throughput ratio": statistics.median(ratios),
        "throughput ratio, lowest": min(ratios),
        "p99 ratio": statistics.median(tails),
        "p99 ratio, highest": max(tails),
        "failures": sum(each.failures for each in (*calm, *busy)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path)
    parser.add_argument("--classifier", help="which classifier in --repo, if several; it may be in a head store")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0, help="seconds of swapping in total")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument(
        "--ask-backbone",
        action="store_true",
        help="have encoders ask Triton for the backbone, as on servers that `patcher serve` did not start",
    )
    arguments = parser.parse_args()
    if arguments.classifier and not arguments.repo:
        parser.error("--classifier names one of --repo; expected both")
    import tiny

    from patcher import ModelRepository, read_examples

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "model_repository"
        if arguments.repo:
            shutil.copytree(arguments.repo, root)
            classifier = ModelRepository(root).classifier(arguments.classifier)
        else:
            classifier = tiny.make_repository(root, Path(folder) / "scratch")
        texts = [text for label in tiny.OLD for text in tiny.sentences(label, 20)]
        if arguments.texts:
            texts = list(read_examples(arguments.texts).texts)[::7]
        found = measure(classifier, texts, arguments.seconds, arguments.concurrency, ask=arguments.ask_backbone)
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
