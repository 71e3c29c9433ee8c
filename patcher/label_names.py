"""What labels of one version are called in another: renamed labels, and labels that were merged into another."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from patcher.errors import RepositoryError, VersionError
from patcher.lineage import merges

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from patcher.classifier import Classifier
    from patcher.head import Head, Lineage

__all__ = ["earlier_names", "new_names"]

_Names = tuple[dict[str, str], dict[str, str]]
_Became = tuple[str | None, bool]
"""The name that a label has now, None if it was removed; and whether it was merged into the label of that name."""
_GONE: _Became = (None, False)


def new_names(lineage: Callable[[int], Lineage], before: Head, after: Head) -> _Names:
    """Renamed labels, from names in ``before`` to names in ``after``; and merged labels, with what they merged into.

    Follows the lineage of each version if one of the two is an ancestor of the other. If versions between them were
    pruned, equal rows tell which labels were renamed, and merges are not found. Both are empty for unrelated versions.
    """
    a, b = before.lineage.version, after.lineage.version
    if a > b:
        names, merged = new_names(lineage, after, before)
        earlier = {new: old for old, new in names.items()}
        return earlier, {old: earlier.get(new, new) for old, new in merged.items()}
    steps: list[Lineage] = []
    version = b
    while version > a:
        try:
            steps.insert(0, lineage(version))
        except VersionError:  # pruned, and its record of renamed labels with it
            return _same_rows(before, after), {}
        version = steps[0].parent or 0
    return _followed(steps, before.labels, after.labels) if version == a else ({}, {})


def earlier_names(classifier: Classifier, head: Head, labels: Collection[str]) -> _Names:
    """Like ``new_names``, for those of ``labels`` that ``head`` lacks; the latest version that has a label decides."""
    names: dict[str, str] = {}
    merged: dict[str, str] = {}
    missing = set(labels) - set(head.labels)
    for became in _ancestors(classifier, head) if missing else ():
        for label in sorted(missing & set(became)):
            name, joined = became[label]
            if name is not None:
                (merged if joined else names)[label] = name
        missing -= set(became)
        if not missing:
            break
    return names, merged


def _ancestors(classifier: Classifier, head: Head) -> Iterator[dict[str, _Became]]:
    """What became of each label of the versions that ``head`` was made from, the latest version first.

    If one of these was pruned or is damaged, equal rows tell what became of the labels of all older versions.
    """
    became: dict[str, _Became] = {label: (label, False) for label in head.labels}
    step = head.lineage
    while parent := step.parent:
        became = _before(step, became)
        yield became
        try:
            step = classifier.lineage(parent)
        except (RepositoryError, VersionError):
            yield from _older(classifier, head, parent)
            return


def _older(classifier: Classifier, head: Head, than: int) -> Iterator[dict[str, _Became]]:
    """What became of the labels that ``head`` lacks, by equal rows, for each version older ``than`` one."""
    for version in reversed([each for each in classifier.versions() if each < than]):
        with contextlib.suppress(RepositoryError, VersionError):
            before = classifier.head(version)
            names = _same_rows(before, head)
            yield {label: (names.get(label), False) for label in set(before.labels).difference(head.labels)}


def _before(step: Lineage, became: Mapping[str, _Became]) -> dict[str, _Became]:
    """What became of the labels that were there before a step, given what became of those after it.

    Names that came with the step are still in it: for these the later version has decided.
    """
    return {
        **became,
        **dict.fromkeys(step.removed, _GONE),
        **{label: (became.get(name, _GONE)[0], True) for label, name in merges(step)},
        **{old: became.get(name, _GONE) for old, name in step.renamed},
    }


def _followed(steps: Sequence[Lineage], labels: Sequence[str], now_there: Sequence[str]) -> _Names:
    """What became of ``labels`` in these steps, until they were removed; those that kept their name are left out."""
    # A label that was added later had no name before.
    names, joined = {label: label for label in labels}, set()
    for step in steps:
        renamed, into = dict(step.renamed), dict(merges(step))
        joined |= {first for first, now in names.items() if now in into}
        names = {
            first: into.get(now, renamed.get(now, now))
            for first, now in names.items()
            if now in into or now not in step.removed
        }
    changed = {first: now for first, now in names.items() if first != now}
    # If another label now has the name of a merged label, that name means the other label.
    merged = {first: now for first, now in changed.items() if first in joined and first not in now_there}
    return {first: now for first, now in changed.items() if first not in joined}, merged


def _same_rows(before: Head, after: Head) -> dict[str, str]:
    """Labels of ``before`` that ``after`` lacks, each with the label in ``after`` that has the identical row."""
    old, rows = before.rows_hash(), after.rows_hash()
    new = {row: label for label, row in rows.items() if label not in old}
    return {label: new[row] for label, row in old.items() if label not in rows and row in new}
