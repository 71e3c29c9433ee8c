from __future__ import annotations

import numpy as np
import pytest
from test_fit import world

from patcher.fit import fit
from patcher.gate import judge, upper_bound


def verdict(examples, head, memory, replay=None, **options):
    return judge(head, fit(examples, head, memory, replay=replay, max_flips=0.1), examples, memory, **options)


@pytest.mark.parametrize(
    "flips, size, expected",
    [(0, 100, 0.029513), (1, 100, 0.046560), (5, 2700, 0.003889), (0, 3, 0.631597), (3, 3, 1.0)],
)
def test_the_bound_is_clopper_and_pearsons(flips, size, expected):
    assert upper_bound(flips, size) == pytest.approx(expected, abs=1e-5)


def test_a_good_patch_passes_with_a_bound():
    head, memory, _, _, new = world()
    result = verdict({"new": new(10)}, head, memory)
    assert result.passed
    assert result.sentence.startswith("Passed: 'new' finds")
    assert (result.calibration, result.calibration_size) == ("features", len(memory.sample))
    assert result.flips <= result.flips_upper_bound < 0.05
    assert result.estimated_recall["new"] >= 0.9
    assert "trained on" in result.bound


def test_an_old_label_under_another_name_is_noticed():
    head, memory, features, ids, _ = world()
    result = verdict({"again": features[ids == 3][:10]}, head, memory)
    assert not result.passed
    assert {old for _, _, old in result.known} == {"l3"}
    assert any("is it the same?" in line for line in result.advice)
    assert result.confused_with["again"] in ("l3", None)


def test_flips_are_counted_on_the_best_data_there_is():
    head, memory, features, ids, new = world()
    examples = {"new": new(10)}
    assert verdict(examples, head, memory, replay=(features, ids)).calibration == "replay"
    fresh = np.concatenate([features[:50], new(20, seed=5)])
    labels = np.concatenate([ids[:50], np.full(20, len(head.labels))])
    result = verdict(examples, head, memory, evaluation=(fresh, labels))
    assert (result.calibration, result.calibration_size) == ("eval", 50)
    assert result.estimated_recall["new"] > 0.9


def test_no_bound_is_claimed_where_none_can_be_given():
    from patcher.memory import Memory

    head, _, features, ids, new = world()
    statistics = Memory.build(features, ids, head.labels, head.split, per_label=0)
    for memory, kind in ((None, "none"), (statistics, "draws")):
        result = verdict({"new": new(10)}, head, memory)
        assert (result.calibration, result.flips, result.flips_upper_bound) == (kind, None, None)
        assert "no bound on flips can be given" in result.bound


def test_one_example_is_refused_and_few_are_told():
    head, memory, _, _, new = world()
    one, three = (verdict({"new": new(count)}, head, memory) for count in (1, 3))
    named = fit({"new": new(1)}, head, memory, names={"new": new(1, seed=7)[0]})
    assert not judge(head, named, {"new": new(1)}, memory).passed
    assert not one.passed
    assert "has one example" in one.sentence
    assert three.too_few == ("new",)
    assert any("fewer than 5 examples" in line for line in three.advice)


def test_limits_are_the_callers():
    head, memory, _, _, new = world()
    examples = {"new": new(10)}
    assert not verdict(examples, head, memory, min_recall=1.1).passed
    assert verdict(examples, head, memory, max_flips=1.0, min_recall=0.0).passed


def test_near_duplicates_are_named():
    head, memory, _, _, new = world()
    texts = {
        "new": [
            "I lost my card",
            "i lost  my card",
            "I lost my card!",
            *(f"sentence number {i} is other" for i in "abcdefg"),
        ]
    }
    result = verdict({"new": new(10)}, head, memory, texts=texts)
    assert ("new", "I lost my card", "i lost  my card") in result.duplicates
