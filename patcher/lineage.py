"""The lineage of head versions: the entry of a new one, and what entries say of each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patcher import __version__, audit
from patcher.head import Head, Lineage
from patcher.provenance import author, now

if TYPE_CHECKING:
    from patcher.classifier import Classifier

__all__ = ["CHECKPOINT", "MERGE", "merges", "next_lineage", "related"]

CHECKPOINT = "checkpoint"
"""The lineage detail that names the exported checkpoint; each version copies it, as the first may be pruned."""
MERGE = "merge"
"""The method of a version that merged labels: the added one replaces the removed ones."""


def merges(lineage: Lineage) -> tuple[tuple[str, str], ...]:
    """Each label that a version merged into another one, with that one; empty for other methods."""
    if lineage.method != MERGE or not lineage.added:
        return ()
    return tuple((label, lineage.added[0]) for label in lineage.removed)


def related(classifier: Classifier, a: int, b: int) -> bool:
    """Whether one of two versions is, or descends from, the other; the journal also covers pruned and damaged ones."""
    return _descends(classifier, a, b) or _descends(classifier, b, a)


def _descends(classifier: Classifier, version: int, ancestor: int) -> bool:
    parents = {entry["version"]: entry.get("parent") for entry in classifier.journal.entries() if "parent" in entry}
    while version > ancestor:
        if version in parents:
            parent = parents[version]
        else:  # made by a patcher that wrote no journal
            parent = classifier.head(version).lineage.parent if version in classifier.versions() else None
        version = min(parent or 0, version - 1)  # no version was made from a later one
    return version == ancestor


def next_lineage(classifier: Classifier, parent: Head, **what: Any) -> Lineage:
    """Lineage of the version after ``parent``: numbers, time, author and tool version, plus the fields in ``what``.

    Also adds the change to the audit event of this run, without its number: it may never be published.
    """
    version = classifier.next_version()
    facts = {name: value for name, value in what.items() if name != "details"}
    origin = {name: value for name, value in parent.lineage.details.items() if name == CHECKPOINT}
    audit.note(classifier=classifier.name, parent_version=parent.lineage.version, **facts)
    return Lineage(
        version=version,
        parent=parent.lineage.version,
        backbone=parent.lineage.backbone,
        created=now(),
        author=author(),
        tool_version=__version__,
        details={**origin, **what.get("details", {})},
        **facts,
    )
