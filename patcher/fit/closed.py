"""Refits of all rows in closed form, from the memory's statistics alone: ridge regression and discriminant analysis.

Both change every row, so that old answers may change in either direction; the default method changes none. Ridge is the
regression of one-hot labels on the features (RanPAC, arXiv 2307.02251, without its random projection); discriminant
analysis is that of Gaussians with one covariance (streaming LDA, arXiv 1909.01520). New labels weigh as much as an
average old one, however few their examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patcher.fit.bias import Calibration, best_shift
from patcher.fit.model import Rows, log_sum_exp

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from patcher.fit.inputs import OldInputs
    from patcher.fit.model import HeadLike, OldLabels
    from patcher.fit.settings import Settings
    from patcher.memory import Memory

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Ints = NDArray[np.int64]
    LeftOut = list[Doubles]

__all__ = ["lda_rows", "ridge_rows", "settled"]

_SCALES = np.geomspace(0.05, 100.0, 120)


def ridge_rows(
    examples: Mapping[str, Floats], memory: Memory, places: Ints, old: OldLabels, settings: Settings
) -> tuple[Doubles, Doubles, LeftOut]:
    """Ridge regression of one-hot labels, for old labels and new ones alike.

    Features are standardised and the constant is not penalised. ``places`` INT64 ``[C]`` are the head's labels in the
    memory. Returns rows float64 ``[C + K, width]``, biases ``[C + K]``, and for each new label the output of each of
    its examples in a regression without it, ``(y - h) / (1 - h)`` with the leverage ``h`` (Allen's PRESS).
    """
    counts = memory.counts[places].astype(np.float64)
    share = counts.mean()
    white = old.whitening
    center = white.center
    spread = np.sqrt(np.maximum(np.diag(memory.second_moment) / memory.counts.sum() - center**2, 0.0))
    spread = np.maximum(spread, 1e-6 * max(float(spread.max()), 1e-6))
    width = len(center)
    gram = np.zeros((width + 1, width + 1))
    total = memory.counts.sum()
    outer = np.outer(memory.sums.sum(axis=0), center)
    gram[:-1, :-1] = (memory.second_moment - outer - outer.T + total * np.outer(center, center)) / np.outer(
        spread, spread
    )
    gram[:-1, -1] = gram[-1, :-1] = (memory.sums.sum(axis=0) - total * center) / spread
    gram[-1, -1] = total
    targets = [np.column_stack([(memory.sums[places] - counts[:, None] * center) / spread, counts])]
    points = [np.column_stack([(rows - center) / spread, np.ones(len(rows))]) for rows in examples.values()]
    for mine in points:
        weight = share / len(mine)
        gram += weight * mine.T @ mine
        targets.append(weight * mine.sum(axis=0, keepdims=True))
    gram[np.arange(width), np.arange(width)] += settings.refit_ridge * (total + share * len(points))
    inverse = np.linalg.inv(gram)
    solved = np.concatenate(targets) @ inverse
    left_out = []
    for position, mine in enumerate(points, start=len(places)):
        leverage = (share / len(mine)) * np.einsum("ij,jk,ik->i", mine, inverse, mine)
        left_out.append((mine @ solved[position] - leverage) / np.maximum(1.0 - leverage, 1e-9))
    rows = solved[:, :-1] / spread
    return rows, solved[:, -1] - rows @ center, left_out


def lda_rows(
    examples: Mapping[str, Floats], memory: Memory, places: Ints, old: OldLabels
) -> tuple[Doubles, Doubles, LeftOut]:
    """Linear discriminants with equal priors, in the covariance that the default method whitens by.

    Arguments and results as of ``ridge_rows``; an example is left out of its label's mean.
    """
    white = old.whitening
    points = [white.of(rows) for rows in examples.values()]
    means = [
        white.of(memory.sums[places] / memory.counts[places, None]),
        *(p.mean(axis=0, keepdims=True) for p in points),
    ]
    every = np.concatenate(means)
    biases = -0.5 * (every * every).sum(axis=1)
    left_out = []
    for mine in points:
        count = len(mine)
        rest = (mine.sum(axis=0) - mine) / max(count - 1, 1)
        scores = (mine * rest).sum(axis=1) - 0.5 * (rest * rest).sum(axis=1)
        left_out.append(scores if count > 1 else np.full(1, np.nan))
    rows = every @ white.points.T
    return rows, biases - rows @ white.center, left_out


def settled(
    found: tuple[Doubles, Doubles, LeftOut],
    examples: Mapping[str, Floats],
    head: HeadLike,
    old: OldLabels,
    inputs: OldInputs | None,
    max_flips: float,
    settings: Settings,
) -> tuple[Rows, dict[str, Doubles]]:
    """Closed-form rows as logits: brought to the scale that fits the real inputs best, the new biases by budget.

    Returns all rows, old and new, and each new label's held-out logits ``[n]``. Where no real inputs are kept, the
    labels' means stand for them.
    """
    weight, bias, left_out = found
    rows, ids = (inputs.features, inputs.ids) if inputs else (old.means.astype(np.float32), old.places)
    logits = rows.astype(np.float64) @ weight.T + bias
    count = len(head.labels)
    scale = _scale(logits[:, :count], ids)
    weight, bias, logits = weight * scale, bias * scale, logits * scale
    held_out: dict[str, Doubles] = {}
    right = head.logits(rows).argmax(axis=1) == ids
    for position, (label, scores) in enumerate(zip(examples, left_out, strict=True), start=count):
        mine = examples[label].astype(np.float64) @ weight.T + bias
        rivals = np.delete(mine, position, axis=1).max(axis=1)
        margins = logits[:, :count].max(axis=1) - logits[:, position]
        spreads = np.linalg.norm((weight[position] - weight[ids]) @ old.whitening.rows, axis=1)
        still = right & (logits[:, :count].argmax(axis=1) == ids)
        allowed = int(max_flips / len(examples) * len(ids))
        flips = np.sort(margins[still])
        cap = float(np.nextafter(flips[allowed], -np.inf)) if inputs and allowed < len(flips) else np.inf
        lead = scores * scale - rivals
        shift = best_shift(lead[np.isfinite(lead)], Calibration(margins, spreads, count / len(ids), cap), settings)
        bias[position] += shift
        held_out[label] = scores * scale + shift
    return Rows(weight.astype(np.float32), bias.astype(np.float32)), held_out


def _scale(logits: Doubles, ids: Ints) -> float:
    """The factor with the least log loss (temperature scaling, Guo et al. 2017, arXiv 1706.04599)."""
    own = logits[np.arange(len(ids)), ids]
    losses = [float((log_sum_exp(scale * logits) - scale * own).mean()) for scale in _SCALES]
    return float(_SCALES[int(np.argmin(losses))])
