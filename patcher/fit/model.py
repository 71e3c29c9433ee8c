"""The old labels as a Gaussian mixture, in coordinates in which the spread inside labels is the unit ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from patcher.fit.settings import SETTINGS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patcher.fit.settings import Settings
    from patcher.memory import Memory

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = [
    "HeadLike",
    "OldLabels",
    "Rows",
    "Whitening",
    "from_memory",
    "from_rows",
    "full_rows",
    "log_sum_exp",
    "whitening",
]


class HeadLike(Protocol):
    """What a fit needs to know of a head (``patcher.head.Head`` is one)."""

    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def base_weight(self) -> Floats: ...
    @property
    def base_bias(self) -> Floats: ...
    @property
    def patch_weight(self) -> Floats: ...
    @property
    def patch_bias(self) -> Floats: ...
    @property
    def order(self) -> Ints: ...
    @property
    def split(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def problem(self) -> str: ...
    def logits(self, features: Floats, /) -> Floats: ...


@dataclass(frozen=True)
class Whitening:
    """Features in which the spread inside labels is the same in every direction.

    ``(x - center) @ points`` whitens features, ``w @ rows`` the rows that act on them, so that the product of the two
    is ``w (x - center)``. ``center`` float64 ``[width]``, ``points`` and ``rows`` float64 ``[width, r]``.
    """

    center: Doubles
    points: Doubles
    rows: Doubles

    def of(self, features: Floats | Doubles) -> Doubles:
        """Whitened features, float64 ``[n, r]``."""
        white: Doubles = (features - self.center) @ self.points
        return white

    def row(self, weight: Doubles, bias: float) -> tuple[Floats, np.float32]:
        """A row on whitened features as one on the features themselves."""
        raw = self.points @ weight
        return raw.astype(np.float32), np.float32(bias - raw @ self.center)


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


def log_sum_exp(logits: NDArray[np.floating[Any]]) -> Doubles:
    """``log(sum(exp(logits)))`` along the last axis, float64."""
    top = logits.max(axis=-1, keepdims=True)
    total: Doubles = np.log(np.exp(logits - top, dtype=np.float64).sum(axis=-1)) + top[..., 0]
    return total


def full_rows(head: HeadLike) -> tuple[Floats, Floats]:
    """The head's rows on all features, float32 ``[C, width]`` and ``[C]``, in the order of its labels."""
    base = np.zeros((len(head.base_weight), head.width), np.float32)
    base[:, : head.split] = head.base_weight
    rows = np.concatenate([base, head.patch_weight])[head.order]
    biases = np.concatenate([head.base_bias, head.patch_bias])[head.order]
    return rows, biases


def from_memory(memory: Memory, head: HeadLike, settings: Settings = SETTINGS) -> OldLabels:
    """Old labels from a memory; labels of the head that the memory lacks are met only through their rows."""
    place = {label: i for i, label in enumerate(memory.labels)}
    known = [(i, place[label]) for i, label in enumerate(head.labels) if label in place]
    theirs = [spot for _, spot in known]
    means = memory.sums[theirs] / memory.counts[theirs, None]
    places = np.array([mine for mine, _ in known], np.int64)
    weight, bias = full_rows(head)
    return OldLabels(whitening(memory, settings), means, places, weight.astype(np.float64), bias.astype(np.float64))


def whitening(memory: Memory, settings: Settings = SETTINGS) -> Whitening:
    """Whitening by the covariance inside labels, widened as ``Settings`` tells."""
    total = memory.counts.sum()
    center = memory.sums.sum(axis=0) / total
    everything = memory.second_moment / total - np.outer(center, center)
    return _widened(center, everything, memory.within(), memory.split, settings)


def from_rows(head: HeadLike, examples: Floats, settings: Settings = SETTINGS) -> OldLabels:
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
    flat = _widened(center[:split], scatter, np.zeros_like(scatter), split, settings)
    nothing = np.zeros((head.width - split, split))
    white = Whitening(center, np.concatenate([flat.points, nothing]), np.concatenate([flat.rows, nothing]))
    return OldLabels(white, means, np.arange(len(weight), dtype=np.int64), weight, bias)


def _widened(center: Doubles, everything: Doubles, inside: Doubles, split: int, settings: Settings) -> Whitening:
    spread = np.sqrt(np.maximum(np.diag(everything), 0.0))
    spread = np.maximum(spread, 1e-6 * max(float(spread.max()), 1e-6))
    wide = (inside + settings.total * everything) / np.outer(spread, spread)
    ridge = np.full(len(center), settings.ridge_hidden)
    ridge[:split] = settings.ridge_classifier
    wide[np.diag_indices_from(wide)] += ridge
    lower = _cholesky(wide)
    return Whitening(center, _inverse(lower).T / spread[:, None], lower * spread[:, None])


def _cholesky(matrix: Doubles) -> Doubles:
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        # A label that was taken out again by its mean alone leaves a covariance that is none any more in some
        # directions, where there were few sentences: those get the least spread that there is elsewhere.
        values, axes = np.linalg.eigh(matrix)
        least = values[values > 0].min(initial=1e-3)
        return np.linalg.cholesky((axes * np.maximum(values, max(float(least), 1e-3))) @ axes.T)


def _inverse(lower: Doubles) -> Doubles:
    """Inverse of a lower triangular matrix by halves: a fifth of the time of a general inverse, and no scipy."""
    size = len(lower)
    if size <= 64:  # noqa: PLR2004  small enough for the general one
        inverse: Doubles = np.tril(np.linalg.inv(lower))
        return inverse
    half = size // 2
    whole = np.zeros_like(lower)
    whole[:half, :half] = first = _inverse(lower[:half, :half])
    whole[half:, half:] = second = _inverse(lower[half:, half:])
    whole[half:, :half] = -second @ (lower[half:, :half] @ first)
    return whole
