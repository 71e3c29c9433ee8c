"""Helpers for labelled texts: label positions, accuracy and progress messages."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

import numpy as np

from patcher.errors import ExamplesError
from patcher.evaluation import answers
from patcher.head import MULTI_LABEL
from patcher.labelled import places_of
from patcher.wording import listing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from patcher.examples import Examples
    from patcher.head import Head
    from patcher.labelled import LabelIds


__all__ = ["accuracy", "label_ids"]

_UNNAMED = re.compile(r"LABEL_\d+")
"""The names that transformers gives to labels without one."""


def label_ids(examples: Examples, labels: Sequence[str], problem: str) -> LabelIds:
    """Position in ``labels`` of each example's label, or positions if a text can have several.

    Raises ExamplesError, naming the line, for a label that the model does not have.
    """
    place = {label: index for index, label in enumerate(labels)}

    def index(label: str) -> int:
        if label not in place:
            raise ExamplesError(_unknown(label, labels))
        return place[label]

    return places_of(examples, index, several=problem == MULTI_LABEL)


def _unknown(label: str, labels: Sequence[str]) -> str:
    near = difflib.get_close_matches(label, labels, 3)
    if all(map(_UNNAMED.fullmatch, labels)):
        hint = (
            f"its config.json gives them no names ({labels[0]} …); set id2label there, or export without --train, then "
            "`patcher rename-label` and `patcher remember`"
        )
    elif label.isdigit() and int(label) < len(labels):
        hint = f"it looks like an id; expected names, which is {labels[int(label)]!r} for {label}"
    elif near:
        hint = f"did you mean {', '.join(near)}?"
    else:
        hint = f"expected one of {listing(labels)}"
    return f"the model has no label {label!r} among its {len(labels)}: {hint}"


def accuracy(head: Head, features: NDArray[np.float32], ids: LabelIds) -> float:
    """Share of the texts for which the head predicts exactly their labels."""
    expected = ({head.labels[label] for label in each} for each in ids)
    return float(np.mean([mine == theirs for mine, theirs in zip(answers(head, features), expected, strict=True)]))
