"""Doctor calls no repository clean if a server would run code from it that patcher did not write."""

from __future__ import annotations

import hashlib

import pytest

from patcher import foreign
from patcher.doctor import diagnose
from patcher.layout import programs
from patcher.names import BackboneNames
from patcher.repository import ModelRepository

INSERTED = {
    "a program that was changed": ("intent_encoder/1/model.py", "import os\n", "no program of this or an earlier"),
    "a library of the backend": ("intent_head/libtriton_onnxruntime.so", "", "libtriton_onnxruntime.so is not"),
    "a numbered library": ("intent_head/1/lib.so.1", "", r"lib.so.1 is not"),
    "a stub": ("intent_encoder/triton_python_backend_stub", "", "stub is not"),
    "a module in the place of another": (
        "intent_encoder/1/tokenizers/__init__.py",
        "",
        "tokenizers/__init__.py is not",
    ),
    "what Python compiled": (
        "intent_encoder/1/__pycache__/model.cpython-310.pyc",
        "",
        "somebody put it there; start the server with PYTHONDONTWRITEBYTECODE=1, and delete it",
    ),
    "what Python compiled of another": ("intent_encoder/1/__pycache__/os.cpython-310.pyc", "", "server may run it"),
    "an environment": ("intent_encoder/env.tar.gz", "", "is an archive"),
    "a later version of a backbone": ("intent_backbone/2/model.onnx", "", "in place of 1/model.onnx"),
    "a program of a later version": ("intent_encoder/2/model.py", "", "2/model.py is not"),
}
CONFIGURED = {
    "another backend": ("intent_head", 'backend: "python"', "backend 'python'; expected 'onnxruntime'"),
    "a platform": ("intent_encoder", 'platform: "pytorch_libtorch"\nbackend: ""', "backend 'pytorch_libtorch'"),
    "an ensemble no more": ("intent", 'platform: "onnxruntime_onnx"', "expected 'ensemble'"),
    "another file": ("intent_head", 'default_model_filename: "other.onnx"', "load the file 'other.onnx'"),
    "a file for a GPU": ("intent_head", 'cc_model_filenames { key: "8.0" value: "o.onnx" }', "load the file 'o.onnx'"),
    "another Python": (
        "intent_encoder", 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/e.tar" } }', "another Python",
    ),
    "operators": ("intent_backbone", 'model_operations { op_library_filename: "x.so" }', "the library 'x.so'"),
    "an agent": ("intent_backbone", 'model_repository_agents { agents { name: "x" } }', "agent 'x'"),
    "a warm-up from a file": (
        "intent_backbone",
        'model_warmup { name: "w" inputs { key: "i" value { input_data_file: "secret" } } }',
        "reads the file 'secret'",
    ),
    "engines": (
        "intent_backbone",
        (
            "optimization { execution_accelerators { gpu_execution_accelerator { "
            "name: 'tensorrt' parameters { key: 'trt_engine_cache_path' value: '/x' } } } }"
        ),
        "trt_engine_cache_path of tensorrt",
    ),
}  # fmt: skip


def faults(classifier):
    found = diagnose(classifier.root, None, "nobody")
    return [f"{check.what}: {check.finding}" for check in found if check.state == "fault"]


@pytest.mark.parametrize("case", INSERTED)
def test_what_runs_beside_the_models(case, classifier):
    name, text, said = INSERTED[case]
    assert faults(classifier) == []
    path = classifier.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert any(said in each and each.startswith(f"{name.partition('/')[0]}, programs") for each in faults(classifier))


@pytest.mark.parametrize("case", CONFIGURED)
def test_what_configurations_may_not_say(case, classifier):
    model, text, said = CONFIGURED[case]
    path = classifier.root / model / "config.pbtxt"
    there = path.read_text()
    for key in (line.split(":")[0] for line in text.splitlines() if line.startswith(("backend:", "platform:"))):
        there = "".join(line for line in there.splitlines(keepends=True) if not line.startswith(f"{key}:"))
    path.write_text(f"{there}\n{text}\n")
    assert any(said in each for each in faults(classifier))


@pytest.mark.parametrize("model", ["intent", "intent_features"])
def test_an_ensemble_asks_no_foreign_model(model, classifier):
    path = classifier.root / model / "config.pbtxt"
    path.write_text(path.read_text().replace('"intent_encoder"', '"evil_encoder"'))
    assert any("asks the model 'evil_encoder'" in each for each in faults(classifier))


def test_the_files_are_listed_once(classifier, monkeypatch):
    """On an object store, each listing covers the whole bucket."""
    repository, calls = ModelRepository(classifier.root), []
    listed = repository.storage.glob
    monkeypatch.setattr(repository.storage, "glob", lambda *patterns: calls.append(patterns) or listed(*patterns))
    assert list(foreign.foreign(repository)) == []
    assert len([patterns for patterns in calls if any(each.startswith("*/*") for each in patterns)]) == 1


def test_programs_of_earlier_versions_are_no_faults(older):
    checks = list(diagnose(older.root, None, "nobody"))
    assert [check.finding for check in checks if check.state == "fault"] == []
    (note,) = (check for check in checks if check.what == "programs")
    assert (note.state, "intent_tokenizer: of an older patcher; `patcher upgrade`" in note.finding) == ("note", True)


def test_every_program_that_was_released_is_known():
    """When a program changes, add its new SHA-256 to the list and keep the old one."""
    for program in programs(BackboneNames("x")).values():
        assert hashlib.sha256(program).hexdigest() in foreign._EARLIER
