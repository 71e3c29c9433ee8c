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

    from patcher.arrays import Bools, Floats, Ints
    from patcher.fit.model import OldLabels
    from patcher.head import Head
    from patcher.memory import Memory

__all__ = ["Known", "Repeat", "alike", "known_already", "repeats"]

_SURE = 0.9
_SAME_TEXT = 0.9
_MOST_COMPARED = 500
"""The number of a label's examples searched for near-duplicates: comparing all pairs is slow."""
_MOST_REMEMBERED = 600
"""Largest number of remembered inputs from which it is computed how far out an input of a label may lie."""
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
    plain = (re.sub(r"[\s_-]", "", unicodedata.normalize("NFKC", label).casefold()) for label in (*old, *new))
    pairs = [(label, first.setdefault(words, label)) for label, words in zip((*old, *new), plain, strict=True)]
    return [(label, other) for label, other in pairs[len(old) :] if label != other]


def repeats(label: str, texts: Sequence[str] | None, rows: Floats) -> list[Repeat]:
    """Each example that repeats an earlier one, with that one.

    Texts are compared by their words; among the first 500, near-duplicates count too. Without texts, the features,
    float32 ``[n, width]``, are compared, and the examples are numbered.
    """
    names = _names(texts, len(rows))
    if texts is None:
        same = (
            np.flatnonzero(np.isclose(rows[:i], rows[i], rtol=1e-4, atol=1e-5).all(axis=1)) for i in range(len(rows))
        )
        return [Repeat(label, names[before[0]], names[i]) for i, before in enumerate(same) if len(before)]
    plain = [plain_words(text) for text in texts]
    first: dict[str, int] = {}
    pairs = []
    for i, text in enumerate(plain):
        place = first.setdefault(text, i)
        if place == i:
            place = next((first[other] for other in _alike(text, first)), i) if i < _MOST_COMPARED else i
        if place != i:
            pairs.append(Repeat(label, names[place], names[i]))
    return pairs


def _names(texts: Sequence[str] | None, count: int) -> Sequence[str]:
    return [f"example {i + 1}" for i in range(count)] if texts is None else texts


def _alike(text: str, others: Iterable[str]) -> Iterator[str]:
    matcher = difflib.SequenceMatcher(None, "", _ends(text))
    for other in others:
        if other == text or 2.0 * min(len(text), len(other)) / (len(text) + len(other)) < _SAME_TEXT:
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
    """Each example that the head assigns to an old label with confidence; without ``texts`` they are numbered.

    If the memory keeps real features, the example must also be typical of that label.
    """
    names = _names(texts, len(rows))
    logits = head.logits(rows).astype(np.float64)
    best = logits.argmax(axis=1)
    sure = largest_probability(logits, exclusive=head.exclusive) >= _SURE
    if sure.any() and memory is not None and len(memory.sample):
        sure &= _typical(rows, best, old, memory)
    return [Known(label, names[i], head.labels[best[i]]) for i in np.flatnonzero(sure).tolist()]


def _typical(rows: Floats, best: Ints, old: OldLabels, memory: Memory) -> Bools:
    """Whether each row lies as near to the mean of its ``best`` label as 90 % of remembered features to theirs."""
    place = {int(p): i for i, p in enumerate(old.places)}
    spot = np.array([place.get(int(b), -1) for b in best])
    far = ((old.whitening.of(rows) - old.points[spot]) ** 2).sum(axis=1)
    some = thinned(len(memory.sample), _MOST_REMEMBERED)
    centres = memory.means().astype(np.float32)[memory.sample_labels[some]]
    own = (((memory.sample[some] - centres) @ old.whitening.points) ** 2).sum(axis=1)
    typical: Bools = (spot >= 0) & (far <= np.quantile(own, _SURE))
    return typical
