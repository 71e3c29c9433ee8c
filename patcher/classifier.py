"""One classifier of a repository: its head versions, and the one that serves.

A version's folder appears whole and never changes again. The version that serves is the one pinned in the head's
``config.pbtxt``. That file is replaced atomically, so a restarted server serves the same version as before, whatever
other versions exist. A journal records every change that was begun and how it ended (``patcher.journal``). Version
numbers are never reused.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

from patcher import layout, model_config
from patcher.backbone import Backbone
from patcher.errors import InputError, RepositoryError, StorageError, VersionError
from patcher.head_file import read_head, read_lineage
from patcher.journal import Journal, hashes
from patcher.memory_file import read_memory
from patcher.names import CONFIG, JOURNAL, MEMORY, MODEL, version_numbers
from patcher.signals import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from patcher.files import RepositoryFiles
    from patcher.head import Head, Lineage
    from patcher.memory import Memory

__all__ = ["Classifier", "add_classifier"]

_Read = TypeVar("_Read")

_CURE = "restore it from a copy, or switch to another version and prune this one"
_CURES = {MEMORY: "restore it from a copy, or build it anew by `patcher remember --data FILE`"}


class Classifier(Backbone):
    """One classifier of a repository, with its backbone, its head versions and the one that serves."""

    def __init__(self, repository: RepositoryFiles, name: str) -> None:
        stored = repository.stored_on(name)
        super().__init__(repository, stored or _backbone_of(repository, name))
        self.name = name
        self.in_store = stored is not None
        self.head_model = f"{name}_head"
        self.journal = Journal(self.storage, f"{name}{JOURNAL}")

    def __repr__(self) -> str:
        return f"<Classifier {self.name} at {self.repository.location}>"

    @property
    def ensemble(self) -> str:
        """The ensemble that answers for this classifier: its own, or the head store's."""
        return self.any_model if self.in_store else self.name

    @property
    def address(self) -> str:
        """Its name for ``TritonServer.classify`` and the like: ``NAME``, or ``ENSEMBLE/NAME`` in a head store."""
        return f"{self.any_model}/{self.name}" if self.in_store else self.name

    @property
    def head_address(self) -> str:
        """Its name for ``TritonServer.head_logits``: the head's model, or ``STORE/NAME`` in a head store."""
        return f"{self.store_model}/{self.name}" if self.in_store else self.head_model

    def versions(self) -> tuple[int, ...]:
        """All complete head versions, ascending."""
        return version_numbers(self.storage.glob(f"{self.head_model}/*/{MODEL}"))

    def incomplete(self) -> tuple[int, ...]:
        """Numbers of version folders that have files but no head, ascending: the remains of an interrupted copy."""
        folders = version_numbers(self.storage.glob(f"{self.head_model}/*/*"))
        return tuple(sorted(set(folders) - set(self.versions())))

    def serving(self) -> int:
        """The version that a server of this repository serves: the one pinned in the head's configuration."""
        pinned = model_config.pinned_versions(self.repository.config(self.head_model))
        if not pinned:
            path = f"{self.repository.location}/{self.head_model}/{CONFIG}"
            raise RepositoryError(f"{path} pins no version; expected version_policy {{ specific {{ versions: N }} }}")
        return max(pinned)

    def version_path(self, version: int) -> Path:
        """Path of a version's folder; VersionError if there is no such version.

        Raises InputError if the repository is in an object store.
        """
        return self.root / self.version_name(version)

    def version_name(self, version: int) -> str:
        """Name of a version's folder, relative to the repository; VersionError if there is no such version."""
        name = f"{self.head_model}/{version}"
        if not self.storage.has(f"{name}/{MODEL}"):
            there = ", ".join(map(str, self.versions())) or "none"
            pruned = version in self.journal.pruned()
            what = f"version {version} of {self.name} was pruned" if pruned else f"{self.name} has no version {version}"
            raise VersionError(f"{what}; there are {there} (`patcher history`)")
        return name

    def head(self, version: int | None = None, *, published: bool = False) -> Head:
        """A head version, the serving one by default.

        Pass ``published=True`` for a head that will serve or be patched. It raises RepositoryError if the file is not
        the one that was published: damaged weights are still valid numbers, so nothing else would detect them.
        """
        number = self.serving() if version is None else version
        head = self._read(number, read_head, published=published)
        self._check(number, head.lineage)
        self._require_width(f"version {number} of {self.name}", head.width, _CURE)
        return head

    def lineage(self, version: int) -> Lineage:
        """The lineage of a version, read without its rows in a tenth of the time."""
        lineage = self._read(version, read_lineage)
        self._check(version, lineage)
        return lineage

    def _read(self, version: int, reader: Callable[[bytes], _Read], *, published: bool = False) -> _Read:
        data = self.head_bytes(version)
        if published:
            self.require_published(version, {MODEL: data})
        try:
            return reader(data)
        except RepositoryError as error:
            raise RepositoryError(
                f"{self._file(version)}: {error}; `patcher rollback --to N` needs none but version N"
            ) from error

    def _check(self, version: int, lineage: Lineage) -> None:
        if lineage.version != version:
            raise RepositoryError(f"{self._file(version)} says it is version {lineage.version}; expected {version}")

    def _require_width(self, what: str, got: int, cure: str) -> None:
        """RepositoryError if a head or memory has another width than the backbone: it belongs to another one."""
        if got != (expected := self.width()):
            raise RepositoryError(
                f"{what} is for {got:,} features; expected {expected:,}, as {self.backbone_model} gives; {cure}"
            )

    def _file(self, version: int) -> str:
        return f"{self.repository.location}/{self.head_model}/{version}/{MODEL}"

    def head_bytes(self, version: int) -> bytes:
        """The stored file of a head version."""
        return self.storage.read(f"{self.version_name(version)}/{MODEL}")

    def memory(self, version: int | None = None, *, published: bool = False) -> Memory | None:
        """The memory beside a head version, None if it has none; ``published`` is as in ``head``."""
        number = self.serving() if version is None else version
        name = f"{self.version_name(number)}/{MEMORY}"
        data = self.storage.find(name)
        if published:  # checks a missing memory too: the caller would silently continue without it
            self.require_published(number, {MEMORY: data})
        if data is None:
            return None
        try:
            memory = read_memory(data)
        except RepositoryError as error:
            raise RepositoryError(
                f"{self.repository.location}/{name}: {error}; `patcher remember --data FILE` rebuilds it"
            ) from error
        self._require_width(f"the memory of version {number} of {self.name}", memory.width, _CURES[MEMORY])
        return memory

    def next_version(self) -> int:
        """The number of the next patch: above every number ever used here, including withdrawn and pruned versions."""
        return max((*self.versions(), *self.incomplete(), *self.journal.published()), default=0) + 1

    def publish(self, head: Head, memory: Memory | None, data: bytes | None = None) -> None:
        """Add a new version, which serves once it is pinned. The lock must be held.

        ``data`` is the head's file, if it was serialized already.
        """
        version = head.lineage.version
        name = f"{self.head_model}/{version}"
        if self.storage.glob(f"{name}/*"):
            raise StorageError(f"version {version} of {self.name} is there already; nothing was changed")
        files = layout.version_files(head, memory, data)
        self.journal.append("publish", version=version, parent=head.lineage.parent, files=hashes(files))
        try:
            self.storage.add({name: files})
        except BaseException:
            if self.storage.has(f"{name}/{MODEL}"):  # moved into place, but could not be flushed to disk
                with contextlib.suppress(StorageError):
                    self.withdraw(version)
            else:
                self.note("undone", serving=self.serving())
            raise

    def adopt(self) -> tuple[int, ...]:
        """Record versions that the journal lacks (made by an older patcher), and return them. The lock must be held."""
        known = self.journal.published()
        missing = [version for version in self.versions() if version not in known]
        for version in missing:
            self.journal.append("adopted", version=version, files=hashes(self.files(version)))
        return tuple(missing)

    def files(self, version: int) -> dict[str, bytes]:
        """The stored files of a version, by name."""
        names = sorted(self.storage.glob(f"{self.version_name(version)}/*"))
        return {name.rpartition("/")[2]: self.storage.read(name) for name in names if self.storage.has(name)}

    def require_published(
        self, version: int, files: Mapping[str, bytes | None], recorded: Mapping[str, str] | None = None
    ) -> None:
        """RepositoryError if one of a version's ``files`` is missing (None) or not the one that was published.

        ``recorded`` are the SHA-256 sums by file name; by default they are read from the journal.
        """
        recorded = self.journal.published().get(version) if recorded is None else recorded
        if recorded is None:  # made by a patcher that wrote no journal
            return
        found = hashes({name: data for name, data in files.items() if data is not None})
        for name in sorted(files):
            now, then = found.get(name), recorded.get(name)
            if now == then:
                continue
            said = "was published and is gone"
            if now is not None:
                said = f"was changed after it was published: its SHA-256 is {now[:12]}, the journal says "
                said += "none" if then is None else then[:12]
            raise RepositoryError(f"{name} of version {version} of {self.name} {said}; {_CURES.get(name, _CURE)}")

    def note(self, event: str, **values: Any) -> None:
        """Append to the journal, ignoring a StorageError: if the entry is missing, the next change records the same."""
        with contextlib.suppress(StorageError):
            self.journal.append(event, **values)

    def pin(self, version: int) -> None:
        """Make ``version`` the one that serves, atomically; servers notice at their next load. Needs the lock."""
        with self.pinned(version):
            pass

    @contextlib.contextmanager
    def pinned(self, version: int) -> Iterator[None]:
        """Pin ``version``; if the body fails, the previous pin is restored. The lock must be held.

        The rollback is prepared before anything changes, so that it works even on a full disk.
        """
        self.version_name(version)
        name = f"{self.head_model}/{CONFIG}"
        previous = self.serving()
        text = self.repository.config_text(self.head_model)
        text = model_config.with_pin(text, (version,), f"{self.repository.location}/{name}") + self.storage.stamp()
        with contextlib.ExitStack() as end:
            with self.storage.replacing(name, text.encode()) as replacement:
                self.journal.append("switch", **{"from": previous, "to": version})
                try:
                    replacement.make()
                    yield
                    end.enter_context(uninterrupted())  # the body has succeeded: no interrupt may undo it now
                except BaseException:
                    with uninterrupted():
                        replacement.undo()
                        self.note("back", to=previous)
                    raise
            self.note("done", serving=version)

    def withdraw(self, version: int) -> None:
        """Delete a version that never served; VersionError for the serving one. The lock must be held."""
        if version == self.serving():
            raise VersionError(f"version {version} of {self.name} serves; roll back before it is withdrawn")
        if not self.storage.in_one_step:
            # If the deletion is interrupted, this entry tells the next command what to finish. A process that has lost
            # the lock cannot write it, and so deletes nothing.
            self.journal.append("withdrawn", versions=[version])
        self._take_away([version])
        self.note("undone", serving=self.serving())

    def prune(self, versions: Sequence[int]) -> None:
        """Delete old versions for good; VersionError for the serving one. The lock must be held."""
        if self.serving() in versions:
            raise VersionError(f"version {self.serving()} of {self.name} serves; it is never pruned")
        # The entry comes first: if the deletion is interrupted, the next change finishes it. Versions deleted without
        # an entry would be reported as missing, like files that were lost.
        self.journal.append("pruned", versions=list(versions))
        self._take_away(versions)

    def half_gone(self) -> list[int]:
        """Versions that still exist although the journal records them as deleted: the deletion was interrupted."""
        gone = self.journal.pruned() | self.journal.withdrawn()
        return sorted(gone & set(self.versions()) - {self.serving()})

    def _take_away(self, versions: Sequence[int]) -> None:
        self.storage.take_away([f"{self.head_model}/{version}" for version in versions])


def add_classifier(
    repository: RepositoryFiles,
    name: str,
    head: Head,
    memory: Memory | None = None,
    *,
    base: Backbone,
    in_store: bool = False,
    share: float | None = None,
) -> Classifier:
    """Add a classifier on an existing backbone, with ``head`` as its first version; the lock must be held.

    With ``in_store``, the backbone's head store answers for it instead of an ensemble and a head model of its own. With
    ``share``, it is the canary of another classifier, for that percentage of the requests.

    Raises
    ------
    InputError
        if the name is taken, or there is no head store.
    RepositoryError
        if the head was made for another backbone, or patched versions of an earlier classifier of that name remain.
    """
    repository.refuse_existing(name)
    if len(repository.versions_of(name)) > 1:
        raise RepositoryError(
            f"{repository.location}/{name}_head holds patched versions, but {name}/{CONFIG} is missing: restore "
            f"that file, or delete what is left by `patcher drop-classifier {name}`"
        )
    if in_store and not repository.has_store(base.backbone_name):
        raise InputError(
            f"the backbone {base.backbone_name} has no head store; `--in-store` of `patcher new-classifier` or "
            "`patcher export` adds one"
        )
    width, fingerprint = base.width(), base.fingerprint()
    if (head.width, head.lineage.backbone) != (width, fingerprint):
        raise RepositoryError(
            f"the head belongs to backbone {head.lineage.backbone[:12]} with {head.width} features; "
            f"{base.backbone_name} is {fingerprint[:12]} with {width}"
        )
    try:
        repository.add(
            layout.stored_folders(name, head, memory, base.backbone_name)
            if in_store
            else layout.classifier_folders(name, head, memory, base.encoding(), share)
        )
        # The journal of an earlier classifier of this name, whose folders were deleted by hand.
        repository.storage.remove(f"{name}{JOURNAL}")
        classifier = Classifier(repository, name)
        classifier.adopt()
    except InputError:  # a folder of that name is not patcher's: leave it alone
        raise
    except BaseException:
        with uninterrupted(), contextlib.suppress(StorageError):
            repository.remove_classifier(name)
        raise
    return classifier


def _backbone_of(repository: RepositoryFiles, name: str) -> str:
    """Name of the backbone whose encoder (before 0.4.0: tokenizer) is the first step of the classifier's ensemble."""
    steps = repository.config(name).ensemble_scheduling.step
    first = str(steps[0].model_name) if len(steps) > 1 else ""
    backbone = first.removesuffix("_encoder").removesuffix("_tokenizer")
    if backbone == first:
        raise RepositoryError(
            f"{repository.location}/{name}/{CONFIG} is no classifier: it begins with {first or 'nothing'!r}, expected "
            "BACKBONE_encoder"
        )
    return backbone
