"""A repository in a folder: files that are written whole or not at all, and errors of the disk in this project's words.

A folder is written elsewhere, flushed to disk and renamed into place; a file is replaced by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from patcher.errors import Busy, RepositoryError, StorageError
from patcher.storage.moves import Replacement, flush_folder, flush_tree, move, move_back, replace, set_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from filelock import BaseFileLock

__all__ = ["STAGING", "Disk", "read_bytes", "storage_errors", "try_writing"]

_LOCK_FILE = ".patcher.lock"
_WORKING = ".patcher-working"
"""Is there for as long as somebody holds the lock, and longer where they were killed."""
STAGING = ".patcher-staging-"
"""How the name of a folder begins in which something is prepared; where its process was killed it is still there."""
_JOURNALS = "*.journal"
_PATIENCE_SECONDS = 5.0
_FOLDER_BITS, _FILE_BITS = 0o2775, 0o664
"""What a new folder takes over from the one around it, and what a file in it does: nobody else may ever write."""


class Disk:
    """The repository in the folder ``root``; ``patcher.storage.Storage`` says what each part does."""

    in_one_step = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location: Path | str = root

    @property
    def served_from(self) -> str:
        """The folder, from wherever the server is started."""
        return str(self.root.resolve())

    def server_environment(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def there(self) -> bool:
        """Whether the folder is there."""
        try:
            return self.root.is_dir()
        except OSError:  # a name that is too long, say
            return False

    def create(self, name: str, data: bytes) -> None:
        """Make folder and file where there are none."""
        with storage_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            if not (self.root / name).exists():
                replace(self.root / name, data)

    def refuse_unwritable(self) -> None:
        """StorageError where neither the folder nor a file in it could be made."""
        with storage_errors(self.root):
            try_writing(self.root)

    def remove(self, name: str) -> None:
        """Remove a file, which need not be there."""
        (self.root / name).unlink(missing_ok=True)

    def abandon(self, name: str, *, made: bool) -> None:
        """Remove file and lock, unless another patcher is or was at work; with ``made`` the folder too, if empty."""
        if not self.root.is_dir():
            return
        with contextlib.suppress(Busy, StorageError), self.lock(0):
            if any(next(self.root.glob(pattern), None) for pattern in (_JOURNALS, "*_features/config.pbtxt")):
                return
            self.remove(name)
            (self.root / _WORKING).unlink(missing_ok=True)
            # Under the lock: whoever waits for it sees that its file is gone, and takes another.
            self.remove(_LOCK_FILE)
            if made and not any(self.root.iterdir()):
                self.root.rmdir()

    def read(self, name: str) -> bytes:
        """A file's content; RepositoryError where it cannot be read."""
        return read_bytes(self.root / name)

    def find(self, name: str) -> bytes | None:
        """A file's content, None where there is none."""
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise RepositoryError(f"cannot read {self.root / name}: {error.strerror or error}") from error

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.root / name).is_file()

    def glob(self, *patterns: str) -> list[str]:
        """Names of the files that match."""
        paths = dict.fromkeys(path for pattern in patterns for path in self.root.glob(pattern))
        return [path.relative_to(self.root).as_posix() for path in paths]

    def local(self, name: str) -> Path:
        """The file itself."""
        return self.root / name

    def copy_to(self, folder: Path, *, without: Sequence[str] = ()) -> None:
        """Copy the folder, without lock and leftovers."""
        left = {path for pattern in without for path in self.root.glob(pattern)}
        own = shutil.ignore_patterns(".patcher*")

        def ignored(path: str, names: list[str]) -> set[str]:
            return {*own(path, names), *(name for name in names if Path(path, name) in left)}

        shutil.copytree(self.root, folder, ignore=ignored)

    def replace(self, name: str, data: bytes) -> None:
        """Give a file new content by one rename."""
        if not (self.root / name).exists():
            with self._staging(_parent(name)) as staging:
                replace(self.root / name, data, staging, newer_than=self._newest(name))
            return
        with self.replacing(name, data) as replacement:
            try:
                replacement.make()
            except BaseException:
                replacement.undo()
                raise

    @contextlib.contextmanager
    def replacing(self, name: str, data: bytes) -> Iterator[Replacement]:
        """The same with a way back, which is a rename of what was there, so that it works on a full disk, too."""
        path = self.root / name
        with self._staging(_parent(name)) as staging:
            before = staging / "before"
            try:
                before.hardlink_to(path)
            except OSError:  # a file system without hard links
                shutil.copy2(path, before)
            yield Replacement(path, data, before, self._newest(name))

    def _newest(self, name: str) -> int:
        """The latest time of anything in the model that a file belongs to; 0 for a file of no model.

        A server loads a model again only where that has grown, which the clock alone does not see to: files may be
        dated ahead of it, where it was set back or where they were copied from another machine.
        """
        model, *below = PurePosixPath(name).parts
        paths = (self.root / model, *(self.root / model).rglob("*")) if below else ()
        return max((path.stat().st_mtime_ns for path in paths if path.exists()), default=0)

    def stamp(self) -> str:
        """Nothing: the kernel's lock goes with its process, so that nobody writes who lost it."""
        return ""

    def add(self, folders: Mapping[str, Mapping[str, bytes | Path]]) -> None:
        """Write all folders elsewhere, then rename one after the other into place, flushed."""
        parent = _parent(next(iter(folders)))
        with self._staging(parent) as staging:
            for name, files in folders.items():
                _write(staging / PurePosixPath(name).name, files)
            moved: list[tuple[Path, Path]] = []
            try:
                # The last name makes the whole visible; what an export left that was killed before it got there is in
                # the way.
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
        """Rename them out of the way, each in one step, and then delete: none of it asks a full disk for room."""
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
        """Write behind the first ``size`` bytes and flush; StorageError, with nothing added, where that fails."""
        path = self.root / name
        try:
            # Unbuffered: what a buffer still holds of a line that did not fit would follow when the file is closed.
            with path.open("ab", buffering=0) as file:
                try:
                    file.truncate(size)  # the torn line of a process that was killed while it wrote
                    while data:
                        data = data[file.write(data) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(path, size)
                    raise
        except OSError as error:
            raise StorageError(f"cannot write to {path}: {error.strerror or error}; nothing was changed") from error

    def amend(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Replace the file: whoever holds the lock is alone."""
        self.replace(name, change(self.find(name) or b""))

    def rename(self, old: str, new: str) -> None:
        """Give a file another name."""
        (self.root / old).rename(self.root / new)

    @contextlib.contextmanager
    def lock(self, timeout: float) -> Iterator[str]:
        """Hold the kernel's lock on a file, which goes with the process that holds it, however that ends."""
        import filelock

        lock = filelock.FileLock(self.root / _LOCK_FILE)
        with storage_errors(self.root):
            try:
                lock.acquire(timeout=0)  # what others get on with is looked at only where there are any
            except filelock.Timeout:
                self._wait(lock, timeout)
        working = self.root / _WORKING
        try:
            with storage_errors(self.root):
                if working.exists():
                    self._sweep()
                working.touch()
            try:
                yield ""
            finally:
                working.unlink(missing_ok=True)
        finally:
            lock.release()

    def busy(self) -> bool:
        """Whether somebody holds the lock at this moment."""
        import filelock

        lock = filelock.FileLock(self.root / _LOCK_FILE)
        if not (self.root / _LOCK_FILE).exists():
            return False
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return True
        except OSError:  # a folder that nobody can write to: nobody writes to it
            return False
        lock.release()
        return False

    def _wait(self, lock: BaseFileLock, timeout: float) -> None:
        import filelock

        seen, deadline = self._progress(), time.monotonic() + timeout
        while True:
            try:
                lock.acquire(timeout=min(timeout, _PATIENCE_SECONDS), poll_interval=0.02)
                return
            except filelock.Timeout as error:
                # A queue of patchers that get on is no reason to give up.
                if (now := self._progress()) != seen:
                    seen, deadline = now, time.monotonic() + timeout
                elif time.monotonic() >= deadline:
                    raise Busy(
                        f"another patcher has been working on {self.root} for {timeout:.0f} s; try again when it "
                        "is done"
                    ) from error

    def _progress(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.root.glob(_JOURNALS)}

    def _sweep(self) -> None:
        # Whoever holds the lock is alone: staging folders that lie here belong to processes that were killed. They are
        # looked for only after such a one: there may be thousands of heads to look into.
        for pattern in (f"{STAGING}*", f"*/{STAGING}*", f"*/1/{STAGING}*"):
            for leftover in self.root.glob(pattern):
                _delete(leftover)

    @contextlib.contextmanager
    def _staging(self, folder: str) -> Iterator[Path]:
        """A folder on the repository's own file system, gone afterwards.

        Inside a model's folder it bothers no server even when a killed process leaves it behind, while one at the root
        would stop a server that loads all it finds: only what adds whole models, or takes them away, stages there.
        """
        with storage_errors(self.root):
            path = Path(tempfile.mkdtemp(prefix=STAGING, dir=self.root / folder))
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)


def try_writing(folder: Path) -> None:
    """OSError where no file can be made in ``folder``, or in what is there of the folders that lead to it."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    with tempfile.TemporaryFile(dir=there):
        pass


def _parent(name: str) -> str:
    return PurePosixPath(name).parent.as_posix()


def _delete(path: Path) -> None:
    """Delete what is of no use to anybody, as far as that can be done now."""
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
    """Let those who may read and change a folder of this mode do the same with ``folder`` and all below it.

    The umask of whoever runs patcher may be narrower, and a server is often another user.
    """
    for path in (folder, *folder.rglob("*")):
        set_mode(path, mode & (_FOLDER_BITS if path.is_dir() else _FILE_BITS))


def read_bytes(path: Path) -> bytes:
    """A file's content; RepositoryError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RepositoryError(f"cannot read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def storage_errors(root: Path, state: str = "nothing was changed") -> Iterator[None]:
    """Turn what the operating system says of writing below ``root`` into a StorageError; ``state`` is how it is now.

    The body sees to it that this is true.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write to {root}: {error.strerror or error}; {state}") from error
