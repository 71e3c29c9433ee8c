"""Offset-logistic rows for new labels: every old row stays bit-identical.

Each label is fitted twice: first against the means of the old labels (Gaussian clouds), then also against the real old
inputs that the first row came nearest to and against the other new labels' examples. The second fit is cross-validated:
repeating it without each tenth of the label's own examples sets the bias and tells how well the label will be found.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patcher.fit.bias import Calibration, best_shift
from patcher.fit.model import Rows, log_sum_exp
from patcher.fit.offset import Cloud, RowLoss, fit_row, join, span
from patcher.fit.task import Task
from patcher.rounding import ROUNDED, rounding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patcher.arrays import Bools, Doubles, Floats, Ints
    from patcher.fit.settings import Settings

__all__ = ["NewRow", "offset_rows", "rows_of"]

_CALIBRATED_ON = 600
"""A row's bias is calibrated on this many of the nearest real inputs; those further away are out of its reach."""
_PARTS = 5
"""Number of folds in which real negatives are left out of the fit, to see how inputs fare that it did not see."""
_DRAWN_WIDER = 1.25
"""Factor on standard deviations if there are no real inputs: labels have longer tails than their Gaussians."""


@dataclass(frozen=True)
class NewRow:
    """A row on all features, float32 ``[width]``, and the new logit of each example from a fit without it ``[n]``.

    ``held_out`` leaves examples that repeat one another out together; the bias was set leaving out one at a time.
    ``taken`` INT64 ``[m]``: positions of the old inputs that the fit used and that would flip in a fit without them.
    """

    weight: Floats
    bias: np.float32
    held_out: Doubles
    taken: Ints


def rows_of(new: Mapping[str, NewRow]) -> Rows:
    """The rows alone, in the order of the labels."""
    weight = np.stack([row.weight for row in new.values()])
    return Rows(weight, np.array([row.bias for row in new.values()], np.float32))


@dataclass(frozen=True)
class _Scene(Task):
    """A task in whitened features; ``means`` stand for the old labels that the examples may be confused with."""

    means: Cloud

    def cloud(self, features: Floats, weights: Doubles) -> Cloud:
        """Inputs as clouds, whose offset, the logsumexp of the old logits, is what a new row has to beat."""
        points = self.old.whitening.of(features)
        spread = np.full(len(points), self.settings.positive_variance)
        if not self.head.exclusive:
            return Cloud(points, np.zeros(len(points)), np.zeros_like(points), spread, weights)
        logits = features.astype(np.float64) @ self.old.weight.T + self.old.bias
        offsets = log_sum_exp(logits)
        slopes = self.old.whitening.slopes(np.exp(logits - offsets[:, None]) @ self.old.weight)
        return Cloud(points, offsets, slopes, spread, weights)

    def raised(self, cloud: Cloud, rows: Sequence[Doubles]) -> Cloud:
        """The cloud with its offsets raised, so that other new ``rows``, bias last, have to be beaten as well."""
        if not rows or not self.head.exclusive:
            return cloud
        weight, bias = np.stack(rows)[:, :-1], np.stack(rows)[:, -1]
        logits = np.column_stack([cloud.offsets, cloud.points @ weight.T + bias])
        offsets = log_sum_exp(logits)
        shares = np.exp(logits - offsets[:, None])
        slopes = shares[:, :1] * cloud.slopes + shares[:, 1:] @ weight
        return dataclasses.replace(cloud, offsets=offsets, slopes=slopes)

    def hard(self, row: Doubles) -> Ints:
        """Positions of the real old inputs that a row comes nearest to."""
        if self.inputs is None or not self.settings.hard:
            return np.zeros(0, np.int64)
        row_of = self.old.whitening.row(row[:-1], float(row[-1]))
        return self.inputs.nearest(*row_of, self.head, self.settings.hard).places

    def negatives(self, places: Ints) -> list[Cloud]:
        """The real old inputs at ``places`` as negatives for a row; an empty list if there are none."""
        if self.inputs is None or not len(places):
            return []
        cloud = self.cloud(self.inputs.features[places], np.full(len(places), self.settings.hard_weight))
        slopes = self.slopes_of(self.inputs.ids[places])
        return [dataclasses.replace(cloud, slopes=slopes, variance=np.ones(len(slopes)))]

    def answers(self, places: Ints) -> tuple[Doubles, Bools]:
        """What a new logit has to beat at some real old inputs, and whether the current head answers them correctly."""
        if self.inputs is None or not self.head.exclusive:
            return np.zeros(len(places)), np.ones(len(places), np.bool_)
        best, logit = self.head.best(self.inputs.features[places])
        return logit.astype(np.float64), best == self.inputs.ids[places]

    def slopes_of(self, ids: Ints) -> Doubles:
        """Whitened rows of the labels at positions ``ids`` of the head; zeros with sigmoids, which do not compete."""
        found, back = np.unique(ids, return_inverse=True)
        rows = self.old.weight[found] if self.head.exclusive else np.zeros((len(found), self.head.width))
        slopes: Doubles = self.old.whitening.slopes(rows)[back]
        return slopes

    def calibration(
        self, row: Doubles, weight: Floats, bias: np.float32, budget: float, unseen: _Unseen
    ) -> Calibration | None:
        """Old inputs as a row sees them; if no inputs are kept, the labels' means stand in for them."""
        if self.inputs is None:
            margins = self.means.offsets - self.means.points @ row[:-1] - row[-1]
            spreads = _DRAWN_WIDER * np.linalg.norm(row[:-1] - self.means.slopes, axis=1)
            return Calibration(margins, spreads, 1.0, np.inf)
        count = max(_CALIBRATED_ON, 2 * int(budget * len(self.inputs)) + 1)
        near = self.inputs.nearest(weight, bias, self.head, count, unseen.places)
        # Logits are FP32: an input closer than their rounding error may end up on either side when served.
        near_features = self.inputs.features[near.places]
        close = float(rounding(near_features, weight[None], np.array([bias], np.float32)).max())
        # An input that the fit used lies further from the row than unseen inputs like it would.
        margins = near.margins.copy()
        seen = np.searchsorted(near.places, unseen.places) if len(unseen.places) else unseen.places
        margins[seen] = np.minimum(margins[seen], unseen.margins)
        cap = np.inf
        for weighs, mine in self.inputs.groups(near.places):
            right = np.flatnonzero(near.right & mine)
            right = right[np.argsort(margins[right], kind="stable")]
            spent = np.cumsum(self.inputs.weights[near.places[right]])
            may = int(np.searchsorted(spent, budget * weighs * (1.0 + ROUNDED), side="right"))
            if may < len(right):
                cap = min(cap, float(margins[right[may]]) - 2.0 * close)
            else:
                cap = min(cap, near.reach - 2.0 * close)  # nothing more is known about inputs beyond these
        spreads = np.linalg.norm(row[:-1] - self.slopes_of(self.inputs.ids[near.places]), axis=1)
        return Calibration(near.margins, spreads, len(self.head.labels) / len(self.inputs), cap)


@dataclass(frozen=True)
class _Unseen:
    """Old inputs that a fit used, with their ``margins`` in fits without them; ``places`` are ascending."""

    places: Ints
    margins: Doubles


def offset_rows(examples: Mapping[str, Floats], task: Task) -> dict[str, NewRow]:
    """Rows for new labels with ``examples`` float32 ``[n, width]`` each; every old row stays as it is."""
    old, settings = task.old, task.settings
    scene = _scene(examples, task)
    clouds = {label: scene.cloud(rows, np.full(len(rows), 1.0 / len(rows))) for label, rows in examples.items()}
    priors = {label: _prior(rows, task) for label, rows in examples.items()}
    rough = {label: _solve(cloud, scene.means, priors[label], settings) for label, cloud in clouds.items()}
    found = {}
    near = _rivals(clouds, rough, settings)
    rows = dict(rough)
    if task.heard:
        task.heard(0)
    for label, mine in clouds.items():
        hard = np.sort(scene.hard(rough[label]))
        rivals = [rows[other] for other in near[label]]
        against = [*scene.negatives(hard), scene.means, *(clouds[other].spread_by(1.0) for other in near[label])]
        outside = scene.raised(join(*against), rivals)
        firsts = _firsts(label, len(examples[label]), task)
        made = _fitted(scene.raised(mine, rivals), outside, priors[label], rough[label], len(hard), firsts, settings)
        weight, bias = old.whitening.row(made.row[:-1], float(made.row[-1]))
        others = [row for other, row in rows.items() if other != label]
        margins = made.held_out - _best(examples[label], others, task)
        best, right = scene.answers(hard)
        unseen = _Unseen(hard, best - made.unseen)
        seen = scene.calibration(made.row, weight, bias, task.max_flips / len(examples), unseen)
        shift = best_shift(margins[np.isfinite(margins)], seen, settings)
        rows[label] = np.append(made.row[:-1], made.row[-1] + shift)
        taken = hard[right & (unseen.margins < shift)]
        found[label] = NewRow(weight, np.float32(bias + shift), made.apart + shift, taken)
        if task.heard:
            task.heard(len(found))
    return found


def _firsts(label: str, count: int, task: Task) -> Ints:
    """The first example that each of ``count`` repeats, INT64 ``[count]``; the label's name may follow the examples."""
    firsts = np.arange(count)
    known = task.firsts.get(label, firsts)
    firsts[: len(known)] = known
    return firsts


def _scene(examples: Mapping[str, Floats], task: Task) -> _Scene:
    old, exclusive = task.old, task.head.exclusive
    near = _near(np.concatenate(list(examples.values())), task)
    offsets = log_sum_exp(old.means[near] @ old.weight.T + old.bias) if exclusive else np.zeros(len(near))
    rows = old.weight[old.places[near]] if exclusive else np.zeros((len(near), task.head.width))
    ones = np.ones(len(near))
    means = Cloud(old.points[near], offsets, old.whitening.slopes(rows), ones, ones)
    return _Scene(**vars(task), means=means)


def _near(examples: Floats, task: Task) -> Ints:
    """The known old labels that the examples may be confused with, as positions in ``task.old.means``."""
    old, settings = task.old, task.settings
    if len(old.means) <= settings.near_floor:
        return np.arange(len(old.means))
    logits = (examples @ old.weight[old.places].T.astype(np.float32)).max(axis=0) + old.bias[old.places]
    gaps = (old.means - examples.mean(axis=0)) / np.maximum(old.means.std(axis=0), 1e-9)
    distances = np.einsum("ij,ij->i", gaps, gaps)
    count = settings.near
    return np.union1d(np.argsort(-logits, kind="stable")[:count], np.argsort(distances, kind="stable")[:count])


def _rivals(clouds: Mapping[str, Cloud], rough: Mapping[str, Doubles], settings: Settings) -> dict[str, list[str]]:
    """For each new label, the other new labels that its examples may be confused with."""
    labels = list(clouds)
    if len(labels) <= settings.near_floor:
        return {label: [other for other in labels if other != label] for label in labels}
    rows = np.stack([rough[label] for label in labels])
    means = np.stack([cloud.points.mean(axis=0) for cloud in clouds.values()])
    found = {}
    for place, (label, cloud) in enumerate(clouds.items()):
        logits = (cloud.points @ rows[:, :-1].T + rows[:, -1]).max(axis=0)
        distances = ((means - means[place]) ** 2).sum(axis=1)
        nearest = [np.argsort(order, kind="stable")[: settings.near + 1] for order in (-logits, distances)]
        found[label] = [labels[other] for other in np.union1d(*nearest) if other != place]
    return found


def _prior(examples: Floats, task: Task) -> Doubles:
    """The row that the penalty pulls towards, in whitened features: zero, or one given by a rule.

    ``imprint`` (arXiv 1712.07136) is the examples' mean, scaled to the average length of an old row. ``lda`` is their
    whitened mean, scaled by the ratio of the average lengths of the old labels' rows and means.
    """
    head, old, white = task.head, task.old, task.old.whitening
    if task.settings.prior == "zero":
        return np.zeros(white.points.shape[1])
    lengths = np.linalg.norm(old.weight, axis=1)
    if task.settings.prior == "imprint":
        mean = np.zeros(head.width)
        mean[: head.split] = examples[:, : head.split].mean(axis=0)
        row: Doubles = (mean / np.linalg.norm(mean) * lengths.mean()) @ white.rows
        return row
    theirs = np.linalg.norm(white.slopes(old.weight[old.places]), axis=1).mean()
    point: Doubles = white.of(examples).mean(axis=0) * theirs / np.linalg.norm(old.points, axis=1).mean()
    return point


def _solve(inside: Cloud, outside: Cloud, prior: Doubles, settings: Settings) -> Doubles:
    axes = span(join(outside, inside), prior)
    loss = RowLoss(inside.turned(axes), outside.turned(axes), settings.penalty, prior @ axes)
    found = fit_row(loss, np.zeros(axes.shape[1] + 1))
    return np.append(axes @ found[:-1], found[-1])


@dataclass(frozen=True)
class _Fitted:
    """A row in whitened features, bias last, and cross-validated new logits: each input's from a fit without it.

    ``held_out`` float64 ``[n]`` are those of the examples, NaN if there is only one; ``apart`` ``[n]`` the same from
    fits without the examples that it repeats, either; ``unseen`` ``[m]`` those of the real negatives.
    """

    row: Doubles
    held_out: Doubles
    apart: Doubles
    unseen: Doubles


def _fitted(
    inside: Cloud, outside: Cloud, prior: Doubles, rough: Doubles, real: int, firsts: Ints, settings: Settings
) -> _Fitted:
    """Fit a row, starting from a ``rough`` one; the first ``real`` points of ``outside`` are real negatives."""
    axes = span(join(outside, inside), prior)
    inside, outside, prior = inside.turned(axes), outside.turned(axes), prior @ axes
    loss = RowLoss(inside, outside, settings.penalty, prior)
    found = fit_row(loss, np.append(rough[:-1] @ axes, rough[-1]))
    count = len(inside.weight)
    unseen = np.empty(real)
    inverse = np.linalg.inv(loss.curvature(found)) if count > 1 or real else None

    def left_out(groups: Ints) -> Doubles:
        logits, which = np.full(count, np.nan), np.unique(groups)
        for some in np.array_split(which, min(len(which), settings.folds)) if len(which) > 1 else ():
            fold = np.flatnonzero(np.isin(groups, some))
            rest = np.setdiff1d(np.arange(count), fold)
            without = RowLoss(inside.part(rest, 1.0 / len(rest)), outside, settings.penalty, prior)
            row = fit_row(without, found, inverse)
            logits[fold] = inside.points[fold] @ row[:-1] + row[-1]
        return logits

    held_out = left_out(np.arange(count))
    apart = held_out if len(np.unique(firsts)) == count else left_out(firsts)
    for first in range(min(real, _PARTS)):
        fold = np.arange(first, real, _PARTS)
        rest = np.setdiff1d(np.arange(len(outside.weight)), fold)
        without = RowLoss(inside, outside.part(rest), settings.penalty, prior)
        row = fit_row(without, found, inverse)
        unseen[fold] = outside.points[fold] @ row[:-1] + row[-1]
    return _Fitted(np.append(axes @ found[:-1], found[-1]), held_out, apart, unseen)


def _best(features: Floats, others: Sequence[Doubles], task: Task) -> Doubles:
    """What the examples have to beat: the best old logit or other new logit, whichever is larger; 0 for sigmoids."""
    if not task.head.exclusive:
        return np.zeros(len(features))
    best: Doubles = task.head.best(features)[1].astype(np.float64)
    if not others:
        return best
    points = task.old.whitening.of(features)
    return np.maximum(best, (points @ np.stack(others)[:, :-1].T + np.stack(others)[:, -1]).max(axis=1))
