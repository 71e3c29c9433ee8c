"""The check that a patch has to pass: what it would break, what it would find, and how sure that is."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.examples import plain_words
from patcher.fit.inputs import OldInputs, old_inputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from patcher.fit import Fit
    from patcher.fit.model import HeadLike, OldLabels
    from patcher.memory import Memory

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

__all__ = ["Verdict", "judge", "unremembered", "upper_bound"]

MAX_FLIPS = 0.005
MIN_RECALL = 0.5
FEW = 5
_CONFIDENCE = 0.95
_SURE = 0.9
_GOOD_RECALL = 0.9
_SAME_TEXT = 0.9
_MOST_OF_ONE = 0.25
_FEWEST_LOST = 3
"""A label that loses so many, and more than such a share of its own, is taken over, however many others there are."""
_FEWEST_INPUTS = 10
"""With none of fewer lost, a quarter of all may be."""
_MOST_COMPARED = 500
"""Examples of a label: each is compared with each, and what is near the same takes a while to tell."""
_WHOSE = {"eval": "inputs of the evaluation file", "replay": "replayed inputs", "features": "remembered inputs"}


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Parameters
    ----------
    passed, sentence
        The verdict, and in one sentence.
    reasons, advice
        Why it was refused, and what would help.
    calibration, calibration_size
        On what flips were counted: ``eval``, ``replay``, ``features`` of the memory, ``draws`` from its Gaussians (no
        guarantee), or ``none``; and on how many inputs.
    flips, flips_upper_bound, bound
        Rate of flips there (None where nothing could be counted), its one-sided upper bound at 95 % confidence (None
        where there is none), and in words what the bound means.
    estimated_recall
        For each new label the share of its examples that a fit without them finds; None where there is but one.
    confused_with
        For each new label the old one that took most of the examples it lost, or None.
    losing
        Flips by old label, most first.
    duplicates
        Examples that say what one before them says: (label, that one, the other).
    known
        Examples that belong to an old label with confidence: (label, example, old label).
    too_few
        New labels with fewer than five examples.
    """

    passed: bool
    sentence: str
    reasons: tuple[str, ...]
    advice: tuple[str, ...]
    calibration: str
    calibration_size: int
    flips: float | None
    flips_upper_bound: float | None
    bound: str
    estimated_recall: Mapping[str, float | None]
    confused_with: Mapping[str, str | None]
    losing: Mapping[str, int]
    duplicates: tuple[tuple[str, str, str], ...]
    known: tuple[tuple[str, str, str], ...]
    too_few: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Flips:
    calibration: str
    size: int
    count: int
    losing: Mapping[str, int]
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Inputs of each label, where one that is right can be lost to another."""

    @property
    def rate(self) -> float | None:
        return self.count / self.size if self.size else None


def upper_bound(flips: int, size: int, confidence: float = _CONFIDENCE) -> float:
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


def judge(
    head: HeadLike,
    fit: Fit,
    examples: Mapping[str, Floats],
    memory: Memory | None,
    *,
    evaluation: tuple[Floats, Ints] | None = None,
    texts: Mapping[str, Sequence[str]] | None = None,
    repeated: Sequence[tuple[str, str, str]] = (),
    max_flips: float = MAX_FLIPS,
    min_recall: float = MIN_RECALL,
) -> Verdict:
    """Judge a fit against the head it patches.

    Parameters
    ----------
    head, fit, examples, memory
        The head as it was, the new rows, the features they were fitted on, and the memory of the old labels.
    evaluation
        Features of labelled sentences, float32 ``[n, width]``, and their positions INT64 ``[n]`` in the old labels
        followed by the new ones: what the bound on flips is taken from, instead of the real inputs that the fit had. A
        sentence with several labels is there once for each, side by side.
    texts
        The examples in words, for naming them; numbers are used without.
    repeated
        Pairs of examples with the same words, of which the second is none of ``examples``.
    """
    names = {label: _names(label, len(rows), texts) for label, rows in examples.items()}
    flips, *others = _count_flips(head, fit, memory, evaluation)
    recall, lost_to = _recall(fit, head, evaluation)
    alike = (pair for label, rows in examples.items() for pair in _duplicates(label, names[label], rows))
    duplicates = (*repeated, *alike)
    known = tuple(
        hit for label, rows in examples.items() for hit in _known(label, names[label], rows, head, fit.old, memory)
    )
    too_few = tuple(label for label, rows in examples.items() if len(rows) < FEW)
    bounded = flips.calibration in ("eval", "replay", "features")
    bound = upper_bound(flips.count, flips.size) if bounded else None
    reasons = _reasons([flips, *others], recall, max_flips, min_recall)
    return Verdict(
        passed=not reasons,
        sentence=_sentence(fit, flips, bound, recall, reasons, max_flips),
        reasons=reasons,
        advice=(*_advice(flips, recall, lost_to, known, too_few, duplicates), *_unseen(head, memory, flips, max_flips)),
        calibration=flips.calibration,
        calibration_size=flips.size,
        flips=flips.rate,
        flips_upper_bound=bound,
        bound=_bound_words(flips, bound),
        estimated_recall=recall,
        confused_with=lost_to,
        losing=flips.losing,
        duplicates=duplicates,
        known=known,
        too_few=too_few,
    )


def _names(label: str, count: int, texts: Mapping[str, Sequence[str]] | None) -> list[str]:
    return list(texts[label]) if texts and label in texts else [f"example {i + 1}" for i in range(count)]


def _count_flips(
    head: HeadLike,
    fit: Fit,
    memory: Memory | None,
    evaluation: tuple[Floats, Ints] | None,
) -> list[_Flips]:
    """On the best inputs there are, which the bound comes from, and on all others: none may hide what another shows."""
    counted = []
    if evaluation is not None:
        found = _on_evaluation(head, fit, *evaluation)
        counted += [found] if found.size else []
    remembered = old_inputs(memory, None, head) if fit.inputs and fit.inputs.source == "replay" else None
    for inputs in (fit.inputs, remembered):
        if inputs is not None:
            lost = inputs.ids[_flipped(inputs, head, fit)]
            counted.append(_flips(inputs.source, len(inputs), lost, head, inputs.ids))
    return counted or [_Flips("none" if memory is None else "draws", 0, 0, {})]


def _flips(source: str, size: int, lost: Ints, head: HeadLike, ids: Ints | None = None) -> _Flips:
    counts = Counter(head.labels[i] for i in lost.tolist())
    sizes = Counter(head.labels[i] for i in ids.tolist()) if ids is not None and head.problem == "single_label" else {}
    return _Flips(source, size, len(lost), dict(counts.most_common()), sizes)


def _on_evaluation(head: HeadLike, fit: Fit, features: Floats, ids: Ints) -> _Flips:
    old = len(head.labels)
    if head.problem == "single_label":
        mine = ids < old
        inputs = old_inputs(None, (features[mine], ids[mine]), head, "eval")
        lost = inputs.ids[_flipped(inputs, head, fit)] if inputs else ids[:0]
        return _flips("eval", int(mine.sum()), lost, head, ids[mine])
    rows, theirs = _sentences(features, ids, old + len(fit.labels))
    known = theirs[:, :old].any(axis=1)
    new = _logits_after(rows[known], head.logits(rows[known]), fit, head)[:, old:]
    lost = ((new > 0) & ~theirs[known, old:]).any(axis=1)
    return _flips("eval", int(known.sum()), theirs[known][lost, :old].argmax(axis=1), head)


def _sentences(features: Floats, ids: Ints, labels: int) -> tuple[Floats, Bools]:
    """Each sentence once, float32 ``[t, width]``, with its labels ``[t, labels]``, from a row for each of them."""
    first = np.ones(len(ids), np.bool_)
    first[1:] = (features[1:] != features[:-1]).any(axis=1)
    theirs = np.zeros((int(first.sum()), labels), np.bool_)
    theirs[np.cumsum(first) - 1, ids] = True
    return features[first], theirs


def _flipped(inputs: OldInputs, head: HeadLike, fit: Fit) -> Ints:
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
    after = _logits_after(rows, before, fit, head)
    if single:
        lost = (before.argmax(axis=1) == ids) & (after.argmax(axis=1) != ids)
    else:  # no label displaces another here: a new one that shows up where it does not belong is the harm
        lost = (after[:, before.shape[1] :] > 0).any(axis=1)
    places: Ints = near[lost]
    return places


def _logits_after(rows: Floats, before: Floats, fit: Fit, head: HeadLike) -> Floats:
    if fit.old_rows is None:
        return np.concatenate([before, rows @ fit.weight.T + fit.bias], axis=1)
    after: Floats = fit.apply(head).logits(rows)  # type: ignore[arg-type]
    return after


def _recall(
    fit: Fit, head: HeadLike, evaluation: tuple[Floats, Ints] | None
) -> tuple[dict[str, float | None], dict[str, str | None]]:
    recall: dict[str, float | None] = {}
    lost_to: dict[str, str | None] = {}
    for position, label in enumerate(fit.labels, start=len(head.labels)):
        if evaluation is not None and bool((evaluation[1] == position).any()):
            rows = evaluation[0][evaluation[1] == position]
            logits = _logits_after(rows, head.logits(rows), fit, head)
            best = logits.argmax(axis=1)
            hit = best == position if head.problem == "single_label" else logits[:, position] > 0
            every = (*head.labels, *fit.labels)
            rivals = [every[i] for i in best[~hit].tolist() if i != position]
            recall[label] = float(hit.mean())
        else:
            held = fit.held_out.get(label)
            if held is None or len(held.margins) <= 1:
                recall[label], rivals = None, list(held.rivals) if held else []
            else:
                recall[label] = float((held.margins > 0).mean())
                rivals = [rival for rival, margin in zip(held.rivals, held.margins, strict=True) if margin <= 0]
        lost_to[label] = Counter(rivals).most_common(1)[0][0] if rivals else None
    return recall, lost_to


def _duplicates(label: str, names: list[str], rows: Floats) -> list[tuple[str, str, str]]:
    """Each example that says what one before it said, with that one; near the same only among the first few hundred."""
    if all(name.startswith("example ") for name in names):
        same = (
            np.flatnonzero(np.isclose(rows[:i], rows[i], rtol=1e-4, atol=1e-5).all(axis=1)) for i in range(len(rows))
        )
        return [(label, names[before[0]], names[i]) for i, before in enumerate(same) if len(before)]
    plain = [plain_words(name) for name in names]
    first: dict[str, int] = {}
    pairs = []
    for i, text in enumerate(plain):
        place = first.setdefault(text, i)
        if place == i:
            place = next((first[other] for other in _alike(text, first)), i) if i < _MOST_COMPARED else i
        if place != i:
            pairs.append((label, names[place], names[i]))
    return pairs


def _alike(text: str, others: Iterable[str]) -> Iterator[str]:
    matcher = difflib.SequenceMatcher(None, "", text)
    for other in others:
        matcher.set_seq1(other)
        # The first two are upper bounds of the third, and take a hundredth of the time.
        if other != text and all(
            ratio() >= _SAME_TEXT for ratio in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
        ):
            yield other


def _known(
    label: str, names: list[str], rows: Floats, head: HeadLike, old: OldLabels, memory: Memory | None
) -> list[tuple[str, str, str]]:
    logits = head.logits(rows).astype(np.float64)
    best = logits.argmax(axis=1)
    if head.problem == "single_label":
        chance = 1.0 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    else:
        chance = 1.0 / (1.0 + np.exp(-logits.max(axis=1)))
    sure = chance >= _SURE
    if sure.any() and memory is not None and len(memory.sample):
        sure &= _typical(rows, best, old, memory)
    return [(label, names[i], head.labels[best[i]]) for i in np.flatnonzero(sure).tolist()]


def _typical(rows: Floats, best: Ints, old: OldLabels, memory: Memory) -> Bools:
    """Whether each row lies as near to a label's mean as most of that memory's own sentences do to theirs."""
    place = {int(p): i for i, p in enumerate(old.places)}
    spot = np.array([place.get(int(b), -1) for b in best])
    far = ((old.whitening.of(rows) - old.points[spot]) ** 2).sum(axis=1)
    step = max(1, len(memory.sample) // 500)
    centres = memory.means().astype(np.float32)[memory.sample_labels[::step]]
    own = (((memory.sample[::step] - centres) @ old.whitening.points) ** 2).sum(axis=1)
    typical: Bools = (spot >= 0) & (far <= np.quantile(own, _SURE))
    return typical


def _reasons(
    counted: Sequence[_Flips], recall: Mapping[str, float | None], max_flips: float, min_recall: float
) -> tuple[str, ...]:
    reasons = [
        f"{flips.count} of {flips.size} {_WHOSE[flips.calibration]} would flip ({flips.rate:.2%}), "
        f"and --max-flips allows {max_flips:.2%}"
        for flips in counted
        if flips.rate is not None and flips.rate > max_flips
    ]
    reasons += [
        f"{label!r} alone would lose {lost} of its {flips.sizes[label]} {_WHOSE[flips.calibration]}, to what may be "
        "the same label under another name"
        for flips in counted
        for label, lost in flips.losing.items()
        if lost >= _FEWEST_LOST and lost > max(_MOST_OF_ONE, max_flips) * flips.sizes.get(label, lost * 100)
    ]
    most = max(counted, key=lambda flips: flips.size)
    if 0 < most.size < _FEWEST_INPUTS and max_flips < 1:
        reasons.append(
            f"only {most.size} {_WHOSE[most.calibration]} are there to count on, which vouch for nothing (at most "
            f"{upper_bound(most.count, most.size):.0%} flip)"
        )
    for label, found in recall.items():
        if found is None:
            reasons.append(f"{label!r} has one example, so nothing says whether it would be found")
        elif found < min_recall:
            reasons.append(
                f"{label!r} would be found in {found:.0%} of its inputs, and --min-recall asks for {min_recall:.0%}"
            )
    return tuple(reasons)


def _advice(
    flips: _Flips,
    recall: Mapping[str, float | None],
    lost_to: Mapping[str, str | None],
    known: Sequence[tuple[str, str, str]],
    too_few: Sequence[str],
    duplicates: Sequence[tuple[str, str, str]],
) -> tuple[str, ...]:
    advice = [
        f"{label!r} has fewer than {FEW} examples; ten different ones make it far more reliable" for label in too_few
    ]
    for label, rival in lost_to.items():
        found = recall[label]
        if rival and found is not None and found < _GOOD_RECALL:
            advice.append(
                f"{label!r} is confused with {rival!r}: add examples that tell them apart, "
                "or fine-tune the backbone again if more do not help"
            )
    for label in dict.fromkeys(hit[0] for hit in known):
        hits = [hit for hit in known if hit[0] == label]
        most = Counter(old for _, _, old in hits).most_common(1)[0][0]
        advice.append(
            f"{len(hits)} example(s) of {label!r} already belong to an old label, mostly {most!r}: is it the same?"
        )
    if duplicates:
        advice.append(
            f"{len(duplicates)} example(s) say what another says (the same words count once); different sentences "
            "teach more"
        )
    if flips.calibration == "draws":
        advice.append(
            "the memory holds statistics only; `--eval FILE` or a memory with features gives a bound on flips"
        )
    if flips.calibration == "none":
        advice.append("there is no memory; `patcher remember --data FILE` or `--replay FILE` gives a bound on flips")
    return tuple(advice)


def unremembered(labels: Sequence[str], memory: Memory | None) -> str:
    """Which labels of a head nothing is remembered of, in words; empty where there are none, or no memory at all."""
    missing = [label for label in labels if memory is not None and label not in memory.labels]
    if not missing:
        return ""
    named = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")  # noqa: PLR2004  a few
    return (
        f"nothing is remembered of {len(missing)} of {len(labels)} labels ({named}): what a patch takes from them is "
        "not counted (`patcher remember --data FILE` with texts of theirs, or `--eval FILE` with a patch)"
    )


def _unseen(head: HeadLike, memory: Memory | None, flips: _Flips, max_flips: float) -> tuple[str, ...]:
    """What the count of flips cannot see."""
    said = [unremembered(head.labels, memory)] if flips.calibration == "features" else []
    if flips.size and max_flips and upper_bound(flips.count, flips.size) > max_flips:
        said.append(
            f"{flips.size} {_WHOSE[flips.calibration]} are too few to vouch for {max_flips:.2%}: about "
            f"{math.ceil(3 / max_flips):,} without a flip would be needed"
        )
    return tuple(filter(None, said))


def _bound_words(flips: _Flips, bound: float | None) -> str:
    where = {
        "eval": "the evaluation file",
        "replay": "the replayed sentences",
        "features": "the memory's real features, whose texts the model was trained on and the row was set on "
        "(--eval FILE: fresh ones)",
    }
    if bound is None:
        source = "draws from a Gaussian model" if flips.calibration == "draws" else "the old rows alone"
        return f"no bound on flips can be given: the row was set on {source}, not on real inputs"
    return (
        f"{flips.count} of {flips.size} inputs flip on {where[flips.calibration]}; with 95 % confidence at most "
        f"{bound:.2%} of inputs like those do (one-sided Clopper-Pearson), and the next such input with probability at "
        f"most {(flips.count + 1) / (flips.size + 1):.2%}"
    )


def _sentence(
    fit: Fit,
    flips: _Flips,
    bound: float | None,
    recall: Mapping[str, float | None],
    reasons: Sequence[str],
    max_flips: float,
) -> str:
    names = ", ".join(repr(label) for label in fit.labels)
    if reasons:
        return f"Refused: {'; '.join(reasons)}."
    found = min((r for r in recall.values() if r is not None), default=None)
    finds = f"finds {found:.0%} of held-out examples" if found is not None else "has no estimate of its recall"
    harm = (
        f"{flips.count} of {flips.size} {_WHOSE[flips.calibration]} flip (--max-flips allows {max_flips:.2%}), so at "
        f"most {bound:.2%} of inputs like them (95 % confidence)"
        if bound is not None
        else "there is no bound on flips"
    )
    return f"Passed: {names} {finds}; {harm}."
