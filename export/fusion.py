"""Rewrites the backbone with ONNX Runtime's fused operators, for GPUs.

On a GPU each node is a kernel launch, and the time for a short text is the sum of the launches. Attention, layer
normalisation with the addition before it, GELU with its bias, and the embeddings become one operator each (domain
``com.microsoft``): a BERT of 6 layers has 92 nodes instead of 562, and batches of many shapes took a third of the time
on an H200. CPUs gain little from fusion and more from ``export.unpadding``, which cannot be combined with it. TensorRT
does not support these operators.

Fused attention takes the length of each text, so padding must follow the text. If the tokenizer pads on the left,
attention reads the whole mask instead, which is a tenth slower.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx

from export.backbone import BackboneFile, tidy_nodes
from patcher.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PretrainedConfig

__all__ = ["FUSED", "fuse", "quiet"]

FUSED = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what ONNX Runtime's tools print, and what they log as warnings through the root logger."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.root.setLevel(level)


def fuse(backbone: BackboneFile, config: PretrainedConfig, path: Path, *, left: bool) -> BackboneFile:
    """Write ``backbone`` (FP32, not unpadded) to ``path`` with fused operators; the same file gives the same bytes.

    ``left`` says that padding comes before the text, so that attention must read the whole mask rather than the text's
    length. Raises ExportError if ONNX Runtime finds no attention it knows in the graph, or if its optimizer fails.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.use_raw_attention_mask(left)
    try:
        with quiet():  # it complains that the exporter's name is missing, which we strip
            model: onnx.ModelProto = optimize_model(
                str(backbone.path),
                model_type="bert",
                num_heads=getattr(config, "num_attention_heads", 0),
                hidden_size=getattr(config, "hidden_size", 0),
                opt_level=0,  # leave the session's own optimisations to the machine that serves
                use_gpu=True,
                optimization_options=options,
            ).model
    except Exception as error:  # it fails in a dozen ways on graphs that it was not made for
        if os.environ.get("PATCHER_DEBUG") == "1":  # the graph may also be wrong because of a bug of ours
            traceback.print_exc()
        raise ExportError(f"ONNX Runtime's optimizer fails on this graph ({error})") from error
    if not any(node.domain == FUSED and node.op_type.endswith("Attention") for node in model.graph.node):
        raise ExportError("ONNX Runtime has no fused attention for this graph")
    if not any(each.domain == FUSED for each in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(FUSED, 1))
    model.producer_name, model.producer_version, model.doc_string = "patcher", "", ""
    del model.metadata_props[:]
    tidy_nodes(model.graph)
    data = model.SerializeToString(deterministic=True)
    path.write_bytes(data)
    return replace(backbone, path=path, fingerprint=hashlib.sha256(data).hexdigest(), fused=True)
