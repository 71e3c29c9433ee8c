"""The stages from a checkpoint to what goes into the repository; each verifies its own result.

The backbone is exported in FP32 and compared with the checkpoint, then fused and converted for the hardware that will
serve it. The features of the resulting file are what the memory and head version 1 are built from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from export.backbone import export_backbone
from export.fusion import fuse
from export.parity import check_parity, token_batch
from export.precision import LIMITS, check_precision, convert, sample
from export.split import find_split
from export.tokenizer import embeddings
from export.training import accuracy
from patcher import __version__
from patcher.errors import PatcherError
from patcher.features import count_cut
from patcher.fit.scope import FINE_TUNED, fit_scope
from patcher.head import Head
from patcher.head_file import write_head
from patcher.labelled import flat_ids
from patcher.layout import BackboneFiles
from patcher.lineage import CHECKPOINT
from patcher.memory import Memory
from patcher.provenance import now
from patcher.runtime import Encoder, check_head_file, onnxruntime_errors
from patcher.stopwatch import counter
from patcher.wording import percent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from export.backbone import BackboneFile
    from export.checkpoint import Checkpoint
    from export.parity import Parity
    from export.plan import Plan
    from export.precision import Limits, PrecisionCheck
    from export.split import Split
    from export.tokenizer import TextEncoder
    from patcher.examples import Examples
    from patcher.labelled import LabelIds
    from patcher.stopwatch import Stopwatch

    Features = NDArray[np.float32]

__all__ = ["Made", "Proven", "Seen", "make", "split_off"]

_TRACED_LENGTHS = (11, 7, 4)
_PARITY_TEXTS = 32


@dataclass(frozen=True)
class Made:
    """All parts of a classifier, verified but not yet in a repository."""

    files: BackboneFiles
    layer: str
    parity: Parity
    head: Head
    memory: Memory | None
    accuracy: float | None
    checked: PrecisionCheck | None
    cut: int
    """Number of training texts that have more tokens than the backbone reads."""


def make(plan: Plan, folder: Path, tell: Callable[[str], None], watch: Stopwatch) -> Made:
    """Run all stages; ``folder`` holds intermediate files, and ``tell`` receives progress messages.

    Raises as ``export_classifier`` does.
    """
    stages = _Stages(plan, folder, tell, watch)
    split, plain = stages.exported()
    served = backbone, parity = stages.for_target(split, plain)
    train, held_out = (
        labelled and Seen(*labelled, stages.features(backbone, labelled.examples.texts, stage))
        for labelled, stage in ((plan.train, "features"), (plan.held_out, "check"))
    )
    checked = stages.checked(split, plain.file, train, held_out)
    with watch("memory"):
        memory = train and stages.memory(split, train)
        head = stages.head(split, served, memory, held_out, checked)
    return Made(
        files=BackboneFiles(
            backbone.path,
            backbone.fingerprint,
            plan.encoder.json,
            backbone.inputs,
            split.width,
            device=plan.target.device,
            tensorrt=plan.target.precision.upper() if plan.target.tensorrt else "",
            unpadded=backbone.unpadded,
            fused=backbone.fused,
        ),
        layer=split.layer,
        parity=parity,
        head=head,
        memory=memory,
        accuracy=train and accuracy(head, train.features, train.ids),
        checked=checked,
        cut=stages.cut(),
    )


def split_off(checkpoint: Checkpoint, encoder: TextEncoder) -> tuple[Split, dict[str, Tensor]]:
    """A checkpoint's last layer, and the padded token tensors, INT64 ``[batch, sequence]``, it was found with.

    Raises SplitError as ``find_split`` does.
    """
    tokens = token_batch(encoder, embeddings(checkpoint.model).num_embeddings, _TRACED_LENGTHS)
    return find_split(checkpoint.model, tokens, len(checkpoint.labels)), tokens


class Seen(NamedTuple):
    """Labelled texts, as in ``LabelledTexts``, with the features FP32 ``[n, width]`` that the served files give."""

    examples: Examples
    ids: LabelIds
    features: Features


class Proven(NamedTuple):
    """A backbone's file and its verified parity with the checkpoint."""

    file: BackboneFile
    parity: Parity


@dataclass(frozen=True)
class _Stages:
    """The stages of one export."""

    plan: Plan
    folder: Path
    tell: Callable[[str], None]
    watch: Stopwatch

    def exported(self) -> tuple[Split, Proven]:
        """Export the backbone in FP32 with plain operators."""
        checkpoint, encoder, target = self.plan.checkpoint, self.plan.encoder, self.plan.target
        self.tell(
            f"{checkpoint.source}: {type(checkpoint.model).__name__}, {len(checkpoint.labels)} labels, texts up to "
            f"{encoder.max_length} tokens"
        )
        with self.watch("export"):
            split, tokens = split_off(checkpoint, encoder)
            self.tell(f"last linear layer: {split.layer}, {split.split} features; {split.hidden} more beside them")
            file = export_backbone(checkpoint.model, split, tokens, self.folder / "model.onnx", unpad=target.unpads)
            if target.unpads and not file.unpadded:
                self.tell("its graph computes padding like any other token, so only texts of like length share a batch")
        parity = self._parity(split, file, "parity")
        self.tell(f"logits within {parity.difference:.1g} of the checkpoint's on {parity.texts} texts")
        return split, Proven(file, parity)

    def for_target(self, split: Split, plain: Proven) -> Proven:
        """The verified FP32 file ``plain``, fused if possible and converted to the target's precision."""
        if self.plan.target.fuses:
            failures: tuple[type[Exception], ...] = (PatcherError, *onnxruntime_errors())
            try:
                return self._converted(split, self._fused(split, plain.file))
            except failures as error:
                self.tell(f"fused operators are left out: {error}")
        return self._converted(split, plain)

    def _fused(self, split: Split, plain: BackboneFile) -> Proven:
        """The backbone with fused operators."""
        with self.watch("fuse"):
            config = self.plan.checkpoint.model.config
            fused = fuse(plain, config, self.folder / "fused.onnx", left=self.plan.encoder.left)
        parity = self._parity(split, fused, "fuse")
        self.tell(f"in fused operators: logits within {parity.difference:.1g} of the checkpoint's")
        return Proven(fused, parity)

    def _converted(self, split: Split, exact: Proven) -> Proven:
        """The FP32 file ``exact`` in the target's precision."""
        precision = self.plan.target.precision
        if precision == "fp32":
            return exact
        with self.watch("convert"):
            file = convert(exact.file, precision, self.folder / f"{precision}.onnx")
        parity = self._parity(split, file, "convert", LIMITS[precision])
        self.tell(f"{precision}: logits {percent(parity.noise, 1)} of their spread off the checkpoint's")
        return Proven(file, parity)

    def _parity(self, split: Split, file: BackboneFile, stage: str, limits: Limits | None = None) -> Parity:
        """Compare a file with the checkpoint, also on some of the training texts."""
        train = self.plan.train
        texts = () if train is None else train.examples.texts[:: len(train.examples) // _PARITY_TEXTS + 1]
        with self.watch(stage):
            return check_parity(self.plan.checkpoint.model, split, self.plan.encoder, file.path, texts, limits)

    def features(self, file: BackboneFile, texts: Sequence[str], stage: str) -> Features:
        """Features FP32 ``[n, width]`` of texts, computed with the backbone ``file`` as the server will."""
        with self.watch(stage):
            return Encoder(file.path, self._tokenizer()).encode(texts, counter(self.tell, len(texts)))

    def cut(self) -> int:
        """Number of training texts that have more tokens than the backbone reads."""
        train = self.plan.train
        return count_cut(self._tokenizer(), train.examples.texts)[0] if train else 0

    def _tokenizer(self) -> Path:
        path = self.folder / "tokenizer.json"
        path.write_text(self.plan.encoder.json, encoding="utf-8")
        return path

    def checked(
        self, split: Split, plain: BackboneFile, train: Seen | None, held_out: Seen | None
    ) -> PrecisionCheck | None:
        """Measure what a lower precision costs, on held-out texts or else on some of the training texts."""
        precision, seen = self.plan.target.precision, held_out or train
        if precision == "fp32" or seen is None:
            return None
        count = len(seen.examples)
        some = range(count) if held_out else sample(count).tolist()
        before = self.features(plain, [seen.examples.texts[place] for place in some], "check")
        found = check_precision(
            precision,
            self._linear(split, plain),
            before,
            seen.features[some],
            [seen.ids[place] for place in some],
            seen.examples.source,
        )
        gain = f"{-100 * found.loss:+.2f} points"
        self.tell(f"{percent(found.agreement)} of {found.texts} texts answered as in FP32, accuracy {gain}")
        return found

    def memory(self, split: Split, train: Seen) -> Memory:
        """The memory that later patches use; a text with several labels counts for each of them."""
        rows, ids = flat_ids(train.ids)
        labels, per_label = self.plan.checkpoint.labels, self.plan.per_label
        return Memory.build(train.features[rows], ids, labels, split.split, per_label=per_label)

    def head(
        self,
        split: Split,
        served: Proven,
        memory: Memory | None,
        held_out: Seen | None,
        checked: PrecisionCheck | None,
    ) -> Head:
        """Head version 1; checks that its file computes the same as the head."""
        checkpoint, train, parity = self.plan.checkpoint, self.plan.train, served.parity
        precision = self.plan.target.precision
        head = self._linear(
            split,
            served.file,
            created=now(),
            tool_version=__version__,
            data_hash=self.plan.data_hash,
            details={
                "architecture": type(checkpoint.model).__name__,
                **({CHECKPOINT: checkpoint.location} if checkpoint.location else {}),
                "layer": split.layer,
                "parity": parity.difference,
                "precision": precision,
                **({"noise": parity.noise} if precision != "fp32" else {}),
                **({"checked": checked.details()} if checked else {}),
                "max_length": self.plan.encoder.max_length,
                "train_examples": len(train.examples) if train else 0,
                **({"train_repeated": self.plan.repeated} if self.plan.repeated else {}),
            },
        )
        fresh = held_out and held_out.features
        head = dataclasses.replace(head, scope=fit_scope(memory, head, fresh=fresh, stretch=FINE_TUNED))
        check_head_file(write_head(head), head, parity.features)
        return head

    def _linear(self, split: Split, file: BackboneFile, **facts: Any) -> Head:
        """The checkpoint's own last layer as a head for the backbone ``file``."""
        checkpoint = self.plan.checkpoint
        return Head.from_linear(
            checkpoint.labels,
            split.weight,
            split.bias,
            split.width,
            file.fingerprint,
            problem=checkpoint.problem,
            **facts,
        )
