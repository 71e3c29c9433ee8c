"""The models of a backbone in a repository: what all classifiers on it share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from patcher.repository import ModelRepository

__all__ = ["Backbone"]


class Backbone:
    """A backbone of a repository with its tokenizer, its features ensemble, and its head store where it has one."""

    def __init__(self, repository: ModelRepository, backbone: str) -> None:
        self.repository = repository
        self.store = repository.store
        self.backbone = backbone
        self.tokenizer_model = f"{backbone}_tokenizer"
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
