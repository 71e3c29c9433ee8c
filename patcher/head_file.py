"""Write a head as one ONNX file, and read it back.

The graph guarantees three things:

- The fine-tuned rows are one Gemm on the classifier features, whatever was patched in since, so their logits are
  bit-for-bit the same in every version.
- The label axis is truly dynamic (a Slice whose end is computed at run time), so that versions with different label
  counts can be served under one ``config.pbtxt`` with ``dims: [-1]``.
- The label strings are constants of the graph, so that label, logits and version of an answer come from one file.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.errors import RepositoryError
from patcher.head import TOP_K, Head, Lineage
from patcher.onnx_file import parse_model
from patcher.scope import Scope
from patcher.scope_file import scope_graph

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx
    from numpy.typing import NDArray

__all__ = ["read_head", "read_lineage", "write_head"]

# Opset 17 is the newest that ONNX Runtime 1.12 fully supports, and IR version 8 belongs to it: every Triton release of
# recent years loads such a file.
_OPSET = 17
_IR_VERSION = 8
_METADATA_KEY = "patcher"
_MOST_WIDTH = 1 << 20
_MOST_VERSION = 2**63 - 1
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control and bidirectional formatting characters. Other unprintable ones are allowed: older heads may contain them."""
_PLAIN_OPS = frozenset([
    "Add", "ArgMax", "Cast", "Clip", "Concat", "Div", "Exp", "Expand", "Gather", "GatherElements", "Gemm", "Identity",
    "Log", "MatMul", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "ReduceLogSumExp", "ReduceMax", "ReduceMin",
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Sqrt",
    "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where", "Constant",
])  # fmt: skip


def write_head(head: Head) -> bytes:
    """Serialize a head as an ONNX file; equal heads give equal bytes."""
    import onnx

    model = _model(head)
    onnx.checker.check_model(model, full_check=False)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def read_head(data: bytes) -> Head:
    """Read a head from its file; RepositoryError if the bytes are not a head that patcher wrote."""
    model = _parse(data)
    metadata = _metadata(model)
    arrays = _arrays(model)
    try:
        _check_labels(arrays["labels"].tolist())
        return Head(
            labels=tuple(arrays["labels"].tolist()),
            base_weight=arrays["base_weight"],
            base_bias=arrays["base_bias"],
            patch_weight=arrays.get("patch_weight", np.zeros((0, metadata["width"]), np.float32)),
            patch_bias=arrays.get("patch_bias", np.zeros(0, np.float32)),
            order=arrays["order"],
            split=metadata["split"],
            width=metadata["width"],
            problem=metadata["problem"],
            scope=Scope.from_arrays(metadata["scope"], arrays) if metadata["scope"] else None,
            lineage=_lineage(metadata["lineage"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, MemoryError) as error:
        raise RepositoryError(f"this ONNX file is not a head of patcher: {type(error).__name__} {error}") from error


def read_lineage(data: bytes) -> Lineage:
    """Read only the lineage of a head and none of its arrays; RepositoryError as for ``read_head``."""
    try:
        return _lineage(_metadata(_parse(data))["lineage"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, MemoryError) as error:
        raise RepositoryError(f"this ONNX file is not a head of patcher: {type(error).__name__} {error}") from error


def _lineage(values: dict[str, Any]) -> Lineage:
    values = dict(values)
    for name in ("added", "removed"):
        values[name] = values.get(name, ())
        if not isinstance(values[name], (list, tuple)):
            raise ValueError(f"a lineage with {name} {values[name]!r:.40}")  # noqa: TRY004  one handler for all
        values[name] = tuple(values[name])
    values["renamed"] = tuple((old, new) for old, new in values.get("renamed", ()))
    texts = [
        *(values.get(name, "") for name in ("backbone", "created", "method", "data_hash", "gate", "author")),
        *(values.get("tool_version", ""), *values["added"], *values["removed"]),
        *(label for pair in values["renamed"] for label in pair),
    ]
    parent = values.get("parent")
    numbers = [values["version"], 0 if parent is None else parent]
    if not all(isinstance(each, str) and each.encode("utf-8", "replace").decode() == each for each in texts):
        raise ValueError("a lineage with texts that are not valid strings")
    if not all(type(each) is int and 0 <= each <= _MOST_VERSION for each in numbers):
        raise ValueError("a lineage whose versions are not whole numbers")
    _check_details(values.setdefault("details", {}))
    known = {f.name for f in dataclasses.fields(Lineage)}
    return Lineage(**{name: value for name, value in values.items() if name in known})


def _check_details(details: Any) -> None:
    """Raise ValueError for details whose types reports and exports cannot read."""
    if not isinstance(details, dict):
        raise ValueError("a lineage whose details are not an object")  # noqa: TRY004  one handler for all
    numbers = [details.get("flips"), details.get("flips_upper_bound")]
    for name in ("estimated_recall", "recall_lower_bound"):
        recalls = details.get(name)
        if recalls is not None and not isinstance(recalls, dict):
            raise ValueError(f"a lineage whose {name} is {recalls!r:.40}")
        numbers += (recalls or {}).values()
    if not all(each is None or isinstance(each, (int, float)) for each in numbers):
        raise ValueError("a lineage whose figures are no numbers")
    checkpoint = details.get("checkpoint")
    if checkpoint is not None and (not isinstance(checkpoint, str) or "\0" in checkpoint):
        raise ValueError(f"a lineage whose checkpoint is {checkpoint!r:.40}")


def _check_labels(labels: Sequence[Any]) -> None:
    """Raise ValueError for labels that could move a terminal's cursor or reverse its text."""
    for label in labels:
        if isinstance(label, str) and (found := _UNFIT.search(label)):
            raise ValueError(f"the label {label!r:.80} holds {found[0]!r}, which does not print")


def _parse(data: bytes) -> onnx.ModelProto:
    model = parse_model(data)
    if model.functions:
        raise RepositoryError("this ONNX file is not a head of patcher: it defines functions")
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in _PLAIN_OPS:
            raise RepositoryError(
                f"this ONNX file is not a head of patcher: it uses the operator {node.domain}:{node.op_type}"
            )
    return model


def _metadata(model: onnx.ModelProto) -> dict[str, Any]:
    texts = {entry.key: entry.value for entry in model.metadata_props}
    try:
        metadata: Any = json.loads(texts[_METADATA_KEY])
        if not isinstance(metadata, dict) or not isinstance(metadata["lineage"], dict):
            raise ValueError("its metadata is not an object")  # noqa: TRY004  one handler below for all
        if not all(isinstance(metadata[name], int) for name in ("split", "width")):
            raise ValueError("split and width must be whole numbers")
        if metadata["width"] > _MOST_WIDTH:  # before anything of this size is allocated
            raise ValueError(f"a width of {metadata['width']:,}")
        return dict(metadata)
    except (KeyError, ValueError, RecursionError) as error:
        raise RepositoryError(
            f"this ONNX file is not a head of patcher: no readable `{_METADATA_KEY}` metadata"
        ) from error


def _arrays(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    from onnx import TensorProto, numpy_helper

    arrays: dict[str, NDArray[Any]] = {}
    for tensor in model.graph.initializer:
        try:
            if tensor.data_type == TensorProto.STRING:
                arrays[tensor.name] = np.array([text.decode() for text in tensor.string_data], dtype=object)
            else:
                arrays[tensor.name] = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, OverflowError, KeyError, MemoryError) as error:
            raise RepositoryError(f"this ONNX file's `{tensor.name}` cannot be read: {error}") from error
    return arrays


def _model(head: Head) -> onnx.ModelProto:
    from onnx import TensorProto, helper

    nodes, constants = _logits_graph(head)
    nodes += _answer_nodes(head)
    if head.scope is None:
        nodes.append(helper.make_node("ReduceMax", ["scores"], ["in_scope"], axes=[1], keepdims=1))
    else:
        scope_nodes, scope_constants = scope_graph(head.scope, "features", "logits", "in_scope")
        nodes += scope_nodes
        constants += scope_constants
    info = helper.make_tensor_value_info
    outputs = [
        info("label", TensorProto.STRING, ["batch", "k"]),
        info("score", TensorProto.FLOAT, ["batch", "k"]),
        info("logits", TensorProto.FLOAT, ["batch", "labels"]),
        info("head_version", TensorProto.INT64, ["batch", 1]),
        info("in_scope", TensorProto.FLOAT, ["batch", 1]),
    ]
    inputs = [info("features", TensorProto.FLOAT, ["batch", head.width])]
    graph = helper.make_graph(nodes, "head", inputs, outputs, initializer=constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    model.producer_name = "patcher"
    metadata = {
        "split": head.split,
        "width": head.width,
        "problem": head.problem,
        "scope": head.scope.settings() if head.scope else None,
        "lineage": dataclasses.asdict(head.lineage),
    }
    helper.set_model_props(model, {_METADATA_KEY: json.dumps(metadata, sort_keys=True, ensure_ascii=False)})
    return model


def _logits_graph(head: Head) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes from ``features`` to ``logits``, with a separate Gemm for the fine-tuned rows, and all constants."""
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node

    def number(name: str, value: int) -> onnx.TensorProto:
        return helper.make_tensor(name, TensorProto.INT64, [1], [value])

    def floats(name: str, values: NDArray[np.float32]) -> onnx.TensorProto:
        return numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name)

    constants = [
        floats("base_weight", head.base_weight),
        floats("base_bias", head.base_bias),
        numpy_helper.from_array(np.array(head.labels, dtype=object), "labels"),
        numpy_helper.from_array(np.ascontiguousarray(head.order, np.int64), "order"),
        helper.make_tensor("version", TensorProto.INT64, [1, 1], [head.lineage.version]),
        number("zero", 0),
        number("one", 1),
        number("split", head.split),
        number("count", len(head.labels)),
        number("top_k", TOP_K),
    ]
    nodes = [
        node("Slice", ["features", "zero", "split", "one"], ["classifier_features"]),
        node("Gemm", ["classifier_features", "base_weight", "base_bias"], ["base_logits"], transB=1),
    ]
    raw = "base_logits"
    if len(head.patch_weight):
        constants += [floats("patch_weight", head.patch_weight), floats("patch_bias", head.patch_bias)]
        nodes += [
            node("Gemm", ["features", "patch_weight", "patch_bias"], ["patch_logits"], transB=1),
            node("Concat", ["base_logits", "patch_logits"], ["raw_logits"], axis=1),
        ]
        raw = "raw_logits"
    nodes += [
        # Slice clamps its end, so max(batch, labels) keeps all of `order`, but shape inference cannot know that.
        node("Shape", ["features"], ["batch"], start=0, end=1),
        node("Max", ["batch", "count"], ["end"]),
        node("Slice", ["order", "zero", "end"], ["columns"]),
        node("Gather", [raw, "columns"], ["logits"], axis=1),
    ]
    return nodes, constants


def _answer_nodes(head: Head) -> list[onnx.NodeProto]:
    """Nodes from ``logits`` to the best labels, their scores and the head version."""
    from onnx import helper

    node = helper.make_node
    return [
        node("Shape", ["columns"], ["label_count"]),
        node("Min", ["label_count", "top_k"], ["k"]),
        node("TopK", ["logits", "k"], ["top_logits", "top"], axis=1),
        node("Gather", ["labels", "top"], ["label"], axis=0),
        node("Softmax", ["logits"], ["scores"], axis=1) if head.exclusive else node("Sigmoid", ["logits"], ["scores"]),
        node("GatherElements", ["scores", "top"], ["score"], axis=1),
        node("Concat", ["batch", "one"], ["version_shape"], axis=0),
        node("Expand", ["version", "version_shape"], ["head_version"]),
    ]
