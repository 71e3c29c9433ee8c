"""Examples said a little differently, so that a few of them tell more of what else a label's texts may look like.

A word is left out, or two neighbours change places: features of such a text move in directions in which those of other
texts of the label move, too. Measured by old labels posing as new ones (``tests/benchmarks/tune_fit.py``): a third of
a point of recall at the same flips with five examples or ten, nothing or less with one, two or fifty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["variants", "variants_of"]

_LEFT_OUT, _SWAPPED = 6, 2
_FEWEST, _MOST = 3, 20
"""Examples of a label between which variants pay."""
_LONGEST = 64
"""Words: of a longer text each says little, and encoding takes its time."""


def variants_of(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Variants of a label's examples, and which of ``texts`` each was made from; none where they would not help."""
    if not _FEWEST <= len(texts) <= _MOST:
        return [], []
    made = [(variant, place) for place, text in enumerate(texts) for variant in variants(text)]
    return [variant for variant, _ in made], [place for _, place in made]


def variants(text: str) -> list[str]:
    """A text with one word left out, or two neighbours swapped, at places all over it; at most eight, each once.

    None of a text without spaces between its words, or of a long one.
    """
    words = text.split()
    count = len(words)
    if not 1 < count <= _LONGEST:
        return []
    left_out = [[*words[:at], *words[at + 1 :]] for at in _spread(count, _LEFT_OUT)]
    pairs = _spread(count - 1, _SWAPPED) if count > 2 else []  # noqa: PLR2004  of two words that is all
    swapped = [[*words[:at], words[at + 1], words[at], *words[at + 2 :]] for at in pairs]
    found = dict.fromkeys(" ".join(some) for some in (*left_out, *swapped))
    found.pop(" ".join(words), None)
    return list(found)


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the places below ``count``, evenly apart, both ends among them."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]
