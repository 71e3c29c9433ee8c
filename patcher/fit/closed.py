"""Closed-form refits of the old rows from the memory's statistics: ridge regression and linear discriminants.

Unlike the default method, both change every row, so old answers may change in either direction. In return, the old
labels use all features, too. Ridge regresses one-hot labels on the features (RanPAC, arXiv 2307.02251, without its
random projection). Discriminant analysis assumes Gaussians with a shared covariance (streaming LDA, arXiv 1909.01520).

For a label with few examples an offset-logistic row is more accurate. The new labels and the labels with few examples
that earlier patches added therefore get such a row, fitted against the refitted rows of the others.
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
"""Number of real inputs on which rows are scaled and compared; more would not change the result."""
_OTHER = 0.1
"""Two sets of rows count as the same if at most this share of their logits' variance is not common to both.

Measured: 0.5 to 0.7 between fine-tuned and refitted rows. Each patch after a refit adds 0.001 with a hundred labels and
0.06 with eight.
"""
_FEW = 0.5
"""A label has few examples if it has less than this share of the median label's."""


def closed_rows(
    method: str, examples: Mapping[str, Floats], task: Task, memory: Memory
) -> tuple[Rows, dict[str, NewRow]]:
    """Rows of the new labels, preceded by those of all old labels if these change, and details of the new rows.

    ``examples`` are float32 ``[n, width]`` by new label; ``method`` is ``ridge`` or ``lda``; ``memory`` is the task's
    and must know all labels of the head.
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
    """Rows from ``lda_rows``, scaled to logits, for labels without a head; the memory must know all of them."""
    weight = np.zeros((len(labels), memory.width), np.float32)
    nothing = Head.from_linear(labels, weight, weight[:, 0], memory.width, "")
    places = np.array([memory.labels.index(label) for label in labels], np.int64)
    old = from_memory(memory, nothing, settings)
    return Rows(*_scaled(lda_rows(memory, places, old, settings), old, old_inputs(memory, None, nothing)))


def _are_there(found: Found, kept: Ints, task: Task) -> bool:
    """Whether the head's rows already give the logits that a refit would give, up to their scale.

    If they do, the rows stay: another refit would only flip a few answers back and forth.
    """
    features = _some(task.inputs, task.old)[0]
    weight, bias = found[0][kept].astype(np.float32), found[1][kept].astype(np.float32)
    theirs, ours = task.head.logits(features)[:, kept], features @ weight.T + bias
    theirs, ours = (logits - logits.mean(axis=1, keepdims=True) for logits in (theirs, ours))
    common = float((theirs * ours).sum()) ** 2
    return common >= (1.0 - _OTHER) * float((theirs**2).sum() * (ours**2).sum())


def _few(head: Head, memory: Memory, places: Ints) -> dict[str, Floats]:
    """Features of the labels that have few examples, all of which are in the memory's sample."""
    least = _FEW * float(np.median(memory.counts[places]))
    found = {}
    for label, place in zip(head.labels, places.tolist(), strict=True):
        if memory.counts[place] < least and len(held := memory.features_of(label)) == memory.counts[place]:
            found[label] = held
    return found


def _of(task: Task, kept: Ints, rows: Rows) -> Task:
    """The same task with a head that has only the labels at ``kept``, with other ``rows``."""
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
    """Features and label positions of some real inputs, or of the labels' means if there are none."""
    if inputs is None:
        return old.means.astype(np.float32), old.places
    # Drawn at random: if labels alternate in the data, every k-th input may belong to the same label.
    some = np.sort(np.random.default_rng(0).permutation(len(inputs))[:_LOOKED_AT])
    return inputs.features[some], inputs.ids[some]


def ridge_rows(memory: Memory, places: Ints, old: OldLabels, settings: Settings) -> Found:
    """Ridge regression of one-hot labels.

    Features are standardised and the intercept is not penalised. ``places`` INT64 ``[C]`` are the positions of the
    head's labels in the memory. Returns rows float64 ``[C, width]`` and biases ``[C]``.

    A label with few inputs would be drowned out by the others. It is topped up to the median count with virtual inputs
    that have its mean and the shared within-label covariance.
    """
    counts = memory.counts[places].astype(np.float64)
    added = np.maximum(float(np.median(counts)) - counts, 0.0)
    center = old.whitening.center
    total = memory.counts.sum()
    spread = np.sqrt(np.maximum(np.diag(memory.second_moment) / total - center**2, 0.0))
    spread = np.maximum(spread, 1e-6 * max(float(spread.max()), 1e-6))
    width = len(center)
    # Of centred inputs, so that they are orthogonal to the intercept.
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
    """Linear discriminants with equal priors, under the covariance that the default method whitens by.

    Arguments and results are those of ``ridge_rows``. The squared norm of a mean of ``n`` inputs exceeds that of the
    true mean by ``trace(covariance) / n`` in expectation, which would cost labels with few inputs most; the biases
    correct for it. Such labels spread wider than those that the backbone saw, by ``settings.positive_variance``.
    """
    white = old.whitening
    within = memory.within().astype(np.float32)
    spread = settings.positive_variance * float((white.points * (within @ white.points)).sum())
    means = old.points  # of all labels of the head: the memory knows every one
    rows = means @ white.points.T
    biases = -0.5 * ((means * means).sum(axis=1) - spread / memory.counts[places])
    return rows, biases - rows @ white.center


def _scaled(found: Found, old: OldLabels, inputs: OldInputs | None) -> tuple[Floats, Floats]:
    """Scale rows so that they give logits: the scale that best fits some real inputs, or else the labels' means."""
    weight, bias = found
    features, ids = _some(inputs, old)
    scale = _scale(features.astype(np.float64) @ weight.T + bias, ids)
    return (weight * scale).astype(np.float32), (bias * scale).astype(np.float32)


def _scale(logits: Doubles, ids: Ints) -> float:
    """The factor of least log loss, a convex problem (temperature scaling, Guo et al. 2017, arXiv 1706.04599)."""
    own = logits[np.arange(len(ids)), ids]

    def loss(scale: Doubles) -> tuple[float, Doubles]:
        scaled = scale * logits
        total = log_sum_exp(scaled)
        expected = (np.exp(scaled - total[:, None]) * logits).sum(axis=1)
        return float((total - scale * own).mean()), np.array([(expected - own).mean()])

    # Without a floor, uninformative logits could get a negative scale, which would reverse the ranking of the labels.
    return max(float(minimise(loss, np.ones(1), tolerance=_FLAT)[0]), _LEAST_SCALE)
