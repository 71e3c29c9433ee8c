"""Renames with a way back, and what has a file or a folder on disk when it returns."""

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

__all__ = ["Replacement", "flush_folder", "flush_tree", "move", "move_back", "replace", "set_mode"]

_LATER_NS = 1_000_000


class Replacement:
    """A file's new content, prepared beside ``before``, what is there now; ``patcher.storage`` says what each does."""

    def __init__(self, path: Path, data: bytes, before: Path, newest: int) -> None:
        self.path, self.data, self.before, self.newest = path, data, before, newest
        self.tried = False

    def make(self) -> None:
        """Put it in place."""
        self.tried = True
        self.newest = replace(self.path, self.data, self.before.parent, newer_than=self.newest)

    def undo(self) -> None:
        """Put back what was there, by one rename; StorageError where that fails."""
        with uninterrupted(), _way_back() as tried, tried(self.path):
            # What could not be made is there still, often as the very file that the way back would rename.
            if not self.tried or (self.path.exists() and self.before.samefile(self.path)):
                return
            with contextlib.suppress(OSError):  # somebody else's file, say: to rename it is allowed, to date it is not
                _date(self.before, self.newest)
            self.before.replace(self.path)
            flush_folder(self.path.parent, tolerant=True)


def move(path: Path, to: Path, moved: list[tuple[Path, Path]]) -> None:
    """Rename, noted for the way back."""
    moved.append((path, to))  # first: one that is interrupted may have been done
    path.rename(to)


def move_back(moved: Sequence[tuple[Path, Path]]) -> None:
    """Undo renames, the last one first, as far as that can be done; StorageError names what could not be put back."""
    with uninterrupted(), _way_back() as tried:
        for before, now in reversed(moved):
            with tried(before):
                if now.exists() and not before.exists():
                    now.rename(before)
        for folder in {path.parent for move in moved for path in move}:
            flush_folder(folder, tolerant=True)


@contextlib.contextmanager
def _way_back() -> Iterator[Callable[[Path], AbstractContextManager[None]]]:
    """Let each step of a way back be tried whatever becomes of the others; StorageError then names all that failed."""
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


def replace(path: Path, data: bytes, staging: Path | None = None, newer_than: int = 0) -> int:
    """Give a file new content by one rename, flushed; written in ``staging``, a folder on the same file system.

    It keeps its mode, so that whoever could read it still can. Returns its time, which is after ``newer_than``.
    """
    temporary = (staging or path.parent) / f".{path.name}.new"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            set_mode(temporary, path.stat().st_mode)
        time_ns = _date(temporary, newer_than)
    except OSError:  # half a file on a full disk helps nobody
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
    """Date a file after ``newer_than`` (in nanoseconds), unless it is; returns its time."""
    if path.stat().st_mtime_ns <= newer_than:
        os.utime(path, ns=(newer_than + _LATER_NS,) * 2)
    return path.stat().st_mtime_ns


def set_mode(path: Path, mode: int) -> None:
    """Give a file or folder a mode, unless it has it: some file systems have one for all, and let nobody set it."""
    if stat.S_IMODE(path.stat().st_mode) != stat.S_IMODE(mode):
        path.chmod(stat.S_IMODE(mode))


def flush_tree(folder: Path) -> None:
    """Have a folder and all below it on disk when this returns."""
    for directory, _, files in os.walk(folder):
        for name in files:
            with (Path(directory) / name).open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(directory))


def flush_folder(folder: Path, *, tolerant: bool = False) -> None:
    """Have the names in a folder on disk when this returns; ``tolerant`` puts up with a disk that will not."""
    # On the way back nothing may fail any more.
    with contextlib.suppress(OSError) if tolerant else contextlib.nullcontext():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
