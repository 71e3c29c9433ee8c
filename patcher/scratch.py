"""What is only for as long as a process lives, and does not stay for long where that was killed.

A mark, a file that its process holds locked, tells: the lock is the kernel's, and goes with the last process that has
the file open. So what the next one finds under a mark that nobody holds is nobody's, and it takes that away.
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

__all__ = ["abandoned", "hold", "scratch"]

_MARK = ".patcher-alive"


@contextlib.contextmanager
def scratch(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder in ``parent`` (by default the system's for temporary files), gone afterwards.

    Those of the same ``prefix`` whose process is gone are taken away first. Raises OSError where none can be made.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    for mark in abandoned(parent.glob(f"{prefix}*/{_MARK}")):
        if mark.parent.lstat().st_uid == os.geteuid():  # which a link to a folder of ours need not be
            shutil.rmtree(mark.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with hold(folder / _MARK):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hold(mark: Path) -> IO[str]:
    """Make the file ``mark``, locked from its first moment on, for as long as somebody has it open."""
    file = mark.with_name(f"{mark.name}.new").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        Path(file.name).rename(mark)
    except BaseException:
        file.close()
        raise
    return file


def abandoned(marks: Iterable[Path]) -> Iterator[Path]:
    """Those of ``marks`` that are ours and that nobody holds; each is locked until the next is asked for."""
    for mark in marks:
        # One that somebody holds cannot be locked; and no link is followed.
        with contextlib.suppress(OSError), os.fdopen(os.open(mark, os.O_RDWR | os.O_NOFOLLOW), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_uid == os.geteuid():
                yield mark
