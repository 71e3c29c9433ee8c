"""How far a new row reaches: the bias at which the errors on both sides are fewest, within the budget of flips.

A fit on a few examples finds a good direction; its bias is a guess. Two samples tell more: the examples, each scored
by a fit that did not see it, say how many inputs of the new label would be missed, and real features of old labels how
many of theirs would be taken. Both are few, so each counts as a small cloud (a kernel estimate) rather than a point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patcher.fit.settings import Settings

    Doubles = NDArray[np.float64]

__all__ = ["Calibration", "best_shift", "normal_below"]

_STEPS = 240
_FEWEST = 3
"""With fewer held-out examples, nothing is known about their spread."""
_TAKEN_UNSEEN = 0.05
"""How many labels' worth of old inputs may be lost, by estimate, if there are too few examples to weigh it against."""
_FOUND_UNSEEN = 0.85
"""Share of the held-out examples that must still be found if nothing is known about old inputs."""


@dataclass(frozen=True)
class Calibration:
    """Old inputs as a new row sees them.

    ``margins`` float64 ``[m]``: best old logit less the new one, of the ``m`` inputs nearest to it; ``spreads``
    ``[m]``: standard deviation of that margin inside the input's label; ``worth``: labels that each input stands for
    (labels over inputs); ``cap``: the largest shift within the budget of flips.
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

    Minimises the share of the new label's inputs that would be missed plus, at the price in ``settings``, the old
    inputs that would be taken, counted in labels' worth of inputs: the errors there are when every label is asked for
    equally often. ``held_out`` float64 ``[n]`` are the margins of the examples, each in a fit without it. Without
    ``old`` the bias goes down as far as the examples let it.
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
    """The normal distribution's share below each score, to 1e-7 (Abramowitz & Stegun 7.1.26); numpy has none."""
    size = np.abs(scores) / np.sqrt(2.0)
    step = 1.0 / (1.0 + 0.3275911 * size)
    factors = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    tail: Doubles = 0.5 * np.polyval((*factors, 0.0), step) * np.exp(-size * size)
    return np.where(scores < 0, tail, 1.0 - tail)
