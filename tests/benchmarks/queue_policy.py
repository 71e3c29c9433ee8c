"""Compares the latencies of an encoder with and without a queue policy, Triton's way to drop requests that wait long.

    python tests/benchmarks/queue_policy.py [--rounds 10] [--texts 4000]

Triton does not pass the cancellation or the deadline of a request through an ensemble, so texts that nobody waits for
any more are encoded all the same. With ``default_queue_policy`` it drops them, but prepares no batch ahead. Two servers
with the same tiny classifier, asked in turns, 32 texts under way. Prints the results as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

from patcher import model_config
from patcher.triton.server import EmbeddedTriton
from patcher.triton.tensors import strings

UNDER_WAY = 32
MODELS = ["intent", "intent_features"]


def limit_waiting(root: Path) -> None:
    """Let the encoder refuse what has waited five minutes, or as long as the request's own ``timeout`` says."""
    path = root / "intent_encoder" / "config.pbtxt"
    message = model_config.parse(path.read_text())
    policy = message.dynamic_batching.default_queue_policy
    policy.default_timeout_microseconds, policy.allow_timeout_override = 300_000_000, True
    path.write_text(model_config.to_text(message))


def latencies(url: str, texts: int) -> list[float]:
    """Seconds until each of ``texts`` texts was answered."""
    found: list[float] = []
    free = threading.Semaphore(UNDER_WAY)
    samples = [strings("text", [text.encode()]) for label in tiny.OLD for text in tiny.sentences(label, 40)]
    client = triton.InferenceServerClient(url)
    for number in range(texts):
        free.acquire()
        start = time.perf_counter()

        def done(result: object, error: object, start: float = start) -> None:
            found.append(time.perf_counter() - start)
            free.release()

        client.async_infer("intent", [samples[number % len(samples)]], callback=done)
    for _ in range(UNDER_WAY):
        free.acquire()
    client.close()
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--texts", type=int, default=4000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        roots = {"none": folder / "none", "policy": folder / "policy"}
        tiny.make_repository(roots["none"], folder / "scratch")
        shutil.copytree(roots["none"], roots["policy"])
        limit_waiting(roots["policy"])
        found: dict[str, list[float]] = {name: [] for name in roots}
        with (
            EmbeddedTriton(roots["none"], MODELS, log_file=folder / "a") as first,
            EmbeddedTriton(roots["policy"], MODELS, log_file=folder / "b") as second,
        ):
            for _ in range(options.rounds):
                for name, server in (("none", first), ("policy", second)):
                    found[name] += latencies(server.url, options.texts)
    report = {
        name: {
            "texts": len(seconds),
            "p50_ms": round(float(np.median(seconds)) * 1000, 1),
            "p99_ms": round(float(np.quantile(seconds, 0.99)) * 1000, 1),
            "over_400_ms": sum(each > 0.4 for each in seconds),
        }
        for name, seconds in found.items()
    }
    print(json.dumps({"under_way": UNDER_WAY, **report}, indent=1))


if __name__ == "__main__":
    main()
