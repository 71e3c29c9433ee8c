"""Converts the verified FP32 backbone to a lower precision and compares the two on labelled texts.

INT8 is dynamic quantisation of every MatMul by a constant, with signed per-channel weights. Activations get their
scale from each batch, so there is no calibration data that could differ from production. Embeddings stay FP32
(quantising them saved no time and changed more answers), and so do products of two activations (attention). The result
uses standard ONNX operators only: ONNX Runtime's own fused attention was no faster.

FP16 is for GPUs. It covers the whole model, with fused or plain operators, but not the mean over tokens that follows,
because the sum over a long text could overflow FP16. Token ids and features keep their types.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from export.backbone import BackboneFile, tidy_nodes
from export.fusion import FUSED, quiet
from export.training import accuracy
from patcher.errors import ExportError, PrecisionError
from patcher.evaluation import answers
from patcher.wording import percent

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from patcher.arrays import Floats
    from patcher.head import Head
    from patcher.labelled import LabelIds

__all__ = ["LIMITS", "Limits", "PrecisionCheck", "check_precision", "convert", "precision_of", "sample"]

MOST_TEXTS = 2000
"""Maximum number of randomly drawn training texts on which a precision is checked; an evaluation file is used whole."""
# Name prefix of the model's own nodes; nodes outside it belong to the pooling that export adds.
_MODEL_SCOPE = "/model/"


@dataclass(frozen=True)
class Limits:
    """What a precision may cost before the export is refused.

    ``noise`` is the RMS of the change in the logits divided by the RMS of the logits about their mean. ``loss`` is the
    drop in accuracy on labelled texts, and ``disagreement`` the share of them whose answer changes.
    """

    noise: float
    loss: float
    disagreement: float


LIMITS = {"fp16": Limits(noise=0.01, loss=0.002, disagreement=0.005), "int8": Limits(0.25, 0.01, 0.03)}
"""Limits by precision; FP32 has its own, tighter parity check."""


@dataclass(frozen=True)
class PrecisionCheck:
    """The converted backbone's answers compared with the FP32 one's, on ``texts`` labelled texts."""

    precision: str
    texts: int
    source: str
    agreement: float
    """Share of texts with the same answer."""
    accuracy_before: float
    accuracy_after: float

    @property
    def loss(self) -> float:
        """Drop in accuracy; negative if the lower precision happens to be right more often."""
        return self.accuracy_before - self.accuracy_after

    def details(self) -> dict[str, Any]:
        """The figures as report and lineage store them."""
        return {**vars(self), "loss": self.loss}


def convert(backbone: BackboneFile, precision: str, path: Path) -> BackboneFile:
    """Write ``backbone`` in another precision to ``path``; the same file gives the same bytes.

    Raises ExportError if the conversion fails.
    """
    try:
        model = _quantized(backbone.path, path) if precision == "int8" else _halved(backbone.path)
        onnx.checker.check_model(model)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, onnx.checker.ValidationError) as error:
        raise ExportError(f"the backbone cannot be converted to {precision}: {error}; --precision fp32 can") from error
    model.producer_name, model.producer_version, model.doc_string = "patcher", "", ""
    del model.metadata_props[:]
    tidy_nodes(model.graph)
    data = model.SerializeToString(deterministic=True)
    path.write_bytes(data)
    return replace(backbone, path=path, fingerprint=hashlib.sha256(data).hexdigest())


def precision_of(path: Path) -> str:
    """The precision of the backbone at ``path``, read from its graph: one of ``PRECISIONS``."""
    graph = onnx.load(path).graph
    if any(node.op_type == "MatMulInteger" for node in graph.node):
        return "int8"
    halves = any(weights.data_type == onnx.TensorProto.FLOAT16 for weights in graph.initializer)
    return "fp16" if halves else "fp32"


def _quantized(source: Path, path: Path) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():  # it recommends preprocessing that we tried without any gain
        quantize_dynamic(source, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    model = onnx.load(path)
    if not any(node.op_type == "MatMulInteger" for node in model.graph.node):
        raise ValueError("it has no matrix product by a constant")
    _keep_apart(model.graph)
    # The converter imports every domain it may have used, and old runtimes refuse domains that they do not know.
    used = {node.domain for node in model.graph.node}
    kept = [each for each in model.opset_import if each.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def _keep_apart(graph: onnx.GraphProto) -> None:
    """Turn each ``Add`` that feeds a layer normalisation into ``Sum``, which ONNX Runtime does not fuse.

    It would fuse ``Add`` and ``LayerNormalization`` into ``SkipLayerNormalization``, whose CPU kernel is slower than
    the two separate operators.
    """
    adding = {name: node for node in graph.node if node.op_type == "Add" for name in node.output}
    for node in graph.node:
        if node.op_type == "LayerNormalization" and node.input[0] in adding:
            adding[node.input[0]].op_type = "Sum"


def _halved(source: Path) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load(source)
    blocked = [
        node.name
        for node in model.graph.node
        if node.op_type != "Constant" and not node.name.startswith(_MODEL_SCOPE) and node.domain != FUSED
    ]
    halved: onnx.ModelProto
    if any(node.domain == FUSED for node in model.graph.node):
        # ONNX's own type inference stops at fused operators. This one knows them, but fails on some plain graphs.
        whole = OnnxModel(model)
        with quiet():
            whole.convert_float_to_float16(keep_io_types=True, node_block_list=blocked, use_symbolic_shape_infer=True)
        halved = whole.model
    else:
        halved = convert_float_to_float16(model, keep_io_types=True, node_block_list=blocked)
    # If several blocked nodes read a value, the converter inserts a cast for each of them, all with the same output
    # name and after the nodes that read it. Keep one of each and sort the nodes again.
    known = {each.name for each in halved.graph.input} | {each.name for each in halved.graph.initializer}
    ordered = _ordered({node.output[0]: node for node in reversed(halved.graph.node)}.values(), known)
    del halved.graph.node[:]
    halved.graph.node.extend(ordered)
    return halved


def _ordered(nodes: Iterable[onnx.NodeProto], known: set[str]) -> list[onnx.NodeProto]:
    """Sort a graph's nodes topologically; ``known`` are the names of inputs and initializers."""
    waiting: list[onnx.NodeProto] = list(nodes)
    ordered: list[onnx.NodeProto] = []
    known = {*known, ""}
    while waiting:
        later: list[onnx.NodeProto] = []
        for node in reversed(waiting):
            if known.issuperset(node.input):
                known.update(node.output)
                ordered.append(node)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise ValueError("its nodes read what no node gives")
        waiting = later[::-1]
    return ordered


def sample(count: int) -> NDArray[np.int64]:
    """Indices, INT64, of those of ``count`` training texts that a precision is checked on.

    They are drawn at random: in a file that cycles through its labels, every n-th text may have the same label.
    """
    return np.sort(np.random.default_rng(0).permutation(count)[:MOST_TEXTS])


def check_precision(
    precision: str, head: Head, before: Floats, after: Floats, ids: LabelIds, source: str
) -> PrecisionCheck:
    """Compare the head's answers from the FP32 backbone's features with those from the converted one's.

    ``before`` and ``after`` are the features, both FP32 ``[n, width]``.

    Raises
    ------
    PrecisionError
        if the cost exceeds ``LIMITS``; one changed text is always allowed, because a small file cannot tell more.
    """
    same = sum(a == b for a, b in zip(answers(head, before), answers(head, after), strict=True))
    found = PrecisionCheck(
        precision,
        texts=len(ids),
        source=source,
        agreement=same / len(ids),
        accuracy_before=accuracy(head, before, ids),
        accuracy_after=accuracy(head, after, ids),
    )
    limits = LIMITS[precision]
    slack = 1.0 / len(ids) + 1e-9
    changed = 1 - found.agreement
    for share, limit, what in (
        (found.loss, limits.loss, f"costs {percent(found.loss)} of accuracy ({percent(found.accuracy_before)} before)"),
        (changed, limits.disagreement, f"changes the answer to {percent(changed)} of the texts"),
    ):
        if share > max(limit, slack):
            raise PrecisionError(
                f"{precision} {what} on {found.texts} texts of {source}; expected at most {percent(limit)}: "
                "this model loses too much at this precision; use "
                f"--precision {'fp16' if precision == 'int8' else 'fp32'}",
                found.details(),
            )
    return found
