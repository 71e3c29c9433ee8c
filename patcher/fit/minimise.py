"""A small L-BFGS for smooth convex functions; importing scipy's would add a quarter of a second to start-up."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from patcher.arrays import Doubles

__all__ = ["minimise"]

_ARMIJO = 1e-4
_KEPT = 12


def minimise(
    function: Callable[[Doubles], tuple[float, Doubles]],
    start: Doubles,
    *,
    tolerance: float = 1e-5,
    steps: int = 300,
    inverse: Doubles | None = None,
) -> Doubles:
    """The minimiser of a convex function, float64 ``[n]``.

    ``function`` returns value and gradient; ``inverse`` float64 ``[n, n]``, if known, approximates the inverse Hessian,
    which halves the number of steps. Stops when every component of the gradient is below ``tolerance``, when the line
    search finds no descent, or after ``steps`` (Nocedal & Wright, Numerical Optimization, algorithms 7.4 and 7.5).
    """
    point, (value, slope) = start, function(start)
    moves: deque[tuple[Doubles, Doubles, float]] = deque(maxlen=_KEPT)
    for _ in range(steps):
        if np.abs(slope).max() < tolerance:
            break
        direction = _direction(slope, moves, inverse)
        descent = float(direction @ slope)
        if descent >= 0:
            moves.clear()
            direction, descent = -slope, -float(slope @ slope)
        size = 1.0 if moves or inverse is not None else min(1.0, 1.0 / float(np.abs(slope).sum()))
        found = _walk(function, point, value, direction, descent, size)
        if found is None:
            break
        step, value, new_slope = found
        change = new_slope - slope
        bend = float(step @ change)
        if bend > 1e-12 * float(change @ change):
            moves.append((step, change, 1.0 / bend))
        point, slope = point + step, new_slope
    return point


def _direction(slope: Doubles, moves: deque[tuple[Doubles, Doubles, float]], inverse: Doubles | None) -> Doubles:
    direction = -slope
    weights = []
    for step, change, curvature in reversed(moves):
        weights.append(curvature * float(step @ direction))
        direction = direction - weights[-1] * change
    if inverse is not None:
        direction = inverse @ direction
    elif moves:
        step, change, curvature = moves[-1]
        direction = direction / (curvature * float(change @ change))
    for (step, change, curvature), weight in zip(moves, reversed(weights), strict=True):
        direction = direction + (weight - curvature * float(change @ direction)) * step
    return direction


def _walk(
    function: Callable[[Doubles], tuple[float, Doubles]],
    point: Doubles,
    value: float,
    direction: Doubles,
    descent: float,
    size: float,
) -> tuple[Doubles, float, Doubles] | None:
    """Backtracking line search: the first step with sufficient decrease (Armijo), or None if there is none."""
    for _ in range(30):
        step = size * direction
        new_value, new_slope = function(point + step)
        if new_value <= value + _ARMIJO * size * descent:
            return step, new_value, new_slope
        size *= 0.5
    return None
