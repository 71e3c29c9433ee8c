"""The models of a backbone in a repository: what all classifiers on it share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patcher.errors import RepositoryError
from patcher.model_config import steps_of

if TYPE_CHECKING:
    from pathlib import Path

    from patcher.model_config import Step
    from patcher.repository import ModelRepository

__all__ = ["Backbone"]


class Backbone:
    """A backbone of a repository with its encoder, its features ensemble, and its head store where it has one."""

    def __init__(self, repository: ModelRepository, backbone: str) -> None:
        self.repository = repository
        self.store = repository.store
        self.backbone = backbone
        self.tokenizer_model = f"{backbone}_tokenizer"
        self.encoder_model = f"{backbone}_encoder"
        """Text to features; exports before 0.4.0 have none (``text_model``)."""
        self.backbone_model = f"{backbone}_backbone"
        self.features_model = f"{backbone}_features"
        self.store_model = f"{backbone}_heads"
        """The one model that answers from the heads of all stored classifiers."""
        self.any_model = f"{backbone}_any"
        """The ensemble text and classifier -> answer above it."""

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
        return self.store.local(f"{self.backbone_model}/1/model.onnx")

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's JSON file, on this machine."""
        return self.store.local(f"{self.tokenizer_model}/1/tokenizer.json")

    def fingerprint(self) -> str:
        """SHA-256 of the backbone, as its configuration states it."""
        value: str = self.repository.config(self.backbone_model).parameters["fingerprint"].string_value
        return value

    def token_inputs(self) -> tuple[str, ...]:
        """Names of the token tensors that it takes."""
        return tuple(tensor.name for tensor in self.repository.config(self.backbone_model).input)

    def width(self) -> int:
        """Number of features that it gives."""
        return int(self.repository.config(self.backbone_model).output[0].dims[0])
