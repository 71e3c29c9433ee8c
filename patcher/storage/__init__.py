"""Where a repository is stored, a local folder or an object store, and the few operations on it.

Names are paths relative to the repository, with ``/`` between their parts. An operation that changes several files may
be killed at any moment: what it leaves behind is something that the journal can finish or undo.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from patcher.arguments import require
from patcher.errors import InputError
from patcher.storage.disk import Disk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

__all__ = ["Replacement", "Storage", "is_url", "open_storage"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+]*)://")


class Replacement(Protocol):
    """One file's new content, prepared so that undoing the change is possible before it is made."""

    def make(self) -> None:
        """Put the new content in place atomically."""

    def undo(self) -> None:
        """Put the previous content back; does nothing if ``make`` was not called."""


class Storage(Protocol):
    """The files of one repository."""

    location: Path | str
    """The folder, or the URL, as given to ``--repo``."""
    in_one_step: bool
    """Whether a folder is added and taken away atomically; if not, a killed process can leave a part of it."""

    @property
    def served_from(self) -> str:
        """The value for tritonserver's ``--model-repository``."""

    @property
    def root(self) -> Path:
        """The folder; InputError for a repository that is not in a folder."""

    def server_environment(self) -> dict[str, str]:
        """Environment variables that a server of this repository needs in addition to the current ones."""

    def there(self) -> bool:
        """Whether the location exists."""

    def create(self, name: str, data: bytes) -> None:
        """Create the location if it does not exist, and the file in it if that does not exist."""

    def refuse_unwritable(self) -> None:
        """Raise StorageError if nothing can be written; what is written to find out is taken away again."""

    def remove(self, name: str) -> None:
        """Remove a file, which need not exist."""

    def abandon(self, name: str, *, made: bool) -> None:
        """Undo ``create``; with ``made``, remove the location as well if it is empty."""

    def read(self, name: str) -> bytes:
        """A file's content; RepositoryError if it cannot be read."""

    def find(self, name: str) -> bytes | None:
        """A file's content, or None if it does not exist; RepositoryError if it cannot be read."""

    def has(self, name: str) -> bool:
        """Whether a file exists."""

    def glob(self, *patterns: str) -> list[str]:
        """Names of the files that match one of the patterns; ``*`` matches within one part of a name."""

    def local(self, name: str) -> Path:
        """A local file with the content of ``name``, to be read only."""

    def copy_to(self, folder: Path, *, without: Sequence[str] = ()) -> None:
        """Copy everything that Triton and patcher read into ``folder``, which is created.

        ``without`` takes patterns as ``glob`` does: whatever matches one is left out, with everything below it.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Replace a file's content atomically."""

    def replacing(self, name: str, data: bytes) -> AbstractContextManager[Replacement]:
        """Like ``replace``, but in two steps: prepared, then made. It can be undone until the context ends."""

    def stamp(self) -> str:
        """A comment that makes a configuration's content unique, for storage that detects changes by content."""

    def add(self, folders: Mapping[str, Mapping[str, bytes | Path]]) -> None:
        """Add folders with their files; the last file of the last folder is the last to appear."""

    def take_away(self, folders: list[str]) -> None:
        """Remove folders (or files) in this order; those that do not exist are ignored."""

    def append(self, name: str, size: int, data: bytes) -> None:
        """Truncate a file to ``size`` bytes and append ``data``; durable when this returns."""

    def amend(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Apply ``change`` to a file's content, without losing concurrent changes; the lock must be held."""

    def rename(self, old: str, new: str) -> None:
        """Rename a file; the new name must be free."""

    def lock(self, timeout: float) -> AbstractContextManager[str]:
        """Hold the repository's lock; yields the previous holder if it never released the lock, else an empty string.

        Raises Busy if no holder has made progress for ``timeout`` seconds.
        """

    def busy(self) -> bool:
        """Whether somebody holds the lock at this moment."""


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether a location is a URL rather than a folder."""
    return isinstance(location, str) and _SCHEME.match(location) is not None


def open_storage(location: str | os.PathLike[str]) -> Storage:
    """The storage at ``location``: a folder, or ``s3://BUCKET/PATH``; it need not be a repository yet.

    Raises InputError for a URL with any other scheme.
    """
    require(str, os.PathLike, location=location)
    if not is_url(location):
        return Disk(Path(location))
    url = str(location)
    if not url.lower().startswith("s3://"):
        raise InputError(f"{url} is not a repository that patcher can read; expected a folder, or s3://BUCKET/PATH")
    # Not imported for a folder: the client takes a tenth of a second to import, and need not be installed.
    from patcher.storage.object_store import ObjectStore

    return ObjectStore(f"s3{url[2:]}")
