"""Files that are written whole or not at all, and errors of the disk in this project's words."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.errors import RepositoryError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["flush_folder", "flush_tree", "read_bytes", "read_text", "replace", "storage"]


def read_bytes(path: Path) -> bytes:
    """A file's content; RepositoryError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RepositoryError(f"cannot read {path}: {error.strerror or error}") from error


def read_text(path: Path) -> str:
    """A file's text; RepositoryError where it cannot be read or is not UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise RepositoryError(f"{path} is not UTF-8 text: {error.reason}") from error


@contextlib.contextmanager
def storage(root: Path) -> Iterator[None]:
    """Turn what the operating system says of writing below ``root`` into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write to {root}: {error.strerror or error}; nothing was changed") from error


def replace(path: Path, data: bytes, staging: Path | None = None) -> None:
    """Give a file new content by one rename, flushed; written in ``staging``, a folder on the same file system."""
    temporary = (staging or path.parent) / f".{path.name}.new"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush_folder(path.parent)


def flush_tree(folder: Path) -> None:
    """Have a folder and all below it on disk when this returns."""
    for directory, _, files in os.walk(folder):
        for name in files:
            with (Path(directory) / name).open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(directory))


def flush_folder(folder: Path, *, tolerant: bool = False) -> None:
    """Have the names in a folder on disk when this returns; ``tolerant`` puts up with a disk that will not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # on the way back nothing may fail any more
        if not tolerant:
            raise
    finally:
        os.close(descriptor)
