"""Temporary folders that last as long as their process, and are cleaned up later if it was killed.

Each has a mark, a file that its process holds locked. The kernel releases the lock when the last process that has the
file open ends. So a folder whose mark is not locked is abandoned, and the next process removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["KEPT_SECONDS", "abandoned", "hold", "scratch"]

_MARK = ".patcher-alive"
KEPT_SECONDS = 30 * 24 * 3600
"""How long what nobody uses is kept in the user's cache."""


@contextlib.contextmanager
def scratch(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder in ``parent`` (by default the system's temporary folder), removed afterwards.

    Abandoned folders with the same ``prefix`` are removed first. Raises OSError if the folder cannot be made.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    for mark in abandoned(parent.glob(f"{prefix}*/{_MARK}")):
        if mark.parent.lstat().st_uid == os.geteuid():  # not for another user's link to a folder of ours
            shutil.rmtree(mark.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with hold(folder / _MARK):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hold(mark: Path) -> IO[str]:
    """Create the file ``mark``; it appears already locked, and stays locked for as long as anybody has it open."""
    file = mark.with_name(f"{mark.name}.new").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        Path(file.name).rename(mark)
    except BaseException:
        file.close()
        raise
    return file


def abandoned(marks: Iterable[Path]) -> Iterator[Path]:
    """Yield those of ``marks`` that belong to this user and are not locked; each is held locked until the next."""
    for mark in marks:
        # Locking fails if somebody holds the mark; opening fails if it is a symbolic link.
        with contextlib.suppress(OSError), os.fdopen(os.open(mark, os.O_RDWR | os.O_NOFOLLOW), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_uid == os.geteuid():
                yield mark
