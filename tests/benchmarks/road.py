"""Measures the whole workflow on a real checkpoint: parity over gRPC, and time, cost and gain of a new label.

    python tests/benchmarks/road.py --checkpoint DIR --data DIR

``--checkpoint`` is a fine-tuned ``*ForSequenceClassification`` folder; ``--data`` holds ``base_train.csv``,
``base_test.csv``, ``new_test.csv`` and ``new/LABEL.csv`` with ten examples of each new label. Prints the results as
JSON and writes them to ``--out``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PATCHER = Path(sys.executable).with_name("patcher")
RUNS = 5


def patcher(*arguments: object, url: str = "", repo: Path | None = None) -> dict | list:
    """Run a verb as a user would and return its JSON document."""
    environment = {**os.environ, "TRITON_URL": url or "127.0.0.1:1", "TRITON_MODEL_REPO": str(repo)}
    command = [str(PATCHER), *map(str, arguments), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parity(checkpoint: Path, data: Path, repo: Path, url: str) -> dict:
    """Compare the answers to 200 sentences over gRPC with the checkpoint's in PyTorch."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from patcher import TritonServer, read_examples

    texts = read_examples(data / "base_test.csv").texts[::20][:200]
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with TritonServer(url) as server:
        answers = server.classify("intent", texts)
    wrong, worst = 0, 0.0
    for text, answer in zip(texts, answers, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt", truncation=True)).logits[0].numpy()
        wrong += model.config.id2label[int(logits.argmax())] != answer.labels[0]
        worst = max(worst, float(np.abs(logits - answer.logits).max()))
    return {"texts": len(texts), "labels that differ": wrong, "largest difference of a logit": worst}


def add_seconds(data: Path, repo: Path, url: str) -> dict:
    """Wall time of the whole ``add-label`` process, until the new label is served; median of five."""
    backbone = repo / "intent_backbone" / "1" / "model.onnx"
    before = sha256(backbone)
    seconds, report = [], {}
    for _ in range(RUNS):
        start = time.perf_counter()
        report = patcher("add-label", "--examples", data / "new" / "payday.csv", url=url, repo=repo)
        seconds.append(time.perf_counter() - start)
        patcher("rollback", "--to", 1, url=url, repo=repo)
    assert sha256(backbone) == before
    written = repo / "intent_head" / str(report["version"])
    return {
        "seconds": seconds,
        "median": statistics.median(seconds),
        "stages of the last": report["seconds"],
        "head_bytes": report["head_bytes"],
        "memory_bytes": (written / "memory.safetensors").stat().st_size,
        "backbone unchanged": True,
    }


def alternative_seconds(checkpoint: Path, data: Path, scratch: Path) -> dict:
    """Time what add-label replaces: fine-tune the head on old and new data, export the whole model, load it again."""
    script = Path(__file__).with_name("whole_model.py")
    start = time.perf_counter()
    files = (checkpoint, data / "base_train.csv", data / "new" / "payday.csv", scratch / "whole")
    command = [sys.executable, str(script), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"seconds": time.perf_counter() - start, "stages": json.loads(done.stdout.splitlines()[-1])}


def each_alone(data: Path, repo: Path, scratch: Path) -> dict:
    """Add each new label on its own from its ten examples, even if the gate refuses; the results say what it said.

    The ten examples are the first in the data and much alike: those of ``yes`` flip a quarter of the remembered inputs
    of ``no``.
    """
    from patcher import ModelRepository, PatchSettings, add_labels, read_examples
    from patcher.evaluation import evaluate_head
    from patcher.features import extract_features

    copy = scratch / "alone"
    shutil.copytree(repo, copy)
    classifier = ModelRepository(copy).classifier()
    old, new = read_examples(data / "base_test.csv"), read_examples(data / "new_test.csv")
    old_features = extract_features(classifier, old.texts)
    new_features = extract_features(classifier, new.texts)
    before = evaluate_head(classifier.head(1), old_features, old.labelled()).accuracy
    rows = {}
    for path in sorted((data / "new").glob("*.csv")):
        forced = PatchSettings(force=True)
        report = add_labels(classifier.repository, read_examples(path).by_label(), settings=forced)
        head = classifier.head()
        keep = [i for i, label in enumerate(new.labelled()) if label == path.stem]
        recall = evaluate_head(head, new_features[keep], [path.stem] * len(keep)).accuracy
        after = evaluate_head(head, old_features, old.labelled()).accuracy
        rows[path.stem] = {
            "old accuracy change, points": 100 * (after - before),
            "recall": recall,
            "estimated recall": report.estimated_recall,
            "flips bound": report.verdict.flips_upper_bound,
            "gate": report.gate,
        }
        with classifier.repository.lock():
            classifier.pin(1)
    return {
        "old accuracy before": before,
        "mean change, points": statistics.mean(row["old accuracy change, points"] for row in rows.values()),
        "mean recall": statistics.mean(row["recall"] for row in rows.values()),
        "labels": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repo", type=Path, help="an existing export of the checkpoint, which saves minutes")
    parser.add_argument("--out", type=Path, default=Path("tests/benchmarks/results/road.json"))
    arguments = parser.parse_args()
    from patcher.triton.server import EmbeddedTriton

    results: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        repo = scratch / "model_repository"
        if arguments.repo:
            shutil.copytree(arguments.repo, repo)
        else:
            start = time.perf_counter()
            patcher("export", arguments.checkpoint, "--repo", repo, "--train", arguments.data / "base_train.csv")
            results["export"] = {"seconds": time.perf_counter() - start}
        with EmbeddedTriton(repo, ["intent", "intent_features"]) as triton:
            results["parity"] = parity(arguments.checkpoint, arguments.data, repo, triton.url)
            print(json.dumps(results, indent=2), flush=True)
            results["add-label"] = add_seconds(arguments.data, repo, triton.url)
        results["each label alone"] = each_alone(arguments.data, repo, scratch)
        results["whole model again"] = alternative_seconds(arguments.checkpoint, arguments.data, scratch)
    results["ratio"] = results["whole model again"]["seconds"] / results["add-label"]["median"]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
