from __future__ import annotations

import dataclasses
import shlex

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.errors import LabelError, PatcherError, RepositoryError
from patcher.head import MULTI_LABEL, SINGLE_LABEL, Head
from patcher.head_file import read_head, write_head
from patcher.runtime import check_head_file, open_session, run_head


def make_head(labels=3, split=4, width=6, seed=0, problem=SINGLE_LABEL):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((labels, split)).astype(np.float32)
    bias = rng.standard_normal(labels).astype(np.float32)
    return Head.from_linear([f"l{i}" for i in range(labels)], weight, bias, width, "f" * 64, problem=problem)


def patched(head, count, seed=1):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, head.width)).astype(np.float32)
    first = len(head.base_weight) + len(head.patch_weight)
    return head.with_rows([f"n{first + i}" for i in range(count)], rows, rng.standard_normal(count).astype(np.float32))


def features(head, count=5, seed=2):
    return np.random.default_rng(seed).standard_normal((count, head.width)).astype(np.float32)


def answer(head, inputs):
    return run_head(open_session(write_head(head), threads=1), inputs)


@pytest.mark.parametrize("labels", [2, 4, 5, 6, 40])
@pytest.mark.parametrize("new", [0, 1, 3])
def test_the_file_answers_as_the_numbers_say(labels, new):
    head = patched(make_head(labels), new)
    inputs = features(head)
    served = answer(head, inputs)
    expected = head.logits(inputs)
    np.testing.assert_allclose(served.logits, expected, atol=1e-5)
    best = np.argsort(-expected, axis=1)[:, : min(5, labels + new)]
    assert served.labels.tolist() == [[head.labels[i] for i in row] for row in best]
    softmax = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(served.scores, np.take_along_axis(softmax, best, axis=1), atol=1e-5)
    assert served.version == 1


def test_rounding_tells_what_single_precision_may_do_far_from_zero():
    head = make_head()
    rows = features(head, 200)
    near, far = head.rounding(rows), head.rounding(rows + np.float32(3000.0))
    assert near.shape == far.shape == (200, len(head.labels))
    assert near.max() < 1e-4
    assert far.max() > 1e-3
    exact = (rows + np.float32(3000.0)).astype(np.float64)[:, : head.split] @ head.base_weight.T.astype(np.float64)
    off = np.abs(head.logits(rows + np.float32(3000.0)) - (exact + head.base_bias))
    assert (off <= far).all()


def test_a_file_with_another_number_is_refused_even_far_from_zero():
    head = patched(make_head(), 1)
    rows = features(head) + np.float32(3000.0)
    check_head_file(write_head(head), head, rows)
    other = dataclasses.replace(head, patch_weight=head.patch_weight * np.float32(1.001))
    with pytest.raises(RepositoryError, match="logits differ from its rows"):
        check_head_file(write_head(other), head, rows)


def test_multi_label_scores_are_sigmoids():
    head = make_head(problem=MULTI_LABEL)
    inputs = features(head)
    served = answer(head, inputs)
    np.testing.assert_allclose(served.scores[:, 0], 1 / (1 + np.exp(-head.logits(inputs).max(axis=1))), atol=1e-5)


def test_fine_tuned_logits_stay_the_same_bits_through_patches_and_removals():
    head = make_head(40, split=32, width=64)
    inputs = features(head, 7)
    before = answer(head, inputs).logits
    for change in (patched(head, 1), patched(patched(head, 2), 3), patched(head, 2).without("n40")):
        after = answer(change, inputs).logits
        assert after[:, :40].tobytes() == before.tobytes()
        assert change.base_hash() == head.base_hash()
    without = answer(patched(head, 1).without("l7"), inputs).logits
    assert np.delete(before, 7, axis=1).tobytes() == without[:, :39].tobytes()


@given(
    labels=st.integers(2, 9),
    new=st.integers(0, 4),
    split=st.integers(1, 5),
    more=st.integers(0, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_a_head_comes_back_from_its_file_as_it_was(labels, new, split, more, seed):
    head = patched(make_head(labels, split, split + more, seed), new, seed)
    again = read_head(write_head(head))
    assert write_head(again) == write_head(head)
    assert (again.labels, again.lineage, again.rows_hash()) == (head.labels, head.lineage, head.rows_hash())


def test_the_label_axis_is_dynamic_for_onnx_runtime_too():
    for head in (make_head(3), make_head(40), patched(make_head(40), 1)):
        outputs = {o.name: o.shape for o in open_session(write_head(head)).get_outputs()}
        assert not isinstance(outputs["logits"][1], int)
        assert not isinstance(outputs["label"][1], int)


def test_removing_and_renaming():
    head = patched(patched(make_head(), 2), 1)
    inputs = features(head)
    columns = dict(zip(head.labels, head.logits(inputs).T, strict=True))
    for gone in head.labels:
        smaller = head.without(gone)
        assert smaller.labels == tuple(label for label in head.labels if label != gone)
        for label, column in zip(smaller.labels, smaller.logits(inputs).T, strict=True):
            np.testing.assert_array_equal(column, columns[label])
    assert head.renamed("l1", "other").labels == ("l0", "other", "l2", "n3", "n4", "n5")
    with pytest.raises(LabelError, match="merge-labels"):
        head.renamed("l1", "l2")
    spaced = dataclasses.replace(head, labels=("it's l0", "l 1", *head.labels[2:]))
    with pytest.raises(LabelError) as refused:
        spaced.renamed("it's l0", "l 1")
    command = str(refused.value).split("`")[1]
    assert shlex.split(command) == ["patcher", "merge-labels", "it's l0", "l 1", "--into", "l 1"]
    with pytest.raises(LabelError, match="did you mean l1"):
        make_head().without("l11")


def test_unicode_labels_survive():
    head = dataclasses.replace(make_head(), labels=("größe", "支払い", "🙂"))
    assert read_head(write_head(head)).labels == head.labels
    assert set(answer(head, features(head)).labels[0]) == set(head.labels)


@pytest.mark.parametrize(
    "change, what",
    [
        ({"labels": ("a", "a", "b")}, "labels repeat"),
        ({"labels": ("a", "", "b")}, "a label is empty"),
        ({"labels": ("a", "b")}, "2 labels"),
        ({"order": np.array([0, 1, 9])}, "outside"),
        ({"order": np.array([0, 1, 1])}, "share one row"),
        ({"split": 3}, "split 3"),
        ({"problem": "regression"}, "regression"),
    ],
)
def test_an_inconsistent_head_is_refused(change, what):
    with pytest.raises(RepositoryError, match=what):
        dataclasses.replace(make_head(), **change)


def test_foreign_files_are_refused_in_words():
    model = onnx.load_from_string(write_head(make_head()))
    external = onnx.ModelProto()
    external.CopyFrom(model)
    external.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    custom = onnx.ModelProto()
    custom.CopyFrom(model)
    custom.graph.node[0].domain = "com.example"
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    for foreign, what in ((external, "outside of itself"), (custom, "com.example"), (bare, "metadata")):
        with pytest.raises(RepositoryError, match=what):
            read_head(foreign.SerializeToString())
    with pytest.raises(RepositoryError, match="do not parse"):
        read_head(b"not a protobuf")


@given(data=st.data())
@settings(max_examples=200)
def test_a_damaged_file_is_refused_in_words(data):
    raw = bytearray(write_head(make_head()))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for damaged in (bytes(raw), bytes(raw[:cut])):
        try:
            assert read_head(damaged).labels
        except PatcherError as error:
            assert str(error)


def test_the_file_is_small_and_plain():
    head = make_head(135, 384, 768)
    model = onnx.load_from_string(write_head(head))
    assert len(write_head(head)) < 250_000
    assert {node.domain for node in model.graph.node} == {""}
    assert (model.ir_version, model.opset_import[0].version) == (8, 17)
    assert ort.InferenceSession(write_head(head), providers=["CPUExecutionProvider"])


def test_a_label_that_is_no_text_is_not_there(classifier):
    with pytest.raises(LabelError, match="no label 3 among the 6"):
        classifier.head().index(3)
