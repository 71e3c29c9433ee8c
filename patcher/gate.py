"""The gate that a patch has to pass: what it would break, what it would find, and how certain both figures are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from patcher.flips import Flips, count_flips, upper_bound
from patcher.gate_words import (
    FEW,
    WHOSE,
    advice,
    asides,
    bound_words,
    count_words,
    each_or_all,
    recall_words,
    row_words,
    sentence,
    too_alike,
    unseen,
    weight_words,
)
from patcher.limits import MAX_FLIPS, MIN_RECALL
from patcher.recall import Recall, count_found
from patcher.screening import first_alike, known_already, repeats, same_to_model, unlike_any
from patcher.wording import percent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patcher.arrays import Doubles, Floats, Ints
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
    recall
        For each new label, how many of its inputs in the evaluation file are found. Without such inputs, how many of
        its different examples a fit without them finds.
    losing
        Number of flips by old label, in descending order.
    duplicates
        Examples that repeat an earlier one, or nearly do.
    known
        Examples that an old label already covers, for the old head with confidence, or in the memory.
    too_few
        New labels with fewer than five different examples.
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
    recall: Mapping[str, Recall]
    losing: Mapping[str, int]
    duplicates: tuple[Repeat, ...]
    known: tuple[Known, ...]
    too_few: tuple[str, ...]
    refitted: bool = False

    @property
    def estimated_recall(self) -> dict[str, float | None]:
        """The recall of each new label; None if it could not be estimated."""
        return {label: recall.rate for label, recall in self.recall.items()}

    @property
    def recall_lower_bound(self) -> dict[str, float | None]:
        """The one-sided lower bound of each recall at 95 % confidence; None if it could not be estimated."""
        return {label: recall.at_least for label, recall in self.recall.items()}

    @property
    def confused_with(self) -> dict[str, str | None]:
        """For each new label, the label that took most of the inputs it missed, or None."""
        return {label: recall.rival for label, recall in self.recall.items()}

    @property
    def gain(self) -> str:
        """A short summary of the recall."""
        return recall_words(self.recall)

    @property
    def harm(self) -> str:
        """A short summary of the flips; ``bound`` is the full explanation."""
        if self.flips_upper_bound is None:
            return self.bound
        counted = f"{self.flipped} of {self.calibration_size} {WHOSE[self.calibration]}"
        if self.refitted:
            return f"{counted}, which took part in the refit; of fresh ones more may (--eval FILE bounds that)"
        rows = "" if self.calibration == "eval" else row_words(len(self.recall))
        at_most = percent(self.flips_upper_bound, up=True)
        return f"{counted}; at most {at_most} of inputs like them (95 % confidence{rows})"

    def refusal(self, what: str) -> str:
        """The message if the gate refused ``what``, a patch or a merge: the reasons and the advice, a line each."""
        lines = (*self.reasons, *self.advice, "`--force` (force=True) publishes anyway")
        return f"the gate refused the {what}:" + "".join(f"\n          {line}" for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary for JSON, and each figure of the recall by label."""
        figures = ("estimated_recall", "recall_lower_bound", "confused_with")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in figures}


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
    firsts: Mapping[str, Ints] | None = None,
    merge: bool = False,
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
    firsts
        For each new label, what ``first_alike`` finds; computed here if missing. The fit should know it, too.
    merge
        Whether the examples are remembered inputs of labels to merge. Then it is no news that old labels know them.
    """
    flips, *others = count_flips(head, fit, memory, evaluation)
    texts = texts or {}
    firsts = firsts or {label: first_alike(texts.get(label), rows) for label, rows in examples.items()}
    recall = count_found(head, fit, evaluation, firsts, weights or {})
    screened = _screened(head, fit, examples, memory, texts, firsts, merge=merge)
    sizes = {label: len(rows) for label, rows in examples.items()}
    reasons = (
        *_flips_reasons([flips, *others], max_flips, exclusive=head.exclusive),
        *_recall_reasons(recall, examples, min_recall),
    )
    return Verdict(
        passed=not reasons,
        sentence=sentence(flips, recall, reasons, max_flips),
        reasons=reasons,
        advice=(
            *advice(flips, recall, screened.known, screened.too_few, sizes, exclusive=head.exclusive),
            *too_alike(len(repeated), len(screened.near), screened.strange),
            *unseen(head, [flips, *others], max_flips),
            *asides(fit, head, left_out or {}),
        ),
        calibration=flips.source,
        calibration_size=flips.size,
        flipped=flips.count,
        flips=flips.rate,
        flips_upper_bound=flips.bound,
        bound=bound_words(flips, fit.method),
        recall=recall,
        losing=flips.losing,
        duplicates=(*repeated, *screened.near),
        known=tuple(screened.known),
        too_few=tuple(screened.too_few),
        refitted=flips.refitted,
    )


class _Screened(NamedTuple):
    """The examples that nearly repeat another, those that an old label knows, and labels whose examples say little.

    Of the labels ``strange`` the examples share something that sets them apart from all remembered inputs.
    """

    near: list[Repeat]
    known: list[Known]
    too_few: list[str]
    strange: list[str]


def _screened(
    head: Head,
    fit: Fit,
    examples: Mapping[str, Floats],
    memory: Memory | None,
    texts: Mapping[str, Sequence[str]],
    firsts: Mapping[str, Ints],
    *,
    merge: bool,
) -> _Screened:
    found = _Screened([], [], [], [])
    for label, rows in examples.items():
        named, different = texts.get(label), rows[np.unique(firsts[label])]
        found.near.extend(repeats(label, named, firsts[label]))
        if not merge:
            found.known.extend(known_already(label, named, rows, head, fit.old, memory))
        found.too_few.extend([label] * (len(different) < FEW))
        found.strange.extend([label] * unlike_any(different, fit.old, memory))
    return found


def _flips_reasons(counted: Sequence[Flips], max_flips: float, *, exclusive: bool) -> list[str]:
    reasons = [
        f"{count_words(flips)} would flip ({percent(flips.rate)}{weight_words(flips)}; limit: {percent(max_flips)}, "
        "--max-flips or max_flips)"
        for flips in counted
        if flips.rate is not None and flips.rate > max_flips
    ]
    for flips in counted:
        if exclusive and flips.losing:
            reasons += _losing_reasons(flips, max_flips)
    most = max(counted, key=lambda flips: flips.size)
    if 0 < most.size < _FEWEST_INPUTS and max_flips < 1:
        reasons.append(
            f"only {most.size} {WHOSE[most.source]} are available, which are too few to conclude anything "
            f"(at most {percent(upper_bound(most.count, most.size), 0, up=True)} flip)"
        )
    return reasons


def _losing_reasons(flips: Flips, max_flips: float) -> list[str]:
    sizes, lost, whose = flips.sizes, flips.losing, WHOSE[flips.source]
    return each_or_all(
        [label for label, count in lost.items() if _taken_over(count, sizes[label], max_flips)],
        lambda label: (
            f"{label!r} alone would lose {lost[label]} of its {sizes[label]} {whose}; the new label may be the same "
            "one under another name"
        ),
        f"would each lose a large part of their {whose}; the new labels may be the same ones under other names",
        lambda label: f"{label!r} {lost[label]} of {sizes[label]}",
    )


def _recall_reasons(recall: Mapping[str, Recall], examples: Mapping[str, Floats], min_recall: float) -> list[str]:
    limit, why = f"limit: {percent(min_recall, 0)}, --min-recall or min_recall", "so there is no way to tell whether"
    rates = {label: counted.rate for label, counted in recall.items() if counted.rate is not None}
    return [
        *each_or_all(
            [label for label in recall if label not in rates],
            lambda label: f"{_only_one(label, examples[label])}, {why} it would be found",
            f"have only one example, or several that count as one, {why} they would be found",
        ),
        *each_or_all(
            sorted((label for label, rate in rates.items() if rate < min_recall), key=lambda label: rates[label]),
            lambda label: f"{label!r} would be found in only {percent(rates[label], 0)} of its inputs ({limit})",
            f"would be found in too few of their inputs ({limit})",
            lambda label: f"{label!r} {percent(rates[label], 0)}",
        ),
    ]


def _only_one(label: str, rows: Floats) -> str:
    if len(rows) == 1:
        return f"{label!r} has only one example"
    if same_to_model(rows):
        return (
            f"the {len(rows)} examples of {label!r} are the same to the model and count as one (its tokenizer knows "
            "none of their characters, or they differ only beyond its token limit)"
        )
    return f"the {len(rows)} examples of {label!r} hardly differ and count as one"


def _taken_over(lost: int, size: int, max_flips: float) -> bool:
    share = max(_MOST_OF_ONE, max_flips)
    return lost > share * size and (lost >= _FEWEST_LOST or size == lost > 1)
