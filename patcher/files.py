"""The files of a model repository: its lock, its configurations, and whole models that come and go.

Three rules keep it whole, whatever is interrupted:

- a version folder appears whole and never changes again;
- what serves is the version pinned in the head's ``config.pbtxt``, replaced in one step, so that a restarted server
  serves what served before, whatever else lies beside it;
- only the holder of the lock writes, and a dead process holds no lock.

How that is done in a folder and in an object store is ``patcher.storage``'s.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher import model_config
from patcher.errors import InputError, LockLost, PatcherError, RepositoryError, StorageError
from patcher.journal import Journal
from patcher.names import CONFIG, FORMAT_FILE, JOURNAL, MODEL, STORE, holds, is_classifier_name, version_numbers
from patcher.signals import uninterrupted
from patcher.storage import Replacement, Storage, is_url, open_storage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["FORMAT", "FORMAT_SINCE", "RepositoryFiles", "enclosing", "format_file", "require_folder"]

FORMAT = 2
"""Number of the layout on disk; a repository with a larger one was written by a newer version of this project.

1: tokenizer, backbone and head are the steps of an ensemble. 2: an encoder may stand for the first two.
"""
FORMAT_SINCE = "0.4"
"""The first version that reads it."""


def require_folder(location: str | os.PathLike[str]) -> None:
    """InputError unless the repository is a folder: a head store reads heads from it that Triton would not fetch."""
    if is_url(location):
        raise InputError(
            f"{location} is not a folder: a head store reads its heads from one, and cannot be served from an "
            "object store; expected classifiers with an ensemble of their own there (without --in-store)"
        )


def format_file() -> bytes:
    """What this version writes into a repository's ``patcher.json``."""
    return (json.dumps({"format": FORMAT}) + "\n").encode()


class RepositoryFiles:
    """A folder, or a place in an object store (``s3://BUCKET/PATH``), that Triton serves and this project writes.

    Raises RepositoryError where ``location`` is none, or was written by a newer version of this project.
    """

    def __init__(self, location: str | os.PathLike[str], *, storage: Storage | None = None) -> None:
        self.storage = storage or open_storage(location)
        if not self.storage.there():
            otherwise = (
                f"`patcher export MODEL --repo {self.location}` creates one, --repo or $TRITON_MODEL_REPO names another"
            )
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
        """The folder; InputError where the repository lies in an object store."""
        return self.storage.root

    def _check_format(self) -> None:
        path = f"{self.location}/{FORMAT_FILE}"
        try:
            data = self.storage.find(FORMAT_FILE)
            number = None if data is None else json.loads(data)["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RepositoryError(f"{path} cannot be read ({error}); expected {{'format': {FORMAT}}}") from error
        if data is None:
            otherwise = f"`patcher export MODEL --repo {self.location}` adds a classifier to it"
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
    def lock(self, timeout: float = 60.0) -> Iterator[None]:
        """Hold the repository's lock; Busy when nobody who holds it has finished anything for ``timeout`` seconds.

        In a folder it is a kernel lock (flock) on an open file, so it is released when the process that holds it ends,
        however it ends. On NFS it works across machines if the mount has a working lock service. With ``nolock`` or
        ``local_lock`` it only separates the processes of one machine, and machines must be kept from working at the
        same time by other means: a version number is still never used twice, but the later of two pins wins.
        In an object store it is an object that its holder keeps refreshing. If it stops, another process takes the
        lock over, and the former holder can no longer write anything.
        The lock is not reentrant: `add_label` and its like take it themselves, so do not call them while holding it.
        """
        with self.storage.lock(timeout) as lost:
            if not self.storage.in_one_step:
                names = self.classifiers()
                for name in names if lost else ():
                    self._fence(name, lost)
                self._sweep(names)
            yield

    def _fence(self, name: str, holder: str) -> None:
        """Make sure that ``holder``, who lost the lock and may not know it, can no longer pin or record anything."""
        self.storage.amend(f"{name}_head/{CONFIG}", lambda data: data + self.storage.stamp().encode())
        Journal(self.storage, f"{name}{JOURNAL}").insist("lock taken over", holder=holder)

    def _sweep(self, classifiers: Sequence[str]) -> None:
        """Remove what is left of versions whose upload or removal was interrupted."""
        # One listing for all: there may be thousands of heads, and each listing goes through the names of all objects.
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
        """The backbone whose store serves the classifier ``name``; None for one with an ensemble of its own.

        Raises InputError where the repository lies where no head store can read its heads.
        """
        mark = self.storage.find(f"{name}_head/{STORE}")
        if mark is None:
            return None
        self.require_folder()
        return mark.decode("utf-8", "replace").strip()

    def require_folder(self) -> None:
        """InputError where the repository is no folder, which a head store needs."""
        require_folder(self.location)

    def backbones(self) -> tuple[str, ...]:
        """Names of the backbones, sorted."""
        found = self.storage.glob(f"*_features/{CONFIG}")
        return tuple(sorted(name.split("/")[0].removesuffix("_features") for name in found))

    def stores(self) -> tuple[str, ...]:
        """Names of the backbones that have a head store, sorted."""
        return tuple(name for name in self.backbones() if self.has_store(name))

    def has_store(self, backbone: str) -> bool:
        """Whether a backbone has a complete head store (its ensemble is moved in last)."""
        return self.storage.has(f"{backbone}_any/{CONFIG}")

    def remove_backbone(self, name: str) -> None:
        """Remove a backbone's models again, for an export that failed after they were added."""
        self.storage.take_away([f"{name}_{role}" for role in ("features", "encoder", "backbone", "tokenizer")])

    def remove_classifier(self, name: str) -> None:
        """Remove a classifier's models again, but not its backbone."""
        self.storage.take_away([name, f"{name}_head", f"{name}{JOURNAL}"])

    def has_remains(self, name: str) -> bool:
        """Whether there is anything of a classifier, whole or half deleted: a head, or the journal, which goes last.

        A folder ``name`` alone may be somebody else's model.
        """
        return any(self.storage.has(part) for part in (f"{name}_head/{CONFIG}", f"{name}{JOURNAL}"))

    def versions_of(self, name: str) -> tuple[int, ...]:
        """Head versions under a name, whether or not the classifier is whole."""
        return version_numbers(self.storage.glob(f"{name}_head/*/{MODEL}"))

    def versions_by_name(self) -> dict[str, tuple[int, ...]]:
        """Head versions under every name, looked for at once."""
        paths: dict[str, list[str]] = {}
        for path in self.storage.glob(f"*_head/*/{MODEL}"):
            paths.setdefault(path.split("/")[0].removesuffix("_head"), []).append(path)
        return {name: version_numbers(found) for name, found in paths.items()}

    def has_backbone(self, name: str) -> bool:
        """Whether a complete backbone of that name is there (its features ensemble is moved in last)."""
        return self.storage.has(f"{name}_features/{CONFIG}")

    def config(self, model: str) -> Any:
        """A model's ``config.pbtxt`` as a parsed message."""
        return model_config.parse(self.config_text(model), f"{self.location}/{model}/{CONFIG}")

    def config_text(self, model: str) -> str:
        """A model's ``config.pbtxt`` as it lies there; RepositoryError where it cannot be read or is not UTF-8."""
        name = f"{model}/{CONFIG}"
        try:
            return self.storage.read(name).decode()
        except UnicodeDecodeError as error:
            raise RepositoryError(f"{self.location}/{name} is not UTF-8 text: {error.reason}") from error

    def tokenizer_json(self, backbone: str) -> str:
        """The tokenizer of a backbone."""
        return self.storage.read(f"{backbone}_tokenizer/1/tokenizer.json").decode()

    def write_configs(self, configs: Mapping[str, str]) -> None:
        """Replace the ``config.pbtxt`` of some models, all or none of them; the lock must be held."""
        for model in configs:
            self.storage.read(f"{model}/{CONFIG}")  # one that is not there is named
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
        """InputError where ``name`` is taken."""
        if self.storage.has(f"{name}/{CONFIG}") or self.storage.has(f"{name}_head/{STORE}"):
            there = name in self.classifiers()
            cure = f"delete it with `patcher drop-classifier {name}`" if there else "remove its folders"
            raise InputError(f"{name} is in {self.location} already; choose another name, or {cure} first")

    def add(self, folders: Mapping[str, Mapping[str, bytes | Path]]) -> None:
        """Add models, replacing leftovers of an interrupted export but nothing that belongs to somebody else."""
        for name, files in folders.items():
            there = self.storage.glob(f"{name}/*", f"{name}/*/*")
            if there and not self._is_ours(name, files):
                raise InputError(
                    f"{self.location} already contains {name}, which patcher did not create for this "
                    "classifier; move it away, or choose another name"
                )
        self.storage.add(folders)

    def _is_ours(self, name: str, files: Mapping[str, bytes | Path]) -> bool:
        """Whether an existing model has the inputs and outputs of the one that is to replace it."""
        found, ours = self.storage.find(f"{name}/{CONFIG}"), files.get(CONFIG)
        if found is None or not isinstance(ours, bytes):
            # In a folder a model of ours appears with all its files; an upload that was cut off may lack any.
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
        """Record that the repository holds models of this version; where the body fails, all is as before.

        Older patchers do not know what an encoder is. The lock must be held.
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


def _undo(changes: Sequence[Replacement]) -> None:
    """Take all of them back, the last one first; StorageError says of each why it could not be."""
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
    """Which repository a place lies in, however deep, and which of its classifiers it may be one of; None for none."""
    for parent, name in _parents(location):
        with contextlib.suppress(PatcherError):  # what stands in a folder that cannot be read is no help
            storage = open_storage(parent)
            if storage.find(FORMAT_FILE) is not None:
                return parent, name if holds(storage, name) else ""
    return None


def _parents(location: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """What a place lies in, from the inside out, each with the name of what leads there."""
    if not is_url(location):
        path = Path(os.path.abspath(location))  # noqa: PTH100  of `..` the parent would be `.`; links stay as given
        yield from ((str(each.parent), each.name) for each in (path, *path.parents[:-1]))
        return
    parent, _, name = str(location).rstrip("/").rpartition("/")
    while is_url(parent):
        yield parent, name
        parent, _, name = parent.rpartition("/")


def _around(location: Path | str) -> str:
    """What to say instead of a place that lies in a repository; nothing where it lies in none."""
    found = enclosing(location)
    if found is None:
        return ""
    which = f" --classifier {found[1]}" if found[1] else ""
    return f"it lies inside the repository {found[0]}: expected --repo {found[0]}{which}"
