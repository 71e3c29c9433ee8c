"""The gate's words: its verdict in a sentence, what the bound means, and advice on what would improve a patch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from patcher.flips import Flips, fewest_inputs
from patcher.screening import alike
from patcher.wording import listing, percent, plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from patcher.fit import Fit
    from patcher.head import Head
    from patcher.memory import Memory
    from patcher.screening import Known, Repeat

__all__ = [
    "FEW",
    "WHOSE",
    "advice",
    "asides",
    "bound_words",
    "count_words",
    "scarce",
    "sentence",
    "twins",
    "unremembered",
    "unseen",
    "weight_words",
]

FEW = 5
_GOOD_RECALL = 0.9
_ABOUT = 0.95
"""The advice mentions the effective sample size only if it is below this share of the number of inputs."""
WHOSE = {"eval": "inputs of the evaluation file", "replay": "replayed inputs", "features": "remembered inputs"}


def advice(
    flips: Flips,
    recall: Mapping[str, float | None],
    lost_to: Mapping[str, str | None],
    known: Sequence[Known],
    too_few: Sequence[str],
    duplicates: Sequence[Repeat],
) -> tuple[str, ...]:
    """What would improve the patch, or make the figures more certain."""
    said = [f"{label!r} has fewer than {FEW} examples; ten different ones are far more reliable" for label in too_few]
    for label, rival in lost_to.items():
        found = recall[label]
        if rival and found is not None and found < _GOOD_RECALL:
            said.append(
                f"{label!r} is confused with {rival!r}: add examples that tell them apart, "
                "or fine-tune the backbone again if more do not help"
            )
    for label in dict.fromkeys(hit.label for hit in known):
        hits = [hit for hit in known if hit.label == label]
        most = Counter(hit.old for hit in hits).most_common(1)[0][0]
        said.append(
            f"{plural(len(hits), 'example')} of {label!r} already belong{'s' * (len(hits) == 1)} to an old label, "
            f"mostly {most!r}: is it the same label?"
        )
    if duplicates:
        said.append(
            f"{plural(len(duplicates), 'example')} {'repeats' if len(duplicates) == 1 else 'repeat'} another "
            "(duplicates count once); different texts help more"
        )
    if flips.source == "draws":
        said.append(
            "the memory holds only statistics; use `--eval FILE` or a memory with features to get a bound on flips"
        )
    if flips.source == "none":
        said.append("there is no memory; use `patcher remember --data FILE` or `--replay FILE` to get a bound on flips")
    return tuple(said)


def unremembered(labels: Sequence[str], memory: Memory | None) -> str:
    """A sentence that names the labels whose flips cannot be counted, because the memory has no features of them.

    Empty if there are none, or no memory. A memory without any features (statistics only) counts as covering all its
    labels.
    """
    if memory is None:
        return ""
    counted = {memory.labels[place] for place in np.unique(memory.sample_labels).tolist()} or set(memory.labels)
    return _uncounted([label for label in labels if label not in counted], len(labels))


def scarce(memory: Memory | None) -> str:
    """A sentence that names the labels of which the memory knows a single text; empty if there are none."""
    if memory is None:
        return ""
    single = [label for label, count in zip(memory.labels, memory.counts.tolist(), strict=True) if count == 1]
    if not single:
        return ""
    return (
        f"the memory knows {len(single)} of {len(memory.labels)} labels from a single text ({listing(single)}), so a "
        "count of flips says little about them; give more texts of these labels"
    )


def _uncounted(missing: Sequence[str], labels: int) -> str:
    if not missing:
        return ""
    return (
        f"the memory has no texts' features of {len(missing)} of {labels} labels ({listing(missing)}), so flips of "
        "them are not counted; run `patcher remember --data FILE` with texts of these labels, or patch with "
        "`--eval FILE`"
    )


def unseen(head: Head, counted: Sequence[Flips], max_flips: float) -> tuple[str, ...]:
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
        said.append(f"{flips.size} {WHOSE[flips.source]}{equal} {short}")
    return tuple(filter(None, said))


def asides(fit: Fit, head: Head, left_out: Mapping[str, int]) -> Iterator[str]:
    """Advice on texts that were left out as duplicates, and on new labels whose names resemble another."""
    for file, count in left_out.items():
        yield f"{plural(count, 'text')} of {file} left out as duplicates (the same words count once)"
    yield from twins(fit.labels, head.labels)


def twins(new: Sequence[str], old: Sequence[str] = ()) -> tuple[str, ...]:
    """For each new label with nearly the name of an earlier one, the question whether they are the same."""
    return tuple(
        f"{label!r} differs from {other!r} only in case, spaces, '_', '-' or Unicode form: is it the same label?"
        for label, other in alike(new, old)
    )


def bound_words(flips: Flips, method: str) -> str:
    """What the bound on flips means, or why there is none; ``method`` is that of the fit."""
    if flips.bound is None:
        basis = "draws from a Gaussian model" if flips.source == "draws" else "the old rows alone"
        return f"no bound on flips can be given: the row was set on {basis}, not on real inputs"
    where = {
        "eval": "the evaluation file",
        "replay": "the replayed texts",
        "features": "the memory's real features, whose texts the model was trained on",
    }[flips.source]
    seen = f"{flips.count} of {flips.size} inputs flip on {where}"
    as_many = f", as {flips.equal:,} inputs of equal weight tell as much" if flips.weighed else ""
    if flips.refitted:
        held_back = method == "anchored" and flips.source == "replay"
        part = ": those held back, on which it was chosen how far to go" if held_back else ""
        return (
            f"{seen}, counted on inputs that took part in the refit{part}. Of fresh ones more may flip: had these "
            f"taken no part, at most {percent(flips.bound, up=True)} would (one-sided Clopper-Pearson{as_many}); "
            "--eval FILE counts on fresh ones"
        )
    nearest = ", those nearest to the row, which took part in its fit, by fits without them (--eval FILE: fresh ones)"
    fits = "" if flips.source == "eval" else nearest
    return (
        f"{seen}{fits}; with 95 % confidence at most "
        f"{percent(flips.bound, up=True)} of inputs like those do (one-sided Clopper-Pearson{as_many})"
    )


def sentence(
    fit: Fit,
    flips: Flips,
    recall: Mapping[str, float | None],
    reasons: Sequence[str],
    max_flips: float,
) -> str:
    """The verdict in one sentence."""
    names = ", ".join(repr(label) for label in fit.labels)
    if reasons:
        return f"Refused: {'; '.join(reasons)}."
    found = min((r for r in recall.values() if r is not None), default=None)
    finds = f"finds {percent(found, 0)} of held-out examples" if found is not None else "has no estimated recall"
    if flips.bound is None:
        return f"Passed: {names} {finds}; there is no bound on flips."
    seen = f"{count_words(flips)} flip (limit: --max-flips {percent(max_flips)})"
    if flips.refitted:
        harm = "counted on inputs that took part in the refit: --eval FILE bounds what fresh ones do"
    else:
        harm = f"so at most {percent(flips.bound, up=True)} of inputs like them{weight_words(flips)} (95 % confidence)"
    return f"Passed: {names} {finds}; {seen}, {harm}."


def count_words(flips: Flips) -> str:
    """``3 of 480 remembered inputs``."""
    return f"{flips.count} of {flips.size} {WHOSE[flips.source]}"


def weight_words(flips: Flips) -> str:
    """What to add to a rate if the inputs weigh differently; empty if they do not."""
    return ", weighted by texts per label" if flips.weighed else ""
