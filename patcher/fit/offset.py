"""The loss of an offset-logistic row, and its minimisation.

With the old logits fixed, softmax cross-entropy over one more label is a binary logistic regression with an offset,
``p(new | h) = sigmoid(w.h + b - logsumexp(old logits(h)))``. Negatives are not sampled from the old labels' Gaussians;
the loss is its expectation over them. The margin of a Gaussian is itself Gaussian, and ``E softplus`` of it is a short
sum (Gauss-Hermite quadrature). So a fit is deterministic, and each step costs two products with the label means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from patcher.fit.minimise import minimise

if TYPE_CHECKING:
    from patcher.arrays import Doubles, Ints

__all__ = ["Cloud", "RowLoss", "fit_row", "join", "span"]

# Nodes and weights of hermegauss(7): computing them takes longer than a fit.
_NODES = np.array([-3.7504397177257425, -2.3667594107345415, -1.1544053947399682, 0.0,
                   1.1544053947399682, 2.3667594107345415, 3.7504397177257425])  # fmt: skip
_WEIGHTS = np.array([5.482688559722184e-4, 3.0757123967586498e-2, 0.24012317860501273, 0.4571428571428572,
                     0.24012317860501273, 3.0757123967586498e-2, 5.482688559722184e-4])  # fmt: skip
_CLOSE = 1e-4
"""Gradient at which the minimum counts as reached: the row's logits are then accurate to about a hundredth."""


@dataclass(frozen=True)
class Cloud:
    """Gaussians on which a row's logit should exceed an offset, or stay below it.

    ``points`` float64 ``[m, r]`` are their centres, ``offsets`` ``[m]`` the logit that the row has to beat there,
    ``slopes`` ``[m, r]`` the gradient of the offset in the features; ``variance`` and ``weight`` are ``[m]``.
    """

    points: Doubles
    offsets: Doubles
    slopes: Doubles
    variance: Doubles
    weight: Doubles

    def part(self, places: Ints, weight: float | None = None) -> Cloud:
        """The Gaussians at ``places``; ``weight``, if given, replaces the weight of each."""
        weights = self.weight[places] if weight is None else np.full(len(places), weight)
        return Cloud(self.points[places], self.offsets[places], self.slopes[places], self.variance[places], weights)

    def spread_by(self, variance: float) -> Cloud:
        """The same Gaussians, all with one variance."""
        return replace(self, variance=np.full(len(self.variance), variance))

    def turned(self, axes: Doubles) -> Cloud:
        """The same cloud in the coordinates ``axes`` float64 ``[r, s]``."""
        return Cloud(self.points @ axes, self.offsets, self.slopes @ axes, self.variance, self.weight)


def join(*clouds: Cloud) -> Cloud:
    """Several clouds as one."""
    names = ("points", "offsets", "slopes", "variance", "weight")
    return Cloud(*(np.concatenate([getattr(cloud, name) for cloud in clouds]) for name in names))


def span(cloud: Cloud, prior: Doubles) -> Doubles:
    """An orthonormal basis, float64 ``[r, s]``, of the subspace in which the best row lies.

    The loss depends on the row only through its products with the points, slopes and prior ``[r]`` and through its
    length, so the best row lies in their span (representer theorem). Usually ``s`` is about a quarter of ``r``.
    """
    arms = np.concatenate([cloud.points, cloud.slopes, prior[None]] if prior.any() else [cloud.points, cloud.slopes])
    if len(arms) >= arms.shape[1]:
        return np.eye(arms.shape[1])
    values, vectors = np.linalg.eigh(arms @ arms.T)
    kept = values > 1e-10 * max(float(values[-1]), 1e-30)
    axes: Doubles = arms.T @ (vectors[:, kept] / np.sqrt(values[kept]))
    return axes


class RowLoss:
    """The loss of a row that should score above the cloud ``inside`` and below the cloud ``outside``.

    It is the expected log loss plus half the ``penalty`` times the row's squared distance to ``prior`` ``[r]``, as a
    function of the row followed by its bias: float64 ``[r + 1]``.
    """

    def __init__(self, inside: Cloud, outside: Cloud, penalty: float, prior: Doubles) -> None:
        self._cloud = join(outside, inside)
        self._signs = np.concatenate([np.ones(len(outside.weight)), -np.ones(len(inside.weight))])
        self._lengths = np.einsum("ij,ij->i", self._cloud.slopes, self._cloud.slopes)
        self._both = np.concatenate([self._cloud.points, self._cloud.slopes])
        self._turned = np.ascontiguousarray(self._both.T)
        self._penalty, self._prior = penalty, prior

    def __call__(self, values: Doubles) -> tuple[float, Doubles]:
        """The loss and its gradient."""
        cloud, row = self._cloud, values[:-1]
        spread, margins, small, chance = self._outcomes(values)
        cost = (np.maximum(margins, 0.0) + np.log1p(small)) @ _WEIGHTS
        pull = (chance @ _WEIGHTS) * cloud.weight * self._signs
        push = self._push(chance, spread)
        way = row - self._prior
        slope = self._turned @ np.concatenate([pull, -push]) + row * push.sum() + way * self._penalty
        value = float(cost @ cloud.weight) + 0.5 * self._penalty * float(way @ way)
        return value, np.append(slope, pull.sum())

    def curvature(self, values: Doubles) -> Doubles:
        """Approximate Hessian of the loss, float64 ``[r + 1, r + 1]``, which treats the spreads as constant."""
        spread, _, _, chance = self._outcomes(values)
        weight = ((chance * (1.0 - chance)) @ _WEIGHTS) * self._cloud.weight
        points = np.column_stack([self._cloud.points, np.ones(len(weight))])
        curvature: Doubles = points.T @ (points * weight[:, None])
        curvature[np.diag_indices(len(curvature) - 1)] += self._penalty + self._push(chance, spread).sum()
        curvature[-1, -1] += 1e-9  # if every chance is 0 or 1, the bias has no effect and the matrix would be singular
        return curvature

    def _outcomes(self, values: Doubles) -> tuple[Doubles, Doubles, Doubles, Doubles]:
        """Spread of each Gaussian's margin, the margins at the nodes, ``exp(-|margin|)``, and the chance of an error.

        A margin is positive on the wrong side of the offset.
        """
        cloud, row, bias = self._cloud, values[:-1], values[-1]
        products = self._both @ row
        square, count = float(row @ row), len(self._signs)
        middle = self._signs * (products[:count] + bias - cloud.offsets)
        spread = np.sqrt(cloud.variance * np.maximum(square - 2.0 * products[count:] + self._lengths, 0.0) + 1e-12)
        margins = middle[:, None] + spread[:, None] * _NODES
        small = np.exp(-np.abs(margins))
        tail = 1.0 / (1.0 + small)
        return spread, margins, small, np.where(margins >= 0, tail, small * tail)

    def _push(self, chance: Doubles, spread: Doubles) -> Doubles:
        push: Doubles = ((chance * _NODES) @ _WEIGHTS) * self._cloud.weight * self._cloud.variance / spread
        return push


def fit_row(loss: RowLoss, start: Doubles, inverse: Doubles | None = None) -> Doubles:
    """The row followed by its bias, float64 ``[r + 1]``, of least loss; ``inverse`` is that of a ``curvature``."""
    return minimise(loss, start, tolerance=_CLOSE, inverse=inverse)
