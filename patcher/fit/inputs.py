"""Real inputs of old labels: what a new row is calibrated on, and what its harm is counted on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patcher.fit.model import full_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patcher.head import Head
    from patcher.memory import Memory

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

__all__ = ["Nearest", "OldInputs", "old_inputs", "own_logits"]

_MOST = 20_000
"""Inputs looked at: with none of so many taken, at most 0.015 % are, and thousands of labels stay quick."""


@dataclass(frozen=True)
class Nearest:
    """The inputs that a new row comes nearest to.

    ``places`` INT64 ``[m]`` in the inputs; ``margins`` float64 ``[m]``, what the new logit lacks to win; ``right``,
    whether the input is answered rightly as things are.
    """

    places: Ints
    margins: Doubles
    right: Bools


@dataclass(frozen=True)
class OldInputs:
    """Features float32 ``[n, width]``, their label's position in the head ``[n]``, and its logit ``[n]``.

    ``source`` is ``eval``, ``replay`` or ``features`` (of the memory); the last ``others`` of them were put beside
    those, and a budget of flips holds on either part.
    """

    features: Floats
    ids: Ints
    own: Floats
    source: str
    others: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def beside(self, other: OldInputs | None) -> OldInputs:
        """These and others, under the name of these."""
        if other is None:
            return self
        features = np.concatenate([self.features, other.features])
        ids, own = np.concatenate([self.ids, other.ids]), np.concatenate([self.own, other.own])
        return OldInputs(features, ids, own, self.source, len(other))

    def part(self, places: Ints) -> OldInputs:
        """Some of them."""
        others = int((places >= len(self) - self.others).sum())
        return OldInputs(self.features[places], self.ids[places], self.own[places], self.source, others)

    def groups(self, places: Ints) -> list[tuple[int, Bools]]:
        """Each part that a budget holds on: how many there are, and which of ``places`` are of it."""
        own = len(self) - self.others
        return [(size, mine) for size, mine in ((own, places < own), (self.others, places >= own)) if size]

    def nearest(self, weight: Floats, bias: np.float32, head: Head, count: int) -> Nearest:
        """The ``count`` inputs with the least margin to a new row, float32 ``[width]``.

        An input's own logit is at most its best, so few of them need all logits: with thousands of labels the
        difference between a second and a minute.
        """
        new = self.features @ weight + bias
        if head.problem != "single_label":
            places = _least(-new, count)
            return Nearest(places, -new[places].astype(np.float64), np.ones(len(places), np.bool_))
        places = _least(self.own - new, count)
        logits = head.logits(self.features[places])
        right = logits.argmax(axis=1) == self.ids[places]
        return Nearest(places, (logits.max(axis=1) - new[places]).astype(np.float64), right)


def old_inputs(
    memory: Memory | None,
    replay: tuple[Floats, Ints] | None,
    head: Head,
    source: str = "replay",
) -> OldInputs | None:
    """The real inputs there are: ``replay`` (features, positions in the head), else the memory's sample, else None."""
    if replay is not None:
        features, ids = np.asarray(replay[0], np.float32), np.asarray(replay[1], np.int64)
    elif memory is not None and len(memory.sample):
        place = {label: index for index, label in enumerate(head.labels)}
        ids = np.array([place.get(label, -1) for label in memory.labels], np.int64)[memory.sample_labels]
        kept = np.flatnonzero(ids >= 0)
        kept = kept[:: 1 + len(kept) // _MOST]
        features, ids, source = memory.sample[kept].astype(np.float32), ids[kept], "features"
    else:
        return None
    return OldInputs(features, ids, own_logits(features, ids, head), source) if len(ids) else None


def own_logits(features: Floats, ids: Ints, head: Head) -> Floats:
    """Each input's logit of its own label; by blocks, for the rows of all inputs together may be large."""
    weight, bias = full_rows(head)
    own = np.empty(len(ids), np.float32)
    for start in range(0, len(ids), 2048):
        block = slice(start, start + 2048)
        own[block] = np.einsum("ij,ij->i", features[block], weight[ids[block]]) + bias[ids[block]]
    return own


def _least(values: Floats, count: int) -> Ints:
    """Places of the smallest values, in order."""
    places = np.arange(len(values)) if count >= len(values) else np.argpartition(values, count)[:count]
    return places[np.argsort(values[places], kind="stable")].astype(np.int64)
