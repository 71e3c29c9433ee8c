"""Compares the answers of Triton's C++ onnxruntime backend with those of the Python-based one that patcher ships.

    python tests/benchmarks/backends.py --repo DIR --texts FILE --onnxruntime-backend DIR

Serves the classifier on one backend, then on the other; with the C++ one, the encoder asks Triton for the backbone.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

AT_ONCE = 50
MOST_TEXTS = 450


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--repo", "--texts", "--onnxruntime-backend"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    from patcher import ModelRepository, read_examples
    from patcher.serve import served_models
    from patcher.triton.server import EmbeddedTriton

    repository = ModelRepository(arguments.repo)
    classifier = repository.classifier()
    texts = list(read_examples(arguments.texts).texts)
    texts = texts[:: -(-len(texts) // MOST_TEXTS)]
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        for backend in (None, arguments.onnxruntime_backend):
            with (
                EmbeddedTriton(
                    arguments.repo,
                    served_models(repository),
                    log_file=Path(folder) / "log",
                    onnxruntime_backend=backend,
                    encoder_runs_backbone=backend is None,
                ) as triton,
                triton.client() as server,
            ):
                parts = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
                answers.append([each for part in parts for each in server.classify(classifier.address, part)])
    ours, theirs = answers
    equal = sum(a.labels[0] == b.labels[0] for a, b in zip(ours, theirs, strict=True))
    apart = max(float(np.abs(a.logits - b.logits).max()) for a, b in zip(ours, theirs, strict=True))
    print(json.dumps({"texts": len(texts), "labels equal": equal, "logits at most apart": apart}, indent=2))


if __name__ == "__main__":
    main()
