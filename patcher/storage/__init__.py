"""Where a repository lies, and the few things that are done there: a folder of this machine, or an object store.

Names are paths below the repository with ``/`` between their parts. Whatever changes more than one file is made so that
a kill at any moment leaves what the journal can finish or undo.
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
    """One file's new content, prepared so that the way back is known before the first step."""

    def make(self) -> None:
        """Put the new content in place, in one step."""

    def undo(self) -> None:
        """Put back what was there; nothing where nothing was made."""


class Storage(Protocol):
    """The files of one repository."""

    location: Path | str
    """The folder, or the URL, as ``--repo`` takes it."""
    in_one_step: bool
    """Whether a folder comes and goes in one step; else a killed process can leave a part of it."""

    @property
    def served_from(self) -> str:
        """What tritonserver takes as ``--model-repository``."""

    @property
    def root(self) -> Path:
        """The folder; InputError for a repository that is none."""

    def server_environment(self) -> dict[str, str]:
        """What a server of this repository should find in its environment, beside what is there."""

    def there(self) -> bool:
        """Whether there is anything at all at the location."""

    def create(self, name: str, data: bytes) -> None:
        """Make the place where there is none, with a file in it, unless that is there already."""

    def refuse_unwritable(self) -> None:
        """StorageError where it can be told without a change that nothing can be written."""

    def remove(self, name: str) -> None:
        """Remove a file, which need not be there."""

    def abandon(self, name: str, *, made: bool) -> None:
        """Take back ``create``; with ``made`` the place itself too, if it is empty."""

    def read(self, name: str) -> bytes:
        """A file's content; RepositoryError where it cannot be read."""

    def find(self, name: str) -> bytes | None:
        """A file's content, None where there is no such file; RepositoryError where it cannot be read."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def glob(self, *patterns: str) -> list[str]:
        """Names of the files that match one of the patterns; ``*`` stands for one part, or a piece of one."""

    def local(self, name: str) -> Path:
        """A file of this machine with that content, to read."""

    def copy_to(self, folder: Path, *, without: Sequence[str] = ()) -> None:
        """Copy everything that Triton and patcher read into ``folder``, which is made.

        ``without`` are patterns as ``glob`` takes them: what matches one is left out, with all below it.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Give a file new content in one step."""

    def replacing(self, name: str, data: bytes) -> AbstractContextManager[Replacement]:
        """The same in two: prepared, then made, with a way back until the context ends."""

    def stamp(self) -> str:
        """A comment that makes a configuration's content unique, where that is how writers tell versions apart."""

    def add(self, folders: Mapping[str, Mapping[str, bytes | Path]]) -> None:
        """Add folders with their files; the last file of the last one is the last to appear."""

    def take_away(self, folders: list[str]) -> None:
        """Take folders (or files) away, in this order; those that are not there do not count."""

    def append(self, name: str, size: int, data: bytes) -> None:
        """Have ``data`` follow the first ``size`` bytes of a file, on disk when this returns."""

    def amend(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Change a file whatever others do to it at the same time; the lock must be held."""

    def rename(self, old: str, new: str) -> None:
        """Give a file another name that is free."""

    def lock(self, timeout: float) -> AbstractContextManager[str]:
        """Hold the repository's lock; who held it before and never gave it back, else nothing.

        Raises Busy when nobody who holds it has finished anything for ``timeout`` seconds.
        """

    def busy(self) -> bool:
        """Whether somebody holds the lock at this moment."""


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether a location is a URL rather than a folder."""
    return isinstance(location, str) and _SCHEME.match(location) is not None


def open_storage(location: str | os.PathLike[str]) -> Storage:
    """The storage at ``location``: a folder, or ``s3://BUCKET/PATH``; it need not be a repository yet.

    Raises InputError for a URL that is none of an object store.
    """
    require(str, os.PathLike, location=location)
    if not is_url(location):
        return Disk(Path(location))
    url = str(location)
    if not url.lower().startswith("s3://"):
        raise InputError(f"{url} is not a repository that patcher can read; expected a folder, or s3://BUCKET/PATH")
    # Never imported for a folder: the client takes a tenth of a second, and need not be installed.
    from patcher.storage.object_store import ObjectStore

    return ObjectStore(f"s3{url[2:]}")
