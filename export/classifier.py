"""Exports a checkpoint as a classifier in a Triton model repository; everything is verified before it is written."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from export.options import ExportOptions, settle
from export.report import ExportReport
from patcher.errors import InputError
from patcher.gate_words import scarce, twins, unremembered
from patcher.repository import ModelRepository
from patcher.scratch import scratch
from patcher.stopwatch import Stopwatch
from patcher.wording import cut, percent

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from typing_extensions import Unpack

    from export.options import Source
    from export.plan import Plan
    from export.stages import Made
    from patcher.layout import BackboneFiles

__all__ = ["export_classifier", "run_export"]

_CONTRADICTED = 0.5
"""If less than this share of the training texts is answered as labelled, they may belong to another model."""


def export_classifier(
    model: Source, repository_dir: str | os.PathLike[str], **options: Unpack[ExportOptions]
) -> ModelRepository:
    """Add a fine-tuned sequence classifier to a Triton model repository, and return the repository.

    Parameters
    ----------
    model
        Folder of a checkpoint, its id on the Hugging Face hub, or a model in memory.
    repository_dir
        A folder, created if it does not exist, or ``s3://BUCKET/PATH``.
    **options
        The fields of ``ExportOptions``: ``name="intent"``, ``train=None`` and so on.

    Raises
    ------
    CheckpointError, SplitError
        if the checkpoint cannot be read or split; the message gives the reason.
    ExamplesError
        if ``train`` or ``evaluation`` cannot be used; the message gives the line.
    ParityError, ExportError
        if the exported files do not answer as the checkpoint does, or cannot be made.
    InputError
        if the name is taken or an option makes no sense.

    Whatever is raised, the repository is unchanged.
    """
    return run_export(model, repository_dir, **options).repository


def run_export(model: Source, repository_dir: str | os.PathLike[str], **options: Unpack[ExportOptions]) -> ExportReport:
    """Do what ``export_classifier`` does, and return the figures of the export together with the repository."""
    watch = Stopwatch()
    settled = settle(model, repository_dir, options)
    # The checks so far do not need torch, whose import takes longer than all of them.
    from export.plan import foresee
    from export.stages import make

    with watch("load"):
        plan = foresee(model, settled)
    with scratch("patcher-export-") as folder:
        made = make(plan, folder, options.get("progress") or _silent, watch)
        with watch("publish"):
            repository = _publish(repository_dir, plan, made)
    train = plan.train
    return ExportReport(
        repository=repository,
        classifier=plan.name,
        address=repository.classifier(plan.name).address,
        backbone=plan.backbone,
        fingerprint=made.files.fingerprint,
        layer=made.layer,
        labels=plan.checkpoint.labels,
        problem=plan.checkpoint.problem,
        split=made.head.split,
        width=made.head.width,
        max_length=plan.encoder.max_length,
        parity=made.parity.difference,
        parity_texts=made.parity.texts,
        train_examples=len(train.examples) if train else 0,
        train_repeated=plan.repeated,
        train_accuracy=made.accuracy,
        train_cut=made.cut,
        memory_bytes=made.memory.size if made.memory else 0,
        precision=plan.target.precision,
        device=plan.target.device,
        unpadded=made.files.unpadded,
        noise=made.parity.noise,
        checked=made.checked,
        warnings=tuple(_warnings(plan, made)),
        seconds=watch.seconds,
    )


def _warnings(plan: Plan, made: Made) -> Iterator[str]:
    labels = plan.checkpoint.labels
    yield from twins(labels)
    if token := plan.encoder.misread:
        yield (
            f"a text that ends with {token!r} is answered as if it ended before it: neither model nor tokenizer names "
            "a padding token, and this one pads for want of another; set pad_token_id in config.json before the export"
        )
    yield from filter(None, (unremembered(labels, made.memory), scarce(made.memory)))
    if plan.train is None:
        return
    examples = plan.train.examples
    if made.cut:
        yield f"{examples.source}: {cut(made.cut, len(examples), plan.encoder.max_length)}"
    if made.accuracy is not None and made.accuracy < _CONTRADICTED:
        yield (
            f"only {percent(made.accuracy, 1)} of the texts in {examples.source} get the label they have there; is it "
            "this model's training data?"
        )


def _publish(location: str | os.PathLike[str], plan: Plan, made: Made) -> ModelRepository:
    """Add everything to the repository, or nothing."""
    with ModelRepository.making(location) as repository, repository.lock(), contextlib.ExitStack() as added:
        if repository.has_backbone(plan.backbone):
            _refuse_other_backbone(repository, plan.backbone, made.files)
        else:
            added.enter_context(repository.added_backbone(plan.backbone, made.files))
        if plan.in_store and not repository.has_store(plan.backbone):
            added.enter_context(repository.backbone(plan.backbone).added_store())
        repository.add_classifier(plan.name, made.head, made.memory, backbone=plan.backbone, in_store=plan.in_store)
    return repository


def _refuse_other_backbone(repository: ModelRepository, backbone: str, files: BackboneFiles) -> None:
    there = repository.config(f"{backbone}_backbone").parameters["fingerprint"].string_value
    if there != files.fingerprint:
        raise InputError(
            f"{repository.location} holds another backbone {backbone!r} ({there[:12]}, this checkpoint's is "
            f"{files.fingerprint[:12]}); expected another --backbone (backbone=...), as only those of equal bytes can "
            "be shared, and each version of patcher may write its own"
        )
    if repository.tokenizer_json(backbone) != files.tokenizer_json:
        raise InputError(
            f"the backbone {backbone!r} in {repository.location} has another tokenizer; name another --backbone "
            "(backbone=...)"
        )


def _silent(_text: str) -> None:
    pass
