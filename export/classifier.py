"""A checkpoint in, a classifier in a Triton model repository out: all of it proven before any of it is written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from torch import nn

from export.backbone import export_backbone
from export.checkpoint import Checkpoint, from_objects, load_checkpoint
from export.fusion import fuse
from export.parity import check_parity, token_batch
from export.precision import LIMITS, PRECISIONS, check_precision, convert, sample
from export.report import ExportReport
from export.split import find_split
from export.tokenizer import embeddings, prepare_tokenizer
from export.training import accuracy, build_memory, counter, label_ids
from patcher import __version__
from patcher.errors import InputError, PatcherError
from patcher.examples import Examples, read_examples
from patcher.fit.scope import FINE_TUNED, fit_scope
from patcher.head import Head
from patcher.head_file import write_head
from patcher.layout import BackboneFiles
from patcher.provenance import now
from patcher.repository import ModelRepository, check_name, require_folder
from patcher.runtime import Encoder, check_head_file, onnxruntime_errors
from patcher.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from export.backbone import BackboneFile
    from export.parity import Parity
    from export.precision import PrecisionCheck
    from export.split import Split
    from export.tokenizer import TextEncoder
    from export.training import LabelIds
    from patcher.memory import Memory

    Source = str | os.PathLike[str] | nn.Module

__all__ = ["DEVICES", "ExportOptions", "export_classifier", "foresee", "run_export"]

DEVICES = ("cpu", "gpu")
_TRACED_LENGTHS = (11, 7, 4)
_PARITY_TEXTS = 32


class ExportOptions(TypedDict, total=False):
    """What can be chosen about an export.

    ``name`` is what clients call; ``backbone`` the name under which the backbone's models stand (``name`` by default),
    and one that is there already is shared if it is the same to the byte. ``train``, a labelled file or ``Examples``,
    builds the memory beside head version 1. ``precision`` is the backbone's (``fp32``, ``int8`` for CPUs, ``fp16`` for
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
    train: str | os.PathLike[str] | Examples | None
    evaluation: str | os.PathLike[str] | Examples | None
    precision: str | None
    device: str
    tensorrt: bool
    max_length: int | None
    tokenizer: PreTrainedTokenizerBase | None
    in_store: bool
    allow_pickle: bool
    trust_remote_code: bool
    progress: Callable[[str], None] | None


def export_classifier(
    model: Source, repository_dir: str | os.PathLike[str], **options: Unpack[ExportOptions]
) -> ModelRepository:
    """Add a fine-tuned sequence classifier to a Triton model repository, and return the repository.

    Parameters
    ----------
    model
        Folder of a checkpoint, its id on the Hugging Face hub, or a model in memory.
    repository_dir
        A folder, made where there is none, or ``s3://BUCKET/PATH``.
    **options
        As ``ExportOptions`` lists them: ``name="intent"``, ``train=None`` and so on.

    Raises
    ------
    CheckpointError, SplitError
        when the checkpoint cannot be read or split, with the reason.
    ExamplesError
        when ``train`` cannot be used, with the line.
    ParityError, ExportError
        when the exported files do not answer as the checkpoint does, or cannot be made.
    InputError
        when the name is taken or an option makes no sense.

    Whatever is raised, the repository is as it was.
    """
    return run_export(model, repository_dir, **options).repository


def run_export(model: Source, repository_dir: str | os.PathLike[str], **options: Unpack[ExportOptions]) -> ExportReport:
    """The same as ``export_classifier``, with the figures of the export; they hold the repository."""
    watch = Stopwatch()
    with watch("load"):
        plan = foresee(model, repository_dir, options)
    name, in_store = options.get("name", "intent"), options.get("in_store", False)
    backbone, checkpoint, encoder, target = options.get("backbone") or name, plan.checkpoint, plan.encoder, plan.target
    train = plan.train
    with tempfile.TemporaryDirectory(prefix="patcher-export-") as folder:
        making = _Making(checkpoint, encoder, Path(folder), target, options.get("progress") or _silent, watch)
        made = making.run(train, plan.ids, plan.held_out, plan.held_out_ids)
        with watch("publish"):
            repository = _publish(repository_dir, name, backbone, made, in_store=in_store)
    return ExportReport(
        repository=repository,
        classifier=name,
        address=repository.classifier(name).address,
        backbone=backbone,
        fingerprint=made.files.fingerprint,
        layer=made.layer,
        labels=checkpoint.labels,
        problem=checkpoint.problem,
        split=made.head.split,
        width=made.head.width,
        max_length=encoder.max_length,
        parity=made.parity.difference,
        parity_texts=made.parity.texts,
        train_examples=len(train) if train else 0,
        train_accuracy=made.accuracy,
        memory_bytes=made.memory.size if made.memory else 0,
        precision=target.precision,
        device=target.device,
        unpadded=made.files.unpadded,
        noise=made.parity.noise,
        checked=made.checked,
        seconds=watch.seconds,
    )


@dataclass(frozen=True)
class _Plan:
    """What an export works on, read and looked through."""

    checkpoint: Checkpoint
    encoder: TextEncoder
    target: _Target
    train: Examples | None
    ids: LabelIds
    held_out: Examples | None
    held_out_ids: LabelIds


def foresee(model: Source, repository_dir: str | os.PathLike[str], options: ExportOptions) -> _Plan:
    """Everything that can be refused before the work begins, is refused here; raises as ``export_classifier`` does."""
    if unknown := set(options) - set(ExportOptions.__annotations__):
        raise InputError(
            f"no option {', '.join(sorted(unknown))}; there are {', '.join(ExportOptions.__annotations__)}"
        )
    name = options.get("name", "intent")
    _refuse_taken(repository_dir, name, options.get("backbone") or name, in_store=options.get("in_store", False))
    target = _target(options)
    train, held_out = _examples(options.get("train")), _examples(options.get("evaluation"))
    checkpoint = _checkpoint(model, options)
    ids, held_out_ids = (
        label_ids(each, checkpoint.labels, checkpoint.problem) if each else () for each in (train, held_out)
    )
    encoder = prepare_tokenizer(checkpoint, options.get("max_length"))
    return _Plan(checkpoint, encoder, target, train, ids, held_out, held_out_ids)


def _refuse_taken(location: str | os.PathLike[str], name: str, backbone: str, *, in_store: bool = False) -> None:
    """InputError where ``name`` cannot be added to the repository at ``location``, which need not be there yet."""
    check_name(name)
    check_name(backbone)
    if in_store:
        require_folder(location)
    repository = ModelRepository.at(location)
    if repository is not None and name in repository.classifiers():
        raise InputError(f"{location} holds a classifier {name!r} already; expected another --name, or another --repo")


@dataclass(frozen=True)
class _Target:
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


def _target(options: ExportOptions) -> _Target:
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
    return _Target(precision, device, tensorrt)


def _examples(train: str | os.PathLike[str] | Examples | None) -> Examples | None:
    return train if train is None or isinstance(train, Examples) else read_examples(Path(train))


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


@dataclass(frozen=True)
class _Made:
    """Everything of a classifier, proven and not yet in a repository."""

    files: BackboneFiles
    layer: str
    parity: Parity
    head: Head
    memory: Memory | None
    accuracy: float | None
    checked: PrecisionCheck | None


@dataclass(frozen=True)
class _Making:
    """The stages between a checkpoint and what goes into the repository; ``folder`` holds the files in between."""

    checkpoint: Checkpoint
    encoder: TextEncoder
    folder: Path
    target: _Target
    tell: Callable[[str], None]
    watch: Stopwatch

    def run(self, train: Examples | None, ids: LabelIds, held_out: Examples | None, held_out_ids: LabelIds) -> _Made:
        """All of them."""
        model, labels = self.checkpoint.model, self.checkpoint.labels
        self.tell(
            f"{self.checkpoint.source}: {type(model).__name__}, {len(labels)} labels, texts up to "
            f"{self.encoder.max_length} tokens"
        )
        with self.watch("export"):
            tokens = token_batch(self.encoder, embeddings(model).num_embeddings, _TRACED_LENGTHS)
            split = find_split(model, tokens, len(labels))
            self.tell(f"last linear layer: {split.layer}, {split.split} features; {split.hidden} more beside them")
            backbone = export_backbone(model, split, tokens, self.folder / "model.onnx", unpad=self.target.unpads)
            if self.target.unpads and not backbone.unpadded:
                self.tell("its graph computes padding like any other token, so only texts of like length share a batch")
        with self.watch("parity"):
            texts = train.texts[:: len(train) // _PARITY_TEXTS + 1] if train else ()
            parity = check_parity(model, split, self.encoder, backbone.path, texts)
            self.tell(f"logits within {parity.difference:.1g} of the checkpoint's on {parity.texts} texts")
        plain = backbone
        backbone, parity = self._for_target(split, plain, parity, texts)
        features = None if train is None else self._features(backbone, train.texts, "features")
        fresh = self._features(backbone, held_out.texts, "check") if held_out else None
        checked = None
        if self.target.precision != "fp32":
            if held_out and fresh is not None:
                checked = self._checked(split, plain, fresh, held_out.texts, held_out_ids, held_out.source)
            elif train and features is not None:
                some = sample(len(train))
                checked = self._checked(split, plain, features[some], train.texts[some], ids[some], train.source)
        with self.watch("memory"):
            memory = None if features is None else build_memory(features, ids, labels, split.split)
            head = self._head(split, backbone, parity, train, memory, fresh, checked)
        return _Made(
            files=BackboneFiles(
                backbone.path,
                backbone.fingerprint,
                self.encoder.json,
                backbone.inputs,
                split.width,
                device=self.target.device,
                tensorrt=self.target.precision.upper() if self.target.tensorrt else "",
                unpadded=backbone.unpadded,
            ),
            layer=split.layer,
            parity=parity,
            head=head,
            memory=memory,
            accuracy=None if features is None else accuracy(head, features, ids),
            checked=checked,
        )

    def _for_target(
        self, split: Split, plain: BackboneFile, parity: Parity, texts: Sequence[str]
    ) -> tuple[BackboneFile, Parity]:
        """The proven FP32 file ``plain`` as it is to serve, fused where that works; and its parity."""
        if self.target.fuses:
            failures: tuple[type[Exception], ...] = (PatcherError, *onnxruntime_errors())
            try:
                return self._fused(split, plain, texts)
            except failures as error:
                self.tell(f"fused operators are left out: {error}")
        return self._converted(split, plain, parity, texts)

    def _fused(self, split: Split, plain: BackboneFile, texts: Sequence[str]) -> tuple[BackboneFile, Parity]:
        """The same in fused operators, proven in FP32 and in the target's precision."""
        model = self.checkpoint.model
        with self.watch("fuse"):
            fused = fuse(plain, model.config, self.folder / "fused.onnx", left=self.encoder.left)
            parity = check_parity(model, split, self.encoder, fused.path, texts)
        self.tell(f"in fused operators: logits within {parity.difference:.1g} of the checkpoint's")
        return self._converted(split, fused, parity, texts)

    def _converted(
        self, split: Split, exact: BackboneFile, parity: Parity, texts: Sequence[str]
    ) -> tuple[BackboneFile, Parity]:
        """The FP32 file ``exact`` in the target's precision, and its parity."""
        precision = self.target.precision
        if precision == "fp32":
            return exact, parity
        with self.watch("convert"):
            backbone = convert(exact, precision, self.folder / f"{precision}.onnx")
            found = check_parity(self.checkpoint.model, split, self.encoder, backbone.path, texts, LIMITS[precision])
        self.tell(f"{precision}: logits {found.noise:.1%} of their spread off the checkpoint's")
        return backbone, found

    def _checked(
        self,
        split: Split,
        plain: BackboneFile,
        after: NDArray[np.float32],
        texts: Sequence[str],
        ids: LabelIds,
        source: str,
    ) -> PrecisionCheck:
        """What the precision costs on labelled texts with features ``after``."""
        before = self._features(plain, texts, "check")
        head = Head.from_linear(
            self.checkpoint.labels,
            split.weight,
            split.bias,
            split.width,
            plain.fingerprint,
            problem=self.checkpoint.problem,
        )
        found = check_precision(self.target.precision, head, before, after, ids, source)
        self.tell(f"{found.agreement:.2%} of {found.texts} texts answered as in FP32, accuracy {-found.loss:+.2%}")
        return found

    def _features(self, backbone: BackboneFile, texts: Sequence[str], stage: str) -> NDArray[np.float32]:
        """Features of texts, by the files that will serve."""
        path = self.folder / "tokenizer.json"
        path.write_text(self.encoder.json, encoding="utf-8")
        with self.watch(stage):
            return Encoder(backbone.path, path).encode(texts, counter(self.tell, len(texts)))

    def _head(
        self,
        split: Split,
        backbone: BackboneFile,
        parity: Parity,
        train: Examples | None,
        memory: Memory | None,
        fresh: NDArray[np.float32] | None,
        checked: PrecisionCheck | None,
    ) -> Head:
        """Version 1, and the proof that its file says what it should."""
        head = Head.from_linear(
            self.checkpoint.labels,
            split.weight,
            split.bias,
            split.width,
            backbone.fingerprint,
            problem=self.checkpoint.problem,
            created=now(),
            tool_version=__version__,
            data_hash=train.data_hash() if train else "",
            details={
                "architecture": type(self.checkpoint.model).__name__,
                "layer": split.layer,
                "parity": parity.difference,
                "precision": self.target.precision,
                **({"noise": parity.noise} if self.target.precision != "fp32" else {}),
                **({"checked": checked.details()} if checked else {}),
                "max_length": self.encoder.max_length,
                "train_examples": len(train) if train else 0,
            },
        )
        head = dataclasses.replace(head, scope=fit_scope(memory, head, fresh=fresh, stretch=FINE_TUNED))
        check_head_file(write_head(head), head, parity.features)
        return head


def _publish(
    location: str | os.PathLike[str], name: str, backbone: str, made: _Made, *, in_store: bool
) -> ModelRepository:
    with ModelRepository.making(location) as repository, repository.lock():
        _add(repository, name, backbone, made, in_store=in_store)
    return repository


def _add(repository: ModelRepository, name: str, backbone: str, made: _Made, *, in_store: bool) -> None:
    with contextlib.ExitStack() as undo:
        if repository.has_backbone(backbone):
            _refuse_other_backbone(repository, backbone, made.files)
        else:
            repository.add_backbone(backbone, made.files)
            undo.callback(repository.remove_backbone, backbone)
        if in_store and not repository.has_store(backbone):
            base = repository.backbone(backbone)
            repository.add_store(base)
            undo.callback(repository.remove_store, base)
        repository.add_classifier(name, made.head, made.memory, backbone=backbone, in_store=in_store)
        undo.pop_all()


def _refuse_other_backbone(repository: ModelRepository, backbone: str, files: BackboneFiles) -> None:
    there = repository.config(f"{backbone}_backbone").parameters["fingerprint"].string_value
    if there != files.fingerprint:
        raise InputError(
            f"{repository.location} holds another backbone {backbone!r} ({there[:12]}, this checkpoint's is "
            f"{files.fingerprint[:12]}); expected another --backbone, as only those of equal bytes can be shared, and "
            "each version of patcher may write its own"
        )
    if repository.tokenizer_json(backbone) != files.tokenizer_json:
        raise InputError(
            f"the backbone {backbone!r} in {repository.location} has another tokenizer; name another --backbone"
        )


def _silent(_text: str) -> None:
    pass
