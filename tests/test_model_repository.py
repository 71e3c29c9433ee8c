"""``model_repository/`` in git is the plain-text part of a classifier, exactly as export writes it.

Renew it with ``python tests/test_model_repository.py``.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import pytest

COMMITTED = Path(__file__).parent.parent / "model_repository"
WIDTH = 384
"""Width of the last hidden state, as in MiniLM, so that the configurations show a realistic width: 384 + 384."""
DATA = {"model.onnx", "memory.safetensors", "tokenizer.json", ".patcher.lock", "intent.journal"}
"""Files that belong to one checkpoint: binary, or not meant for reading."""
_FINGERPRINT = re.compile(r'(key: "fingerprint"\s+value \{\s+string_value: ")[0-9a-f]{64}"')


def export_texts(folder: Path) -> dict[str, str]:
    """Export a random BERT and return the texts of its repository; the fingerprint belongs to its weights."""
    import checkpoints

    from export import run_export

    checkpoint = checkpoints.save_checkpoint(folder / "checkpoint", "bert", hidden_size=WIDTH)
    root = run_export(checkpoint, folder / "model_repository").repository.root
    return texts(root)


def texts(root: Path) -> dict[str, str]:
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name not in DATA:
            found[str(path.relative_to(root))] = _FINGERPRINT.sub(rf'\g<1>{"0" * 64}"', path.read_text())
    return found


def test_what_is_committed_is_what_export_writes(tmp_path):
    pytest.importorskip("torch")
    committed = texts(COMMITTED)
    assert committed == export_texts(tmp_path)
    assert {name.split("/")[0] for name in committed} == {
        "patcher.json", "intent", "intent_features", "intent_tokenizer", "intent_encoder", "intent_backbone",
        "intent_head",
    }  # fmt: skip


def test_nothing_else_is_committed():
    assert not [path for path in COMMITTED.rglob("*") if path.name in DATA]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as name:
        for where, content in export_texts(Path(name)).items():
            (COMMITTED / where).parent.mkdir(parents=True, exist_ok=True)
            (COMMITTED / where).write_text(content)
