"""Reads and validates everything an export needs, so that what can be refused is refused before any work is done."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from export.checkpoint import Checkpoint, from_objects, load_checkpoint
from export.source import Place
from export.tokenizer import prepare_tokenizer
from export.training import label_ids
from patcher.errors import InputError
from patcher.head import MULTI_LABEL
from patcher.remembering import FEATURES_A_LABEL

if TYPE_CHECKING:
    from export.options import ExportOptions, Settled, Source, Target
    from export.tokenizer import TextEncoder
    from patcher.examples import Examples
    from patcher.labelled import LabelIds

__all__ = ["LabelledTexts", "Plan", "foresee"]


class LabelledTexts(NamedTuple):
    """Texts, and the positions of their labels among the checkpoint's."""

    examples: Examples
    ids: LabelIds


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


def foresee(model: Source, settled: Settled) -> Plan:
    """Check what ``settle`` could not check without the checkpoint; raises as ``export_classifier`` does."""
    options = settled.options
    checkpoint = _checkpoint(settled.place or model, options)
    given, held_out = (_labelled(each, checkpoint) for each in settled.files)
    train = given and _once(given, checkpoint)
    encoder = prepare_tokenizer(checkpoint, options.get("max_length"))
    return Plan(
        settled.name,
        settled.backbone,
        settled.in_store,
        checkpoint,
        encoder,
        settled.target,
        train,
        repeated=len(given.examples) - len(train.examples) if given and train else 0,
        data_hash=given.examples.data_hash() if given else "",
        per_label=options.get("per_label", FEATURES_A_LABEL),
        held_out=held_out,
    )


def _labelled(examples: Examples | None, checkpoint: Checkpoint) -> LabelledTexts | None:
    if examples is None:
        return None
    return LabelledTexts(examples, label_ids(examples, checkpoint.labels, checkpoint.problem))


def _once(given: LabelledTexts, checkpoint: Checkpoint) -> LabelledTexts | None:
    """Drop repeated texts, which would make figures measured on the memory look more certain than they are."""
    return _labelled(given.examples.once_a_label(several=checkpoint.problem == MULTI_LABEL), checkpoint)


def _checkpoint(model: Place | Source, options: ExportOptions) -> Checkpoint:
    if not isinstance(model, nn.Module):
        return load_checkpoint(
            model if isinstance(model, Place) else os.fspath(model),
            allow_pickle=options.get("allow_pickle", False),
            trust_remote_code=options.get("trust_remote_code", False),
        )
    tokenizer = options.get("tokenizer")
    if tokenizer is None:
        raise InputError(f"a {type(model).__name__} in memory came without its tokenizer; expected tokenizer=…")
    return from_objects(model, tokenizer)
