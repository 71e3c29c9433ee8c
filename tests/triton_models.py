"""Small ONNX models and configurations for tests of what runs inside Triton."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import model_config_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING


def only_python_based(reason: str) -> pytest.MarkDecorator:
    """Skip a test if PATCHER_SERVER_ONNXRUNTIME selects Triton's C++ backend for every server of this run."""
    return pytest.mark.skipif(bool(os.environ.get("PATCHER_SERVER_ONNXRUNTIME")), reason=f"the C++ backend {reason}")


def onnx_bytes(
    nodes: Sequence[Any],
    inputs: Sequence[tuple[str, int, Sequence[Any]]],
    outputs: Sequence[tuple[str, int, Sequence[Any]]],
    constants: dict[str, Any] | None = None,
) -> bytes:
    """An ONNX file; each tensor is (name, element type, shape with names for free axes)."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        initializer=[numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return data


def linear(rows: int = 3, columns: int = 2, batch: Any = "batch") -> bytes:
    """features FP32 [batch, rows] -> logits FP32 [batch, columns]: row sums, times 1, 2, ..."""
    weight = np.tile(np.arange(1, columns + 1, dtype=np.float32), (rows, 1))
    return onnx_bytes(
        [helper.make_node("MatMul", ["features", "weight"], ["logits"])],
        [("features", FLOAT, [batch, rows])],
        [("logits", FLOAT, [batch, columns])],
        {"weight": weight},
    )


def lookup() -> bytes:
    """index INT64 [batch, n] -> found STRING [batch, n] and same INT64 [batch, n]; an index above 2 is an error."""
    return onnx_bytes(
        [helper.make_node("Gather", ["words", "index"], ["found"]), helper.make_node("Identity", ["index"], ["same"])],
        [("index", INT64, ["batch", "n"])],
        [("found", STRING, ["batch", "n"]), ("same", INT64, ["batch", "n"])],
        {"words": np.array(["zero", "eins", "zw\u00f6i"], dtype=object)},
    )


def write_model(root: Path, name: str, data: bytes | None, config: str) -> Path:
    """Write a model folder with version 1; ``config`` is the config.pbtxt without name and backend."""
    folder = root / name
    (folder / "1").mkdir(parents=True)
    if data is not None:
        (folder / "1" / "model.onnx").write_bytes(data)
    message = text_format.Parse(f'name: "{name}" backend: "onnxruntime" {config}', pb.ModelConfig())
    if not message.instance_group:
        message.instance_group.add(count=1)
    (folder / "config.pbtxt").write_text(text_format.MessageToString(message))
    return folder


def tensor(kind: str, name: str, data_type: str, *dims: int, more: str = "") -> str:
    """An input or output of a configuration."""
    return f'{kind} {{ name: "{name}" data_type: TYPE_{data_type} dims: {list(dims)} {more} }} '
