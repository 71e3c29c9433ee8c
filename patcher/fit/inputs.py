"""Real inputs of old labels, on which a new row is calibrated and its flips are counted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patcher.blocks import blocks, thinned
from patcher.clustering import half
from patcher.fit.model import full_rows

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from patcher.arrays import Bools, Doubles, Floats, Ints
    from patcher.head import Head
    from patcher.memory import Memory

__all__ = ["Labelled", "Nearest", "OldInputs", "old_inputs", "once", "own_logits"]

_MOST = 20_000
"""Most inputs of a memory that are looked at, which keeps thousands of labels fast.

If none of this many flips, at most 0.015 % do (rule of three, 95 % confidence).
"""


class Labelled(NamedTuple):
    """Labelled data: features float32 ``[n, width]``, and the positions INT64 ``[n]`` of their labels.

    A text with several labels has one row per label, in consecutive rows.
    """

    features: Floats
    ids: Ints


@dataclass(frozen=True)
class Nearest:
    """The inputs that come closest to being taken by a new row.

    ``places`` INT64 ``[m]`` are positions in the inputs; ``margins`` float64 ``[m]`` tell by how much the new logit
    falls short of winning; ``right`` tells whether the input is answered correctly without the new row. ``reach`` is a
    lower bound on the margins of all other inputs, inf if there are none.
    """

    places: Ints
    margins: Doubles
    right: Bools
    reach: float


@dataclass(frozen=True)
class OldInputs:
    """Features float32 ``[n, width]``, the position of each input's label in the head ``[n]``, and its logit ``[n]``.

    ``weights`` float64 ``[n]``, 1 on average, tell how many inputs each one stands for if labels were sampled at
    different rates. ``source`` is ``eval``, ``replay`` or ``features`` (of the memory). The last ``others`` inputs come
    from a second source and were appended; the flip budget applies to each of the two parts separately.
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
        """These inputs followed by ``other`` ones; the source stays that of these."""
        if other is None:
            return self
        features, ids = np.concatenate([self.features, other.features]), np.concatenate([self.ids, other.ids])
        own, weights = np.concatenate([self.own, other.own]), np.concatenate([self.weights, other.weights])
        return OldInputs(features, ids, own, weights, self.source, len(other))

    def part(self, places: Ints) -> OldInputs:
        """The inputs at ``places``."""
        others = int((places >= len(self) - self.others).sum())
        own, weights = self.own[places], self.weights[places]
        return OldInputs(self.features[places], self.ids[places], own, weights, self.source, others)

    def apart(self) -> tuple[OldInputs, OldInputs]:
        """The inputs themselves, and those appended to them from the memory; either part may be empty."""
        own = len(self) - self.others
        mine, theirs = self.part(np.arange(own)), self.part(np.arange(own, len(self)))
        return mine, dataclasses.replace(theirs, source="features", others=0)

    def groups(self, places: Ints) -> list[tuple[float, Bools]]:
        """For each part with its own flip budget: its inputs' total weight, and which of ``places`` belong to it."""
        own = len(self) - self.others
        parts = ((self.weights[:own], places < own), (self.weights[own:], places >= own))
        return [(float(weights.sum()), mine) for weights, mine in parts if len(weights)]

    def without(self, features: Floats) -> OldInputs | None:
        """The inputs whose features, rounded to FP16 as in a memory, are not in ``features``; None if none are left."""
        left = np.flatnonzero(~np.isin(_bytes(half(self.features)), _bytes(half(features))))
        return self.part(left) if len(left) else None

    def nearest(self, weight: Floats, bias: np.float32, head: Head, count: int, also: Ints | None = None) -> Nearest:
        """The ``count`` inputs nearest to being taken by a new row, float32 ``[width]``, plus those at ``also``.

        Inputs are ranked by the logit of their own label minus the new one, a lower bound on the margin. Only those
        selected need the logits of all labels: with thousands of labels, a second instead of a minute.
        """
        new = self.features @ weight + bias
        least = self.own - new if head.exclusive else -new
        places = _least(least, count)
        # Not the largest margin: of an input that is answered wrongly, it may be far above the bound it is ranked by.
        reach = np.inf if len(places) == len(self) else float(least[places[-1]])
        if also is not None:
            places = np.union1d(places, also)
        if not head.exclusive:
            return Nearest(places, -new[places].astype(np.float64), np.ones(len(places), np.bool_), reach)
        best, logit = head.best(self.features[places])
        return Nearest(places, (logit - new[places]).astype(np.float64), best == self.ids[places], reach)


def old_inputs(
    memory: Memory | None,
    replay: Labelled | None,
    head: Head,
    source: str = "replay",
    only: Collection[str] | None = None,
) -> OldInputs | None:
    """Real inputs of the head's labels: ``replay`` if given, else the memory's sample, else None.

    In a multi-label head, a text that is listed once per label counts once. With ``only``, the memory's sample is
    restricted to those labels but not thinned out, as it otherwise is if it holds more inputs than are looked at.
    """
    if replay is not None:
        features, ids = np.asarray(replay.features, np.float32), np.asarray(replay.ids, np.int64)
        weights = np.ones(len(ids))
    elif memory is not None and len(memory.sample):
        place = {label: index for index, label in enumerate(head.labels) if only is None or label in only}
        ids = np.array([place.get(label, -1) for label in memory.labels], np.int64)[memory.sample_labels]
        kept = np.flatnonzero(ids >= 0)
        kept = kept[thinned(len(kept), _MOST)] if only is None else kept
        features, ids, source = memory.sample[kept].astype(np.float32), ids[kept], "features"
        weights = _weights(memory, memory.sample_labels[kept])
    else:
        return None
    if not head.exclusive and len(ids):
        first, weights = once(features, weights)
        features, ids = features[first], ids[first]
    return OldInputs(features, ids, own_logits(features, ids, head), weights, source) if len(ids) else None


def once(features: Floats, weights: Doubles) -> tuple[Ints, Doubles]:
    """The places of the different features, rounded to FP16 as in a memory, and their weights, 1 on average.

    A text of several labels was as likely to be sampled as its rarest label made it, so it has the least weight.
    """
    _, first, text = np.unique(_bytes(half(features)), return_index=True, return_inverse=True)
    least = np.full(len(first), np.inf)
    np.minimum.at(least, text, weights)
    return first, least / least.mean()


def _weights(memory: Memory, labels: Ints) -> Doubles:
    """How many inputs each sampled one stands for, 1 on average.

    The sample holds about the same number of every label, however many inputs that label had.
    """
    kept = np.bincount(labels, minlength=len(memory.labels))
    each = memory.counts[labels] / kept[labels]
    weights: Doubles = each * (len(labels) / each.sum()) if len(labels) else each
    return weights


def _bytes(rows: NDArray[np.float16]) -> NDArray[np.void]:
    """Each row as a single value, so that equal rows can be found."""
    rows = np.ascontiguousarray(rows)
    return rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()


def own_logits(features: Floats, ids: Ints, head: Head) -> Floats:
    """The logit of each input's own label, in blocks: gathering the rows of all inputs at once may need much memory."""
    weight, bias = full_rows(head)
    own = np.empty(len(ids), np.float32)
    for block in blocks(len(ids)):
        own[block] = np.einsum("ij,ij->i", features[block], weight[ids[block]]) + bias[ids[block]]
    return own


def _least(values: Floats, count: int) -> Ints:
    """Positions of the ``count`` smallest values, in ascending order of value."""
    places = np.arange(len(values)) if count >= len(values) else np.argpartition(values, count)[:count]
    return places[np.argsort(values[places], kind="stable")].astype(np.int64)
