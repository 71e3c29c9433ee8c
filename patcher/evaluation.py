"""Evaluates a head on labelled texts: accuracy, F1, confusions. Pure: features and labels in, figures out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.blocks import blocks
from patcher.errors import LabelError
from patcher.examples import split_labels
from patcher.wording import listing

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from patcher.head import Head

__all__ = ["Evaluation", "LabelScore", "answers", "evaluate_head", "expected_sets", "unknown_labels"]


@dataclass(frozen=True)
class LabelScore:
    """Precision, recall and F1 of one label, each in 0..1 (0 if undefined); ``support`` is the number of its texts."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Evaluation:
    """Figures of one head version on one labelled file.

    ``accuracy`` is the share of texts answered right (for multi-label: with exactly the right set of labels);
    ``macro_f1`` is the mean F1 over the labels that occur in the file. ``confusions`` lists missed label, answered
    label and count, most frequent first. ``unknown`` are the labels of the file that the head lacks.
    """

    version: int
    examples: int
    accuracy: float
    macro_f1: float
    per_label: dict[str, LabelScore]
    confusions: tuple[tuple[str, str, int], ...]
    unknown: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...] = ()
    merged: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The figures for JSON, under the field names that scripts rely on."""
        return {
            "version": self.version,
            "examples": self.examples,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "per_label": {label: vars(score) for label, score in self.per_label.items()},
            "confusions": [{"label": a, "answered": b, "count": n} for a, b, n in self.confusions],
            "unknown_labels": list(self.unknown),
            "renamed": self.renamed,
            "merged": self.merged,
        }


def evaluate_head(
    head: Head, features: NDArray[np.float32], labels: Sequence[str], names: Mapping[str, str] | None = None
) -> Evaluation:
    """Compare the head's answers with ``labels``; texts of a label that the head lacks count as answered wrong.

    ``names`` gives labels other names, in the answers and in ``labels``; several may get the same name.
    Raises LabelError if the head has none of the labels, which is certainly a mistake.
    """
    names = names or {}
    expected, answered = (
        [frozenset(names.get(label, label) for label in each) for each in sets]
        for sets in (expected_sets(head, labels), answers(head, features))
    )
    occurring = sorted(frozenset().union(*expected))
    known = {names.get(label, label) for label in head.labels}
    unknown = unknown_labels(expected, known, f"version {head.lineage.version}")
    right = sum(a == b for a, b in zip(expected, answered, strict=True))
    scores = _scores(expected, answered)
    confusions = Counter(
        (missed, instead)
        for truth, answer in zip(expected, answered, strict=True)
        for missed in truth - answer
        for instead in answer - truth
    )
    return Evaluation(
        version=head.lineage.version,
        examples=len(labels),
        accuracy=right / len(labels),
        macro_f1=float(np.mean([scores[label].f1 for label in occurring])),
        per_label=scores,
        confusions=tuple((a, b, n) for (a, b), n in sorted(confusions.items(), key=lambda item: (-item[1], item[0]))),
        unknown=unknown,
    )


def unknown_labels(expected: Sequence[frozenset[str]], known: Collection[str], of: str) -> tuple[str, ...]:
    """The labels of a file that are not ``known``; LabelError if none is known, which is certainly a mistake."""
    occurring = sorted(frozenset().union(*expected))
    unknown = tuple(label for label in occurring if label not in known)
    if len(unknown) == len(occurring):
        raise LabelError(
            f"none of the file's {len(occurring)} labels ({listing(occurring, 3)}) is one of the {len(known)} of "
            f"{of}; `patcher labels` lists them"
        )
    return unknown


def answers(head: Head, features: NDArray[np.float32]) -> list[frozenset[str]]:
    """The head's answers: the best label, or for multi-label every label with a probability above one half."""
    if head.exclusive:
        return [frozenset([head.labels[i]]) for i in head.best(features)[0].tolist()]
    logits = (head.logits(features[block]) for block in blocks(len(features)))
    return [frozenset(head.labels[i] for i in np.flatnonzero(row > 0)) for block in logits for row in block]


def expected_sets(head: Head, labels: Sequence[str]) -> list[frozenset[str]]:
    """The labels of each text as a set; for a multi-label head, ``a|b`` is two labels."""
    if head.exclusive:
        return [frozenset([label]) for label in labels]
    return [frozenset(split_labels(label, f"text {number}")) for number, label in enumerate(labels, 1)]


def _scores(expected: Sequence[frozenset[str]], answered: Sequence[frozenset[str]]) -> dict[str, LabelScore]:
    support, given, hits = (
        Counter(label for labels in sets for label in labels)
        for sets in (expected, answered, [a & b for a, b in zip(expected, answered, strict=True)])
    )
    return {
        label: LabelScore(
            precision=hits[label] / given[label] if given[label] else 0.0,
            recall=hits[label] / support[label] if support[label] else 0.0,
            f1=2 * hits[label] / (support[label] + given[label]),
            support=support[label],
        )
        for label in sorted({*support, *given})
    }
