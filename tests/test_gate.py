from __future__ import annotations

import dataclasses
import time
import tracemalloc

import numpy as np
import pytest
from test_fit import world

from patcher.fit import fit
from patcher.fit.fitted import HeldOut
from patcher.fit.inputs import Labelled
from patcher.fit.whole_head import fit_head
from patcher.flips import Flips, count_flips, fewest_inputs, upper_bound
from patcher.gate import judge
from patcher.gate_words import advice
from patcher.head import MULTI_LABEL, Head
from patcher.memory import Memory
from patcher.recall import Recall
from patcher.screening import Known, first_alike, repeats
from patcher.wording import percent


def verdict(examples, head, memory, replay=None, **options):
    return judge(head, fit(examples, head, memory, replay=replay, max_flips=0.1), examples, memory, **options)


@pytest.mark.parametrize(
    "flips, size, expected",
    [(0, 100, 0.029513), (1, 100, 0.046560), (5, 2700, 0.003889), (0, 3, 0.631597), (3, 3, 1.0)],
)
def test_the_bound_is_clopper_and_pearsons(flips, size, expected):
    assert upper_bound(flips, size) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("thresholds", [1, 3, 10])
@pytest.mark.parametrize("most", [0.005, 0.2, 1.0])
def test_the_advised_number_of_inputs_is_the_least_that_vouches(thresholds, most):
    needed = fewest_inputs(most, thresholds)
    assert upper_bound(thresholds - 1, needed) <= most
    assert needed == 1 or upper_bound(thresholds - 1, needed - 1) > most


def test_more_labels_and_unequal_ones_need_more_inputs():
    head, memory, _, _, new = world()
    for count, needed in ((1, "598"), (3, "1,258")):
        advice = verdict({f"n{k}": new(10, k) for k in range(count)}, head, memory).advice
        assert any(
            f"160 remembered inputs are too few to guarantee 0.50 %: {needed} without" in line for line in advice
        )
    # 800 inputs would suffice, but most of their weight lies on the 20 of one label.
    head, memory, draw, _ = overlapping(1, labels=40, others=40, first=4000)
    examples = {"new": draw(np.full(10, 0), 30.0)}
    advice = judge(head, fit(examples, head, memory), examples, memory).advice
    assert any("800 remembered inputs, as good as 38 of equal weight, are too few" in line for line in advice)


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
    assert any("is it the same label?" in line for line in result.advice)
    assert result.confused_with["again"] in ("l3", None)


@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_the_examples_of_a_young_label_are_known_again(moved):
    """Its few examples say little about where its texts lie, and the head is not sure of them."""
    head, memory, _, _, new = world()
    young = new(10)
    head = fit({"young": young}, head, memory).apply(head)
    memory = memory.add_groups({"young": young})
    unsure = dataclasses.replace(
        head,
        **{
            f"{part}_{what}": getattr(head, f"{part}_{what}") * np.float32(0.01)
            for part in ("base", "patch")
            for what in ("weight", "bias")
        },
    )
    again = young + np.float32(moved) * new(10, seed=2).std(axis=0) * np.sign(new(10, seed=3))
    found = verdict({"again": again}, unsure, memory)
    assert [hit.old for hit in found.known] == ["young"] * 10
    assert any("10 examples of 'again' already belong to the old label 'young'" in line for line in found.advice)
    assert not any("is confused with 'young'" in line for line in found.advice)
    assert verdict({"other": new(10, 1)}, unsure, memory).known == ()


def test_texts_that_old_labels_cover_are_shown():
    hits = [("a\x1b" + "b" * 90, "l1"), ("c", "l2"), ("d", "l1"), ("e", "l2"), ("f", "l1"), ("g", "l2"), ("h", "l3")]
    known = [Known("new", *hit) for hit in hits]
    flips = Flips(source="eval")
    (tied,) = advice(flips, {}, known, (), {"new": 9}, exclusive=True)
    assert tied == (
        "7 examples of 'new' already belong to old labels, equally often 'l1', 'l2' "
        f"('a\\x1b{'b' * 56} …', 'c', 'd' …): is it the same label?"
    )
    (most,) = advice(flips, {}, known[:3], (), {"new": 9}, exclusive=True)
    assert "belong to old labels, mostly 'l1' ('a\\x1b" in most
    assert "'c'" not in most
    assert advice(flips, {}, known[1:2], (), {"new": 9}, exclusive=True) == (
        "1 example of 'new' already belongs to the old label 'l2' ('c'): is it the same label?",
    )


@pytest.mark.parametrize("covered, confused", [(4, True), (5, False)])
def test_a_label_that_may_be_its_rival_is_not_called_confused(covered, confused):
    known = [Known("new", f"text {number}", "old") for number in range(covered)]
    recall = {"new": Recall(2, 10, 0.2, 0.1, "old")}
    said = advice(Flips(source="eval"), recall, known, (), {"new": 10}, exclusive=True)
    assert any("'new' is confused with 'old'" in line for line in said) == confused


@pytest.mark.parametrize("covered,asked", [(10, True), (9, True), (5, False)])
def test_in_a_multi_label_head_an_old_label_beside_the_new_one_raises_no_question(covered, asked):
    known = [Known("new", f"text {number}", "old") for number in range(covered)]
    said = advice(Flips(source="eval"), {}, known, (), {"new": 10}, exclusive=False)
    assert any("is it the same label?" in line for line in said) == asked


def test_in_a_multi_label_head_no_label_takes_a_text_from_another():
    head, memory, _, _, new = world()
    head = dataclasses.replace(head, problem=MULTI_LABEL)
    examples = {"new": new(10)}
    missed = np.concatenate([new(20, seed=5), -new(10, seed=6)])
    data = Labelled(missed, np.full(30, len(head.labels)))
    made = fit(examples, head, memory)
    held = HeldOut(np.repeat([-1.0, 1.0], 5), made.held_out["new"].rivals)
    for result in (
        judge(head, made, examples, memory, evaluation=data),
        judge(head, dataclasses.replace(made, held_out={"new": held}), examples, memory),
    ):
        assert result.estimated_recall["new"] < 0.9
        assert result.confused_with == {"new": None}
        assert not any("is confused with" in line for line in result.advice)
        assert "'new' scores below 0.5 on some of its texts; more, or more varied, examples help" in result.advice


def test_a_line_is_about_all_labels_if_they_are_many():
    head, memory, features, ids, _ = world()
    few, many = (
        judge(head, fit(examples, head, memory), examples, memory)
        for count in (3, 30)
        for examples in [{f"n{k:02}": features[ids == k % 8][:1] for k in range(count)}]
    )
    assert sum("has only one example" in reason for reason in few.reasons) == 3
    assert sum("has fewer than 5" in line for line in few.advice) == 3
    assert len((*many.reasons, *many.advice)) < 12
    assert any(
        "30 labels have only one example, or " in reason and "'n00', 'n01', 'n02', 'n03', 'n04' …" in reason
        for reason in many.reasons
    )
    assert any(line.startswith("30 labels have fewer than 5 different examples") for line in many.advice)
    assert any(" labels have examples that already belong to an old one, perhaps" in line for line in many.advice)
    assert "n29" not in many.refusal("patch")
    told = many.to_dict()
    assert [len(told[name]) for name in ("recall", "too_few", "estimated_recall")] == [30, 30, 30]


def test_flips_are_counted_on_the_best_data_there_is():
    head, memory, features, ids, new = world()
    examples = {"new": new(10)}
    assert verdict(examples, head, memory, replay=Labelled(features, ids)).calibration == "replay"
    fresh = np.concatenate([features[:50], new(20, seed=5)])
    labels = np.concatenate([ids[:50], np.full(20, len(head.labels))])
    result = verdict(examples, head, memory, evaluation=Labelled(fresh, labels))
    assert (result.calibration, result.calibration_size) == ("eval", 50)
    assert result.estimated_recall["new"] > 0.9


def test_no_bound_is_claimed_where_none_can_be_given():
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
    assert "has only one example" in one.sentence
    assert three.too_few == ("new",)
    assert any("fewer than 5 different examples" in line for line in three.advice)


def test_limits_are_the_callers():
    head, memory, _, _, new = world()
    examples = {"new": new(10)}
    assert not verdict(examples, head, memory, min_recall=1.1).passed
    assert verdict(examples, head, memory, max_flips=1.0, min_recall=0.0).passed


@pytest.mark.parametrize("prefix", ["", "example "])
def test_near_duplicates_are_named_whatever_all_texts_begin_with(prefix):
    texts = [f"{prefix}{text}" for text in ("I lost my card", "who is there", "i lost  my card")]
    rows = np.eye(3, dtype=np.float32)
    assert repeats("new", texts, first_alike(texts, rows)) == [("new", texts[0], texts[2])]
    assert repeats("new", None, first_alike(None, rows[[0, 1, 0]])) == [("new", "example 1", "example 3")]


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


def test_long_texts_are_compared_by_their_ends():
    head, memory, _, _, new = world()
    rng = np.random.default_rng(0)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
    texts = [" ".join(rng.choice(words, 5000)) for _ in range(60)]
    texts[-1] = f"{texts[3][:9_000]} and {texts[3][9_000:]}"
    started = time.process_time()
    result = verdict({"new": new(60)}, head, memory, texts={"new": texts})
    assert [pair[1:] for pair in result.duplicates] == [(texts[3], texts[-1])]
    assert time.process_time() - started < 60


def test_the_same_words_are_found_among_very_many_examples_too():
    head, memory, _, _, new = world()
    texts = [f"sentence {i} about {'abcdefghij'[i % 10] * 9} and {i * 7919}" for i in range(700)]
    texts[-1] = texts[3].upper()
    started = time.process_time()
    result = verdict({"new": new(700)}, head, memory, texts={"new": texts})
    assert ("new", texts[3], texts[-1]) in result.duplicates
    assert time.process_time() - started < 60


def test_a_few_replayed_texts_hide_nothing_of_what_the_memory_shows():
    head, memory, features, ids, _ = world()
    near = {"new": features[ids == 2][:10] + np.float32(0.01)}
    made = fit(near, head, memory, replay=Labelled(features[ids == 0][:2], ids[ids == 0][:2]))
    replayed = judge(head, made, near, memory, min_recall=0.0)
    assert (replayed.calibration, replayed.calibration_size, replayed.flips) == ("replay", 2, 0.0)
    rows = memory.sample.astype(np.float32)
    before, after = head.logits(rows).argmax(axis=1), made.apply(head).logits(rows).argmax(axis=1)
    right = before == np.array([head.labels.index(label) for label in memory.labels])[memory.sample_labels]
    assert (right & (before != after)).mean() <= 0.005
    # The budget also holds if only few inputs are replayed.
    for few in range(2, 40, 6):
        some = Labelled(features[ids == 2][:few], ids[ids == 2][:few])
        kept = judge(head, fit(near, head, memory, replay=some), near, memory, min_recall=0.0)
        assert not any("would flip" in reason for reason in kept.reasons)
    # A row that takes them nevertheless is refused because of the remembered inputs, whatever it was fitted on.
    greedy = dataclasses.replace(made, bias=made.bias + np.float32(1000.0))
    refused = judge(head, greedy, near, memory, min_recall=0.0)
    assert any("remembered inputs would flip" in reason for reason in refused.reasons)


def test_the_budget_is_kept_to_the_last_bit():
    over = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        centres = rng.standard_normal((13, 32))
        ids = np.repeat(np.arange(12), 40)
        features = (centres[ids] + 1.2 * rng.standard_normal((480, 32))).astype(np.float32)
        softmax = fit_head(features, ids, 12)
        head = Head.from_linear([f"l{i}" for i in range(12)], softmax.weight, softmax.bias, 32, "x")
        memory = Memory.build(features, ids, head.labels, 32)
        examples = {"n": (0.5 * (centres[12] + centres[0]) + rng.standard_normal((10, 32))).astype(np.float32)}
        for budget in (0.0, 0.005):
            made = fit(examples, head, memory, max_flips=budget)
            over += not judge(head, made, examples, memory, max_flips=budget, min_recall=0.0).passed
    assert over == 0


def test_a_multi_label_text_may_have_the_new_label_beside_old_ones():
    rng = np.random.default_rng(0)
    centres = 4.0 * np.eye(5, 16, dtype=np.float32)
    labels = ["a", "b", "c", "d"]
    ids = np.repeat(np.arange(4), 40)
    features = (centres[ids] + 0.3 * rng.standard_normal((160, 16))).astype(np.float32)
    head = Head.from_linear(labels, centres[:4], np.full(4, -8.0, np.float32), 16, "x", problem=MULTI_LABEL)
    memory = Memory.build(features, ids, labels, 16)
    examples = {"new": (centres[4] + 0.3 * rng.standard_normal((10, 16))).astype(np.float32)}
    both = (centres[4] + centres[1] + 0.3 * rng.standard_normal((40, 16))).astype(np.float32)
    pairs = Labelled(np.repeat(both, 2, axis=0), np.tile([1, 4], 40))
    result = verdict(examples, head, memory, evaluation=pairs)
    assert (result.calibration, result.calibration_size, result.flips) == ("eval", 40, 0.0)
    assert result.estimated_recall["new"] == 1.0
    # If the file does not give these texts the new label, the same answers are flips.
    wrong = verdict(examples, head, memory, evaluation=Labelled(both, np.full(40, 1)))
    assert (wrong.flips, wrong.losing) == (1.0, {"b": 40})


@pytest.mark.parametrize("replayed", [True, False])
def test_where_all_that_is_known_of_a_multi_label_text_is_the_new_label_nothing_is_counted(replayed):
    head, memory, draw, _ = overlapping(4, labels=4)
    head = dataclasses.replace(head, problem=MULTI_LABEL)
    rows, ids = draw(np.zeros(8, np.int64)), np.zeros(8, np.int64)
    memory = Memory.build(rows, ids, head.labels, rows.shape[1])
    replay = Labelled(rows, ids) if replayed else None
    result = judge(head, fit({"new": rows}, head, memory, replay=replay), {"new": rows}, memory)
    assert (result.calibration, result.flips) == ("draws", None)


def test_a_name_that_is_another_but_for_its_spelling_is_told():
    head, memory, _, _, new = world()
    head = dataclasses.replace(head, labels=("card_lost", *head.labels[1:]))
    memory = memory.rename("l0", "card_lost")
    advice = "\n".join(verdict({"Card-lost": new(10), "other": new(10, 1)}, head, memory).advice)
    assert "'Card-lost' differs from 'card_lost' only in case" in advice
    assert "other" not in advice
    twice = verdict({"my pay": new(10), "MyPay": new(10, 1)}, head, memory)
    assert any("'MyPay' differs from 'my pay' only in case" in line for line in twice.advice)
    accents = verdict(
        {"caf\N{LATIN SMALL LETTER E WITH ACUTE}": new(10), "cafe\N{COMBINING ACUTE ACCENT}": new(10, 1)}, head, memory
    )
    assert any("only in case" in line for line in accents.advice)
    assert not any("only in case" in line for line in verdict({"card lost 2": new(10)}, head, memory).advice)


def test_where_the_bound_comes_from_is_in_the_sentence():
    head, memory, features, ids, new = world()
    said = verdict({"new": new(10)}, head, memory).sentence
    assert "remembered inputs flip (limit: --max-flips 0.50 %), so at most" in said
    evaluated = verdict({"new": new(10)}, head, memory, evaluation=Labelled(features, ids))
    assert "inputs of the evaluation file flip" in evaluated.sentence


def test_the_harm_is_told_in_a_few_words():
    head, memory, features, ids, new = world()
    found = verdict({"new": new(10)}, head, memory, evaluation=Labelled(features, ids))
    bound = percent(found.flips_upper_bound, up=True)
    seen = f"{round(found.flips * len(ids))} of {len(ids)} inputs of the evaluation file"
    assert found.harm == f"{seen}; at most {bound} of inputs like them (95 % confidence)"
    assert verdict({"new": new(10)}, head, None).harm.startswith("no bound on flips can be given")


def test_next_to_nothing_remembered_concludes_nothing():
    head, _, features, ids, new = world()
    few = Memory.build(features, ids, head.labels, head.split, per_label=1)
    result = verdict({"new": new(10)}, head, few, max_flips=0.1)
    assert (len(few.sample) < 10, result.passed) == (True, False)
    assert "which are too few to conclude anything" in result.sentence
    fresh = verdict({"new": new(10)}, head, few, max_flips=0.1, evaluation=Labelled(features, ids))
    assert fresh.passed


def overlapping(seed, labels=24, width=48, others=100, first=100):
    """Gaussian labels of unit spread, with ``first`` texts of the first one; and a draw of inputs near some of them."""
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((labels, width)).astype(np.float32)
    ids = np.repeat(np.arange(labels), [first, *[others] * (labels - 1)])

    def draw(places, away=0.0):
        step = rng.standard_normal(width).astype(np.float32)
        noise = rng.standard_normal((len(places), width)).astype(np.float32)
        return means[places] + np.float32(away) * step / np.linalg.norm(step) + noise

    names = [f"label {i}" for i in range(labels)]
    head = Head.from_linear(names, means, -0.5 * (means**2).sum(axis=1), width, "f" * 64)
    return head, Memory.build(draw(ids), ids, names, width), draw, ids


def flips_of(head, made, rows, ids):
    before, after = head.logits(rows).argmax(axis=1), made.apply(head).logits(rows).argmax(axis=1)
    return float(((before == ids) & (after != ids)).mean())


@pytest.mark.parametrize("count", [1, 3])
def test_the_bound_holds_for_labels_that_overlap_old_ones(count):
    # Each row stops just short of one more flip, and was fitted on the nearest inputs; the bound must allow for both.
    broken = 0
    for seed in range(12):
        head, memory, draw, ids = overlapping(seed)
        examples = {f"new {j}": draw(np.full(10, j), 3.5) for j in range(count)}
        made = fit(examples, head, memory)
        bound = judge(head, made, examples, memory).flips_upper_bound
        test = np.repeat(ids, 5)
        broken += flips_of(head, made, draw(test), test) > bound
    assert broken <= 1


def test_recall_weighs_each_example_by_what_it_stands_for():
    head, memory, _, _, new = world()
    examples = {"new": new(10)}
    margins = np.where(np.arange(10) < 4, -1.0, 1.0).astype(np.float32)
    made = dataclasses.replace(fit(examples, head, memory), held_out={"new": HeldOut(margins, ("l0",) * 10)})
    assert judge(head, made, examples, memory).estimated_recall == {"new": pytest.approx(0.6)}
    weights = np.repeat([9.0, 1.0], [4, 6])
    refused = judge(head, made, examples, memory, weights={"new": weights})
    assert refused.estimated_recall == {"new": pytest.approx(6 / 42)}
    assert not refused.passed


def test_a_flip_weighs_what_its_label_weighs():
    head, memory, draw, ids = overlapping(1, labels=12, others=40, first=4000)
    examples = {"new": draw(np.full(10, 0), 3.0)}
    made = fit(examples, head, memory, max_flips=0.05)
    result = judge(head, made, examples, memory, max_flips=0.05)
    # 20 texts of each label are remembered, but nine tenths of all texts have the first label.
    lost = sum(count for label, count in result.losing.items() if label == head.labels[0])
    assert result.flips == pytest.approx(
        lost * (4000 / 20) / len(ids) + (sum(result.losing.values()) - lost) / 220 * 440 / len(ids), abs=1e-6
    )
    assert flips_of(head, made, draw(ids), ids) <= result.flips_upper_bound
    assert result.flips_upper_bound > 0.1
    assert "weighted by texts per label" in result.sentence or not result.passed


def test_a_label_that_is_lost_whole_is_taken_over_however_few_there_are():
    head, memory, draw, _ = overlapping(2)
    rare = draw(np.full(2, 0), 40.0)
    memory = memory.add(["rare"], rare, np.zeros(2, np.int64))
    head = head.with_rows(("rare",), rare.mean(axis=0)[None] * 0.1, np.zeros(1, np.float32))
    examples = {
        "new": rare.mean(axis=0) + np.random.default_rng(0).normal(0, 0.3, (10, rare.shape[1])).astype(np.float32)
    }
    result = judge(head, fit(examples, head, memory), examples, memory)
    assert result.flips < 0.005
    assert "'rare' alone would lose 2 of its 2" in result.sentence


def test_what_neither_memory_nor_evaluation_knows_is_named():
    head, memory, draw, ids = overlapping(3)
    for label in head.labels[4:]:
        memory = memory.remove(label)
    examples = {"new": draw(np.full(10, 0), 30.0)}
    made = fit(examples, head, memory)
    rows = draw(ids[:200])
    result = judge(head, made, examples, memory, evaluation=Labelled(rows, ids[:200]))
    assert any("the memory has no texts' features of 20 of 24 labels" in advice for advice in result.advice)


def test_a_multi_label_text_counts_once_whatever_its_labels():
    head, memory, draw, _ = overlapping(4, labels=4)
    head = dataclasses.replace(head, problem=MULTI_LABEL)
    rows = draw(np.zeros(12, np.int64))
    memory = Memory.build(np.repeat(rows, 2, axis=0), np.tile([0, 1], 12), head.labels[:2], rows.shape[1])
    examples = {"new": draw(np.full(10, 2), 30.0)}
    result = judge(head, fit(examples, head, memory), examples, memory)
    assert result.calibration_size == 12
    # A text that is an example of the new label may rightly get it.
    examples = {"new": rows[:10]}
    assert judge(head, fit(examples, head, memory), examples, memory).calibration_size == 2


def test_what_is_counted_on_many_inputs_takes_no_memory_for_all_their_logits():
    head, memory, _, _, new = world(labels=200, split=40, width=60, per_label=10)
    made = fit({"new": new(10)}, head, memory, method="ridge")
    rng = np.random.default_rng(3)
    ids = np.repeat(np.arange(201), 100)
    fresh = np.concatenate([memory.means()[ids[:-100]], new(100, seed=5)]) + 0.3 * rng.standard_normal((len(ids), 60))
    data = Labelled(fresh.astype(np.float32), ids)
    tracemalloc.start()
    result = judge(head, made, {"new": new(10)}, memory, evaluation=data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    before, after = head.logits(data.features[:-100]), made.apply(head).logits(data.features)
    right = before.argmax(axis=1) == ids[:-100]
    assert sum(result.losing.values()) == (right & (after[:-100].argmax(axis=1) != ids[:-100])).sum()
    assert result.estimated_recall["new"] == (after[-100:].argmax(axis=1) == 200).mean()
    assert peak < after.nbytes + data.features.nbytes


def test_a_label_that_loses_some_is_recounted_on_all_of_its_inputs_with_those_that_flip_without_themselves(monkeypatch):
    monkeypatch.setattr("patcher.fit.inputs._MOST", 80)
    head, memory, features, ids, _ = world()
    made = fit({"new": features[ids == 0][:10]}, head, memory)
    rows = memory.sample[memory.sample_labels == 0].astype(np.float32)
    bias = np.median(head.logits(rows)[:, 0] - rows @ made.weight[0])[None].astype(np.float32)
    flips = (rows @ made.weight[0] + bias > head.logits(rows).max(axis=1)) & (head.logits(rows).argmax(axis=1) == 0)
    (counted,) = made.counted
    sampled = np.flatnonzero(counted.inputs.ids == 0)
    assert (len(counted.inputs), len(sampled), len(rows)) == (80, 10, 20)
    every = dataclasses.replace(made, bias=bias, counted=(dataclasses.replace(counted, taken=sampled),))
    (found,) = count_flips(head, every, memory, None)
    # The sample takes every other input: all of these, and those of the others that flip.
    expected = 10 + int(flips[1::2].sum())
    assert expected > flips.sum() > 0
    assert (found.losing["l0"], found.sizes["l0"]) == (expected, 20)
    assert list(found.losing.values()) == sorted(found.losing.values(), reverse=True)


def test_a_share_near_nothing_ends_the_search_for_how_many_inputs_it_takes():
    assert fewest_inputs(1e-300) >= 2**62
