"""Fuzzes everything that reads a file: no crash, no hang, and no error but patcher's own, with a message.

    python tests/benchmarks/fuzz.py [--inputs 100000] [--readers head,journal] [--engine hypothesis|atheris]

Each input is a valid file with some bytes changed, removed, duplicated or inserted, or it is pure noise; hypothesis
draws them. With ``--engine atheris`` (`pip install atheris`, where it builds) libFuzzer searches for inputs that reach
new lines instead. A reader may accept the input, or refuse it with one of patcher's own errors, within five seconds of
processor time. Prints the results as JSON; exits with 1 if a rule was broken.
"""

from __future__ import annotations

import argparse
import collections
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))
from patcher.errors import PatcherError

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS_AN_INPUT = 5
RESULTS = Path(__file__).parent / "results" / "fuzz.json"
WORDS = (
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"\n", b"\r\n", b"\t", b"\0", b"\xff", b"\xef\xbb\xbf", b"-1", b"1e999",
    b"NaN", b"null", b"text", b"label", b"../../etc/passwd", b"9" * 40, b"[" * 3000, b"versions: 2",
)  # fmt: skip


class TooSlow(BaseException):
    """An input took longer than it may."""


class Readers:
    """The readers, and a valid file for each; files are written to ``folder`` for readers that take a path."""

    def __init__(self, folder: Path) -> None:
        import tiny

        from patcher.memory import Memory
        from patcher.memory_file import write_memory

        self.folder = folder
        self.classifier = tiny.make_repository(folder / "model_repository", folder / "scratch")
        rows = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)
        small = Memory.build(rows, np.arange(12) % 3, "abc", 4, per_label=2)
        table = "text,label\n" + "".join(f'"I, {i}",balance\n' for i in range(4))
        lines = "".join(json.dumps({"text": f"line {i}", "label": "balance"}) + "\n" for i in range(4))
        self.seeds: dict[str, bytes] = {
            "examples.csv": table.encode(),
            "examples.tsv": table.replace(",", "\t").encode(),
            "examples.jsonl": lines.encode(),
            "examples.parquet": _parquet(folder),
            "examples.txt": b"one\ntwo\nthree\n",
            "head": self.classifier.head_bytes(1),
            "backbone": self.classifier.backbone_path.read_bytes(),
            "memory": write_memory(small),
            "journal": self.classifier.journal.path.read_bytes(),
            "config": (self.classifier.root / "intent_head" / "config.pbtxt").read_bytes(),
            "format": (self.classifier.root / "patcher.json").read_bytes(),
            "audit": json.dumps({"verb": "add-label", "outcome": "done", "time": "2026-01-01"}).encode() + b"\n",
        }

    def read(self, kind: str) -> Callable[[bytes], object]:
        """The function that reads one kind of file from its bytes."""
        from patcher import configs, model_config
        from patcher.audit import read_event
        from patcher.examples_file import read_examples
        from patcher.head_file import read_head
        from patcher.memory_file import read_memory
        from patcher.onnx_file import check_backbone_file
        from patcher.repository import ModelRepository

        def written(name: str, data: bytes) -> Path:
            path = self.folder / name
            path.write_bytes(data)
            return path

        def journal(data: bytes) -> None:
            self.classifier.journal.path.write_bytes(data)
            for ask in ("entries", "pending", "published", "pruned", "withdrawn"):
                getattr(self.classifier.journal, ask)()

        def config(data: bytes) -> None:
            message = model_config.parse(data.decode("utf-8", "replace"))
            model_config.pinned_versions(message)
            configs.share_of(message)

        def layout(data: bytes) -> None:
            written("model_repository/patcher.json", data)
            ModelRepository(self.folder / "model_repository").classifiers()

        if kind.startswith("examples."):
            return lambda data: read_examples(written(kind, data))
        known: dict[str, Callable[[bytes], object]] = {
            "head": read_head,
            "backbone": lambda data: check_backbone_file(written("backbone.onnx", data)),
            "memory": read_memory,
            "journal": journal,
            "config": config,
            "format": layout,
            "audit": lambda data: [read_event(line) for line in data.splitlines()],
        }
        return known[kind]


def _parquet(folder: Path) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    path = folder / "seed.parquet"
    parquet.write_table(pa.table({"text": ["one", "two"], "label": ["a", "b"]}), path)
    return path.read_bytes()


def mutated(seed: bytes) -> st.SearchStrategy[bytes]:
    """Files with some edits, or noise."""
    place = st.integers(0, len(seed))
    edit = st.one_of(
        st.tuples(st.just("put"), place, st.one_of(st.sampled_from(WORDS), st.binary(max_size=8))),
        st.tuples(st.just("cut"), place, st.integers(1, 64)),
        st.tuples(st.just("end"), place, st.none()),
        st.tuples(st.just("double"), place, st.integers(1, 64)),
        st.tuples(st.just("set"), place, st.integers(0, 255)),
    )
    edited = st.lists(edit, min_size=1, max_size=6).map(lambda edits: _edited(seed, edits))
    return st.one_of(edited, st.binary(max_size=64))


def _edited(seed: bytes, edits: list[tuple[str, int, Any]]) -> bytes:
    data = bytearray(seed)
    for what, at, value in edits:
        if what == "put":
            data[at:at] = value
        elif what == "cut":
            del data[at : at + value]
        elif what == "end":
            del data[at:]
        elif what == "double":
            data[at:at] = data[at : at + value]
        elif at < len(data):
            data[at] = value
    return bytes(data)


def by_hypothesis(kind: str, readers: Readers, inputs: int) -> dict[str, Any]:
    """Feed ``inputs`` drawn inputs to one reader; count those taken, and those refused by error class."""
    read = readers.read(kind)
    outcomes: collections.Counter[str] = collections.Counter()
    slowest = 0.0

    def hang(_signal: int, _frame: object) -> None:
        raise TooSlow(
            f"{kind}: longer than {SECONDS_AN_INPUT} s of processor time, or {20 * SECONDS_AN_INPUT} s in all"
        )

    # Limit processor time, because on a busy machine anything may wait; a wall clock catches what waits forever.
    signal.signal(signal.SIGPROF, hang)
    signal.signal(signal.SIGALRM, hang)

    @settings(
        max_examples=inputs, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(mutated(readers.seeds[kind]))
    def run(data: bytes) -> None:
        nonlocal slowest
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS_AN_INPUT)
        signal.alarm(20 * SECONDS_AN_INPUT)
        try:
            read(data)
            outcomes["taken"] += 1
        except PatcherError as error:
            outcomes[type(error).__name__] += 1
            assert str(error).strip(), f"{type(error).__name__} says nothing"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
        slowest = max(slowest, time.process_time() - started)

    started = time.perf_counter()
    run()
    return {
        "inputs": sum(outcomes.values()),
        "outcomes": dict(outcomes.most_common()),
        "slowest_ms": round(1000 * slowest, 1),
        "seconds": round(time.perf_counter() - started),
    }


def by_atheris(kind: str, inputs: int) -> dict[str, Any]:
    """The same with libFuzzer, in a separate process, because libFuzzer ends the process that it runs in."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--worker", kind, "--inputs", str(inputs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{kind}: {done.stderr[-3000:]}")
    return {"inputs": inputs, "seconds": round(time.perf_counter() - started)}


def worker(kind: str, inputs: int) -> None:
    """Run one reader under libFuzzer; does not return."""
    import atheris

    with atheris.instrument_imports(include=["patcher"]):
        import patcher.audit
        import patcher.examples_file
        import patcher.head_file
        import patcher.journal
        import patcher.memory
        import patcher.model_config
        import patcher.onnx_file  # noqa: F401
    folder = Path(tempfile.mkdtemp(prefix="patcher-fuzz-"))
    readers = Readers(folder)
    read = readers.read(kind)
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(readers.seeds[kind])

    def one(data: bytes) -> None:
        try:
            read(data)
        except PatcherError as error:
            assert str(error).strip()

    longest = len(readers.seeds[kind]) + 4096
    flags = [f"-runs={inputs}", f"-timeout={SECONDS_AN_INPUT}", "-seed=1", f"-max_len={longest}", "-verbosity=0"]
    flags.append(f"-artifact_prefix={folder}/")
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    """Run the requested readers and print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="number of inputs for each reader")
    parser.add_argument("--readers", help="comma-separated readers; all by default")
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker, asked.inputs)
    found: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    broken = 0
    with tempfile.TemporaryDirectory(prefix="patcher-fuzz-") as folder:
        readers = Readers(Path(folder))
        for kind in asked.readers.split(",") if asked.readers else readers.seeds:
            try:
                if asked.engine == "atheris":
                    made = by_atheris(kind, asked.inputs)
                else:
                    made = by_hypothesis(kind, readers, asked.inputs)
            except (Exception, TooSlow) as error:  # noqa: BLE001  any exception is a finding
                broken += 1
                made = {"broken": f"{type(error).__name__}: {error}"[-2000:]}
            found.setdefault(asked.engine, {})[kind] = made
            print(kind, json.dumps(made), file=sys.stderr, flush=True)
            asked.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
