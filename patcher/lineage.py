"""The lineage entry of a new head version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patcher import __version__, audit
from patcher.head import Head, Lineage
from patcher.provenance import author, now

if TYPE_CHECKING:
    from patcher.classifier import Classifier

__all__ = ["CHECKPOINT", "MERGE", "merges", "next_lineage"]

CHECKPOINT = "checkpoint"
"""The lineage detail that names the exported checkpoint; each version copies it, as the first may be pruned."""
MERGE = "merge"
"""The method of a version that merged labels: the added one replaces the removed ones."""


def merges(lineage: Lineage) -> tuple[tuple[str, str], ...]:
    """Each label that a version merged into another one, with that one; empty for other methods."""
    if lineage.method != MERGE or not lineage.added:
        return ()
    return tuple((label, lineage.added[0]) for label in lineage.removed)


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
