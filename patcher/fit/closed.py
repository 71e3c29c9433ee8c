"""Refits of all rows in closed form, from the memory's statistics alone: ridge regression and discriminant analysis.

Both change every row, so that old answers may change in either direction; the default method changes none. Ridge is the
regression of one-hot labels on the features (RanPAC, arXiv 2307.02251, without its random projection); discriminant
analysis is that of Gaussians with one covariance (streaming LDA, arXiv 1909.01520). Labels of few examples, be they new
or of earlier patches, weigh as much as a typical old one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patcher.fit.bias import Calibration, best_shift
from patcher.fit.minimise import minimise
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

_LEAST_SCALE, _FLAT = 0.05, 1e-4
_SCALED_ON = 1000
"""Inputs that the scale is found on: more of them would tell the same."""


def ridge_rows(
    examples: Mapping[str, Floats], memory: Memory, places: Ints, old: OldLabels, settings: Settings
) -> tuple[Doubles, Doubles, LeftOut]:
    """Ridge regression of one-hot labels, for old labels and new ones alike.

    Features are standardised and the constant is not penalised. ``places`` INT64 ``[C]`` are the head's labels in the
    memory. Returns rows float64 ``[C + K, width]``, biases ``[C + K]``, and for each new label the output of each of
    its examples in a regression without it, ``(y - h) / (1 - h)`` with the leverage ``h`` (Allen's PRESS).

    A label that an earlier patch brought has as few inputs in the memory, and would be forgotten beside the others:
    it counts as if it had as many as the median, all with its mean and the common spread.
    """
    counts = memory.counts[places].astype(np.float64)
    share = float(np.median(counts))
    added = np.maximum(share - counts, 0.0)
    center = old.whitening.center
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
    means = np.column_stack([(memory.sums[places] / counts[:, None] - center) / spread, np.ones(len(places))])
    if added.any():
        gram += (means * added[:, None]).T @ means
        gram[:-1, :-1] += added.sum() * memory.within() / np.outer(spread, spread)
    targets = [means * (counts + added)[:, None]]
    points = [np.column_stack([(rows - center) / spread, np.ones(len(rows))]) for rows in examples.values()]
    for mine in points:
        weight = share / len(mine)
        gram += weight * mine.T @ mine
        targets.append(weight * mine.sum(axis=0, keepdims=True))
    gram[np.arange(width), np.arange(width)] += settings.refit_ridge * (total + added.sum() + share * len(points))
    inverse = np.linalg.inv(gram)
    solved = np.concatenate(targets) @ inverse
    left_out = []
    for position, mine in enumerate(points, start=len(places)):
        leverage = (share / len(mine)) * np.einsum("ij,jk,ik->i", mine, inverse, mine)
        left_out.append((mine @ solved[position] - leverage) / np.maximum(1.0 - leverage, 1e-9))
    rows = solved[:, :-1] / spread
    return rows, solved[:, -1] - rows @ center, left_out


def lda_rows(
    examples: Mapping[str, Floats], memory: Memory, places: Ints, old: OldLabels, settings: Settings
) -> tuple[Doubles, Doubles, LeftOut]:
    """Linear discriminants with equal priors, in the covariance that the default method whitens by.

    Arguments and results as of ``ridge_rows``; an example is left out of its label's mean.

    The mean of ``n`` examples lies further out than the label's own, in expectation by the trace of its covariance over
    ``n`` (squared), which would cost a label of few examples most: the biases make up for it. A label that the backbone
    never saw is spread wider than those it was fine-tuned on, as ``positive_variance`` tells.
    """
    white = old.whitening
    spread = settings.positive_variance * float((white.points * (memory.within() @ white.points)).sum())
    points = [white.of(rows) for rows in examples.values()]
    means = [
        white.of(memory.sums[places] / memory.counts[places, None]),
        *(p.mean(axis=0, keepdims=True) for p in points),
    ]
    every = np.concatenate(means)
    numbers = np.concatenate([memory.counts[places], [len(mine) for mine in points]])
    biases = -0.5 * ((every * every).sum(axis=1) - spread / numbers)
    left_out = []
    for mine in points:
        count = len(mine)
        rest = (mine.sum(axis=0) - mine) / max(count - 1, 1)
        scores = (mine * rest).sum(axis=1) - 0.5 * ((rest * rest).sum(axis=1) - spread / max(count - 1, 1))
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
    *,
    biased: bool,
) -> tuple[Rows, dict[str, Doubles]]:
    """Closed-form rows as logits: brought to the scale that fits the real inputs best, the new biases by budget.

    Where the method has set the new biases (``biased``), they are only lowered, and only by what the budget asks for.
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
        seen = Calibration(margins, spreads, count / len(ids), cap)
        shift = min(0.0, cap) if biased else best_shift(lead[np.isfinite(lead)], seen, settings)
        bias[position] += shift
        held_out[label] = scores * scale + shift
    return Rows(weight.astype(np.float32), bias.astype(np.float32)), held_out


def _scale(logits: Doubles, ids: Ints) -> float:
    """The factor with the least log loss (temperature scaling, Guo et al. 2017, arXiv 1706.04599), convex in it."""
    every = slice(None, None, 1 + len(ids) // _SCALED_ON)
    logits, ids = logits[every], ids[every]
    own = logits[np.arange(len(ids)), ids]

    def loss(scale: Doubles) -> tuple[float, Doubles]:
        scaled = scale * logits
        total = log_sum_exp(scaled)
        expected = (np.exp(scaled - total[:, None]) * logits).sum(axis=1)
        return float((total - scale * own).mean()), np.array([(expected - own).mean()])

    # Without a floor, logits that tell nothing of the labels would turn them round.
    return max(float(minimise(loss, np.ones(1), tolerance=_FLAT)[0]), _LEAST_SCALE)
