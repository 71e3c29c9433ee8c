"""The old labels as a Gaussian mixture with one shared covariance, in coordinates that whiten it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.fit.settings import SETTINGS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patcher.arrays import Doubles, Floats, Ints
    from patcher.fit.settings import Settings
    from patcher.head import Head
    from patcher.memory import Memory

__all__ = [
    "OldLabels",
    "Rows",
    "Whitening",
    "from_memory",
    "from_rows",
    "full_rows",
    "log_sum_exp",
    "whitening",
    "woken",
]


_LEAST_PIVOT = 0.5
"""A covariance plus a ridge has no pivot below the ridge; one below this share of it means it was no covariance."""
_COARSE = 2.0**-8
"""Floor of a feature's standard deviation, relative to its mean: four times the relative spacing of FP16 numbers."""
_WIDER = 4.0
"""Growth in variance from which on a feature counts as woken.

A few examples cannot widen a feature this much if many old inputs made use of it.
"""
_SMALL = 96
"""Up to this size, LAPACK's own routines are just as fast."""


@dataclass(frozen=True)
class Whitening:
    """A linear map to features in which the spread within labels is the same in every direction.

    ``(x - center) @ points`` whitens features and ``w @ rows`` the rows that act on them, so that the product of the
    two is ``w (x - center)``. ``center`` is float64 ``[width]``; ``points`` and ``rows`` are float32 ``[width, r]``.
    Single precision takes half the time and suffices: the ridge keeps the condition number of the factored matrix below
    a few thousand.
    """

    center: Doubles
    points: Floats
    rows: Floats

    def of(self, features: Floats | Doubles) -> Doubles:
        """Whitened features, float64 ``[n, r]``."""
        return ((features - self.center).astype(np.float32) @ self.points).astype(np.float64)

    def row(self, weight: Doubles, bias: float) -> tuple[Floats, np.float32]:
        """Convert a row on whitened features to one on the original features."""
        raw: Floats = self.points @ weight.astype(np.float32)
        return raw, np.float32(bias - raw @ self.center)

    def slopes(self, weight: Floats | Doubles) -> Doubles:
        """Convert rows ``[n, width]`` on the original features to rows on whitened ones, float64 ``[n, r]``."""
        return (weight.astype(np.float32) @ self.rows).astype(np.float64)


@dataclass(frozen=True)
class Rows:
    """Rows of some labels on all features, float32 ``[k, width]`` and ``[k]``."""

    weight: Floats
    bias: Floats

    def first(self, count: int) -> Rows:
        """The first ``count`` rows; with a negative count, all but the last ones, as in a slice."""
        return Rows(self.weight[:count], self.bias[:count])


@dataclass(frozen=True)
class OldLabels:
    """What is known about the old labels of a head.

    ``means`` float64 ``[M, width]`` belong to the labels at positions ``places`` INT64 ``[M]`` in the head; ``weight``
    and ``bias`` are all the head's rows on all features, float64 ``[C, width]`` and ``[C]``.
    """

    whitening: Whitening
    means: Doubles
    places: Ints
    weight: Doubles
    bias: Doubles

    @cached_property
    def points(self) -> Doubles:
        """The whitened means, float64 ``[M, r]``."""
        return self.whitening.of(self.means)


def log_sum_exp(logits: NDArray[np.floating[Any]]) -> Doubles:
    """``log(sum(exp(logits)))`` along the last axis, float64."""
    top = logits.max(axis=-1, keepdims=True)
    total: Doubles = np.log(np.exp(logits - top, dtype=np.float64).sum(axis=-1)) + top[..., 0]
    return total


def full_rows(head: Head) -> tuple[Floats, Floats]:
    """The head's rows on all features, float32 ``[C, width]`` and ``[C]``, in the order of its labels."""
    base = np.zeros((len(head.base_weight), head.width), np.float32)
    base[:, : head.split] = head.base_weight
    rows = np.concatenate([base, head.patch_weight])[head.order]
    biases = np.concatenate([head.base_bias, head.patch_bias])[head.order]
    return rows, biases


def from_memory(memory: Memory, head: Head, settings: Settings = SETTINGS, white: Whitening | None = None) -> OldLabels:
    """Old labels from a memory; labels of the head that the memory lacks take part only through their rows.

    Pass ``white`` to reuse a whitening, such as that of the same memory with a few inputs less.
    """
    place = {label: i for i, label in enumerate(memory.labels)}
    known = [(i, place[label]) for i, label in enumerate(head.labels) if label in place]
    theirs = [spot for _, spot in known]
    means = memory.sums[theirs] / memory.counts[theirs, None]
    places = np.array([mine for mine, _ in known], np.int64)
    weight, bias = full_rows(head)
    white = white or whitening(memory, settings)
    return OldLabels(white, means, places, weight.astype(np.float64), bias.astype(np.float64))


def whitening(memory: Memory, settings: Settings = SETTINGS) -> Whitening:
    """Whitening by the within-label covariance, widened as described in ``Settings``.

    The within-label and the total covariance are both the second moment minus products of means, so their weighted sum
    takes one pass over that matrix. Computing each by itself would take longer than all that follows.
    """
    total, freedom = memory.counts.sum(), memory.freedom
    center = memory.sums.sum(axis=0) / total
    means = memory.sums / np.sqrt(memory.counts * freedom)[:, None]
    roots = np.concatenate([means, np.sqrt(settings.total) * center[None]])
    wide = memory.second_moment * (1.0 / freedom + settings.total / total)
    wide -= roots.T @ roots
    variance = np.diag(memory.second_moment) / total - center**2
    return _widened(center, wide, variance, memory.split, settings)


def woken(before: Memory, after: Memory) -> bool:
    """Whether some feature's variance is more than ``_WIDER`` times as large in memory ``after`` as in ``before``.

    Then the old inputs hardly used that feature, and the new ones do.
    """
    then, now = (
        memory.second_moment.diagonal() / memory.counts.sum() - (memory.sums.sum(axis=0) / memory.counts.sum()) ** 2
        for memory in (before, after)
    )
    return bool((now > _WIDER * np.maximum(then, 1e-12 * now.max())).any())


def from_rows(head: Head, examples: Floats, settings: Settings = SETTINGS) -> OldLabels:
    """Old labels from the head's rows alone, if nothing else is known.

    A trained row points at its label's mean (neural collapse, Papyan et al. 2020; on CLINC150 the cosine is 0.9), so
    the mean is assumed to lie along the centred row, as far out as the examples lie on average. The within-label
    covariance is unknown and taken as zero: only what ``Settings`` widens it by is left. The rows say nothing about
    features that they do not use, so new rows are confined to the classifier features.
    """
    weight, bias = (array.astype(np.float64) for array in full_rows(head))
    split = head.split
    pointers = weight[:, :split] - weight[:, :split].mean(axis=0)
    reach = float(np.linalg.norm(examples[:, :split], axis=1).mean())
    means = np.zeros_like(weight)
    means[:, :split] = reach * pointers / np.maximum(np.linalg.norm(pointers, axis=1, keepdims=True), 1e-12)
    center = means.mean(axis=0)
    narrow = means[:, :split] - center[:split]
    scatter = narrow.T @ narrow / len(narrow)
    flat = _widened(center[:split], settings.total * scatter, np.diag(scatter), split, settings)
    nothing = np.zeros((head.width - split, split))
    white = Whitening(center, np.concatenate([flat.points, nothing]), np.concatenate([flat.rows, nothing]))
    return OldLabels(white, means, np.arange(len(weight), dtype=np.int64), weight, bias)


def _widened(center: Doubles, wide: Doubles, variance: Doubles, split: int, settings: Settings) -> Whitening:
    """Whitening by the covariance ``wide`` plus a ridge, both in units of ``variance``; overwrites ``wide``."""
    spread = np.sqrt(np.maximum(variance, 0.0))
    spread = np.maximum(spread, 1e-6 * max(float(spread.max()), 1e-6))
    # Without this floor, the FP16 rounding of a feature that hardly varies would separate examples from remembered
    # inputs best.
    spread = np.maximum(spread, _COARSE * np.abs(center))
    wide /= spread[:, None]
    wide /= spread
    ridge = np.full(len(center), settings.ridge_hidden)
    ridge[:split] = settings.ridge_classifier
    wide[np.diag_indices_from(wide)] += ridge
    try:
        lower, inverse = _factors(wide)
        sound = bool(np.diag(lower).min() ** 2 > _LEAST_PIVOT * ridge.min())
    except np.linalg.LinAlgError:
        sound = False
    if not sound:
        lower, inverse = _mended(wide, float(ridge.min()))
    scale = spread.astype(np.float32)[:, None]
    lower *= scale
    return Whitening(center, inverse.T / scale, lower)


def _mended(matrix: Doubles, least: float) -> tuple[Floats, Floats]:
    """A square root of the covariance nearest to ``matrix``, and its inverse; no eigenvalue is below ``least``.

    ``matrix`` need not be positive definite: if a label was subtracted again by its mean alone, or by its features as
    stored, the variance in some directions may be negative where there were few texts.
    """
    values, axes = np.linalg.eigh(matrix)
    roots = np.sqrt(np.maximum(values, least))
    return (axes * roots).astype(np.float32), (axes / roots).T.astype(np.float32)


def _factors(matrix: Doubles) -> tuple[Floats, Floats]:
    """The Cholesky factor of a covariance, and the factor's inverse, float32; LinAlgError if it is not one.

    Recursion by halves turns nearly all of the work into matrix products: no scipy, and half the time of LAPACK's two
    routines.
    """
    lower, inverse = matrix.astype(np.float32), np.zeros(matrix.shape, np.float32)
    _halve(lower, inverse)
    return lower, inverse


def _halve(lower: Floats, inverse: Floats) -> None:
    """Turn the covariance in ``lower`` into its factor, and the zeros in ``inverse`` into the factor's inverse."""
    half = len(lower) // 2
    if len(lower) <= _SMALL:
        lower[:] = np.linalg.cholesky(lower)
        inverse[:] = np.tril(np.linalg.inv(lower))
        return
    _halve(lower[:half, :half], inverse[:half, :half])
    below = lower[half:, :half] @ inverse[:half, :half].T
    lower[half:, half:] -= below @ below.T
    lower[half:, :half], lower[:half, half:] = below, 0.0
    _halve(lower[half:, half:], inverse[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (below @ inverse[:half, :half])
