"""The metrics of the quality benchmark, as pure functions of answers and scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

__all__ = ["FIGURES", "Outcome", "auroc", "outcome", "recall_at_flips", "spread", "summary", "table"]

FIGURES = {"flips": max, "change": min, "recall": min, "precision": min, "f1": min}
"""Figures of an outcome, and the function that picks the worst value of each."""


@dataclass(frozen=True)
class Outcome:
    """The effect of a patch, as fractions.

    ``flips``: share of the old test inputs that were right before and are wrong after. ``change``: change in accuracy
    on the old test inputs. ``recall``, ``precision``, ``f1``: of the new label, over its own test inputs and all old
    ones.
    """

    flips: float
    change: float
    recall: float
    precision: float
    f1: float


def outcome(truth: Ints, before: Ints, after: Ints, new: Ints, place: int) -> Outcome:
    """Compare answers before and after a patch.

    ``truth``, ``before`` and ``after``, INT64 ``[n]``, are ids for the old inputs. ``new``, INT64 ``[m]``, are the
    answers to the new label's inputs; the new label's id is ``place``.
    """
    was_right, is_right = before == truth, after == truth
    hits, false = int((new == place).sum()), int((after == place).sum())
    return Outcome(
        flips=float((was_right & ~is_right).mean()),
        change=float(is_right.mean() - was_right.mean()),
        recall=hits / len(new),
        precision=hits / (hits + false) if hits + false else 0.0,
        f1=2 * hits / (hits + false + len(new)),
    )


def recall_at_flips(old: Floats, right: Bools, new: Floats, rates: Sequence[float]) -> list[float]:
    """The new label's recall when its bias is set so that just a given share of old inputs flips.

    Parameters
    ----------
    old, right
        For each old input, the margin of its best old logit over the new one, float ``[n]``, and whether the old
        answer was right; an input that was wrong cannot flip.
    new
        For each input of the new label, the margin of the new logit over the best old one, float ``[m]``.
    rates
        Allowed flips as shares of the n old inputs.
    """
    margins = np.sort(old[right])
    allowed = [min(int(rate * len(old) + 1e-9), len(margins) - 1) for rate in rates]
    return [float((new + margins[count] > 0).mean()) for count in allowed]


def auroc(inside: Floats, outside: Floats) -> float:
    """AUROC: probability that an in-scope input scores above an out-of-scope one (Mann-Whitney); ties count half."""
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, "left") + np.searchsorted(ordered, inside, "right")
    return float(below.mean() / (2 * len(outside)))


def summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and worst of each figure over labels and draws."""
    found = {}
    for figure, worst in FIGURES.items():
        values = [float(getattr(each, figure)) for each in outcomes]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        found[figure] = {"mean": float(np.mean(values)), "sd": spread, "worst": worst(values)}
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation, minimum and maximum."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "sd": sd, "min": float(np.min(values)), "max": float(np.max(values))}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [list(map(str, head)), ["---"] * len(head), *(list(map(str, row)) for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def figures_row(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The table cells of one method: mean ± sd (worst) of each figure, in per cent or percentage points."""
    cells = []
    for figure in FIGURES:
        digits = 2 if figure in {"flips", "change"} else 1
        mean, sd, worst = (100 * found[figure][name] for name in ("mean", "sd", "worst"))
        sign = "+" if figure == "change" else ""
        cells.append(f"{mean:{sign}.{digits}f} ± {sd:.{digits}f} ({worst:{sign}.{digits}f})")
    return cells
