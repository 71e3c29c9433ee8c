"""Check untrusted ONNX files before anything loads them.

A file may name other files to read weights from (anywhere on the machine), ask for operators from a shared library, or
be far larger than what it claims to be. None of that is needed here, so none of it is accepted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patcher.errors import RepositoryError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import onnx

__all__ = ["MAX_BACKBONE_BYTES", "MAX_HEAD_BYTES", "check_backbone_file", "parse_model"]

MAX_HEAD_BYTES = 1 << 30
"""A head of 100,000 labels on 1,536 features takes 0.6 GB."""
MAX_BACKBONE_BYTES = 2 << 30
"""The maximum size of a protobuf message, and so of an ONNX file without external weights."""
_BUILT_IN = frozenset(["", "ai.onnx", "ai.onnx.ml", "com.microsoft"])
"""Domains of operators built into ONNX Runtime; any other needs a custom operator library."""
_DEEPEST = 16


def check_backbone_file(path: Path) -> None:
    """Raise RepositoryError if the ONNX file at ``path`` is too large, reads other files or needs custom operators."""
    try:
        size = path.stat().st_size
        if size > MAX_BACKBONE_BYTES:
            raise RepositoryError(f"{path} has {size:,} bytes; expected at most {MAX_BACKBONE_BYTES:,}")
        data = path.read_bytes()
    except OSError as error:
        raise RepositoryError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        parse_model(data, MAX_BACKBONE_BYTES)
    except RepositoryError as error:
        raise RepositoryError(f"{path} must not be loaded: {error}") from error


def parse_model(data: bytes, most_bytes: int = MAX_HEAD_BYTES) -> onnx.ModelProto:
    """Parse and check the model in ``data``; RepositoryError says what is wrong with it."""
    import onnx
    from google.protobuf.message import DecodeError

    if len(data) > most_bytes:
        raise RepositoryError(f"an ONNX file of {len(data):,} bytes; expected at most {most_bytes:,}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise RepositoryError(f"not an ONNX file: {len(data)} bytes that do not parse ({error})") from error
    if model.training_info:
        raise RepositoryError("the ONNX file holds a training graph, which nothing here has")
    own = {(function.domain, function.name) for function in model.functions}
    _check_graph(model.graph, own, 0)
    for function in model.functions:
        if function.domain in _BUILT_IN:
            raise RepositoryError(f"the ONNX file puts its own {function.name} in the place of a built-in operator")
        _check_nodes(function.node, own, 0)
        _check_attributes(function.attribute_proto, own, 0)
    return model


def _check_graph(graph: Any, own: set[tuple[str, str]], depth: int) -> None:
    if depth > _DEEPEST:
        raise RepositoryError(f"the ONNX file nests graphs more than {_DEEPEST} deep")
    _check_tensors(graph.initializer)
    _check_tensors(part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
    _check_nodes(graph.node, own, depth)


def _check_nodes(nodes: Iterable[Any], own: set[tuple[str, str]], depth: int) -> None:
    for node in nodes:
        if node.domain not in _BUILT_IN and (node.domain, node.op_type) not in own:
            raise RepositoryError(
                f"the ONNX file uses the operator {node.domain}:{node.op_type}; expected those that ONNX Runtime brings"
            )
        _check_attributes(node.attribute, own, depth)


def _check_attributes(attributes: Iterable[Any], own: set[tuple[str, str]], depth: int) -> None:
    for attribute in attributes:
        _check_tensors(_attribute_tensors(attribute))
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            _check_graph(graph, own, depth + 1)


def _attribute_tensors(attribute: Any) -> Iterator[Any]:
    yield from (attribute.t, *attribute.tensors)
    for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
        yield from (sparse.values, sparse.indices)


def _check_tensors(tensors: Iterable[Any]) -> None:
    for tensor in tensors:
        if tensor.data_location != tensor.DEFAULT or tensor.external_data:
            where = next((entry.value for entry in tensor.external_data if entry.key == "location"), "another file")
            raise RepositoryError(f"the ONNX file keeps weights outside of itself, in {where!r:.80}")
