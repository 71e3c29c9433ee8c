"""Fit all rows of a new head at once: logistic regression, multinomial or one for each label, on frozen features.

Cross-entropy with a ridge on the rows is convex, so the solution is unique, and only the choice of held-out inputs,
which choose the penalty, is random. The ridge applies to whitened features (``patcher.fit.model``): there the spread
within labels is the same in every direction, so a penalty means the same for each of them, and about twenty steps are
enough.

``targets`` are either INT64 ``[n]``, the one label of each input (softmax), or BOOL ``[n, C]``, any number of labels
for each input (a sigmoid per label).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patcher.fit.holding_out import hold_out, hold_out_several
from patcher.fit.minimise import minimise
from patcher.fit.model import Whitening, log_sum_exp, whitening
from patcher.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from patcher.arrays import Bools, Doubles, Floats, Ints

    Targets: TypeAlias = Ints | Bools

__all__ = ["PENALTIES", "HeadFit", "fit_head", "pairs_of"]

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Tried from the strongest to the weakest; each fit starts from the result of the previous one."""

_MOST = 20_000
"""Largest number of inputs that the penalty is chosen on; more would not change the choice."""
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class HeadFit:
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


def fit_head(features: Floats, targets: Targets, count: int) -> HeadFit:
    """Fit ``count`` labels to features float32 ``[n, width]``, at least two inputs with each label, and two without.

    The penalty is the one with the least cross-entropy on the held-out inputs.
    """
    if targets.ndim == 1:
        fitted, apart = hold_out(targets.astype(np.int64), most=_MOST)
    else:
        fitted, apart = hold_out_several(targets.astype(np.bool_), most=_MOST)
    white = _whitening(features[fitted], targets[fitted], count)
    points, held = (white.of(features[rows]).astype(np.float32) for rows in (fitted, apart))
    best, chosen, least = np.zeros(0), PENALTIES[0], np.inf
    rows = np.zeros((features.shape[1] + 1) * count)
    for penalty in PENALTIES:
        rows = minimise(_loss(points, targets[fitted], count, penalty), rows, tolerance=_TOLERANCE)
        loss = _cross_entropy(_logits(held, rows, count), targets[apart])
        if loss < least:
            best, chosen, least = rows, penalty, loss
    # The final fit gets its own whitening: with few inputs, all of them estimate the spread within labels better.
    whole = _whitening(features, targets, count)
    every = whole.of(features).astype(np.float32)
    rows = minimise(_loss(every, targets, count, chosen), np.zeros_like(best), tolerance=_TOLERANCE)
    return HeadFit(*_raw(whole, rows, count), chosen, apart, *_raw(white, best, count))


def pairs_of(targets: Targets) -> tuple[Ints, Ints]:
    """One pair for each input and label of it: the positions of both, INT64 ``[pairs]``."""
    if targets.ndim == 1:
        return np.arange(len(targets)), targets.astype(np.int64)
    inputs, labels = np.nonzero(targets)
    return inputs, labels


def _whitening(features: Floats, targets: Targets, count: int) -> Whitening:
    names = [str(number) for number in range(count)]
    inputs, labels = pairs_of(targets)
    return whitening(Memory.build(features[inputs], labels, names, features.shape[1], per_label=0))


def _loss(points: Floats, targets: Targets, count: int, penalty: float) -> Callable[[Doubles], tuple[float, Doubles]]:
    """Mean cross-entropy plus ``penalty / 2 * |rows|^2``, and its gradient, at rows then biases, ``[(r + 1) C]``."""
    number, width = points.shape
    inputs, labels = pairs_of(targets)

    def loss(rows: Doubles) -> tuple[float, Doubles]:
        # Matrix products in single precision take half the time; sums are in double precision.
        logits = _logits(points, rows, count)
        weight = rows[: width * count]
        value = _cross_entropy(logits, targets) + 0.5 * penalty * float(weight @ weight)
        excess = np.exp(logits - _scale(logits, targets).astype(np.float32))
        excess[inputs, labels] -= 1.0
        slope = (excess.T @ points).astype(np.float64).ravel() / number + penalty * weight
        return value, np.concatenate([slope, excess.sum(axis=0, dtype=np.float64) / number])

    return loss


def _logits(points: Floats, rows: Doubles, count: int) -> Floats:
    weight = rows[:-count].reshape(count, -1).astype(np.float32)
    logits: Floats = points @ weight.T + rows[-count:].astype(np.float32)
    return logits


def _scale(logits: Floats, targets: Targets) -> Doubles:
    """The logarithm of what exponentiated logits are divided by to give probabilities, ``[n, 1]`` or ``[n, C]``."""
    scale: Doubles = log_sum_exp(logits)[:, None] if targets.ndim == 1 else np.logaddexp(0.0, logits, dtype=np.float64)
    return scale


def _cross_entropy(logits: Floats, targets: Targets) -> float:
    """Mean over the inputs; with sigmoids, of the sum over the labels."""
    scale = _scale(logits, targets).sum()
    return float(scale - logits[pairs_of(targets)].sum(dtype=np.float64)) / len(logits)


def _raw(white: Whitening, rows: Doubles, count: int) -> tuple[Floats, Floats]:
    """Convert rows on whitened features to rows on the original features."""
    weight = rows[:-count].reshape(count, -1) @ white.points.T
    bias = rows[-count:] - weight @ white.center
    return weight.astype(np.float32), bias.astype(np.float32)
