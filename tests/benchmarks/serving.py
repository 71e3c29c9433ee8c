"""Compares the speed of the split ensemble with alternatives: in one run, on the same texts, in alternating rounds.

    python tests/benchmarks/serving.py [--repo DIR] [--also DIR] [--checkpoint DIR] [--texts FILE] [--rounds 3]

Each round measures with perf_analyzer, on one Triton: the ensemble from text, the same graph in one piece (behind the
tokenizer, as steps of an ensemble), and the ensemble from tokens. On other Tritons, in the same rounds: the repository
with Triton's default instances and threads, the repository with an encoder that asks Triton for the backbone (as on
servers that `patcher serve` did not start), and the repositories of ``--also`` (for example the same classifier in
INT8). At the end of each round, outside of Triton: onnxruntime on texts sorted into batches of 32 (the practical
limit), the transformers pipeline one text at a time, PyTorch in batches, and a FastAPI + onnxruntime server (if fastapi
and uvicorn are installed). Finally, texts arrive at random (Poisson) at 70 % of the ensemble's best throughput.

Without ``--repo`` it serves the demo's classifier if `make demo` was run, else a generated tiny one, which measures the
serving and not a model. Prints a table and writes ``serving.json`` and ``serving.png`` under ``--out``. Compare ratios
within one run, not figures of two runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Rates = dict[str, list[float]]

LEVELS = (1, 4, 16, 32)
MOST_TEXTS = 600
LIMIT = "onnxruntime, sorted, batches of 32"
PIPELINE = "transformers pipeline, one by one"
DEFAULTS = "Triton's default instances and threads"
ASKING = "asking Triton for the backbone"
REST = 3.0
"""Seconds to wait after measuring outside of Triton, because its threads keep spinning for a while."""
RANDOM = 0.7
"""Rate of random arrivals, as a share of the best throughput."""


DEMO = ROOT / "build" / "demo"


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def copied(repository: Path, folder: Path) -> Any:
    """Copy a repository; return the classifier of the copy."""
    from patcher import ModelRepository

    return ModelRepository(shutil.copytree(repository, folder / "model_repository")).classifier()


def token_rows(classifier, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The texts as tokens, for perf_analyzer to send to the ensemble without a tokenizer."""
    from tokenizers import Tokenizer

    from patcher.triton.tokenizer.model import encode

    tokenizer = Tokenizer.from_file(str(classifier.tokenizer_path))
    names = [tensor.name for tensor in classifier.repository.config(classifier.backbone_model).input]
    rows = []
    for text in texts:
        tokens = encode(tokenizer, [text], names)
        rows.append({name: {"content": each[0].tolist(), "shape": [each.shape[1]]} for name, each in tokens.items()})
    return rows


@contextlib.contextmanager
def in_process(
    classifiers: Mapping[str, Any], checkpoint: Path | None, texts: Sequence[str], found: Rates
) -> Iterator[Callable[[], None]]:
    """Yield a function that measures everything outside of Triton once and adds texts per second to ``found``.

    ``classifiers`` are keyed by title.
    """
    import tiny

    from tests.benchmarks import serving_contenders as contenders

    runners = {titled(LIMIT, title): contenders.onnxruntime_sorted(each) for title, each in classifiers.items()}
    if checkpoint:
        runners[PIPELINE] = contenders.transformers_one_by_one(checkpoint)
        runners["PyTorch, sorted, batches of 32"] = contenders.pytorch_batched(checkpoint)
    first = next(iter(classifiers.values()))
    server = contenders.FastApi(first, tiny.free_ports(1)[0]) if contenders.FastApi.available else None
    if server:
        runners[f"FastAPI + onnxruntime, {contenders.CLIENTS} clients"] = server.rate

    def once() -> None:
        for name, run in runners.items():
            tell(name)
            found.setdefault(name, []).append(run(texts))

    try:
        yield once
    finally:
        if server:
            server.close()


def titled(what: str, title: str) -> str:
    """``what``, followed by the repository's title if it has one."""
    return f"{what} ({title})" if title else what


def served(
    classifiers: Mapping[str, Any], texts: Sequence[str], rounds: int, window: float, after_each: Callable[[], None]
) -> list[Any]:
    """Measure everything that Triton serves with perf_analyzer, in rounds; ``after_each`` is called after each round.

    The measurements name each model by its title.
    """
    from patcher import TritonServer
    from patcher.loadtest import load_test
    from patcher.measurement import Load
    from patcher.triton.server import EmbeddedTriton
    from tests.benchmarks.serving_monolith import add_contenders

    first = next(iter(classifiers.values()))
    whole, tokens = add_contenders(first)
    rows = {tokens: token_rows(first, texts)}
    with contextlib.ExitStack() as running:
        servers, titles = {}, {}
        for title, each in classifiers.items():
            models = [each.name, each.backbone_model, *((whole, tokens) if each is first else ())]
            log = each.root.parent / "triton.log"
            runs = title not in (DEFAULTS, ASKING)
            triton = EmbeddedTriton(each.root, models, log_file=log, encoder_runs_backbone=runs)
            servers[title] = running.enter_context(triton)
            titles[each.name if each is first else f"{each.name}@{servers[title].url}"] = titled(each.name, title)
        titles |= {whole: whole, tokens: tokens}
        server = running.enter_context(TritonServer(servers[""].url))
        loads = [Load(concurrency=level) for level in LEVELS]
        measure = functools.partial(load_test, server, texts=texts, window=window, progress=tell)
        found: list[Any] = []
        for turn in range(rounds):
            tell(f"round {turn + 1} of {rounds}")
            first_one = turn % len(titles)  # start with another model each round
            found += measure([*titles][first_one:] + [*titles][:first_one], loads=loads, inputs=rows)
            after_each()
            time.sleep(REST)
        best = max(
            statistics.median(each.throughput for each in found if (each.model, each.load) == (first.name, load))
            for load in loads
        )
        found += measure([first.name], loads=[Load(request_rate=round(RANDOM * best, 1))], rounds=rounds)
    return [dataclasses.replace(each, model=titles[each.model]) for each in found]


def summary(outside: Rates, measured: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """Medians, spread, and ratios to the limit and to others under the same load, all computed round by round."""
    from patcher.measurement import compare
    from tests.benchmarks.serving_monolith import WHOLE

    limit, pipeline = outside[LIMIT], outside.get(PIPELINE, [])
    rows: list[dict[str, Any]] = []
    for what, rates in outside.items():
        rows.append({"what": what, **_rates(rates, limit, pipeline)})
    ratios = {(each.model, each.load): each for each in compare(measured, WHOLE)}
    defaults = {(each.model, each.load): each for each in compare(measured, titled(name, DEFAULTS))}
    asking = {(each.model, each.load): each for each in compare(measured, titled(name, ASKING))}
    for model, load in dict.fromkeys((each.model, each.load) for each in measured):
        own = [each for each in measured if (each.model, each.load) == (model, load)]
        row = {"what": f"Triton: {model}, {load}", **_rates([each.throughput for each in own], limit, pipeline)}
        row |= {"p50 ms": statistics.median(each.p50_us for each in own) / 1000}
        row |= {"p99 ms": statistics.median(each.p99_us for each in own) / 1000}
        row |= {"p99 / p50": statistics.median(each.p99_us / each.p50_us for each in own)}
        row |= {"failures": sum(each.failures for each in own)}
        for title, found in (("of the whole", ratios), ("of the defaults", defaults), ("of asking", asking)):
            if model == name and (ratio := found.get((model, load))):
                row |= {title: ratio.ratio, f"{title}, low": ratio.low, f"{title}, high": ratio.high}
        rows.append(row)
    return rows


def _rates(rates: Sequence[float], limit: Sequence[float], pipeline: Sequence[float]) -> dict[str, float]:
    row = {"texts/s": statistics.median(rates), "low": min(rates), "high": max(rates)}
    for title, others in (("of the limit", limit), ("times the pipeline", pipeline)):
        ratios = [rate / other for rate, other in zip(rates, others, strict=False)]
        if ratios:
            row |= {title: statistics.median(ratios), f"{title}, low": min(ratios), f"{title}, high": max(ratios)}
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = {"texts/s": ".0f", "low": ".0f", "high": ".0f", "of the limit": ".2f"}
    columns |= {"times the pipeline": ".1f", "of the whole": ".3f", "of the defaults": ".2f", "of asking": ".2f"}
    columns |= {"p50 ms": ".1f", "p99 ms": ".1f", "p99 / p50": ".1f", "failures": "d"}
    lines = ["| what | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row in rows:
        cells = (format(row[key], how) if key in row else "" for key, how in columns.items())
        lines.append(f"| {row['what']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, help="a model repository with one classifier")
    parser.add_argument("--also", type=Path, action="append", default=[], help="another repository, in the same rounds")
    parser.add_argument("--checkpoint", type=Path, help="the checkpoint that it was exported from")
    parser.add_argument("--texts", type=Path, help="the texts to send")
    parser.add_argument("--window", type=float, default=1.0, help="seconds per window; a measurement takes three")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    import tiny

    from patcher import read_examples
    from patcher.measurement import plot
    from tests.benchmarks.serving_monolith import with_tritons_defaults

    if not arguments.repo and (DEMO / "model_repository" / "patcher.json").is_file():
        arguments.repo, arguments.checkpoint = DEMO / "model_repository", DEMO / "checkpoint"
        arguments.texts = arguments.texts or ROOT / "tests" / "demo" / "data" / "test.csv"
    with tempfile.TemporaryDirectory() as folder:
        if arguments.repo:
            classifiers = {"": copied(arguments.repo, Path(folder) / "first")}
        else:
            made = tiny.make_repository(Path(folder) / "first" / "model_repository", Path(folder) / "scratch")
            classifiers = {"": made}
        for path in arguments.also:
            classifiers[path.name] = copied(path, Path(folder) / "also" / path.name)
        texts = [text for label in tiny.OLD for text in tiny.sentences(label, 100, seed=3)]
        if arguments.texts:
            texts = list(read_examples(arguments.texts).texts)
        texts = texts[:: -(-len(texts) // MOST_TEXTS)]
        plain = copied(classifiers[""].root, Path(folder) / "defaults")
        with_tritons_defaults(plain)
        others = {DEFAULTS: plain, ASKING: copied(classifiers[""].root, Path(folder) / "asking")}
        outside: Rates = {}
        with in_process(classifiers, arguments.checkpoint, texts, outside) as once:
            measured = served({**classifiers, **others}, texts, arguments.rounds, arguments.window, once)
        name = classifiers[""].name
    rows = summary(outside, measured, name)
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = {"rows": rows, "outside": outside, "served": [each.to_json() for each in measured]}
    (arguments.out / "serving.json").write_text(json.dumps(document, indent=2) + "\n")
    plot(measured, arguments.out / "serving.png")
    print(table(rows))


if __name__ == "__main__":
    main()
