"""How fast the split ensemble answers, beside what else could answer: in one run, on the same texts, in turns.

    python tests/benchmarks/serving.py [--repo DIR] [--checkpoint DIR] [--texts FILE] [--rounds 3]

Served by one Triton, measured by perf_analyzer: the ensemble from text, the same graph in one piece, the ensemble from
tokens. In processes of their own: onnxruntime sorted into batches of 32 (the practical limit), the transformers
pipeline one by one, PyTorch in batches, a FastAPI + onnxruntime server (where fastapi and uvicorn are installed).
Without ``--repo`` the demo's classifier is served, if `make demo` was run, else a tiny one made on the spot: that
measures the serving, not a model.

Prints a table and writes ``serving.json`` and ``serving.png`` under ``--out``. Take ratios within one run, not the
figures of two.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

if TYPE_CHECKING:
    from collections.abc import Sequence

LEVELS = (1, 4, 16, 32)
MOST_TEXTS = 600
LIMIT = "onnxruntime, sorted, batches of 32"


DEMO = ROOT / "build" / "demo"


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def token_rows(classifier, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The texts as the tokens that perf_analyzer sends to the ensemble without a tokenizer."""
    from tokenizers import Tokenizer

    from patcher.triton.tokenizer.model import encode

    tokenizer = Tokenizer.from_file(str(classifier.tokenizer_path))
    names = [tensor.name for tensor in classifier.repository.config(classifier.backbone_model).input]
    rows = []
    for text in texts:
        tokens = encode(tokenizer, [text], names)
        rows.append({name: {"content": each[0].tolist(), "shape": [each.shape[1]]} for name, each in tokens.items()})
    return rows


def in_process(classifier, checkpoint: Path | None, texts: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Texts a second of everything outside of Triton, in turns."""
    import tiny

    from tests.benchmarks import serving_contenders as contenders

    runners = {LIMIT: contenders.onnxruntime_sorted(classifier)}
    if checkpoint:
        runners["transformers pipeline, one by one"] = contenders.transformers_one_by_one(checkpoint)
        runners["PyTorch, sorted, batches of 32"] = contenders.pytorch_batched(checkpoint)
    server = contenders.FastApi(classifier, tiny.free_ports(1)[0]) if contenders.FastApi.available else None
    if server:
        runners[f"FastAPI + onnxruntime, {contenders.CLIENTS} clients"] = server.rate
    try:
        found: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(rounds):
            for name, run in runners.items():
                tell(name)
                found[name].append(run(texts))
    finally:
        if server:
            server.close()
    return found


def served(classifier, texts: Sequence[str], rounds: int, window: float) -> list[Any]:
    """perf_analyzer over the ensemble, the whole graph and the ensemble from tokens, in turns."""
    from patcher import TritonServer
    from patcher.loadtest import Load, load_test
    from patcher.triton.server import EmbeddedTriton
    from tests.benchmarks.serving_monolith import add_contenders

    models = [classifier.name, *add_contenders(classifier)]
    rows = {models[2]: token_rows(classifier, texts)}
    loads = [Load(concurrency=level) for level in LEVELS]
    log = classifier.root.parent / "triton.log"
    with EmbeddedTriton(classifier.root, models, log_file=log) as triton, TritonServer(triton.url) as server:
        return load_test(server, models, texts, loads, window=window, rounds=rounds, progress=tell, inputs=rows)


def summary(outside: dict[str, list[float]], measured: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """Medians, spread, and ratios: to the limit, and round by round to the whole graph under the same load."""
    from patcher.loadtest import compare
    from tests.benchmarks.serving_monolith import WHOLE

    limit = statistics.median(outside[LIMIT])
    rows: list[dict[str, Any]] = []
    for what, rates in outside.items():
        rows.append(
            {"what": what, "texts/s": statistics.median(rates), "low": min(rates), "high": max(rates)}
            | {"of the limit": statistics.median(rates) / limit}
        )
    ratios = {(each.model, each.load): each for each in compare(measured, WHOLE)}
    for model, load in dict.fromkeys((each.model, each.load) for each in measured):
        own = [each for each in measured if (each.model, each.load) == (model, load)]
        rates = [each.throughput for each in own]
        row = {"what": f"Triton: {model}, {load}", "texts/s": statistics.median(rates)}
        row |= {"low": min(rates), "high": max(rates), "of the limit": statistics.median(rates) / limit}
        row |= {"p50 ms": statistics.median(each.p50_us for each in own) / 1000}
        row |= {"p99 ms": statistics.median(each.p99_us for each in own) / 1000}
        row |= {"failures": sum(each.failures for each in own)}
        if model == name:
            ratio = ratios[model, load]
            row |= {"of the whole": ratio.ratio, "of the whole, low": ratio.low, "of the whole, high": ratio.high}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = {"texts/s": ".0f", "low": ".0f", "high": ".0f", "of the limit": ".2f"}
    columns |= {"of the whole": ".3f", "p50 ms": ".1f", "p99 ms": ".1f", "failures": "d"}
    lines = ["| what | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row in rows:
        cells = (format(row[key], how) if key in row else "" for key, how in columns.items())
        lines.append(f"| {row['what']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, help="a model repository with one classifier")
    parser.add_argument("--checkpoint", type=Path, help="the checkpoint it was exported from")
    parser.add_argument("--texts", type=Path, help="the texts to send")
    parser.add_argument("--window", type=float, default=1.0, help="seconds; a measurement is three of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    import tiny

    from patcher import ModelRepository, read_examples
    from patcher.loadtest import plot

    if not arguments.repo and (DEMO / "model_repository" / "patcher.json").is_file():
        arguments.repo, arguments.checkpoint = DEMO / "model_repository", DEMO / "checkpoint"
        arguments.texts = arguments.texts or ROOT / "tests" / "demo" / "data" / "test.csv"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "model_repository"
        if arguments.repo:
            shutil.copytree(arguments.repo, root)
            classifier = ModelRepository(root).classifier()
        else:
            classifier = tiny.make_repository(root, Path(folder) / "scratch")
        texts = [text for label in tiny.OLD for text in tiny.sentences(label, 100, seed=3)]
        if arguments.texts:
            texts = list(read_examples(arguments.texts).texts)
        texts = texts[:: -(-len(texts) // MOST_TEXTS)]
        outside = in_process(classifier, arguments.checkpoint, texts, arguments.rounds)
        measured = served(classifier, texts, arguments.rounds, arguments.window)
    rows = summary(outside, measured, classifier.name)
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = {"rows": rows, "outside": outside, "served": [each.to_json() for each in measured]}
    (arguments.out / "serving.json").write_text(json.dumps(document, indent=2) + "\n")
    plot(measured, arguments.out / "serving.png")
    print(table(rows))


if __name__ == "__main__":
    main()
