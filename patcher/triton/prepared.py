"""Folders that were put together for a server, in the user's cache: which are in use, and which may go.

Each interpreter and installation has one of its own, so that those of earlier ones would stay for ever. Whoever uses
one holds a mark in it locked, shared with others, and hands that on to the server: the lock is the kernel's, and goes
with the last process that has it open.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.scratch import abandoned, scratch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MARK", "in_use", "make_private", "take_away"]

MARK = ".patcher-used"
"""Its time says when the folder was last asked for."""
_UNUSED_SECONDS = 30 * 24 * 3600
"""Installations that take turns keep their folders: to put one together anew takes a second of each start."""


def make_private(folder: Path) -> None:
    """Close a folder to others, where it is there and is ours."""
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(folder.lstat().st_mode) and _owned(folder):
            folder.chmod(0o700)


def in_use(folder: Path) -> int | None:
    """Hold ``folder`` for as long as the descriptor is open; None where it is not there (any more).

    -1 for one that cannot be marked, as on a file system that is read-only: nobody takes it away there.
    """
    mark = folder / MARK
    while True:
        try:
            descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            return None
        except OSError:
            return -1 if folder.is_dir() else None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # whoever takes the folder away is done in a moment
            os.utime(descriptor)
            if os.path.samestat(os.fstat(descriptor), mark.stat()):
                return descriptor
        except FileNotFoundError:  # it was taken away meanwhile
            pass
        except OSError:  # a file system without locks
            return descriptor
        os.close(descriptor)


def take_away(base: Path, pattern: str, mine: Path) -> None:
    """Remove folders in ``base`` that nobody asked for in a month and nobody uses, but ``mine``."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        trash: Path | None = None
        for folder in _unused([each for each in base.glob(pattern) if each != mine]):
            trash = trash or stack.enter_context(scratch(".triton-", base))
            folder.rename(trash / folder.name)  # in one step: nobody finds half of it


def _unused(folders: list[Path]) -> Iterator[Path]:
    before = time.time() - _UNUSED_SECONDS
    for mark in abandoned(folder / MARK for folder in folders):
        if mark.stat().st_mtime < before:
            yield mark.parent
    # Those of patcher before 0.13 have no mark; what runs from one names it in its command line.
    unmarked = [folder for folder in folders if folder.is_dir() and not (folder / MARK).exists()]
    old = [folder for folder in unmarked if _owned(folder) and folder.stat().st_mtime < before]
    running = _command_lines() if old else b""
    yield from (folder for folder in old if os.fsencode(folder.name) not in running)


def _owned(folder: Path) -> bool:
    return folder.lstat().st_uid == os.geteuid()


def _command_lines() -> bytes:
    """Of every process that can be seen."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it is gone meanwhile
            found.append(path.read_bytes())
    return b"\n".join(found)
