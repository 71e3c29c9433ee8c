"""The memory: what it counts, that labels can be added and removed, and that damaged bytes are refused."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from patcher.cli import main
from patcher.doctor import diagnose
from patcher.errors import InputError, LabelError, RepositoryError
from patcher.examples import Examples
from patcher.features import extract_features
from patcher.memory import Memory
from patcher.memory_file import read_memory, write_memory
from patcher.remembering import remember

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
    grown = memory.add(["dial"], np.ones((3, 6)), [0, 0, 0])
    assert grown.sample.shape == grown.clusters.means.shape == (0, 6)


def test_labels_without_a_sentence_stay_out() -> None:
    features, ids = some_features()
    assert Memory.build(features, ids, (*LABELS, "never"), split=4).labels == LABELS


@settings(max_examples=30)
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


def two_ways(n: int = 30) -> np.ndarray:
    sides = np.array([[8.0] * 6, [-8.0] * 6])
    return (np.repeat(sides, n, axis=0) + np.random.default_rng(1).normal(size=(2 * n, 6))).astype(np.float32)


def test_clusters_are_the_ways_in_which_a_label_is_worded() -> None:
    memory = some_memory().add(["dial"], two_ways(), np.zeros(60, int))
    mine = memory.clusters.labels == 3
    means, counts = memory.clusters.means[mine].astype(float), memory.clusters.counts[mine]
    assert 2 <= len(means) <= 10 and counts.sum() == 60
    sides = np.sign(means)
    assert (sides == sides[:, :1]).all() and counts[sides[:, 0] > 0].sum() == 30  # no cluster spans both sides
    assert np.allclose(counts @ means, two_ways().sum(axis=0), atol=1.0)
    assert np.bincount(memory.clusters.labels, memory.clusters.counts).tolist() == memory.counts.tolist()


@pytest.mark.parametrize("constant", [0.0, 10.0])
def test_a_feature_that_never_varies_hides_no_cluster(constant: float) -> None:
    rows = np.column_stack([two_ways(), np.full(60, constant)]).astype(np.float32)
    memory = Memory.build(rows, np.zeros(60, int), ["dial"], split=4)
    more = memory.add(["dial"], rows + np.array([1, 1, 1, 1, 1, 1, 0]), np.zeros(60, int))
    for found in (memory, more):
        sides = np.sign(found.clusters.means[:, :6].astype(float))
        assert len(sides) >= 2 and (sides == sides[:, :1]).all()


def test_of_few_sentences_each_is_a_cluster() -> None:
    memory = some_memory().add(["dial"], two_ways(2), np.zeros(4, int))
    assert memory.clusters.counts[memory.clusters.labels == 3].tolist() == [1, 1, 1, 1]


def test_clusters_follow_the_labels_life() -> None:
    memory = some_memory().add(["dial"], two_ways(), np.zeros(60, int))
    more = memory.add(["dial"], two_ways() + 20, np.zeros(60, int))
    assert more.clusters.counts[more.clusters.labels == 3].sum() == 120
    assert np.array_equal(
        more.clusters.means[more.clusters.labels < 3], memory.clusters.means[memory.clusters.labels < 3]
    )
    merged = memory.merge(["ask", "dial"], "talk")
    assert merged.clusters.counts[merged.clusters.labels == 0].sum() == 80
    left = memory.remove("ask")
    assert np.array_equal(np.bincount(left.clusters.labels, left.clusters.counts), left.counts)
    assert memory.rename("dial", "ring").clusters is memory.clusters


def test_a_memory_of_format_1_has_each_label_as_one_cluster() -> None:
    memory = some_memory()
    again = read_memory(as_format_1(memory))
    assert again.clusters.labels.tolist() == [0, 1, 2] and again.clusters.counts.tolist() == [20, 20, 20]
    assert np.allclose(again.clusters.means.astype(float), memory.means(), atol=2e-3)
    assert np.array_equal(again.sample, memory.sample)
    assert not len(read_memory(as_format_1(some_memory(per_label=0))).clusters.means)


def test_means_that_no_file_can_hold_are_damage() -> None:
    memory = dataclasses.replace(some_memory(), sums=some_memory().sums * 1e9)
    with pytest.raises(RepositoryError, match="damaged"):
        read_memory(as_format_1(memory))


def as_format_1(memory: Memory) -> bytes:
    """The bytes that version 0.6 wrote."""
    tensors = load(write_memory(memory))
    kept = {name: array for name, array in tensors.items() if not name.startswith("cluster_")}
    about = {"format": 1, "labels": memory.labels, "split": memory.split, "per_label": memory.per_label, "seed": 0}
    return save(kept, metadata={"patcher": json.dumps(about)})


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


def test_a_merged_labels_sample_has_of_each_part_its_share() -> None:
    rng = np.random.default_rng(0)
    ids = np.repeat([0, 1, 2], [400, 10, 20])
    rare = 0
    for seed in range(60):
        memory = Memory.build(rng.normal(size=(430, 2)) + 100 * ids[:, None], ids, LABELS, 2, seed=seed)
        merged = memory.merge(["ask", "buy"], "talk")
        sample = merged.features_of("talk")
        assert len(sample) == 20 and len(merged.features_of("call")) == 20
        rare += int((sample[:, 0] > 50).sum())
    assert 10 <= rare <= 55  # 10 of 410 texts: expect 29 in 60 samples of 20; unweighted, it would be 400


def test_features_that_fp16_cannot_hold_are_refused_and_not_cut_off() -> None:
    rows = np.full((4, 3), 7e4, np.float32)
    with pytest.raises(InputError, match=r"7e\+04.*65,504"):
        Memory.build(rows, np.zeros(4, int), ["a"], 2)
    assert Memory.build(rows, np.zeros(4, int), ["a"], 2, per_label=0).means().max() == 7e4
    assert Memory.build(rows * 0.93, np.zeros(4, int), ["a"], 2).features_of("a").max() == pytest.approx(65100, abs=32)


def test_features_of_a_label_are_those_that_are_kept() -> None:
    memory = some_memory()
    assert np.array_equal(memory.features_of("buy"), memory.sample[memory.sample_labels == 1].astype(np.float32))
    assert memory.features_of("never").shape == (0, 6)


def test_wrong_names_are_refused() -> None:
    memory = some_memory()
    with pytest.raises(LabelError, match="no label 'sell'"):
        memory.remove("sell")
    with pytest.raises(InputError, match="got 5 features, but this memory holds 6"):
        memory.remove("buy", np.zeros((3, 5), np.float32))
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
    data = write_memory(memory)
    again = read_memory(data)
    assert write_memory(again) == data
    assert again.labels == memory.labels and again.per_label == 5 and again.split == 4
    assert np.array_equal(again.second_moment, memory.second_moment)
    assert memory.size < len(data) < memory.size + 2000


def test_damaged_bytes_are_refused() -> None:
    data = write_memory(some_memory())
    for broken in (b"", b"nonsense", data[:100], data[:-8], b"\xff" * 64):
        with pytest.raises(RepositoryError, match="not a memory of patcher"):
            read_memory(broken)


def test_sums_need_no_second_copy_of_the_features_and_stay_the_same_to_the_bit() -> None:
    features, ids = some_features(n=40_000, width=128)
    tracemalloc.start()
    memory = Memory.build(features, ids, LABELS, split=4, per_label=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < features.nbytes
    sums = np.zeros((len(LABELS), 128))
    np.add.at(sums, ids, features.astype(np.float64))
    assert memory.sums.tobytes() == sums.tobytes()


def test_a_newer_format_says_so() -> None:
    tensors = {**load(write_memory(some_memory())), "of_tomorrow": np.zeros(3)}
    with pytest.raises(RepositoryError, match=r"format 3.*update patcher"):
        read_memory(save(tensors, metadata={"patcher": json.dumps({"format": 3})}))


def test_values_that_are_not_finite_are_refused() -> None:
    data = bytearray(write_memory(some_memory()))
    memory = some_memory()
    at = bytes(data).index(memory.sums.tobytes())
    data[at : at + 8] = np.float64(np.nan).tobytes()
    with pytest.raises(RepositoryError, match="damaged"):
        read_memory(bytes(data))


def test_texts_that_come_again_are_remembered_once(classifier, capsys, tmp_path) -> None:
    texts = {label: tiny.sentences(label, 5, seed=5) for label in tiny.OLD}
    once = remember(classifier, flat(texts))
    memory = classifier.files(once.version)["memory.safetensors"]
    often = remember(classifier, flat({label: [*group, *map(str.upper, group)] for label, group in texts.items()}))
    assert classifier.files(often.version)["memory.safetensors"] == memory
    count = 5 * len(tiny.OLD)
    assert (once.texts, once.repeated) == (count, 0)
    assert (often.texts, often.repeated) == (count, count)
    lines = {label: [*group, group[0]] for label, group in texts.items()}
    path = tiny.write_csv(tmp_path / "again.csv", lines)
    assert main(["remember", "--repo", str(classifier.root), "--data", str(path), "--no-load"]) == 0
    out = capsys.readouterr().out
    assert f"{count} texts remembered" in out
    assert f"{len(tiny.OLD)} texts left out as duplicates" in out


def flat(texts) -> Examples:
    pairs = [(text, label) for label, group in texts.items() for text in group]
    return Examples(tuple(text for text, _ in pairs), tuple(label for _, label in pairs), "some.csv")


def renewed(classifier, label, per_label=20) -> Memory:
    """The memory after a ``remember`` with thirty texts of one label."""
    remember(classifier, flat({label: tiny.sentences(label, 30, seed=5)}), per_label=per_label)
    return classifier.memory()


def of(memory: Memory, label: str) -> tuple[np.ndarray, ...]:
    """Everything that a memory keeps of one label."""
    place = memory.labels.index(label)
    mine = memory.clusters.labels == place
    clusters = memory.clusters.means[mine], memory.clusters.counts[mine]
    return memory.counts[place], memory.sums[place], memory.features_of(label), *clusters


def test_labels_that_are_not_renewed_stay_remembered_to_the_bit(classifier, monkeypatch) -> None:
    before, calls, plain = classifier.memory(), [], Memory.add
    assert before.counts.max() > before.per_label  # labels have more texts than their sample
    monkeypatch.setattr(Memory, "add", lambda memory, *given: calls.append(given) or plain(memory, *given))
    after = renewed(classifier, "balance")
    assert len(calls) == 1
    assert set(after.labels) == set(before.labels)
    assert after.counts[after.labels.index("balance")] == 30
    for label in set(before.labels) - {"balance"}:
        assert all(np.array_equal(a, b) for a, b in zip(of(after, label), of(before, label), strict=True))
    rest, rows = before.without(["balance"]), extract_features(classifier, tiny.sentences("balance", 30, seed=5))
    rows = rows.astype(np.float64)
    assert np.allclose(rest.within(), before.within(), rtol=1e-10, atol=1e-12)
    assert np.allclose(after.second_moment, rest.second_moment + rows.T @ rows, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("per_label, sample", [(0, 0), (5, 5), (50, 20)])
def test_a_memory_is_renewed_in_part_with_another_size(classifier, per_label: int, sample: int) -> None:
    before = classifier.memory()
    after = renewed(classifier, "balance", per_label)
    assert (len(after.features_of("music")), len(after.features_of("balance"))) == (sample, min(per_label, 30))
    kept, new = of(before, "music"), of(after, "music")
    assert kept[0] == new[0] and np.array_equal(kept[1], new[1])
    assert (len(after.clusters.means) > 0) == (per_label > 0)
    again = renewed(classifier, "balance")
    assert set(again.clusters.labels.tolist()) == set(range(len(again.labels)))
    assert again.counts.sum() == before.counts.sum() - 40 + 30


def test_labels_of_which_there_are_only_statistics_are_told(classifier, capsys, tmp_path) -> None:
    remember(classifier, flat(tiny.train_set()), per_label=0)
    path = tiny.write_csv(tmp_path / "part.csv", {"balance": tiny.sentences("balance", 30)})
    assert main(["remember", "--repo", str(classifier.root), "--data", str(path), "--no-load"]) == 0
    assert "has no texts' features of 5 of 6 labels" in capsys.readouterr().err


def test_doctor_tells_of_labels_that_the_memory_lacks_until_there_are_texts_of_them(classifier) -> None:
    """Happens if a patcher that cannot read the memory builds a new one from the texts that it is given."""
    (classifier.version_path(1) / "memory.safetensors").unlink()
    texts = tiny.train_set()
    remember(classifier, flat({label: texts[label] for label in tiny.OLD[1:]}))

    def said() -> list[tuple[str, str]]:
        found = [each for each in diagnose(classifier.root, None, "nobody") if each.state == "note"]
        return [(each.what, each.finding) for each in found if each.what.startswith("intent")]

    ((what, finding),) = said()
    assert what == "intent, version 2"
    assert f"the memory has no texts' features of 1 of 6 labels ({tiny.OLD[0]})" in finding
    assert "run `patcher remember --data FILE` with texts of these labels" in finding
    remember(classifier, flat({tiny.OLD[0]: texts[tiny.OLD[0]]}))
    assert said() == []


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 30]), st.sampled_from([1, 4, 30]))
def test_several_labels_leave_as_one_after_the_other_does(seed: int, first: int, second: int) -> None:
    features, ids = some_features(seed=seed)
    rng = np.random.default_rng(seed)
    memory = Memory.build(features, ids, LABELS, split=4, per_label=5)
    both = memory.add(["new"], rng.normal(size=(first, 6)), np.zeros(first, int))
    both = both.add(["newer"], 1 + rng.normal(size=(second, 6)), np.zeros(second, int))
    names = sorted(
        ["new", "newer"], key=lambda name: both.counts[both.labels.index(name)]
    )  # first remove the label that is known exactly
    one, at_once = both.remove(names[0]).remove(names[1]), both.without(["newer", "new"])
    assert at_once.labels == LABELS
    for name, array in one.arrays().items():
        assert np.allclose(array, at_once.arrays()[name], rtol=1e-10, atol=1e-9)
    if max(first, second) <= 5:  # all removed texts were in the sample
        assert np.allclose(at_once.within(), memory.within(), atol=2e-2)
    assert both.without(both.labels).labels == ()
