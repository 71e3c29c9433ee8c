"""What an export is asked for, and all of it that can be refused without torch, whose import takes ten seconds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from export.source import locate
from patcher.errors import InputError
from patcher.examples import as_examples
from patcher.files import enclosing, require_folder
from patcher.names import check_name
from patcher.repository import ModelRepository
from patcher.storage import open_storage

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from export.source import Place
    from patcher.examples import Examples, ExamplesLike

    Source = str | os.PathLike[str] | nn.Module

__all__ = ["DEVICES", "PRECISIONS", "ExportOptions", "Settled", "Target", "settle"]

DEVICES = ("cpu", "gpu")
PRECISIONS = ("fp32", "fp16", "int8")


class ExportOptions(TypedDict, total=False):
    """What can be chosen about an export.

    ``name`` is what clients call; ``backbone`` the name under which the backbone's models stand (``name`` by default),
    and one that is there already is shared if it is the same to the byte. ``train``, a labelled file or ``Examples``,
    builds the memory beside head version 1, with ``per_label`` real features of each label (20 by default; 0 keeps
    statistics alone). ``precision`` is the backbone's (``fp32``, ``int8`` for CPUs, ``fp16`` for
    GPUs; by default ``fp16`` for the device ``gpu``, else ``fp32``); what a lower one costs is measured on
    ``evaluation``, labelled texts that took no part in the fine-tuning, or else on a part of ``train``; with
    ``evaluation`` the share of fresh texts that count as out of scope is set, too. ``device`` ``gpu`` places the
    backbone on the GPUs, ``tensorrt`` has TensorRT run it there. ``max_length`` is the tokens beyond which a text is
    cut (by default what tokenizer and model allow, 2048 at most). ``tokenizer`` belongs to a model in memory.
    ``in_store`` leaves the classifier's answers to the backbone's head store instead of an ensemble and a head model of
    its own. ``allow_pickle`` and ``trust_remote_code`` let a checkpoint run code. ``progress`` hears in words what is
    going on.
    """

    name: str
    backbone: str | None
    train: ExamplesLike | None
    per_label: int
    evaluation: ExamplesLike | None
    precision: str | None
    device: str
    tensorrt: bool
    max_length: int | None
    tokenizer: PreTrainedTokenizerBase | None
    in_store: bool
    allow_pickle: bool
    trust_remote_code: bool
    progress: Callable[[str], None] | None


@dataclass(frozen=True)
class Target:
    """What the backbone is made for."""

    precision: str
    device: str
    tensorrt: bool

    @property
    def unpads(self) -> bool:
        """Whether to leave out the work on padding: not on GPUs, where a few more nodes cost more than it saves."""
        return self.device == "cpu" and self.precision != "fp16"

    @property
    def fuses(self) -> bool:
        """Whether to write ONNX Runtime's fused operators."""
        return self.device == "gpu" and not self.tensorrt


@dataclass(frozen=True)
class Settled:
    """What is asked for, looked through as far as that goes without the checkpoint."""

    name: str
    backbone: str
    in_store: bool
    target: Target
    files: tuple[Examples | None, Examples | None]
    """For training and evaluation."""
    place: Place | None
    """Of the checkpoint; None for a model in memory."""
    options: ExportOptions


def settle(model: Source, repository_dir: str | os.PathLike[str], options: ExportOptions) -> Settled:
    """Refuse what can be refused before torch is imported; raises as ``export_classifier`` does."""
    if unknown := set(options) - set(ExportOptions.__annotations__):
        raise InputError(
            f"no option {', '.join(sorted(unknown))}; there are {', '.join(ExportOptions.__annotations__)}"
        )
    name, in_store = options.get("name", "intent"), options.get("in_store", False)
    backbone = options.get("backbone") or name
    _refuse_taken(repository_dir, name, backbone, in_store=in_store)
    target = _target(options)
    train, evaluation = options.get("train"), options.get("evaluation")
    files = (
        None if train is None else as_examples(train, "train"),
        None if evaluation is None else as_examples(evaluation, "evaluation"),
    )
    open_storage(repository_dir).refuse_unwritable()
    place = locate(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else None
    return Settled(name, backbone, in_store, target, files, place, options)


def _refuse_taken(location: str | os.PathLike[str], name: str, backbone: str, *, in_store: bool) -> None:
    """InputError where ``name`` cannot be added to the repository at ``location``, which need not be there yet."""
    check_name(name)
    check_name(backbone)
    if in_store:
        require_folder(location)
    repository = ModelRepository.at(location)
    if repository is None and (around := enclosing(location)):
        raise InputError(f"{location} lies in a repository; expected --repo {around[0]}")
    if repository is not None and name in repository.classifiers():
        raise InputError(f"{location} holds a classifier {name!r} already; expected another --name, or another --repo")


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
