"""Writes to a folder that fail midway: they take effect completely or not at all, and error messages are accurate."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest

from patcher import ModelRepository
from patcher.errors import RepositoryError, StorageError
from patcher.storage import disk, moves
from patcher.storage.disk import Disk

FULL = OSError(28, "No space left on device")


@pytest.fixture
def storage(tmp_path):
    (tmp_path / "root").mkdir()
    return Disk(tmp_path / "root")


def failing(monkeypatch, name, at, error=FULL, where=disk):
    """Make call number ``at`` of a function fail, and no other call."""
    real, calls = getattr(where, name), iter(range(1, 100))

    def counted(*args, **more):
        if next(calls) == at:
            raise error
        return real(*args, **more)

    monkeypatch.setattr(where, name, counted)


FOLDERS = {f"b_{role}": {"config.pbtxt": b"new"} for role in ("tokenizer", "backbone", "features")}


@pytest.mark.parametrize("name, at", [("flush_tree", 3), ("flush_folder", 1), ("_share", 2), ("move", 3)])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_folders_are_added_all_or_none(storage, monkeypatch, tree, name, at, error):
    storage.add({"b_backbone": {"config.pbtxt": b"what a killed export left"}})
    before = tree(storage.root)
    failing(monkeypatch, name, at, error)
    with pytest.raises((StorageError, KeyboardInterrupt)) as caught:
        storage.add(FOLDERS)
    assert tree(storage.root) == before
    if error is FULL:
        assert "No space left on device; nothing was changed" in str(caught.value)
    monkeypatch.undo()
    storage.add(FOLDERS)
    assert storage.read("b_backbone/config.pbtxt") == b"new"


def test_folders_are_taken_away_all_or_none(storage, monkeypatch, tree):
    storage.add(FOLDERS)
    before = tree(storage.root)
    failing(monkeypatch, "rename", 3, PermissionError(13, "Permission denied"), Path)
    with pytest.raises(StorageError, match="Permission denied; nothing was taken away"):
        storage.take_away(list(FOLDERS))
    assert tree(storage.root) == before


def test_a_way_back_that_fails_is_told(storage, monkeypatch):
    failing(monkeypatch, "flush_tree", 2)
    rename, calls = Path.rename, iter(range(1, 100))
    monkeypatch.setattr(Path, "rename", lambda *each: rename(*each) if next(calls) < 2 else refuse())

    def refuse():
        raise PermissionError(13, "Permission denied")

    with pytest.raises(StorageError, match="could not be put back as before, either: Permission denied") as caught:
        storage.add(FOLDERS)
    assert "nothing was changed" not in str(caught.value)


@pytest.mark.parametrize("before", [b"old", None])
def test_a_file_that_cannot_be_flushed_is_as_it_was(storage, monkeypatch, before):
    storage.add({"model": {"1/model.py": b"program"}})
    if before is not None:
        storage.replace("model/config.pbtxt", before)
    failing(monkeypatch, "flush_folder", 1, where=moves)
    with pytest.raises(StorageError, match="nothing was changed"):
        storage.replace("model/config.pbtxt", b"new")
    assert storage.find("model/config.pbtxt") == before


@pytest.mark.parametrize("hard_links", [True, False])
def test_what_was_not_made_is_not_dated_anew(storage, monkeypatch, hard_links):
    """A new modification time would make a server reload the model."""
    storage.add({"model": {"config.pbtxt": b"old", "1/model.py": b"program"}})
    path = storage.root / "model" / "config.pbtxt"
    os.utime(path, ns=(10**18,) * 2)
    if not hard_links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: refuse())

    def refuse():
        raise OSError(1, "Operation not permitted")

    with storage.replacing("model/config.pbtxt", b"new") as replacement:
        replacement.undo()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (b"old", 10**18)
    if hard_links:
        monkeypatch.setattr(os, "fsync", lambda _: refuse())
        with storage.replacing("model/config.pbtxt", b"new") as replacement:
            with pytest.raises(OSError, match="not permitted"):
                replacement.make()
            replacement.undo()
        assert (path.read_bytes(), path.stat().st_mtime_ns) == (b"old", 10**18)


def test_configurations_are_replaced_all_or_none_on_a_full_disk(classifier, monkeypatch, tree):
    before = tree(classifier.root)
    real, calls = os.fsync, iter(range(1, 100))

    def full(descriptor):
        if next(calls) > 3:  # the disk is full from here on
            raise FULL
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    models = (classifier.encoder_model, classifier.backbone_model, classifier.head_model)
    texts = {model: classifier.repository.config_text(model) + "\n# new\n" for model in models}
    with pytest.raises(StorageError, match="nothing was changed"):
        classifier.repository.write_configs(texts)
    assert tree(classifier.root) == before


def test_a_way_back_goes_on_after_a_step_that_fails_and_names_all_that_did(classifier, monkeypatch):
    """The disk is full after three new configurations, and two of them cannot be renamed back."""
    models = (classifier.encoder_model, classifier.backbone_model, classifier.head_model)
    paths = [classifier.root / model / "config.pbtxt" for model in models]
    before = [path.read_text() for path in paths]
    real, stuck = Path.replace, (paths[0], paths[2])

    def replace(self, target):
        if self.name == "before" and target in stuck:
            raise OSError(30, "Read-only file system")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    failing(monkeypatch, "flush_folder", 3, where=moves)
    with pytest.raises(StorageError, match="could not be put back as before, either: Read-only") as caught:
        classifier.repository.write_configs(dict.fromkeys(models, "# new\n"))
    said = str(caught.value)
    assert [str(path) in said for path in paths] == [True, False, True]
    assert "nothing was changed" not in said
    assert [path.read_text() for path in paths] == ["# new\n", before[1], "# new\n"]


def test_folders_go_back_after_one_that_does_not(storage, monkeypatch):
    storage.add(FOLDERS)
    real, calls = Path.rename, []

    def rename(self, target):
        calls.append(target.name)
        if len(calls) == 3 or target.name == "b_backbone":
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StorageError, match=f"{storage.root}/b_backbone could not be put back") as caught:
        storage.take_away(list(FOLDERS))
    assert "nothing was taken away" not in str(caught.value)
    assert [name for name in FOLDERS if storage.has(f"{name}/config.pbtxt")] == ["b_tokenizer", "b_features"]


@pytest.mark.parametrize("number", [5, 30])
def test_a_date_that_cannot_be_set_keeps_nothing_from_going_back(storage, monkeypatch, number):
    storage.add({"model": {"config.pbtxt": b"old", "1/model.py": b"program"}})
    failing(monkeypatch, "_date", 2, OSError(number, os.strerror(number)), moves)
    failing(monkeypatch, "flush_folder", 1, where=moves)
    with pytest.raises(StorageError, match="No space left on device; nothing was changed"):
        storage.replace("model/config.pbtxt", b"new")
    assert storage.read("model/config.pbtxt") == b"old"


def test_a_folder_that_cannot_be_looked_at_on_the_way_back_is_told(storage, monkeypatch):
    storage.add({"model": {"config.pbtxt": b"old", "1/model.py": b"program"}})
    failing(monkeypatch, "flush_folder", 1, where=moves)

    def stale(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "samefile", stale)
    with pytest.raises(StorageError, match="could not be put back as before, either: Stale file handle") as caught:
        storage.replace("model/config.pbtxt", b"new")
    assert "nothing was changed" not in str(caught.value)


@pytest.fixture
def classifiers():
    """The files of two classifiers in a folder that all users of the machine can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        root = Path(name)
        root.chmod(0o755)
        for file in ("patcher.json", *(f"{name}{rest}" for name in ("intent", "topics") for rest in FILES)):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text('{"format": 2}')
        yield root


FILES = ("/config.pbtxt", "/1/.keep", "_head/config.pbtxt", "_head/1/model.onnx")


@contextlib.contextmanager
def nobody():
    """Go on as a user who owns nothing."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    "unreadable, look",
    [
        ("topics", ModelRepository.classifiers),
        ("topics_head", ModelRepository.classifiers),
        ("topics_head/1", ModelRepository.versions_by_name),
        ("topics_head", ModelRepository.classifier),
        ("topics_head", lambda repository: repository.classifier("topics")),
    ],
)
def test_a_folder_that_this_user_may_not_read_is_named(classifiers, unreadable, look):
    (classifiers / unreadable).chmod(0o700)
    with nobody(), pytest.raises(RepositoryError, match=rf"{classifiers}/{unreadable}.*: Permission denied"):
        look(ModelRepository(classifiers))


def test_a_repository_that_may_be_entered_but_not_listed_is_named(classifiers):
    classifiers.chmod(0o711)
    with nobody(), pytest.raises(RepositoryError, match=rf"cannot read {classifiers}: Permission denied"):
        ModelRepository(classifiers).classifiers()


@pytest.mark.parametrize("name", ["lost+found", "topics_head/.patcher-staging-1"])
def test_a_folder_that_holds_no_model_may_be_unreadable(classifiers, name):
    (classifiers / name).mkdir(mode=0o700)
    with nobody():
        repository = ModelRepository(classifiers)
        assert repository.classifiers() == ("intent", "topics")
        assert repository.versions_by_name() == {"intent": (1,), "topics": (1,)}


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_folder_that_cannot_be_listed_is_named(storage, monkeypatch, error):
    storage.add(FOLDERS)

    def failing(folder):
        raise error

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(RepositoryError, match=f"cannot read {storage.root}: {error.strerror}"):
        storage.glob("*/config.pbtxt")


@pytest.mark.parametrize(
    "pattern", ["*", "*/*", "*_h*/[0-9]*", "*_head/1/model.onnx", "a/config.pbtxt", "no/*", "a/*/*/*"]
)
def test_patterns_match_what_the_standard_library_matches(storage, pattern):
    storage.add({"a": {"config.pbtxt": b"", "1/.keep": b""}, "a_head": {"1/model.onnx": b"", "12/model.onnx": b""}})
    (storage.root / "link").symlink_to("a")
    (storage.root / "broken").symlink_to("none")
    assert sorted(storage.glob(pattern, pattern)) == sorted(
        path.relative_to(storage.root).as_posix() for path in storage.root.glob(pattern)
    )


@pytest.mark.parametrize("mode", [0o664, 0o644, 0o600])
def test_another_user_sees_who_holds_the_lock(classifiers, mode):
    storage = Disk(classifiers)
    with storage.lock(0):
        (classifiers / ".patcher.lock").chmod(mode)
        with nobody():
            assert storage.busy()
    with nobody():
        assert not storage.busy()


def test_what_another_user_left_when_killed_is_in_nobodys_way(classifiers):
    """The mark of who holds the lock stays after a kill, and only its owner may write it."""
    classifiers.chmod(0o777)
    mark = classifiers / ".patcher-working"
    mark.touch(0o600)
    with nobody(), Disk(classifiers).lock(0):
        assert mark.exists()
    assert not mark.exists()
