"""Times the usual way to add a label: one more row, fine-tune the head on all data, export and load the whole model.

    python tests/benchmarks/whole_model.py CHECKPOINT TRAIN.csv EXAMPLES.csv FOLDER

The backbone stays frozen, which is the cheapest variant. The old data is included, because fine-tuning on the new
examples alone makes the head forget the rest. Prints the seconds of each stage as one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

STEPS = 200
BATCH = 32


def frozen_inputs(model, tokenizer, texts):
    """Compute the last layer's inputs for all texts, in batches of similar length; the backbone is not trained."""
    import torch

    given = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), BATCH):
            batch = [texts[i] for i in order[start : start + BATCH]]
            model(**tokenizer(batch, padding=True, truncation=True, return_tensors="pt"))
    hook.remove()
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(given)[back]


def main(checkpoint: str, train: str, examples: str, folder: str) -> None:
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal clock
        seconds[stage] = time.perf_counter() - clock
        clock = time.perf_counter()

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from patcher.examples_file import read_examples

    lap("import")
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    old = model.classifier
    model.classifier = torch.nn.Linear(old.in_features, old.out_features + 1)
    with torch.no_grad():
        model.classifier.weight[:-1], model.classifier.bias[:-1] = old.weight, old.bias
    lap("read the checkpoint")

    texts, labels = list(read_examples(train).texts), list(read_examples(train).labelled())
    ids = [model.config.label2id[label] for label in labels]
    new = list(read_examples(examples).texts)
    inputs = frozen_inputs(model, tokenizer, texts + new)
    targets = torch.tensor(ids + [old.out_features] * len(new))
    lap("features of the old data")
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-2)
    for _ in range(STEPS):
        torch.nn.functional.cross_entropy(model.classifier(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = tokenizer(new, padding=True, return_tensors="pt")
    lap("fine-tune the head")

    path = Path(folder) / "whole" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    names = list(batch)
    torch.onnx.export(
        model,
        (),
        str(path),
        kwargs={**batch, "return_dict": False},
        input_names=names,
        output_names=["logits"],
        dynamic_axes={name: {0: "batch", 1: "sequence"} for name in names} | {"logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    lap("export the whole model")

    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    lap("load and answer")
    seconds["bytes written"] = path.stat().st_size
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
