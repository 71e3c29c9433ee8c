"""The gate that a patch has to pass: what it would break, what it would find, and how certain both figures are."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.blocks import blocks
from patcher.flips import Flips, count_flips, logits_after, upper_bound
from patcher.gate_words import FEW, WHOSE, advice, asides, bound_words, count_words, sentence, unseen, weight_words
from patcher.limits import MAX_FLIPS, MIN_RECALL
from patcher.screening import known_already, repeats
from patcher.wording import percent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patcher.arrays import Bools, Doubles, Floats, Ints
    from patcher.fit import Fit
    from patcher.fit.inputs import Labelled
    from patcher.head import Head
    from patcher.memory import Memory
    from patcher.screening import Known, Repeat

__all__ = ["Verdict", "judge"]

_MOST_OF_ONE = 0.25
_FEWEST_LOST = 3
"""A patch takes over an old label if at least this many of its inputs flip, and more than the share ``_MOST_OF_ONE``.

The limit ``max_flips`` replaces that share if it is larger. A label with just two inputs is taken over if both flip.
The number of inputs of other labels does not matter.
"""
_FEWEST_INPUTS = 10
"""Fewer inputs than this prove too little: with no flip among nine, the upper bound is still 28 %."""


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Parameters
    ----------
    passed, sentence
        Whether the patch passed, and the verdict in one sentence.
    reasons, advice
        Why the patch was refused (empty if it passed), and what would improve it.
    calibration, calibration_size
        The inputs on which flips were counted, and their number: ``eval``, ``replay``, ``features`` of the memory,
        ``draws`` from its Gaussians (nothing counted, no guarantee), or ``none``.
    flipped, flips, flips_upper_bound, bound
        The number of those inputs that flip; their weighted rate (None if nothing could be counted); its one-sided
        upper bound at 95 % confidence (None if there is no bound); and what the bound means, in words.
    refitted
        Whether the inputs took part in a refit of the old rows. If so, the bound is too low for fresh inputs.
    estimated_recall
        For each new label, the share of its inputs in the evaluation file that are found. Without such inputs, the
        share of its examples that a fit without them finds; None if there is only one example.
    confused_with
        For each new label, the label that took most of the inputs it missed, or None.
    losing
        Number of flips by old label, in descending order.
    duplicates
        Examples that repeat an earlier one.
    known
        Examples that the old head already assigns to an old label with confidence.
    too_few
        New labels with fewer than five examples.
    """

    passed: bool
    sentence: str
    reasons: tuple[str, ...]
    advice: tuple[str, ...]
    calibration: str
    calibration_size: int
    flipped: int
    flips: float | None
    flips_upper_bound: float | None
    bound: str
    estimated_recall: Mapping[str, float | None]
    confused_with: Mapping[str, str | None]
    losing: Mapping[str, int]
    duplicates: tuple[Repeat, ...]
    known: tuple[Known, ...]
    too_few: tuple[str, ...]
    refitted: bool = False

    @property
    def harm(self) -> str:
        """A short summary of the flips; ``bound`` is the full explanation."""
        if self.flips_upper_bound is None:
            return self.bound
        counted = f"{self.flipped} of {self.calibration_size} {WHOSE[self.calibration]}"
        if self.refitted:
            return f"{counted}, which took part in the refit; of fresh ones more may (--eval FILE bounds that)"
        return f"{counted}; at most {percent(self.flips_upper_bound, up=True)} of inputs like them (95 % confidence)"

    def refusal(self, what: str) -> str:
        """The message if the gate refused ``what``, a patch or a merge: the reasons and the advice, a line each."""
        lines = (*self.reasons, *self.advice, "`--force` (force=True) publishes anyway")
        return f"the gate refused the {what}:" + "".join(f"\n          {line}" for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary for JSON."""
        return dataclasses.asdict(self)


def judge(
    head: Head,
    fit: Fit,
    examples: Mapping[str, Floats],
    memory: Memory | None,
    *,
    evaluation: Labelled | None = None,
    texts: Mapping[str, Sequence[str]] | None = None,
    repeated: Sequence[Repeat] = (),
    left_out: Mapping[str, int] | None = None,
    weights: Mapping[str, Doubles] | None = None,
    max_flips: float = MAX_FLIPS,
    min_recall: float = MIN_RECALL,
) -> Verdict:
    """Judge a fit against the head it patches.

    Parameters
    ----------
    head, fit, examples, memory
        The head before the patch, the new rows, the features they were fitted on (float32 ``[n, width]`` for each new
        label), and the memory of the old labels.
    evaluation
        Labelled fresh inputs; ids index the old labels followed by the new ones. If given, the bound on flips comes
        from these instead of the inputs that the fit had, and so does the recall of new labels that occur in them.
    texts
        The texts of the examples, used to name them in the verdict; without it they are numbered.
    repeated
        Duplicates that were removed before the fit: the second example of each pair is not in ``examples``.
    left_out
        For each option that names a file, how many of the file's texts were left out as duplicates.
    weights
        For each new label, how many inputs each of its examples stands for, float64 ``[n]``; equal if missing.
    """
    flips, *others = count_flips(head, fit, memory, evaluation)
    recall, lost_to = _recall(fit, head, evaluation, weights or {})
    duplicates, known = _screened(head, fit, examples, memory, texts, repeated)
    too_few = tuple(label for label, rows in examples.items() if len(rows) < FEW)
    reasons = _reasons([flips, *others], recall, max_flips, min_recall, exclusive=head.exclusive)
    return Verdict(
        passed=not reasons,
        sentence=sentence(fit, flips, recall, reasons, max_flips),
        reasons=reasons,
        advice=(
            *advice(flips, recall, lost_to, known, too_few, duplicates),
            *unseen(head, [flips, *others], max_flips),
            *asides(fit, head, left_out or {}),
        ),
        calibration=flips.source,
        calibration_size=flips.size,
        flipped=flips.count,
        flips=flips.rate,
        flips_upper_bound=flips.bound,
        bound=bound_words(flips, fit.method),
        estimated_recall=recall,
        confused_with=lost_to,
        losing=flips.losing,
        duplicates=tuple(duplicates),
        known=tuple(known),
        too_few=too_few,
        refitted=flips.refitted,
    )


def _screened(
    head: Head,
    fit: Fit,
    examples: Mapping[str, Floats],
    memory: Memory | None,
    texts: Mapping[str, Sequence[str]] | None,
    repeated: Sequence[Repeat],
) -> tuple[list[Repeat], list[Known]]:
    """``repeated`` followed by the examples found to repeat another; and the examples that an old label knows."""
    duplicates = [*repeated]
    known: list[Known] = []
    for label, rows in examples.items():
        named = (texts or {}).get(label)
        duplicates += repeats(label, named, rows)
        known += known_already(label, named, rows, head, fit.old, memory)
    return duplicates, known


def _recall(
    fit: Fit, head: Head, evaluation: Labelled | None, weights: Mapping[str, Doubles]
) -> tuple[dict[str, float | None], dict[str, str | None]]:
    recall: dict[str, float | None] = {}
    lost_to: dict[str, str | None] = {}
    for position, label in enumerate(fit.labels, start=len(head.labels)):
        if evaluation is not None and bool((evaluation.ids == position).any()):
            rows = evaluation.features[evaluation.ids == position]
            best, hit = _found(rows, position, fit, head)
            every = (*head.labels, *fit.labels)
            rivals = [every[i] for i in best[~hit].tolist() if i != position]
            recall[label] = float(hit.mean())
        else:
            held = fit.held_out.get(label)
            if held is None or len(held.margins) <= 1:
                recall[label], rivals = None, list(held.rivals) if held else []
            else:
                recall[label] = float(np.average(held.margins > 0, weights=weights.get(label)))
                rivals = [rival for rival, margin in zip(held.rivals, held.margins, strict=True) if margin <= 0]
        lost_to[label] = Counter(rivals).most_common(1)[0][0] if rivals else None
    return recall, lost_to


def _found(rows: Floats, position: int, fit: Fit, head: Head) -> tuple[Ints, Bools]:
    """For inputs of the new label at ``position``: the best label, INT64 ``[n]``, and whether that label is found."""
    best, hit = np.empty(len(rows), np.int64), np.empty(len(rows), np.bool_)
    for block in blocks(len(rows)):
        logits = logits_after(rows[block], head.logits(rows[block]), fit, head)
        best[block] = logits.argmax(axis=1)
        hit[block] = best[block] == position if head.exclusive else logits[:, position] > 0
    return best, hit


def _reasons(
    counted: Sequence[Flips],
    recall: Mapping[str, float | None],
    max_flips: float,
    min_recall: float,
    *,
    exclusive: bool,
) -> tuple[str, ...]:
    reasons = [
        f"{count_words(flips)} would flip ({percent(flips.rate)}{weight_words(flips)}; limit: {percent(max_flips)}, "
        "--max-flips or max_flips)"
        for flips in counted
        if flips.rate is not None and flips.rate > max_flips
    ]
    reasons += [
        f"{label!r} alone would lose {lost} of its {flips.sizes[label]} {WHOSE[flips.source]}; the new label "
        "may be the same one under another name"
        for flips in counted
        for label, lost in flips.losing.items()
        if exclusive and _taken_over(lost, flips.sizes[label], max_flips)
    ]
    most = max(counted, key=lambda flips: flips.size)
    if 0 < most.size < _FEWEST_INPUTS and max_flips < 1:
        reasons.append(
            f"only {most.size} {WHOSE[most.source]} are available, which are too few to conclude anything "
            f"(at most {percent(upper_bound(most.count, most.size), 0, up=True)} flip)"
        )
    for label, found in recall.items():
        if found is None:
            reasons.append(f"{label!r} has only one example, so there is no way to tell whether it would be found")
        elif found < min_recall:
            reasons.append(
                f"{label!r} would be found in only {percent(found, 0)} of its inputs (limit: "
                f"{percent(min_recall, 0)}, --min-recall or min_recall)"
            )
    return tuple(reasons)


def _taken_over(lost: int, size: int, max_flips: float) -> bool:
    share = max(_MOST_OF_ONE, max_flips)
    return lost > share * size and (lost >= _FEWEST_LOST or size == lost > 1)
