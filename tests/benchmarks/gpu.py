"""Measures a classifier exported for a GPU: the graph alone, the served ensemble, and head swaps under load.

    python tests/benchmarks/gpu.py [--checkpoint DIR] [--texts FILE] [--rounds 3] [--swaps 30] [--out DIR]

Graph: the same backbone with plain operators and with fused ones, the latter also with cuDNN's attention and as CUDA
graphs, on batches of the many shapes that texts produce. Each variant runs in a process of its own, because
onnxruntime reads its switches only once. Served: the ensemble from text and, in alternating rounds, the same graph in
one piece behind the tokenizer, on the server that `patcher serve` starts. Without arguments it uses a small BERT with
random weights, because speed does not depend on them. ``--kind KIND_CPU`` runs everything without a GPU, which only
shows that the script works. Prints a table and writes ``gpu.json`` under ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # before numpy is imported, as the command line does

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

if TYPE_CHECKING:
    from collections.abc import Sequence

LEVELS = (1, 16, 32, 64, 256)
MOST_TEXTS = 600
CUDNN = "ORT_ENABLE_CUDNN_FLASH_ATTENTION"
SHAPES = 150
"""Batches in the stream; it runs three times, because the first call for each shape costs more."""


def stream(path: Path, kind: str, shapes: int = SHAPES, *, by_graphs: bool = False) -> dict[str, float]:
    """Milliseconds per call for batches of 1 to 63 texts of 6 to 23 tokens, on first sight of a shape and later.

    With CUDA graphs (``by_graphs``), batches are padded to the recorded shapes, as the encoder pads them.
    """
    from google.protobuf import json_format

    from patcher.model_config import parameter, parse
    from patcher.triton.backends.onnxruntime.session import open_runner
    from patcher.triton.backends.onnxruntime.settings import GRAPHS
    from patcher.triton.tokenizer.model import LARGEST, graphed, graphed_shapes

    message = parse((path.parents[1] / "config.pbtxt").read_text())
    setting = parameter(message, GRAPHS, "") if by_graphs else ""
    if not by_graphs:
        message.parameters.pop(GRAPHS, None)
    message.optimization.Clear()  # the graph exported for TensorRT is run by CUDA here
    config = json_format.MessageToDict(message, preserving_proto_field_name=True)
    run = open_runner(config, path, kind.removeprefix("KIND_"), 0)
    rng = np.random.default_rng(0)

    def tokens(batch: int, length: int) -> dict[str, Any]:
        batch, length = graphed(batch, length, graphed_shapes(setting, LARGEST))
        mask = np.ones((batch, length), np.int64)
        for row in mask[1:]:
            row[rng.integers(length // 2, length + 1) :] = 0
        values = {"input_ids": rng.integers(5, 100, mask.shape) * mask, "attention_mask": mask}
        return {each["name"]: values.get(each["name"], np.zeros_like(mask)) for each in config["input"]}

    feeds = [tokens(int(rng.integers(1, 64)), int(rng.integers(6, 24))) for _ in range(shapes)]
    run(["features"], tokens(64, 24))  # warm up: the very first call also pays for initialisation
    means = []
    for _ in range(3):
        took = []
        for feed in feeds:
            started = time.perf_counter()
            run(["features"], feed)
            took.append(1000 * (time.perf_counter() - started))
        means.append(statistics.mean(took))
    return {"first seen, ms": means[0], "later, ms": means[-1]}


def streams(graphs: dict[str, Path], kind: str) -> list[dict[str, Any]]:
    """Run the stream over each graph, fused ones also with cuDNN's attention and as CUDA graphs; one process each."""
    rows = []
    for what, path in graphs.items():
        ways = {"": [], ", cuDNN's attention": [], ", CUDA graphs": ["--by-graphs"]} if "fused" in what else {"": []}
        for way, options in ways.items():
            command = [sys.executable, __file__, "--stream", str(path), "--kind", kind, *options]
            switched = {**os.environ, CUDNN: "1" if "cuDNN" in way else "0"}
            done = subprocess.run(command, env=switched, stdout=subprocess.PIPE, check=True)
            rows.append({"what": what + way, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def served(classifier: Any, texts: Sequence[str], rounds: int, window: float, levels: Sequence[int]) -> dict[str, Any]:
    """Measure the ensemble and the graph in one piece with perf_analyzer, in alternating rounds."""
    from patcher import TritonServer
    from patcher.loadtest import load_test
    from patcher.measurement import Load, compare
    from patcher.triton.server import EmbeddedTriton
    from tests.benchmarks.serving_monolith import add_contenders

    whole, _ = add_contenders(classifier)
    log = classifier.root.parent / "triton.log"
    names, loads, found = [classifier.name, whole], [Load(concurrency=level) for level in levels], []
    with (
        EmbeddedTriton(classifier.root, [classifier.name, classifier.backbone_model, whole], log_file=log) as triton,
        TritonServer(triton.url) as server,
    ):
        for turn in range(rounds):
            found += load_test(server, names if turn % 2 == 0 else names[::-1], texts, loads, window=window)
    rows = []
    for model in names:
        for load in loads:
            own = [each for each in found if (each.model, each.load) == (model, load)]
            row = {"what": f"{model}, {load}", "texts/s": statistics.median(each.throughput for each in own)}
            row |= {"p50 ms": statistics.median(each.p50_us for each in own) / 1000}
            row |= {"p99 ms": statistics.median(each.p99_us for each in own) / 1000}
            rows.append(row | {"failures": sum(each.failures for each in own)})
    ratios = [each.to_json() for each in compare(found, whole)]
    return {"rows": rows, "of the whole": ratios, "measured": [each.to_json() for each in found]}


def exported(checkpoint: Path, folder: Path, kind: str) -> tuple[Any, dict[str, Path]]:
    """The classifier for a GPU, and its backbone with plain and with fused operators."""
    from export import run_export
    from patcher.model_config import parse, to_text

    fused = run_export(checkpoint, folder / "fused", device="gpu").repository.classifier()
    # An export for TensorRT is the same FP16 backbone without fused operators.
    plain = run_export(checkpoint, folder / "plain", device="gpu", tensorrt=True).repository.classifier()
    config = fused.root / fused.backbone_model / "config.pbtxt"
    message = parse(config.read_text())
    message.instance_group[0].kind = message.instance_group[0].Kind.Value(kind)
    config.write_text(to_text(message))
    return fused, {"plain operators": plain.backbone_path, "fused operators": fused.backbone_path}


def machine() -> str:
    """GPU and cores, in words."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = (
        subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        if shutil.which(asked[0])
        else ""
    )
    return f"{gpu or 'no GPU'}, {os.cpu_count()} cores"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(f"{row[c]:.4g}" if c != "what" else row[c] for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=float, default=1.0, help="seconds per window; a measurement takes three")
    parser.add_argument("--levels", default=",".join(map(str, LEVELS)), help="comma-separated numbers of texts at once")
    parser.add_argument("--swaps", type=float, default=30.0, help="seconds of swapping heads under load")
    parser.add_argument("--kind", default="KIND_GPU", choices=["KIND_GPU", "KIND_CPU"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--stream", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--by-graphs", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stream:
        print(json.dumps(stream(arguments.stream, arguments.kind, by_graphs=arguments.by_graphs)))
        return
    import checkpoints
    import tiny

    from patcher import read_examples
    from tests.benchmarks import serving_swaps

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or checkpoints.save_checkpoint(Path(folder) / "checkpoint", "bert")
        classifier, graphs = exported(checkpoint, Path(folder), arguments.kind)
        texts = [text for label in tiny.OLD for text in tiny.sentences(label, 100, seed=3)]
        if arguments.texts:
            texts = list(read_examples(arguments.texts).texts)
        texts = texts[:: -(-len(texts) // MOST_TEXTS)]
        document = {"machine": machine(), "graph": streams(graphs, arguments.kind)}
        copy = Path(folder) / "swapped"
        shutil.copytree(classifier.root, copy)
        levels = [int(each) for each in arguments.levels.split(",")]
        document["served"] = served(classifier, texts, arguments.rounds, arguments.window, levels)
        swapped = type(classifier.repository)(copy).classifier()
        document["swaps"] = serving_swaps.measure(swapped, texts, arguments.swaps, 16)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu.json").write_text(json.dumps(document, indent=2) + "\n")
    print(document["machine"], table(document["graph"]), table(document["served"]["rows"]), sep="\n\n")
    for each in document["served"]["of the whole"]:
        spread = f"{each['low']:.2f}-{each['high']:.2f}"
        print(f"concurrency {each['concurrency']}: {each['ratio']:.2f} ({spread}) of the whole")
    print(json.dumps(document["swaps"], indent=2))


if __name__ == "__main__":
    main()
