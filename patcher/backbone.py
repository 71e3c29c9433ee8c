"""The models of a backbone in a repository, which all classifiers on it share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from patcher import layout
from patcher.errors import RepositoryError
from patcher.model_config import steps_of
from patcher.names import CONFIG, PROGRAM, BackboneNames
from patcher.signals import uninterrupted
from patcher.storage import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from patcher.files import RepositoryFiles
    from patcher.layout import BackboneFiles
    from patcher.model_config import Step

__all__ = ["Backbone", "added_backbone", "unreadable"]


class Backbone(BackboneNames):
    """A backbone of a repository, with its encoder, its features ensemble and, if it has one, its head store."""

    def __init__(self, repository: RepositoryFiles, backbone: str) -> None:
        super().__init__(backbone)
        self.repository = repository
        self.storage = repository.storage

    @property
    def root(self) -> Path:
        """The repository's folder; InputError if it is in an object store."""
        return self.repository.root

    def encoding(self) -> tuple[Step, ...]:
        """The steps from text to features that every ensemble on it begins with; RepositoryError if there are none."""
        steps = steps_of(self.repository.config(self.features_model))
        if not steps:
            raise RepositoryError(f"{self.features_model}/config.pbtxt is no ensemble of patcher's: it has no steps")
        return steps

    @property
    def text_model(self) -> str:
        """The model that takes texts: the encoder, or the tokenizer in exports before 0.4.0."""
        return self.encoding()[0].model

    @property
    def backbone_path(self) -> Path:
        """A local path of the backbone's ONNX file."""
        return self.storage.local(f"{self.backbone_model}/1/model.onnx")

    def check_readable(self) -> None:
        """Raise RepositoryError if the ONNX file cannot be read; an object store's is not looked at."""
        if is_url(self.repository.location):
            return
        try:
            with self.backbone_path.open("rb") as file:
                file.read(1)
        except OSError as error:
            raise unreadable(self.backbone_path, error) from error

    @property
    def tokenizer_path(self) -> Path:
        """A local path of the tokenizer's JSON file."""
        return self.storage.local(f"{self.tokenizer_model}/1/tokenizer.json")

    def fingerprint(self) -> str:
        """SHA-256 of the backbone's ONNX file, as its configuration states it."""
        value: str = self.repository.config(self.backbone_model).parameters["fingerprint"].string_value
        return value

    def token_inputs(self) -> tuple[str, ...]:
        """Names of the token tensors that the backbone takes."""
        return tuple(tensor.name for tensor in self.repository.config(self.backbone_model).input)

    def width(self) -> int:
        """Number of features that the backbone returns; RepositoryError if its configuration does not state it."""
        dims = [dim for output in self.repository.config(self.backbone_model).output for dim in output.dims]
        if len(dims) != 1:
            path = f"{self.repository.location}/{self.backbone_model}/{CONFIG}"
            raise RepositoryError(f"{path} has outputs of dims {dims}; expected one, the number of features")
        return int(dims[0])

    def add_encoder(self, config: str) -> None:
        """Add an encoder to a backbone of an earlier version; no ensemble uses it yet. The lock must be held."""
        with self.repository.renewed_format():
            self.repository.add(layout.encoder_folder(self, config, self.repository.tokenizer_json(self.backbone_name)))

    def add_store(self) -> None:
        """Add the head store, which serves any number of classifiers; the lock must be held.

        Raises InputError if the repository is in an object store.
        """
        self.repository.require_folder()
        self.repository.add(layout.store_folders(self, self.width(), self.encoding()))

    @contextlib.contextmanager
    def added_store(self) -> Iterator[None]:
        """Add the head store; it is removed again if the body fails."""
        self.add_store()
        try:
            yield
        except BaseException:
            with uninterrupted():
                self.remove_store()
            raise

    def remove_store(self) -> None:
        """Remove the head store's models."""
        self.storage.take_away([self.any_model, self.store_model])

    def outdated(self) -> dict[str, bytes]:
        """Models whose ``model.py`` differs from this version's, with this version's content."""
        programs = layout.programs(self)
        return {
            name: new for name, new in programs.items() if self.storage.find(f"{name}/{PROGRAM}") not in (None, new)
        }

    def renew(self, programs: Mapping[str, bytes]) -> None:
        """Replace the programs of models, given by model name; the lock must be held."""
        for model, program in programs.items():
            self.storage.replace(f"{model}/{PROGRAM}", program)


def unreadable(path: Path, error: OSError) -> RepositoryError:
    """The error for a backbone's file that cannot be read."""
    cure = "export it again" if isinstance(error, FileNotFoundError) else "check its owner, its mode and the disk"
    return RepositoryError(f"cannot read {path}: {error.strerror or error}; {cure}")


@contextlib.contextmanager
def added_backbone(repository: RepositoryFiles, name: str, files: BackboneFiles) -> Iterator[Backbone]:
    """Add a backbone with its encoder, tokenizer and features ensemble under ``name``.

    If the body fails, everything is undone, including the repository's format, so that older patchers that could read
    the repository still can. The lock must be held. Raises InputError if the name is taken.
    """
    names = BackboneNames(name)
    repository.refuse_existing(names.features_model)
    folders = layout.backbone_folders(names, files)
    last = {names.features_model: folders.pop(names.features_model)}
    # An older patcher uses nothing of a backbone before its last folder is there. So the format is raised just before
    # that, and an export that is killed earlier leaves it as it was.
    with repository.added(folders), repository.renewed_format(), repository.added(last):
        yield Backbone(repository, name)
