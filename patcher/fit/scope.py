"""The out-of-scope score of a head, fitted to what the memory keeps of its labels (``patcher.scope`` computes it)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

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
"""Directions kept; for 135 labels and 768 features, they and the clusters take half a megabyte of the head's file."""

_FEWEST_FRESH = 20
"""With fewer, the share of them that should lie beyond the limit would be less than one input."""
_MOST = 2_000
"""Most remembered inputs that the limit is computed from; a quantile does not need more."""

_FRESHER = 2.0
"""How many times as far (squared) fresh texts lie as those that took part in the fine-tuning."""

FINE_TUNED = 2.0
"""The stretch for remembered inputs that took part in the fine-tuning, if there are no fresh ones to measure it on.

Measured on two backbones, with old labels treated as new: 1.8 and 1.9 (``tests/benchmarks/results/tuning.md``).
"""

_LONGEST = 30_000.0
"""The largest number in a projection: half of what FP16 holds."""

_MOST_CLUSTERS = 10_000
"""With more, the labels' own means are used: they are close enough together, and the file stays a tenth of the size."""


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
    """The scorer of a head, from the memory of its labels; ``false_alarms`` of the known inputs should score below 0.5.

    The limit is that of ``fresh``, features float32 ``[n, width]`` of inputs that took no part in the fine-tuning, if
    there are twenty at least, or else ``stretch`` times that of the memory's real features. Without those (a memory of
    statistics, or none) the largest probability has to do. ``white``, that of the fit of which this is the end, is most
    of the work.
    """
    if memory is None or not len(memory.sample):
        return Scope(head.problem, stretch=stretch)
    white = white or whitening(memory, settings)
    place = {label: i for i, label in enumerate(memory.labels)}
    points = white.of(memory.means()[[place[label] for label in head.labels if label in place]])
    directions = white.points @ _principal_axes((points - points.mean(axis=0)).astype(np.float32))
    # Features of tiny numbers are stretched beyond what FP16 holds; distances in another unit do as well.
    unit = max(1.0, float(np.abs(directions).max()) / _LONGEST)
    directions /= unit
    projection = directions.astype(np.float16)
    center = (white.center @ projection.astype(np.float64)).astype(np.float32)
    means, counts, owners = _clusters(memory, head)
    places = (means - white.center).astype(np.float32) @ projection.astype(np.float32)
    ones = np.ones(len(places), np.float32)
    distance = Distance(projection, center, places.astype(np.float16), ones[:1], ones)
    some = slice(None, None, 1 + len(memory.sample) // _MOST)
    inputs, theirs = memory.sample[some].astype(np.float32), memory.sample_labels[some]
    gaps = distance.squared(inputs)
    distance = dataclasses.replace(distance, scale=_scale(gaps, theirs, counts, owners))
    gaps *= distance.scale
    apart = _without_themselves(gaps, counts)
    remembered = max(float(np.quantile(apart, 1.0 - false_alarms)), 1e-6 / unit**2)
    if fresh is not None and len(fresh) >= _FEWEST_FRESH:
        farther = float(np.quantile(distance.nearest(fresh), 1.0 - false_alarms)) / remembered
        # Fresh inputs lie no nearer than remembered ones without themselves; where they do, they are not fresh.
        stretch = farther if farther >= 1.0 else stretch
    distance = dataclasses.replace(distance, limit=np.array([stretch * remembered], np.float32))
    return Scope(head.problem, distance, false_alarms, stretch)


def _clusters(memory: Memory, head: Head) -> tuple[NDArray[np.floating[Any]], Ints, Ints]:
    """The clusters of the head's labels: means ``[M, width]``, how many inputs each has, and its label."""
    there = set(head.labels)
    known = np.array([label in there for label in memory.labels])
    inside = known[memory.clusters.labels]
    if inside.sum() <= _MOST_CLUSTERS:
        return memory.clusters.means[inside], memory.clusters.counts[inside], memory.clusters.labels[inside]
    return memory.means()[known], memory.counts[known], np.flatnonzero(known)


def _scale(gaps: Floats, labels: Ints, counts: Ints, owners: Ints) -> Floats:
    """What the distance to each mean counts for, FP32 ``[M]``: less where a label's inputs lie far from each other.

    Fine-tuning drew the texts of the labels that it saw together; those of a label that was added later lie three to
    four times as far apart, and most would be called out of scope. ``gaps`` ``[n, M]`` are those of remembered inputs
    of ``labels`` ``[n]``, ``owners`` ``[M]`` whose each mean is.
    """
    own = np.where(labels[:, None] == owners, gaps, np.inf)
    apart = _without_themselves(own, counts)
    found = np.isfinite(apart)
    each = np.full(int(owners.max()) + 1, np.nan)
    for label in np.unique(labels[found]).tolist():
        each[label] = apart[found & (labels == label)].mean()
    typical = float(np.nanmedian(each)) if found.any() else 1.0
    scale = np.clip(_FRESHER * typical / np.maximum(each, 1e-12), 1.0 / _FRESHER, 1.0)
    # Of a label with one text nothing is known but that it was added.
    return np.where(np.isnan(scale), 1.0 / _FRESHER, scale)[owners].astype(np.float32)


def _without_themselves(gaps: Floats, counts: Ints) -> Floats:
    """How far remembered inputs would lie from the nearest mean if none had drawn its own towards itself.

    ``gaps`` ``[n, M]`` are squared and used up; ``counts`` inputs stand behind the means. Without one of ``n`` a mean
    lies ``n / (n - 1)`` times as far from it; the only one of a cluster has the next cluster.
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
    """The directions in which points float32 ``[n, width]`` differ most, ``[width, r]``, by the smaller square."""
    few = len(gaps) < gaps.shape[1]
    axes = np.linalg.eigh(gaps @ gaps.T if few else gaps.T @ gaps)[1]
    axes = axes[:, -min(_RANK, *gaps.shape) :]
    if few:
        axes = gaps.T @ axes
        axes /= np.maximum(np.linalg.norm(axes, axis=0), 1e-12)
    return axes
