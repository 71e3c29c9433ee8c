"""Fit the out-of-scope score of a head to the memory of its labels (``patcher.scope`` computes the score)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.blocks import thinned
from patcher.fit.model import whitening
from patcher.fit.settings import SETTINGS, Settings
from patcher.scope import Distance, Scope

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patcher.arrays import Floats, Ints
    from patcher.fit.model import Whitening
    from patcher.head import Head
    from patcher.memory import Memory

__all__ = ["FINE_TUNED", "fit_scope"]

_RANK = 128
"""Number of directions kept; for 135 labels and 768 features, they and the clusters add half a megabyte to the head."""

_FEWEST_FRESH = 20
"""With fewer fresh inputs, the share of them that should lie beyond the limit would be less than one input."""
_MOST = 2_000
"""Largest number of remembered inputs that the limit is computed from; a quantile does not need more."""

_FRESHER = 2.0
"""Ratio of the squared distance of fresh texts to that of texts that were used in fine-tuning."""

FINE_TUNED = 2.0
"""The stretch for remembered inputs that were used in fine-tuning, if there are no fresh ones to measure it on.

Measured on two backbones, with old labels treated as new: 1.8 and 1.9 (``tests/benchmarks/results/tuning.md``).
"""

_LONGEST = 30_000.0
"""The largest number in a projection: half of what FP16 holds."""

_MOST_CLUSTERS = 10_000
"""With more clusters, the labels' means are used: so many are dense enough, and the file is a tenth as large."""


def fit_scope(
    memory: Memory | None,
    head: Head,
    *,
    fresh: Floats | None = None,
    stretch: float = 1.0,
    false_alarms: float = 0.05,
    white: Whitening | None = None,
    settings: Settings = SETTINGS,
) -> Scope:
    """Fit the scorer of a head to the memory of its labels; a share ``false_alarms`` of known inputs scores below 0.5.

    The limit comes from ``fresh``, features float32 ``[n, width]`` of inputs that were not used in fine-tuning, if
    there are at least twenty; else it is ``stretch`` times that of the memory's real features. Without real features
    (no memory, or one with statistics only), the score is the largest probability. Whitening is most of the work; pass
    ``white`` to reuse that of the preceding fit.
    """
    if memory is None or not len(memory.sample):
        return Scope(head.problem, stretch=stretch)
    white = white or whitening(memory, settings)
    place = {label: i for i, label in enumerate(memory.labels)}
    points = white.of(memory.means()[[place[label] for label in head.labels if label in place]])
    directions = white.points @ _principal_axes((points - points.mean(axis=0)).astype(np.float32))
    # Whitening tiny features may exceed the range of FP16; distances can be measured in any unit.
    unit = max(1.0, float(np.abs(directions).max()) / _LONGEST)
    directions /= unit
    projection = directions.astype(np.float16)
    center = (white.center @ projection.astype(np.float64)).astype(np.float32)
    means, counts, owners = _clusters(memory, head)
    places = (means - white.center).astype(np.float32) @ projection.astype(np.float32)
    ones = np.ones(len(places), np.float32)
    distance = Distance(projection, center, places.astype(np.float16), ones[:1], ones)
    some = thinned(len(memory.sample), _MOST)
    inputs, theirs = memory.sample[some].astype(np.float32), memory.sample_labels[some]
    gaps = distance.squared(inputs)
    distance = dataclasses.replace(distance, scale=_scale(gaps, theirs, counts, owners))
    gaps *= distance.scale
    apart = _without_themselves(gaps, counts)
    remembered = max(float(np.quantile(apart, 1.0 - false_alarms)), 1e-6 / unit**2)
    if fresh is not None and len(fresh) >= _FEWEST_FRESH:
        farther = float(np.quantile(distance.nearest(fresh), 1.0 - false_alarms)) / remembered
        # Fresh inputs lie at least as far out as remembered ones do leave-one-out; if not, they are not fresh.
        stretch = farther if farther >= 1.0 else stretch
    distance = dataclasses.replace(distance, limit=np.array([stretch * remembered], np.float32))
    return Scope(head.problem, distance, false_alarms, stretch)


def _clusters(memory: Memory, head: Head) -> tuple[NDArray[np.floating[Any]], Ints, Ints]:
    """The clusters of the head's labels: means ``[M, width]``, numbers of inputs, and labels as memory positions."""
    there = set(head.labels)
    known = np.array([label in there for label in memory.labels])
    inside = known[memory.clusters.labels]
    if inside.sum() <= _MOST_CLUSTERS:
        return memory.clusters.means[inside], memory.clusters.counts[inside], memory.clusters.labels[inside]
    return memory.means()[known], memory.counts[known], np.flatnonzero(known)


def _scale(gaps: Floats, labels: Ints, counts: Ints, owners: Ints) -> Floats:
    """The factor on the squared distance to each mean, FP32 ``[M]``: smaller for labels whose inputs lie far apart.

    Fine-tuning has pulled together the texts of the labels it saw. Those of a label that was added later lie three to
    four times as far apart, and most would be called out of scope. ``gaps`` ``[n, M]`` are the squared distances of
    remembered inputs with ``labels`` ``[n]``; ``owners`` ``[M]`` is the label of each mean.
    """
    own = np.where(labels[:, None] == owners, gaps, np.inf)
    apart = _without_themselves(own, counts)
    found = np.isfinite(apart)
    each = np.full(int(owners.max()) + 1, np.nan)
    for label in np.unique(labels[found]).tolist():
        each[label] = apart[found & (labels == label)].mean()
    typical = float(np.nanmedian(each)) if found.any() else 1.0
    scale = np.clip(_FRESHER * typical / np.maximum(each, 1e-12), 1.0 / _FRESHER, 1.0)
    # All that is known about a label with a single text is that it was added later.
    return np.where(np.isnan(scale), 1.0 / _FRESHER, scale)[owners].astype(np.float32)


def _without_themselves(gaps: Floats, counts: Ints) -> Floats:
    """Leave-one-out squared distance of remembered inputs to the nearest mean.

    ``gaps`` ``[n, M]`` are squared distances and are overwritten; ``counts`` are the numbers of inputs behind the
    means. The mean of ``n`` inputs lies ``n / (n - 1)`` times as far from one of them once that one is left out. For
    the only input of a cluster, the next cluster counts.
    """
    rows, own = np.arange(len(gaps)), gaps.argmin(axis=1)
    near = gaps[rows, own] * (counts[own] / np.maximum(counts[own] - 1, 1)) ** 2
    if gaps.shape[1] > 1:
        near[counts[own] == 1] = np.inf
        gaps[rows, own] = np.inf
        near = np.minimum(near, gaps.min(axis=1))
    without: Floats = near
    return without


def _principal_axes(gaps: Floats) -> Floats:
    """The directions in which points float32 ``[n, width]`` differ most, ``[width, r]``.

    They are the leading eigenvectors, from whichever of the two Gram matrices is smaller.
    """
    few = len(gaps) < gaps.shape[1]
    axes = np.linalg.eigh(gaps @ gaps.T if few else gaps.T @ gaps)[1]
    axes = axes[:, -min(_RANK, *gaps.shape) :]
    if few:
        axes = gaps.T @ axes
        axes /= np.maximum(np.linalg.norm(axes, axis=0), 1e-12)
    return axes
