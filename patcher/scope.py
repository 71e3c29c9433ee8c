"""How much an input looks like any of the known labels: one number, in numpy and inside the head's graph.

With a memory of real features it comes from the squared distance to the nearest label's mean (Mahalanobis; Lee et al.
2018, arXiv 1807.03888), as ``1 / (1 + (distance / limit) ** 2)``: 0.5 at the limit that a stated share of the
remembered inputs exceeds. Those took part in the fine-tuning; fresh inputs lie further out, so that more of them score
below 0.5. To keep the head's file small, the covariance is exact in the directions in which inputs vary most and the
same in all others (probabilistic principal components; Tipping and Bishop 1999). What lies in those others counts much:
texts of no label show there (``tests/benchmarks/tune_fit.py``). Without such a memory it is the largest probability,
for which no limit can be given.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.errors import RepositoryError
from patcher.fit.model import widened
from patcher.fit.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx
    from numpy.typing import NDArray

    from patcher.fit.model import HeadLike
    from patcher.memory import Memory

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Halves = NDArray[np.float16]

__all__ = ["WIDTHS", "Distance", "Scope", "fit_scope", "scope_graph"]

_RANK = 96
"""Directions kept: with 135 labels and 768 features they cost 190 KB in the head's file."""

WIDTHS = Settings(ridge_classifier=0.3, ridge_hidden=0.1, total=0.05)
"""How the covariance is widened here: less than for a row, which has to reach a label that fine-tuning never saw."""

_MOST = 20_000
"""Remembered inputs that the limit is set on: with thousands of labels there are more than a quantile needs."""

_TURNS = 6
_SPARE = 16
"""Turns and spare directions of the subspace iteration: it need not find the very directions of most variance."""


@dataclass(frozen=True)
class Distance:
    """The geometry, of standardised features ``z = (x - center) * scale``.

    In the directions ``axes`` ``[width, r]``, orthonormal, the points ``z @ axes @ points`` are compared with ``means``
    ``[M, r]``; the rest of the squared length of ``z`` counts ``rest`` times. ``center`` and ``scale`` FP32
    ``[width]``, ``points`` FP32 ``[r, r]``, ``rest`` and ``limit`` FP32 ``[1]``, the squared distance that scores 0.5;
    ``axes`` and ``means`` are FP16, as they are only stored.
    """

    center: Floats
    scale: Floats
    axes: Halves
    points: Floats
    means: Halves
    rest: Floats
    limit: Floats

    def squared(self, features: Floats) -> Floats:
        """Squared distance to the nearest mean, FP32 ``[n]``."""
        standard = (features - self.center) * self.scale
        inner = standard @ self.axes.astype(np.float32)
        points = inner @ self.points
        means = self.means.astype(np.float32)
        gaps = (points * points).sum(axis=1, keepdims=True) - 2.0 * points @ means.T + (means * means).sum(axis=1)
        outer = (standard * standard).sum(axis=1) - (inner * inner).sum(axis=1)
        squared: Floats = gaps.min(axis=1) + self.rest * np.maximum(outer, 0.0)
        return squared


@dataclass(frozen=True)
class Scope:
    """Scores inputs from 0 (none of these labels) to 1.

    ``false_alarms`` is the share of the remembered inputs that score below 0.5; None where nothing calibrated that.
    """

    problem: str
    distance: Distance | None = None
    false_alarms: float | None = None

    @property
    def calibrated(self) -> bool:
        """Whether 0.5 means anything."""
        return self.false_alarms is not None

    def score(self, features: Floats, logits: Floats) -> Floats:
        """FP32 ``[n]`` from features FP32 ``[n, width]`` and logits FP32 ``[n, C]``."""
        if self.distance is None:
            return _largest_probability(logits, self.problem)
        ratio = self.distance.squared(features) / self.distance.limit
        scores: Floats = (1.0 / (1.0 + ratio * ratio)).astype(np.float32)
        return scores

    def settings(self) -> dict[str, Any]:
        """What the head's metadata keeps; the arrays are in its graph."""
        kind = "softmax" if self.distance is None else "mahalanobis"
        return {"kind": kind, "problem": self.problem, "false_alarms": self.false_alarms}

    @classmethod
    def from_arrays(cls, settings: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Scope:
        """The scorer that ``settings`` and the graph's initializers describe; RepositoryError where they do not."""
        try:
            distance = None
            if settings["kind"] == "distance":
                distance = _of_02(arrays)
            elif settings["kind"] != "softmax":
                distance = Distance(*(arrays[f"scope_{field.name}"] for field in dataclasses.fields(Distance)))
            alarms = settings["false_alarms"]
            return cls(settings["problem"], distance, None if alarms is None else float(alarms))
        except (KeyError, TypeError, ValueError) as error:
            raise RepositoryError(
                f"this head's out-of-scope scorer is damaged: {type(error).__name__} {error}"
            ) from error


def fit_scope(memory: Memory | None, head: HeadLike, *, false_alarms: float = 0.05, widths: Settings = WIDTHS) -> Scope:
    """The scorer of a head, from the memory of its labels; ``false_alarms`` of its inputs score below 0.5.

    That is set on the memory's real features; without them (a memory of statistics, or none) the largest probability
    has to do.
    """
    if memory is None or not len(memory.sample):
        return Scope(head.problem)
    wide = widened(memory, widths)
    scale = 1.0 / wide.spread
    axes = _widest(wide.covariance).astype(np.float16)
    exact = axes.astype(np.float64)
    inside = exact.T @ wide.covariance @ exact
    points = np.linalg.inv(np.linalg.cholesky(inside)).T
    beside = len(scale) - exact.shape[1]
    left = float(np.trace(wide.covariance) - np.trace(inside))
    means = ((memory.means() - wide.center) * scale) @ exact @ points
    distance = Distance(
        center=wide.center.astype(np.float32),
        scale=scale.astype(np.float32),
        axes=axes,
        points=points.astype(np.float32),
        means=means.astype(np.float16),
        rest=np.array([beside / left if beside else 0.0], np.float32),
        limit=np.ones(1, np.float32),
    )
    known = distance.squared(memory.sample[:: 1 + len(memory.sample) // _MOST].astype(np.float32))
    limit = max(float(np.quantile(known, 1.0 - false_alarms)), 1e-6)
    distance = dataclasses.replace(distance, limit=np.array([limit], np.float32))
    return Scope(head.problem, distance, false_alarms)


def _widest(covariance: Doubles) -> Doubles:
    """About the directions of most variance, float64 ``[width, r]``, orthonormal (subspace iteration)."""
    rank = min(_RANK, len(covariance))
    wanted = min(rank + _SPARE, len(covariance))
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((len(covariance), wanted)))[0]
    for _ in range(_TURNS):
        axes = np.linalg.qr(covariance @ axes)[0]
    inner = np.linalg.eigh(axes.T @ covariance @ axes)[1]
    found: Doubles = axes @ inner[:, -rank:]
    return found


def _of_02(arrays: Mapping[str, NDArray[Any]]) -> Distance:
    """The distance of a head from version 0.2: whitened axes, and nothing counted beside them."""
    axes = arrays["scope_projection"]
    width, rank = axes.shape
    return Distance(
        center=np.zeros(width, np.float32),
        scale=np.ones(width, np.float32),
        axes=axes,
        points=np.eye(rank, dtype=np.float32),
        means=arrays["scope_means"].astype(np.float32) + arrays["scope_center"],
        rest=np.zeros(1, np.float32),
        limit=arrays["scope_limit"],
    )


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
        "scope_zero": np.array(0.0, np.float32),
        "scope_one": np.array(1.0, np.float32),
    }
    nodes = [
        node("Cast", ["scope_axes"], ["scope_inward"], to=TensorProto.FLOAT),
        node("Cast", ["scope_means"], ["scope_places"], to=TensorProto.FLOAT),
        node("Sub", [features, "scope_center"], ["scope_centered"]),
        node("Mul", ["scope_centered", "scope_scale"], ["scope_standard"]),
        node("MatMul", ["scope_standard", "scope_inward"], ["scope_inner"]),
        node("MatMul", ["scope_inner", "scope_points"], ["scope_at"]),
        node("Transpose", ["scope_places"], ["scope_columns"], perm=[1, 0]),
        node("MatMul", ["scope_at", "scope_columns"], ["scope_dots"]),
        node("Mul", ["scope_dots", "scope_minus_two"], ["scope_cross"]),
        node("Add", ["scope_cross", "scope_lengths"], ["scope_gaps"]),
        node("ReduceMin", ["scope_gaps"], ["scope_least"], axes=[1], keepdims=1),
        *_squares("scope_at", "scope_length"),
        node("Add", ["scope_least", "scope_length"], ["scope_near"]),
        *_squares("scope_standard", "scope_all"),
        *_squares("scope_inner", "scope_seen"),
        node("Sub", ["scope_all", "scope_seen"], ["scope_left"]),
        node("Max", ["scope_left", "scope_zero"], ["scope_outer"]),
        node("Mul", ["scope_outer", "scope_rest"], ["scope_far"]),
        node("Add", ["scope_near", "scope_far"], ["scope_distance"]),
        node("Div", ["scope_distance", "scope_limit"], ["scope_ratio"]),
        node("Mul", ["scope_ratio", "scope_ratio"], ["scope_ratios"]),
        node("Add", ["scope_ratios", "scope_one"], ["scope_sum"]),
        node("Reciprocal", ["scope_sum"], [out]),
    ]
    return nodes, [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()]


def _squares(given: str, out: str) -> list[onnx.NodeProto]:
    """Nodes for the sum of squares of each row."""
    from onnx import helper

    square = helper.make_node("Mul", [given, given], [f"{out}_squares"])
    return [square, helper.make_node("ReduceSum", [f"{out}_squares", "scope_axis"], [out], keepdims=1)]


def _largest_probability(logits: Floats, problem: str) -> Floats:
    if problem == "single_label":
        above = logits - logits.max(axis=1, keepdims=True)
        chances: Floats = (1.0 / np.exp(above).sum(axis=1)).astype(np.float32)
    else:
        chances = (1.0 / (1.0 + np.exp(-logits.max(axis=1)))).astype(np.float32)
    return chances
