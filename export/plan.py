"""Reads and validates everything an export needs, so that what can be refused is refused before any work is done."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from torch import nn

from export.checkpoint import Checkpoint, from_objects, load_checkpoint
from export.precision import PRECISIONS
from export.tokenizer import prepare_tokenizer
from export.training import label_ids
from patcher.errors import InputError
from patcher.examples import as_examples
from patcher.files import enclosing, require_folder
from patcher.head import MULTI_LABEL
from patcher.names import check_name
from patcher.remembering import FEATURES_A_LABEL
from patcher.repository import ModelRepository

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from export.tokenizer import TextEncoder
    from patcher.examples import Examples, ExamplesLike
    from patcher.labelled import LabelIds

    Source = str | os.PathLike[str] | nn.Module

__all__ = ["DEVICES", "ExportOptions", "LabelledTexts", "Plan", "Target", "foresee"]

DEVICES = ("cpu", "gpu")


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


class LabelledTexts(NamedTuple):
    """Texts, and the positions of their labels among the checkpoint's."""

    examples: Examples
    ids: LabelIds


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
class Plan:
    """The validated input of an export, and what it should produce."""

    name: str
    backbone: str
    in_store: bool
    checkpoint: Checkpoint
    encoder: TextEncoder
    target: Target
    train: LabelledTexts | None
    """The training texts without repetitions within a label."""
    repeated: int
    """Number of repeated training texts that were left out."""
    data_hash: str
    """Hash of the training texts as given, with repetitions."""
    per_label: int
    held_out: LabelledTexts | None


def foresee(model: Source, repository_dir: str | os.PathLike[str], options: ExportOptions) -> Plan:
    """Refuse everything that can be refused before the work begins; raises as ``export_classifier`` does."""
    if unknown := set(options) - set(ExportOptions.__annotations__):
        raise InputError(
            f"no option {', '.join(sorted(unknown))}; there are {', '.join(ExportOptions.__annotations__)}"
        )
    name, in_store = options.get("name", "intent"), options.get("in_store", False)
    backbone = options.get("backbone") or name
    _refuse_taken(repository_dir, name, backbone, in_store=in_store)
    target = _target(options)
    named = (("train", options.get("train")), ("evaluation", options.get("evaluation")))
    files = [None if each is None else as_examples(each, option) for option, each in named]
    checkpoint = _checkpoint(model, options)
    given, held_out = (_labelled(each, checkpoint) for each in files)
    train = given and _once(given, checkpoint)
    encoder = prepare_tokenizer(checkpoint, options.get("max_length"))
    return Plan(
        name,
        backbone,
        in_store,
        checkpoint,
        encoder,
        target,
        train,
        repeated=len(given.examples) - len(train.examples) if given and train else 0,
        data_hash=given.examples.data_hash() if given else "",
        per_label=options.get("per_label", FEATURES_A_LABEL),
        held_out=held_out,
    )


def _refuse_taken(location: str | os.PathLike[str], name: str, backbone: str, *, in_store: bool) -> None:
    """Raise InputError if ``name`` cannot be added to the repository at ``location``, which need not exist yet."""
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


def _labelled(examples: Examples | None, checkpoint: Checkpoint) -> LabelledTexts | None:
    if examples is None:
        return None
    return LabelledTexts(examples, label_ids(examples, checkpoint.labels, checkpoint.problem))


def _once(given: LabelledTexts, checkpoint: Checkpoint) -> LabelledTexts | None:
    """Drop repeated texts, which would make figures measured on the memory look more certain than they are."""
    return _labelled(given.examples.once_a_label(several=checkpoint.problem == MULTI_LABEL), checkpoint)


def _checkpoint(model: Source, options: ExportOptions) -> Checkpoint:
    if not isinstance(model, nn.Module):
        return load_checkpoint(
            os.fspath(model),
            allow_pickle=options.get("allow_pickle", False),
            trust_remote_code=options.get("trust_remote_code", False),
        )
    tokenizer = options.get("tokenizer")
    if tokenizer is None:
        raise InputError(f"a {type(model).__name__} in memory came without its tokenizer; expected tokenizer=…")
    return from_objects(model, tokenizer)
