"""Renames and replacements that can be undone, and flushing files and folders to disk."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.errors import StorageError
from patcher.signals import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

__all__ = ["Replacement", "flush_folder", "flush_tree", "mode_in", "move", "move_back", "replace", "set_mode"]

_LATER_NS = 1_000_000
FILE_BITS = 0o664
"""Mode bits that a new file inherits from its folder: never write access for others."""


class Replacement:
    """A file's new content, to replace the one kept as ``before``; ``patcher.storage`` documents the interface.

    ``newest`` is the modification time (ns) that the new file's has to exceed.
    """

    def __init__(self, path: Path, data: bytes, before: Path, newest: int) -> None:
        self.path, self.data, self.before, self.newest = path, data, before, newest
        self.tried = False

    def make(self) -> None:
        """Put the new content in place."""
        self.tried = True
        self.newest = replace(self.path, self.data, self.before.parent, newer_than=self.newest)

    def undo(self) -> None:
        """Put the previous content back by one rename; StorageError if that fails."""
        with uninterrupted(), _way_back() as tried, tried(self.path):
            # If the new content was not put in place, the old file is still there, usually hard-linked to ``before``.
            if not self.tried or (self.path.exists() and self.before.samefile(self.path)):
                return
            with contextlib.suppress(OSError):  # a file of another user, for example, may be renamed but not dated
                _date(self.before, self.newest)
            self.before.replace(self.path)
            flush_folder(self.path.parent, tolerant=True)


def move(path: Path, to: Path, moved: list[tuple[Path, Path]]) -> None:
    """Rename a file or folder, and record that in ``moved`` so that it can be undone."""
    moved.append((path, to))  # recorded first: an interrupted rename may have taken place
    path.rename(to)


def move_back(moved: Sequence[tuple[Path, Path]]) -> None:
    """Undo as many renames as possible, the last one first; StorageError names those that could not be undone."""
    with uninterrupted(), _way_back() as tried:
        for before, now in reversed(moved):
            with tried(before):
                if now.exists() and not before.exists():
                    now.rename(before)
        for folder in {path.parent for move in moved for path in move}:
            flush_folder(folder, tolerant=True)


@contextlib.contextmanager
def _way_back() -> Iterator[Callable[[Path], AbstractContextManager[None]]]:
    """Try every step of an undo even if others fail; StorageError then names all that failed."""
    failed: dict[Path, OSError] = {}

    @contextlib.contextmanager
    def tried(path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            failed[path] = error

    yield tried
    if failed:
        reasons = ", ".join(dict.fromkeys(str(error.strerror or error) for error in failed.values()))
        raise StorageError(
            f"writing failed, and {', '.join(map(str, failed))} could not be put back as before, either: {reasons}; "
            "`patcher doctor` says what is there now"
        ) from next(iter(failed.values()))


def replace(path: Path, data: bytes, staging: Path | None = None, newer_than: int = 0, *, shared: bool = False) -> int:
    """Replace a file's content by one rename, and flush it.

    The new file is written to ``staging``, a folder on the same file system. It keeps the old one's mode, so whoever
    could read it still can. Without an old one, the umask decides, or with ``shared`` the folder's mode. Returns its
    modification time, which is later than ``newer_than`` (both in ns).
    """
    temporary = (staging or path.parent) / f".{path.name}.new"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists() or shared:
            set_mode(temporary, path.stat().st_mode if path.exists() else mode_in(path.parent))
        time_ns = _date(temporary, newer_than)
    except OSError:  # leave no partial file on a full disk
        temporary.unlink(missing_ok=True)
        raise
    new = not path.exists()
    temporary.replace(path)
    try:
        flush_folder(path.parent)
    except OSError:
        if new:
            path.unlink(missing_ok=True)
        raise
    return time_ns


def _date(path: Path, newer_than: int) -> int:
    """Make sure that a file's modification time is later than ``newer_than`` (in ns), and return it."""
    if path.stat().st_mtime_ns <= newer_than:
        os.utime(path, ns=(newer_than + _LATER_NS,) * 2)
    return path.stat().st_mtime_ns


def set_mode(path: Path, mode: int) -> None:
    """Set the mode of a file or folder if it differs: some file systems have a fixed mode and reject any change."""
    if stat.S_IMODE(path.stat().st_mode) != stat.S_IMODE(mode):
        path.chmod(stat.S_IMODE(mode))


def mode_in(folder: Path) -> int:
    """The mode of a new file in ``folder`` that whoever may read or change the folder may read or change, too.

    The umask of whoever creates the file may be more restrictive.
    """
    return folder.stat().st_mode & FILE_BITS | stat.S_IRUSR | stat.S_IWUSR


def flush_tree(folder: Path) -> None:
    """Flush a folder and everything below it to disk."""
    for directory, _, files in os.walk(folder):
        for name in files:
            with (Path(directory) / name).open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(directory))


def flush_folder(folder: Path, *, tolerant: bool = False) -> None:
    """Flush the entries of a folder to disk; ``tolerant`` ignores errors."""
    # An undo must not fail on this.
    with contextlib.suppress(OSError) if tolerant else contextlib.nullcontext():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
