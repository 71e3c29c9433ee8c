"""The models of a backbone in a repository: what all classifiers on it share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from patcher import layout
from patcher.errors import RepositoryError
from patcher.model_config import steps_of
from patcher.names import CONFIG, PROGRAM, BackboneNames
from patcher.signals import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from patcher.files import RepositoryFiles
    from patcher.layout import BackboneFiles
    from patcher.model_config import Step

__all__ = ["Backbone", "added_backbone"]


class Backbone(BackboneNames):
    """A backbone of a repository with its encoder, its features ensemble, and its head store where it has one."""

    def __init__(self, repository: RepositoryFiles, backbone: str) -> None:
        super().__init__(backbone)
        self.repository = repository
        self.storage = repository.storage

    @property
    def root(self) -> Path:
        """The repository's folder; InputError where it lies in an object store."""
        return self.repository.root

    def encoding(self) -> tuple[Step, ...]:
        """The steps from text to features, in any ensemble above; RepositoryError where its own has none."""
        steps = steps_of(self.repository.config(self.features_model))
        if not steps:
            raise RepositoryError(f"{self.features_model}/config.pbtxt is no ensemble of patcher's: it has no steps")
        return steps

    @property
    def text_model(self) -> str:
        """The model that takes the texts: the encoder, or in exports before 0.4.0 the tokenizer."""
        return self.encoding()[0].model

    @property
    def backbone_path(self) -> Path:
        """The backbone's ONNX file, on this machine."""
        return self.storage.local(f"{self.backbone_model}/1/model.onnx")

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's JSON file, on this machine."""
        return self.storage.local(f"{self.tokenizer_model}/1/tokenizer.json")

    def fingerprint(self) -> str:
        """SHA-256 of the backbone, as its configuration states it."""
        value: str = self.repository.config(self.backbone_model).parameters["fingerprint"].string_value
        return value

    def token_inputs(self) -> tuple[str, ...]:
        """Names of the token tensors that it takes."""
        return tuple(tensor.name for tensor in self.repository.config(self.backbone_model).input)

    def width(self) -> int:
        """Number of features that it gives; RepositoryError where its configuration does not tell."""
        dims = [dim for output in self.repository.config(self.backbone_model).output for dim in output.dims]
        if len(dims) != 1:
            path = f"{self.repository.location}/{self.backbone_model}/{CONFIG}"
            raise RepositoryError(f"{path} has outputs of dims {dims}; expected one, the number of features")
        return int(dims[0])

    def add_encoder(self, config: str) -> None:
        """Add the encoder to a backbone of an earlier version; no ensemble asks it yet. The lock must be held."""
        with self.repository.renewed_format():
            self.repository.add(layout.encoder_folder(self, config, self.repository.tokenizer_json(self.backbone_name)))

    def add_store(self) -> None:
        """Add the head store, which serves any number of classifiers; the lock must be held.

        Raises InputError for a repository that is no folder.
        """
        self.repository.require_folder()
        self.repository.add(layout.store_folders(self, self.width(), self.encoding()))

    @contextlib.contextmanager
    def added_store(self) -> Iterator[None]:
        """The same, for good only if the body ends well."""
        self.add_store()
        try:
            yield
        except BaseException:
            with uninterrupted():
                self.remove_store()
            raise

    def remove_store(self) -> None:
        """Take the head store's models out again."""
        self.storage.take_away([self.any_model, self.store_model])

    def outdated(self) -> dict[str, bytes]:
        """Models whose ``model.py`` is not this version's, and what that is."""
        programs = layout.programs(self)
        return {
            name: new for name, new in programs.items() if self.storage.find(f"{name}/{PROGRAM}") not in (None, new)
        }

    def renew(self, programs: Mapping[str, bytes]) -> None:
        """Put other programs in the place of those that are there; the lock must be held."""
        for model, program in programs.items():
            self.storage.replace(f"{model}/{PROGRAM}", program)


@contextlib.contextmanager
def added_backbone(repository: RepositoryFiles, name: str, files: BackboneFiles) -> Iterator[Backbone]:
    """Add a backbone with its encoder, tokenizer and features ensemble under ``name``, for good if the body ends well.

    Else the repository is as before, so that a patcher that could read it still can. The lock must be held. Raises
    InputError where the name is taken.
    """
    names = BackboneNames(name)
    repository.refuse_existing(names.features_model)
    with repository.renewed_format():
        repository.add(layout.backbone_folders(names, files))
        try:
            yield Backbone(repository, name)
        except BaseException:
            with uninterrupted():
                repository.remove_backbone(name)
            raise
