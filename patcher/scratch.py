"""Temporary folders that do not outlive their process for long: what a killed one left, the next one takes away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scratch"]

_MARK = ".patcher-alive"
"""Locked for as long as the folder's process lives; the lock is the kernel's, and goes with it."""


@contextlib.contextmanager
def scratch(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder in ``parent`` (by default the system's for temporary files), gone afterwards.

    Those of the same ``prefix`` whose process is gone are taken away first. Raises OSError where none can be made.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    _sweep(parent, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / f"{_MARK}.new").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Path(file.name).rename(folder / _MARK)  # locked from its first moment on
        yield


def _sweep(parent: Path, prefix: str) -> None:
    for mark in parent.glob(f"{prefix}*/{_MARK}"):
        # Somebody else's cannot be opened, one whose process lives cannot be locked, and no link leads anywhere.
        with contextlib.suppress(OSError), os.fdopen(os.open(mark, os.O_RDWR | os.O_NOFOLLOW), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if mark.parent.lstat().st_uid == os.geteuid():
                shutil.rmtree(mark.parent, ignore_errors=True)
