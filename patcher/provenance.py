"""Author and time of a change, as recorded in lineage, journal, lock and audit log."""

from __future__ import annotations

import getpass
from datetime import datetime, timezone

__all__ = ["author", "now"]


def now() -> str:
    """The current time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def author() -> str:
    """The system's name for the user who runs this process; empty if there is none."""
    try:
        # A name that is not valid Unicode could not be written to the lineage's JSON.
        return getpass.getuser().encode("utf-8", "replace").decode()
    except (OSError, KeyError):  # in a container the user need not have a name
        return ""
