"""Verifies that a checkpoint is the exported one, replaces its last layer with a head's rows, and saves it."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from export.checkpoint import quiet_transformers
from export.parity import check_parity
from export.precision import LIMITS, precision_of
from export.stages import split_off
from export.tokenizer import prepare_tokenizer
from patcher.errors import CheckpointError, ExportError, InputError, ParityError, StorageError
from patcher.runtime import open_session

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint
    from patcher.classifier import Classifier
    from patcher.head import Head

__all__ = ["proven_layer", "put_in", "save"]


def proven_layer(classifier: Classifier, loaded: Checkpoint, width: int) -> str:
    """Name of the last layer, which takes ``width`` features; ParityError if this is not the exported checkpoint."""
    # `prepare_tokenizer` changes the padding of model and tokenizer; work on copies, so what is written keeps its own.
    loaded = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model), tokenizer=copy.deepcopy(loaded.tokenizer))
    other = f"{classifier.name} was not exported from {loaded.source}"
    served = json.loads(classifier.repository.tokenizer_json(classifier.backbone_name))
    try:
        encoder = prepare_tokenizer(loaded, served["truncation"]["max_length"], served["padding"]["pad_id"])
    except CheckpointError:
        raise
    except InputError as error:  # the exported length is too long for this checkpoint
        raise ParityError(f"{other}: it was exported for {error}") from error
    path = classifier.backbone_path
    wanted = {tensor.name for tensor in open_session(path).get_inputs()}
    if missing := wanted - set(encoder.inputs):
        raise ParityError(f"{other}: its backbone takes {', '.join(sorted(missing))}, the checkpoint does not")
    split, _ = split_off(loaded, encoder)
    if split.split != width:
        raise ParityError(
            f"{loaded.source} has {split.split} classifier features, {classifier.name} {width}: it was exported from "
            "another checkpoint, or made by `patcher new-classifier`, whose heads fit the last layer of none"
        )
    try:
        check_parity(loaded.model, split, encoder, path, (), LIMITS.get(precision_of(path)))
    except ParityError as error:
        raise ParityError(f"{other}: {error}") from error
    return split.layer


def put_in(loaded: Checkpoint, layer: str, plain: Head) -> Head:
    """Put the head's rows and labels into the checkpoint, in its dtype; return the head with rows rounded to it."""
    model: Any = loaded.model
    old = model.get_submodule(layer)
    if not isinstance(old, nn.Linear):
        raise ExportError(f"the last layer {layer!r} is a {type(old).__name__}; only a torch.nn.Linear can be replaced")
    bias = getattr(old, "bias", None)
    if bias is None and plain.base_bias.any():
        raise ExportError(f"the last layer {layer!r} has no bias, and rows that were patched in need one")
    fresh = nn.Linear(plain.split, len(plain.labels), bias=bias is not None)
    with torch.no_grad():
        fresh.weight.copy_(torch.from_numpy(plain.base_weight))
        if bias is not None:
            fresh.bias.copy_(torch.from_numpy(plain.base_bias))
    parent_name, _, name = layer.rpartition(".")
    setattr(model.get_submodule(parent_name), name, fresh)
    model.config.id2label = dict(enumerate(plain.labels))
    model.config.label2id = {label: index for index, label in enumerate(plain.labels)}
    model.num_labels = len(plain.labels)
    nn.Module.to(model, dtype=loaded.dtype)
    return dataclasses.replace(
        plain,
        base_weight=fresh.weight.detach().float().numpy(),
        base_bias=plain.base_bias if bias is None else fresh.bias.detach().float().numpy(),
    )


def save(model: Any, tokenizer: Any, target: Path) -> None:
    """Write to a folder beside the target and rename it, so that the target is complete or absent."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".patcher-", dir=target.parent) as name:
            fresh = Path(name) / "checkpoint"
            with quiet_transformers():
                model.save_pretrained(fresh, safe_serialization=True)
                tokenizer.save_pretrained(fresh)
            if target.is_dir():
                target.rmdir()
            fresh.rename(target)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error
