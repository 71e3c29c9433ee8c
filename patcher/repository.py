"""The model repository on disk: which classifiers there are, their head versions, and which one serves.

Three rules keep it whole, whatever is interrupted:

- a version folder is written elsewhere, flushed to disk and renamed into place, and never changes again;
- what serves is the version pinned in the head's ``config.pbtxt``, replaced by one rename, so that a restarted server
  serves what served before, whatever else lies beside it;
- only the holder of the lock writes, and a dead process holds no lock.

Beside them a journal tells what was begun and how it ended (``patcher.journal``); numbers are never given twice.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher import model_config
from patcher.backbone import Backbone
from patcher.disk import flush_folder, flush_tree, read_bytes, read_text, replace, storage
from patcher.errors import Busy, InputError, RepositoryError, StorageError, VersionError
from patcher.head_file import read_head, write_head
from patcher.journal import Journal, hashes
from patcher.memory import Memory

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from patcher.head import Head

__all__ = ["CANARY", "FORMAT", "BackboneFiles", "Classifier", "ModelRepository", "check_name", "holds"]

FORMAT = 1
"""Number of the layout on disk; a repository with a larger one was written by a newer version of this project."""

CANARY = "_canary"
"""A classifier of this ending is another one's version on trial (``patcher.canary``)."""

_FORMAT_FILE = "patcher.json"
_LOCK_FILE = ".patcher.lock"
_WORKING = ".patcher-working"
"""Is there for as long as somebody holds the lock, and longer where they were killed."""
_STAGING = ".patcher-staging-"
_JOURNAL = ".journal"
_PATIENCE_SECONDS = 5.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ROLES = ("_head", "_features", "_tokenizer", "_backbone", "_heads", "_any", CANARY)
_MODEL = "model.onnx"
_MEMORY = "memory.safetensors"
_CONFIG = "config.pbtxt"
_STORE = "store"
"""Beside the versions of a head that a store serves: the name of the store's backbone."""
_NAMED_IN_ERRORS = 8


def check_name(name: str) -> str:
    """The name of a classifier or backbone if it can be a folder and a Triton model, else InputError."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot name a model: expected letters, digits, '_', '-' and '.', at most 64 of them"
        )
    if name.endswith(_ROLES):
        raise InputError(f"{name!r} cannot name a classifier: names ending in {', '.join(_ROLES)} belong to its parts")
    return name


def holds(root: Path, name: str) -> bool:
    """Whether there is a classifier ``name`` at ``root``, which need be no repository."""
    own = _NAME.fullmatch(name) is not None and (root / f"{name}_head" / _CONFIG).is_file()
    return own and ((root / name / _CONFIG).is_file() or (root / f"{name}_head" / _STORE).is_file())


@dataclass(frozen=True)
class BackboneFiles:
    """What an export hands over: the ONNX file of the backbone, and the tokenizer before it."""

    model: Path
    fingerprint: str
    """SHA-256 of the file."""
    tokenizer_json: str
    """A Rust tokenizer with padding and truncation switched on."""
    token_inputs: tuple[str, ...]
    width: int
    device: str = "cpu"
    """``gpu`` places the backbone there, and all else on the CPU; ``cpu`` leaves it to Triton."""
    tensorrt: str = ""
    """Precision in which TensorRT runs the backbone on a GPU; empty leaves it to CUDA."""


class ModelRepository:
    """A folder that Triton serves and this project writes.

    Raises RepositoryError where ``root`` is none, or was written by a newer version of this project.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if not _is_folder(self.root):
            raise RepositoryError(
                f"no model repository at {self.root}: no such folder; `patcher export MODEL --repo {self.root}` makes "
                "one, --repo or $TRITON_MODEL_REPO names another"
            )
        self._check_format()

    @classmethod
    def create(cls, root: str | os.PathLike[str]) -> ModelRepository:
        """Open the repository at ``root``, making folder and format file where there are none."""
        path = Path(root)
        with storage(path):
            path.mkdir(parents=True, exist_ok=True)
            if not (path / _FORMAT_FILE).exists():
                replace(path / _FORMAT_FILE, (json.dumps({"format": FORMAT}) + "\n").encode())
        return cls(path)

    def _check_format(self) -> None:
        path = self.root / _FORMAT_FILE
        try:
            number = json.loads(path.read_text())["format"]
        except FileNotFoundError:
            raise RepositoryError(
                f"{self.root} is no model repository of patcher: it has no {_FORMAT_FILE}; "
                f"`patcher export MODEL --repo {self.root}` adds a classifier to it"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RepositoryError(f"{path} cannot be read ({error}); expected {{'format': {FORMAT}}}") from error
        if not isinstance(number, int) or number > FORMAT or number < 1:
            raise RepositoryError(
                f"{self.root} has format {number!r}; this patcher knows formats up to {FORMAT}: upgrade patcher"
            )

    def classifiers(self) -> tuple[str, ...]:
        """Names of the classifiers, sorted."""
        heads = (path.parent.name for path in self.root.glob(f"*_head/{_CONFIG}"))
        names = (head.removesuffix("_head") for head in heads)
        return tuple(sorted(name for name in names if holds(self.root, name)))

    def stored_on(self, name: str) -> str | None:
        """The backbone whose store serves the classifier ``name``; None for one with an ensemble of its own."""
        try:
            return (self.root / f"{name}_head" / _STORE).read_text("utf-8", "replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def classifier(self, name: str | None = None) -> Classifier:
        """One classifier by name; without a name the only one there is, canaries apart."""
        # One that is named is looked for alone: a store may hold thousands.
        if name is not None and holds(self.root, name):
            return Classifier(self, name)
        names = self.classifiers()
        if name is None:
            names = tuple(each for each in names if not each.endswith(CANARY))
            if len(names) != 1:
                found = f"{len(names)} classifiers ({_some(names)})" if names else "no classifier"
                raise InputError(f"{self.root} holds {found}; expected --classifier NAME with one of them")
            return Classifier(self, names[0])
        raise InputError(f"no classifier {check_name(name)!r} in {self.root}; it holds {_some(names, name) or 'none'}")

    def backbones(self) -> tuple[str, ...]:
        """Names of the backbones, sorted."""
        found = (path.parent.name.removesuffix("_features") for path in self.root.glob(f"*_features/{_CONFIG}"))
        return tuple(sorted(found))

    def backbone(self, name: str | None = None) -> Backbone:
        """One backbone by name; without a name the only one there is."""
        if name is not None and self.has_backbone(check_name(name)):
            return Backbone(self, name)
        names = self.backbones()
        if name is None and len(names) == 1:
            return Backbone(self, names[0])
        if name is None:
            found = f"{len(names)} backbones ({_some(names)})" if names else "no backbone"
            raise InputError(f"{self.root} holds {found}; expected --backbone NAME with one of them")
        raise InputError(f"no backbone {name!r} in {self.root}; it holds {_some(names, name) or 'none'}")

    @contextlib.contextmanager
    def lock(self, timeout: float = 60.0) -> Iterator[None]:
        """Hold the repository's lock; Busy when nobody who holds it has finished anything for ``timeout`` seconds.

        The lock is the kernel's (flock), on an open file: it goes with the process that holds it, however that ends.
        On NFS it holds between machines where the mount has a working lock service; mounted with ``nolock`` or
        ``local_lock`` it keeps only the processes of one machine apart, and two machines must take turns by other
        means: a version number is then still never taken twice, but of two pins the later one stands.
        Whoever holds it waits in vain for a second one: `add_label` and its like take it themselves.
        """
        import filelock

        lock = filelock.FileLock(self.root / _LOCK_FILE)
        with storage(self.root):
            try:
                lock.acquire(timeout=0)  # what others get on with is looked at only where there are any
            except filelock.Timeout:
                self._wait(lock, timeout)
        working = self.root / _WORKING
        try:
            with storage(self.root):
                if working.exists():
                    self._sweep()
                working.touch()
            try:
                yield
            finally:
                working.unlink(missing_ok=True)
        finally:
            lock.release()

    def _wait(self, lock: Any, timeout: float) -> None:
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
        return {path.name: path.stat().st_mtime_ns for path in self.root.glob(f"*{_JOURNAL}")}

    def _sweep(self) -> None:
        # Whoever holds the lock is alone: staging folders that lie here belong to processes that were killed. They are
        # looked for only after such a one: there may be thousands of heads to look into.
        for pattern in (f"{_STAGING}*", f"*_head/{_STAGING}*"):
            for leftover in self.root.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    @contextlib.contextmanager
    def staging(self, model: str = "") -> Iterator[Path]:
        """A folder on the repository's own file system, gone afterwards; the lock must be held.

        Inside a model's folder it bothers no server even when a killed process leaves it behind, while one at the root
        would stop a server that loads all it finds: only exports, which make new models, stage there.
        """
        with storage(self.root):
            path = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.root / model))
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)

    def add_backbone(self, name: str, files: BackboneFiles) -> None:
        """Add a backbone with its tokenizer and features ensemble under ``name``; the lock must be held."""
        check_name(name)
        parts = {role: f"{name}_{role}" for role in ("tokenizer", "backbone", "features")}
        self.refuse_existing(parts["features"])
        configs = (
            model_config.tokenizer_config(parts["tokenizer"], files.token_inputs, files.device),
            model_config.backbone_config(
                parts["backbone"], files.token_inputs, files.width, files.fingerprint, files.device, files.tensorrt
            ),
            model_config.features_config(
                parts["features"], parts["tokenizer"], parts["backbone"], files.token_inputs, files.width
            ),
        )
        with self.staging() as staging:
            for config in configs:
                _stage_model(staging / config.name, config)
            (staging / parts["tokenizer"] / "1" / "model.py").write_bytes(_source("tokenizer"))
            (staging / parts["tokenizer"] / "1" / "tokenizer.json").write_text(files.tokenizer_json, encoding="utf-8")
            shutil.copyfile(files.model, staging / parts["backbone"] / "1" / _MODEL)
            self._move_in(staging, [config.name for config in configs])

    def add_store(self, backbone: Backbone) -> None:
        """Add the head store of a backbone, which serves any number of classifiers; the lock must be held."""
        tokens, width = backbone.token_inputs(), backbone.width()
        configs = (
            model_config.store_config(backbone.store_model, width, backbone.backbone),
            model_config.any_config(
                backbone.any_model, backbone.tokenizer_model, backbone.backbone_model, backbone.store_model, tokens
            ),
        )
        with self.staging() as staging:
            for config in configs:
                _stage_model(staging / config.name, config)
            (staging / backbone.store_model / "1" / "model.py").write_bytes(_source("heads"))
            self._move_in(staging, [config.name for config in configs])

    def stores(self) -> tuple[str, ...]:
        """Names of the backbones that have a head store, sorted."""
        return tuple(name for name in self.backbones() if self.has_store(name))

    def has_store(self, backbone: str) -> bool:
        """Whether a backbone has a complete head store (its ensemble is moved in last)."""
        return (self.root / f"{backbone}_any" / _CONFIG).is_file()

    def remove_store(self, backbone: Backbone) -> None:
        """Take a head store's models out again."""
        self._remove([backbone.any_model, backbone.store_model])

    def add_classifier(
        self,
        name: str,
        head: Head,
        memory: Memory | None = None,
        *,
        backbone: str,
        in_store: bool = False,
        share: float | None = None,
    ) -> Classifier:
        """Add a classifier over a backbone that is there, with ``head`` as its first version; the lock must be held.

        ``in_store`` leaves the answers to the backbone's head store instead of an ensemble and a head model of its own;
        ``share`` makes it the canary of another, for that many per cent of the requests.
        """
        check_name(name if share is None else name.removesuffix(CANARY))
        self.refuse_existing(name)
        if len(_versions(self.root / f"{name}_head")) > 1:
            raise RepositoryError(
                f"{self.root}/{name}_head holds patched versions, but {name}/{_CONFIG} is missing: restore that file, "
                "or move the folder away first"
            )
        base = self.backbone(backbone)
        width, fingerprint = base.width(), base.fingerprint()
        if in_store and not self.has_store(backbone):
            raise InputError(f"the backbone {backbone} has no head store; `patcher new-classifier --in-store` adds one")
        if (head.width, head.lineage.backbone) != (width, fingerprint):
            raise RepositoryError(
                f"the head belongs to backbone {head.lineage.backbone[:12]} with {head.width} features; "
                f"{backbone} is {fingerprint[:12]} with {width}"
            )
        version = head.lineage.version
        configs = [model_config.head_config(f"{name}_head", head.width, version)]
        if not in_store:
            configs.append(
                model_config.classifier_config(
                    name, base.tokenizer_model, base.backbone_model, f"{name}_head", base.token_inputs(), share
                )
            )
        with self.staging() as staging:
            for config in configs:
                _stage_model(staging / config.name, config)
            if in_store:
                (staging / f"{name}_head" / _STORE).write_text(f"{backbone}\n", encoding="utf-8")
            _write_version(staging / f"{name}_head" / str(version), _version_files(head, memory))
            self._move_in(staging, [config.name for config in configs])
        classifier = Classifier(self, name)
        # Of a classifier that was here before under this name, and whose folders somebody took away.
        classifier.journal.path.unlink(missing_ok=True)
        classifier.adopt()
        return classifier

    def remove_backbone(self, name: str) -> None:
        """Take a backbone's models out again: the way back of an export that failed after ``add_backbone``."""
        self._remove([f"{name}_{role}" for role in ("features", "backbone", "tokenizer")])

    def remove_classifier(self, name: str) -> None:
        """Take a classifier's models out again, its backbone not."""
        self._remove([name, f"{name}_head", f"{name}{_JOURNAL}"])

    def has_backbone(self, name: str) -> bool:
        """Whether a complete backbone of that name is there (its features ensemble is moved in last)."""
        return (self.root / f"{name}_features" / _CONFIG).is_file()

    def config(self, model: str) -> Any:
        """A model's ``config.pbtxt`` as a parsed message."""
        path = self.root / model / _CONFIG
        return model_config.parse(read_text(path), str(path))

    def write_configs(self, configs: Mapping[str, str]) -> None:
        """Replace the ``config.pbtxt`` of some models, all or none of them; the lock must be held."""
        before = {model: read_bytes(self.root / model / _CONFIG) for model in configs}
        with storage(self.root):
            try:
                for model, text in configs.items():
                    with self.staging(model) as staging:
                        replace(self.root / model / _CONFIG, text.encode(), staging)
            except BaseException:
                for model, data in before.items():
                    replace(self.root / model / _CONFIG, data)
                raise

    def refuse_existing(self, name: str) -> None:
        """InputError where ``name`` is taken."""
        if (self.root / name / _CONFIG).exists() or self.stored_on(name) is not None:
            raise InputError(f"{name} is in {self.root} already; choose another name, or remove its folders first")

    def _move_in(self, staging: Path, names: Sequence[str]) -> None:
        # The last name makes the whole visible; what an export left that was killed before it got there is in the way.
        for name in names:
            target = self.root / name
            if target.exists():
                target.rename(staging / f"leftover-{name}")
            flush_tree(staging / name)
            (staging / name).rename(target)
        flush_folder(self.root)

    def _remove(self, names: Sequence[str]) -> None:
        with self.staging() as staging:
            for name in names:
                if (self.root / name).exists():
                    (self.root / name).rename(staging / name)


class Classifier(Backbone):
    """One classifier of a repository, on its backbone: its head versions and the one that serves."""

    def __init__(self, repository: ModelRepository, name: str) -> None:
        stored = repository.stored_on(name)
        tokenizer, backbone = _steps(repository, name) if stored is None else (None, f"{stored}_backbone")
        super().__init__(repository, backbone.removesuffix("_backbone"))
        self.tokenizer_model = tokenizer or self.tokenizer_model
        self.backbone_model = backbone
        self.name = name
        self.in_store = stored is not None
        self.head_model = f"{name}_head"
        self.journal = Journal(repository.root / f"{name}{_JOURNAL}")

    @property
    def ensemble(self) -> str:
        """The Triton model that answers for it: its own, or that of the store."""
        return self.any_model if self.in_store else self.name

    @property
    def address(self) -> str:
        """What ``TritonServer.classify`` and others take: ``NAME``, or ``ENSEMBLE/NAME`` in a store."""
        return f"{self.any_model}/{self.name}" if self.in_store else self.name

    def versions(self) -> tuple[int, ...]:
        """Head versions on disk, ascending."""
        return _versions(self.root / self.head_model)

    def serving(self) -> int:
        """The version that a server of this repository serves: the one pinned in the head's configuration."""
        path = self.root / self.head_model / _CONFIG
        pinned = model_config.pinned_versions(self.repository.config(self.head_model))
        if not pinned:
            raise RepositoryError(f"{path} pins no version; expected version_policy {{ specific {{ versions: N }} }}")
        return max(pinned)

    def version_path(self, version: int) -> Path:
        """Folder of a version; VersionError where there is none."""
        path = self.root / self.head_model / str(version)
        if not (path / _MODEL).is_file():
            there = ", ".join(map(str, self.versions())) or "none"
            pruned = version in self.journal.pruned()
            what = f"version {version} of {self.name} was pruned" if pruned else f"{self.name} has no version {version}"
            raise VersionError(f"{what}; there are {there} (`patcher history`)")
        return path

    def head(self, version: int | None = None) -> Head:
        """A head version, the serving one by default."""
        number = self.serving() if version is None else version
        path = self.version_path(number) / _MODEL
        try:
            head = read_head(self.head_bytes(number))
        except RepositoryError as error:
            raise RepositoryError(f"{path}: {error}; `patcher rollback --to N` needs none but version N") from error
        if head.lineage.version != number:
            raise RepositoryError(f"{path} says it is version {head.lineage.version}; expected {number}")
        return head

    def head_bytes(self, version: int) -> bytes:
        """The file of a head version as it lies on disk."""
        return read_bytes(self.version_path(version) / _MODEL)

    def memory(self, version: int | None = None) -> Memory | None:
        """The memory beside a head version; None where it was exported without one."""
        path = self.version_path(self.serving() if version is None else version) / _MEMORY
        if not path.exists():
            return None
        try:
            return Memory.from_bytes(read_bytes(path))
        except RepositoryError as error:
            raise RepositoryError(f"{path}: {error}; `patcher remember --data FILE` builds it anew") from error

    def next_version(self) -> int:
        """The number that the next patch gets: above all that were ever given here, withdrawn and pruned ones too."""
        return max((*self.versions(), *self.journal.published()), default=0) + 1

    def publish(self, head: Head, memory: Memory | None) -> Path:
        """Put a new version on disk by one rename; it serves when it is pinned. The lock must be held."""
        version = head.lineage.version
        target = self.root / self.head_model / str(version)
        if target.exists():
            raise StorageError(f"version {version} of {self.name} is there already; nothing was changed")
        files = _version_files(head, memory)
        self.journal.append("publish", version=version, parent=head.lineage.parent, files=hashes(files))
        try:
            with self.repository.staging(self.head_model) as staging:
                _write_version(staging / str(version), files)
                flush_tree(staging / str(version))
                (staging / str(version)).rename(target)
                flush_folder(target.parent)
        except BaseException:
            if not target.exists():
                self.note("undone", serving=self.serving())
            raise
        return target

    def adopt(self) -> tuple[int, ...]:
        """Take versions into the journal that are not in it: an older patcher's. The lock must be held."""
        missing = [version for version in self.versions() if version not in self.journal.published()]
        for version in missing:
            self.journal.append("adopted", version=version, files=hashes(self.files(version)))
        return tuple(missing)

    def files(self, version: int) -> dict[str, bytes]:
        """The files of a version as they lie on disk, by name."""
        return {path.name: read_bytes(path) for path in sorted(self.version_path(version).iterdir()) if path.is_file()}

    def note(self, event: str, **values: Any) -> None:
        """An entry in the journal that a disk which takes none must not stop: the next change repeats what it says."""
        with contextlib.suppress(StorageError):
            self.journal.append(event, **values)

    def pin(self, version: int) -> None:
        """Make ``version`` the one that serves, by one rename; a server learns of it at its next load."""
        with self.pinned(version):
            pass

    @contextlib.contextmanager
    def pinned(self, version: int) -> Iterator[None]:
        """Pin ``version`` for good if the body ends well; else what was pinned before is back.

        The way back is a rename of what was there, so that it works on a disk that is full, too. The lock must be held.
        """
        self.version_path(version)
        path = self.root / self.head_model / _CONFIG
        previous = self.serving()
        text = model_config.with_pin(read_text(path), (version,), str(path))
        with self.repository.staging(self.head_model) as staging:
            before = staging / "before"
            try:
                before.hardlink_to(path)
            except OSError:  # a file system without hard links
                shutil.copy2(path, before)
            self.journal.append("switch", **{"from": previous, "to": version})
            try:
                replace(path, text.encode(), staging)
                yield
            except BaseException:
                before.replace(path)
                flush_folder(path.parent, tolerant=True)
                self.note("back", to=previous)
                raise
        self.note("done", serving=version)

    def withdraw(self, version: int) -> None:
        """Take a version off the disk that never served; the serving one is refused. The lock must be held."""
        if version == self.serving():
            raise VersionError(f"version {version} of {self.name} serves; roll back before it is withdrawn")
        self._take_away([version])
        self.note("undone", serving=self.serving())

    def prune(self, versions: Sequence[int]) -> None:
        """Take old versions off the disk for good, the serving one never; the lock must be held."""
        if self.serving() in versions:
            raise VersionError(f"version {self.serving()} of {self.name} serves; it is never pruned")
        self.journal.append("pruned", versions=list(versions))
        self._take_away(versions)

    def _take_away(self, versions: Sequence[int]) -> None:
        with self.repository.staging(self.head_model) as staging:
            for version in versions:
                (self.root / self.head_model / str(version)).rename(staging / str(version))


def _steps(repository: ModelRepository, name: str) -> tuple[str, str]:
    steps = repository.config(name).ensemble_scheduling.step
    try:
        return str(steps[0].model_name), str(steps[1].model_name)
    except IndexError:
        raise RepositoryError(f"{repository.root / name / _CONFIG} is no classifier: it has no three steps") from None


def _some(names: Sequence[str], wanted: str | None = None) -> str:
    """The names, or those like ``wanted`` and a few more where there are many."""
    if len(names) <= _NAMED_IN_ERRORS:
        return ", ".join(names)
    near = difflib.get_close_matches(wanted, names, 3) if wanted else []
    return ", ".join(dict.fromkeys([*near, *names[:3]])) + f" … {len(names)} in all"


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long, say
        return False


def _versions(folder: Path) -> tuple[int, ...]:
    names = (path.parent.name for path in folder.glob(f"*/{_MODEL}"))
    return tuple(sorted(int(name) for name in names if name.isascii() and name.isdigit() and int(name) > 0))


def _stage_model(folder: Path, config: model_config.ModelConfig) -> None:
    version = folder / str(config.versions[0] if config.versions else 1)
    version.mkdir(parents=True)
    if config.steps:
        # An object store has no empty folders, and an ensemble without its version folder does not load.
        (version / ".keep").touch()
    (folder / _CONFIG).write_text(model_config.render(config), encoding="utf-8")


def _version_files(head: Head, memory: Memory | None) -> dict[str, bytes]:
    return {_MODEL: write_head(head)} | ({} if memory is None else {_MEMORY: memory.to_bytes()})


def _write_version(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _source(model: str) -> bytes:
    return (Path(__file__).parent / "triton" / model / "model.py").read_bytes()
