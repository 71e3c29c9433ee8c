"""Swaps versions many times under load: counts failed requests and wrong answers, and watches the server's memory.

    python tests/benchmarks/swaps.py [--swaps 1000] [--clients 4]

Each swap switches between versions 1 and 2 (by pin, load and probe, as ``patcher rollback`` does) while clients ask in
a loop. Memory is the proportional set size of tritonserver and all its stubs; stubs, open files and shared memory are
counted, too. Prints the results as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

from patcher import NotServed, TritonServer, add_label, rollback
from patcher.triton.server import EmbeddedTriton


def usage(pid: int) -> dict[str, int]:
    """Resources that a process and its children hold."""
    root = psutil.Process(pid)
    everyone = [root, *root.children(recursive=True)]
    sizes = []
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):  # the stub of an old version may just have exited
            sizes.append(process.memory_full_info().pss)
    shared = os.scandir("/dev/shm")  # noqa: S108 - where Triton's stubs keep theirs
    return {
        "pss_mb": sum(sizes) // 2**20,
        "server_pss_mb": root.memory_full_info().pss // 2**20,
        "stubs": len(everyone) - 1,
        "open_files": root.num_fds(),
        "threads": root.num_threads(),
        "shared_memory": sum(entry.name.startswith(f"patcher_{os.getpid()}_") for entry in shared),
    }


def settled(pid: int, seconds: float = 15.0) -> dict[str, int]:
    """``usage`` once the stubs of old versions have exited, which takes a moment; waits ``seconds`` at most."""
    fewest, until = usage(pid), time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.5)
        now = usage(pid)
        if now["stubs"] < fewest["stubs"]:
            fewest, until = now, min(until, time.monotonic() + 3.0)
    return fewest


@dataclass
class Found:
    """What the clients saw."""

    asked: list[int]
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)


def ask(url: str, number: int, heads: dict[int, Any], found: Found, stop: threading.Event) -> None:
    """Ask in a loop, and compare every answer with the head that it claims to come from."""
    with TritonServer(url) as server:
        texts = [tiny.sentences(label, 1, seed=number)[0] for label in (*tiny.OLD, "payday")]
        while not stop.is_set():
            try:
                answers = server.classify("intent", texts)
            except Exception as error:  # noqa: BLE001 - any exception means that a request failed
                found.failed.append(repr(error))
                continue
            found.asked[number] += 1
            for answer in answers:
                head = heads[answer.head_version]
                found.seen.add(answer.head_version)
                best = head.labels[int(answer.logits.argmax())]
                if len(answer.logits) != len(head.labels) or answer.labels[0] != best:
                    found.wrong.append(f"{answer.head_version}: {answer.labels[0]}, {len(answer.logits)} logits")


def run(swaps: int, clients: int, warm: int = 100) -> dict[str, Any]:
    """Swap ``swaps`` times; memory growth is measured from swap ``warm`` on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classifier = tiny.make_repository(folder / "model_repository", folder / "scratch")
        models = ["intent", "intent_features"]
        add_label(classifier.repository, "payday", tiny.sentences("payday", 10))
        heads = {version: classifier.head(version) for version in classifier.versions()}
        stop = threading.Event()
        found = Found([0] * clients)
        refused: list[str] = []
        with EmbeddedTriton(classifier.root, models, log_file=folder / "log") as triton:
            pid = triton.pid or 0

            threads = [
                threading.Thread(target=ask, args=(triton.url, number, heads, found, stop)) for number in range(clients)
            ]
            for thread in threads:
                thread.start()
            table, start = [], time.perf_counter()
            with triton.client() as server:
                for number in range(swaps):
                    if number in (0, warm) or number % 100 == 0:
                        held = settled(pid) if number else usage(pid)
                        table.append(
                            {"swaps": number, "requests": sum(found.asked), "failures": len(found.failed), **held}
                        )
                        print(table[-1], file=sys.stderr, flush=True)
                    try:
                        rollback(classifier, 1 if classifier.serving() == 2 else 2, server)
                    except NotServed as error:  # the old version was restored, so clients should notice nothing
                        refused.append(f"swap {number}: {error}")
            table.append({"swaps": swaps, **settled(pid)})
            stop.set()
            for thread in threads:
                thread.join()
        # Medians of three, because the current traffic affects memory, too.
        base, last = (
            statistics.median(row["pss_mb"] for row in rows)
            for rows in ([row for row in table if row["swaps"] >= min(warm, swaps)][:3], table[-3:])
        )
        return {
            "swaps": swaps,
            "seconds": round(time.perf_counter() - start, 1),
            "requests": sum(found.asked),
            "failed": found.failed[:10],
            "failures": len(found.failed),
            "contradictions": found.wrong[:10],
            "swaps_put_back": refused,
            "versions_seen": sorted(found.seen),
            "growth_after_warm_percent": round(100 * (last / base - 1), 2),
            "table": table,
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "swaps.json")
    options = parser.parse_args()
    result = run(options.swaps, options.clients)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(int(bool(result["failures"] or result["contradictions"] or result["swaps_put_back"])))
