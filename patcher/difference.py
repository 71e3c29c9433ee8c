"""Compares two versions of a classifier: labels, rows, and the answers to labelled texts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher.arguments import require
from patcher.evaluation import answers, expected_sets, unknown_labels
from patcher.examples_file import as_examples
from patcher.features import extract_features
from patcher.label_names import earlier_names, new_names
from patcher.repository import one_classifier

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from patcher.examples_file import ExamplesLike
    from patcher.repository import ClassifierLike

__all__ = ["Difference", "Flip", "diff"]


@dataclass(frozen=True)
class Flip:
    """A text with its label, whose answer changed from right to wrong or from wrong to right."""

    text: str
    label: str
    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """The differences between two versions; the fields from ``examples`` on are set only if texts are given."""

    a: int
    b: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    same_rows: int
    changed_rows: tuple[str, ...]
    examples: int = 0
    flips: tuple[Flip, ...] | None = None
    gains: tuple[Flip, ...] | None = None
    unknown: int = 0
    """Number of texts with a label that neither version has, so that no answer to them is right."""
    merged: tuple[tuple[str, str], ...] = ()
    """Labels of the older version, each with the label that it was merged into and counts as in labelled texts."""

    def to_json(self) -> dict[str, Any]:
        """All fields, with flips as objects."""
        return dataclasses.asdict(self)


def diff(
    classifier: ClassifierLike,
    a: int,
    b: int,
    examples: ExamplesLike | None = None,
    features: NDArray[np.float32] | None = None,
) -> Difference:
    """Compare version ``a`` with version ``b``, and their answers to ``examples``, if given.

    ``features``, float32 ``[n, width]``, are those of the examples, if they are known already. A label that was only
    renamed between the two versions counts as the same, under its name in ``b``. On the examples and in the answers to
    them, a merged label counts as the one that it was merged into. The examples may also have names from before both.

    Raises VersionError if a version does not exist, LabelError if neither version has any label of the examples.
    """
    require(int, a=a, b=b)
    classifier = one_classifier(classifier)
    before, after = classifier.head(a), classifier.head(b)
    # A rename may take the name of a label of ``a`` that is gone in ``b``. The name then stands for the renamed label;
    # the old one gets a name of its own.
    names, merged = new_names(classifier.lineage, before, after)
    taken = {label: f"{label} (of version {a})" for label in set(names.values()) & set(before.labels) - set(names)}
    now = {**names, **taken}
    before = dataclasses.replace(before, labels=tuple(now.get(label, label) for label in before.labels))
    rows_before, rows_after = before.rows_hash(), after.rows_hash()
    common = [label for label in after.labels if label in rows_before]
    changed = tuple(label for label in common if rows_before[label] != rows_after[label])
    difference = Difference(
        a,
        b,
        added=tuple(label for label in after.labels if label not in rows_before),
        removed=tuple(label for label in before.labels if label not in rows_after),
        renamed=tuple(names.items()),
        merged=tuple(merged.items()),
        same_rows=len(common) - len(changed),
        changed_rows=changed,
    )
    if examples is None:
        return difference
    examples = as_examples(examples, "examples")
    given_labels = expected_sets(after, examples.labelled())
    # The texts may have a name that is older than both versions.
    older = earlier_names(classifier, after, frozenset().union(*given_labels) - set(before.labels))
    became = {**older[0], **older[1], **names, **merged}
    expected = [frozenset(became.get(label, label) for label in labels) for labels in given_labels]
    strange = set(unknown_labels(expected, {*before.labels, *after.labels}, f"versions {a} and {b}"))
    features = extract_features(classifier, examples.texts) if features is None else features
    # Whichever of the two is the older one has the labels that were merged.
    given = (
        [frozenset(merged.get(label, label) for label in each) for each in answers(head, features)]
        for head in (before, after)
    )
    rows = zip(examples.texts, expected, *given, strict=True)
    flips = [
        (text, right, first, second) for text, right, first, second in rows if (first == right) != (second == right)
    ]
    return dataclasses.replace(
        difference,
        examples=len(examples),
        flips=tuple(_flip(*row) for row in flips if row[2] == row[1]),
        gains=tuple(_flip(*row) for row in flips if row[3] == row[1]),
        unknown=sum(not strange.isdisjoint(labels) for labels in expected),
    )


def _flip(text: str, right: frozenset[str], before: frozenset[str], after: frozenset[str]) -> Flip:
    return Flip(text, *("|".join(sorted(labels)) for labels in (right, before, after)))
