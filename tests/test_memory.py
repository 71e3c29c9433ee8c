"""The memory: what it counts, that it adds and subtracts, and that damaged bytes are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.errors import InputError, LabelError, RepositoryError
from patcher.memory import Memory

LABELS = ("ask", "buy", "call")


def some_features(n: int = 60, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.arange(n) % len(LABELS)
    return (rng.normal(size=(n, width)) + ids[:, None]).astype(np.float32), ids


def some_memory(per_label: int = 5) -> Memory:
    features, ids = some_features()
    return Memory.build(features, ids, LABELS, split=4, per_label=per_label)


def test_statistics_are_those_of_the_features() -> None:
    features, ids = some_features()
    memory = Memory.build(features, ids, LABELS, split=4, per_label=5)
    assert memory.counts.tolist() == [20, 20, 20]
    assert np.allclose(memory.means(), [features[ids == i].mean(0, dtype=np.float64) for i in range(3)])
    centred = features - memory.means()[ids]
    assert np.allclose(memory.within(), centred.T @ centred / (60 - 3))
    assert np.bincount(memory.sample_labels).tolist() == [5, 5, 5]
    for row, label in zip(memory.sample, memory.sample_labels, strict=True):
        assert (features[ids == label].astype(np.float16) == row).all(axis=1).any()


def test_statistics_only_keeps_no_single_sentence() -> None:
    memory = some_memory(per_label=0)
    assert memory.sample.shape == (0, 6)
    assert memory.add(["dial"], np.ones((3, 6)), [0, 0, 0]).sample.shape == (0, 6)


def test_labels_without_a_sentence_stay_out() -> None:
    features, ids = some_features()
    assert Memory.build(features, ids, (*LABELS, "never"), split=4).labels == LABELS


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(0, 8))
def test_add_then_remove_is_as_before(seed: int, arrived: int, per_label: int) -> None:
    features, ids = some_features(seed=seed)
    memory = Memory.build(features, ids, LABELS, split=4, per_label=per_label)
    extra = np.random.default_rng(seed + 1).normal(size=(arrived, 6)).astype(np.float32)
    both = memory.add(["new"], extra, np.zeros(arrived, np.int64))
    assert both.labels == (*LABELS, "new") and both.counts[-1] == arrived
    back = both.remove("new", extra)
    assert back.labels == memory.labels
    assert np.array_equal(back.counts, memory.counts) and np.array_equal(back.sums, memory.sums)
    assert np.allclose(back.second_moment, memory.second_moment, rtol=1e-12, atol=1e-9)
    assert np.array_equal(back.sample, memory.sample) and np.array_equal(back.sample_labels, memory.sample_labels)


def test_adding_in_parts_is_adding_at_once() -> None:
    features, ids = some_features()
    parts = Memory.build(features[:25], ids[:25], LABELS, split=4).add(LABELS, features[25:], ids[25:])
    whole = Memory.build(features, ids, LABELS, split=4)
    assert np.allclose(parts.sums, whole.sums, rtol=1e-12) and np.array_equal(parts.counts, whole.counts)
    assert np.allclose(parts.second_moment, whole.second_moment, rtol=1e-12)


def test_the_sample_is_fair_however_the_sentences_came() -> None:
    kept = np.zeros(40)
    features = np.arange(40, dtype=np.float32)[:, None].repeat(2, axis=1)
    for seed in range(400):
        memory = Memory.build(features[:25], np.zeros(25, int), ["a"], split=1, per_label=8, seed=seed)
        memory = memory.add(["a"], features[25:], np.zeros(15, int))
        kept[memory.sample[:, 0].astype(int)] += 1
    assert len(memory.sample) == 8
    assert abs(kept[:25].mean() - 80) < 8 and abs(kept[25:].mean() - 80) < 8


def test_removing_without_features_keeps_the_spread() -> None:
    memory = some_memory(per_label=2)
    assert np.allclose(memory.remove("buy").within(), memory.within())


def test_rename_and_merge() -> None:
    memory = some_memory()
    assert memory.rename("buy", "purchase").labels == ("ask", "purchase", "call")
    merged = memory.merge(["buy", "call"], "trade")
    assert merged.labels == ("ask", "trade") and merged.counts.tolist() == [20, 40]
    assert np.allclose(merged.sums.sum(0), memory.sums.sum(0))
    assert np.bincount(merged.sample_labels).tolist() == [5, 5]
    assert merged.merge(["ask", "trade"], "ask").labels == ("ask",)


def test_wrong_names_are_refused() -> None:
    memory = some_memory()
    with pytest.raises(LabelError, match="no label 'sell'"):
        memory.remove("sell")
    with pytest.raises(LabelError, match="'call' already"):
        memory.rename("buy", "call")
    with pytest.raises(LabelError, match="'call' already"):
        memory.merge(["ask", "buy"], "call")


@pytest.mark.parametrize(
    "features, ids, message",
    [
        (np.ones((2, 5)), [0, 0], "5 features"),
        (np.ones(6), [0], "n, width"),
        (np.full((1, 6), np.nan), [0], "not finite"),
        (np.ones((2, 6)), [0], "label ids"),
        (np.ones((1, 6)), [3], "outside"),
    ],
)
def test_wrong_features_are_refused(features: np.ndarray, ids: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        some_memory().add(LABELS, features, ids)


def test_bytes_round_trip() -> None:
    memory = some_memory()
    data = memory.to_bytes()
    again = Memory.from_bytes(data)
    assert again.to_bytes() == data
    assert again.labels == memory.labels and again.per_label == 5 and again.split == 4
    assert np.array_equal(again.second_moment, memory.second_moment)
    assert memory.size < len(data) < memory.size + 2000


def test_damaged_bytes_are_refused() -> None:
    data = some_memory().to_bytes()
    for broken in (b"", b"nonsense", data[:100], data[:-8], b"\xff" * 64):
        with pytest.raises(RepositoryError, match="no memory of ours"):
            Memory.from_bytes(broken)


def test_a_newer_format_says_so() -> None:
    data = some_memory().to_bytes().replace(b'\\"format\\": 1', b'\\"format\\": 2')
    with pytest.raises(RepositoryError, match=r"format 2.*update patcher"):
        Memory.from_bytes(data)


def test_values_that_are_not_finite_are_refused() -> None:
    data = bytearray(some_memory().to_bytes())
    memory = some_memory()
    at = bytes(data).index(memory.sums.tobytes())
    data[at : at + 8] = np.float64(np.nan).tobytes()
    with pytest.raises(RepositoryError, match="damaged"):
        Memory.from_bytes(bytes(data))
