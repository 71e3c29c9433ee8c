"""Where the sentences of a label lie, if one mean is not enough: k-means, and what is kept of its result."""

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
"""Smallest spread of a feature, as a share of the widest one's: anything less is rounding."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """The clusters of all labels.

    ``means`` float16 ``[k, width]``, ``counts`` INT64 ``[k]`` the sentences in each, ``labels`` INT64 ``[k]`` the label
    that each belongs to.
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
        """What does not fit together; None where nothing is wrong."""
        if self.means.ndim != 2 or not self.means.shape[:1] == self.counts.shape == self.labels.shape:  # noqa: PLR2004
            return f"clusters {self.means.shape} with counts {self.counts.shape} and labels {self.labels.shape}"
        return "a cluster without a sentence" if self.counts.min(initial=1) < 1 else None

    def add(self, rows: Floats, ids: Ints, spread: Doubles, most: int, rng: np.random.Generator) -> Clusters:
        """With new clusters for the labels that rows came to: of the rows, and of the clusters that were there.

        ``rows`` float32 ``[n, width]`` of the labels ``ids`` ``[n]``; features count in units of their
        ``spread`` ``[width]``; a label gets at most ``most``.
        """
        scale = (1.0 / np.maximum(spread, max(_LEAST_SPREAD * float(spread.max()), 1e-12))).astype(np.float32)
        touched = np.unique(ids)
        rest = ~np.isin(self.labels, touched)
        parts = [self if rest.all() else self._part(rest)]
        for label in touched.tolist():
            there, arrived = self._part(self.labels == label), rows[ids == label]
            points = np.concatenate([there.means.astype(np.float32), arrived])
            counts = np.concatenate([there.counts, np.ones(len(arrived), np.int64)])
            # Centred, for a feature that hardly varies would else swallow all others in the squares.
            near = (points - np.average(points, axis=0, weights=counts).astype(np.float32)) * scale
            owner = k_means(near, counts.astype(np.float64), min(most, len(points)), rng)
            shares = (owner == np.arange(owner.max() + 1)[:, None]) * counts
            totals = shares.sum(axis=1)
            means = half((shares / totals[:, None]) @ points)
            parts.append(Clusters(means, totals, np.full(len(totals), label, np.int64)))
        return Clusters.joined(parts)

    @classmethod
    def joined(cls, parts: Sequence[Clusters]) -> Clusters:
        """The clusters of all parts, in their order."""
        return cls(
            np.concatenate([part.means for part in parts]),
            np.concatenate([part.counts for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )

    def relabelled(self, goes_to: Mapping[int, int]) -> Clusters:
        """Under other labels; those of labels that go nowhere are left out."""
        kept = self._part(np.isin(self.labels, list(goes_to)))
        return Clusters(kept.means, kept.counts, np.array([goes_to[i] for i in kept.labels.tolist()], np.int64))

    def _part(self, keep: NDArray[np.bool_]) -> Clusters:
        return Clusters(self.means[keep], self.counts[keep], self.labels[keep])


def k_means(points: Floats, weights: Doubles, count: int, rng: np.random.Generator) -> Ints:
    """Which of at most ``count`` clusters each point belongs to, INT64 ``[n]``, numbered from 0 without a gap.

    ``points`` float32 ``[n, d]``, ``weights`` float64 ``[n]``, above 0. Lloyd's iteration from a k-means++ start
    (Arthur and Vassilvitskii 2007).
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
    """Positions of points far from each other: each with a chance by its squared distance to those before it."""
    chosen = [int(rng.choice(len(points), p=weights / weights.sum()))]
    gaps = _squared(points, points[chosen])[:, 0]
    while len(chosen) < count and (chances := weights * gaps).sum() > 0:
        chosen.append(int(rng.choice(len(points), p=chances / chances.sum())))
        gaps = np.minimum(gaps, _squared(points, points[chosen[-1:]])[:, 0])
    return chosen


def half(rows: Floats | Doubles) -> Halves:
    """Features as they are stored, float16; InputError for larger ones than that can hold.

    Sound features are far smaller: a mean of hidden states of root mean square 1 is at most the root of the width, and
    the input of a classifier is the output of a normalisation or a tanh. Clipped, larger features would be those of
    another text, and counts made on them would say nothing about the labels.
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
    """Squared distances, float64 ``[n, k]``."""
    lengths = (points * points).sum(axis=1)[:, None] + (centres * centres).sum(axis=1)
    gaps: Doubles = np.maximum(lengths - 2.0 * points @ centres.T, 0.0).astype(np.float64)
    return gaps
