"""Clusters of each label's texts, for labels that a single mean does not describe: k-means and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patcher.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from patcher.arrays import Doubles, Floats, Halves, Ints

__all__ = ["Clusters", "half", "k_means"]

_STEPS = 20
_LEAST_SPREAD = 1e-3
"""Smallest spread of a feature, relative to the largest spread: anything below it is rounding error."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """The clusters of all labels.

    ``means`` is float16 ``[k, width]``; ``counts`` INT64 ``[k]`` is the number of texts in each cluster; ``labels``
    INT64 ``[k]`` is the index of the label that it belongs to.
    """

    means: Halves
    counts: Ints
    labels: Ints

    @classmethod
    def of_means(cls, means: Floats | Doubles, counts: Ints) -> Clusters:
        """One cluster for each label; ``means`` ``[C, width]``, ``counts`` ``[C]``."""
        return cls(half(means), counts, np.arange(len(counts), dtype=np.int64))

    @property
    def flaw(self) -> str | None:
        """What is inconsistent, in words; None if nothing is."""
        if self.means.ndim != 2 or not self.means.shape[:1] == self.counts.shape == self.labels.shape:  # noqa: PLR2004
            return f"clusters {self.means.shape} with counts {self.counts.shape} and labels {self.labels.shape}"
        return "a cluster without a text" if self.counts.min(initial=1) < 1 else None

    def add(self, rows: Floats, ids: Ints, spread: Doubles, most: int, rng: np.random.Generator) -> Clusters:
        """The clusters after adding ``rows``, float32 ``[n, width]``, of the labels ``ids``, INT64 ``[n]``.

        Labels that gain rows are clustered again, from the new rows and the means of their existing clusters, into at
        most ``most`` clusters each. Distances are measured in units of each feature's ``spread``, float64 ``[width]``.
        """
        scale = (1.0 / np.maximum(spread, max(_LEAST_SPREAD * float(spread.max()), 1e-12))).astype(np.float32)
        touched = np.unique(ids)
        rest = ~np.isin(self.labels, touched)
        parts = [self if rest.all() else self._part(rest)]
        for label in touched.tolist():
            there, arrived = self._part(self.labels == label), rows[ids == label]
            points = np.concatenate([there.means.astype(np.float32), arrived])
            counts = np.concatenate([there.counts, np.ones(len(arrived), np.int64)])
            # Centred, because a feature with a large mean and little spread would drown all others in the squares.
            near = (points - np.average(points, axis=0, weights=counts).astype(np.float32)) * scale
            owner = k_means(near, counts.astype(np.float64), min(most, len(points)), rng)
            shares = (owner == np.arange(owner.max() + 1)[:, None]) * counts
            totals = shares.sum(axis=1)
            means = half((shares / totals[:, None]) @ points)
            parts.append(Clusters(means, totals, np.full(len(totals), label, np.int64)))
        return Clusters.joined(parts)

    @classmethod
    def joined(cls, parts: Sequence[Clusters]) -> Clusters:
        """The clusters of all parts, concatenated in order."""
        return cls(
            np.concatenate([part.means for part in parts]),
            np.concatenate([part.counts for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )

    def relabelled(self, goes_to: Mapping[int, int]) -> Clusters:
        """The clusters with label indices mapped by ``goes_to``; those of labels that are not in it are dropped."""
        kept = self._part(np.isin(self.labels, list(goes_to)))
        return Clusters(kept.means, kept.counts, np.array([goes_to[i] for i in kept.labels.tolist()], np.int64))

    def _part(self, keep: NDArray[np.bool_]) -> Clusters:
        return Clusters(self.means[keep], self.counts[keep], self.labels[keep])


def k_means(points: Floats, weights: Doubles, count: int, rng: np.random.Generator) -> Ints:
    """Assign each point to one of at most ``count`` clusters: INT64 ``[n]``, numbered from 0 without gaps.

    ``points`` is float32 ``[n, d]``; ``weights``, float64 ``[n]``, are positive. Uses Lloyd's iteration with k-means++
    seeding (Arthur and Vassilvitskii 2007).
    """
    if count <= 1 or len(points) <= 1:
        return np.zeros(len(points), np.int64)
    centres = points[_start(points, weights, count, rng)]
    owner = np.full(len(points), -1, np.int64)
    for _ in range(_STEPS):
        nearest = _squared(points, centres).argmin(axis=1)
        if np.array_equal(nearest, owner):
            break
        found, owner = np.unique(nearest, return_inverse=True)
        share = (owner == np.arange(len(found))[:, None]) * weights
        centres = (share / share.sum(axis=1, keepdims=True)).astype(np.float32) @ points
    return owner


def _start(points: Floats, weights: Doubles, count: int, rng: np.random.Generator) -> list[int]:
    """Indices of the initial centres (k-means++).

    Each is drawn with a probability proportional to a point's weight times its squared distance to the nearest centre
    drawn before.
    """
    chosen = [int(rng.choice(len(points), p=weights / weights.sum()))]
    gaps = _squared(points, points[chosen])[:, 0]
    while len(chosen) < count and (chances := weights * gaps).sum() > 0:
        chosen.append(int(rng.choice(len(points), p=chances / chances.sum())))
        gaps = np.minimum(gaps, _squared(points, points[chosen[-1:]])[:, 0])
    return chosen


def half(rows: Floats | Doubles) -> Halves:
    """Convert features to float16, as they are stored; InputError if they overflow.

    Sound features are far smaller: a mean of hidden states with root mean square 1 is at most the square root of the
    width, and the input of a classifier comes from a normalisation or a tanh. Larger features are not clipped, because
    clipped ones would be those of another text, and flips counted on them would be meaningless.
    """
    with np.errstate(over="ignore"):
        stored = np.asarray(rows).astype(np.float16)
    if not np.isfinite(stored).all():
        raise InputError(
            f"features as large as {np.abs(rows).max():.3g}, and a memory keeps those of single texts as FP16, up to "
            f"{np.finfo(np.float16).max:,.0f}; `patcher remember --memory statistics` keeps none"
        )
    return stored


def _squared(points: Floats, centres: Floats) -> Doubles:
    """Squared distances of all points to all centres, float64 ``[n, k]``."""
    lengths = (points * points).sum(axis=1)[:, None] + (centres * centres).sum(axis=1)
    gaps: Doubles = np.maximum(lengths - 2.0 * points @ centres.T, 0.0).astype(np.float64)
    return gaps
