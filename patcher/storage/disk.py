"""A repository in a folder: atomic writes, and errors of the operating system as errors of this project.

A new folder is written to a staging folder, flushed to disk and renamed into place; a file is replaced by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from patcher.errors import Busy, RepositoryError, StorageError
from patcher.storage.listing import matching
from patcher.storage.moves import (
    FILE_BITS,
    Replacement,
    flush_folder,
    flush_tree,
    mode_in,
    move,
    move_back,
    replace,
    set_mode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from filelock import BaseFileLock

__all__ = ["STAGING", "Disk", "read_bytes", "storage_errors", "try_writing"]

_LOCK_FILE = ".patcher.lock"
_WORKING = ".patcher-working"
"""Marker file that exists while somebody holds the lock; it remains if the holder was killed."""
STAGING = ".patcher-staging-"
"""Prefix of the folders in which changes are prepared; such a folder remains if its process was killed."""
_JOURNALS = "*.journal"
_PATIENCE_SECONDS = 5.0
_FOLDER_BITS = 0o2775
"""Mode bits that a new folder inherits from its parent: never write access for others."""


class Disk:
    """The repository in the folder ``root``; ``patcher.storage.Storage`` documents the interface."""

    in_one_step = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location: Path | str = root

    @property
    def served_from(self) -> str:
        """The absolute path, which is valid wherever the server is started."""
        return str(self.root.resolve())

    def server_environment(self) -> dict[str, str]:
        """Empty: a server needs no variables to read a folder."""
        return {}

    def there(self) -> bool:
        """Whether the folder exists."""
        try:
            return self.root.is_dir()
        except OSError:  # the name is too long, for example
            return False

    def create(self, name: str, data: bytes) -> None:
        """Create the folder and the file if they do not exist."""
        with storage_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            if not (self.root / name).exists():
                replace(self.root / name, data, shared=True)

    def refuse_unwritable(self) -> None:
        """Raise StorageError if the folder, or a file in it, could not be created."""
        with storage_errors(self.root):
            try_writing(self.root)

    def remove(self, name: str) -> None:
        """Remove a file, which need not exist."""
        (self.root / name).unlink(missing_ok=True)

    def abandon(self, name: str, *, made: bool) -> None:
        """Remove the file and the lock, unless another patcher is or was at work here.

        With ``made``, remove the folder as well if it is empty.
        """
        if not self.root.is_dir():
            return
        with contextlib.suppress(Busy, StorageError), self.lock(0):
            if any(next(self.root.glob(pattern), None) for pattern in (_JOURNALS, "*_features/config.pbtxt")):
                return
            self.remove(name)
            (self.root / _WORKING).unlink(missing_ok=True)
            # Removed while the lock is held: whoever waits for it notices that the file is gone, and creates a new one.
            self.remove(_LOCK_FILE)
            if made and not any(self.root.iterdir()):
                self.root.rmdir()

    def read(self, name: str) -> bytes:
        """A file's content; RepositoryError if it cannot be read."""
        return read_bytes(self.root / name)

    def find(self, name: str) -> bytes | None:
        """A file's content, or None if it does not exist."""
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise RepositoryError(f"cannot read {self.root / name}: {error.strerror or error}") from error

    def has(self, name: str) -> bool:
        """Whether the file exists; RepositoryError if its folder cannot be searched."""
        try:
            return stat.S_ISREG((self.root / name).stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise RepositoryError(f"cannot read {self.root / name}: {error.strerror or error}") from error

    def glob(self, *patterns: str) -> list[str]:
        """Names of the files that match; RepositoryError for a folder that cannot be read, but may hold a model."""
        return matching(self.root, patterns)

    def local(self, name: str) -> Path:
        """The file itself."""
        return self.root / name

    def copy_to(self, folder: Path, *, without: Sequence[str] = ()) -> None:
        """Copy the folder without the lock and leftovers."""
        left = {path for pattern in without for path in self.root.glob(pattern)}
        own = shutil.ignore_patterns(".patcher*")

        def ignored(path: str, names: list[str]) -> set[str]:
            return {*own(path, names), *(name for name in names if Path(path, name) in left)}

        shutil.copytree(self.root, folder, ignore=ignored)

    def replace(self, name: str, data: bytes) -> None:
        """Replace a file's content by one rename."""
        if not (self.root / name).exists():
            with self._staging(_parent(name)) as staging:
                replace(self.root / name, data, staging, self._newest(name), shared=True)
            return
        with self.replacing(name, data) as replacement:
            try:
                replacement.make()
            except BaseException:
                replacement.undo()
                raise

    @contextlib.contextmanager
    def replacing(self, name: str, data: bytes) -> Iterator[Replacement]:
        """Like ``replace``, but it can be undone: by renaming the old file back, which works even on a full disk."""
        path = self.root / name
        with self._staging(_parent(name)) as staging:
            before = staging / "before"
            try:
                before.hardlink_to(path)
            except OSError:  # a file system without hard links
                shutil.copy2(path, before)
            yield Replacement(path, data, before, self._newest(name))

    def _newest(self, name: str) -> int:
        """The latest modification time (ns) of anything in the model that a file belongs to; 0 for a file of no model.

        Triton reloads a model only if this time has increased. The clock alone does not ensure that: files may be dated
        in the future because the clock was set back or because they were copied from another machine.
        """
        model, *below = PurePosixPath(name).parts
        paths = (self.root / model, *(self.root / model).rglob("*")) if below else ()
        return max((path.stat().st_mtime_ns for path in paths if path.exists()), default=0)

    def stamp(self) -> str:
        """Empty: a process keeps the kernel's lock until it ends, so nobody writes after losing it."""
        return ""

    def add(self, folders: Mapping[str, Mapping[str, bytes | Path]]) -> None:
        """Write all folders to a staging folder, then flush them and rename them into place one by one."""
        parent = _parent(next(iter(folders)))
        with self._staging(parent) as staging:
            for name, files in folders.items():
                _write(staging / PurePosixPath(name).name, files)
            moved: list[tuple[Path, Path]] = []
            try:
                # The last rename makes the whole visible. Leftovers of an export that was killed before that point may
                # be in the way.
                for name in folders:
                    target, made = self.root / name, staging / PurePosixPath(name).name
                    if target.exists():
                        move(target, staging / f"leftover-{target.name}", moved)
                    _share(made, target.parent.stat().st_mode)
                    flush_tree(made)
                    move(made, target, moved)
                flush_folder(self.root / parent)
            except BaseException:
                move_back(moved)
                raise

    def take_away(self, folders: list[str]) -> None:
        """Rename each one out of the way atomically, then delete them: this needs no space on a full disk."""
        moved: list[tuple[Path, Path]] = []
        with storage_errors(self.root, "nothing was taken away"):
            try:
                for path in (self.root / name for name in folders):
                    if path.exists():
                        move(path, path.with_name(f"{STAGING}{secrets.token_hex(4)}"), moved)
            except BaseException:
                move_back(moved)
                raise
        for _, aside in moved:
            _delete(aside)

    def append(self, name: str, size: int, data: bytes) -> None:
        """Write after the first ``size`` bytes and flush; StorageError, with nothing added, if that fails."""
        path = self.root / name
        try:
            # Unbuffered: a buffer would write the rest of a line that did not fit when the file is closed.
            with path.open("ab", buffering=0) as file:
                try:
                    if not size:
                        set_mode(path, mode_in(self.root))
                    file.truncate(size)  # drops the incomplete line of a process that was killed while writing
                    while data:
                        data = data[file.write(data) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(path, size)
                    raise
        except OSError as error:
            raise StorageError(f"cannot write to {path}: {error.strerror or error}; nothing was changed") from error

    def amend(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Replace the file: while the lock is held, nobody else changes it."""
        self.replace(name, change(self.find(name) or b""))

    def rename(self, old: str, new: str) -> None:
        """Rename a file."""
        (self.root / old).rename(self.root / new)

    @contextlib.contextmanager
    def lock(self, timeout: float) -> Iterator[str]:
        """Hold the kernel's lock on a file, which is released when its process ends, however that happens."""
        import filelock

        with storage_errors(self.root):
            mode = mode_in(self.root)
            lock = filelock.FileLock(self.root / _LOCK_FILE, mode=mode)
            try:
                lock.acquire(timeout=0)  # the progress of others is checked only if somebody else holds the lock
            except filelock.Timeout:
                self._wait(lock, timeout)
        with contextlib.suppress(OSError):  # its owner lets the others in, whom an earlier version kept out
            set_mode(self.root / _LOCK_FILE, mode)
        working = self.root / _WORKING
        try:
            with storage_errors(self.root):
                if working.exists():
                    self._sweep()
                else:
                    working.touch()
            try:
                yield ""
            finally:
                working.unlink(missing_ok=True)
        finally:
            lock.release()

    def busy(self) -> bool:
        """Whether somebody holds the lock at this moment.

        Whoever may not read the lock file gets True after a kill as well, until the next patcher has cleaned up.
        """
        try:
            descriptor = os.open(self.root / _LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return (self.root / _WORKING).exists()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # all that a file opened for reading may ask for
        except OSError:  # also where there is no flock: there the file exists only while somebody holds the lock
            return True
        finally:
            os.close(descriptor)
        return False

    def _wait(self, lock: BaseFileLock, timeout: float) -> None:
        import filelock

        seen, deadline = self._progress(), time.monotonic() + timeout
        while True:
            try:
                lock.acquire(timeout=min(timeout, _PATIENCE_SECONDS), poll_interval=0.02)
                return
            except filelock.Timeout as error:
                # Do not give up while the patchers ahead in the queue make progress.
                if (now := self._progress()) != seen:
                    seen, deadline = now, time.monotonic() + timeout
                elif time.monotonic() >= deadline:
                    raise Busy(
                        f"another patcher is working on {self.root} and made no progress for {timeout:g} s; try again "
                        "when it is done"
                    ) from error

    def _progress(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.root.glob(_JOURNALS)}

    def _sweep(self) -> None:
        # The lock is held, so any staging folder left here belongs to a process that was killed. This search runs only
        # after such a kill, since there may be thousands of heads to look into.
        for pattern in (f"{STAGING}*", f"*/{STAGING}*", f"*/1/{STAGING}*"):
            for leftover in self.root.glob(pattern):
                _delete(leftover)

    @contextlib.contextmanager
    def _staging(self, folder: str) -> Iterator[Path]:
        """A temporary folder on the repository's own file system, removed afterwards.

        If a killed process leaves it behind inside a model's folder, no server minds. At the root, it would stop a
        server that loads everything it finds, so that is done only to add or take away whole models.
        """
        with storage_errors(self.root):
            path = Path(tempfile.mkdtemp(prefix=STAGING, dir=self.root / folder))
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)


def try_writing(folder: Path) -> None:
    """Raise OSError if no file can be created in ``folder`` or, if that is missing, its nearest existing parent."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    with tempfile.TemporaryFile(dir=there):
        pass


def _parent(name: str) -> str:
    return PurePosixPath(name).parent.as_posix()


def _delete(path: Path) -> None:
    """Delete a file or folder that nobody needs any more, ignoring errors."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _write(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            shutil.copyfile(content, path)


def _share(folder: Path, mode: int) -> None:
    """Give everyone who may read or change a folder of this ``mode`` the same access to ``folder`` and all below it.

    The umask of whoever runs patcher may be more restrictive, and the server often runs as another user.
    """
    for path in (folder, *folder.rglob("*")):
        set_mode(path, mode & (_FOLDER_BITS if path.is_dir() else FILE_BITS))


def read_bytes(path: Path) -> bytes:
    """A file's content; RepositoryError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RepositoryError(f"cannot read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def storage_errors(root: Path, state: str = "nothing was changed") -> Iterator[None]:
    """Turn an OSError from writing below ``root`` into a StorageError.

    ``state`` tells the user how things are after the failure; the body of the context must make sure that it is true.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write to {root}: {error.strerror or error}; {state}") from error
