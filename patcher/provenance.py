"""Who acts, and when, as lineage, journal, lock and audit log all write it."""

from __future__ import annotations

import getpass
from datetime import datetime, timezone

__all__ = ["author", "now"]


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
