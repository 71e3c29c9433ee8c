"""The words of texts and labels, for comparing them regardless of case and spacing."""

from __future__ import annotations

import re

__all__ = ["label_words", "plain_words"]

_LETTERS_A_WORD = 3
_NO_WORDS = frozenset(["label", "class", "intent", "category", "topic", "none", "new", "other", "test", "unknown"])
"""Words that say nothing about the topic of a label's texts."""


def plain_words(text: str) -> str:
    """A text normalized for comparison: case-folded, with single spaces."""
    return " ".join(text.casefold().split())


def label_words(label: str) -> str | None:
    """A label's name in plain words (``card_lost`` becomes "card lost"); None if it is a code or says nothing."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    words = re.findall(r"[^\W_]+", spaced)
    letters = [word for word in words if sum(map(str.isalpha, word)) >= _LETTERS_A_WORD]
    if not letters or {word.casefold() for word in letters} <= _NO_WORDS:
        return None
    return " ".join(words).lower()
