from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import stat

import numpy as np
import pytest
import tiny

from patcher import ModelRepository, add_label, configs, model_config
from patcher.errors import Busy, InputError, PatcherError, RepositoryError, StorageError, VersionError
from patcher.head_file import write_head
from patcher.memory import Memory
from patcher.memory_file import write_memory
from patcher.names import check_name


def next_head(classifier):
    head = classifier.head()
    lineage = dataclasses.replace(head.lineage, version=classifier.next_version(), parent=head.lineage.version)
    return dataclasses.replace(head, lineage=lineage)


def test_the_layout_is_the_contracts(classifier):
    files = {str(p.relative_to(classifier.root)) for p in classifier.root.rglob("*") if p.is_file()}
    assert files - {".patcher.lock"} == {
        "patcher.json",
        "intent.journal",
        "intent/config.pbtxt",
        "intent/1/.keep",
        "intent_features/config.pbtxt",
        "intent_features/1/.keep",
        "intent_encoder/config.pbtxt",
        "intent_encoder/1/model.py",
        "intent_encoder/1/tokenizer.json",
        "intent_tokenizer/config.pbtxt",
        "intent_tokenizer/1/model.py",
        "intent_tokenizer/1/tokenizer.json",
        "intent_backbone/config.pbtxt",
        "intent_backbone/1/model.onnx",
        "intent_head/config.pbtxt",
        "intent_head/1/model.onnx",
        "intent_head/1/memory.safetensors",
    }


def test_configs_parse_back_to_what_the_contract_says(classifier):
    config = classifier.repository.config("intent")
    assert [(t.name, list(t.dims)) for t in config.input] == [("text", [1])]
    assert [(t.name, list(t.dims)) for t in config.output] == [
        ("label", [-1]), ("score", [-1]), ("logits", [-1]), ("head_version", [1]), ("in_scope", [1])
    ]  # fmt: skip
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["intent_encoder", "intent_head"]
    assert configs.asked_by(classifier.repository.config("intent_encoder")) == "intent_backbone"
    head = classifier.repository.config("intent_head")
    assert (head.backend, head.max_batch_size) == ("onnxruntime", 64)
    assert model_config.pinned_versions(head) == (1,)
    assert (
        classifier.repository.config("intent_backbone").parameters["fingerprint"].string_value
        == classifier.fingerprint()
    )


def test_publish_then_pin_then_back(classifier):
    head = next_head(classifier)
    with classifier.repository.lock():
        classifier.publish(head, classifier.memory())
        assert (classifier.versions(), classifier.serving()) == ((1, 2), 1)
        classifier.pin(2)
        assert classifier.serving() == 2
        assert classifier.head().lineage == head.lineage
        with pytest.raises(VersionError, match="serves"):
            classifier.withdraw(2)
        classifier.pin(1)
        classifier.withdraw(2)
    assert (classifier.versions(), classifier.serving()) == ((1,), 1)


def test_a_pin_keeps_what_somebody_tuned(classifier):
    path = classifier.root / "intent_head" / "config.pbtxt"
    path.write_text(path.read_text() + "\nmodel_warmup { name: 'w' batch_size: 1 }\n")
    classifier.publish(next_head(classifier), None)
    classifier.pin(2)
    assert classifier.repository.config("intent_head").model_warmup[0].name == "w"


def test_a_version_is_never_overwritten(classifier, tree):
    head = next_head(classifier)
    classifier.publish(head, None)
    before = tree(classifier.root)
    with pytest.raises(StorageError, match="nothing was changed"):
        classifier.publish(dataclasses.replace(head, labels=tuple(f"x{i}" for i in range(len(head.labels)))), None)
    assert tree(classifier.root) == before


def test_leftovers_of_killed_processes_are_swept(classifier):
    for folder in (classifier.root, classifier.root / "intent_head"):
        (folder / ".patcher-staging-dead").mkdir()
    (classifier.root / ".patcher-working").touch()  # as a killed process leaves it
    with classifier.repository.lock():
        assert not list(classifier.root.rglob(".patcher-staging-*"))
    assert not (classifier.root / ".patcher-working").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "1"}', '{"format": 0}', "not json"])
def test_a_damaged_format_file(classifier, content):
    (classifier.root / "patcher.json").write_text(content)
    with pytest.raises(RepositoryError):
        ModelRepository(classifier.root)


def test_a_newer_format_is_refused(classifier):
    (classifier.root / "patcher.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(RepositoryError, match=r"format 3; .* knows formats up to 2: install a newer one"):
        ModelRepository(classifier.root)


def test_no_repository(tmp_path):
    with pytest.raises(RepositoryError, match="patcher export MODEL --repo"):
        ModelRepository(tmp_path / "none")
    with pytest.raises(RepositoryError, match=r"no patcher\.json"):
        ModelRepository(tmp_path)


def test_a_folder_of_a_repository_is_said_to_lie_in_one(classifier, monkeypatch):
    root = classifier.root
    for name, expected in (("intent", f"--repo {root} --classifier intent"), ("intent_head", f"--repo {root}")):
        with pytest.raises(RepositoryError, match=rf"it lies inside the repository {root}: expected {expected}$"):
            ModelRepository(root / name)
    with pytest.raises(
        RepositoryError, match=rf"no such folder; it lies inside the repository {root}: expected --repo {root}$"
    ):
        ModelRepository(root / "nobody")
    monkeypatch.chdir(root / "intent")
    with pytest.raises(RepositoryError, match=r"--classifier intent$"):
        ModelRepository(".")


def test_which_classifier(classifier, tmp_path):
    repository = classifier.repository
    assert repository.classifier().name == "intent"
    with pytest.raises(InputError, match="it holds intent"):
        repository.classifier("other")
    with repository.lock():
        repository.add_classifier("topic", classifier.head(), backbone="intent")
    assert repository.classifiers() == ("intent", "topic")
    assert repository.classifier("topic").features_model == "intent_features"
    with pytest.raises(InputError, match="2 classifiers"):
        repository.classifier()
    with pytest.raises(InputError, match="no classifier"):
        ModelRepository.create(tmp_path / "empty").classifier()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a b", "x" * 65, "-x", "a\0b", "intent_head", "ä"])
def test_names_that_become_paths_are_checked(name, classifier):
    with pytest.raises(InputError):
        check_name(name)
    with pytest.raises(InputError):
        classifier.repository.classifier(name)


def test_what_exists_is_not_overwritten(classifier, tmp_path, tree):
    before = tree(classifier.root)
    with pytest.raises(InputError, match="already"):
        classifier.repository.add_backbone("intent", tiny.backbone_files(tmp_path))
    with pytest.raises(InputError, match="already"):
        classifier.repository.add_classifier("intent", classifier.head(), backbone="intent")
    assert tree(classifier.root) == before


def test_a_head_of_another_backbone_is_refused(classifier):
    head = classifier.head()
    other = dataclasses.replace(head, lineage=dataclasses.replace(head.lineage, backbone="0" * 64))
    with pytest.raises(RepositoryError, match="belongs to backbone 000000000000"):
        classifier.repository.add_classifier("topic", other, backbone="intent")


def test_a_half_made_export_is_made_anew(classifier, tmp_path):
    # As after a kill between two renames: some parts exist, but not the features ensemble that completes them.
    import shutil

    shutil.rmtree(classifier.root / "intent_features")
    shutil.rmtree(classifier.root / "intent")
    with classifier.repository.lock():
        classifier.repository.add_backbone("intent", tiny.backbone_files(tmp_path))
    assert classifier.repository.has_backbone("intent")
    assert not list(classifier.root.glob(".patcher-*/"))


def hold(root, ready, done):
    with ModelRepository(root).lock():
        ready.set()
        done.wait(30)


def test_the_lock_is_waited_for_and_goes_with_a_dead_process(classifier, monkeypatch):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(classifier.root, ready, done))
    process.start()
    assert ready.wait(60)
    with (
        pytest.raises(Busy, match=r"made no progress for 0\.2 s;"),
        classifier.repository.lock(timeout=0.2),
    ):
        pass
    monkeypatch.setenv("PATCHER_LOCK_TIMEOUT", "0.2")
    with pytest.raises(Busy, match="another patcher"), classifier.repository.lock():
        pass
    left = classifier.root / "intent_head" / ".patcher-staging-dead"
    left.mkdir()
    process.kill()
    process.join()
    with classifier.repository.lock(timeout=10):
        assert not left.exists()
        assert classifier.serving() == 1


@pytest.mark.parametrize("given", ["soon", "-1", "inf", "nan", " "])
def test_a_lock_timeout_that_is_none_is_refused(classifier, monkeypatch, given):
    monkeypatch.setenv("PATCHER_LOCK_TIMEOUT", given)
    said = f"PATCHER_LOCK_TIMEOUT is {given!r}; expected a number of seconds"
    with pytest.raises(InputError, match=said), classifier.repository.lock():
        pass


def test_a_read_only_folder(classifier, tree, monkeypatch):
    # Simulate the kernel's refusal, because a test that runs as root may write to any folder.
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    before = tree(classifier.root)
    monkeypatch.setattr("tempfile.mkdtemp", refused)
    with pytest.raises(StorageError, match="Permission denied; nothing was changed"):
        classifier.publish(next_head(classifier), None)
    assert tree(classifier.root) == before


@pytest.mark.parametrize("lock", ["none yet", "of an earlier version"])
def test_a_narrow_umask_keeps_nobody_out(classifier, lock):
    config, journal, held = (
        classifier.root / name for name in ("intent_head/config.pbtxt", "intent.journal", ".patcher.lock")
    )
    config.chmod(0o664)
    (classifier.root / "intent_head").chmod(0o2775)
    classifier.root.chmod(0o2775)
    journal.unlink()
    held.chmod(0o644)
    if lock == "none yet":
        held.unlink()
    before = os.umask(0o077)
    try:
        with classifier.repository.lock():
            classifier.publish(next_head(classifier), None)
            classifier.pin(2)
            classifier.repository.add_classifier("topic", classifier.head(), backbone="intent")
    finally:
        os.umask(before)
    new = classifier.root / "intent_head" / "2"
    files, folders = (
        (config, journal, held, new / "model.onnx", classifier.root / "topic" / "config.pbtxt"),
        (new, classifier.root / "topic_head" / "2"),
    )
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (*files, *folders)}
    assert modes == dict.fromkeys(files, 0o664) | dict.fromkeys(folders, 0o2775)


def test_a_new_repository_in_a_shared_folder_is_open_to_all_who_share_it(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    before = os.umask(0o077)
    try:
        ModelRepository.create(shared)
    finally:
        os.umask(before)
    assert stat.S_IMODE((shared / "patcher.json").stat().st_mode) == 0o664


def test_a_full_disk(classifier, tree, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = tree(classifier.root)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; nothing was changed"):
        classifier.publish(next_head(classifier), None)
    with pytest.raises(StorageError, match="No space left"):
        classifier.pin(1)
    monkeypatch.undo()
    assert tree(classifier.root) == before


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_head_is_named(classifier, damage):
    path = classifier.root / "intent_head" / "1" / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000] if damage is None else damage)
    with pytest.raises(PatcherError, match=r"intent_head/1/model\.onnx"):
        classifier.head()


def test_a_head_for_other_features_is_named_by_every_verb_that_reads_it(classifier, tree, tmp_path, command):
    head = next_head(classifier)
    width, none = head.width + 1, np.zeros((0, head.width + 1), np.float32)
    other = dataclasses.replace(head, width=width, patch_weight=none, scope=None)
    folder = classifier.root / "intent_head" / "2"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(write_head(other.with_rows(["new"], np.ones((1, width)), np.zeros(1))))
    data, page = tiny.write_csv(tmp_path / "eval.csv", tiny.train_set(3)), tmp_path / "page.html"
    before = tree(classifier.root)
    for verb in (
        ("evaluate", data, "--version", 2),
        ("diff", 1, 2, "--eval", data),
        ("report", "--version", 2, "--html", page, "--eval", data),
        ("rollback", "--to", 2, "--no-load"),
    ):
        code, _, said = command(verb[0], *verb[1:], "--repo", classifier.root)
        assert (code, "version 2 of intent is for 49 features; expected 48" in said) == (2, True), (verb, said)
        assert "switch to another version and prune this one" in said
    assert tree(classifier.root) == before
    classifier.pin(2)
    assert command("rollback", "--to", 1, "--no-load", "--repo", classifier.root)[0] == 0


def test_a_memory_for_other_features_is_named_and_built_anew(classifier, command, tmp_path):
    other = Memory.build(np.eye(3, classifier.width() + 1), [0, 1, 2], ["a", "b", "c"], classifier.head().split)
    (classifier.version_path(1) / "memory.safetensors").write_bytes(write_memory(other))
    (classifier.root / "intent.journal").unlink()
    with pytest.raises(RepositoryError, match=r"the memory of version 1 of intent is for 49 features; expected 48"):
        add_label(classifier, "new", tiny.sentences("music", 10))
    data = tiny.write_csv(tmp_path / "train.csv", tiny.train_set(5))
    assert command("remember", "--data", data, "--no-load", "--repo", classifier.root)[0] == 0
    assert classifier.memory().width == classifier.width()


def test_a_backbone_that_does_not_tell_its_features_is_named(classifier):
    path = classifier.root / "intent_backbone" / "config.pbtxt"
    path.write_text(path.read_text().replace("output", "input", 1))
    with pytest.raises(RepositoryError, match=r"intent_backbone/config\.pbtxt has outputs of dims \[\]; expected one"):
        classifier.head()


def test_a_damaged_config_is_named(classifier):
    (classifier.root / "intent_head" / "config.pbtxt").write_text("name: [")
    with pytest.raises(RepositoryError, match=r"intent_head/config\.pbtxt"):
        classifier.serving()


def test_the_configurations_of_a_thousand_classifiers_are_parsed_once(monkeypatch):
    from google.protobuf import text_format

    parsed, parse = [], text_format.Parse
    monkeypatch.setattr(text_format, "Parse", lambda *args: parsed.append(1) or parse(*args))
    texts = [f'name: "scraped_{number}"' for number in range(2000)]
    names = [model_config.parse(text).name for text in texts * 2]
    assert names[0] == names[len(texts)] == "scraped_0"
    assert len(parsed) == len(texts)
