"""The unpadded graph gives the same answers, and a graph that reads padding is left unchanged."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import checkpoints

from export.unpadding import without_padding
from tests.benchmarks import unpadding as benchmark

VOCABULARY, WIDTH = 50, 8
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
WEIGHT = RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32)
BIAS = RNG.normal(size=WIDTH).astype(np.float32)

HEADER = """
<ir_version: 8, opset_import: ["" : 17]>
g (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask) => (float[batch, 8] features) {
  axis = Constant<value: tensor = int64[1] {1}>()
  last = Constant<value: tensor = int64[1] {2}>()
  zero = Constant<value: tensor = int64[1] {0}>()
  end = Constant<value: tensor = int64[1] {1000}>()
  mask = Cast<to = 1>(attention_mask)
  weights = Unsqueeze(mask, last)
  embedded = Gather(table, input_ids)
"""
FOOTER = """
  counted = Mul(state, weights)
  total = ReduceSum<keepdims = 0>(counted, axis)
  tokens = ReduceSum<keepdims = 1>(mask, axis)
  one = Constant<value: tensor = float[1] {1.0}>()
  divisor = Max(tokens, one)
  features = Div(total, divisor)
}
"""
TOKENWISE = """
  product = MatMul(embedded, weight)
  shifted = Add(product, bias)
  squashed = Tanh(shifted)
  mean = ReduceMean<axes = [-1]>(squashed)
  state = Sub(squashed, mean)
"""
ATTENTION = """
  query = MatMul(embedded, weight)
  key = Transpose<perm = [0, 2, 1]>(embedded)
  scores = MatMul(query, key)
  bits = Cast<to = 9>(attention_mask)
  seen = Unsqueeze(bits, axis)
  least = Constant<value: tensor = float[1] {-1e30}>()
  masked = Where(seen, scores, least)
  shares = Softmax<axis = -1>(masked)
  context = MatMul(shares, embedded)
  shape = Shape(query)
  same = Reshape(context, shape)
  sum = Add(same, query)
  state = MatMul(sum, weight)
"""
NEIGHBOURS = """
  product = MatMul(embedded, weight)
  first = Slice(product, zero, axis, axis)
  rest = Slice(product, axis, end, axis)
  next = Concat<axis = 1>(rest, first)
  state = Add(product, next)
"""


def graph(body: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEADER + body + FOOTER)
    for name, value in (("table", TABLE), ("weight", WEIGHT), ("bias", BIAS)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.checker.check_model(model)
    return model


def batch(lengths, *, left: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    longest = max(1, *lengths)
    place, size = np.arange(longest)[None, :], np.array(lengths)[:, None]
    mask = (place >= longest - size if left else place < size).astype(np.int64)
    return {
        "input_ids": np.random.default_rng(seed).integers(0, VOCABULARY, mask.shape),
        "attention_mask": mask,
    }


def session(model, *extra):
    told = onnx.ModelProto()
    told.CopyFrom(model)
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    return ort.InferenceSession(told.SerializeToString(), providers=["CPUExecutionProvider"])


TRACED = batch((11, 7, 4))


@pytest.mark.parametrize("body, products", [(TOKENWISE, ["product"]), (ATTENTION, ["query", "state"])])
@pytest.mark.parametrize("left", [False, True])
def test_products_with_weights_see_tokens_alone_and_answers_stay(body, products, left):
    model = graph(body)
    light = without_padding(model, TRACED)
    assert light is not None
    assert [each.name for each in light.graph.input] == ["input_ids", "attention_mask"]
    tokens = batch((5, 20, 1, 9), left=left)
    found, *seen = session(light, *(f"{name}/packed" for name in products)).run(None, tokens)
    np.testing.assert_allclose(found, session(model).run(None, tokens)[0], atol=1e-5)
    # With left padding, a text's first position is kept even if it is padding, so that no batch is without tokens.
    assert {each.shape for each in seen} == {(1, 35 + (3 if left else 0), WIDTH)}


@pytest.fixture(scope="module")
def pairs():
    plain = [graph(body) for body in (TOKENWISE, ATTENTION)]
    return [(session(each), session(without_padding(each, TRACED))) for each in plain]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6), left=st.booleans(), seed=st.integers(0, 99))
def test_any_batch_gets_the_same_features_texts_without_a_token_too(pairs, lengths, left, seed):
    tokens = batch(lengths, left=left, seed=seed)
    for plain, light in pairs:
        np.testing.assert_allclose(light.run(None, tokens)[0], plain.run(None, tokens)[0], atol=1e-5)


def test_whatever_is_not_zero_in_a_mask_keeps_a_token():
    light = session(without_padding(graph(TOKENWISE), TRACED), "/padding/kept")
    tokens = batch((3, 5))
    tripled = {**tokens, "attention_mask": 3 * tokens["attention_mask"]}
    np.testing.assert_array_equal(light.run(None, tripled)[1], tokens["attention_mask"])


def test_the_benchmark_compares_the_same_answers(tmp_path):
    checkpoint = checkpoints.save_checkpoint(tmp_path / "checkpoint")
    graphs = benchmark.exported(checkpoint, tmp_path)
    assert [graph.power for graph in graphs.values()] == [1, 1, 2, 2]
    assert benchmark.difference(graphs, checkpoints.SENTENCES) < 1e-5
    rows = benchmark.measure(graphs, checkpoints.SENTENCES, rounds=1)
    assert len(rows) == 2 * (len(benchmark.WAITING) + 1)
    assert all(row["low"] <= row["ratio"] <= row["high"] and row["batches"][1] <= row["batches"][0] for row in rows)
    assert benchmark.table(rows).count("\n") == len(rows) + 1


def test_a_graph_that_reads_the_padding_beside_a_token_is_left_alone():
    assert without_padding(graph(NEIGHBOURS), TRACED) is None


def test_a_graph_without_weights_by_token_is_left_alone():
    assert without_padding(graph(" state = Tanh(embedded)\n"), TRACED) is None


def test_a_graph_without_a_mask_or_with_a_subgraph_is_left_alone():
    without = graph(TOKENWISE)
    without.graph.input[1].name = "other"
    assert without_padding(without, TRACED) is None
    branch = onnx.helper.make_graph([], "branch", [], [])
    chosen = graph(TOKENWISE)
    chosen.graph.node.append(onnx.helper.make_node("If", ["one"], [], then_branch=branch, else_branch=branch))
    assert without_padding(chosen, TRACED) is None
