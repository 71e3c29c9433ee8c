"""Examples worth a second look: near-duplicates, and those that an old label already covers."""

from __future__ import annotations

import difflib
import re
import unicodedata
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patcher.blocks import thinned
from patcher.scope import largest_probability
from patcher.words import plain_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from patcher.arrays import Bools, Doubles, Floats, Ints
    from patcher.fit.model import OldLabels
    from patcher.head import Head
    from patcher.memory import Memory

__all__ = ["Known", "Repeat", "alike", "first_alike", "known_already", "repeats", "same_to_model", "unlike_any"]

_SPELLING = re.compile("[\\s_\u200c\u200d-]")
"""Characters in which two spellings of a label may differ; the last two before the dash are invisible joiners."""
_SURE = 0.9
_SAME_TEXT = 0.9
_MOST_COMPARED = 500
"""The number of a label's examples searched for near-duplicates: comparing all pairs is slow."""
_MOST_REMEMBERED = 600
"""Largest number of remembered inputs from which it is computed how far out an input of a label may lie."""
_SAME_FEATURES = 1e-3
"""Two texts are the same to the model if no feature differs by more than this share of itself and of the mean one.

The same tokens give features that differ in their rounding, which depends on the other texts of the batch; half
precision, as in a memory, rounds by up to half of this share.
"""
_SUMS = 8
_AT_ONCE = 64
"""Rows compared at once: of many that are the same, the first few are enough."""
_NEAR = 0.25
"""An example repeats a remembered input if its squared distance is below this share of the usual one to a label's mean.

Measured on CLINC150's old labels, 70 of which a backbone never saw. Ten examples of such a label with a "!", a "please"
or a full stop and a capital letter more than the ten it was added from: 93 to 99 % of times, five or more are known
(73 to 80 % without this rule). Ten examples of another such label, 2,380 times: this rule finds none.
"""
_FEWEST_KNOWN, _FEWEST_STRANGE = 100, 5
_STRANGE = 2.2
"""What examples share lies this many times as far out as a remembered input if the model knows nothing like them.

Measured on CLINC150's new labels, with 100 to 135 old ones: at most 2.01 in 8,500 draws of 5 or 10 examples, against
2.5 to 4.8 for texts in scripts the model does not know, random letters and repetitions of a text. With fewer old labels
or examples an ordinary new topic may lie as far out, so nothing is said.
"""
_ENDS = 250
"""Long texts are compared by this many characters at each end: the time grows with the square of the length."""


class Repeat(NamedTuple):
    """An example, ``other``, that repeats an earlier one of the same label, ``first``."""

    label: str
    first: str
    other: str


class Known(NamedTuple):
    """An example of a new label that the label ``old`` already covers."""

    label: str
    example: str
    old: str


def alike(new: Sequence[str], old: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of a new label and an earlier one that differ only in case, spaces, ``_``, ``-`` or Unicode form."""
    first: dict[str, str] = {}
    # Unicode-normalized: an accented letter may be one character or two, which look the same.
    plain = (_SPELLING.sub("", unicodedata.normalize("NFKC", label).casefold()) for label in (*old, *new))
    pairs = [(label, first.setdefault(words, label)) for label, words in zip((*old, *new), plain, strict=True)]
    return [(label, other) for label, other in pairs[len(old) :] if label != other]


def first_alike(texts: Sequence[str] | None, rows: Floats) -> Ints:
    """For each example, the position INT64 ``[n]`` of the first one of its group; its own if it repeats none.

    An example repeats another if the two are the same to the model (features float32 ``[n, width]``), if it has the
    same words, or, among the first 500, almost the same. A group is all that repeat one another, directly or through
    others: none may stay in the fit of one that is held out.
    """
    firsts = np.arange(len(rows))
    words: dict[str, int] = {}
    named = map(plain_words, texts) if texts is not None else [""] * len(rows)
    for i, (text, places) in enumerate(zip(named, _maybe_close(rows), strict=True)):
        groups, left = {i}, places
        while len(left):
            some, left = left[:_AT_ONCE], left[_AT_ONCE:]
            groups.update(firsts[some[_close(rows[some], rows[i])]].tolist())
            left = left[~np.isin(firsts[left], list(groups))]
        if texts is not None:
            groups.add(int(firsts[words.setdefault(text, i)]))
            if i < _MOST_COMPARED:
                apart = (other for other, place in words.items() if firsts[place] not in groups)
                for other in _alike(text, apart):
                    groups.add(int(firsts[words[other]]))
        if len(groups) > 1:
            firsts[np.isin(firsts, list(groups))] = min(groups)
    return firsts


def _maybe_close(rows: Floats) -> Iterator[Ints]:
    """For each row the earlier ones that may be close to it, INT64 ``[m]``.

    Features that are close have close sums too, whatever their signs are turned to. Drawn signs tell nearly all others
    apart; after a layer norm the plain sum does not, as it is nearly the same for all.
    """
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (rows.shape[1], _SUMS))
    sums = rows @ signs
    reach = 2.0 * _SAME_FEATURES * np.abs(rows).sum(axis=1, dtype=np.float64)
    order = np.argsort(sums[:, 0])
    starts = np.searchsorted(sums[order, 0], sums[:, 0] - reach)
    stops = np.searchsorted(sums[order, 0], sums[:, 0] + reach, side="right")
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        beside = order[start:stop]
        places = beside[beside < i]
        yield places[(np.abs(sums[places] - sums[i]) <= reach[i]).all(axis=1)]


def _close(rows: Floats, row: Floats) -> Bools:
    size = np.abs(row)
    close: Bools = (np.abs(rows - row) <= _SAME_FEATURES * (size + size.mean(dtype=np.float64))).all(axis=1)
    return close


def same_to_model(rows: Floats) -> bool:
    """Whether the model cannot tell any of the inputs ``[n, width]`` from the first one."""
    return bool(_close(rows, rows[0]).all())


def repeats(label: str, texts: Sequence[str] | None, firsts: Ints) -> list[Repeat]:
    """Each example that repeats an earlier one, with that one; ``firsts`` is that of ``first_alike``."""
    names = _names(texts, len(firsts))
    return [Repeat(label, names[place], names[i]) for i, place in enumerate(firsts.tolist()) if place != i]


def unlike_any(rows: Floats, old: OldLabels, memory: Memory | None) -> bool:
    """Whether different examples ``[n, width]`` share something that sets them apart from all remembered inputs.

    Compared are squared distances from the mean of all remembered inputs, whitened as for the fit: that of what the
    examples share (the mean product of two of them) and the mean one of a remembered input.
    """
    count = len(rows)
    if memory is None or len(old.means) < _FEWEST_KNOWN or count < _FEWEST_STRANGE or not len(memory.sample):
        return False
    white = old.whitening
    points = white.of(rows)
    shared = ((points.sum(axis=0) ** 2).sum() - (points**2).sum()) / (count * (count - 1))
    some = memory.sample[thinned(len(memory.sample), _MOST_REMEMBERED)].astype(np.float32)
    return bool(shared > _STRANGE * (white.of(some) ** 2).sum(axis=1).mean())


def _names(texts: Sequence[str] | None, count: int) -> Sequence[str]:
    return [f"example {i + 1}" for i in range(count)] if texts is None else texts


def _alike(text: str, others: Iterable[str]) -> Iterator[str]:
    matcher = difflib.SequenceMatcher(None, "", _ends(text))
    for other in others:
        if 2.0 * min(len(text), len(other)) / (len(text) + len(other)) < _SAME_TEXT:
            continue
        matcher.set_seq1(_ends(other))
        # quick_ratio is an upper bound on ratio, and takes a hundredth of the time.
        if matcher.quick_ratio() >= _SAME_TEXT and matcher.ratio() >= _SAME_TEXT:
            yield other


def _ends(text: str) -> str:
    return text if len(text) <= 2 * _ENDS else text[:_ENDS] + text[-_ENDS:]


def known_already(
    label: str, texts: Sequence[str] | None, rows: Floats, head: Head, old: OldLabels, memory: Memory | None
) -> list[Known]:
    """Each example that an old label already covers; without ``texts`` they are numbered.

    The head assigns it to that label, and does so with confidence, or it hardly differs from a remembered input of it.
    If the memory keeps real features, an example that is new must also be typical of that label.
    """
    names = _names(texts, len(rows))
    logits = head.logits(rows).astype(np.float64)
    best = logits.argmax(axis=1)
    covered = largest_probability(logits, exclusive=head.exclusive) >= _SURE
    if memory is not None and len(memory.sample):
        points, spread = old.whitening.of(rows), _spread(old, memory)
        covered &= _typical(points, best, old, spread)
        covered |= _remembered(points, best, head, old, memory, spread)
    return [Known(label, names[i], head.labels[best[i]]) for i in np.flatnonzero(covered).tolist()]


def _spread(old: OldLabels, memory: Memory) -> Doubles:
    """Squared whitened distances of remembered inputs from the means of their labels, float64 ``[m]``."""
    some = thinned(len(memory.sample), _MOST_REMEMBERED)
    centres = memory.means().astype(np.float32)[memory.sample_labels[some]]
    spread: Doubles = (((memory.sample[some] - centres) @ old.whitening.points).astype(np.float64) ** 2).sum(axis=1)
    return spread


def _typical(points: Doubles, best: Ints, old: OldLabels, spread: Doubles) -> Bools:
    """Whether each whitened row is as near to the mean of its ``best`` label as 90 % of remembered inputs to theirs."""
    place = {int(p): i for i, p in enumerate(old.places)}
    spot = np.array([place.get(int(b), -1) for b in best])
    typical: Bools = (spot >= 0) & (((points - old.points[spot]) ** 2).sum(axis=1) <= np.quantile(spread, _SURE))
    return typical


def _remembered(points: Doubles, best: Ints, head: Head, old: OldLabels, memory: Memory, spread: Doubles) -> Bools:
    """Whether each whitened row hardly differs from a remembered input of its ``best`` label."""
    limit, near = _NEAR * np.median(spread), np.zeros(len(points), bool)
    for place in np.unique(best).tolist():
        kept = old.whitening.of(memory.features_of(head.labels[place]))
        for i in np.flatnonzero(best == place).tolist() if len(kept) else ():
            near[i] = ((kept - points[i]) ** 2).sum(axis=1).min() <= limit
    return near
