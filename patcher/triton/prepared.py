"""Folders in the user's cache: which ones are in use, and which ones may be removed.

Each interpreter and installation has its own folder for servers, and each file of an object store has one, so folders
of earlier ones would stay forever. Whoever uses a folder holds a shared lock on a mark file in it, and passes the
descriptor on to the server. The kernel releases the lock when the last process that has the descriptor open ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.scratch import KEPT_SECONDS, abandoned, scratch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MARK", "in_use", "make_private", "take_away"]

MARK = ".patcher-used"
"""The mark file; its modification time is when the folder was last requested."""


def make_private(folder: Path) -> None:
    """Make a folder inaccessible to other users, if it exists and is ours."""
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(folder.lstat().st_mode) and _owned(folder):
            folder.chmod(0o700)


def in_use(folder: Path) -> int | None:
    """Mark ``folder`` as in use for as long as the returned descriptor is open; None if the folder does not exist.

    Returns -1 if it cannot be marked, as on a read-only file system, where nobody can remove it either.
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
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # may wait for a process that removes the folder, but not for long
            os.utime(descriptor)
            if os.path.samestat(os.fstat(descriptor), mark.stat()):
                return descriptor
        except FileNotFoundError:  # it was removed in the meantime
            pass
        except OSError:  # a file system without locks
            return descriptor
        os.close(descriptor)


def take_away(base: Path, pattern: str, mine: Path) -> None:
    """Remove folders in ``base`` that are not in use and were not requested for a month, except ``mine``."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        trash: Path | None = None
        for folder in _unused([each for each in base.glob(pattern) if each != mine]):
            trash = trash or stack.enter_context(scratch(".triton-", base))
            folder.rename(trash / folder.name)  # atomic, so that nobody finds half of a folder


def _unused(folders: list[Path]) -> Iterator[Path]:
    before = time.time() - KEPT_SECONDS  # so installations used alternately keep their folders
    for mark in abandoned(folder / MARK for folder in folders):
        if mark.stat().st_mtime < before:
            yield mark.parent
    # Folders of patcher before 0.13 have no mark; a server that runs from one has its path in the command line.
    unmarked = [folder for folder in folders if folder.is_dir() and not (folder / MARK).exists()]
    old = [folder for folder in unmarked if _owned(folder) and folder.stat().st_mtime < before]
    running = _command_lines() if old else b""
    yield from (folder for folder in old if os.fsencode(folder.name) not in running)


def _owned(folder: Path) -> bool:
    return folder.lstat().st_uid == os.geteuid()


def _command_lines() -> bytes:
    """The command lines of all visible processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended in the meantime
            found.append(path.read_bytes())
    return b"\n".join(found)
