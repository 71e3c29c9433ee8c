"""What changed between two versions of a classifier: labels, rows, and the answers to labelled texts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher.arguments import require
from patcher.errors import VersionError
from patcher.evaluation import answers, expected_sets, unknown_labels
from patcher.examples import as_examples
from patcher.features import extract_features
from patcher.repository import one_classifier

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from patcher.classifier import Classifier
    from patcher.examples import ExamplesLike
    from patcher.head import Head
    from patcher.repository import ClassifierLike

__all__ = ["Difference", "Flip", "diff"]


@dataclass(frozen=True)
class Flip:
    """A text whose answer changed from right to wrong, or from wrong to right."""

    text: str
    label: str
    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """What changed between two versions; the last fields only where a labelled file was given."""

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
    """Texts with a label that neither version has: no answer to them is right."""

    def to_json(self) -> dict[str, Any]:
        """All fields; lists of flips as objects."""
        return dataclasses.asdict(self)


def diff(
    classifier: ClassifierLike,
    a: int,
    b: int,
    examples: ExamplesLike | None = None,
    features: NDArray[np.float32] | None = None,
) -> Difference:
    """Compare version ``a`` with version ``b``, on ``examples`` too where they are given (with ``features``, if known).

    A label that was only renamed between the two counts as the same, under its name in ``b``. Raises VersionError
    where one of the two is not there, LabelError where neither has any label of the examples.
    """
    require(int, a=a, b=b)
    classifier = one_classifier(classifier)
    before, after = classifier.head(a), classifier.head(b)
    # A name that went to another label means that one in ``b``; what had it in ``a`` is another label, and is gone.
    names = _renames(classifier, before, after)
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
        same_rows=len(common) - len(changed),
        changed_rows=changed,
    )
    if examples is None:
        return difference
    examples = as_examples(examples, "examples")
    expected = [
        frozenset(names.get(label, label) for label in labels) for labels in expected_sets(after, examples.labelled())
    ]
    strange = set(unknown_labels(expected, {*before.labels, *after.labels}, f"versions {a} and {b}"))
    features = extract_features(classifier, examples.texts) if features is None else features
    rows = zip(examples.texts, expected, answers(before, features), answers(after, features), strict=True)
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


def _renames(classifier: Classifier, before: Head, after: Head) -> dict[str, str]:
    """Names in ``before`` that are other names in ``after``, where one of them is an ancestor of the other."""
    a, b = before.lineage.version, after.lineage.version
    if a > b:
        return {new: old for old, new in _renames(classifier, after, before).items()}
    steps, version = [], b
    while version > a:
        try:
            lineage = classifier.lineage(version)
        except VersionError:  # pruned, with what it renamed
            return _same_rows(before, after)
        steps.append(lineage)
        version = lineage.parent or 0
    if version != a:
        return {}
    # What came after it, or left on the way, had no other name in ``before``, whatever became of its own.
    names = {label: label for label in before.labels}
    for step in reversed(steps):
        renamed = dict(step.renamed)
        names = {first: renamed.get(now, now) for first, now in names.items() if now not in step.removed}
    return {first: now for first, now in names.items() if first != now}


def _same_rows(before: Head, after: Head) -> dict[str, str]:
    """Names in ``before`` that ``after`` does not have, and the name there of the label with the very same row."""
    old, rows = before.rows_hash(), after.rows_hash()
    new = {row: label for label, row in rows.items() if label not in old}
    return {label: new[row] for label, row in old.items() if label not in rows and row in new}
