from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_fit import world

from patcher.fit import fit
from patcher.fit.fitted import HeldOut
from patcher.fit.inputs import Labelled
from patcher.flips import Flips
from patcher.gate import judge
from patcher.gate_words import recall_words, sentence
from patcher.memory import Memory
from patcher.recall import Recall
from patcher.screening import _maybe_close, first_alike, same_to_model, unlike_any


def judged(examples, head, memory, **options):
    firsts = {label: first_alike((options.get("texts") or {}).get(label), rows) for label, rows in examples.items()}
    return judge(head, fit(examples, head, memory, firsts=firsts), examples, memory, firsts=firsts, **options)


@pytest.mark.parametrize(
    "texts, places, firsts",
    [
        (["lost it", "found it", "who cares"], [0, 1, 2], [0, 1, 2]),
        (["lost it", "found it", "who cares"], [0, 1, 0], [0, 1, 0]),
        (["I lost my card", "who cares", "I lost my card!", "i lost my card"], [0, 1, 2, 3], [0, 1, 0, 0]),
        (["I lost my card", "who cares", "I lost my card!", "it is late"], [0, 1, 2, 2], [0, 1, 0, 0]),
        (None, [0, 1, 1, 0], [0, 1, 1, 0]),
        # The last one joins what is apart without it.
        (["I lost my card", "who cares", "it is late", "who cares!"], [0, 1, 2, 0], [0, 0, 2, 0]),
        (["aaaaaaaaaaaaaaaaabbb", "aaaaaaaaaaaaaaaaaccc", "aaaaaaaaaaaaaaaaabbc", "b"], [0, 1, 2, 3], [0, 0, 0, 3]),
    ],
)
def test_what_repeats_another_in_words_or_to_the_model(texts, places, firsts):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4, 30)).astype(np.float32)[places]
    noisy = rows * (1.0 + 2.0**-11 * rng.uniform(-1, 1, rows.shape)).astype(np.float32)
    assert first_alike(texts, noisy).tolist() == firsts


def test_chains_of_close_features_are_one_group():
    row = np.random.default_rng(0).uniform(1, 2, 30)
    rows = np.array([row, 2.0 * row, 1.0024 * row, 1.0012 * row, 2.002 * row], np.float32)
    assert first_alike(None, rows).tolist() == [0, 1, 0, 0, 1]


def test_many_examples_take_no_time_that_grows_with_their_square():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3000, 64)).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)  # as after a layer norm
    compared = [len(places) for places in _maybe_close(rows)]
    assert sum(compared) < len(rows)
    same = np.flatnonzero(first_alike(None, np.concatenate([rows, rows[:5]])) != np.arange(3005))
    assert same.tolist() == [3000, 3001, 3002, 3003, 3004]


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_no_size_of_features_makes_different_ones_the_same(size):
    rows = (np.random.default_rng(0).standard_normal((4, 30)) * size).astype(np.float32)
    assert first_alike(None, rows).tolist() == [0, 1, 2, 3]
    assert not same_to_model(rows)
    assert same_to_model(rows[[0, 0]])


def test_examples_that_are_alike_are_held_out_together_and_change_no_row():
    head, memory, features, ids, new = world()
    pair = np.repeat(features[ids == 2][:1], 2, axis=0)
    examples = {"new": np.concatenate([new(6), pair])}
    firsts = {"new": first_alike(None, examples["new"])}
    assert firsts["new"].tolist() == [0, 1, 2, 3, 4, 5, 6, 6]
    # A label's name may follow the examples.
    names = {"new": new(1, seed=7)[0]}
    apart, alone = (fit(examples, head, memory, names=names, firsts=given) for given in (firsts, None))
    assert (apart.weight.tobytes(), apart.bias.tobytes()) == (alone.weight.tobytes(), alone.bias.tobytes())
    assert (apart.held_out["new"].margins[6:] < alone.held_out["new"].margins[6:] - 0.1).all()
    result = judge(head, apart, examples, memory, firsts=firsts)
    assert (result.recall["new"].found, result.recall["new"].of) == (6, 7)
    assert any("1 example hardly differs from another" in line for line in result.advice)


@pytest.mark.parametrize(
    "texts, same, said",
    [
        ([f"emoji {i * 1234567}" for i in range(6)], True, "the 6 examples of 'new' are the same to the model"),
        ([f"where is my phone{'!' * i}" for i in range(4)], False, "the 4 examples of 'new' hardly differ"),
    ],
)
def test_examples_that_count_as_one_are_refused_as_one_is(texts, same, said):
    head, memory, _, _, new = world()
    rows = np.repeat(new(1), len(texts), axis=0) if same else new(len(texts))
    assert same_to_model(rows) == same
    result = judged({"new": rows}, head, memory, texts={"new": texts})
    assert not result.passed
    assert any(said in reason for reason in result.reasons)
    assert result.too_few == ("new",)
    assert (result.estimated_recall, result.recall_lower_bound) == ({"new": None}, {"new": None})
    assert result.gain.startswith("no estimate")


def test_the_recall_has_a_lower_bound_that_counts_different_examples():
    head, memory, _, _, new = world()
    result = judged({"new": new(10)}, head, memory)
    assert result.recall_lower_bound["new"] == pytest.approx(0.05**0.1)
    assert "'new' finds 100 % of held-out examples (10 of 10; at least 74 % of texts like them)" in result.sentence
    assert result.gain == (
        "100.0 % expected (10 of 10 held-out examples); at least 74.1 % of texts like them (95 % confidence)"
    )
    told = result.to_dict()
    assert told["recall"]["new"]["of"] == 10
    assert told["recall_lower_bound"]["new"] == result.recall_lower_bound["new"]
    assert told["estimated_recall"] == {"new": 1.0}
    twice = np.concatenate([new(10), new(10)])
    assert judged({"new": twice}, head, memory).recall_lower_bound == result.recall_lower_bound


def test_fresh_inputs_bound_the_recall_more_tightly_and_unequal_weights_less():
    head, memory, features, ids, new = world()
    data = Labelled(np.concatenate([features, new(100, seed=5)]), np.concatenate([ids, np.full(100, len(head.labels))]))
    fresh = judged({"new": new(10)}, head, memory, evaluation=data).recall["new"]
    assert (fresh.of, fresh.at_least > 0.9) == (100, True)
    judgement = judged({"new": new(10)}, head, memory, evaluation=data)
    assert "'new' finds 100 % of its texts in the evaluation file (100 of 100; at least" in judgement.sentence
    assert "100.0 % expected (100 of its 100 texts in the evaluation file); at least" in judgement.gain
    mixed = judged({"new": new(10), "more": new(10, 1)}, head, memory, evaluation=data).sentence
    assert "of their texts in the evaluation file, or of held-out examples without any there," in mixed
    weighed = judged({"new": new(10)}, head, memory, weights={"new": np.repeat([9.0, 1.0], [2, 8])})
    # As good as 676 / 170, so three, inputs of equal weight.
    assert weighed.recall_lower_bound["new"] == pytest.approx(0.05 ** (1 / 3))


def of_several(missed, memory_of=lambda memory: memory):
    head, memory, _, _, new = world()
    examples = {label: new(10, k) for k, label in enumerate(missed)}
    held = {
        label: HeldOut(np.where(np.arange(10) < count, -1.0, 1.0).astype(np.float32), ("l0",) * 10)
        for label, count in missed.items()
    }
    made = dataclasses.replace(fit(examples, head, memory), held_out=held)
    return judge(head, made, examples, memory_of(memory), max_flips=1.0)


def test_of_several_labels_the_least_found_are_named():
    result = of_several({"yes": 2, "payday": 0, "maybe": 1})
    assert "'yes', 'payday', 'maybe' find between 80 % ('yes') and 100 % of held-out examples (of each" in (
        result.sentence
    )
    assert result.gain == (
        "80.0 % to 100.0 % expected; below the best: 'yes' 80.0 % (at least 49.3 %), 'maybe' 90.0 % (at least 60.5 %)"
    )
    equal = of_several({"yes": 1, "maybe": 1})
    assert "'yes', 'maybe' find 90 % of held-out examples each (of each at least 60 %" in equal.sentence
    assert equal.gain.startswith("90.0 % expected of each label; at least 60.5 %")


def test_a_label_without_an_estimate_is_no_part_of_the_others():
    known, unknown = Recall(9, 10, 0.9, 0.6, None), Recall(0, 1, None, None, None)
    said = "; no estimate of 'c': that takes two different examples"
    both, one = {"a": known, "b": known, "c": unknown}, {"a": known, "c": unknown}
    assert recall_words(both) == recall_words({"a": known, "b": known}) + said
    assert recall_words(one) == recall_words({"a": known}) + said


def test_nearly_all_are_not_all():
    missed = Recall(199, 200, 0.995, 0.97, None)
    assert "finds 99 % of held-out examples" in sentence(Flips("none"), {"a": missed}, (), 0.01)


def test_a_bound_for_several_rows_says_that_it_allows_for_them():
    several, one = of_several({"yes": 0, "maybe": 0}), of_several({"yes": 0})
    for words in (several.sentence, several.harm):
        assert "(95 % confidence, allowing for 2 rows placed on these inputs)" in words
    for words in (one.sentence, one.harm):
        assert "(95 % confidence)" in words


def test_a_pass_on_a_handful_of_inputs_says_that_it_says_little():
    head, _, features, ids, new = world()
    for per_label, little in ((2, True), (40, False)):
        rows = np.concatenate([features[ids == label][:per_label] for label in range(8)])
        memory = Memory.build(rows, np.repeat(np.arange(8), per_label), head.labels, head.split)
        result = judged({"new": new(10)}, head, memory)
        assert result.passed
        assert any("until then a pass says little, as up to" in line for line in result.advice) == little


def test_examples_like_nothing_the_model_knows_are_told_where_that_can_be_seen():
    for labels, told in ((110, True), (60, False)):
        head, memory, _, _, new = world(labels=labels, width=40, split=20, per_label=8)
        away = np.zeros(40, np.float32)
        away[30] = 40.0
        ordinary, strange = new(10), new(10) + away
        made = fit({"new": ordinary}, head, memory)
        assert not unlike_any(ordinary, made.old, memory)
        assert unlike_any(strange, made.old, memory) == told
        advice = judged({"new": strange}, head, memory, max_flips=1.0, min_recall=0.0).advice
        assert any("'new' are unlike any text that the model was trained on" in line for line in advice) == told
    assert not unlike_any(strange, made.old, None)
