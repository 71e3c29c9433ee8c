"""The options of an export, and every check on them that needs no torch, whose import takes ten seconds."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from export.source import locate
from patcher.arguments import require
from patcher.errors import InputError
from patcher.examples_file import as_examples
from patcher.files import enclosing, require_folder
from patcher.names import check_name
from patcher.repository import ModelRepository
from patcher.storage import open_storage

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from export.source import Place
    from patcher.examples import Examples
    from patcher.examples_file import ExamplesLike

    Source = str | os.PathLike[str] | nn.Module

__all__ = ["DEVICES", "PRECISIONS", "ExportOptions", "Settled", "Target", "settle"]

DEVICES = ("cpu", "gpu")
PRECISIONS = ("fp32", "fp16", "int8")


class ExportOptions(TypedDict, total=False):
    """Options of an export; all can be left out."""

    name: str
    """Name of the classifier, which clients ask for; ``intent`` by default."""
    backbone: str | None
    """Name of the backbone's models, ``name`` by default. An existing backbone is shared if its bytes are the same."""
    train: ExamplesLike | None
    """Labelled file or ``Examples`` from which the memory beside head version 1 is built."""
    per_label: int
    """Real features that the memory keeps of each label, 20 by default; with 0 it keeps statistics only."""
    evaluation: ExamplesLike | None
    """Labelled texts that took no part in the fine-tuning.

    They measure what a lower precision costs (otherwise a part of ``train`` does), and set the share of fresh texts
    that count as out of scope.
    """
    precision: str | None
    """``fp32``, ``int8`` (for CPUs) or ``fp16`` (for GPUs); by default ``fp16`` on device ``gpu``, else ``fp32``."""
    device: str
    """``cpu``, the default, or ``gpu``."""
    tensorrt: bool
    """Run the backbone with TensorRT; needs the device ``gpu``."""
    max_length: int | None
    """Tokens beyond which a text is cut; by default what tokenizer and model allow, but at most 2048."""
    tokenizer: PreTrainedTokenizerBase | None
    """Tokenizer of a model in memory."""
    in_store: bool
    """Serve the classifier from the backbone's head store instead of an ensemble and a head model of its own."""
    allow_pickle: bool
    """Read weights from a pickle, which can run code."""
    trust_remote_code: bool
    """Run Python code that comes with the checkpoint."""
    progress: Callable[[str], None] | None
    """Called with messages about the progress of the export."""


@dataclass(frozen=True)
class Target:
    """Where and in which precision the backbone will run."""

    precision: str
    device: str
    tensorrt: bool

    @property
    def unpads(self) -> bool:
        """Whether to skip the work on padding; not on GPUs, where the extra nodes cost more than they save."""
        return self.device == "cpu" and self.precision != "fp16"

    @property
    def fuses(self) -> bool:
        """Whether to write ONNX Runtime's fused operators."""
        return self.device == "gpu" and not self.tensorrt


@dataclass(frozen=True)
class Settled:
    """The options of an export, checked as far as possible without reading the checkpoint."""

    name: str
    backbone: str
    in_store: bool
    target: Target
    files: tuple[Examples | None, Examples | None]
    """The labelled texts of ``train`` and ``evaluation``."""
    place: Place | None
    """Where the checkpoint is; None for a model in memory."""
    options: ExportOptions


def settle(model: Source, repository_dir: str | os.PathLike[str], options: ExportOptions) -> Settled:
    """Check everything that can be checked before torch is imported; raises as ``export_classifier`` does."""
    if unknown := set(options) - set(ExportOptions.__annotations__):
        raise InputError(
            f"no option {', '.join(sorted(unknown))}; there are {', '.join(ExportOptions.__annotations__)}"
        )
    _check_types(model, options)
    name, in_store = options.get("name", "intent"), options.get("in_store", False)
    backbone = options.get("backbone") or name
    _refuse_taken(repository_dir, name, backbone, in_store=in_store)
    target = _target(options)
    train, evaluation = options.get("train"), options.get("evaluation")
    if train is None and options.get("per_label") == 0:
        raise InputError("a memory of statistics is built from training texts; expected --train FILE (train=...)")
    files = (
        None if train is None else as_examples(train, "train"),
        None if evaluation is None else as_examples(evaluation, "evaluation"),
    )
    open_storage(repository_dir).refuse_unwritable()
    place = locate(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else None
    return Settled(name, backbone, in_store, target, files, place, options)


def _check_types(model: Source, options: ExportOptions) -> None:
    torch = sys.modules.get("torch")  # not imported here: whoever has a model in memory has done that
    require(str, os.PathLike, *([torch.nn.Module] if torch else []), model=model)
    for name in ("tensorrt", "in_store", "allow_pickle", "trust_remote_code"):
        require(bool, **{name: options.get(name, False)})
    require(int, per_label=options.get("per_label", 0))
    require(int, None, max_length=options.get("max_length"))


def _refuse_taken(location: str | os.PathLike[str], name: str, backbone: str, *, in_store: bool) -> None:
    """Raise InputError if ``name`` cannot be added to the repository at ``location``, which need not exist yet."""
    check_name(name)
    check_name(backbone)
    if in_store:
        require_folder(location)
    repository = ModelRepository.at(location)
    if repository is None and (around := enclosing(location)):
        raise InputError(f"{location} lies in a repository; expected --repo {around[0]} (repository_dir)")
    if repository is not None and name in repository.classifiers():
        raise InputError(
            f"{location} holds a classifier {name!r} already; expected another --name (name=...), or another --repo "
            "(repository_dir)"
        )


def _target(options: ExportOptions) -> Target:
    device, tensorrt = options.get("device", "cpu"), options.get("tensorrt", False)
    precision = options.get("precision") or ("fp16" if device == "gpu" else "fp32")
    if precision not in PRECISIONS:
        raise InputError(f"no precision {precision!r}; expected {', '.join(PRECISIONS)}")
    if device not in DEVICES:
        raise InputError(f"no device {device!r}; expected {', '.join(DEVICES)}")
    if device == "gpu" and precision == "int8":
        raise InputError("int8 is made for CPUs: CUDA has no kernel for it; expected fp16 or fp32 with the device gpu")
    if tensorrt and device != "gpu":
        raise InputError("TensorRT runs on GPUs; expected the device gpu with it")
    return Target(precision, device, tensorrt)
