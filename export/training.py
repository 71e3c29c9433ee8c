"""The texts that a classifier was fine-tuned on, and the memory made of them."""

from __future__ import annotations

import difflib
import time
from typing import TYPE_CHECKING

import numpy as np

from patcher.errors import ExamplesError
from patcher.evaluation import answers
from patcher.examples import split_labels
from patcher.head import MULTI_LABEL
from patcher.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from patcher.examples import Examples
    from patcher.head import Head

    LabelIds = Sequence[Sequence[int]]

__all__ = ["accuracy", "build_memory", "counter", "label_ids"]

_SECONDS_A_LINE = 5.0


def label_ids(examples: Examples, labels: Sequence[str], problem: str) -> LabelIds:
    """Positions in ``labels`` of each example's label, or labels where a text can have several.

    Raises ExamplesError with the line for a label that the model does not have.
    """
    place = {label: index for index, label in enumerate(labels)}
    rows = []
    for index, cell in enumerate(examples.labelled()):
        parts = split_labels(cell) if problem == MULTI_LABEL else (cell,)
        unknown = next((part for part in parts if part not in place), None)
        if unknown is not None:
            raise ExamplesError(f"{examples.where(index)}: {_unknown(unknown, labels)}")
        rows.append([place[part] for part in parts])
    return rows


def _unknown(label: str, labels: Sequence[str]) -> str:
    near = difflib.get_close_matches(label, labels, 3)
    if label.isdigit() and int(label) < len(labels):
        hint = f"it looks like an id; expected names, which is {labels[int(label)]!r} for {label}"
    elif near:
        hint = f"did you mean {', '.join(near)}?"
    else:
        hint = f"expected one of {', '.join(labels[:5])}{' …' if len(labels) > 5 else ''}"  # noqa: PLR2004  a few
    return f"the model has no label {label!r} among its {len(labels)}: {hint}"


def build_memory(features: NDArray[np.float32], ids: LabelIds, labels: Sequence[str], split: int) -> Memory:
    """Memory of features FP32 ``[n, width]``; a text with several labels counts for each of them."""
    rows = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
    flat = np.array([label for each in ids for label in each], np.int64)
    return Memory.build(features[rows], flat, labels, split)


def accuracy(head: Head, features: NDArray[np.float32], ids: LabelIds) -> float:
    """Share of the texts that get exactly the labels they have."""
    expected = ({head.labels[label] for label in each} for each in ids)
    return float(np.mean([mine == theirs for mine, theirs in zip(answers(head, features), expected, strict=True)]))


def counter(tell: Callable[[str], None], total: int) -> Callable[[int], None]:
    """A function that hears how many texts are done and tells it now and then."""
    started = last = time.monotonic()

    def hear(done: int) -> None:
        nonlocal last
        moment = time.monotonic()
        if moment - last >= _SECONDS_A_LINE and done < total:
            last = moment
            left = (moment - started) / done * (total - done)
            tell(f"features of {done:,} of {total:,} training texts, {left:.0f} s to go")

    return hear
