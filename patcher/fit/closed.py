"""Refits of the old rows in closed form, from the memory's statistics alone: ridge regression and discriminants.

Both change every row, so that old answers may change in either direction; the default method changes none. What they
gain is that the old labels, too, see all features. Ridge is the regression of one-hot labels on the features (RanPAC,
arXiv 2307.02251, without its random projection); discriminant analysis is that of Gaussians with one covariance
(streaming LDA, arXiv 1909.01520). A label of few examples is told better by an offset-logistic row, so those get one,
against the refitted rows of the others: the new labels, and the ones that earlier patches brought.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from patcher.fit.inputs import old_inputs, own_logits
from patcher.fit.logistic import offset_rows, rows_of
from patcher.fit.minimise import minimise
from patcher.fit.model import OldLabels, Rows, from_memory, full_rows, log_sum_exp
from patcher.fit.settings import SETTINGS, Settings
from patcher.head import Head

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patcher.arrays import Doubles, Floats, Ints
    from patcher.fit.inputs import OldInputs
    from patcher.fit.logistic import NewRow
    from patcher.fit.task import Task
    from patcher.memory import Memory

    Found = tuple[Doubles, Doubles]

__all__ = ["closed_rows", "discriminants", "lda_rows", "ridge_rows"]

_LEAST_SCALE, _FLAT = 0.05, 1e-4
_LOOKED_AT = 1000
"""Real inputs on which rows are scaled and compared: more of them would tell the same."""
_OTHER = 0.1
"""Rows are the same where this share of their logits' variance at most is not common to both.

Measured: 0.5 to 0.7 between fine-tuned rows and refitted ones; with each patch after a refit 0.001 more among a
hundred labels, 0.06 among eight.
"""
_FEW = 0.5
"""A label has few examples that has less than this share of what the median label has."""


def closed_rows(
    method: str, examples: Mapping[str, Floats], task: Task, memory: Memory
) -> tuple[Rows, dict[str, NewRow]]:
    """Rows of the new labels, behind those of all old ones where they change, and more about those of the new ones.

    ``examples`` float32 ``[n, width]`` by new label, ``method`` ``ridge`` or ``lda``; ``memory`` is the task's and
    knows all labels of the head.
    """
    head, settings = task.head, task.settings
    place = {label: i for i, label in enumerate(memory.labels)}
    places = np.array([place[label] for label in head.labels], np.int64)
    found = {"ridge": ridge_rows, "lda": lda_rows}[method](memory, places, task.old, settings)
    few = _few(head, memory, places)
    kept = np.array([i for i, label in enumerate(head.labels) if label not in few], np.int64)
    task = dataclasses.replace(task, settings=dataclasses.replace(settings, taken_weight=settings.refit_taken_weight))
    if _are_there(found, kept, task):
        new = offset_rows(examples, task)
        return rows_of(new), new
    weight, bias = _scaled(found, task.old, task.inputs)
    budget = task.max_flips * (len(few) + len(examples)) / len(examples)
    known = _of(task, kept, Rows(weight[kept], bias[kept]))
    new = offset_rows({**few, **examples}, dataclasses.replace(known, max_flips=budget))
    for label in few:
        at = head.labels.index(label)
        weight[at], bias[at] = new[label].weight, new[label].bias
    mine = {label: new[label] for label in examples}
    rows = rows_of(mine)
    return Rows(np.concatenate([weight, rows.weight]), np.concatenate([bias, rows.bias])), mine


def discriminants(memory: Memory, labels: Sequence[str], settings: Settings = SETTINGS) -> Rows:
    """Rows for labels of which nothing is known but a memory, which knows them all: ``lda_rows``, as logits."""
    weight = np.zeros((len(labels), memory.width), np.float32)
    nothing = Head.from_linear(labels, weight, weight[:, 0], memory.width, "")
    places = np.array([memory.labels.index(label) for label in labels], np.int64)
    old = from_memory(memory, nothing, settings)
    return Rows(*_scaled(lda_rows(memory, places, old, settings), old, old_inputs(memory, None, nothing)))


def _are_there(found: Found, kept: Ints, task: Task) -> bool:
    """Whether the head's own rows say about the same, but for their scale, as they do once it was refitted.

    To refit it again would only flip a few answers to and fro, so then its rows stay.
    """
    features = _some(task.inputs, task.old)[0]
    weight, bias = found[0][kept].astype(np.float32), found[1][kept].astype(np.float32)
    theirs, ours = task.head.logits(features)[:, kept], features @ weight.T + bias
    theirs, ours = (logits - logits.mean(axis=1, keepdims=True) for logits in (theirs, ours))
    common = float((theirs * ours).sum()) ** 2
    return common >= (1.0 - _OTHER) * float((theirs**2).sum() * (ours**2).sum())


def _few(head: Head, memory: Memory, places: Ints) -> dict[str, Floats]:
    """Features of the labels that have few examples and whose memory holds them all."""
    least = _FEW * float(np.median(memory.counts[places]))
    found = {}
    for label, place in zip(head.labels, places.tolist(), strict=True):
        if memory.counts[place] < least and len(held := memory.features_of(label)) == memory.counts[place]:
            found[label] = held
    return found


def _of(task: Task, kept: Ints, rows: Rows) -> Task:
    """The task where the head knows some of its labels only, by other ``rows``."""
    head, old, inputs = task.head, task.old, task.inputs
    head = dataclasses.replace(head, labels=tuple(head.labels[i] for i in kept), order=head.order[kept])
    head = head.refitted(rows.weight, rows.bias)
    mine = np.isin(old.places, kept)
    weight, bias = (array.astype(np.float64) for array in full_rows(head))
    old = OldLabels(old.whitening, old.means[mine], np.searchsorted(kept, old.places[mine]), weight, bias)
    if inputs is not None:
        part = inputs.part(np.flatnonzero(np.isin(inputs.ids, kept)))
        ids = np.searchsorted(kept, part.ids)
        inputs = dataclasses.replace(part, ids=ids, own=own_logits(part.features, ids, head))
    return dataclasses.replace(task, head=head, old=old, inputs=inputs)


def _some(inputs: OldInputs | None, old: OldLabels) -> tuple[Floats, Ints]:
    """Features and ids of some real inputs, or else the labels' means."""
    if inputs is None:
        return old.means.astype(np.float32), old.places
    # Drawn at random: of labels written in turn, each so many-th input may be of one label alone.
    some = np.sort(np.random.default_rng(0).permutation(len(inputs))[:_LOOKED_AT])
    return inputs.features[some], inputs.ids[some]


def ridge_rows(memory: Memory, places: Ints, old: OldLabels, settings: Settings) -> Found:
    """Ridge regression of one-hot labels.

    Features are standardised and the constant is not penalised. ``places`` INT64 ``[C]`` are the head's labels in the
    memory. Returns rows float64 ``[C, width]`` and biases ``[C]``.

    A label of few inputs would be forgotten beside the others: it counts as if it had as many as the median, all with
    its mean and the common spread.
    """
    counts = memory.counts[places].astype(np.float64)
    added = np.maximum(float(np.median(counts)) - counts, 0.0)
    center = old.whitening.center
    total = memory.counts.sum()
    spread = np.sqrt(np.maximum(np.diag(memory.second_moment) / total - center**2, 0.0))
    spread = np.maximum(spread, 1e-6 * max(float(spread.max()), 1e-6))
    width = len(center)
    # Of inputs less their centre, so that the constant is at right angles to them.
    gram = (memory.second_moment - total * np.outer(center, center)) / np.outer(spread, spread)
    means = (memory.sums[places] / counts[:, None] - center) / spread
    targets = np.column_stack([means, np.ones(len(places))]) * (counts + added)[:, None]
    sums = (means * added[:, None]).sum(axis=0)
    whole = np.zeros((width + 1, width + 1))
    whole[:-1, :-1] = gram + (means * added[:, None]).T @ means
    whole[:-1, -1] = whole[-1, :-1] = sums
    whole[-1, -1] = total + added.sum()
    if added.any():
        whole[:-1, :-1] += added.sum() * memory.within() / np.outer(spread, spread)
    whole[np.arange(width), np.arange(width)] += settings.refit_ridge * whole[-1, -1]
    solved = np.linalg.solve(whole, targets.T).T
    rows = solved[:, :-1] / spread
    return rows, solved[:, -1] - rows @ center


def lda_rows(memory: Memory, places: Ints, old: OldLabels, settings: Settings) -> Found:
    """Linear discriminants with equal priors, in the covariance that the default method whitens by.

    Arguments and results as of ``ridge_rows``. The mean of ``n`` inputs lies further out than the label's own, in
    expectation by the trace of its covariance over ``n`` (squared), which would cost a label of few inputs most: the
    biases make up for it. Those are spread wider than labels that the backbone saw, as ``positive_variance`` tells.
    """
    white = old.whitening
    within = memory.within().astype(np.float32)
    spread = settings.positive_variance * float((white.points * (within @ white.points)).sum())
    means = old.points  # of the labels of the head, which the memory knows all
    rows = means @ white.points.T
    biases = -0.5 * ((means * means).sum(axis=1) - spread / memory.counts[places])
    return rows, biases - rows @ white.center


def _scaled(found: Found, old: OldLabels, inputs: OldInputs | None) -> tuple[Floats, Floats]:
    """Rows as logits: brought to the scale that fits the real inputs best, or else the labels' means."""
    weight, bias = found
    features, ids = _some(inputs, old)
    scale = _scale(features.astype(np.float64) @ weight.T + bias, ids)
    return (weight * scale).astype(np.float32), (bias * scale).astype(np.float32)


def _scale(logits: Doubles, ids: Ints) -> float:
    """The factor with the least log loss (temperature scaling, Guo et al. 2017, arXiv 1706.04599), convex in it."""
    own = logits[np.arange(len(ids)), ids]

    def loss(scale: Doubles) -> tuple[float, Doubles]:
        scaled = scale * logits
        total = log_sum_exp(scaled)
        expected = (np.exp(scaled - total[:, None]) * logits).sum(axis=1)
        return float((total - scale * own).mean()), np.array([(expected - own).mean()])

    # Without a floor, logits that tell nothing of the labels would turn them round.
    return max(float(minimise(loss, np.ones(1), tolerance=_FLAT)[0]), _LEAST_SCALE)
