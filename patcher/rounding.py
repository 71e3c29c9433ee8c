"""Bounds on the rounding error of a logit in single precision, and of sums of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from patcher.arrays import Floats

__all__ = ["ROUNDED", "rounding"]

ROUNDED = 1e-9
"""Relative tolerance for rounding in sums of weights."""

_UNIT = 2.0**-21
"""Eight times the unit roundoff of FP32, ``2 ** -24``."""


def rounding(features: Floats, weight: Floats, bias: Floats, unit: float = _UNIT) -> Floats:
    """How far two correct computations of ``features @ weight.T + bias`` may differ, FP32 ``[n, C]``.

    The difference grows with the absolute terms, not with their sum (Higham, Accuracy and Stability of Numerical
    Algorithms, 2002, 3.1), so it matters where large terms cancel, as in a row fitted with little shrinkage. ``unit``
    is the allowed error as a share of the sum of absolute terms: a few unit roundoffs, whereas the strict bound is one
    for each feature. It has to be larger if the features themselves were computed in two ways.
    """
    allowed: Floats = np.float32(unit) * (np.abs(features) @ np.abs(weight).T + np.abs(bias))
    return allowed
