"""Short, deterministic walks of ``benchmarks/walk.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import walk
from walk_model import Broken


@pytest.mark.server
@pytest.mark.slow
def test_a_short_walk_breaks_no_rule():
    found = walk.run(steps=25, seed=12, raced=False)
    assert found["versions"] > 5
    assert {"labels", "logits are those of the file", "doctor finds nothing else"} <= set(found["checks"])


@pytest.mark.server
@pytest.mark.slow
def test_a_short_walk_with_two_servers_breaks_no_rule():
    found = walk.run(steps=20, seed=3, raced=False, servers=2)
    assert found["versions"] > 3
    assert {"the version that answers", "doctor names what is behind, and nothing else"} <= set(found["checks"])


@pytest.mark.server
@pytest.mark.slow
def test_a_broken_rule_is_told_with_the_steps_before_it(monkeypatch):
    monkeypatch.setattr("patcher.head.Head.renamed", lambda self, old, new: self)
    with pytest.raises(Broken, match=r"seed 1, after [\s\S]* -> 0\n.*labels: "):
        walk.run(steps=60, seed=1, raced=False)
