"""Which labels each text of a new classifier has, as the fit takes them; too few texts are refused."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from patcher.errors import ExamplesError, LabelError
from patcher.examples import label_parts
from patcher.gate_words import twins
from patcher.wording import listing, plural
from patcher.words import plain_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patcher.arrays import Bools, Ints
    from patcher.examples import Examples
    from patcher.fit.whole_head import Targets

__all__ = ["remarks", "targets_of"]

_FEWEST = 2
"""Of labels; of texts with each label, one to fit and one to judge by; and of texts without it."""


def targets_of(examples: Examples, *, several: bool) -> tuple[tuple[str, ...], Targets]:
    """The labels in order of appearance, and those of each text: INT64 ``[n]``, or with ``several`` BOOL ``[n, C]``.

    Raises LabelError or ExamplesError if there are too few labels, or too few texts with or without one of them.
    """
    return _several(examples) if several else _one_each(examples)


def remarks(examples: Examples, labels: Sequence[str], *, several: bool) -> tuple[str, ...]:
    """What may be wrong with the labels of ``examples``, in which no text comes twice with the same label."""
    said = list(twins(labels))
    if several and all(len(each) == 1 for each in examples.labels_of_each(several=True)):
        said.append("no text has several labels; they are written with '|' between them, as in `a|b`")
    counts = Counter(map(plain_words, examples.texts))
    if many := sum(count > 1 for count in counts.values()):
        said.append(f"{plural(many, 'text')} with more than one label: each is fitted to all of its labels")
    return tuple(said)


def _one_each(examples: Examples) -> tuple[tuple[str, ...], Ints]:
    """The labels in order of appearance, and the index of each text's label, INT64 ``[n]``."""
    written = examples.labelled()
    labels = _enough(Counter(written), examples)
    place = {label: index for index, label in enumerate(labels)}
    for label in labels:
        parts = label_parts(label)
        if len(parts) > 1 and all(part in place for part in parts):
            raise LabelError(
                f"{examples.source} has the label {label!r} and {listing(map(repr, parts))}, too; expected "
                "`--multi-label` (multi_label=True) for texts with several labels, or a label without '|'"
            )
    return labels, np.array([place[label] for label in written], np.int64)


def _several(examples: Examples) -> tuple[tuple[str, ...], Bools]:
    """The labels in order of appearance, and which of them each text has, BOOL ``[n, C]``."""
    sets = examples.labels_of_each(several=True)
    labels = _enough(Counter(label for each in sets for label in set(each)), examples)
    place = {label: index for index, label in enumerate(labels)}
    targets = np.zeros((len(examples), len(labels)), np.bool_)
    for row, each in enumerate(sets):
        targets[row, [place[label] for label in each]] = True
    everywhere = [labels[index] for index in np.flatnonzero((~targets).sum(axis=0) < _FEWEST)]
    if everywhere:
        raise ExamplesError(
            f"{examples.source}: every text, or all but one, has the label {listing(map(repr, everywhere))}; expected "
            "two or more without it, to tell it from"
        )
    return labels, targets


def _enough(counts: Counter[str], examples: Examples) -> tuple[str, ...]:
    """The labels, given how many texts each has; raises if there are too few of either."""
    if len(counts) < _FEWEST:
        only = ", ".join(map(repr, counts)) or "none"
        raise LabelError(f"{examples.source} has one label only ({only}); expected two or more to choose between")
    lonely = [label for label, count in counts.items() if count < _FEWEST]
    if lonely:
        raise ExamplesError(
            f"{examples.source} has a single text of {len(lonely)} of its {len(counts)} labels "
            f"({listing(map(repr, lonely))}); expected two or more of each, ten are good: one is held out to judge by"
        )
    return tuple(counts)
