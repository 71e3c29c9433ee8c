"""Real inputs of old labels: what a new row is calibrated on, and what its harm is counted on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patcher.blocks import blocks
from patcher.clustering import half
from patcher.fit.model import full_rows

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from patcher.arrays import Bools, Doubles, Floats, Ints
    from patcher.head import Head
    from patcher.memory import Memory

__all__ = ["Labelled", "Nearest", "OldInputs", "old_inputs", "own_logits"]

_MOST = 20_000
"""Most inputs looked at: if none of this many is taken, at most 0.015 % are, and thousands of labels stay fast."""


class Labelled(NamedTuple):
    """Labelled data: features float32 ``[n, width]``, and the positions INT64 ``[n]`` of their labels.

    A text with several labels has one row for each of them, one after the other.
    """

    features: Floats
    ids: Ints


@dataclass(frozen=True)
class Nearest:
    """The inputs that are nearest to being taken by a new row.

    ``places`` INT64 ``[m]`` in the inputs; ``margins`` float64 ``[m]``, how far the new logit is from winning;
    ``right``, whether the input is answered correctly without the new row.
    """

    places: Ints
    margins: Doubles
    right: Bools


@dataclass(frozen=True)
class OldInputs:
    """Features float32 ``[n, width]``, their label's position in the head ``[n]``, and its logit ``[n]``.

    ``weights`` float64 ``[n]``, 1 on average: how many inputs each stands for, where labels have unequal shares of
    them. ``source`` is ``eval``, ``replay`` or ``features`` (of the memory). The last ``others`` of them were added to
    those; the budget of flips applies to each of the two parts.
    """

    features: Floats
    ids: Ints
    own: Floats
    weights: Doubles
    source: str
    others: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def beside(self, other: OldInputs | None) -> OldInputs:
        """These inputs followed by others, with the source of these."""
        if other is None:
            return self
        features, ids = np.concatenate([self.features, other.features]), np.concatenate([self.ids, other.ids])
        own, weights = np.concatenate([self.own, other.own]), np.concatenate([self.weights, other.weights])
        return OldInputs(features, ids, own, weights, self.source, len(other))

    def part(self, places: Ints) -> OldInputs:
        """Some of them."""
        others = int((places >= len(self) - self.others).sum())
        own, weights = self.own[places], self.weights[places]
        return OldInputs(self.features[places], self.ids[places], own, weights, self.source, others)

    def apart(self) -> tuple[OldInputs, OldInputs]:
        """The inputs themselves, and those of the memory that were added to them; either part may be empty."""
        own = len(self) - self.others
        mine, theirs = self.part(np.arange(own)), self.part(np.arange(own, len(self)))
        return mine, dataclasses.replace(theirs, source="features", others=0)

    def groups(self, places: Ints) -> list[tuple[float, Bools]]:
        """For each part that the budget applies to: its inputs' total weight, and which of ``places`` belong to it."""
        own = len(self) - self.others
        parts = ((self.weights[:own], places < own), (self.weights[own:], places >= own))
        return [(float(weights.sum()), mine) for weights, mine in parts if len(weights)]

    def without(self, features: Floats) -> OldInputs | None:
        """Those whose features, as a memory stores them, are not among ``features``; None if no input is left."""
        left = np.flatnonzero(~np.isin(_bytes(half(self.features)), _bytes(half(features))))
        return self.part(left) if len(left) else None

    def nearest(self, weight: Floats, bias: np.float32, head: Head, count: int, also: Ints | None = None) -> Nearest:
        """The ``count`` inputs with the least margin to a new row, float32 ``[width]``, and those at ``also``.

        An input's own logit is at most its best one, so only a few inputs need all logits: with thousands of labels,
        that is the difference between a second and a minute.
        """
        new = self.features @ weight + bias
        places = _least(self.own - new if head.exclusive else -new, count)
        if also is not None:
            places = np.union1d(places, also)
        if not head.exclusive:
            return Nearest(places, -new[places].astype(np.float64), np.ones(len(places), np.bool_))
        best, logit = head.best(self.features[places])
        return Nearest(places, (logit - new[places]).astype(np.float64), best == self.ids[places])


def old_inputs(
    memory: Memory | None,
    replay: Labelled | None,
    head: Head,
    source: str = "replay",
    only: Collection[str] | None = None,
) -> OldInputs | None:
    """The real inputs there are: ``replay``, of labels of the head, else the memory's sample, else None.

    A text of several labels, which either has once for each, counts once. ``only`` takes all that the memory's sample
    holds of some labels, where else there may be more than are looked at.
    """
    if replay is not None:
        features, ids = np.asarray(replay.features, np.float32), np.asarray(replay.ids, np.int64)
        weights = np.ones(len(ids))
    elif memory is not None and len(memory.sample):
        place = {label: index for index, label in enumerate(head.labels) if only is None or label in only}
        ids = np.array([place.get(label, -1) for label in memory.labels], np.int64)[memory.sample_labels]
        kept = np.flatnonzero(ids >= 0)
        kept = kept[:: 1 + len(kept) // _MOST] if only is None else kept
        features, ids, source = memory.sample[kept].astype(np.float32), ids[kept], "features"
        weights = _weights(memory, memory.sample_labels[kept])
    else:
        return None
    if not head.exclusive and len(ids):
        first = np.unique(_bytes(half(features)), return_index=True)[1]
        features, ids, weights = features[first], ids[first], np.ones(len(first))
    return OldInputs(features, ids, own_logits(features, ids, head), weights, source) if len(ids) else None


def _weights(memory: Memory, labels: Ints) -> Doubles:
    """How many inputs each of a label's stands for, 1 on average: of every label about as many were kept."""
    kept = np.bincount(labels, minlength=len(memory.labels))
    each = memory.counts[labels] / kept[labels]
    weights: Doubles = each * (len(labels) / each.sum()) if len(labels) else each
    return weights


def _bytes(rows: NDArray[np.float16]) -> NDArray[np.void]:
    """Each row as one value, so that equal ones can be found."""
    rows = np.ascontiguousarray(rows)
    return rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()


def own_logits(features: Floats, ids: Ints, head: Head) -> Floats:
    """Each input's logit of its own label; by blocks, for the rows of all inputs together may be large."""
    weight, bias = full_rows(head)
    own = np.empty(len(ids), np.float32)
    for block in blocks(len(ids)):
        own[block] = np.einsum("ij,ij->i", features[block], weight[ids[block]]) + bias[ids[block]]
    return own


def _least(values: Floats, count: int) -> Ints:
    """Places of the smallest values, in order."""
    places = np.arange(len(values)) if count >= len(values) else np.argpartition(values, count)[:count]
    return places[np.argsort(values[places], kind="stable")].astype(np.int64)
