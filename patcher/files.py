"""The files of a model repository: its lock, its configurations, and adding and removing whole models.

Three rules keep the repository consistent, whatever is interrupted:

- a version folder appears whole and never changes again;
- the version that serves is the one pinned in the head's ``config.pbtxt``; that file is replaced atomically, so a
  restarted server serves the same version as before, whatever other versions exist;
- only the holder of the lock writes, and a dead process holds no lock.

``patcher.storage`` implements them for folders and for object stores.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from patcher import model_config
from patcher.errors import InputError, LockLost, PatcherError, RepositoryError, StorageError
from patcher.journal import Journal
from patcher.names import CONFIG, FORMAT_FILE, JOURNAL, MEMORY, MODEL, STORE, holds, is_classifier_name, version_numbers
from patcher.signals import late_signals, uninterrupted
from patcher.storage import Replacement, Storage, is_url, open_storage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["FORMAT", "FORMAT_SINCE", "RepositoryFiles", "enclosing", "format_file", "require_folder"]

FORMAT = 2
"""Version of the repository's layout; a larger number means that a newer patcher wrote it.

1: the steps of an ensemble are tokenizer, backbone and head. 2: an encoder may replace the first two.
"""
FORMAT_SINCE = "0.4"
"""The first version of patcher that reads ``FORMAT``."""
_LOCK_SECONDS = 60.0


def require_folder(location: str | os.PathLike[str]) -> None:
    """InputError unless the repository is a folder: a head store reads its heads there itself, not through Triton."""
    if is_url(location):
        raise InputError(
            f"{location} is not a folder: a head store reads its heads from one, and cannot be served from an "
            "object store; expected classifiers with an ensemble of their own there (without --in-store)"
        )


def format_file() -> bytes:
    """The ``patcher.json`` of a repository in this version's format."""
    return (json.dumps({"format": FORMAT}) + "\n").encode()


class RepositoryFiles:
    """A model repository: a folder, or a prefix in an object store (``s3://BUCKET/PATH``).

    Raises RepositoryError if ``location`` is not a repository of patcher, or if a newer version wrote it.
    """

    def __init__(self, location: str | os.PathLike[str], *, storage: Storage | None = None) -> None:
        self.storage = storage or open_storage(location)
        if not self.storage.there():
            command = f"patcher export MODEL --repo {quote(str(self.location))}"
            otherwise = f"`{command}` creates one, --repo or $TRITON_MODEL_REPO names another"
            raise RepositoryError(
                f"no model repository at {self.location}: no such folder; {_around(self.location) or otherwise}"
            )
        self._check_format()

    @property
    def location(self) -> Path | str:
        """The folder or the URL."""
        return self.storage.location

    @property
    def root(self) -> Path:
        """The folder; InputError if the repository is in an object store."""
        return self.storage.root

    def _check_format(self) -> None:
        path = f"{self.location}/{FORMAT_FILE}"
        try:
            data = self.storage.find(FORMAT_FILE)
            number = None if data is None else json.loads(data)["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RepositoryError(f"{path} cannot be read ({error}); expected {{'format': {FORMAT}}}") from error
        if data is None:
            otherwise = f"`patcher export MODEL --repo {quote(str(self.location))}` adds a classifier to it"
            raise RepositoryError(
                f"{self.location} is not a model repository of patcher: it has no {FORMAT_FILE}; "
                f"{_around(self.location) or otherwise}"
            )
        if not isinstance(number, int) or number > FORMAT or number < 1:
            raise RepositoryError(
                f"{self.location} has format {number!r}; this version of patcher knows formats up to {FORMAT}: install "
                "a newer one"
            )
        self.format = number

    @contextlib.contextmanager
    def lock(self, timeout: float | None = None) -> Iterator[None]:
        """Hold the repository's lock; Busy if the lock does not change hands for ``timeout`` seconds.

        By default, these are those of ``$PATCHER_LOCK_TIMEOUT``, else 60; InputError if that is no such number.

        In a folder it is a kernel lock (flock) on an open file, so it is released when the process that holds it ends,
        however it ends. On NFS it works across machines if the mount has a working lock service. With ``nolock`` or
        ``local_lock`` it only separates the processes of one machine, and machines must be kept from working at the
        same time by other means: a version number is still never used twice, but the later of two pins wins.

        In an object store it is a lease: an object that its holder keeps refreshing. If the holder stops, another
        process takes the lock over, and the former holder can no longer write anything.

        The lock is not reentrant: `add_label` and the like take it themselves, so do not call them while holding it.
        """
        with late_signals(), self.storage.lock(_patience() if timeout is None else timeout) as lost:
            if not self.storage.in_one_step:
                names = self.classifiers()
                for name in names if lost else ():
                    self._fence(name, lost)
                self._sweep(names)
            yield

    def _fence(self, name: str, holder: str) -> None:
        """Make sure that ``holder``, which lost the lock and may not know it, can no longer pin or record anything.

        Its writes are compare-and-swap on the configuration and the journal, so changing both makes them fail.
        """
        self.storage.amend(f"{name}_head/{CONFIG}", lambda data: data + self.storage.stamp().encode())
        Journal(self.storage, f"{name}{JOURNAL}").insist("lock taken over", holder=holder)

    def _sweep(self, classifiers: Sequence[str]) -> None:
        """Remove the remains of versions whose upload or removal was interrupted."""
        # One listing for all heads: there may be thousands, and every listing goes through the names of all objects.
        by_head: dict[str, list[str]] = {}
        for path in self.storage.glob("*_head/*/*"):
            by_head.setdefault(path.split("/")[0], []).append(path)
        for head in (f"{name}_head" for name in classifiers):
            paths = by_head.get(head, [])
            complete = version_numbers([path for path in paths if path.endswith(f"/{MODEL}")])
            parts = set(version_numbers(paths)) - set(complete)
            if parts:
                self.storage.take_away([f"{head}/{number}" for number in sorted(parts)])

    def classifiers(self) -> tuple[str, ...]:
        """Names of the classifiers, sorted."""
        found = [name.split("/") for name in self.storage.glob(f"*/{CONFIG}", f"*_head/{STORE}")]
        models, stored = ({model for model, file in found if file == kind} for kind in (CONFIG, STORE))
        names = {head.removesuffix("_head") for head in models if head.endswith("_head")}
        own = {name for name in names if name in models or f"{name}_head" in stored}
        return tuple(sorted(filter(is_classifier_name, own)))

    def stored_on(self, name: str) -> str | None:
        """The backbone whose head store serves the classifier ``name``; None if it has an ensemble of its own.

        Raises InputError for a stored classifier in an object store, where no head store can read its head.
        """
        mark = self.storage.find(f"{name}_head/{STORE}")
        if mark is None:
            return None
        self.require_folder()
        return mark.decode("utf-8", "replace").strip()

    def require_folder(self) -> None:
        """InputError unless the repository is a folder, which a head store needs."""
        require_folder(self.location)

    def backbones(self) -> tuple[str, ...]:
        """Names of the backbones, sorted."""
        found = self.storage.glob(f"*_features/{CONFIG}")
        return tuple(sorted(name.split("/")[0].removesuffix("_features") for name in found))

    def stores(self) -> tuple[str, ...]:
        """Names of the backbones that have a head store, sorted."""
        return tuple(name for name in self.backbones() if self.has_store(name))

    def has_store(self, backbone: str) -> bool:
        """Whether a backbone has a complete head store (its ensemble is added last)."""
        return self.storage.has(f"{backbone}_any/{CONFIG}")

    def remove_classifier(self, name: str) -> None:
        """Remove a classifier's models and its journal, but not its backbone."""
        self.storage.take_away([name, f"{name}_head", f"{name}{JOURNAL}"])

    def has_remains(self, name: str) -> bool:
        """Whether any part of a classifier exists, even half made or half deleted.

        That is a head, a memory (in an object store, the first file of a classifier), or the journal, which is deleted
        last. A folder ``name`` alone does not count: it may be a model that patcher did not create.
        """
        if any(self.storage.has(part) for part in (f"{name}_head/{CONFIG}", f"{name}{JOURNAL}")):
            return True
        return bool(self.storage.glob(f"{name}_head/*/{MEMORY}"))

    def remains(self) -> tuple[str, ...]:
        """Names under which there is a memory but no classifier: making or deleting one was interrupted."""
        names = {path.partition("_head/")[0] for path in self.storage.glob(f"*_head/*/{MEMORY}")}
        return tuple(sorted(names - set(self.classifiers())))

    def versions_of(self, name: str) -> tuple[int, ...]:
        """Head versions under a name, even if the classifier is incomplete."""
        return version_numbers(self.storage.glob(f"{name}_head/*/{MODEL}"))

    def versions_by_name(self) -> dict[str, tuple[int, ...]]:
        """Head versions under every name, found with one listing."""
        paths: dict[str, list[str]] = {}
        for path in self.storage.glob(f"*_head/*/{MODEL}"):
            paths.setdefault(path.split("/")[0].removesuffix("_head"), []).append(path)
        return {name: version_numbers(found) for name, found in paths.items()}

    def has_backbone(self, name: str) -> bool:
        """Whether there is a complete backbone of that name (its features ensemble is added last)."""
        return self.storage.has(f"{name}_features/{CONFIG}")

    def config(self, model: str) -> Any:
        """A model's ``config.pbtxt``, parsed into a protobuf message."""
        return model_config.parse(self.config_text(model), f"{self.location}/{model}/{CONFIG}")

    def config_text(self, model: str) -> str:
        """The text of a model's ``config.pbtxt``; RepositoryError if it cannot be read or is not UTF-8."""
        name = f"{model}/{CONFIG}"
        try:
            return self.storage.read(name).decode()
        except UnicodeDecodeError as error:
            raise RepositoryError(f"{self.location}/{name} is not UTF-8 text: {error.reason}") from error

    def tokenizer_json(self, backbone: str) -> str:
        """A backbone's ``tokenizer.json``."""
        return self.storage.read(f"{backbone}_tokenizer/1/tokenizer.json").decode()

    def write_configs(self, configs: Mapping[str, str]) -> None:
        """Replace the ``config.pbtxt`` of some models, all or none of them; the lock must be held."""
        for model in configs:
            self.storage.read(f"{model}/{CONFIG}")  # the error names a model that does not exist
        with contextlib.ExitStack() as stack:
            changes = [
                stack.enter_context(self.storage.replacing(f"{model}/{CONFIG}", text.encode()))
                for model, text in configs.items()
            ]
            try:
                for change in changes:
                    change.make()
            except BaseException:
                _undo(changes)
                raise

    def refuse_existing(self, name: str) -> None:
        """InputError if ``name`` is taken."""
        if self.storage.has(f"{name}/{CONFIG}") or self.storage.has(f"{name}_head/{STORE}"):
            there = name in self.classifiers()
            cure = f"delete it with `patcher drop-classifier {name}`" if there else "remove its folders"
            raise InputError(f"{name} is in {self.location} already; choose another name, or {cure} first")

    def add(self, folders: Mapping[str, Mapping[str, bytes | Path]]) -> None:
        """Add models. Leftovers of an interrupted export are replaced; InputError for a model that is not patcher's."""
        for name, files in folders.items():
            there = self.storage.glob(f"{name}/*", f"{name}/*/*")
            if there and not self._is_ours(name, files):
                raise InputError(
                    f"{self.location} already contains {name}, which patcher did not create for this "
                    "classifier; move it away, or choose another name"
                )
        self.storage.add(folders)

    @contextlib.contextmanager
    def added(self, folders: Mapping[str, Mapping[str, bytes | Path]]) -> Iterator[None]:
        """Add models; they are removed again if the body fails."""
        self.add(folders)
        try:
            yield
        except BaseException:
            with uninterrupted():
                self.storage.take_away([*folders][::-1])
            raise

    def _is_ours(self, name: str, files: Mapping[str, bytes | Path]) -> bool:
        """Whether an existing model has the inputs and outputs of the one that is to replace it."""
        found, ours = self.storage.find(f"{name}/{CONFIG}"), files.get(CONFIG)
        if found is None or not isinstance(ours, bytes):
            # In a folder, our models appear with all their files; an interrupted upload may lack any of them.
            return is_url(str(self.location))
        try:
            there, new = (model_config.parse(data.decode(), name) for data in (found, ours))
        except (RepositoryError, UnicodeDecodeError):
            return False
        return all(
            {tensor.name for tensor in theirs} == {tensor.name for tensor in mine}
            for theirs, mine in ((there.input, new.input), (there.output, new.output))
        )

    @contextlib.contextmanager
    def renewed_format(self) -> Iterator[None]:
        """Set the repository's format to this version's; if the body fails, restore it. The lock must be held.

        The new number keeps older patchers, which do not know encoders, from using the repository.
        """
        before = self.format
        if before >= FORMAT:
            yield
            return
        with self.storage.replacing(FORMAT_FILE, format_file()) as change:
            try:
                change.make()
                self.format = FORMAT
                yield
            except BaseException:
                self.format = before
                change.undo()
                raise


def _patience() -> float:
    """How many seconds to wait for the lock; InputError if ``$PATCHER_LOCK_TIMEOUT`` is no such number."""
    given = os.environ.get("PATCHER_LOCK_TIMEOUT")
    if not given:
        return _LOCK_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InputError(f"PATCHER_LOCK_TIMEOUT is {given!r}; expected a number of seconds, 0 or more")
    return seconds


def _undo(changes: Sequence[Replacement]) -> None:
    """Undo all changes, last one first; then StorageError reports every undo that failed."""
    failed: list[StorageError] = []
    with uninterrupted():
        for change in reversed(changes):
            try:
                change.undo()
            except StorageError as error:
                failed.append(error)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        kind = LockLost if all(isinstance(error, LockLost) for error in failed) else StorageError
        raise kind(". ".join(map(str, failed)))


def enclosing(location: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The repository that contains ``location``, at any depth; None if there is none.

    Returned with the name of the classifier that ``location`` lies in, which is empty if it lies in none.
    """
    for parent, name in _parents(location):
        with contextlib.suppress(PatcherError):  # skip a folder that cannot be read
            storage = open_storage(parent)
            if storage.find(FORMAT_FILE) is not None:
                return parent, name if holds(storage, name) else ""
    return None


def _parents(location: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """The parents of ``location``, innermost first, each with the name of the child that leads to ``location``."""
    if not is_url(location):
        path = Path(os.path.abspath(location))  # noqa: PTH100  of `..` the parent would be `.`; links stay as given
        yield from ((str(each.parent), each.name) for each in (path, *path.parents[:-1]))
        return
    parent, _, name = str(location).rstrip("/").rpartition("/")
    while is_url(parent):
        yield parent, name
        parent, _, name = parent.rpartition("/")


def _around(location: Path | str) -> str:
    """Advice that names the repository around ``location``; empty if there is none."""
    found = enclosing(location)
    if found is None:
        return ""
    which = f" --classifier {found[1]}" if found[1] else ""
    return f"it lies inside the repository {found[0]}: expected --repo {found[0]}{which}"
