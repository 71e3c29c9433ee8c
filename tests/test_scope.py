from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from patcher.errors import RepositoryError
from patcher.fit.scope import fit_scope
from patcher.head import MULTI_LABEL, SINGLE_LABEL, Head
from patcher.head_file import read_head, write_head
from patcher.memory import Memory
from patcher.patch import DEFAULTS, Given, make_patch
from patcher.runtime import open_session, run_head
from patcher.scope import Scope
from patcher.stopwatch import Stopwatch

RNG = np.random.default_rng(0)
CENTRES = RNG.standard_normal((6, 20)).astype(np.float32) * 3
IDS = np.repeat(np.arange(6), 50)
FEATURES = (CENTRES[IDS] + RNG.standard_normal((300, 20))).astype(np.float32)
LABELS = [f"l{i}" for i in range(6)]


def make_head(problem=SINGLE_LABEL):
    return Head.from_linear(LABELS, CENTRES[:, :10], np.zeros(6, np.float32), 20, "f" * 64, problem=problem)


@pytest.mark.parametrize("problem", [SINGLE_LABEL, MULTI_LABEL])
@pytest.mark.parametrize("memory", [None, Memory.build(FEATURES, IDS, LABELS, 10)])
def test_the_graph_scores_as_numpy_does(problem, memory):
    head = make_head(problem)
    scope = fit_scope(memory, head)
    head = dataclasses.replace(head, scope=scope)
    served = run_head(open_session(write_head(head), threads=1), FEATURES[::7]).in_scope
    np.testing.assert_allclose(served, scope.score(FEATURES[::7], head.logits(FEATURES[::7])), rtol=1e-3, atol=1e-3)
    again = read_head(write_head(head)).scope
    assert again.settings() == scope.settings()


def test_strangers_score_lower_and_the_threshold_keeps_its_word():
    head = make_head()
    scope = fit_scope(Memory.build(FEATURES, IDS, LABELS, 10, per_label=50), head, false_alarms=0.1)
    fresh = (CENTRES[np.arange(3000) % 6] + RNG.standard_normal((3000, 20))).astype(np.float32)
    known = scope.score(fresh, head.logits(fresh))
    strange = (RNG.standard_normal((200, 20)) * 3).astype(np.float32)
    below = scope.score(strange, head.logits(strange)) < 0.5
    assert scope.false_alarms is not None
    assert np.mean(known < 0.5) == pytest.approx(0.1, abs=0.03)
    assert below.mean() > 0.9


def test_without_real_features_there_is_no_threshold():
    assert fit_scope(Memory.build(FEATURES, IDS, LABELS, 10, per_label=0), make_head()).false_alarms is None
    assert fit_scope(None, make_head()).false_alarms is None


def test_a_damaged_scorer_is_refused():
    with pytest.raises(RepositoryError, match="damaged"):
        Scope.from_arrays({"kind": "distance", "problem": SINGLE_LABEL, "false_alarms": None}, {})
    with pytest.raises(RepositoryError, match="damaged"):
        Scope.from_arrays({"kind": "softmax"}, {})


def test_the_limit_is_that_of_fresh_texts_and_versions_to_come_keep_its_width():
    head, memory = make_head(), Memory.build(FEATURES, IDS, LABELS, 10)
    fresh = FEATURES + RNG.standard_normal(FEATURES.shape).astype(np.float32)
    plain, wide = fit_scope(memory, head), fit_scope(memory, head, fresh=fresh)
    assert np.mean(wide.score(fresh, fresh) < 0.5) == pytest.approx(0.05, abs=0.01)
    assert wide.stretch > 1.2
    assert plain.stretch == 1.0
    again = read_head(write_head(dataclasses.replace(head, scope=wide))).scope
    assert again.stretch == wide.stretch
    later = fit_scope(memory, head, stretch=again.stretch)
    np.testing.assert_allclose(later.distance.limit, wide.distance.limit)


def test_a_handful_of_fresh_texts_or_the_training_texts_move_no_limit():
    head, memory = make_head(), Memory.build(FEATURES, IDS, LABELS, 10)
    plain = fit_scope(memory, head, stretch=1.8)
    few = fit_scope(memory, head, fresh=FEATURES[:19] + np.float32(50.0), stretch=1.8)
    assert few.stretch == plain.stretch == 1.8
    np.testing.assert_array_equal(few.distance.limit, plain.distance.limit)
    # Texts that a label's mean was computed from lie nearer to it than fresh texts.
    alone = Memory.build(FEATURES[::10], IDS[::10], LABELS, 10)
    assert fit_scope(alone, head, fresh=FEATURES[::10], stretch=1.8).stretch == 1.8


def test_a_scorer_of_version_0_2_has_no_stretch():
    scope = fit_scope(Memory.build(FEATURES, IDS, LABELS, 10), make_head())
    arrays = {f"scope_{name}": value for name, value in vars(scope.distance).items()}
    settings = {"kind": "distance", "problem": SINGLE_LABEL, "false_alarms": 0.05}
    assert Scope.from_arrays(settings, arrays).stretch == 1.0
    del arrays["scope_scale"]  # introduced in version 0.7
    assert (Scope.from_arrays(settings, arrays).distance.scale == 1.0).all()


def test_a_label_worded_in_two_ways_leaves_room_in_between(monkeypatch):
    ways = CENTRES[:2] + CENTRES[2]
    rows = (np.repeat(ways, 30, axis=0) + RNG.standard_normal((60, 20))).astype(np.float32)
    memory = Memory.build(FEATURES, IDS, LABELS, 10).add(["two ways"], rows, np.zeros(60, int))
    head = Head.from_linear([*LABELS, "two ways"], np.ones((7, 10), np.float32), np.zeros(7, np.float32), 20, "f" * 64)
    asked, logits = np.stack([*ways, ways.mean(axis=0)]), np.zeros((3, 7), np.float32)
    here, there, between = fit_scope(memory, head).score(asked, logits)
    assert min(here, there) > 0.5 and min(here, there) > between
    monkeypatch.setattr("patcher.fit.scope._MOST_CLUSTERS", 10)
    here, there, between = fit_scope(memory, head).score(asked, logits)
    assert max(here, there) < between


def test_with_too_many_clusters_the_labels_means_do(monkeypatch):
    memory = Memory.build(FEATURES, IDS, LABELS, 10)
    assert len(fit_scope(memory, make_head()).distance.means) == len(memory.clusters.means) > 6
    monkeypatch.setattr("patcher.fit.scope._MOST_CLUSTERS", 10)
    assert len(fit_scope(memory, make_head()).distance.means) == 6


def test_one_remembered_text_has_a_limit():
    head = Head.from_linear(LABELS[:1], CENTRES[:1, :10], np.zeros(1, np.float32), 20, "f" * 64)
    scope = fit_scope(Memory.build(FEATURES[:1], IDS[:1], LABELS[:1], 10), head)
    assert np.isfinite(scope.distance.limit).all()


def test_a_label_that_was_added_later_may_lie_wider():
    wide = (CENTRES[:1] - CENTRES[3:4] + 2 * np.random.default_rng(1).standard_normal((400, 20))).astype(np.float32)
    memory = Memory.build(FEATURES, IDS, LABELS, 10).add(["added"], wide[:10], np.zeros(10, int))
    head = Head.from_linear([*LABELS, "added"], np.ones((7, 10), np.float32), np.zeros(7, np.float32), 20, "f" * 64)
    scope = fit_scope(memory, head)
    added = memory.clusters.labels == memory.labels.index("added")
    assert (scope.distance.scale[~added] == 1.0).all() and (scope.distance.scale[added] >= 0.5).all()
    strict = dataclasses.replace(scope.distance, scale=np.ones_like(scope.distance.scale))
    logits = np.zeros((390, 7), np.float32)
    called = [
        np.mean(each.score(wide[10:], logits) < 0.5) for each in (scope, dataclasses.replace(scope, distance=strict))
    ]
    assert called[0] < called[1]
    alone = Memory.build(FEATURES, IDS, LABELS, 10).add(["added"], wide[:1], np.zeros(1, int))
    assert fit_scope(alone, head).distance.scale[-1] == 0.5


@pytest.mark.parametrize("seed", range(8))
def test_a_label_of_few_texts_is_taken_out(seed):
    # Texts that differ by no more than FP16 rounding, as with a backbone that was hardly trained.
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(6), 2)
    rows = (1 + 1e-3 * rng.standard_normal((6, 64))[ids] + 1e-4 * rng.standard_normal((12, 64))).astype(np.float32)
    memory = Memory.build(rows, ids, LABELS, 32).add(["new"], 1 + rng.standard_normal((5, 64)), np.zeros(5, int))
    left = memory.remove("l3")
    exact = memory.remove("l3", rows[ids == 3])
    np.testing.assert_allclose(left.second_moment, exact.second_moment, atol=1e-5)
    labels = [*LABELS[:3], *LABELS[4:], "new"]
    head = Head.from_linear(labels, np.ones((6, 32), np.float32), np.zeros(6, np.float32), 64, "f" * 64)
    scores = fit_scope(left, head).score(rows, np.zeros((12, 6), np.float32))
    assert np.isfinite(scores).all() and (scores > 0).all()


def test_features_of_tiny_numbers():
    memory = Memory.build(FEATURES * 1e-6, IDS, LABELS, 10)
    scope = fit_scope(memory, make_head())
    known = scope.score(FEATURES * np.float32(1e-6), np.zeros((300, 6), np.float32))
    usual = fit_scope(Memory.build(FEATURES, IDS, LABELS, 10), make_head()).score(FEATURES, np.zeros((300, 6)))
    assert np.isfinite(scope.distance.projection).all()
    assert abs(known - usual).mean() < 0.1


def test_what_no_old_text_ever_did_does_not_put_a_new_label_out_of_scope():
    # A unit that is dead in all remembered texts, and active in the new label's.
    dead = np.concatenate([FEATURES, np.zeros((300, 1), np.float32)], axis=1)
    new = np.concatenate([FEATURES[:10] + 9.0, np.full((10, 1), 3.0, np.float32)], axis=1)
    centres = np.concatenate([CENTRES, np.zeros((6, 1), np.float32)], axis=1)
    head = Head.from_linear(LABELS, centres, np.zeros(6, np.float32), 21, "f" * 64)
    patch = make_patch(head, Memory.build(dead, IDS, LABELS, 21), Given({"new": new}, {}), DEFAULTS, Stopwatch())
    write_head(patch.head)
    fresh = np.concatenate([FEATURES[10:40] + 9.0, np.full((30, 1), 3.0, np.float32)], axis=1)
    assert np.isfinite(patch.head.scope.score(fresh, patch.head.logits(fresh))).all()
    assert (patch.head.scope.score(fresh, patch.head.logits(fresh)) > 0.5).mean() > 0.5
