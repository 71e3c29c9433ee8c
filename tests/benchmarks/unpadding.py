"""Measures what skipping the work on padding gains: the same backbone exported both ways, alternating in one process.

    python tests/benchmarks/unpadding.py [--checkpoint DIR] [--texts FILE] [--rounds 7]

For 1, 4, 16 and 32 waiting texts in random order, texts are batched as the encoder batches them for each graph, and the
backbone is timed; also for all texts sorted by length in batches of 32. Runs in FP32 and INT8. Without arguments it
uses the demo's checkpoint and texts, if `make demo` was run. Prints a table and writes ``unpadding.json`` under
``--out``; ratios are computed round by round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from collections.abc import Sequence

WAITING = (1, 4, 16, 32)
MOST_TEXTS = 600
DEMO = ROOT / "build" / "demo" / "checkpoint"


class Graph:
    """An exported backbone with its tokenizer and the encoder's rule for which texts share a batch."""

    def __init__(self, path: Path, tokenizer_json: str, *, unpadded: bool) -> None:
        from tokenizers import Tokenizer

        from patcher.configs import PADDING_SLACK, SLACK, encoder_config
        from patcher.runtime import open_session

        self.session = open_session(path)
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.names = [each.name for each in self.session.get_inputs()]
        settings = encoder_config("e", self.names, "b", 1, unpadded=unpadded).parameters
        self.slack, self.power = int(settings.get(SLACK, PADDING_SLACK)), int(settings.get("padding_power", 1))

    def batches(self, texts: Sequence[str], waiting: int) -> list[list[str]]:
        """Take ``waiting`` texts at a time and group those of similar length into batches."""
        from patcher.triton.tokenizer.model import like_lengths

        found = []
        for start in range(0, len(texts), waiting):
            some = texts[start : start + waiting]
            lengths = [(sum(each.attention_mask), 1) for each in self.tokenizer.encode_batch(list(some))]
            found += [[some[place] for place in group] for group in like_lengths(lengths, self.slack, power=self.power)]
        return found

    def answer(self, batches: Sequence[Sequence[str]]) -> list[Any]:
        """Features of each batch, in order."""
        from patcher.triton.tokenizer.model import encode

        given = [encode(self.tokenizer, batch, self.names) for batch in batches]
        return [self.session.run(["features"], tokens)[0] for tokens in given]


def exported(checkpoint: Path, folder: Path) -> dict[str, Graph]:
    """The backbone with and without work on padding, in FP32 and INT8."""
    from export.backbone import export_backbone
    from export.checkpoint import load_checkpoint
    from export.precision import convert
    from export.stages import split_off
    from export.tokenizer import prepare_tokenizer

    loaded = load_checkpoint(str(checkpoint))
    encoder = prepare_tokenizer(loaded, None)
    split, tokens = split_off(loaded, encoder)
    graphs = {}
    for kind in ("padded", "unpadded"):
        made = export_backbone(loaded.model, split, tokens, folder / f"{kind}.onnx", unpad=kind == "unpadded")
        for precision in ("fp32", "int8"):
            file = made if precision == "fp32" else convert(made, "int8", folder / f"{kind}-int8.onnx")
            graphs[f"{precision} {kind}"] = Graph(file.path, encoder.json, unpadded=made.unpadded)
    return graphs


def measure(graphs: dict[str, Graph], texts: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Texts per second of both graphs, and their ratio round by round."""
    rows = []
    for precision in ("fp32", "int8"):
        pair = [graphs[f"{precision} {kind}"] for kind in ("padded", "unpadded")]
        longest_last = sorted(texts, key=lambda text: len(pair[0].tokenizer.encode(text)))
        cases = {f"{waiting} waiting": [graph.batches(texts, waiting) for graph in pair] for waiting in WAITING}
        cases["all, sorted by length"] = [
            [longest_last[start : start + 32] for start in range(0, len(texts), 32)] for _ in pair
        ]
        for what, batches in cases.items():
            rates: list[list[float]] = [[], []]
            for _ in range(rounds + 1):
                for graph, each, found in zip(pair, batches, rates, strict=True):
                    start = time.perf_counter()
                    graph.answer(each)
                    found.append(len(texts) / (time.perf_counter() - start))
            before, after = (each[1:] for each in rates)  # the first one warms up
            ratios = [new / old for old, new in zip(before, after, strict=True)]
            rows.append(
                {
                    "what": f"{precision}, {what}",
                    "padded texts/s": statistics.median(before),
                    "unpadded texts/s": statistics.median(after),
                    "ratio": statistics.median(ratios),
                    "low": min(ratios),
                    "high": max(ratios),
                    "batches": [len(each) for each in batches],
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def difference(graphs: dict[str, Graph], texts: Sequence[str]) -> float:
    """The largest difference of a feature between the two FP32 graphs on the same padded batches."""
    batches = [texts[start : start + 32] for start in range(0, len(texts), 32)]
    old, new = (graphs[f"fp32 {kind}"].answer(batches) for kind in ("padded", "unpadded"))
    return max(float(np.abs(a - b).max()) for a, b in zip(old, new, strict=True))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| texts | padded, texts/s | unpadded, texts/s | ratio (lowest to highest) |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row['what']} | {row['padded texts/s']:.0f} | {row['unpadded texts/s']:.0f} "
        f"| {row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f}) |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEMO, help="a fine-tuned classifier; by default the demo's")
    parser.add_argument("--texts", type=Path, default=ROOT / "tests" / "demo" / "data" / "train.csv")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    from patcher import read_examples

    texts = list(read_examples(arguments.texts).texts)
    random.Random(0).shuffle(texts)
    texts = texts[:MOST_TEXTS]
    with tempfile.TemporaryDirectory() as folder:
        graphs = exported(arguments.checkpoint, Path(folder))
        gap = difference(graphs, texts)
        rows = measure(graphs, texts, arguments.rounds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = {"largest difference of a feature in FP32": gap, "rows": rows}
    (arguments.out / "unpadding.json").write_text(json.dumps(document, indent=2) + "\n")
    print(f"largest difference of a feature in FP32: {gap:.1g}\n{table(rows)}")


if __name__ == "__main__":
    main()
