"""Counts how many inputs of old labels flip under a fit, and bounds the rate for all inputs like them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from patcher.blocks import blocks
from patcher.fit.inputs import Labelled, old_inputs
from patcher.rounding import ROUNDED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from patcher.arrays import Bools, Floats, Ints
    from patcher.fit import Fit
    from patcher.fit.inputs import OldInputs
    from patcher.head import Head
    from patcher.memory import Memory

__all__ = ["CONFIDENCE", "Flips", "count_flips", "fewest_inputs", "logits_after", "upper_bound"]

CONFIDENCE = 0.95
_UNCOUNTABLE = 2**62
"""Stops the search for a sample size: a share that would need this many inputs is as good as 0."""


@dataclass(frozen=True)
class Flips:
    """The flips of a patch: inputs that were answered correctly before it and no longer are.

    Parameters
    ----------
    source, size, count
        ``count`` of the ``size`` inputs from ``source`` flip: ``eval``, ``replay`` or ``features`` of the memory.
        Nothing was counted if the source is ``draws`` or ``none``.
    losing, sizes
        Number of flips by old label, in descending order, and number of inputs by label.
    rate
        Share of the inputs that flip, each label weighted by its share of the data; None if nothing was counted.
    effective
        Effective sample size, ``(sum w)^2 / sum w^2`` (Kish, Survey Sampling, 1965).
    thresholds
        Number of new rows whose threshold was set on these same inputs; 1 if none was.
    refitted
        Whether these same inputs took part in a refit of the old rows. If so, the bound does not hold for fresh inputs.
    """

    source: str
    size: int = 0
    count: int = 0
    losing: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    rate: float | None = None
    effective: float = 0.0
    thresholds: int = 1
    refitted: bool = False

    @property
    def bound(self) -> float | None:
        """One-sided upper bound of the rate at 95 % confidence; None if nothing was counted.

        The Clopper-Pearson bound for the effective numbers of flips and inputs (Korn & Graubard, Survey Methodology,
        1998). A threshold set on these inputs stops just short of a flip. A single such row needs no correction: it is
        no worse than a row set without these inputs. For each further one, one flip is added.
        """
        if self.source not in ("eval", "replay", "features"):
            return None
        size = self.equal
        flips = math.ceil((self.rate or 0.0) * self.effective - ROUNDED)
        return upper_bound(flips + self.thresholds - 1, size)

    @property
    def equal(self) -> int:
        """``effective``, rounded down to a whole number of inputs."""
        return math.floor(self.effective + ROUNDED)

    @property
    def weighed(self) -> bool:
        """Whether the inputs have unequal weights."""
        return self.effective < self.size * (1.0 - ROUNDED)


def upper_bound(flips: int, size: int, confidence: float = CONFIDENCE) -> float:
    """One-sided Clopper-Pearson upper bound of a rate, from ``flips`` seen in ``size`` independent inputs.

    This is the rate at which ``flips`` or fewer would be seen with probability ``1 - confidence``, found by bisection
    on the binomial distribution. With no flips it is ``1 - (1 - confidence) ** (1 / size)``, about ``3 / size``.
    """
    if size <= 0 or flips >= size:
        return 1.0
    counts = np.arange(flips + 1)
    ways = math.lgamma(size + 1) - np.array([math.lgamma(k + 1) + math.lgamma(size - k + 1) for k in counts])
    low, high = flips / size, 1.0
    for _ in range(60):
        rate = 0.5 * (low + high)
        terms = ways + counts * math.log(rate) + (size - counts) * math.log1p(-rate)
        low, high = (rate, high) if float(np.exp(terms).sum()) > 1 - confidence else (low, rate)
    return high


def fewest_inputs(most: float, thresholds: int = 1) -> int:
    """The smallest number of equally weighted inputs that give a bound of at most ``most`` (> 0) if none flips.

    ``thresholds`` is that of ``Flips``: more thresholds need more inputs.
    """
    enough = 1
    while enough < _UNCOUNTABLE and upper_bound(thresholds - 1, enough) > most:
        enough *= 2
    few = enough // 2
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (middle, enough) if upper_bound(thresholds - 1, middle) > most else (few, middle)
    return enough


def count_flips(
    head: Head,
    fit: Fit,
    memory: Memory | None,
    evaluation: Labelled | None,
) -> list[Flips]:
    """Flips on each set of inputs, best first: the first gives the bound, but the gate checks every set."""
    counted = []
    if evaluation is not None:
        found = _on_evaluation(head, fit, evaluation)
        counted += [found] if found.size else []
    for each in fit.counted:
        flipped = _flipped(each.inputs, head, fit)
        found = _counted(each.inputs, np.union1d(flipped, each.taken), head, thresholds=len(fit.labels))
        found = replace(found, refitted=fit.old_rows is not None)
        if each.inputs.source == "features":
            found = _in_full(found, each.inputs.ids[np.setdiff1d(each.taken, flipped)], head, fit, memory)
        counted.append(found)
    return counted or [Flips("none" if memory is None else "draws")]


def _counted(inputs: OldInputs, lost: Ints, head: Head, thresholds: int = 1) -> Flips:
    losing = Counter(head.labels[i] for i in inputs.ids[lost].tolist())
    sizes = Counter(head.labels[i] for i in inputs.ids.tolist())
    total = float(inputs.weights.sum())
    return Flips(
        inputs.source,
        len(inputs),
        len(lost),
        dict(losing.most_common()),
        sizes,
        rate=float(inputs.weights[lost].sum()) / total,
        effective=total**2 / float((inputs.weights**2).sum()),
        thresholds=thresholds,
    )


def _in_full(found: Flips, taken: Ints, head: Head, fit: Fit, memory: Memory | None) -> Flips:
    """With many labels, the count samples the memory's inputs. For labels that lose some, recount on all of theirs.

    ``taken`` INT64 ``[m]`` are the labels of the sampled inputs that flip only in a fit without them. They count here
    as well. The new row was fitted without the inputs outside the sample.
    """
    if memory is None or len(memory.sample) <= found.size or not head.exclusive:
        return found
    inputs = old_inputs(memory, None, head, only=found.losing) if found.losing else None
    if inputs is None:
        return found
    whole = _counted(inputs, _flipped(inputs, head, fit), head)
    losing = Counter(whole.losing) + Counter(head.labels[i] for i in taken.tolist())
    return replace(found, losing=dict(losing.most_common()), sizes={**found.sizes, **whole.sizes})


def _on_evaluation(head: Head, fit: Fit, evaluation: Labelled) -> Flips:
    old = len(head.labels)
    if head.exclusive:
        mine = evaluation.ids < old
        inputs = old_inputs(None, Labelled(evaluation.features[mine], evaluation.ids[mine]), head, "eval")
        return Flips("eval") if inputs is None else _counted(inputs, _flipped(inputs, head, fit), head)
    rows, theirs = _texts(evaluation, old + len(fit.labels))
    known = np.flatnonzero(theirs[:, :old].any(axis=1))
    new = rows[known] @ fit.weight.T + fit.bias
    lost = known[((new > 0) & ~theirs[known, old:]).any(axis=1)]
    losing = Counter(head.labels[i] for i in theirs[lost, :old].argmax(axis=1).tolist())
    sizes = dict(zip(head.labels, theirs[:, :old].sum(axis=0).tolist(), strict=True))
    size, count = len(known), len(lost)
    rate = count / size if size else None
    return Flips("eval", size, count, dict(losing.most_common()), sizes, rate, effective=size)


def _texts(data: Labelled, labels: int) -> tuple[Floats, Bools]:
    """Merge adjacent rows of the same text: features float32 ``[t, width]``, and which labels each has ``[t, labels]``.

    Multi-label data has one row for each label of a text.
    """
    features, ids = data
    first = np.ones(len(ids), np.bool_)
    first[1:] = (features[1:] != features[:-1]).any(axis=1)
    theirs = np.zeros((int(first.sum()), labels), np.bool_)
    theirs[np.cumsum(first) - 1, ids] = True
    return features[first], theirs


def _flipped(inputs: OldInputs, head: Head, fit: Fit) -> Ints:
    """Indices of the inputs that flip; for a multi-label head, of the inputs that a new label claims."""
    rival = (inputs.features @ fit.weight.T + fit.bias).max(axis=1)
    if (
        not head.exclusive
    ):  # multi-label: no label displaces another, so the harm is a new label on an input it does not belong to
        return np.flatnonzero(rival > 0)
    # If the old rows are unchanged, an input whose own logit is at least every new one cannot flip. Only the few others
    # need the logits of all labels.
    near = np.arange(len(inputs)) if fit.old_rows is not None else np.flatnonzero(rival > inputs.own)
    lost = np.empty(len(near), np.bool_)
    for block in blocks(len(near)):
        rows, ids = inputs.features[near[block]], inputs.ids[near[block]]
        before = head.logits(rows)
        after = logits_after(rows, before, fit, head)
        lost[block] = (before.argmax(axis=1) == ids) & (after.argmax(axis=1) != ids)
    places: Ints = near[lost]
    return places


def logits_after(rows: Floats, before: Floats, fit: Fit, head: Head) -> Floats:
    """Logits of the old labels and then the new ones, float32 ``[n, C + K]``; ``before`` are the unpatched head's."""
    if fit.old_rows is None:
        return np.concatenate([before, rows @ fit.weight.T + fit.bias], axis=1)
    after: Floats = fit.apply(head).logits(rows)
    return after
