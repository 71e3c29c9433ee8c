"""Rewrites the backbone's graph so that token-wise operators skip padding.

A batch is as long as its longest text. Most of a transformer's work, every product with a weight matrix, is done token
by token, including the padding. The rewritten graph gathers the tokens that the attention mask keeps into one row,
``[batch, length, …]`` to ``[1, tokens, …]``, and unpacks them only where texts must be kept apart: in attention and
pooling. Inputs and outputs are unchanged, so clients notice nothing. Texts of different lengths can then share a batch
at little more than the cost of attention. This is the packing of ByteTransformer (arXiv 2210.03052) in plain ONNX.

Token-wise nodes are found by running the graph at two shapes, not by a table of architectures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from patcher.runtime import onnxruntime_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[np.int64]]

__all__ = ["without_padding"]

_MASK = "attention_mask"
_SHAPES = ((3, 7), (5, 11))
"""Batch size and length of the two runs: a tensor whose shape starts with both in both runs has a row per token."""
_TOKENWISE = 3
"""Minimum number of dimensions for a tensor to be worth packing: batch, length, width."""
_TOLERANCE = 1e-4

_ELEMENTWISE = frozenset((
    "Add", "Cast", "Clip", "Div", "Erf", "Exp", "Gelu", "Identity", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal",
    "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh", "Where",
))  # fmt: skip
_REDUCTIONS = frozenset(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Squeeze", "Unsqueeze"))
_ALONG_AXIS = {"Concat": None, "Split": 0, "LayerNormalization": -1, "Softmax": -1}
"""Operators that work along one axis, with the axis that is the default."""

_PREFIX = "/padding"
_PLACES, _RANKS, _SIZE = (f"{_PREFIX}/{name}" for name in ("places", "ranks", "size"))


def without_padding(model: onnx.ModelProto, tokens: Arrays) -> onnx.ModelProto | None:
    """The same graph, with its token-wise operators skipping padding.

    Parameters
    ----------
    model
        Maps token tensors, INT64 ``[batch, length]`` and including an ``attention_mask``, to ``features``.
    tokens
        A batch padded as the tokenizer pads, with a length of 11 tokens or more.

    Returns
    -------
    onnx.ModelProto or None
        None if no product with a weight matrix can be packed, or if the features of ``tokens`` would change, for
        example because a convolution reads the padding next to a token.
    """
    graph = model.graph
    if _MASK not in {each.name for each in graph.input} or any(map(_has_subgraph, graph.node)):
        return None
    try:
        tensors = _Tensors(model, tokens)
    except onnxruntime_errors():  # the graph fails at other shapes than the traced one; the parity check reports it
        return None
    chosen = _worthwhile(tensors, graph.node)
    if not chosen:
        return None
    rewriting = _Rewriting(tensors, {name for place in chosen for name in graph.node[place].output})
    for place, node in enumerate(graph.node):
        (rewriting.add_packed if place in chosen else rewriting.add)(node)
    packed = onnx.ModelProto()
    packed.CopyFrom(model)
    del packed.graph.node[:]
    packed.graph.node.extend([*_bookkeeping(), *rewriting.nodes])
    onnx.checker.check_model(packed)
    return packed if _agree(model, packed, tokens) else None


class _Tensors:
    """Facts about a graph's tensors: their shapes in both runs, the constants, and which depend on the mask alone."""

    def __init__(self, model: onnx.ModelProto, tokens: Arrays) -> None:
        self.constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.runs = [_shapes(model, tokens, shape) for shape in _SHAPES]
        self.of_mask = _of_mask(model.graph)

    def rank(self, name: str) -> int:
        return len(self.runs[0][name])

    def tokenwise(self, name: str) -> bool:
        """Whether a tensor's shape is ``[batch, length, …]`` with the same remaining dimensions in both runs."""
        shapes = [run.get(name, ()) for run in self.runs]
        return (
            len(shapes[0]) >= _TOKENWISE
            and [each[:2] for each in shapes] == list(_SHAPES)
            and shapes[0][2:] == shapes[1][2:]
        )

    def behind(self, name: str) -> tuple[int, ...]:
        """The dimensions of a tensor after batch and length."""
        return self.runs[0][name][2:]

    def alike(self, name: str, rank: int) -> bool:
        """Whether a tensor has the same values for all tokens when broadcast against tensors of ``rank`` dimensions."""
        shapes = [np.shape(self.constants[name])] * 2 if name in self.constants else [run[name] for run in self.runs]
        leading = (1,) * (rank - len(shapes[0])) + shapes[0]
        return shapes[0] == shapes[1] and leading[:2] == (1, 1)

    def axes(self, node: onnx.NodeProto) -> list[int] | None:
        """The non-negative axes that a node reduces, removes or adds; None if they are not given or not constant."""
        found = _attribute(node, "axes")
        if found is None:
            found = self.constants.get(node.input[1]) if len(node.input) > 1 else None
        rank = self.rank(node.output[0] if node.op_type == "Unsqueeze" else node.input[0])
        return None if found is None else [int(axis) % rank for axis in found]


def _works_by_token(tensors: _Tensors, node: onnx.NodeProto) -> bool:
    """Whether each token's outputs depend on that token's inputs only."""
    given = [name for name in node.input if name]
    rows = [name for name in given if tensors.tokenwise(name)]
    # Tensors derived from the mask alone must not be packed: once packed, they are all ones and mask nothing.
    if not rows or tensors.of_mask.intersection(rows) or not all(map(tensors.tokenwise, node.output)):
        return False
    kind, rank = node.op_type, tensors.rank(rows[0])
    if kind == "MatMul":
        return given[:1] == rows and np.ndim(tensors.constants.get(given[1], 0)) == 2  # noqa: PLR2004  a weight matrix
    if kind in _REDUCTIONS:
        axes = tensors.axes(node)
        return given[:1] == rows and axes is not None and min(axes, default=0) >= 2  # noqa: PLR2004  behind the tokens
    if kind in _ALONG_AXIS:
        axis = _attribute(node, "axis", _ALONG_AXIS[kind]) % rank
        others = [name for name in given if name not in rows]
        sole = not others if kind == "Concat" else rows == given[:1] and tensors.constants.keys() >= set(others)
        return bool(axis >= 2 and sole)  # noqa: PLR2004
    top = tensors.rank(node.output[0])
    return kind in _ELEMENTWISE and all(
        tensors.rank(name) == top if name in rows else tensors.alike(name, top) for name in given
    )


def _worthwhile(tensors: _Tensors, nodes: Sequence[onnx.NodeProto]) -> set[int]:
    """Indices of the nodes to pack: token-wise nodes that are connected to a product with a weight matrix."""
    places = [place for place, node in enumerate(nodes) if _works_by_token(tensors, node)]
    group = {place: place for place in places}

    def root(place: int) -> int:
        while group[place] != place:
            place = group[place]
        return place

    maker = {name: place for place in places for name in nodes[place].output}
    for place in places:
        for name in nodes[place].input:
            if name in maker:
                group[root(place)] = root(maker[name])
    paying = {root(place) for place in places if nodes[place].op_type == "MatMul"}
    return {place for place in places if root(place) in paying}


class _Rewriting:
    """The nodes of the new graph so far, and whether each tensor exists packed, unpacked or both."""

    def __init__(self, tensors: _Tensors, made: set[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._tensors = tensors
        self._packed: set[str] = set()
        self._only_packed = made
        self._instead: dict[str, str] = {}

    def add_packed(self, node: onnx.NodeProto) -> None:
        """Add a token-wise node, working on packed tensors."""
        given = [self._pack(name) if self._tensors.tokenwise(name) else name for name in node.input]
        self._packed.update(node.output)
        self._add(node, given, [_packed(name) for name in node.output])

    def add(self, node: onnx.NodeProto) -> None:
        """Add a node unchanged, unpacking its inputs; a ``Shape`` of a packed tensor needs no unpacking."""
        if node.op_type == "Shape" and node.input[0] in self._only_packed and not node.attribute:
            self._instead[node.output[0]] = self._shape(self._tensors.behind(node.input[0]))
            return
        for name in self._only_packed.intersection(node.input):
            self._only_packed.discard(name)
            self._gather(_packed(name), _RANKS, name)
        self._add(node, node.input, node.output)

    def _pack(self, name: str) -> str:
        if name not in self._packed:
            self._packed.add(name)
            self._gather(name, _PLACES, _packed(name))
        return _packed(name)

    def _gather(self, name: str, places: str, result: str) -> None:
        self.nodes.append(helper.make_node("GatherND", [name, places], [result], f"{_PREFIX}{result}"))

    def _add(self, node: onnx.NodeProto, given: Iterable[str], gives: Iterable[str]) -> None:
        new = onnx.NodeProto()
        new.CopyFrom(node)
        new.input[:], new.output[:] = [self._instead.get(name, name) for name in given], gives
        self.nodes.append(new)

    def _shape(self, behind: tuple[int, ...]) -> str:
        """Name of a tensor that holds the shape ``[batch, length, *behind]``."""
        name = f"{_PREFIX}/size/{'x'.join(map(str, behind))}"
        if name not in self._packed:
            self._packed.add(name)
            rest = numpy_helper.from_array(np.array(behind, np.int64))
            self.nodes.append(helper.make_node("Constant", [], [f"{name}/behind"], value=rest))
            self.nodes.append(helper.make_node("Concat", [_SIZE, f"{name}/behind"], [name], name, axis=0))
        return name


def _packed(name: str) -> str:
    return f"{name}/packed"


def _bookkeeping() -> list[onnx.NodeProto]:
    """Nodes that compute the indices to pack and unpack tokens with.

    To pack: the position of each kept token, INT64 ``[1, tokens, 2]``. To unpack: for each position, the index of its
    packed token, INT64 ``[batch, length, 2]``. A position that is not kept gets the last kept token before it. A text's
    first position is always kept, so that token belongs to the same text: nothing the masks fail to hide comes from
    another text, and no batch is without tokens.
    """
    constants = {
        "one": [1], "two": [2], "end": [1 << 62], "all": [-1], "axis": 0, "axes": [0],
        "front": [0, 1, 0, 0], "before": [0, 0, 1, 0, 0, 0], "yes": 1, "no": 0,
    }  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], [_local(name)], value=numpy_helper.from_array(np.array(value, np.int64)))
        for name, value in constants.items()
    ]

    def step(kind: str, given: str, result: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, [_local(name) for name in given.split()], [_local(result)], **attributes))

    step("Cast", _MASK, "bits", to=onnx.TensorProto.BOOL)
    step("Cast", "bits", "mask", to=onnx.TensorProto.INT64)
    step("Shape", "mask", "size")
    step("Slice", "mask one end one", "others")
    step("Pad", "others front yes", "kept")
    step("NonZero", "kept", "found")
    step("Transpose", "found", "pairs", perm=[1, 0])
    step("Unsqueeze", "pairs axes", "places")
    step("Reshape", "kept all", "row")
    step("CumSum", "row axis", "count")
    step("Sub", "count one", "rank")
    step("Reshape", "rank size", "table")
    step("Unsqueeze", "table two", "second")
    step("Pad", "second before no", "ranks")
    return nodes


def _local(name: str) -> str:
    return name if name == _MASK else f"{_PREFIX}/{name}"


def _of_mask(graph: onnx.GraphProto) -> set[str]:
    """The tensors whose values depend on the attention mask and on no other input."""
    of_mask = {_MASK}
    of_others = {each.name for each in graph.input} - of_mask
    for node in graph.node:
        given = () if node.op_type in ("Shape", "Size") else node.input
        if of_others.intersection(given):
            of_others.update(node.output)
        elif of_mask.intersection(given):
            of_mask.update(node.output)
    return of_mask


def _shapes(model: onnx.ModelProto, tokens: Arrays, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor for a batch of ``shape`` without padding."""
    told = onnx.ModelProto()
    told.CopyFrom(model)
    known = {each.name for each in told.graph.output}
    names = [name for node in told.graph.node for name in node.output if name and name not in known]
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    given = {each.name: np.resize(tokens[each.name], shape) for each in told.graph.input}
    given[_MASK] = np.ones(shape, np.int64)
    # Run the graph as written: a tensor that the optimiser fuses away has no shape.
    session = _session(told, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    return dict(
        zip((each.name for each in session.get_outputs()), map(np.shape, session.run(None, given)), strict=True)
    )


def _agree(before: onnx.ModelProto, after: onnx.ModelProto, tokens: Arrays) -> bool:
    """Whether both give the same features for a padded batch, for its texts in reverse, and for each text alone."""
    texts = range(len(tokens[_MASK]))
    sessions = [_session(model, ort.GraphOptimizationLevel.ORT_ENABLE_ALL) for model in (before, after)]
    names = [each.name for each in before.graph.input]
    for rows in ([*texts], [*reversed(texts)], *([row] for row in texts)):
        old, new = (each.run(None, {name: tokens[name][rows] for name in names})[0] for each in sessions)
        if not np.allclose(old, new, rtol=_TOLERANCE, atol=_TOLERANCE):
            return False
    return True


def _session(model: onnx.ModelProto, level: ort.GraphOptimizationLevel) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _has_subgraph(node: onnx.NodeProto) -> bool:
    return any(each.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for each in node.attribute)
