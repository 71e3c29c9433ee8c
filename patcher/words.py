"""What texts and labels say, where they are compared: their words, whatever their case and spacing."""

from __future__ import annotations

import re

__all__ = ["label_words", "plain_words"]

_LETTERS_A_WORD = 3
_NO_WORDS = frozenset(["label", "class", "intent", "category", "topic", "none", "new", "other", "test", "unknown"])
"""Names that say nothing of what their texts are about."""


def plain_words(text: str) -> str:
    """A text as it counts where two are compared: without case and spacing."""
    return " ".join(text.casefold().split())


def label_words(label: str) -> str | None:
    """A label's name as a person would say it (``card_lost`` is "card lost"), or None where it is a code, no words."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    words = re.findall(r"[^\W_]+", spaced)
    letters = [word for word in words if sum(map(str.isalpha, word)) >= _LETTERS_A_WORD]
    if not letters or {word.casefold() for word in letters} <= _NO_WORDS:
        return None
    return " ".join(words).lower()
