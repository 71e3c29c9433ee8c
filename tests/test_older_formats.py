"""Repositories that earlier versions of this project wrote; each lies in ``data`` as it was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny

from patcher import ModelRepository, add_label, doctor, history, rollback
from patcher.triton.server import EmbeddedTriton

DATA = Path(__file__).parent / "data"


@pytest.fixture(params=sorted(path.name for path in DATA.glob("repository-*")))
def old(request, tmp_path):
    """A copy: three versions (exported, payday added, music renamed to songs), rolled back to the second."""
    return ModelRepository(shutil.copytree(DATA / request.param, tmp_path / "repository")).classifier()


def test_it_opens_as_it_was(old, tree):
    before = tree(old.root)
    assert (old.versions(), old.serving(), old.next_version()) == ((1, 2, 3), 2, 4)
    assert [entry.what() for entry in history(old)] == ["exported", "+payday", "music -> songs"]
    assert old.head().labels == (*tiny.OLD, "payday")
    assert old.memory() is not None
    found = list(doctor.diagnose(old.root, None, "nobody"))
    assert [check.finding for check in found if check.state == "fault"] == []
    assert tree(old.root) == before


@pytest.mark.server
def test_it_is_served_patched_and_rolled_back(old, tmp_path):
    log = tmp_path / "log"
    with EmbeddedTriton(old.root, ["intent", "intent_features"], log_file=log) as triton, triton.client() as server:
        text = tiny.sentences("pizza", 1, seed=7)
        assert server.classify("intent", text)[0].head_version == 2
        assert add_label(old.repository, "pizza", tiny.sentences("pizza", 10), server=server).version == 4
        assert server.classify("intent", text)[0].labels[0] == "pizza"
        rollback(old, 1, server)
        assert server.classify("intent", text)[0].head_version == 1
    assert json.loads((old.root / "patcher.json").read_text()) == {"format": 1}
    assert set(old.journal.published()) == {1, 2, 3, 4}
    assert [check for check in doctor.diagnose(old.root, None, "nobody") if check.state == "fault"] == []
