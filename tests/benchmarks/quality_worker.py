"""Runs one library from PyPI on a job that ``quality_pypi.py`` wrote; standalone, without importing patcher.

    python quality_worker.py FOLDER

Reads ``job.json`` and writes ``answers.json``: the labels predicted for old and new test texts, before and after each
addition, and the seconds each took.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

SETFIT_STEPS = 100
SETFIT_PER_LABEL = 10


def adaptive_classifier(job: dict[str, Any]) -> dict[str, Any]:
    """Train on all old data once, then make each addition from that state; also add labels one after another.

    The library encodes each text once, sorted by length, and the embeddings are looked up from then on. So the seconds
    exclude the encoder, as for all other methods here.
    """
    library = import_module("adaptive_classifier")
    model = library.AdaptiveClassifier(job["checkpoint"], device="cpu", use_onnx=False)
    model.model.float()  # its own layers are in single precision, and it cannot use a checkpoint in half precision
    texts = sorted(set(job["embedded"]), key=len)
    vectors = dict(zip(texts, model._get_embeddings(texts), strict=True))
    print(f"  adaptive-classifier encoded {len(texts)} texts", flush=True)
    model._get_embeddings = lambda texts: [vectors[text] for text in texts]

    seconds = _timed(lambda: model.add_examples(job["train"]["texts"], [job["labels"][i] for i in job["train"]["ids"]]))
    print(f"  adaptive-classifier learned {len(job['train']['texts'])} old texts in {seconds:.0f} s", flush=True)
    document: dict[str, Any] = {"training_seconds": seconds, "adds": []}
    document["before"] = _best(model, job["test"]["texts"])
    for add in job["adds"]:
        one = copy.deepcopy(model)
        spent = _timed(lambda one=one, add=add: one.add_examples(add["texts"], [add["label"]] * len(add["texts"])))
        old, new = _best(one, job["test"]["texts"]), _best(one, job["new_test"][add["label"]])
        document["adds"].append({"label": add["label"], "draw": add["draw"], "seconds": spent, "old": old, "new": new})
        print(f"  adaptive-classifier {add['label']} {add['draw']}: {spent:.1f} s", flush=True)
    every = [*job["test"]["texts"], *(text for texts in job["new_test"].values() for text in texts)]
    document["sequences"] = []
    for sequence in job["sequences"]:
        one = copy.deepcopy(model)
        spent_each = [
            _timed(lambda one=one, add=add: one.add_examples(add["texts"], [add["label"]] * len(add["texts"])))
            for add in sequence
        ]
        document["sequences"].append({"seconds": spent_each, "answers": _best(one, every)})
        print(f"  adaptive-classifier, {len(sequence)} one after another: {sum(spent_each):.1f} s", flush=True)
    return document


def setfit(job: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune the encoder contrastively on a few examples of every label, old and new, then fit a logistic head."""
    import torch

    library, sentences = import_module("setfit"), import_module("sentence_transformers")
    modules = import_module("sentence_transformers.models")
    regression = import_module("sklearn.linear_model").LogisticRegression
    table = import_module("datasets").Dataset
    document: dict[str, Any] = {"steps": SETFIT_STEPS, "adds": []}
    for add in job["adds"]:
        torch.manual_seed(add["draw"])
        # Convert half-precision weights: on a CPU they would train at a tenth of the speed.
        encoder = modules.Transformer(job["checkpoint"], model_kwargs={"dtype": torch.float32})
        pooling = modules.Pooling(encoder.get_word_embedding_dimension(), pooling_mode="mean")
        body = sentences.SentenceTransformer(modules=[encoder, pooling], device="cpu")
        model = library.SetFitModel(model_body=body, model_head=regression(max_iter=300))
        texts, labels = _few_of_each(job, add["draw"])
        data = table.from_dict({"text": texts + add["texts"], "label": labels + [add["label"]] * len(add["texts"])})
        settings = library.TrainingArguments(
            output_dir=str(Path(sys.argv[1]) / "setfit"),
            batch_size=16,
            max_steps=SETFIT_STEPS,
            sampling_strategy="undersampling",
            report_to="none",
            save_strategy="no",
            show_progress_bar=False,
            use_amp=False,
        )
        trainer = library.Trainer(model=model, args=settings, train_dataset=data)
        spent = _timed(trainer.train)
        old = [str(label) for label in model.predict(job["test"]["texts"], batch_size=64)]
        new = [str(label) for label in model.predict(job["new_test"][add["label"]], batch_size=64)]
        document["adds"].append({"label": add["label"], "draw": add["draw"], "seconds": spent, "old": old, "new": new})
        print(f"  setfit {add['label']} {add['draw']}: {spent:.1f} s", flush=True)
    return document


def _few_of_each(job: dict[str, Any], seed: int) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    ids = np.array(job["train"]["ids"])
    chosen = [
        int(i)
        for label in range(len(job["labels"]))
        for i in rng.permutation(np.flatnonzero(ids == label))[:SETFIT_PER_LABEL]
    ]
    return [job["train"]["texts"][i] for i in chosen], [job["labels"][ids[i]] for i in chosen]


def _best(model: Any, texts: list[str]) -> list[str]:
    return [found[0][0] for found in model.predict_batch(list(texts), k=1)]


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(folder: Path) -> None:
    """Run the job in ``folder``."""
    np.random.seed(0)  # noqa: NPY002  the libraries draw from numpy's global state
    job = json.loads((folder / "job.json").read_text())
    work = {"adaptive-classifier": adaptive_classifier, "setfit": setfit}[job["library"]]
    (folder / "answers.json").write_text(json.dumps(work(job)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
