"""What an untrusted ONNX file must not do: read other files, use non-standard operators, or be too large."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper

from patcher import onnx_file
from patcher.doctor import diagnose
from patcher.errors import ExamplesError, RepositoryError
from patcher.examples_file import read_examples
from patcher.features import extract_features
from patcher.head_file import read_head


def external(tensor, where="../../../../etc/passwd"):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", where


def constant(tensor, name="foreign"):
    return helper.make_node("Constant", [], [name], value=tensor)


def within_if(node):
    branch = helper.make_graph([node], "branch", [], [helper.make_tensor_value_info(node.output[0], 1, None)])
    return helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=branch)


def outside():
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), "weights")
    external(tensor)
    return tensor


FAULTS = {
    "outside weights": (lambda g: external(g.initializer[0]), "outside of itself, in '../../../../etc/passwd'"),
    "outside weights in a constant": (lambda g: g.node.append(constant(outside())), "outside of itself"),
    "outside weights in a branch": (lambda g: g.node.append(within_if(constant(outside()))), "outside of itself"),
    "outside weights, sparse": (
        lambda g: g.sparse_initializer.add().values.CopyFrom(outside()),
        "outside of itself",
    ),
    "a foreign operator": (
        lambda g: g.node.append(helper.make_node("Run", ["features"], ["x"], domain="evil.ops")),
        "uses the operator evil.ops:Run",
    ),
    "a foreign operator in a branch": (
        lambda g: g.node.append(within_if(helper.make_node("Run", [], ["x"], domain="evil.ops"))),
        "uses the operator evil.ops:Run",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_backbone_is_refused_before_it_is_loaded(classifier, fault, monkeypatch):
    spoil, said = FAULTS[fault]
    model = onnx.load(classifier.backbone_path)
    spoil(model.graph)
    classifier.backbone_path.write_bytes(model.SerializeToString())
    with monkeypatch.context() as patch:
        patch.setattr("patcher.runtime.open_session", lambda *_: pytest.fail("it was loaded"))
        with pytest.raises(RepositoryError, match="must not be loaded") as caught:
            extract_features(classifier, ["hello"])
    assert said in str(caught.value)
    assert any(said in check.finding for check in diagnose(classifier.root, None, "") if check.state == "fault")


@pytest.mark.parametrize("fault", FAULTS)
def test_so_is_a_head(classifier, fault):
    spoil, _ = FAULTS[fault]
    model = onnx.load_from_string(classifier.head_bytes(1))
    spoil(model.graph)
    with pytest.raises(RepositoryError):
        read_head(model.SerializeToString())


def test_functions(classifier):
    model = onnx.load_from_string(classifier.head_bytes(1))
    model.functions.append(helper.make_function("", "Add", ["a"], ["b"], [], []))
    with pytest.raises(RepositoryError, match="in the place of a built-in operator"):
        onnx_file.parse_model(model.SerializeToString())
    model.functions[0].domain = "local"
    with pytest.raises(RepositoryError, match="defines functions"):
        read_head(model.SerializeToString())
    model.graph.node.append(helper.make_node("Add", ["features"], ["x"], domain="local"))
    assert onnx_file.parse_model(model.SerializeToString()).functions


def test_what_a_function_takes_by_default_is_looked_at_too():
    weights = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value="/etc/passwd")
    function = helper.make_function("local", "F", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], [])
    function.attribute_proto.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(weights)
    graph = helper.make_graph([helper.make_node("F", ["x"], ["y"], domain="local")], "g", [], [])
    with pytest.raises(RepositoryError, match="outside of itself, in '/etc/passwd'"):
        onnx_file.parse_model(helper.make_model(graph, functions=[function]).SerializeToString())


def test_graphs_within_graphs_without_end():
    node = helper.make_node("Identity", ["x"], ["y"])
    for _ in range(20):
        node = helper.make_node("If", ["x"], ["y"], then_branch=helper.make_graph([node], "branch", [], []))
    graph = helper.make_graph([node], "deep", [], [])
    with pytest.raises(RepositoryError, match="deep"):
        onnx_file.parse_model(helper.make_model(graph).SerializeToString())


def test_sizes(classifier, monkeypatch):
    monkeypatch.setattr(onnx_file, "MAX_BACKBONE_BYTES", 1000)
    with pytest.raises(RepositoryError, match=r"expected at most 1,000"):
        onnx_file.check_backbone_file(classifier.backbone_path)
    with pytest.raises(RepositoryError, match="expected at most 10"):
        onnx_file.parse_model(classifier.head_bytes(1), 10)


def test_a_million_lines_and_one(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("a\n" * 1_000_001)
    with pytest.raises(ExamplesError, match=r"line 1000001: more than 1,000,000 examples"):
        read_examples(path)


def test_files_and_texts_that_are_too_large(tmp_path):
    path = tmp_path / "large.csv"
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)  # sparse
    with pytest.raises(ExamplesError, match=r"has 1,073,741,825 bytes; expected at most 1,073,741,824"):
        read_examples(path)
    path = tiny.write_csv(tmp_path / "long.csv", {"a": ["x" * 10_000_000]})
    with pytest.raises(ExamplesError, match=r"line 2: the text has 10,000,000 bytes; expected at most 1,048,576"):
        read_examples(path)
