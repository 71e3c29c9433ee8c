from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from patcher import scope as scope_module
from patcher.errors import RepositoryError
from patcher.fit.model import widened
from patcher.head import MULTI_LABEL, SINGLE_LABEL, Head
from patcher.head_file import read_head, write_head
from patcher.memory import Memory
from patcher.runtime import open_session, run_head
from patcher.scope import Scope, fit_scope

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
    known = scope.score(FEATURES, head.logits(FEATURES))
    strange = (RNG.standard_normal((200, 20)) * 3).astype(np.float32)
    below = scope.score(strange, head.logits(strange)) < 0.5
    assert scope.calibrated
    assert np.mean(known < 0.5) == pytest.approx(0.1, abs=0.02)
    assert below.mean() > 0.9


def test_without_real_features_there_is_no_threshold():
    assert not fit_scope(Memory.build(FEATURES, IDS, LABELS, 10, per_label=0), make_head()).calibrated
    assert not fit_scope(None, make_head()).calibrated


def test_a_damaged_scorer_is_refused():
    with pytest.raises(RepositoryError, match="damaged"):
        Scope.from_arrays({"kind": "distance", "problem": SINGLE_LABEL, "false_alarms": None}, {})
    with pytest.raises(RepositoryError, match="damaged"):
        Scope.from_arrays({"kind": "softmax"}, {})


def test_a_scorer_of_version_0_2_still_scores_as_it_did():
    axes = (RNG.standard_normal((20, 4)) / 4).astype(np.float16)
    center = RNG.standard_normal(4).astype(np.float32)
    means = RNG.standard_normal((6, 4)).astype(np.float16)
    arrays = {"projection": axes, "center": center, "means": means, "limit": np.array([7.0], np.float32)}
    settings = {"kind": "distance", "problem": SINGLE_LABEL, "false_alarms": 0.05}
    scope = Scope.from_arrays(settings, {f"scope_{name}": array for name, array in arrays.items()})
    gaps = (FEATURES @ axes.astype(np.float32) - center)[:, None] - means.astype(np.float32)[None]
    ratio = (gaps**2).sum(axis=2).min(axis=1) / 7.0
    np.testing.assert_allclose(scope.score(FEATURES, FEATURES), 1.0 / (1.0 + ratio**2), rtol=1e-4, atol=1e-5)
    head = dataclasses.replace(make_head(), scope=scope)
    again = read_head(write_head(head))
    served = run_head(open_session(write_head(again), threads=1), FEATURES[::7]).in_scope
    np.testing.assert_allclose(served, 1.0 / (1.0 + ratio[::7] ** 2), rtol=1e-3, atol=1e-4)


def test_the_distance_is_mahalanobis_where_all_directions_are_kept():
    memory = Memory.build(FEATURES, IDS, LABELS, 10)
    scope = fit_scope(memory, make_head())
    wide = widened(memory, scope_module.WIDTHS)
    gaps = ((FEATURES[:, None] - memory.means()[None]) / wide.spread).reshape(-1, 20)
    squared = np.einsum("ij,jk,ik->i", gaps, np.linalg.inv(wide.covariance), gaps).reshape(len(FEATURES), 6)
    np.testing.assert_allclose(scope.distance.squared(FEATURES), squared.min(axis=1), rtol=0.02, atol=0.02)


def test_what_lies_beside_the_kept_directions_counts(monkeypatch):
    monkeypatch.setattr(scope_module, "_RANK", 6)
    monkeypatch.setattr(scope_module, "_SPARE", 2)
    flat = FEATURES.copy()
    flat[:, 12:] *= 0.1
    head = make_head()
    scope = fit_scope(Memory.build(flat, IDS, LABELS, 10), head)
    moved = flat + np.where(np.arange(20) >= 12, 0.6, 0.0).astype(np.float32)
    assert np.median(scope.score(moved, head.logits(moved))) < 0.5 * np.median(scope.score(flat, head.logits(flat)))
