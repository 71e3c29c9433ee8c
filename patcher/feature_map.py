"""A 2D map of remembered inputs that separates their labels best. Pure: arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patcher.fit.model import whitening

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from patcher.arrays import Floats
    from patcher.memory import Memory

__all__ = ["FeatureMap", "feature_map"]


@dataclass(frozen=True)
class FeatureMap:
    """Inputs in a plane.

    ``labels`` are the labels shown: first the ``asked`` requested ones, then their neighbours, nearest first.
    ``points``, float32 ``[n, 2]``, are in units of the spread of inputs inside a label; ``ids``, INT64 ``[n]``, index
    ``labels``.
    """

    labels: tuple[str, ...]
    asked: int
    points: Floats
    ids: NDArray[np.int64]


def feature_map(memory: Memory, labels: Sequence[str], neighbours: int = 5) -> FeatureMap | None:
    """Map the remembered inputs of ``labels`` and of their nearest neighbours; None if the memory has no such inputs.

    The axes are the two directions in which the label means differ most, in whitened features: those in which the
    spread inside labels is the same in every direction (linear discriminants, Rao 1948).
    """
    mine = [memory.labels.index(label) for label in labels if label in memory.labels]
    if not mine or not np.isin(memory.sample_labels, mine).any():
        return None
    white = whitening(memory)
    means = white.of(memory.means())
    distances = np.stack([((means - means[place]) ** 2).sum(axis=1) for place in mine]).min(axis=0)
    near = [place for place in np.argsort(distances, kind="stable").tolist() if place not in mine]
    shown = [*mine, *near[:neighbours]]
    held = np.flatnonzero(np.isin(memory.sample_labels, shown))
    center = means[shown].mean(axis=0)
    axes = np.linalg.svd(means[shown] - center, full_matrices=False)[2][:2]
    points = np.zeros((len(held), 2), np.float32)  # a single label has no axis, two labels have one
    points[:, : len(axes)] = (white.of(memory.sample[held].astype(np.float32)) - center) @ axes.T
    place = {old: new for new, old in enumerate(shown)}
    ids = np.array([place[old] for old in memory.sample_labels[held].tolist()], np.int64)
    return FeatureMap(tuple(memory.labels[place] for place in shown), len(mine), points, ids)
