"""The shared memory of servers and their stubs, which a killed one leaves behind."""

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
    """A file that marks the regions of that ``prefix`` as in use for as long as a process has it open.

    Those of servers that are gone are given back first.
    """
    for left in abandoned(_SHARED_MEMORY.glob(f"patcher_*_{_MARK}")):
        free(left.name.removesuffix(_MARK))
    with hold(_SHARED_MEMORY / f"{prefix}{_MARK}") as mark:
        yield mark


def free(prefix: str) -> None:
    """Give back the shared memory of a server and its stubs, which are gone."""
    for region in _SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)
