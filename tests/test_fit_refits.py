from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from patcher.cli import add_label
from patcher.errors import InputError
from patcher.fit import METHODS, fit
from patcher.fit.anchored import held_back
from patcher.fit.closed import _some, lda_rows, ridge_rows
from patcher.fit.inputs import Labelled
from patcher.fit.model import from_memory
from patcher.fit.settings import SETTINGS
from patcher.fit.task import Task
from patcher.gate import judge
from patcher.head import MULTI_LABEL
from patcher.memory import Memory
from tests.test_fit import world

REFITS = [method for method in METHODS if method not in ("auto", "offset-logistic")]


@pytest.mark.parametrize("method", REFITS)
def test_a_refit_finds_the_new_label_and_the_old_ones(method):
    head, memory, features, ids, new = world(per_label=60)
    replay = Labelled(features, ids) if method == "anchored" else None
    made = fit({"new": new(10), "other": new(10, 1)}, head, memory, method=method, replay=replay)
    after = made.apply(head)
    assert after.labels == (*head.labels, "new", "other")
    assert made.method == method
    assert (after.logits(new(200, seed=9)).argmax(axis=1) == 8).mean() > 0.9
    assert (after.logits(new(200, 1, seed=9)).argmax(axis=1) == 9).mean() > 0.9
    before = (head.logits(features).argmax(axis=1) == ids).mean()
    assert (after.logits(features).argmax(axis=1) == ids).mean() >= before - 0.01
    assert all(held.margins.shape == (10,) for held in made.held_out.values())
    verdict = judge(head, made, {"new": new(10), "other": new(10, 1)}, memory)
    assert verdict.passed, verdict.sentence


def test_ridge_is_the_regression_of_labels_on_features():
    head, memory, features, ids, _ = world(labels=4, per_label=30)
    weight, bias = ridge_rows(memory, np.arange(4), from_memory(memory, head), SETTINGS)
    center, spread = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    x = np.column_stack([(features - center) / spread, np.ones(len(features))])
    gram = x.T @ x
    gram[np.arange(20), np.arange(20)] += SETTINGS.refit_ridge * 120
    expected = x @ np.linalg.solve(gram, x.T @ np.eye(4)[ids])
    np.testing.assert_allclose(features @ weight.T + bias, expected, rtol=1e-6, atol=1e-8)


def test_a_label_of_few_inputs_counts_as_much_as_the_others_in_a_ridge():
    head, _, features, ids, _ = world(labels=4, per_label=200)
    some = np.flatnonzero((ids != 3) | (np.cumsum(ids == 3) <= 10))
    few = Memory.build(features[some], ids[some], head.labels, head.split)
    weight, bias = ridge_rows(few, np.arange(4), from_memory(few, head), SETTINGS)
    right = (features @ weight.T + bias).argmax(axis=1) == ids
    assert right[ids == 3].mean() > 0.9
    assert right.mean() > 0.9


def test_discriminants_are_those_of_the_means():
    head, memory, _, _, new = world(labels=4)
    old = from_memory(memory, head)
    weight, bias = lda_rows(memory, np.arange(4), old, SETTINGS)
    points = new(50, seed=3)
    gaps = old.whitening.of(points)[:, None] - old.whitening.of(memory.means())[None]
    # The squared distance to a mean of n inputs exceeds that to the label's true mean by the variance over n.
    covariance = old.whitening.points.T @ memory.within() @ old.whitening.points
    distances = (gaps**2).sum(axis=2) - SETTINGS.positive_variance * np.trace(covariance) / memory.counts
    scores = points @ weight.T + bias
    expected = 0.5 * (distances[:, :1] - distances[:, 1:])
    np.testing.assert_allclose(scores[:, 1:] - scores[:, :1], expected, atol=1e-3)


@pytest.mark.parametrize("method", ["ridge", "lda"])
def test_a_refit_gives_the_new_label_the_default_methods_row_against_the_refitted_ones(method):
    head, memory, features, _, new = world(per_label=200)
    first = fit({"new": new(10)}, head, memory, method=method)
    after = first.apply(head)
    priced = dataclasses.replace(SETTINGS, taken_weight=SETTINGS.refit_taken_weight)
    again = fit({"new": new(10)}, after.without("new"), memory, settings=priced)
    np.testing.assert_allclose(first.weight, again.weight, atol=2e-3)
    # If the rows were refitted already, the next patch changes none.
    grown = memory.add(["new"], new(10), np.zeros(10, np.int64))
    second = fit({"other": new(10, 1)}, after, grown, method=method)
    assert second.old_rows is None
    assert "refitted already" in second.why
    assert second.apply(after).logits(features)[:, :9].tobytes() == after.logits(features).tobytes()


@pytest.mark.parametrize("method", ["ridge", "lda"])
def test_the_first_refit_gives_labels_of_earlier_patches_such_rows_as_well(method):
    head, memory, features, ids, new = world(per_label=200)
    patched = fit({"new": new(10)}, head, memory).apply(head)
    grown = memory.add(["new"], new(10), np.zeros(10, np.int64))
    after = fit({"other": new(10, 1)}, patched, grown, method=method).apply(patched)
    assert after.labels == (*head.labels, "new", "other")
    for label, at in (("new", 0), ("other", 1)):
        assert (after.logits(new(200, at, seed=9)).argmax(axis=1) == after.index(label)).mean() > 0.9
    assert (after.logits(features).argmax(axis=1) == ids).mean() > 0.97


def test_anchored_counts_flips_on_inputs_it_did_not_see_and_keeps_to_the_budget():
    head, memory, features, ids, new = world(seed=3)
    examples = {"new": new(10)}
    made = fit(examples, head, memory, method="anchored", replay=Labelled(features, ids), max_flips=0.0)
    inputs = made.counted[0].inputs
    np.testing.assert_array_equal(inputs.features, features[held_back(ids)])
    verdict = judge(head, made, examples, memory, max_flips=0.0)
    assert verdict.calibration_size == len(inputs)
    assert verdict.flips == 0.0
    # With a strong anchor the rows stay where they start: at the default method's rows.
    still = dataclasses.replace(SETTINGS, anchor=1e9)
    fast = fit(examples, head, memory, method="anchored", replay=Labelled(features, ids), settings=still)
    plain = fit(examples, head, memory, replay=Labelled(features, ids))
    np.testing.assert_allclose(fast.weight, plain.weight, atol=1e-4)


def test_anchored_holds_back_inputs_of_every_label_however_the_file_is_ordered():
    for ids in (np.arange(200) % 5, np.arange(200) % 10, np.repeat(np.arange(5), 40)):
        assert set(ids[held_back(ids)]) == set(ids)
        assert len(held_back(ids)) == 40
    # Inputs are held back even if every label has only one, and at least one input always is.
    assert len(held_back(np.arange(100))) == 20
    assert held_back(np.zeros(1, np.int64)).tolist() == [0]
    # Flips are counted on these held-back inputs, which cover every label.
    head, memory, features, ids, new = world(labels=5)
    turns = np.argsort(np.arange(len(ids)) % 40, kind="stable")  # l0, l1, l2, l3, l4, l0, ...
    replay = Labelled(features[turns], ids[turns])
    counted = fit({"new": new(10)}, head, memory, method="anchored", replay=replay).counted[0].inputs
    assert set(counted.ids) == set(range(5))


def test_refitted_rows_are_scaled_on_inputs_of_every_label():
    head, _, features, ids, new = world(labels=3, per_label=700)
    turns = np.argsort(np.arange(len(ids)) % 700, kind="stable")  # every third input has the same label
    task = Task.of(new(5), head, None, Labelled(features[turns], ids[turns]), 0.005, SETTINGS)
    assert np.bincount(_some(task.inputs, task.old)[1], minlength=3).min() > 250


@pytest.mark.parametrize("method", REFITS)
def test_no_bound_is_claimed_on_inputs_that_took_part_in_a_refit(method):
    head, memory, features, ids, new = world(per_label=60)
    examples = {"new": new(10)}
    replay = Labelled(features, ids) if method == "anchored" else None
    made = fit(examples, head, memory, method=method, replay=replay)
    seen = judge(head, made, examples, memory)
    assert seen.refitted
    assert "fits without" not in seen.bound
    for words in (seen.bound, seen.harm, seen.sentence):
        assert "took part in the refit" in words
        assert "95 %" not in words
        assert "--eval FILE" in words
    assert ("on which it was chosen how far to go" in seen.bound) == (method == "anchored")
    assert seen.flips_upper_bound is not None
    assert not any("guarantee" in line for line in seen.advice)
    fresh = judge(head, made, examples, memory, evaluation=Labelled(features[::7], ids[::7]))
    assert not fresh.refitted
    assert "95 %" in fresh.bound
    assert "inputs like them" in fresh.harm
    # The gate uses the default method's wording for a refit that no longer changes any old row, too.
    plain = judge(head, fit(examples, head, memory), examples, memory)
    assert "by fits without them" in plain.bound
    assert "95 %" in plain.harm


def test_a_refit_says_what_it_lacks():
    head, memory, _, _, new = world()
    with pytest.raises(InputError, match="patcher remember"):
        fit({"new": new(5)}, head, None, method="ridge")
    with pytest.raises(InputError, match="--replay"):
        fit({"new": new(5)}, head, memory, method="anchored")
    with pytest.raises(InputError, match="knows nothing of 'l0'"):
        fit({"new": new(5)}, head, memory.remove("l0"), method="lda")
    many, its_memory, _, _, its_new = world(problem=MULTI_LABEL)
    with pytest.raises(InputError, match="offset-logistic"):
        fit({"new": its_new(5)}, many, its_memory, method="lda")


def test_a_patched_refit_can_be_patched_again_and_pruned():
    head, memory, features, ids, new = world()
    first = fit({"new": new(10)}, head, memory, method="lda").apply(head)
    memory = memory.add(["new"], new(10), np.zeros(10, np.int64))
    second = fit({"other": new(10, 1)}, first, memory).apply(first)
    assert second.logits(features)[:, :9].tobytes() == first.logits(features).tobytes()
    third = second.without("l2")
    np.testing.assert_allclose(
        third.logits(features), np.delete(second.logits(features), 2, axis=1), rtol=1e-5, atol=1e-4
    )
    assert (third.logits(new(100, 1, seed=5)).argmax(axis=1) == 8).mean() > 0.85
    assert ids.max() == 7


@pytest.mark.parametrize("method", ["ridge", "lda"])
def test_a_label_of_few_examples_is_still_found_once_the_next_one_is_there(method):
    head, memory, features, ids, new = world(per_label=200)
    for place, label in enumerate(("first", "second", "third")):
        examples = new(10, place)
        head = fit({label: examples}, head, memory, method=method).apply(head)
        memory = memory.add([label], examples, np.zeros(10, np.int64))
    for place in range(3):
        assert (head.logits(new(200, place, seed=9)).argmax(axis=1) == 8 + place).mean() > 0.85
    assert (head.logits(features).argmax(axis=1) == ids).mean() > 0.97


def test_the_command_line_knows_the_same_methods():
    assert add_label.METHODS == METHODS


@pytest.mark.parametrize("prior", ["imprint", "lda"])
def test_a_prior_is_where_a_strong_penalty_leaves_the_row(prior):
    head, memory, features, ids, new = world()
    strong = dataclasses.replace(SETTINGS, prior=prior, penalty=1e9)
    made = fit({"new": new(10)}, head, memory, settings=strong)
    mean = np.zeros(20)
    mean[:12] = new(10)[:, :12].mean(axis=0)
    if prior == "lda":
        white = from_memory(memory, head).whitening
        mean = white.points @ white.of(new(10)).mean(axis=0)
    cosine = made.weight[0] @ mean / np.linalg.norm(made.weight[0]) / np.linalg.norm(mean)
    assert cosine > 0.9999
    if prior == "imprint":
        length = np.linalg.norm(head.base_weight, axis=1).mean()
        np.testing.assert_allclose(np.linalg.norm(made.weight[0]), length, rtol=1e-3)
    found = (made.apply(head).logits(features).argmax(axis=1) == ids).mean()
    assert found > 0.95
