"""Writes a patched head back into a Hugging Face checkpoint, as a plain linear layer."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from export.checkpoint import HUB, load_checkpoint
from export.parity import check_parity
from export.precision import LIMITS, precision_of
from export.stages import split_off
from export.tokenizer import prepare_tokenizer
from patcher.errors import CheckpointError, ExportError, InputError, ParityError, StorageError
from patcher.evaluation import answers
from patcher.lineage import CHECKPOINT
from patcher.narrow import narrow_head
from patcher.runtime import open_session

if TYPE_CHECKING:
    import os

    from export.checkpoint import Checkpoint
    from patcher.classifier import Classifier
    from patcher.head import Head

__all__ = ["Returned", "to_transformers"]


@dataclass(frozen=True)
class Returned:
    """What was written.

    ``refitted`` are the patched-in labels, whose rows were fitted anew on the classifier features alone. ``agreement``
    is the share of the memory's real features on which the new layer answers as the served head does; None if the
    memory keeps none.
    """

    folder: Path
    version: int
    labels: int
    refitted: tuple[str, ...]
    agreement: float | None


def to_transformers(
    classifier: Classifier,
    checkpoint: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    version: int | None = None,
    **flags: bool,
) -> Returned:
    """Write ``checkpoint`` to ``folder`` with the labels and rows of a head version, by default the serving one.

    ``checkpoint`` is what the classifier was exported from; None means the one that the lineage records. ``flags`` are
    passed to ``load_checkpoint``.

    Raises
    ------
    CheckpointError, SplitError
        if the checkpoint cannot be read or split.
    ParityError
        if the classifier was exported from another checkpoint.
    ExportError
        if the checkpoint's last layer is no ``torch.nn.Linear``, or has no bias although the new rows need one.
    InputError
        if ``folder`` is not empty, the memory keeps nothing of a patched-in label, or ``checkpoint`` is None and the
        lineage records none or one that no longer exists.
    StorageError
        if ``folder`` cannot be written.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} already exists and is not empty; expected the path of a new folder")
    head = classifier.head(version)
    memory = classifier.memory(head.lineage.version)
    plain = narrow_head(head, memory)
    loaded = load_checkpoint(_recorded(classifier.name, head) if checkpoint is None else str(checkpoint), **flags)
    layer = _proven_layer(classifier, loaded, head.split)
    plain = _put_in(loaded, layer, plain)
    _save(loaded.model, loaded.tokenizer, target)
    agreement = None
    if memory is not None and len(memory.sample):
        rows = memory.sample.astype(np.float32)
        pairs = zip(answers(head, rows), answers(plain, rows[:, : head.split]), strict=True)
        agreement = float(np.mean([served == returned for served, returned in pairs]))
    patched = tuple(label for label, row in zip(head.labels, head.order, strict=True) if row >= len(head.base_weight))
    return Returned(target, head.lineage.version, len(plain.labels), patched, agreement)


def _recorded(name: str, head: Head) -> str:
    """The checkpoint that the lineage of the classifier ``name`` records."""
    found = head.lineage.details.get(CHECKPOINT)
    if found is None:
        raise InputError(f"nothing says what {name} was exported from; expected --checkpoint MODEL")
    if Path(found).is_absolute() and not Path(found).is_dir():
        raise InputError(f"{name} was exported from {found}, which is not there any more; expected --checkpoint MODEL")
    return str(found) if Path(found).is_absolute() else f"{HUB}{found}"


def _proven_layer(classifier: Classifier, loaded: Checkpoint, width: int) -> str:
    """Name of the checkpoint's last layer, on ``width`` features; ParityError if it is not the exported checkpoint."""
    # `prepare_tokenizer` changes the padding of model and tokenizer; work on copies, so what is written keeps its own.
    loaded = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model), tokenizer=copy.deepcopy(loaded.tokenizer))
    other = f"{classifier.name} was not exported from {loaded.source}"
    served = json.loads(classifier.repository.tokenizer_json(classifier.backbone_name))
    try:
        encoder = prepare_tokenizer(loaded, served["truncation"]["max_length"])
    except CheckpointError:
        raise
    except InputError as error:  # the length that was exported is too long here
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


def _put_in(loaded: Checkpoint, layer: str, plain: Head) -> Head:
    """Put the head's rows and labels into the checkpoint, in its dtype; return the head with the rows so rounded."""
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


def _save(model: Any, tokenizer: Any, target: Path) -> None:
    """Write to a folder beside the target and rename it, so that the target is complete or absent."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".patcher-", dir=target.parent) as name:
            fresh = Path(name) / "checkpoint"
            model.save_pretrained(fresh, safe_serialization=True)
            tokenizer.save_pretrained(fresh)
            if target.is_dir():
                target.rmdir()
            fresh.rename(target)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error
