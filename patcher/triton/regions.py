"""The shared memory of servers and their stubs, which remains if they are killed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.scratch import abandoned, hold

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["free", "mine"]

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Triton's stubs keep theirs
_MARK = "alive"


@contextlib.contextmanager
def mine(prefix: str) -> Iterator[Any]:
    """A file that marks the regions with this ``prefix`` as in use for as long as a process has it open.

    Regions of servers that no longer run are freed first.
    """
    for left in abandoned(_SHARED_MEMORY.glob(f"patcher_*_{_MARK}")):
        free(left.name.removesuffix(_MARK))
    with hold(_SHARED_MEMORY / f"{prefix}{_MARK}") as mark:
        yield mark


def free(prefix: str) -> None:
    """Free the shared memory of a server and its stubs, which must have ended."""
    for region in _SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)
