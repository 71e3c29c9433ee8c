"""Exports the model without its last layer as a single ONNX file whose only output is the features.

This uses torch's TorchScript exporter rather than the newer dynamo one. It was correct on every architecture tried
(the newer one fails on XLNet and is wrong on ModernBERT with SDPA), writes opset 17 and IR 8 itself, and takes a tenth
of the time. Eager attention exports to plain MatMul and Softmax, with the mask as a tensor of the graph at every batch
size and sequence length.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import Tensor, nn

from export.pooling import last_states, pooled
from export.split import without_layer
from export.unpadding import without_padding
from patcher.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from export.split import Split

__all__ = ["BackboneFile", "export_backbone", "tidy_nodes"]

_OPSET = 17
_IR_VERSION = 8
_MOST_BYTES = 2**31 - 2**20
"""A protobuf message, and hence an ONNX file without external data, must be smaller than 2 GiB."""


@dataclass(frozen=True)
class BackboneFile:
    """An exported backbone: its file, the file's SHA-256, and the names of its input token tensors."""

    path: Path
    fingerprint: str
    inputs: tuple[str, ...]
    unpadded: bool = False
    """Whether attention is the only work done on padding tokens."""
    fused: bool = False
    """Whether the graph uses ONNX Runtime's fused operators."""


def export_backbone(
    model: PreTrainedModel, split: Split, inputs: Mapping[str, Tensor], path: Path, *, unpad: bool = False
) -> BackboneFile:
    """Write the backbone to ``path``.

    Its output is ``features``, FP32 ``[batch, width]``: the tensor that enters the last layer, concatenated with the
    mean of the hidden states over the text's tokens and the last layers. The same model always gives the same bytes.

    Parameters
    ----------
    inputs
        A padded batch of tokens, INT64 ``[batch, sequence]`` each; both axes are dynamic in the file.
    unpad
        Skip the work on padding tokens where the graph allows it (``export.unpadding``).

    Raises
    ------
    ExportError
        when torch cannot export the model, or the file would be larger than a single ONNX file can be.
    """
    size = sum(weights.nbytes for weights in model.parameters())
    if size > _MOST_BYTES:
        raise ExportError(
            f"{type(model).__name__} has {size / 1e9:.1f} GB of float32 weights; one ONNX file holds less than 2 GB"
        )
    graph = _tidied(_traced(model, split, inputs, path), split.width)
    unpadded = without_padding(graph, {name: ids.numpy() for name, ids in inputs.items()}) if unpad else None
    data = (unpadded or graph).SerializeToString(deterministic=True)
    path.write_bytes(data)
    names = tuple(each.name for each in graph.graph.input)
    return BackboneFile(path, hashlib.sha256(data).hexdigest(), names, unpadded is not None)


class _Backbone(nn.Module):
    """Maps token tensors, in the order of ``names``, to features."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tokens: Tensor) -> Tensor:
        inputs = dict(zip(self.names, tokens, strict=True))
        with last_states(self.model) as states:
            classifier_features = self.model(**inputs).logits
        mean = pooled(states[-1], inputs["attention_mask"])
        return torch.cat([classifier_features, mean], dim=-1)


def _traced(model: PreTrainedModel, split: Split, inputs: Mapping[str, Tensor], path: Path) -> onnx.ModelProto:
    names = tuple(inputs)
    with _plain_attention(model), without_layer(model, split.layer), torch.no_grad(), _quiet():
        try:
            torch.onnx.export(
                _Backbone(model, names).eval(),
                tuple(inputs.values()),
                path,
                input_names=list(names),
                output_names=["features"],
                dynamic_axes={**{name: {0: "batch", 1: "sequence"} for name in names}, "features": {0: "batch"}},
                opset_version=_OPSET,
                dynamo=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ExportError(f"torch cannot export {type(model).__name__} to ONNX: {reason}") from error
    return onnx.load(path)


@contextlib.contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Temporarily switch the model to eager attention and turn off its key/value cache, which nobody reads."""
    attention = model.config._attn_implementation  # noqa: SLF001  there is a public setter, but no getter
    cache = getattr(model.config, "use_cache", None)
    model.set_attn_implementation("eager")
    if cache is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        if cache is not None:
            model.config.use_cache = cache


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's log and its warnings about tracing and about its own deprecation.

    Tracing warnings are not needed, because parity is checked afterwards at other shapes. The log has to be replaced
    because torch 2.7 to 2.13 tests the function that says whether logging is on instead of calling it, so logging is
    always on: a model that cannot be exported would be printed to stdout, where our callers read JSON.
    """
    internals: Any = torch._C  # noqa: SLF001  there is no public way
    log = internals._jit_onnx_log  # noqa: SLF001
    internals._jit_onnx_log = lambda *_: None  # noqa: SLF001
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        internals._jit_onnx_log = log  # noqa: SLF001


def _tidied(model: onnx.ModelProto, width: int) -> onnx.ModelProto:
    """Strip everything that tells how and where the graph was made, so that the same model gives the same bytes."""
    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "patcher", "", ""
    graph = model.graph
    tidy_nodes(graph)
    # Drop inputs that no node reads: clients would send them for nothing.
    read = {name for node in graph.node for name in node.input}
    inputs = [each for each in graph.input if each.name in read]
    del graph.input[:]
    graph.input.extend(inputs)
    # Conv1D layers end in a Reshape that hides the width, but Triton compares its configured dims with the graph's.
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = width
    return model


def tidy_nodes(graph: onnx.GraphProto) -> None:
    """Remove names, doc strings and metadata that tell where and with what a graph was made."""
    graph.name, graph.doc_string = "backbone", ""
    for message in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        _strip(message)


def _strip(message: Any) -> None:
    message.doc_string = ""
    if hasattr(message, "metadata_props"):
        del message.metadata_props[:]
