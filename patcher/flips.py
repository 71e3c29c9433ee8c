"""How many inputs of old labels a fit takes from them, and what such a count says of all inputs like those."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from patcher.fit.inputs import OldInputs, old_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from patcher.fit import Fit
    from patcher.head import Head
    from patcher.memory import Memory

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

__all__ = ["CONFIDENCE", "Flips", "count_flips", "logits_after", "upper_bound"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Flips:
    """Inputs that were answered rightly and are no longer.

    ``count`` of ``size`` inputs, those of ``calibration``: ``eval``, ``replay`` or ``features`` of the memory. Nothing
    was counted where it is ``draws`` or ``none``. ``losing`` are the flips by old label, most first.
    """

    calibration: str
    size: int
    count: int
    losing: Mapping[str, int]
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Inputs of each label, where one that is right can be lost to another."""

    @property
    def rate(self) -> float | None:
        """Share of the inputs that flip; None where nothing was counted."""
        return self.count / self.size if self.size else None


def upper_bound(flips: int, size: int, confidence: float = CONFIDENCE) -> float:
    """One-sided Clopper-Pearson upper bound of a rate, from ``flips`` seen in ``size`` independent inputs.

    The rate at which so few flips, or fewer, would be seen with probability ``1 - confidence``; found by bisection on
    the binomial distribution. With no flips it is ``1 - (1 - confidence) ** (1 / size)``, about ``3 / size``.
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


def count_flips(
    head: Head,
    fit: Fit,
    memory: Memory | None,
    evaluation: tuple[Floats, Ints] | None,
) -> list[Flips]:
    """On the best inputs there are, which the bound comes from, and on all others: none may hide what another shows."""
    counted = []
    if evaluation is not None:
        found = _on_evaluation(head, fit, *evaluation)
        counted += [found] if found.size else []
    remembered = old_inputs(memory, None, head) if fit.inputs and fit.inputs.source == "replay" else None
    for inputs in (fit.inputs, remembered):
        if inputs is not None:
            lost = inputs.ids[_flipped(inputs, head, fit)]
            counted.append(_counted(inputs.source, len(inputs), lost, head, inputs.ids))
    return counted or [Flips("none" if memory is None else "draws", 0, 0, {})]


def _counted(source: str, size: int, lost: Ints, head: Head, ids: Ints | None = None) -> Flips:
    counts = Counter(head.labels[i] for i in lost.tolist())
    sizes = Counter(head.labels[i] for i in ids.tolist()) if ids is not None and head.problem == "single_label" else {}
    return Flips(source, size, len(lost), dict(counts.most_common()), sizes)


def _on_evaluation(head: Head, fit: Fit, features: Floats, ids: Ints) -> Flips:
    old = len(head.labels)
    if head.problem == "single_label":
        mine = ids < old
        inputs = old_inputs(None, (features[mine], ids[mine]), head, "eval")
        lost = inputs.ids[_flipped(inputs, head, fit)] if inputs else ids[:0]
        return _counted("eval", int(mine.sum()), lost, head, ids[mine])
    rows, theirs = _sentences(features, ids, old + len(fit.labels))
    known = theirs[:, :old].any(axis=1)
    new = logits_after(rows[known], head.logits(rows[known]), fit, head)[:, old:]
    lost = ((new > 0) & ~theirs[known, old:]).any(axis=1)
    return _counted("eval", int(known.sum()), theirs[known][lost, :old].argmax(axis=1), head)


def _sentences(features: Floats, ids: Ints, labels: int) -> tuple[Floats, Bools]:
    """Each sentence once, float32 ``[t, width]``, with its labels ``[t, labels]``, from a row for each of them."""
    first = np.ones(len(ids), np.bool_)
    first[1:] = (features[1:] != features[:-1]).any(axis=1)
    theirs = np.zeros((int(first.sum()), labels), np.bool_)
    theirs[np.cumsum(first) - 1, ids] = True
    return features[first], theirs


def _flipped(inputs: OldInputs, head: Head, fit: Fit) -> Ints:
    """Places of the inputs that were answered rightly and are no longer."""
    single = head.problem == "single_label"
    # Where no old row changes, an input that its own label holds against every new row is lost to none of them: few
    # need the logits of all labels.
    near = np.arange(len(inputs))
    if fit.old_rows is None:
        rival = (inputs.features @ fit.weight.T + fit.bias).max(axis=1)
        near = np.flatnonzero(rival > (inputs.own if single else 0.0))
    rows, ids = inputs.features[near], inputs.ids[near]
    before = head.logits(rows)
    after = logits_after(rows, before, fit, head)
    if single:
        lost = (before.argmax(axis=1) == ids) & (after.argmax(axis=1) != ids)
    else:  # no label displaces another here: a new one that shows up where it does not belong is the harm
        lost = (after[:, before.shape[1] :] > 0).any(axis=1)
    places: Ints = near[lost]
    return places


def logits_after(rows: Floats, before: Floats, fit: Fit, head: Head) -> Floats:
    """Logits of the old labels and the new ones, float32 ``[n, C + K]``; ``before`` are the head's as it was."""
    if fit.old_rows is None:
        return np.concatenate([before, rows @ fit.weight.T + fit.bias], axis=1)
    after: Floats = fit.apply(head).logits(rows)
    return after
