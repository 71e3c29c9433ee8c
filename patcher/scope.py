"""How much an input looks like any of the known labels: one number, in numpy and inside the head's graph.

With a memory of real features it comes from the distance to the nearest mean in whitened features (Mahalanobis; Lee et
al. 2018, arXiv 1807.03888), in the directions in which the labels' means differ: few enough to keep the head's file
small. The means are those of the clusters that each label's sentences fall into, for a label that people word in
several ways leaves room in between. What lies beside those directions, added, finds far topics better and near ones
worse (``tests/benchmarks/tune_fit.py``). The score is ``1 / (1 + (distance / limit) ** 2)``: 0.5 at the limit that a
stated share of known inputs exceeds. The remembered ones took part in the fine-tuning, and fresh ones lie further out:
where fresh ones are given (``--eval``) the limit is theirs, else ``FINE_TUNED`` times that of the remembered ones, and
this stretch is kept for the versions to come. Without such a memory the score is the largest probability, for which no
limit can be given.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.errors import RepositoryError
from patcher.fit.model import from_memory
from patcher.fit.settings import SETTINGS, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx
    from numpy.typing import NDArray

    from patcher.fit.model import HeadLike, Whitening
    from patcher.memory import Memory

    Floats = NDArray[np.float32]
    Halves = NDArray[np.float16]
    Ints = NDArray[np.int64]

__all__ = ["FINE_TUNED", "Distance", "Scope", "fit_scope", "scope_graph", "stretch_of"]

_RANK = 128
"""Directions kept: with 135 labels and 768 features they and the clusters cost half a megabyte in the head's file."""

_FEWEST_FRESH = 20
"""With fewer, the share of them that a limit should keep out is less than one."""
_MOST = 2_000
"""Remembered inputs that the limit is set on: with many labels there are more than a quantile needs."""

_FRESHER = 2.0
"""So many times as far (squared) lie fresh texts as those that took part in the fine-tuning."""

FINE_TUNED = 2.0
"""The stretch for remembered inputs that took part in the fine-tuning, where no fresh ones tell it.

On two backbones of posing labels they said 1.8 and 1.9 (``tests/benchmarks/results/tuning.md``).
"""

_LONGEST = 30_000.0
"""The largest number in a projection: half of what FP16 holds."""

_MOST_CLUSTERS = 10_000
"""Above this the labels' own means do: they lie close enough, and a head's file need not grow tenfold."""


@dataclass(frozen=True)
class Distance:
    """The geometry: ``x @ projection - center`` is compared with the clusters' ``means``; FP16 where it is only stored.

    ``projection`` ``[width, r]``, ``center`` FP32 ``[r]``, ``means`` ``[M, r]``; ``limit`` FP32 ``[1]`` is the squared
    distance that scores 0.5; ``scale`` FP32 ``[M]`` is what the squared distance to each mean counts for.
    """

    projection: Halves
    center: Floats
    means: Halves
    limit: Floats
    scale: Floats

    def squared(self, features: Floats) -> Floats:
        """Squared distances to the ``means`` as far as they count, FP32 ``[n, M]``."""
        points = features @ self.projection.astype(np.float32) - self.center
        means = self.means.astype(np.float32)
        lengths = (points * points).sum(axis=1, keepdims=True) + (means * means).sum(axis=1)
        gaps: Floats = (lengths - 2.0 * points @ means.T) * self.scale
        return gaps


@dataclass(frozen=True)
class Scope:
    """Scores inputs from 0 (none of these labels) to 1.

    ``false_alarms`` is the share of known inputs that should score below 0.5; None where nothing calibrated that.
    ``stretch`` is the limit of fresh inputs over that of the remembered ones, for versions with another memory too.
    """

    problem: str
    distance: Distance | None = None
    false_alarms: float | None = None
    stretch: float = 1.0

    @property
    def calibrated(self) -> bool:
        """Whether 0.5 means anything."""
        return self.false_alarms is not None

    def score(self, features: Floats, logits: Floats) -> Floats:
        """FP32 ``[n]`` from features FP32 ``[n, width]`` and logits FP32 ``[n, C]``."""
        if self.distance is None:
            return _largest_probability(logits, self.problem)
        ratio = self.distance.squared(features).min(axis=1) / self.distance.limit
        scores: Floats = (1.0 / (1.0 + ratio * ratio)).astype(np.float32)
        return scores

    def settings(self) -> dict[str, Any]:
        """What the head's metadata keeps; the arrays are in its graph."""
        kind = "softmax" if self.distance is None else "distance"
        return {
            "kind": kind,
            "problem": self.problem,
            "false_alarms": self.false_alarms,
            "stretch": self.stretch,
        }

    @classmethod
    def from_arrays(cls, settings: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Scope:
        """The scorer that ``settings`` and the graph's initializers describe; RepositoryError where they do not."""
        try:
            distance = None
            if settings["kind"] != "softmax":
                ones = np.ones(len(arrays["scope_means"]), np.float32)
                known = {"scope_scale": ones} | dict(arrays)  # version 0.6 knew no scale
                distance = Distance(*(known[f"scope_{field.name}"] for field in dataclasses.fields(Distance)))
            alarms = settings["false_alarms"]
            stretch = float(settings.get("stretch", 1.0))  # version 0.2 knew none
            return cls(settings["problem"], distance, None if alarms is None else float(alarms), stretch)
        except (KeyError, TypeError, ValueError) as error:
            raise RepositoryError(
                f"this head's out-of-scope scorer is damaged: {type(error).__name__} {error}"
            ) from error


def fit_scope(
    memory: Memory | None,
    head: HeadLike,
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
    old = from_memory(memory, head, settings, white)
    axes = _principal_axes((old.points - old.points.mean(axis=0)).astype(np.float32))
    directions = old.whitening.points @ axes
    # Features of tiny numbers are stretched beyond what FP16 holds; distances in another unit do as well.
    unit = max(1.0, float(np.abs(directions).max()) / _LONGEST)
    directions /= unit
    projection = directions.astype(np.float16)
    center = (old.whitening.center @ projection.astype(np.float64)).astype(np.float32)
    means, counts, owners = _clusters(memory, head)
    places = (means - old.whitening.center).astype(np.float32) @ projection.astype(np.float32)
    ones = np.ones(len(places), np.float32)
    distance = Distance(projection, center, places.astype(np.float16), ones[:1], ones)
    some = slice(None, None, 1 + len(memory.sample) // _MOST)
    inputs, theirs = memory.sample[some].astype(np.float32), memory.sample_labels[some]
    distance = dataclasses.replace(distance, scale=_scale(distance.squared(inputs), theirs, counts, owners))
    gaps = _without_themselves(distance.squared(inputs), counts)
    remembered = max(float(np.quantile(gaps, 1.0 - false_alarms)), 1e-6 / unit**2)
    if fresh is not None and len(fresh) >= _FEWEST_FRESH:
        apart = float(np.quantile(distance.squared(fresh).min(axis=1), 1.0 - false_alarms)) / remembered
        # Fresh inputs lie no nearer than remembered ones without themselves; where they do, they are not fresh.
        stretch = apart if apart >= 1.0 else stretch
    distance = dataclasses.replace(distance, limit=np.array([stretch * remembered], np.float32))
    return Scope(head.problem, distance, false_alarms, stretch)


def _clusters(memory: Memory, head: HeadLike) -> tuple[NDArray[np.floating[Any]], Ints, Ints]:
    """Of the head's labels: the clusters' means ``[M, width]``, how many inputs each stands for, whose each is."""
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


def stretch_of(scope: Scope | None) -> float:
    """The stretch that the next version's scorer carries on from a head's; 1 where that has none."""
    return 1.0 if scope is None else scope.stretch


def scope_graph(
    scope: Scope, features: str, logits: str, out: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and initializers (opset 17, names starting with ``scope_``) that compute ``out`` FP32 ``[batch, 1]``."""
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node
    if scope.distance is None:
        single = scope.problem == "single_label"
        chances = node("Softmax", [logits], ["scope_chances"], axis=1) if single else None
        return [
            chances or node("Sigmoid", [logits], ["scope_chances"]),
            node("ReduceMax", ["scope_chances"], [out], axes=[1], keepdims=1),
        ], []
    means = scope.distance.means.astype(np.float32)
    arrays = {f"scope_{name}": value for name, value in vars(scope.distance).items()}
    arrays |= {
        "scope_lengths": (means * means).sum(axis=1),
        "scope_minus_two": np.array(-2.0, np.float32),
        "scope_axis": np.array([1], np.int64),
        "scope_one": np.array(1.0, np.float32),
    }
    nodes = [
        node("Cast", ["scope_projection"], ["scope_axes"], to=TensorProto.FLOAT),
        node("Cast", ["scope_means"], ["scope_places"], to=TensorProto.FLOAT),
        node("MatMul", [features, "scope_axes"], ["scope_raw"]),
        node("Sub", ["scope_raw", "scope_center"], ["scope_points"]),
        node("Transpose", ["scope_places"], ["scope_columns"], perm=[1, 0]),
        node("MatMul", ["scope_points", "scope_columns"], ["scope_dots"]),
        node("Mul", ["scope_dots", "scope_minus_two"], ["scope_cross"]),
        node("Add", ["scope_cross", "scope_lengths"], ["scope_partly"]),
        node("Mul", ["scope_points", "scope_points"], ["scope_squares"]),
        node("ReduceSum", ["scope_squares", "scope_axis"], ["scope_length"], keepdims=1),
        node("Add", ["scope_partly", "scope_length"], ["scope_gaps"]),
        node("Mul", ["scope_gaps", "scope_scale"], ["scope_scaled"]),
        node("ReduceMin", ["scope_scaled"], ["scope_distance"], axes=[1], keepdims=1),
        node("Div", ["scope_distance", "scope_limit"], ["scope_ratio"]),
        node("Mul", ["scope_ratio", "scope_ratio"], ["scope_ratios"]),
        node("Add", ["scope_ratios", "scope_one"], ["scope_sum"]),
        node("Reciprocal", ["scope_sum"], [out]),
    ]
    return nodes, [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()]


def _largest_probability(logits: Floats, problem: str) -> Floats:
    if problem == "single_label":
        above = logits - logits.max(axis=1, keepdims=True)
        chances: Floats = (1.0 / np.exp(above).sum(axis=1)).astype(np.float32)
    else:
        chances = (1.0 / (1.0 + np.exp(-logits.max(axis=1)))).astype(np.float32)
    return chances
