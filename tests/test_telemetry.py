"""ONNX Runtime 1.29 and later send telemetry unless told otherwise; patcher turns it off wherever it imports it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from triton_models import linear

from patcher.triton.server import EmbeddedTriton

ROOT = Path(__file__).resolve().parents[1]
OPEN = """
import sys
{imports}
from patcher.runtime import open_session
open_session(sys.argv[1])
"""


def bare(tmp_path, **more):
    """An environment that does not mention telemetry or look like CI, where ONNX Runtime sends none either."""
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **more}


@pytest.mark.parametrize("imports", ["import patcher", "import export.unpadding", "import patcher.triton.heads.model"])
def test_a_session_leaves_no_trace_of_telemetry(imports, tmp_path):
    if "export" in imports:
        pytest.importorskip("torch")
    (tmp_path / "model.onnx").write_bytes(linear())
    command = [sys.executable, "-c", OPEN.format(imports=imports), str(tmp_path / "model.onnx")]
    subprocess.run(command, env=bare(tmp_path), check=True)
    # With telemetry, ~/.cache/Microsoft holds the machine's identity and what is still to be sent.
    assert [path.name for path in tmp_path.rglob("*")] == ["model.onnx"]


def test_who_wants_it_is_left_alone(tmp_path):
    command = [sys.executable, "-c", "import os, patcher.runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"]
    said = subprocess.run(
        command, env=bare(tmp_path, ORT_DISABLE_TELEMETRY="0"), check=True, capture_output=True, text=True
    )
    assert said.stdout == "0\n"


@pytest.mark.server
def test_a_server_and_its_models_are_told(classifier, tmp_path):
    with EmbeddedTriton(classifier.root, ["intent", "intent_features"], log_file=tmp_path / "log") as server:
        process = psutil.Process(server.pid)
        processes = [process, *process.children(recursive=True)]
        assert len(processes) > 2
        assert {each.environ().get("ORT_DISABLE_TELEMETRY") for each in processes} == {"1"}


def test_the_image_is_told():
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    assert re.search(r"^ENV (.*\\\n)*.*ORT_DISABLE_TELEMETRY=1$", dockerfile, re.MULTILINE)
