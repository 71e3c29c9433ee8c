"""The labels of texts as positions in a list of labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patcher.errors import PatcherError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from patcher.arrays import Ints
    from patcher.examples import Examples

    LabelIds: TypeAlias = Sequence[Sequence[int]]

__all__ = ["flat_ids", "places_of"]


def places_of(examples: Examples, index: Callable[[str], int], *, several: bool) -> list[list[int]]:
    """The position of each text's label, or of its labels if a text can have ``several``.

    ``index`` returns the position of a label or raises a PatcherError, which is raised again with the line prepended.
    """
    places = []
    for row, labels in enumerate(examples.labels_of_each(several=several)):
        try:
            places.append([index(label) for label in labels])
        except PatcherError as error:
            raise type(error)(f"{examples.where(row)}: {error}") from None
    return places


def flat_ids(ids: LabelIds) -> tuple[Ints, Ints]:
    """One pair for each text and label: positions of the texts and of the labels, both INT64 ``[pairs]``."""
    rows = np.repeat(np.arange(len(ids)), np.array([len(each) for each in ids], np.int64))
    return rows, np.array([label for each in ids for label in each], np.int64)
