"""Writes a patched head back into a Hugging Face checkpoint, as a plain linear layer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.source import HUB, locate
from patcher.arguments import require
from patcher.errors import InputError, StorageError
from patcher.evaluation import answers
from patcher.founding import METHODS
from patcher.lineage import CHECKPOINT
from patcher.narrow import narrow_head
from patcher.repository import one_classifier
from patcher.storage.disk import try_writing

if TYPE_CHECKING:
    from patcher.head import Head
    from patcher.repository import ClassifierLike

__all__ = ["Returned", "to_transformers"]

_HOW = "--checkpoint MODEL (checkpoint=...)"


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
    classifier: ClassifierLike,
    checkpoint: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    version: int | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Returned:
    """Write ``checkpoint`` to ``folder`` with the labels and rows of a head version, by default the serving one.

    ``checkpoint`` is what the classifier was exported from; None means the one that the lineage records.
    ``allow_pickle`` and ``trust_remote_code`` are those of ``load_checkpoint``.

    Raises
    ------
    CheckpointError, SplitError
        if the checkpoint cannot be read or split.
    ParityError
        if the classifier was exported from another checkpoint.
    ExportError
        if the checkpoint's last layer is no ``torch.nn.Linear``, or has no bias although the new rows need one.
    InputError
        if the classifier was not exported from a checkpoint, ``folder`` is not empty, the memory keeps nothing of a
        patched-in label, or ``checkpoint`` is None and the lineage records none or one that no longer exists.
    StorageError
        if ``folder`` cannot be written.
    """
    require(str, os.PathLike, None, checkpoint=checkpoint)
    require(str, os.PathLike, folder=folder)
    require(int, None, version=version)
    require(bool, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    classifier = one_classifier(classifier)
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} already exists and is not empty; expected the path of a new folder")
    head = classifier.head(version)
    if classifier.lineage(min(classifier.versions())).method in METHODS.values():
        raise InputError(
            f"{classifier.name} was made by `patcher new-classifier`: its rows use more features than a checkpoint's "
            "last layer has, so that they cannot be written into one"
        )
    memory = classifier.memory(head.lineage.version)
    plain = narrow_head(head, memory)
    place = locate(_recorded(classifier.name, head) if checkpoint is None else str(checkpoint))
    try:
        try_writing(target.absolute().parent)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    # The checks so far do not need torch, whose import takes longer than all of them.
    from export.checkpoint import load_checkpoint
    from export.last_layer import proven_layer, put_in, save

    loaded = load_checkpoint(place, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    plain = put_in(loaded, proven_layer(classifier, loaded, head.split), plain)
    save(loaded.model, loaded.tokenizer, target)
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
        raise InputError(f"nothing says what {name} was exported from; expected {_HOW}")
    if Path(found).is_absolute() and not Path(found).is_dir():
        raise InputError(f"{name} was exported from {found}, which is not there any more; expected {_HOW}")
    return str(found) if Path(found).is_absolute() else f"{HUB}{found}"
