"""k-means: finds the clusters, gives the same result each time, and respects weights."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.clustering import k_means


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_three_heaps_are_three_k_means() -> None:
    heaps = np.repeat(np.eye(3, dtype=np.float32) * 20, 10, axis=0)
    points = (heaps + np.random.default_rng(1).normal(size=heaps.shape)).astype(np.float32)
    owner = k_means(points, np.ones(30), 3, rng()).reshape(3, 10)
    assert (owner == owner[:, :1]).all() and sorted(owner[:, 0]) == [0, 1, 2]


def test_equal_points_are_one_cluster() -> None:
    assert not k_means(np.ones((8, 2), np.float32), np.ones(8), 3, rng()).any()


def test_a_heavy_point_weighs_as_so_many() -> None:
    points = np.array([[0.0], [4.0], [5.0], [9.0]], np.float32)
    # Unweighted, 4 would join 5. The heavy points hold the means near 0 and 9, so it joins 0.
    owner = k_means(points, np.array([100.0, 1.0, 1.0, 100.0]), 2, rng())
    assert owner[0] == owner[1] != owner[2] == owner[3]


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(0, 12))
def test_each_point_has_a_cluster_and_each_cluster_a_point(seed: int, n: int, count: int) -> None:
    points = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
    owner = k_means(points, np.ones(n), count, np.random.default_rng(seed))
    assert owner.shape == (n,) and len(np.unique(owner)) == owner.max() + 1 <= max(count, 1)
    assert np.array_equal(owner, k_means(points, np.ones(n), count, np.random.default_rng(seed)))
