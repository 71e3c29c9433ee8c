"""How much of each new label a patch finds: a count on held-out inputs, and a lower bound for all inputs like them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patcher.blocks import blocks
from patcher.flips import logits_after, upper_bound
from patcher.rounding import ROUNDED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patcher.arrays import Bools, Doubles, Floats, Ints
    from patcher.fit import Fit
    from patcher.fit.fitted import HeldOut
    from patcher.fit.inputs import Labelled
    from patcher.head import Head

__all__ = ["Recall", "count_found"]


@dataclass(frozen=True)
class Recall:
    """How many inputs of a new label are found, by a fit that saw neither them nor others that they repeat.

    Parameters
    ----------
    found, of
        ``found`` of the ``of`` different inputs.
    rate
        The share that is found, weighted by how many inputs each stands for; None if there are not two different ones.
    at_least
        One-sided lower bound of that share at 95 % confidence (Clopper-Pearson), for inputs drawn as these were.
    rival
        The label that took most of the inputs that were missed, or None. In a multi-label head none takes any.
    fresh
        Whether these are the label's inputs in the evaluation file, and not its examples.
    """

    found: int
    of: int
    rate: float | None
    at_least: float | None
    rival: str | None
    fresh: bool = False


def count_found(
    head: Head,
    fit: Fit,
    evaluation: Labelled | None,
    firsts: Mapping[str, Ints],
    weights: Mapping[str, Doubles],
) -> dict[str, Recall]:
    """The recall of each new label, on its inputs in ``evaluation`` if there are any, else on its held-out examples.

    ``firsts`` INT64 ``[n]`` is the first example that each one repeats, ``weights`` float64 ``[n]`` the number of
    inputs that it stands for (1 if missing), both by label.
    """
    found = {}
    every = (*head.labels, *fit.labels)
    for position, label in enumerate(fit.labels, start=len(head.labels)):
        if evaluation is not None and bool((evaluation.ids == position).any()):
            best, hit = _answers(evaluation.features[evaluation.ids == position], position, fit, head)
            rivals = [every[i] for i in best[~hit].tolist()] if head.exclusive else []
            found[label] = _counted(hit, np.ones(len(hit)), rivals, fresh=True)
        elif label in fit.held_out:
            found[label] = _held_out(fit.held_out[label], firsts.get(label), weights.get(label))
        else:
            found[label] = Recall(0, 0, None, None, None)
    return found


def _held_out(held: HeldOut, firsts: Ints | None, weights: Doubles | None) -> Recall:
    """The recall on held-out examples, of which those that repeat another count as one."""
    count = len(held.margins)
    weights = np.ones(count) if weights is None else weights
    places, groups = np.unique(np.arange(count) if firsts is None else firsts, return_inverse=True)
    if len(places) <= 1:
        return Recall(0, len(places), None, None, _most(held.rivals))
    hit = held.margins[places] > 0
    rivals = [held.rivals[i] for i in places[~hit].tolist()] if held.rivals else []
    # The weights of a group are averaged: if there are none, each group counts as one.
    return _counted(hit, np.bincount(groups, weights) / np.bincount(groups), rivals)


def _counted(hit: Bools, weights: Doubles, rivals: Sequence[str], *, fresh: bool = False) -> Recall:
    rate = float(np.average(hit, weights=weights))
    # As for flips: the bound for the effective numbers of inputs and of misses.
    size = float(weights.sum()) ** 2 / float((weights**2).sum())
    missed = math.ceil((1.0 - rate) * size - ROUNDED)
    at_least = 1.0 - upper_bound(missed, math.floor(size + ROUNDED))
    return Recall(int(hit.sum()), len(hit), rate, at_least, _most(rivals), fresh)


def _most(rivals: Sequence[str]) -> str | None:
    return Counter(rivals).most_common(1)[0][0] if rivals else None


def _answers(rows: Floats, position: int, fit: Fit, head: Head) -> tuple[Ints, Bools]:
    """For inputs of the new label at ``position``: the best label, INT64 ``[n]``, and whether that label is found."""
    best, hit = np.empty(len(rows), np.int64), np.empty(len(rows), np.bool_)
    for block in blocks(len(rows)):
        logits = logits_after(rows[block], head.logits(rows[block]), fit, head)
        best[block] = logits.argmax(axis=1)
        hit[block] = best[block] == position if head.exclusive else logits[:, position] > 0
    return best, hit
