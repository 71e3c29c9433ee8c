"""A repository in an object store, which offers neither renames nor reliable locks.

Instead of renaming a folder, the objects of a version are uploaded one by one, the head last, and no server loads the
version before the single PUT that pins it. Instead of a lock, there is a lease object (``patcher.lease``), and every
write is a compare-and-swap: it succeeds only if the object is still the one that was read under the lease.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
import uuid
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.errors import InputError, LockLost, RepositoryError, StorageError
from patcher.lease import REQUEST_SECONDS, Lease
from patcher.storage.disk import storage_errors
from patcher.storage.s3 import Bucket
from patcher.triton.prepared import in_use, take_away

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["ObjectStore"]

_LOCK = ".patcher.lock"
_TRIES = 20


class ObjectStore:
    """The repository at an ``s3://`` URL; ``patcher.storage.Storage`` documents the interface.

    While the lock is held, objects that were read are cached: nobody else should write, and if somebody does, the next
    write to that object fails instead of overwriting it.
    """

    in_one_step = False

    def __init__(self, url: str) -> None:
        self.bucket = Bucket(url)
        self.location: Path | str = self.bucket.url
        self._lease: Lease | None = None
        self._known: dict[str, tuple[str | None, bytes | None]] = {}
        self._listed: set[str] | None = None

    @property
    def served_from(self) -> str:
        """The URL including the endpoint, since tritonserver does not know $AWS_ENDPOINT_URL."""
        return self.bucket.served_from

    def server_environment(self) -> dict[str, str]:
        """The region: without it, tritonserver's client spends ten seconds looking for one, as if it ran on EC2."""
        return {"AWS_DEFAULT_REGION": self.bucket.region}

    @property
    def root(self) -> Path:
        """Raises InputError: there is no folder."""
        raise InputError(f"{self.location} is not a folder; this needs a repository on this machine")

    def there(self) -> bool:
        """Always True: a missing bucket is noticed when it is read."""
        return True

    def create(self, name: str, data: bytes) -> None:
        """Write the object if it does not exist."""
        if self.bucket.tag(name) is None:
            with contextlib.suppress(LockLost):  # somebody else created it first
                self.bucket.put(name, data, None)

    def refuse_unwritable(self) -> None:
        """Write an object and delete it: nothing else tells whether that is allowed. Raises StorageError if not."""
        probe = f".patcher-probe-{uuid.uuid4().hex}"
        self.bucket.put(probe, b"", None)
        self.bucket.delete(probe)

    def remove(self, name: str) -> None:
        """Delete an object, which need not exist."""
        self._check()
        self.bucket.delete(name)
        self._forget(name)

    def abandon(self, name: str, *, made: bool) -> None:  # noqa: ARG002  there are no folders
        """Delete the object if there is nothing else but the lock, which stays: others may already hold it."""
        with contextlib.suppress(StorageError):  # the error to report is the one that led here
            if self._names() <= {name, _LOCK}:
                self.remove(name)

    def read(self, name: str) -> bytes:
        """An object's content; RepositoryError if it does not exist."""
        data = self.find(name)
        if data is None:
            raise RepositoryError(f"cannot read {self.location}/{name}: no such object")
        return data

    def find(self, name: str) -> bytes | None:
        """An object's content, or None if it does not exist."""
        return self._get(name)[1]

    def has(self, name: str) -> bool:
        """Whether the object exists."""
        return name in self._names() if self._lease else self.bucket.tag(name) is not None

    def glob(self, *patterns: str) -> list[str]:
        """Names of the objects that match, part by part; only names with the patterns' common prefix are requested."""
        parts = [pattern.split("/") for pattern in patterns]
        below = os.path.commonprefix([re.split(r"[*?\[]", pattern)[0] for pattern in patterns])  # noqa: RUF071  of names
        names = self._names() if self._lease else self.bucket.names(below)
        return sorted(name for name in names if any(_matches(name.split("/"), each) for each in parts))

    def local(self, name: str) -> Path:
        """A copy in the user's cache, downloaded once for each ETag of the object; kept until unused for a month."""
        tag = self.bucket.tag(name)
        if tag is None:
            raise RepositoryError(f"cannot read {self.location}/{name}: no such object")
        key = hashlib.sha256(f"{self.bucket.served_from}/{name} {tag}".encode()).hexdigest()
        path = _cache() / key[:40] / Path(name).name
        with storage_errors(path):
            while not (_requested(path.parent) and path.is_file()):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as folder:
                    self.bucket.download(name, Path(folder) / path.name)
                    (Path(folder) / path.name).replace(path)
                take_away(_cache(), "[0-9a-f]*", path.parent)
        return path

    def copy_to(self, folder: Path, *, without: Sequence[str] = ()) -> None:
        """Download everything except the lock."""
        left = [pattern.split("/") for pattern in without]
        with storage_errors(folder):
            for name in self._names() - {_LOCK}:
                parts = name.split("/")
                if any(_matches(parts[: len(pattern)], pattern) for pattern in left):
                    continue
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self.bucket.download(name, folder / name)

    def replace(self, name: str, data: bytes) -> None:
        """Overwrite an object on the condition that it is still the one that was read."""
        self._put(name, data, self._get(name)[0])

    @contextlib.contextmanager
    def replacing(self, name: str, data: bytes) -> Iterator[_Replacement]:
        """Like ``replace``, but it can be undone."""
        yield _Replacement(self, name, data, self.read(name))

    def stamp(self) -> str:
        """A unique comment: without it, two pins at different times could have equal content and thus the same ETag."""
        return f"# patcher {uuid.uuid4().hex}\n"

    def add(self, folders: Mapping[str, Mapping[str, bytes | Path]]) -> None:
        """Upload the files one by one, each only if it does not exist."""
        # Leftovers of an export that was killed before it was complete.
        self.take_away(list(folders))
        try:
            for folder, files in folders.items():
                for name, content in files.items():
                    self._put(f"{folder}/{name}", content, None)
        except LockLost:  # the object that is there now belongs to somebody else
            raise
        except BaseException:
            self._listed = None  # an upload that reported an error may have succeeded nevertheless
            with contextlib.suppress(StorageError):
                self.take_away(list(folders))
            raise

    def take_away(self, folders: list[str]) -> None:
        """Delete folder by folder, starting in each with what makes it complete: the configuration, the head."""
        for folder in folders:
            names = [name for name in self._names() if name == folder or name.startswith(f"{folder}/")]
            for name in sorted(names, key=lambda name: (not name.endswith(("config.pbtxt", "/model.onnx")), name)):
                self.remove(name)

    def append(self, name: str, size: int, data: bytes) -> None:
        """Overwrite the whole object on the condition that it is still the one that was read."""
        tag, content = self._get(name)
        self._put(name, (content or b"")[:size] + data, tag)

    def amend(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Read, change and write, and retry if somebody else wrote in between (compare-and-swap)."""
        for _ in range(_TRIES):
            self._known.pop(name, None)
            self._check()
            with contextlib.suppress(LockLost):
                tag, content = self._get(name)
                self._put(name, change(content or b""), tag)
                return
        raise LockLost(f"{self.location}/{name} keeps being changed by others; nothing was changed")

    def rename(self, old: str, new: str) -> None:
        """Write the content under the new name, then delete the old object."""
        self._put(new, self.read(old), None)
        self.remove(old)

    @contextlib.contextmanager
    def lock(self, timeout: float) -> Iterator[str]:
        """Hold the lock object."""
        lease = Lease(self._hurried, _LOCK)
        lost = lease.acquire(timeout, self._progress)
        self._lease, self._known, self._listed = lease, {}, None
        try:
            yield lost
        finally:
            self._lease, self._known, self._listed = None, {}, None
            lease.release()

    def busy(self) -> bool:
        """Whether somebody holds the lock object and keeps renewing it."""
        return Lease(self._hurried, _LOCK).held()

    @cached_property
    def _hurried(self) -> Bucket:
        """The bucket with short timeouts, for the lock: its holder cannot wait for an answer longer than it lasts."""
        return self.bucket.hurried(REQUEST_SECONDS)

    def _progress(self) -> dict[str, str]:
        return {name: tag for name, tag in self.bucket.names().items() if name.endswith(".journal")}

    def _check(self) -> None:
        if self._lease:
            self._lease.check()

    def _get(self, name: str) -> tuple[str | None, bytes | None]:
        if name in self._known:
            return self._known[name]
        found = self.bucket.get(name)
        pair = (found.tag, found.data) if found else (None, None)
        if self._lease:
            self._known[name] = pair
        return pair

    def _put(self, name: str, content: bytes | Path, tag: str | None) -> None:
        self._check()
        new = self.bucket.put(name, content, tag)
        if self._lease:
            self._known.pop(name, None)
            if isinstance(content, bytes):
                self._known[name] = (new, content)
            if self._listed is not None:
                self._listed.add(name)

    def _names(self) -> set[str]:
        if self._listed is not None:
            return self._listed
        found = set(self.bucket.names())
        if self._lease:
            self._listed = found
        return found

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        if self._listed is not None:
            self._listed.discard(name)

    def read_again(self, name: str) -> bytes:
        """An object's content as it is now, bypassing the cache."""
        self._known.pop(name, None)
        return self.read(name)

    def pace(self, name: str) -> None:
        """Wait until a new write of an object will have a later date: a store dates objects by whole seconds.

        By that date a server decides whether to reload.
        """
        found = self.bucket.get(name)
        if found and found.age < 1.0:
            time.sleep(1.0)

    def suppose(self, name: str, data: bytes) -> None:
        """While the lock is held, assume that an object has this content: the store cannot be asked now."""
        if self._lease:
            self._known[name] = ("", data)


class _Replacement:
    def __init__(self, storage: ObjectStore, name: str, data: bytes, before: bytes) -> None:
        self.storage, self.name, self.data, self.before = storage, name, data, before
        self.tried = False

    def make(self) -> None:
        self.tried = True
        self.storage.pace(self.name)
        self.storage.replace(self.name, self.data)

    def undo(self) -> None:
        if not self.tried:
            return
        try:
            # A PUT that reported an error may have succeeded. What somebody else has written since is not undone.
            if self.storage.read_again(self.name) == self.data:
                self.storage.pace(self.name)
                self.storage.replace(self.name, self.before)
        except StorageError:
            self.storage.suppose(self.name, self.data)
            raise


def _matches(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatchcase, name, pattern))


def _requested(folder: Path) -> bool:
    """Record that a folder of the cache is used, which keeps it for another month; False if it does not exist."""
    mark = in_use(folder)
    if mark is not None and mark >= 0:
        os.close(mark)
    return mark is not None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patcher" / "objects"
