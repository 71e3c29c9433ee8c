"""Refit all rows on old data and new examples, anchored to the current rows and stopped before it does harm.

The refit minimises softmax cross-entropy plus a penalty on the squared distance from the old rows (the anchor). The
final rows are then interpolated between old and refitted ones, as far as a held-out part of the old data allows (weight
interpolation against negative flips: Zhu et al. 2023, arXiv 2301.10546).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patcher.fit.holding_out import hold_out
from patcher.fit.minimise import minimise
from patcher.fit.model import Rows, log_sum_exp

if TYPE_CHECKING:
    from collections.abc import Mapping

    from patcher.arrays import Doubles, Floats, Ints
    from patcher.fit.inputs import OldInputs
    from patcher.fit.task import Task

__all__ = ["Anchored", "anchored_rows", "held_back"]

_STEPS = 60
_WAY = np.linspace(0.0, 1.0, 11)


@dataclass(frozen=True)
class Anchored:
    """All rows, old and new, and how far they moved: ``way`` is 0 at the old rows and 1 at the refitted ones."""

    rows: Rows
    way: float


def held_back(ids: Ints) -> Ints:
    """Positions of the replayed inputs that the refit does not see, INT64: a fifth of each label's inputs.

    ``ids`` are the labels of all replayed inputs. The held-back ones serve to choose the interpolation and to count
    flips. Labels with a single input are pooled, and a fifth of the pool is held back.
    """
    single = np.bincount(ids)[ids] == 1
    apart = hold_out(np.where(single, ids.max(initial=-1) + 1, ids))[1]
    return apart if len(apart) else np.arange(min(1, len(ids)))


def anchored_rows(examples: Mapping[str, Floats], start: Rows, task: Task, inputs: OldInputs) -> Anchored:
    """Refit on replayed ``inputs``, starting from ``start``: the head's rows, then another method's new rows.

    Every label has the same weight in the loss, however many of its inputs were replayed. Among the interpolation steps
    that flip at most ``max_flips`` of the held-back inputs, the most accurate one on them wins; on a tie, the shortest.
    """
    white = task.old.whitening
    unseen = held_back(inputs.ids)
    seen = np.setdiff1d(np.arange(len(inputs)), unseen)
    count = len(start.weight) - len(examples)
    features = np.concatenate([inputs.features[seen], *examples.values()])
    ids = np.concatenate(
        [inputs.ids[seen], np.repeat(np.arange(count, count + len(examples)), [*map(len, examples.values())])]
    )
    weights = 1.0 / np.bincount(ids, minlength=count + len(examples))[ids]
    began = np.column_stack([start.weight @ white.rows, start.bias + start.weight @ white.center])
    points = np.column_stack([white.of(features), np.ones(len(features))]).astype(np.float32)
    ended = _refit(points, ids, weights / weights.sum(), began, task.settings.anchor)
    best, rows, way = -1.0, start, 0.0
    before = inputs.features[unseen] @ start.weight[:count].T + start.bias[:count]
    right = before.argmax(axis=1) == inputs.ids[unseen]
    for share in _WAY:
        there = began + share * (ended - began)
        raw = there[:, :-1] @ white.points.T
        here = Rows(raw.astype(np.float32), (there[:, -1] - raw @ white.center).astype(np.float32)) if share else start
        good = (inputs.features[unseen] @ here.weight.T + here.bias).argmax(axis=1) == inputs.ids[unseen]
        if (right & ~good).mean() <= task.max_flips and good.mean() > best:
            best, rows, way = float(good.mean()), here, float(share)
    return Anchored(rows, way)


def _refit(points: Floats, ids: Ints, weights: Doubles, began: Doubles, anchor: float) -> Doubles:
    """The rows, bias last, float64 ``[C, r + 1]``, that minimise the weighted log loss plus the anchor's penalty."""
    shape = began.shape
    places = np.arange(len(ids))
    share = weights.astype(np.float32)[:, None]

    def loss(moved: Doubles) -> tuple[float, Doubles]:
        move = moved.reshape(shape)
        logits = points @ (began + move).T.astype(np.float32)
        total = log_sum_exp(logits)
        value = float(weights @ (total - logits[places, ids])) + 0.5 * anchor * float((move * move).sum())
        chance = np.exp(logits - total[:, None].astype(np.float32))
        chance[places, ids] -= 1.0
        slope = ((chance * share).T @ points).astype(np.float64) + anchor * move
        return value, slope.ravel()

    return began + minimise(loss, np.zeros(began.size), tolerance=1e-6, steps=_STEPS).reshape(shape)
