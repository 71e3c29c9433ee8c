"""The out-of-scope scorer as part of a head's graph (``head_file``); ``scope`` computes the same in numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

    from patcher.scope import Scope

__all__ = ["scope_graph"]


def scope_graph(
    scope: Scope, features: str, logits: str, out: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and initializers (opset 17, names starting with ``scope_``) that compute ``out`` FP32 ``[batch, 1]``."""
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node
    if scope.distance is None:
        chances = node("Softmax", [logits], ["scope_chances"], axis=1) if scope.exclusive else None
        return [
            chances or node("Sigmoid", [logits], ["scope_chances"]),
            node("ReduceMax", ["scope_chances"], [out], axes=[1], keepdims=1),
        ], []
    means = scope.distance.means.astype(np.float32)
    arrays = {f"scope_{name}": value for name, value in vars(scope.distance).items()}
    arrays |= {
        "scope_lengths": (means * means).sum(axis=1),
        "scope_minus_two": np.array(-2.0, np.float32),
        "scope_axis": np.array([1], np.int64),
        "scope_one": np.array(1.0, np.float32),
    }
    nodes = [
        node("Cast", ["scope_projection"], ["scope_axes"], to=TensorProto.FLOAT),
        node("Cast", ["scope_means"], ["scope_places"], to=TensorProto.FLOAT),
        node("MatMul", [features, "scope_axes"], ["scope_raw"]),
        node("Sub", ["scope_raw", "scope_center"], ["scope_points"]),
        node("Transpose", ["scope_places"], ["scope_columns"], perm=[1, 0]),
        node("MatMul", ["scope_points", "scope_columns"], ["scope_dots"]),
        node("Mul", ["scope_dots", "scope_minus_two"], ["scope_cross"]),
        node("Add", ["scope_cross", "scope_lengths"], ["scope_partly"]),
        node("Mul", ["scope_points", "scope_points"], ["scope_squares"]),
        node("ReduceSum", ["scope_squares", "scope_axis"], ["scope_length"], keepdims=1),
        node("Add", ["scope_partly", "scope_length"], ["scope_gaps"]),
        node("Mul", ["scope_gaps", "scope_scale"], ["scope_scaled"]),
        node("ReduceMin", ["scope_scaled"], ["scope_distance"], axes=[1], keepdims=1),
        node("Div", ["scope_distance", "scope_limit"], ["scope_ratio"]),
        node("Mul", ["scope_ratio", "scope_ratio"], ["scope_ratios"]),
        node("Add", ["scope_ratios", "scope_one"], ["scope_sum"]),
        node("Reciprocal", ["scope_sum"], [out]),
    ]
    return nodes, [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()]
