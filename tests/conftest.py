from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import hypothesis
import pytest
import tiny

# A machine that runs two servers and two tests at once is slow now and then.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory):
    """Keep the servers' logs and keys apart from those of the user who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_proxy():
    """Tests speak to this machine alone; some libraries would ask a proxy of the environment even so."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def tiny_original(tmp_path_factory):
    """A repository with one tiny trained classifier, made once; tests take copies of it."""
    root = tmp_path_factory.mktemp("tiny") / "model_repository"
    tiny.make_repository(root, root.parent / "scratch")
    return root


@pytest.fixture
def classifier(tiny_original, tmp_path):
    """A fresh copy of the tiny classifier."""
    from patcher import ModelRepository

    root = tmp_path / "model_repository"
    shutil.copytree(tiny_original, root)
    return ModelRepository(root).classifier()


@pytest.fixture(params=sorted(path.name for path in DATA.glob("repository-*")))
def older(request, tmp_path):
    """A repository of an earlier version: exported, payday added, music renamed to songs, rolled back to payday."""
    from patcher import ModelRepository

    return ModelRepository(shutil.copytree(DATA / request.param, tmp_path / "older")).classifier()


@pytest.fixture(scope="session")
def tree():
    """A function that returns every file below a folder with its bytes, to check that a repository is unchanged."""

    def read(root):
        # The lock comes and goes, and the journal also records attempts that were undone.
        paths = (path for path in root.rglob("*") if path.name != ".patcher.lock" and path.suffix != ".journal")
        return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}

    return read


@pytest.fixture
def command(capsys):
    """A function that runs the command line in this process and returns its exit code, stdout and stderr."""
    from patcher.cli import main

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def interruptible():
    """Make Ctrl-C raise even if a shell started the tests in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def torn(monkeypatch):
    """Damage every published head on the disk, after it has passed all checks."""
    from patcher.classifier import Classifier

    publish = Classifier.publish

    def damaged(self, head, *rest):
        publish(self, head, *rest)
        (self.version_path(head.lineage.version) / "model.onnx").write_bytes(b"damaged after the check")

    monkeypatch.setattr(Classifier, "publish", damaged)
