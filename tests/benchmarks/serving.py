"""How fast the ensemble answers, beside ONNX Runtime in this process on the same texts: the practical limit.

    python tests/benchmarks/serving.py [--repo DIR --texts FILE]

Without arguments a tiny classifier made on the spot is served: that measures the serving, not a model. Prints a table
and writes ``results/serving.json``. Take ratios within one run, not the figures of two.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
LOADS = "1:16:5"


def in_process(classifier, texts: list[str]) -> float:
    """Texts a second of the repository's own files in this process, sorted by length, in batches of 32."""
    from patcher.runtime import Encoder, open_session, run_head

    encoder = Encoder(classifier.backbone_path, classifier.tokenizer_path)
    head = open_session(classifier.version_path(classifier.serving()) / "model.onnx")
    run_head(head, encoder.encode(texts[:64]))
    start = time.perf_counter()
    run_head(head, encoder.encode(texts))
    return len(texts) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, help="a model repository with one classifier")
    parser.add_argument("--texts", type=Path, help="the texts to send")
    parser.add_argument("--window", type=float, default=2.0, help="seconds; a measurement is three of them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serving.json")
    arguments = parser.parse_args()
    import tiny

    from patcher import ModelRepository, TritonServer, read_examples
    from patcher.loadtest import load_test, parse_loads
    from patcher.triton.server import EmbeddedTriton

    with tempfile.TemporaryDirectory() as folder:
        if arguments.repo:
            classifier = ModelRepository(arguments.repo).classifier()
        else:
            classifier = tiny.make_repository(Path(folder) / "model_repository", Path(folder) / "scratch")
        texts = [text for label in tiny.OLD for text in tiny.sentences(label, 100, seed=3)]
        if arguments.texts:
            texts = list(read_examples(arguments.texts).texts)
        limit = in_process(classifier, texts)
        models = [classifier.name, classifier.features_model]
        log = Path(folder) / "triton.log"
        with EmbeddedTriton(classifier.root, models, log_file=log) as triton, TritonServer(triton.url) as server:
            tell = lambda what: print(what, file=sys.stderr)  # noqa: E731
            found = load_test(
                server, [classifier.name], texts, parse_loads(LOADS), window=arguments.window, progress=tell
            )
    rows = [{**each.to_json(), "of in-process": each.throughput / limit} for each in found]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"in-process texts/s": limit, "served": rows}, indent=2) + "\n")
    print(f"in process, sorted, batches of 32: {limit:.0f} texts/s")
    for row in rows:
        load = f"{row['model']} c{row['concurrency']}"
        print(
            f"{load}: {row['throughput']:.0f} texts/s ({row['of in-process']:.2f} of it), "
            f"p50 {row['p50_us'] / 1000:.1f} ms, p99 {row['p99_us'] / 1000:.1f} ms, {row['failures']} failed"
        )


if __name__ == "__main__":
    main()
