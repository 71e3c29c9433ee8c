"""What single precision may do to a logit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from patcher.arrays import Floats

__all__ = ["rounding"]

_UNIT = 2.0**-21
"""Eight times what one rounding changes a number by."""


def rounding(features: Floats, weight: Floats, bias: Floats, unit: float = _UNIT) -> Floats:
    """How far two right ways to compute ``features @ weight.T + bias`` may lie apart, FP32 ``[n, C]``.

    It grows with the terms and not with their sum (Higham, Accuracy and Stability of Numerical Algorithms, 2002, 3.1):
    far from zero, as in a row fitted with little shrinkage, terms are large and little is left of them. ``unit`` is
    the share of the terms: some times the unit of rounding, where the strict bound is as many times as there are
    features; more where the features themselves were computed in two ways.
    """
    allowed: Floats = np.float32(unit) * (np.abs(features) @ np.abs(weight).T + np.abs(bias))
    return allowed
