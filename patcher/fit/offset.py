"""The loss of an offset-logistic row, and where it is least.

With the old logits fixed, softmax cross-entropy over one more label is a binary logistic regression with an offset,
``p(new | h) = sigmoid(w.h + b - logsumexp(old logits(h)))``. Instead of drawing negatives from the old labels'
Gaussians their expectation is taken: the margin of a Gaussian is a Gaussian, and ``E softplus`` of one is a short sum
(Gauss-Hermite). So a fit is deterministic, and costs two products with the label means a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from patcher.fit.minimise import minimise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["Cloud", "fit_row", "join", "span"]

# Nodes and weights of hermegauss(7): computing them takes longer than a fit.
_NODES = np.array([-3.7504397177257425, -2.3667594107345415, -1.1544053947399682, 0.0,
                   1.1544053947399682, 2.3667594107345415, 3.7504397177257425])  # fmt: skip
_WEIGHTS = np.array([5.482688559722184e-4, 3.0757123967586498e-2, 0.24012317860501273, 0.4571428571428572,
                     0.24012317860501273, 3.0757123967586498e-2, 5.482688559722184e-4])  # fmt: skip
_CLOSE = 1e-4
"""Slope at which a row counts as found: its logits are then right to about a hundredth."""


@dataclass(frozen=True)
class Cloud:
    """Gaussians that a row has to lie above or below.

    ``points`` float64 ``[m, r]`` are their centres, ``offsets`` ``[m]`` what the row has to beat there, ``slopes``
    ``[m, r]`` how the offset changes with the features, ``variance`` and ``weight`` ``[m]``.
    """

    points: Doubles
    offsets: Doubles
    slopes: Doubles
    variance: Doubles
    weight: Doubles

    def part(self, places: Ints, weight: float) -> Cloud:
        """Some of the Gaussians, each with the same new weight."""
        new_weight = np.full(len(places), weight)
        return Cloud(self.points[places], self.offsets[places], self.slopes[places], self.variance[places], new_weight)

    def spread_by(self, variance: float) -> Cloud:
        """The same Gaussians, all of one variance."""
        return replace(self, variance=np.full(len(self.variance), variance))

    def turned(self, axes: Doubles) -> Cloud:
        """The same cloud in the coordinates ``axes`` float64 ``[r, s]``."""
        return Cloud(self.points @ axes, self.offsets, self.slopes @ axes, self.variance, self.weight)


def join(*clouds: Cloud) -> Cloud:
    """Several clouds as one."""
    names = ("points", "offsets", "slopes", "variance", "weight")
    return Cloud(*(np.concatenate([getattr(cloud, name) for cloud in clouds]) for name in names))


def span(cloud: Cloud, prior: Doubles) -> Doubles:
    """An orthonormal basis, float64 ``[r, s]``, of all that a cloud and a prior ``[r]`` can pull a row towards.

    The loss depends on the row through products with points and slopes and through its length, so the best row lies
    in their span (the representer theorem): most often a quarter of the features.
    """
    arms = np.concatenate([cloud.points, cloud.slopes, prior[None]] if prior.any() else [cloud.points, cloud.slopes])
    if len(arms) >= arms.shape[1]:
        return np.eye(arms.shape[1])
    values, vectors = np.linalg.eigh(arms @ arms.T)
    kept = values > 1e-10 * max(float(values[-1]), 1e-30)
    axes: Doubles = arms.T @ (vectors[:, kept] / np.sqrt(values[kept]))
    return axes


def fit_row(inside: Cloud, outside: Cloud, penalty: float, prior: Doubles, start: Doubles | None = None) -> Doubles:
    """The row and, last, the bias, float64 ``[r + 1]``, that lie above ``inside`` and below ``outside``.

    At the least expected log loss plus half the penalty times the row's squared distance to ``prior`` ``[r]``.
    """
    cloud = join(outside, inside)
    signs = np.concatenate([np.ones(len(outside.weight)), -np.ones(len(inside.weight))])
    lengths = np.einsum("ij,ij->i", cloud.slopes, cloud.slopes)
    both = np.concatenate([cloud.points, cloud.slopes])
    turned = np.ascontiguousarray(both.T)
    count = len(signs)

    def loss(values: Doubles) -> tuple[float, Doubles]:
        row, bias = values[:-1], values[-1]
        products = both @ row
        square = float(row @ row)
        middle = signs * (products[:count] + bias - cloud.offsets)
        spread = np.sqrt(cloud.variance * np.maximum(square - 2.0 * products[count:] + lengths, 0.0) + 1e-12)
        margins = middle[:, None] + spread[:, None] * _NODES
        small = np.exp(-np.abs(margins))
        tail = 1.0 / (1.0 + small)
        chance = np.where(margins >= 0, tail, small * tail)
        cost = (np.maximum(margins, 0.0) + np.log1p(small)) @ _WEIGHTS
        pull = (chance @ _WEIGHTS) * cloud.weight * signs
        push = ((chance * _NODES) @ _WEIGHTS) * cloud.weight * cloud.variance / spread
        slope = turned @ np.concatenate([pull, -push]) + row * push.sum() + (row - prior) * penalty
        return float(cost @ cloud.weight) + 0.5 * penalty * float((row - prior) @ (row - prior)), np.append(
            slope, pull.sum()
        )

    return minimise(loss, np.zeros(both.shape[1] + 1) if start is None else start, tolerance=_CLOSE)
