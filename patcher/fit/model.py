"""The old labels as a Gaussian mixture, in coordinates in which the spread inside labels is the unit ball."""

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
"""A covariance plus a ridge has no pivot below the ridge; a pivot below this share of it means it was no covariance."""
_COARSE = 2.0**-8
"""Smallest spread that a feature is given, as a share of its mean: four times the spacing of FP16 numbers."""
_WIDER = 4.0
"""Growth in variance; a few examples cannot widen a feature by as much if many old inputs made use of it."""
_SMALL = 96
"""Up to this size, LAPACK's own routines are just as fast."""


@dataclass(frozen=True)
class Whitening:
    """Features in which the spread inside labels is the same in every direction.

    ``(x - center) @ points`` whitens features, ``w @ rows`` the rows that act on them, so that the product of the two
    is ``w (x - center)``. ``center`` float64 ``[width]``, ``points`` and ``rows`` float32 ``[width, r]``: single
    precision takes half the time, and the ridge keeps the condition of what is factored below some thousands.
    """

    center: Doubles
    points: Floats
    rows: Floats

    def of(self, features: Floats | Doubles) -> Doubles:
        """Whitened features, float64 ``[n, r]``."""
        return ((features - self.center).astype(np.float32) @ self.points).astype(np.float64)

    def row(self, weight: Doubles, bias: float) -> tuple[Floats, np.float32]:
        """A row on whitened features as one on the features themselves."""
        raw: Floats = self.points @ weight.astype(np.float32)
        return raw, np.float32(bias - raw @ self.center)

    def slopes(self, weight: Floats | Doubles) -> Doubles:
        """Rows ``[n, width]`` on the features as rows on whitened ones, float64 ``[n, r]``."""
        return (weight.astype(np.float32) @ self.rows).astype(np.float64)


@dataclass(frozen=True)
class Rows:
    """Rows of some labels on all features, float32 ``[k, width]`` and ``[k]``."""

    weight: Floats
    bias: Floats

    def first(self, count: int) -> Rows:
        """The first rows; with a negative count all but the last ones."""
        return Rows(self.weight[:count], self.bias[:count])


@dataclass(frozen=True)
class OldLabels:
    """The old labels of a head, as far as they are known.

    ``means`` float64 ``[M, width]`` are those of the labels at ``places`` INT64 ``[M]`` in the head; ``weight`` and
    ``bias`` are all the head's rows on all features, float64 ``[C, width]`` and ``[C]``.
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
    """Old labels from a memory; labels of the head that the memory lacks are met only through their rows.

    ``white`` spares the whitening where one is known of a memory that had a few inputs less.
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
    """Whitening by the covariance inside labels, widened as ``Settings`` tells.

    Both covariances are the second moment less products of means: one pass over it, where each by itself would cost
    more time than what is done with them.
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
    """Whether a feature spreads far wider in a memory than in the one before it, where it hardly ever varied."""
    then, now = (
        memory.second_moment.diagonal() / memory.counts.sum() - (memory.sums.sum(axis=0) / memory.counts.sum()) ** 2
        for memory in (before, after)
    )
    return bool((now > _WIDER * np.maximum(then, 1e-12 * now.max())).any())


def from_rows(head: Head, examples: Floats, settings: Settings = SETTINGS) -> OldLabels:
    """Old labels from the head's rows alone, where nothing else is known.

    A trained row points at its label's mean (neural collapse, Papyan et al. 2020; on CLINC150 the cosine is 0.9), so
    the mean is taken to lie along the centred row, as far from the centre as the examples lie. Inside labels nothing
    is left but the ridge. The rows say nothing about features they do not look at, so new rows stay on the classifier
    features.
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
    """Whitening by a covariance of features of some ``variance``, with a ridge on them; ``wide`` is used up."""
    spread = np.sqrt(np.maximum(variance, 0.0))
    spread = np.maximum(spread, 1e-6 * max(float(spread.max()), 1e-6))
    # Else what tells examples from remembered inputs best would be how FP16 rounds a feature that hardly varies.
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
    """A root of the nearest covariance to what is none any more, and its inverse; no value of it is below ``least``.

    A label that was taken out again by its mean alone, or by features as they are stored, leaves less than no spread in
    some directions, where there were few sentences.
    """
    values, axes = np.linalg.eigh(matrix)
    roots = np.sqrt(np.maximum(values, least))
    return (axes * roots).astype(np.float32), (axes / roots).T.astype(np.float32)


def _factors(matrix: Doubles) -> tuple[Floats, Floats]:
    """The Cholesky factor of a covariance, and the factor's inverse, float32; LinAlgError where it is none.

    By halves, so that nearly all of it is products of matrices: no scipy, and half the time of LAPACK's two routines.
    """
    lower, inverse = matrix.astype(np.float32), np.zeros(matrix.shape, np.float32)
    _halve(lower, inverse)
    return lower, inverse


def _halve(lower: Floats, inverse: Floats) -> None:
    """Turn a covariance into its factor, and zeros into that one's inverse, in place."""
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
