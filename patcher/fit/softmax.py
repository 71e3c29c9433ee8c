"""Fit all rows of a new head at once: multinomial logistic regression, with the penalty chosen on held-out inputs.

Softmax cross-entropy with a ridge on the rows is convex, so the solution is unique, and only the choice of held-out
inputs is random. The ridge applies to whitened features (``patcher.fit.model``): there the spread within labels is the
same in every direction, so a penalty means the same for each of them, and about twenty steps are enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patcher.fit.holding_out import hold_out
from patcher.fit.minimise import minimise
from patcher.fit.model import Whitening, log_sum_exp, whitening
from patcher.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from patcher.arrays import Doubles, Floats, Ints

__all__ = ["PENALTIES", "SoftmaxFit", "fit_softmax"]

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Tried from the strongest to the weakest; each fit starts from the result of the previous one."""

_MOST = 20_000
"""Largest number of inputs that the penalty is chosen on; more would not change the choice."""
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class SoftmaxFit:
    """Rows of all labels on all features, and the rows that the held-out inputs were evaluated with.

    ``weight`` float32 ``[C, width]`` and ``bias`` ``[C]`` are fitted to all inputs. ``trial_weight`` and ``trial_bias``
    were fitted, with the same ``penalty``, to at most 20,000 inputs without those at positions ``held_out`` INT64
    ``[h]``.
    """

    weight: Floats
    bias: Floats
    penalty: float
    held_out: Ints
    trial_weight: Floats
    trial_bias: Floats


def fit_softmax(features: Floats, ids: Ints, count: int) -> SoftmaxFit:
    """Fit ``count`` labels to features float32 ``[n, width]`` with labels INT64 ``[n]``, at least two inputs per label.

    The penalty is the one with the least cross-entropy on the held-out inputs.
    """
    fitted, apart = hold_out(ids, most=_MOST)
    white = _whitening(features[fitted], ids[fitted], count)
    points, held = (white.of(features[rows]).astype(np.float32) for rows in (fitted, apart))
    best, chosen, least = np.zeros(0), PENALTIES[0], np.inf
    rows = np.zeros((features.shape[1] + 1) * count)
    for penalty in PENALTIES:
        rows = minimise(_loss(points, ids[fitted], count, penalty), rows, tolerance=_TOLERANCE)
        loss = _cross_entropy(_logits(held, rows, count), ids[apart])
        if loss < least:
            best, chosen, least = rows, penalty, loss
    # The final fit gets its own whitening: with few inputs, all of them estimate the spread within labels better.
    whole = _whitening(features, ids, count)
    every = whole.of(features).astype(np.float32)
    rows = minimise(_loss(every, ids, count, chosen), np.zeros_like(best), tolerance=_TOLERANCE)
    return SoftmaxFit(*_raw(whole, rows, count), chosen, apart, *_raw(white, best, count))


def _whitening(features: Floats, ids: Ints, count: int) -> Whitening:
    names = [str(number) for number in range(count)]
    return whitening(Memory.build(features, ids, names, features.shape[1], per_label=0))


def _loss(points: Floats, ids: Ints, count: int, penalty: float) -> Callable[[Doubles], tuple[float, Doubles]]:
    """Mean cross-entropy plus ``penalty / 2 * |rows|^2``, and its gradient, at rows then biases, ``[(r + 1) C]``."""
    number, width = points.shape
    places = np.arange(number)

    def loss(rows: Doubles) -> tuple[float, Doubles]:
        # Matrix products in single precision take half the time; sums are in double precision.
        logits = _logits(points, rows, count)
        weight = rows[: width * count]
        value = _cross_entropy(logits, ids) + 0.5 * penalty * float(weight @ weight)
        chances = np.exp(logits - log_sum_exp(logits)[:, None].astype(np.float32))
        chances[places, ids] -= 1.0
        slope = (chances.T @ points).astype(np.float64).ravel() / number + penalty * weight
        return value, np.concatenate([slope, chances.sum(axis=0, dtype=np.float64) / number])

    return loss


def _logits(points: Floats, rows: Doubles, count: int) -> Floats:
    weight = rows[:-count].reshape(count, -1).astype(np.float32)
    logits: Floats = points @ weight.T + rows[-count:].astype(np.float32)
    return logits


def _cross_entropy(logits: Floats, ids: Ints) -> float:
    return float((log_sum_exp(logits) - logits[np.arange(len(ids)), ids]).mean())


def _raw(white: Whitening, rows: Doubles, count: int) -> tuple[Floats, Floats]:
    """Convert rows on whitened features to rows on the original features."""
    weight = rows[:-count].reshape(count, -1) @ white.points.T
    bias = rows[-count:] - weight @ white.center
    return weight.astype(np.float32), bias.astype(np.float32)
