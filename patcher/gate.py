"""The gate that a patch has to pass: what it would break, what it would find, and how certain both figures are."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.blocks import blocks
from patcher.flips import Flips, count_flips, fewest_inputs, logits_after, upper_bound
from patcher.limits import MAX_FLIPS, MIN_RECALL
from patcher.screening import alike, known_already, repeats
from patcher.wording import listing, percent, plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from patcher.arrays import Bools, Doubles, Floats, Ints
    from patcher.fit import Fit
    from patcher.fit.inputs import Labelled
    from patcher.head import Head
    from patcher.memory import Memory
    from patcher.screening import Known, Repeat

__all__ = ["Verdict", "judge", "unremembered"]

FEW = 5
_GOOD_RECALL = 0.9
_ABOUT = 0.95
"""The advice mentions the effective sample size only if it is below this share of the number of inputs."""
_MOST_OF_ONE = 0.25
_FEWEST_LOST = 3
"""A patch takes over an old label if at least this many of its inputs flip, and more than the share ``_MOST_OF_ONE``.

The limit ``max_flips`` replaces that share if it is larger. A label with just two inputs is taken over if both flip.
The number of inputs of other labels does not matter.
"""
_FEWEST_INPUTS = 10
"""Fewer inputs than this prove too little: with no flip among nine, the upper bound is still 28 %."""
_WHOSE = {"eval": "inputs of the evaluation file", "replay": "replayed inputs", "features": "remembered inputs"}


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
        counted = f"{self.flipped} of {self.calibration_size} {_WHOSE[self.calibration]}"
        if self.refitted:
            return f"{counted}, which took part in the refit; of fresh ones more may (--eval FILE bounds that)"
        return f"{counted}; at most {percent(self.flips_upper_bound)} of inputs like them (95 % confidence)"

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
        sentence=_sentence(fit, flips, recall, reasons, max_flips),
        reasons=reasons,
        advice=(
            *_advice(flips, recall, lost_to, known, too_few, duplicates),
            *_unseen(head, [flips, *others], max_flips),
            *_asides(fit, head, left_out or {}),
        ),
        calibration=flips.source,
        calibration_size=flips.size,
        flipped=flips.count,
        flips=flips.rate,
        flips_upper_bound=flips.bound,
        bound=_bound_words(flips, fit.method),
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
        names = _names(label, len(rows), texts)
        duplicates += repeats(label, names, rows)
        known += known_already(label, names, rows, head, fit.old, memory)
    return duplicates, known


def _names(label: str, count: int, texts: Mapping[str, Sequence[str]] | None) -> list[str]:
    return list(texts[label]) if texts and label in texts else [f"example {i + 1}" for i in range(count)]


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
        f"{_counted(flips)} would flip ({percent(flips.rate)}{_weighed(flips)}; limit: {percent(max_flips)}, "
        "--max-flips or max_flips)"
        for flips in counted
        if flips.rate is not None and flips.rate > max_flips
    ]
    reasons += [
        f"{label!r} alone would lose {lost} of its {flips.sizes[label]} {_WHOSE[flips.source]}; the new label "
        "may be the same one under another name"
        for flips in counted
        for label, lost in flips.losing.items()
        if exclusive and _taken_over(lost, flips.sizes[label], max_flips)
    ]
    most = max(counted, key=lambda flips: flips.size)
    if 0 < most.size < _FEWEST_INPUTS and max_flips < 1:
        reasons.append(
            f"only {most.size} {_WHOSE[most.source]} are available, which are too few to conclude anything "
            f"(at most {percent(upper_bound(most.count, most.size), 0)} flip)"
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


def _counted(flips: Flips) -> str:
    return f"{flips.count} of {flips.size} {_WHOSE[flips.source]}"


def _weighed(flips: Flips) -> str:
    return ", weighted by texts per label" if flips.weighed else ""


def _advice(
    flips: Flips,
    recall: Mapping[str, float | None],
    lost_to: Mapping[str, str | None],
    known: Sequence[Known],
    too_few: Sequence[str],
    duplicates: Sequence[Repeat],
) -> tuple[str, ...]:
    advice = [f"{label!r} has fewer than {FEW} examples; ten different ones are far more reliable" for label in too_few]
    for label, rival in lost_to.items():
        found = recall[label]
        if rival and found is not None and found < _GOOD_RECALL:
            advice.append(
                f"{label!r} is confused with {rival!r}: add examples that tell them apart, "
                "or fine-tune the backbone again if more do not help"
            )
    for label in dict.fromkeys(hit.label for hit in known):
        hits = [hit for hit in known if hit.label == label]
        most = Counter(hit.old for hit in hits).most_common(1)[0][0]
        advice.append(
            f"{plural(len(hits), 'example')} of {label!r} already belong{'s' * (len(hits) == 1)} to an old label, "
            f"mostly {most!r}: is it the same label?"
        )
    if duplicates:
        advice.append(
            f"{plural(len(duplicates), 'example')} {'repeats' if len(duplicates) == 1 else 'repeat'} another "
            "(duplicates count once); different sentences help more"
        )
    if flips.source == "draws":
        advice.append(
            "the memory holds only statistics; use `--eval FILE` or a memory with features to get a bound on flips"
        )
    if flips.source == "none":
        advice.append(
            "there is no memory; use `patcher remember --data FILE` or `--replay FILE` to get a bound on flips"
        )
    return tuple(advice)


def unremembered(labels: Sequence[str], memory: Memory | None) -> str:
    """A sentence that names the labels whose flips cannot be counted, because the memory has no features of them.

    Empty if there are none, or no memory. A memory without any features (statistics only) counts as covering all its
    labels.
    """
    if memory is None:
        return ""
    counted = {memory.labels[place] for place in np.unique(memory.sample_labels).tolist()} or set(memory.labels)
    return _uncounted([label for label in labels if label not in counted], len(labels))


def _uncounted(missing: Sequence[str], labels: int) -> str:
    if not missing:
        return ""
    return (
        f"the memory has no texts' features of {len(missing)} of {labels} labels ({listing(missing)}), so flips of "
        "them are not counted; run `patcher remember --data FILE` with texts of these labels, or patch with "
        "`--eval FILE`"
    )


def _unseen(head: Head, counted: Sequence[Flips], max_flips: float) -> tuple[str, ...]:
    """Advice on what the count of flips cannot show: labels without inputs, and too few inputs for the limit."""
    there = {label for flips in counted for label, size in flips.sizes.items() if size}
    said = [_uncounted([label for label in head.labels if label not in there], len(head.labels))] if there else []
    flips = counted[0]
    if flips.bound is not None and not flips.refitted and 0 < max_flips < flips.bound:
        needed = fewest_inputs(max_flips, flips.thresholds)
        equal = f", as good as {flips.equal:,} of equal weight," if flips.equal < _ABOUT * flips.size else ""
        if flips.equal < needed:
            short = f"are too few to guarantee {percent(max_flips)}: {needed:,} without a flip would be needed"
        else:
            short = f"would guarantee {percent(max_flips)} if none of them flipped"
        said.append(f"{flips.size} {_WHOSE[flips.source]}{equal} {short}")
    return tuple(filter(None, said))


def _asides(fit: Fit, head: Head, left_out: Mapping[str, int]) -> Iterator[str]:
    """Advice on texts that were left out as duplicates, and on new labels whose names resemble another."""
    for file, count in left_out.items():
        yield f"{plural(count, 'text')} of {file} left out as duplicates (the same words count once)"
    for label, other in alike(fit.labels, head.labels):
        yield f"{label!r} differs from {other!r} only in case, spaces, '_' or '-': is it the same label?"


def _bound_words(flips: Flips, method: str) -> str:
    if flips.bound is None:
        basis = "draws from a Gaussian model" if flips.source == "draws" else "the old rows alone"
        return f"no bound on flips can be given: the row was set on {basis}, not on real inputs"
    where = {
        "eval": "the evaluation file",
        "replay": "the replayed sentences",
        "features": "the memory's real features, whose texts the model was trained on",
    }[flips.source]
    seen = f"{flips.count} of {flips.size} inputs flip on {where}"
    as_many = f", as {flips.equal:,} inputs of equal weight tell as much" if flips.weighed else ""
    if flips.refitted:
        held_back = method == "anchored" and flips.source == "replay"
        part = ": those held back, on which it was chosen how far to go" if held_back else ""
        return (
            f"{seen}, counted on inputs that took part in the refit{part}. Of fresh ones more may flip: had these "
            f"taken no part, at most {percent(flips.bound)} would (one-sided Clopper-Pearson{as_many}); --eval FILE "
            "counts on fresh ones"
        )
    nearest = ", those nearest to the row, which took part in its fit, by fits without them (--eval FILE: fresh ones)"
    fits = "" if flips.source == "eval" else nearest
    return (
        f"{seen}{fits}; with 95 % confidence at most "
        f"{percent(flips.bound)} of inputs like those do (one-sided Clopper-Pearson{as_many})"
    )


def _sentence(
    fit: Fit,
    flips: Flips,
    recall: Mapping[str, float | None],
    reasons: Sequence[str],
    max_flips: float,
) -> str:
    names = ", ".join(repr(label) for label in fit.labels)
    if reasons:
        return f"Refused: {'; '.join(reasons)}."
    found = min((r for r in recall.values() if r is not None), default=None)
    finds = f"finds {percent(found, 0)} of held-out examples" if found is not None else "has no estimated recall"
    if flips.bound is None:
        return f"Passed: {names} {finds}; there is no bound on flips."
    seen = f"{_counted(flips)} flip (limit: --max-flips {percent(max_flips)})"
    if flips.refitted:
        harm = "counted on inputs that took part in the refit: --eval FILE bounds what fresh ones do"
    else:
        harm = f"so at most {percent(flips.bound)} of inputs like them{_weighed(flips)} (95 % confidence)"
    return f"Passed: {names} {finds}; {seen}, {harm}."
