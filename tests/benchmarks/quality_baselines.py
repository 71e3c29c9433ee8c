"""The usual ways to add a label, for comparison: the advice found in forums, and textbook methods.

Methods on frozen features use the classifier features, as the fine-tuned layer does, and need only numpy and scipy.
Fine-tuning the whole model needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from patcher.head import Head
    from patcher.memory import Memory

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Scorer = Callable[[Floats], Floats]

__all__ = ["FROZEN", "fine_tune_everything", "imprint", "lda", "logistic_regression", "random_row", "tuned_row"]

_HEAD_EPOCHS, _HEAD_RATE = 20, 1e-3
_BODY_EPOCHS, _BODY_RATE = 20, 5e-5
_SHRINKAGE = 0.1
_BATCH = 64


def random_row(head: Head, memory: Memory, examples: Floats, rng: np.random.Generator) -> Scorer:
    """The advice in forums: add one standard normal row and bias, without training."""
    del memory, examples
    return _linear(head, *_extended(head, rng))


def tuned_row(head: Head, memory: Memory, examples: Floats, rng: np.random.Generator) -> Scorer:
    """Add a random row, then fine-tune the layer on the examples: AdamW, 20 epochs, rate 1e-3, no weight decay."""
    del memory
    weight, bias = _extended(head, rng)
    inputs = np.hstack([examples[:, : head.split], np.ones((len(examples), 1), np.float32)])
    values: Doubles = np.hstack([weight, bias[:, None]]).astype(np.float64)
    first, second = np.zeros_like(values), np.zeros_like(values)
    for step in range(1, _HEAD_EPOCHS + 1):
        chance = _softmax(inputs @ values.T)
        chance[:, -1] -= 1.0
        slope = chance.T @ inputs / len(inputs)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        values = values - _HEAD_RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return _linear(head, values[:, :-1], values[:, -1])


def imprint(head: Head, memory: Memory, examples: Floats, rng: np.random.Generator) -> Scorer:
    """Weight imprinting (arXiv 1712.07136): the row is the examples' mean, scaled to the old rows' average norm."""
    del memory, rng
    mean = examples[:, : head.split].mean(axis=0)
    row = mean / np.linalg.norm(mean) * np.linalg.norm(head.base_weight, axis=1).mean()
    return _linear(head, np.vstack([head.base_weight, row]), np.append(head.base_bias, head.base_bias.mean()))


def lda(head: Head, memory: Memory, examples: Floats, rng: np.random.Generator) -> Scorer:
    """Linear discriminant analysis over all labels with one shrunk covariance; replaces every row."""
    del rng
    ids = np.zeros(len(examples), np.int64)
    grown = memory.add(["a new label"], examples, ids)
    means = grown.means()[:, : head.split]
    inside = grown.within()[: head.split, : head.split]
    level = float(np.trace(inside)) / len(inside)
    inside = (1 - _SHRINKAGE) * inside + _SHRINKAGE * level * np.eye(len(inside))
    weight = np.linalg.solve(inside, means.T).T
    bias = -0.5 * (weight * means).sum(axis=1)
    # The memory has its labels in its own order; a label that it lacks gets a bias of -inf and can never win.
    place = {label: i for i, label in enumerate(grown.labels)}
    order = [place.get(label, -1) for label in (*head.labels, "a new label")]
    known = np.array(order) >= 0
    return _linear(head, weight[order], np.where(known, bias[order], -np.inf))


FROZEN: dict[str, Callable[[Head, Memory, Floats, np.random.Generator], Scorer]] = {
    "random row": random_row,
    "random row, head fine-tuned": tuned_row,
    "imprinting": imprint,
    "LDA, all rows": lda,
}
"""Methods on frozen features: from head, memory, examples and rng to a scorer whose logits have the new label last."""


def _extended(head: Head, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """The layer with one more random row and bias, as the often-copied ``torch.cat`` and ``torch.randn`` code does."""
    fresh = rng.standard_normal(head.split + 1).astype(np.float32)
    return np.vstack([head.base_weight, fresh[:-1]]), np.append(head.base_bias, fresh[-1])


def _linear(head: Head, weight: Floats | Doubles, bias: Floats | Doubles) -> Scorer:
    split, weight32, bias32 = head.split, weight.astype(np.float32), bias.astype(np.float32)
    return lambda features: features[:, :split] @ weight32.T + bias32


def _softmax(logits: Floats | Doubles) -> Floats:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    chance: Floats = powers / powers.sum(axis=1, keepdims=True)
    return chance


def logistic_regression(features: Floats, ids: Ints, labels: int, penalty: float = 10.0) -> Scorer:
    """A softmax layer trained from scratch on standardised features, like scikit-learn's with ``C = 1 / penalty``.

    Minimises the summed log loss plus ``penalty / 2 * |W|^2`` with L-BFGS, with products in float32. Of the penalties
    1, 10, 100 and 1000, 10 gave the best accuracy on CLINC150's validation files.
    """
    from scipy.optimize import minimize

    center, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    inputs = np.hstack([(features - center) / spread, np.ones((len(features), 1), np.float32)]).astype(np.float32)
    count, shape = len(features), (labels, inputs.shape[1])

    def loss(flat: Doubles) -> tuple[float, Doubles]:
        values = flat.reshape(shape).astype(np.float32)
        chance = _softmax(inputs @ values.T)
        cost = -np.log(np.maximum(chance[np.arange(count), ids], 1e-30), dtype=np.float64).sum()
        chance[np.arange(count), ids] -= 1.0
        slope = (chance.T @ inputs).astype(np.float64)
        free = flat.reshape(shape).copy()
        free[:, -1] = 0.0
        return (cost + 0.5 * penalty * float((free**2).sum())) / count, (slope + penalty * free).ravel() / count

    options = {"maxiter": 150, "gtol": 1e-6}
    found = minimize(loss, np.zeros(labels * shape[1]), jac=True, method="L-BFGS-B", options=options)
    values = found.x.reshape(shape).astype(np.float32)
    return lambda rows: (rows - center) / spread @ values[:, :-1].T + values[:, -1]


def fine_tune_everything(
    checkpoint: Path, examples: tuple[str, ...], texts: tuple[str, ...], seed: int
) -> tuple[Ints, float]:
    """Add a random row, then fine-tune all weights of the model on the examples: AdamW, 20 epochs, rate 5e-5.

    Returns the predicted ids for ``texts``, INT64 ``[n]``, where the new label's id is the last, and the seconds of
    training.
    """
    import time

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    old = model.classifier
    if not isinstance(old, torch.nn.Linear):
        raise TypeError(f"the last layer of {type(model).__name__} is no `classifier` of one Linear")
    new = torch.nn.Linear(old.in_features, old.out_features + 1)
    with torch.no_grad():
        new.weight.copy_(torch.cat([old.weight, torch.randn(1, old.in_features)]))
        new.bias.copy_(torch.cat([old.bias, torch.randn(1)]))
    model.classifier = new
    model.config.problem_type = None
    start = time.perf_counter()
    batch = tokenizer(list(examples), padding=True, truncation=True, return_tensors="pt")
    batch.pop("labels", None)
    target = torch.full((len(examples),), old.out_features)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_BODY_RATE)
    model.train()
    for _ in range(_BODY_EPOCHS):
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    model.eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers = np.zeros(len(texts), np.int64)
    with torch.inference_mode():
        for first in range(0, len(order), _BATCH):
            here = order[first : first + _BATCH]
            inputs = tokenizer([texts[i] for i in here], padding=True, truncation=True, return_tensors="pt")
            answers[here] = model(**inputs).logits.argmax(dim=1).numpy()
    return answers, seconds
