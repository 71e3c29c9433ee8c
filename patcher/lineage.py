"""The lineage entry of a new head version."""

from __future__ import annotations

import getpass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from patcher import __version__, audit
from patcher.head import Head, Lineage

if TYPE_CHECKING:
    from patcher.repository import Classifier

__all__ = ["author", "next_lineage", "now"]


def next_lineage(classifier: Classifier, parent: Head, **what: Any) -> Lineage:
    """Lineage of the version after ``parent``: numbers, time, author and tool, and ``what`` was done."""
    version = classifier.next_version()
    facts = {name: value for name, value in what.items() if name != "details"}
    audit.note(classifier=classifier.name, version=version, parent_version=parent.lineage.version, **facts)
    return Lineage(
        version=version,
        parent=parent.lineage.version,
        backbone=parent.lineage.backbone,
        created=now(),
        author=author(),
        tool_version=__version__,
        **what,
    )


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def author() -> str:
    """Who runs this program, as the system names them; empty where it does not."""
    try:
        # A name that is no text would not go into the lineage's JSON.
        return getpass.getuser().encode("utf-8", "replace").decode()
    except (OSError, KeyError):  # a container's user need not have a name
        return ""
