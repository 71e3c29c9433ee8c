"""The out-of-scope score: how much an input looks like any of the known labels, as one number.

It is computed here in numpy, and inside the head's graph (``scope_file``) when served.

With a memory of real features, the score is based on the Mahalanobis distance to the nearest mean, that is the
distance in whitened features (Lee et al. 2018, arXiv 1807.03888). Only the directions in which the labels' means differ
are used, few enough to keep the head's file small. The means are those of the clusters that each label's texts
form, because a label that people word in several ways leaves gaps between them. Adding the distance outside of those
directions detects distant topics better and near ones worse (``tests/benchmarks/tune_fit.py``).

The score is ``1 / (1 + (d / limit) ** 2)``, where ``d`` is the squared distance, scaled by cluster. It is 0.5 at the
limit, which a stated share of known inputs exceeds. Remembered inputs took part in the fine-tuning, and fresh ones lie
further out. So if fresh inputs are given (``--eval``), the limit is theirs; otherwise it is that of the remembered ones
times a stretch. An export without fresh inputs uses the stretch ``FINE_TUNED``, and each version hands its own on.

Without such a memory the score is the largest probability, for which no limit can be given.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.blocks import blocks
from patcher.errors import RepositoryError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeVar

    from numpy.typing import NDArray

    from patcher.arrays import Floats, Halves

    Logits = TypeVar("Logits", NDArray[np.float32], NDArray[np.float64])

__all__ = ["Distance", "Scope", "largest_probability", "stretch_of"]


@dataclass(frozen=True, eq=False)
class Distance:
    """Distances of ``x @ projection - center`` to the clusters' ``means``.

    ``projection`` FP16 ``[width, r]`` and ``means`` FP16 ``[M, r]`` are stored in half precision and computed with in
    FP32, ``center`` is FP32 ``[r]``. ``limit`` FP32 ``[1]`` is the scaled squared distance that scores 0.5. ``scale``
    FP32 ``[M]`` is the factor applied to the squared distance to each mean.
    """

    projection: Halves
    center: Floats
    means: Halves
    limit: Floats
    scale: Floats

    def squared(self, features: Floats) -> Floats:
        """Scaled squared distances to the ``means``, FP32 ``[n, M]``."""
        points = features @ self.projection.astype(np.float32) - self.center
        means = self.means.astype(np.float32)
        gaps: Floats = (points * points).sum(axis=1, keepdims=True) + (means * means).sum(axis=1)
        gaps -= 2.0 * points @ means.T
        gaps *= self.scale
        return gaps

    def nearest(self, features: Floats) -> Floats:
        """The smallest scaled squared distance, FP32 ``[n]``."""
        least = np.empty(len(features), np.float32)
        for block in blocks(len(features)):
            least[block] = self.squared(features[block]).min(axis=1)
        return least


@dataclass(frozen=True, eq=False)
class Scope:
    """Scores inputs from 0 (none of these labels) to 1 (one of these labels).

    ``false_alarms`` is the share of known inputs that should score below 0.5; None if the score is not calibrated.
    ``stretch`` is the ratio of the limit for fresh inputs to that for remembered ones; later versions reuse it with
    their own memory.
    """

    problem: str
    distance: Distance | None = None
    false_alarms: float | None = None
    stretch: float = 1.0

    @property
    def exclusive(self) -> bool:
        """Whether exactly one label is the answer (softmax), as for the head."""
        return self.problem == "single_label"

    def score(self, features: Floats, logits: Floats) -> Floats:
        """Scores FP32 ``[n]`` from features FP32 ``[n, width]`` and logits FP32 ``[n, C]``."""
        if self.distance is None:
            return largest_probability(logits, exclusive=self.exclusive)
        ratio = self.distance.nearest(features) / self.distance.limit
        scores: Floats = (1.0 / (1.0 + ratio * ratio)).astype(np.float32)
        return scores

    def settings(self) -> dict[str, Any]:
        """The part kept in the head's metadata; the arrays are in its graph."""
        kind = "softmax" if self.distance is None else "distance"
        return {
            "kind": kind,
            "problem": self.problem,
            "false_alarms": self.false_alarms,
            "stretch": self.stretch,
        }

    @classmethod
    def from_arrays(cls, settings: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Scope:
        """The scorer from ``settings`` and the graph's initializers; RepositoryError if they describe none."""
        try:
            distance = None
            if settings["kind"] != "softmax":
                ones = np.ones(len(arrays["scope_means"]), np.float32)
                known = {"scope_scale": ones} | dict(arrays)  # version 0.6 had no scale
                distance = Distance(*(known[f"scope_{field.name}"] for field in dataclasses.fields(Distance)))
            alarms = settings["false_alarms"]
            stretch = float(settings.get("stretch", 1.0))  # version 0.2 had none
            return cls(settings["problem"], distance, None if alarms is None else float(alarms), stretch)
        except (KeyError, TypeError, ValueError) as error:
            raise RepositoryError(
                f"this head's out-of-scope scorer is damaged: {type(error).__name__} {error}"
            ) from error


def stretch_of(scope: Scope | None) -> float:
    """The stretch that the next version's scorer inherits from ``scope``; 1 without one."""
    return 1.0 if scope is None else scope.stretch


def largest_probability(logits: Logits, *, exclusive: bool) -> Logits:
    """The probability of each input's best label ``[n]``, from logits ``[n, C]``, in their dtype."""
    best = logits.max(axis=1, keepdims=True)
    against = np.exp(logits - best).sum(axis=1) if exclusive else 1.0 + np.exp(-best[:, 0])
    chances: Logits = (1.0 / against).astype(logits.dtype)
    return chances
