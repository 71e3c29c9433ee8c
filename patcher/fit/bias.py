"""Choose a new row's bias: the fewest errors on both sides, within the flip budget.

A fit on a few examples finds a good direction, but its bias is a guess. Two samples calibrate it. The examples, each
scored by a fit that did not see it, tell how many inputs of the new label would be missed; real features of old labels
tell how many of theirs would be taken. Both samples are small, so each point counts as a small cloud (a kernel
estimate).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from patcher.arrays import Doubles
    from patcher.fit.settings import Settings

__all__ = ["Calibration", "best_shift", "normal_below"]

_STEPS = 240
_FEWEST = 3
"""With fewer held-out examples, their spread cannot be estimated."""
_TAKEN_UNSEEN = 0.05
"""Estimated loss of old inputs, in labels' worth, that is accepted if the examples are too few to weigh it against."""
_FOUND_UNSEEN = 0.85
"""Share of the held-out examples that must still be found if nothing is known about old inputs."""


@dataclass(frozen=True)
class Calibration:
    """Old inputs as a new row sees them.

    ``margins`` float64 ``[m]``: best old logit minus the new logit, of the ``m`` inputs nearest to the row;
    ``spreads`` ``[m]``: standard deviation of that margin within the input's label; ``worth``: how much of a label each
    input stands for (number of labels over number of inputs); ``cap``: the largest shift within the flip budget.
    """

    margins: Doubles
    spreads: Doubles
    worth: float
    cap: float

    def taken(self, shifts: Doubles, kernel: float) -> Doubles:
        """Labels' worth of old inputs that the row would take at each shift."""
        widths = np.maximum(kernel * self.spreads[:, None], 1e-6)
        foretold: Doubles = normal_below((shifts - self.margins[:, None]) / widths).sum(axis=0) * self.worth
        return foretold


def best_shift(held_out: Doubles, old: Calibration | None, settings: Settings) -> float:
    """What to add to the bias of a row.

    Minimises the share of the new label's inputs that would be missed plus ``settings.taken_weight`` times the old
    inputs that would be taken, in labels' worth of inputs: the errors to expect if all labels are equally frequent.
    ``held_out`` float64 ``[n]`` are the margins of the examples, each from a fit without it. Without ``old``, the bias
    is lowered as far as the examples allow.
    """
    if len(held_out) < _FEWEST:
        if old is None:
            return 0.0
        shifts = np.linspace(-2.0, 2.0, _STEPS) * max(float(old.spreads.max()), 1e-6)
        allowed = shifts[old.taken(shifts, settings.kernel) <= _TAKEN_UNSEEN]
        return min(float(allowed[-1]) if len(allowed) else float(shifts[0]), old.cap)
    if old is None:
        return min(0.0, -float(np.quantile(held_out, 1.0 - _FOUND_UNSEEN)))
    width = max(float(held_out.std(ddof=1)), 1e-6)
    shifts = np.linspace(-held_out.max() - width, max(0.0, -held_out.min()) + 3.0 * width, _STEPS)
    missed = normal_below(-(held_out[:, None] + shifts) / width).mean(axis=0)
    cost = missed + settings.taken_weight * old.taken(shifts, settings.kernel)
    return min(float(shifts[np.argmin(cost)]), old.cap)


def normal_below(scores: Doubles) -> Doubles:
    """The standard normal CDF, accurate to 1e-7 (Abramowitz & Stegun 7.1.26); numpy does not provide one."""
    size = np.abs(scores) / np.sqrt(2.0)
    step = 1.0 / (1.0 + 0.3275911 * size)
    factors = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    tail: Doubles = 0.5 * np.polyval((*factors, 0.0), step) * np.exp(-size * size)
    return np.where(scores < 0, tail, 1.0 - tail)
