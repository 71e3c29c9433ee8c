"""The head in memory: last linear layer, patched rows, labels and lineage. ``head_file`` reads and writes its file."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.blocks import blocks
from patcher.errors import LabelError, RepositoryError
from patcher.rounding import rounding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from patcher.arrays import Floats, Ints
    from patcher.scope import Scope

__all__ = ["MULTI_LABEL", "SINGLE_LABEL", "TOP_K", "Head", "Lineage", "refuse_joined"]

SINGLE_LABEL = "single_label"
MULTI_LABEL = "multi_label"
TOP_K = 5
"""The maximum number of labels that an answer returns as strings, best first."""


@dataclass(frozen=True)
class Lineage:
    """Where a head version comes from. It is kept in the head's own file, so that no other record can contradict it."""

    version: int
    backbone: str
    """SHA-256 of the backbone's ONNX file."""
    parent: int | None = None
    created: str = ""
    """UTC, ISO 8601."""
    method: str = "export"
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    data_hash: str = ""
    """SHA-256 over the texts and labels that the version was made from."""
    gate: str = "none"
    """``passed``, ``forced``, or ``none`` if no gate applies (export, rename)."""
    author: str = ""
    tool_version: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Figures of the gate and of the fit, for the record."""


@dataclass(frozen=True, eq=False)
class Head:
    """Labels and the rows that score them.

    Parameters
    ----------
    labels
        C label names in the order of the logits.
    base_weight, base_bias
        The fine-tuned layer, FP32 ``[C0, split]`` and ``[C0]``. Rows of removed labels stay here unused, so that the
        Gemm, and with it every remaining logit, stays bit-for-bit the same.
    patch_weight, patch_bias
        Rows patched in since, on all features, FP32 ``[K, width]`` and ``[K]``.
    order
        INT64 ``[C]``: logit ``j`` is column ``order[j]`` of ``[base | patch]``.
    split, width
        The first ``split`` of ``width`` features are the classifier features.
    problem
        ``single_label`` (softmax) or ``multi_label`` (sigmoid).
    scope
        The out-of-scope scorer; with None the score is the largest probability, uncalibrated.
    """

    labels: tuple[str, ...]
    base_weight: Floats
    base_bias: Floats
    patch_weight: Floats
    patch_bias: Floats
    order: NDArray[np.int64]
    split: int
    width: int
    problem: str
    lineage: Lineage
    scope: Scope | None = None

    def __post_init__(self) -> None:
        rows, patched = len(self.base_weight), len(self.patch_weight)
        numbers = (self.base_weight, self.base_bias, self.patch_weight, self.patch_bias)
        checks = [
            (all(isinstance(label, str) for label in self.labels), "a label is no text"),
            (len(set(self.labels)) == len(self.labels), "labels repeat"),
            (all(self.labels), "a label is empty"),
            (self.order.dtype == np.int64, f"an order of {self.order.dtype}"),
            (
                all(a.dtype == np.float32 and np.isfinite(a).all() for a in numbers),
                "rows that are not finite FP32 numbers",
            ),
            (self.order.shape == (len(self.labels),), f"{len(self.labels)} labels, but an order of {self.order.shape}"),
            (self.base_weight.shape == (rows, self.split), f"base weight {self.base_weight.shape}, split {self.split}"),
            (self.base_bias.shape == (rows,), f"base bias {self.base_bias.shape} for {rows} rows"),
            (
                self.patch_weight.shape == (patched, self.width),
                f"patched rows {self.patch_weight.shape}, {self.width=}",
            ),
            (self.patch_bias.shape == (patched,), f"patched bias {self.patch_bias.shape} for {patched} rows"),
            (0 < self.split <= self.width, f"split {self.split} outside of 1..{self.width}"),
            (self.problem in (SINGLE_LABEL, MULTI_LABEL), f"problem type {self.problem!r}"),
        ]
        for holds, what in checks:
            if not holds:
                raise RepositoryError(f"this is not a consistent head: {what}")
        if len(self.order) and not 0 <= self.order.min() <= self.order.max() < rows + patched:
            raise RepositoryError(f"this is not a consistent head: its order points outside of {rows + patched} rows")
        if len(set(self.order.tolist())) != len(self.order):
            raise RepositoryError("this is not a consistent head: two labels share one row")

    def __repr__(self) -> str:
        return f"<Head version {self.lineage.version}: {len(self.labels)} labels on {self.width} features>"

    @classmethod
    def from_linear(
        cls,
        labels: Sequence[str],
        weight: Floats,
        bias: Floats,
        width: int,
        backbone: str,
        *,
        problem: str = SINGLE_LABEL,
        scope: Scope | None = None,
        **lineage: Any,
    ) -> Head:
        """Version 1, from a fine-tuned layer: ``weight`` FP32 ``[C, split]`` and ``bias`` FP32 ``[C]``."""
        return cls(
            labels=tuple(labels),
            base_weight=np.ascontiguousarray(weight, np.float32),
            base_bias=np.ascontiguousarray(bias, np.float32),
            patch_weight=np.zeros((0, width), np.float32),
            patch_bias=np.zeros(0, np.float32),
            order=np.arange(len(labels), dtype=np.int64),
            split=int(weight.shape[1]),
            width=width,
            problem=problem,
            scope=scope,
            lineage=Lineage(version=1, backbone=backbone, **lineage),
        )

    @property
    def exclusive(self) -> bool:
        """Whether exactly one label is the answer (softmax); otherwise each label is decided on its own (sigmoid)."""
        return self.problem == SINGLE_LABEL

    def logits(self, features: Floats) -> Floats:
        """Logits FP32 ``[n, C]`` of features FP32 ``[n, width]``, in numpy; served logits come from ONNX Runtime."""
        base = features[:, : self.split] @ self.base_weight.T + self.base_bias
        patch = features @ self.patch_weight.T + self.patch_bias
        logits: Floats = np.concatenate([base, patch], axis=1)[:, self.order]
        return logits

    def best(self, features: Floats) -> tuple[Ints, Floats]:
        """Position INT64 ``[n]`` and logit FP32 ``[n]`` of the best label for features FP32 ``[n, width]``."""
        place, logit = np.empty(len(features), np.int64), np.empty(len(features), np.float32)
        for block in blocks(len(features)):
            logits = self.logits(features[block])
            place[block], logit[block] = logits.argmax(axis=1), logits.max(axis=1)
        return place, logit

    def rounding(self, features: Floats) -> Floats:
        """How far another runtime's logits may differ from those of `logits` by rounding, FP32 ``[n, C]``."""
        base = rounding(features[:, : self.split], self.base_weight, self.base_bias)
        patch = rounding(features, self.patch_weight, self.patch_bias)
        allowed: Floats = np.concatenate([base, patch], axis=1)[:, self.order]
        return allowed

    def index(self, label: str) -> int:
        """Position of a label; raises LabelError, which suggests similar labels, if the head has no such label."""
        try:
            return self.labels.index(label)
        except ValueError:
            import difflib

            near = difflib.get_close_matches(str(label), self.labels, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else "; `patcher labels` lists them all"
            raise LabelError(f"no label {label!r} among the {len(self.labels)} of this head{hint}") from None

    def base_hash(self) -> str:
        """SHA-256 of the fine-tuned rows. It is the same in every version: even a refit keeps them, unused."""
        return hashlib.sha256(self.base_weight.tobytes() + self.base_bias.tobytes()).hexdigest()

    def rows_hash(self) -> dict[str, str]:
        """SHA-256 of each label's own row and bias."""
        weights = [*self.base_weight, *self.patch_weight]
        biases = [*self.base_bias, *self.patch_bias]
        return {
            label: hashlib.sha256(weights[row].tobytes() + biases[row].tobytes()).hexdigest()
            for label, row in zip(self.labels, self.order.tolist(), strict=True)
        }

    def with_rows(self, labels: Sequence[str], weight: Floats, bias: Floats) -> Head:
        """The same head with more labels; their rows, FP32 ``[k, width]`` and ``[k]``, are appended."""
        rows = len(self.base_weight) + len(self.patch_weight)
        return dataclasses.replace(
            self,
            labels=(*self.labels, *labels),
            patch_weight=np.concatenate([self.patch_weight, np.asarray(weight, np.float32)]),
            patch_bias=np.concatenate([self.patch_bias, np.asarray(bias, np.float32)]),
            order=np.concatenate([self.order, np.arange(rows, rows + len(labels), dtype=np.int64)]),
        )

    def refitted(self, weight: Floats, bias: Floats) -> Head:
        """The same labels with new rows, FP32 ``[C, width]`` and ``[C]``; the fine-tuned rows stay, unused."""
        rows = len(self.base_weight)
        return dataclasses.replace(
            self,
            patch_weight=np.asarray(weight, np.float32),
            patch_bias=np.asarray(bias, np.float32),
            order=np.arange(rows, rows + len(self.labels), dtype=np.int64),
        )

    def without(self, label: str) -> Head:
        """The same head without a label; a patched row is deleted, a fine-tuned row stays in the file, unused."""
        position = self.index(label)
        row = int(self.order[position])
        order = np.delete(self.order, position)
        patched = row - len(self.base_weight)
        weight, bias = self.patch_weight, self.patch_bias
        if patched >= 0:
            weight, bias = np.delete(weight, patched, axis=0), np.delete(bias, patched)
            order = np.where(order > row, order - 1, order)
        labels = (*self.labels[:position], *self.labels[position + 1 :])
        return dataclasses.replace(self, labels=labels, patch_weight=weight, patch_bias=bias, order=order)

    def renamed(self, old: str, new: str) -> Head:
        """The same head with one label under another name."""
        position = self.index(old)
        if new in self.labels:
            command = shlex.join(["patcher", "merge-labels", old, new, "--into", new])
            raise LabelError(f"{new!r} is already a label; to merge the two: `{command}`")
        return dataclasses.replace(self, labels=(*self.labels[:position], new, *self.labels[position + 1 :]))


def refuse_joined(head: Head, label: str) -> None:
    """Raise LabelError for a new label with ``|``, which separates labels in the files of a multi-label classifier."""
    if not head.exclusive and "|" in label:
        raise LabelError(f"{label!r}: '|' parts the labels of a text in the files of a multi-label classifier")
