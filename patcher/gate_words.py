"""The gate's words: its verdict in a sentence, what the bound means, and advice on what would improve a patch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from patcher.flips import Flips, fewest_inputs
from patcher.screening import alike
from patcher.wording import NAMED, count_and_some, listing, percent, plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from patcher.fit import Fit
    from patcher.head import Head
    from patcher.memory import Memory
    from patcher.recall import Recall
    from patcher.screening import Known

__all__ = [
    "FEW",
    "WHOSE",
    "advice",
    "asides",
    "bound_words",
    "count_words",
    "each_or_all",
    "recall_words",
    "row_words",
    "scarce",
    "sentence",
    "too_alike",
    "twins",
    "unremembered",
    "unseen",
    "weight_words",
]

FEW = 5
_GOOD_RECALL = 0.9
_NEARLY_ALL = 0.9
_GIVEN = 0.5
"""A multi-label head gives a text the labels whose score is above this."""
_EXAMPLES_SHOWN, _CHARACTERS_SHOWN = 3, 60
_SAYS_LITTLE = 0.1
"""With an upper bound above this share, a pass says little about flips."""
_ABOUT = 0.95
"""The advice mentions the effective sample size only if it is below this share of the number of inputs."""
WHOSE = {"eval": "inputs of the evaluation file", "replay": "replayed inputs", "features": "remembered inputs"}


def advice(
    flips: Flips,
    recall: Mapping[str, Recall],
    known: Sequence[Known],
    too_few: Sequence[str],
    sizes: Mapping[str, int],
    *,
    exclusive: bool,
) -> tuple[str, ...]:
    """What would improve the patch, or make the figures more certain; ``sizes`` counts each label's examples."""
    few = f"fewer than {FEW} different examples; ten are far more reliable"
    said = [
        *each_or_all(too_few, lambda label: f"{label!r} has {few}", f"have {few}"),
        *(_confused(recall, known, sizes) if exclusive else _missed(recall)),
        *_same_labels(known, sizes, exclusive=exclusive),
    ]
    if flips.source == "draws":
        said.append(
            "the memory holds only statistics; use `--eval FILE` or a memory with features to get a bound on flips"
        )
    if flips.source == "none":
        said.append("there is no memory; use `patcher remember --data FILE` or `--replay FILE` to get a bound on flips")
    return tuple(said)


def each_or_all(
    labels: Sequence[str], one: Callable[[str], str], many: str, shown: Callable[[str], str] = repr
) -> list[str]:
    """A line on each label, or a single one on ``many`` labels, which names a few of them: ``shown`` of each."""
    if len(labels) <= NAMED:
        return [one(label) for label in labels]
    return [f"{len(labels):,} labels {many}: {listing(map(shown, labels))}"]


def _confused(recall: Mapping[str, Recall], known: Sequence[Known], sizes: Mapping[str, int]) -> list[str]:
    """Advice on new labels that lose texts to a rival, unless they may be the same label.

    More examples, or another backbone, do not tell a label from itself.
    """
    same = Counter((hit.label, hit.old) for hit in known)
    found = [
        label
        for label, counted in recall.items()
        if counted.rival and _poor(counted) and same[label, counted.rival] < sizes[label] / 2
    ]
    cure = "add examples that tell them apart, or fine-tune the backbone again if more do not help"
    return each_or_all(
        found,
        lambda label: f"{label!r} is confused with {recall[label].rival!r}: {cure}",
        f"are each confused with another ({cure})",
        lambda label: f"{label!r} with {recall[label].rival!r}",
    )


def _missed(recall: Mapping[str, Recall]) -> list[str]:
    """Advice on new labels of a multi-label head, where no label takes a text from another."""
    below = f"below {_GIVEN} on some of"
    cure = "more, or more varied, examples help"
    found = [label for label, counted in recall.items() if _poor(counted)]
    return each_or_all(
        found, lambda label: f"{label!r} scores {below} its texts; {cure}", f"score {below} their texts ({cure})"
    )


def _poor(recall: Recall) -> bool:
    return recall.rate is not None and recall.rate < _GOOD_RECALL


def _same_labels(known: Sequence[Known], sizes: Mapping[str, int], *, exclusive: bool) -> list[str]:
    """The question which new labels are old ones.

    In a multi-label head, texts of a new label may well have an old one, too, unless nearly all have the same one.
    """
    hits = {hit.label: [other for other in known if other.label == hit.label] for hit in known}
    most = {label: Counter(hit.old for hit in found).most_common(1)[0] for label, found in hits.items()}
    asked = [label for label in hits if exclusive or most[label][1] >= _NEARLY_ALL * sizes[label]]
    return each_or_all(
        asked,
        lambda label: _same_label(hits[label]),
        "have examples that already belong to an old one, perhaps the same label",
        lambda label: f"{label!r} as {most[label][0]!r}",
    )


def _same_label(hits: Sequence[Known]) -> str:
    """The question whether a new label is one of the old ones that cover its examples ``hits``."""
    counts = Counter(hit.old for hit in hits)
    most = [old for old, count in counts.items() if count == max(counts.values())]
    if len(counts) == 1:
        which = f"to the old label {most[0]!r}"
    else:
        how = "mostly" if len(most) == 1 else "equally often"
        which = f"to old labels, {how} {listing(map(repr, most))}"
    shown = listing((_quoted(hit.example) for hit in hits if hit.old in most), _EXAMPLES_SHOWN)
    return (
        f"{plural(len(hits), 'example')} of {hits[0].label!r} already belong{'s' * (len(hits) == 1)} {which} "
        f"({shown}): is it the same label?"
    )


def _quoted(text: str) -> str:
    """A text in quotes, shortened, with escapes for all that is not printable."""
    return repr(text if len(text) <= _CHARACTERS_SHOWN else f"{text[: _CHARACTERS_SHOWN - 2]} …")


def too_alike(repeated: int, near: int, strange: Sequence[str]) -> Iterator[str]:
    """Advice on examples that say less than their number.

    ``repeated`` of them were left out, ``near`` ones took part in the fit, and those of the labels ``strange`` are like
    nothing that the model knows.
    """
    if repeated:
        yield (
            f"{plural(repeated, 'example')} {'repeats' if repeated == 1 else 'repeat'} another (duplicates count "
            "once); different texts help more"
        )
    if near:
        yield (
            f"{plural(near, 'example')} hardly differ{'s' * (near == 1)} from another, in words or to the model: all "
            "take part in the fit, but those alike are held out together and count once; different texts help more"
        )
    unlike = "unlike any text that the model was trained on (another script or language?)"
    yield from each_or_all(
        strange,
        lambda label: f"the examples of {label!r} are {unlike}; the new row may take every such text",
        f"have examples {unlike}; the new rows may take every such text",
    )


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
    # In a multi-label head, a text counts under one of its labels only: the others have inputs all the same.
    there = {label for flips in counted for label, size in flips.sizes.items() if size and head.exclusive}
    said = [_uncounted([label for label in head.labels if label not in there], len(head.labels))] if there else []
    flips = counted[0]
    if flips.bound is not None and not flips.refitted and 0 < max_flips < flips.bound:
        needed = fewest_inputs(max_flips, flips.thresholds)
        equal = f", as good as {flips.equal:,} of equal weight," if flips.equal < _ABOUT * flips.size else ""
        if flips.equal < needed:
            short = f"are too few to guarantee {percent(max_flips)}: {needed:,} without a flip would be needed"
            if flips.bound > _SAYS_LITTLE:
                short += f"; until then a pass says little, as up to {percent(flips.bound, 0, up=True)} may flip"
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
    other, how = dict(alike(new, old)), "only in case, spaces, '_', '-' or Unicode form"
    return tuple(
        each_or_all(
            list(other),
            lambda label: f"{label!r} differs from {other[label]!r} {how}: is it the same label?",
            f"differ from another {how}, perhaps the same label",
            lambda label: f"{label!r} and {other[label]!r}",
        )
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


def sentence(flips: Flips, recall: Mapping[str, Recall], reasons: Sequence[str], max_flips: float) -> str:
    """The verdict in one sentence."""
    if reasons:
        return f"Refused: {'; '.join(reasons)}."
    finds = _finds(recall)
    if flips.bound is None:
        return f"Passed: {finds}; there is no bound on flips."
    seen = f"{count_words(flips)} flip (limit: --max-flips {percent(max_flips)})"
    if flips.refitted:
        harm = "counted on inputs that took part in the refit: --eval FILE bounds what fresh ones do"
    else:
        at_most = f"so at most {percent(flips.bound, up=True)} of inputs like them{weight_words(flips)}"
        harm = f"{at_most} (95 % confidence{row_words(flips.thresholds)})"
    return f"Passed: {finds}; {seen}, {harm}."


def _finds(recall: Mapping[str, Recall]) -> str:
    names = count_and_some(map(repr, recall), "label")
    texts = _counted_on(recall)
    low, high, at_least = _range(recall)
    bound = f"{'' if len(recall) == 1 else 'of each '}at least {percent(at_least, 0, down=True)} of texts like them"
    if len(recall) == 1:
        (only,) = recall.values()
        counted = f"{only.found} of {only.of}; " if _plain(only) else ""
        return f"{names} finds {percent(low, 0)} of {texts} ({counted}{bound})"
    if low == high:
        return f"{names} find {percent(low, 0)} of {texts} each ({bound})"
    worst = listing(repr(label) for label, counted in recall.items() if counted.rate == low)
    return f"{names} find between {percent(low, 0)} ({worst}) and {percent(high, 0)} of {texts} ({bound})"


def _counted_on(recall: Mapping[str, Recall]) -> str:
    """The inputs that the recall was counted on; of several labels, some may occur in the evaluation file."""
    if not any(counted.fresh for counted in recall.values()):
        return "held-out examples"
    whose = "its" if len(recall) == 1 else "their"
    fresh = "texts in the evaluation file"
    all_fresh = all(counted.fresh for counted in recall.values() if counted.rate is not None)
    return f"{whose} {fresh}" if all_fresh else f"{whose} {fresh}, or of held-out examples without any there,"


def recall_words(recall: Mapping[str, Recall]) -> str:
    """The share of held-out inputs of the new labels that are found, what bounds it, and the labels below the best."""
    if all(counted.rate is None for counted in recall.values()):
        return "no estimate: that takes two different examples"
    unknown = [label for label, counted in recall.items() if counted.rate is None]
    if unknown:
        rest = {label: counted for label, counted in recall.items() if counted.rate is not None}
        return f"{recall_words(rest)}; no estimate of {listing(map(repr, unknown))}: that takes two different examples"
    low, high, at_least = _range(recall)
    bound = f"at least {percent(at_least, 1, down=True)} of texts like them (95 % confidence)"
    if len(recall) == 1:
        (only,) = recall.values()
        inputs = f"its {only.of} texts in the evaluation file" if only.fresh else f"{only.of} held-out examples"
        counted = f" ({only.found} of {inputs})" if _plain(only) else ""
        return f"{percent(low, 1)} expected{counted}; {bound}"
    if low == high:
        return f"{percent(low, 1)} expected of each label; {bound}"
    below = listing(
        f"{label!r} {percent(counted.rate, 1)} (at least {percent(counted.at_least, 1, down=True)})"
        for label, counted in sorted(recall.items(), key=lambda item: item[1].rate or 0.0)
        if counted.rate != high
    )
    return f"{percent(low, 1)} to {percent(high, 1)} expected; below the best: {below}"


def _range(recall: Mapping[str, Recall]) -> tuple[float, float, float]:
    """The lowest and the highest recall, and the lowest bound; labels without an estimate do not count."""
    known = [counted for counted in recall.values() if counted.rate is not None]
    rates = [counted.rate or 0.0 for counted in known]
    return min(rates), max(rates), min(counted.at_least or 0.0 for counted in known)


def _plain(recall: Recall) -> bool:
    """Whether the recall is the plain share of inputs; in a merge they may weigh differently."""
    return recall.rate is not None and recall.found == round(recall.rate * recall.of, 6)


def row_words(rows: int) -> str:
    """What to add to a bound if more than one row was placed on the inputs that it was counted on; else empty."""
    return f", allowing for {rows} rows placed on these inputs" if rows > 1 else ""


def count_words(flips: Flips) -> str:
    """``3 of 480 remembered inputs``."""
    return f"{flips.count} of {flips.size} {WHOSE[flips.source]}"


def weight_words(flips: Flips) -> str:
    """What to add to a rate if the inputs weigh differently; empty if they do not."""
    return ", weighted by texts per label" if flips.weighed else ""
