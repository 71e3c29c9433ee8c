"""Interrupted patches, changed files, several patchers and several servers, on real tritonservers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny
from processes import freeze, living_stubs

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import kill
import swaps
import together

from patcher import (
    Examples,
    Fleet,
    ModelRepository,
    NotServed,
    PatchSettings,
    TritonServer,
    add_label,
    canary,
    doctor,
    prune,
    read_examples,
    rollback,
    sync,
)
from patcher.classifier import Classifier
from patcher.cli import main
from patcher.difference import diff
from patcher.errors import (
    Busy,
    ControlRefused,
    GateRefused,
    InputError,
    LabelError,
    RepositoryError,
    ServerError,
    ServerUnreachable,
    StorageError,
    VersionError,
)
from patcher.fleet import addresses, resolved, watch, waves
from patcher.gate import judge
from patcher.head import MULTI_LABEL, Head
from patcher.journal import Journal
from patcher.lifecycle import history
from patcher.memory import Memory
from patcher.metrics import Targets, _probes
from patcher.names import check_name
from patcher.recovery import changing, recover
from patcher.relabelling import _theirs, merge_labels, merged, remove_label, rename_label
from patcher.remembering import remember
from patcher.serve import cache_options
from patcher.serving import with_response_cache
from patcher.storage.disk import Disk
from patcher.triton.server import EmbeddedTriton
from patcher.tune import tune

MODELS = ["intent", "intent_features", "intent_backbone"]
HEALTH = Path(__file__).parents[1] / "docker" / "healthcheck.py"
TEN = tiny.sentences("payday", 10)


def faults(classifier, server=None):
    return [check for check in doctor.diagnose(classifier.root, server, "url") if check.state == "fault"]


def patched(classifier, label="payday"):
    return add_label(classifier.repository, label, tiny.sentences(label, 10)).version


class TestJournal:
    def test_every_file_that_is_published_is_in_it_and_a_change_shows(self, classifier):
        version = patched(classifier)
        assert faults(classifier) == []
        path = classifier.version_path(version) / "memory.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        (fault,) = [check for check in faults(classifier) if "changed after it was published" in check.finding]
        assert f"version {version}" in fault.what and "memory.safetensors" in fault.finding

    def test_what_was_read_once_is_read_again_where_it_changed(self, classifier):
        patched(classifier)
        before = classifier.journal.entries()
        before.clear()  # this list belongs to the caller
        known = classifier.journal.entries()
        path = classifier.journal.path
        text = path.read_text()
        other = Classifier(classifier.repository, classifier.name)
        other.note("done", serving=2)
        assert classifier.journal.entries()[:-1] == known
        path.write_text(text)
        assert classifier.journal.entries() == known
        path.write_text(text.replace('"parent": 1', '"parent": 0'))
        with pytest.raises(RepositoryError, match="does not follow from the line before it"):
            classifier.journal.entries()
        path.unlink()
        assert classifier.journal.entries() == []

    def test_a_changed_line_shows_and_repair_begins_anew(self, classifier):
        patched(classifier)
        path = classifier.journal.path
        path.write_text(path.read_text().replace('"parent": 1', '"parent": 0'))
        with pytest.raises(RepositoryError, match="does not follow from the line before it"):
            classifier.journal.entries()
        assert any("journal" in check.what for check in faults(classifier))
        assert list(doctor.repair(classifier.root, None))
        assert faults(classifier) == []
        assert path.with_name(path.name + ".damaged-1").is_file()
        assert set(classifier.journal.published()) == {1, 2}

    @pytest.mark.parametrize("line", ["{}", "[]", "nonsense", '{"event": 3}', '{"event": "publish", "previous": ""}'])
    def test_nonsense_is_named_by_its_line(self, classifier, line):
        classifier.journal.path.write_text(line + "\n")
        with pytest.raises(RepositoryError, match="line 1, is not an entry"):
            classifier.journal.entries()

    def test_a_torn_last_line_does_not_count(self, classifier):
        before = classifier.journal.entries()
        with classifier.journal.path.open("ab") as file:
            file.write(b'{"event": "publ')
        assert classifier.journal.entries() == before
        assert patched(classifier) == 2
        assert faults(classifier) == []

    def test_a_line_that_does_not_fit_leaves_nothing(self, classifier):
        """The disk fills up within a line: the kernel writes a part of it, then refuses the rest."""
        path = classifier.journal.path
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        try:
            with pytest.raises(StorageError, match="File too large; nothing was changed"):
                classifier.journal.append("done", serving=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert path.read_bytes() == before

    def test_numbers_are_never_given_twice(self, classifier):
        patched(classifier)
        rollback(classifier)
        with classifier.repository.lock():
            classifier.withdraw(2)
        assert classifier.versions() == (1,)
        assert patched(classifier) == 3

    def test_a_repository_without_a_journal_opens_and_gets_one(self, classifier):
        classifier.journal.path.unlink()
        assert faults(classifier) == []
        assert patched(classifier) == 2
        assert set(classifier.journal.published()) == {1, 2}


class TestInterrupted:
    def test_published_and_not_pinned_is_withdrawn(self, classifier):
        version = patched(classifier)
        rollback(classifier)
        head = classifier.head(version)
        lines = classifier.journal.path.read_bytes().splitlines(keepends=True)
        cut = next(i for i, line in enumerate(lines) if b'"switch"' in line)
        classifier.journal.path.write_bytes(b"".join(lines[:cut]))
        assert "interrupted: version 2 was being published" in faults(classifier)[0].finding
        with classifier.repository.lock():
            assert "withdrawn" in str(recover(classifier))
        assert classifier.versions() == (1,)
        assert faults(classifier) == []
        assert classifier.next_version() == head.lineage.version + 1

    def test_pinned_stays(self, classifier):
        patched(classifier)
        lines = classifier.journal.path.read_bytes().splitlines(keepends=True)
        assert b'"done"' in lines[-1]
        classifier.journal.path.write_bytes(b"".join(lines[:-1]))
        with changing(classifier):
            pass
        assert (classifier.serving(), classifier.journal.pending()) == (2, None)

    @pytest.fixture
    def half_pruned(self, classifier, monkeypatch):
        """A classifier of four versions whose patcher was killed when it was about to delete the first two."""

        class KilledError(BaseException):
            pass

        def killed(*_):
            raise KilledError

        for label in tiny.NEW:
            patched(classifier, label)
        with monkeypatch.context() as patch:
            patch.setattr(Disk, "take_away", killed)
            with pytest.raises(KilledError):
                prune(classifier, 2)
        assert classifier.versions() == (1, 2, 3, 4)
        return classifier

    def test_an_interrupted_pruning_is_told_and_finished_by_the_next_change(self, half_pruned):
        (told,) = faults(half_pruned)
        assert (told.what, told.state) == ("intent, journal", "fault")
        assert told.finding.startswith(
            "interrupted: versions 1, 2 are still there after a pruning; `patcher doctor --r"
        )
        assert patched(half_pruned, "other") == 5
        assert half_pruned.versions() == (3, 4, 5)
        assert faults(half_pruned) == []

    def test_an_interrupted_pruning_is_finished_by_the_next_one(self, half_pruned):
        assert prune(half_pruned, 2) == ()
        assert half_pruned.versions() == (3, 4)

    def test_an_interrupted_pruning_is_finished_by_doctor(self, half_pruned):
        assert [check.finding for check in doctor.repair(half_pruned.root, None)] == [
            "finished: versions 1, 2 are pruned"
        ]
        assert half_pruned.versions() == (3, 4)
        assert faults(half_pruned) == []

    def test_a_pruning_under_way_is_no_fault(self, half_pruned):
        with half_pruned.repository.lock():
            assert faults(half_pruned) == []

    @pytest.mark.parametrize("step, published", [(1, None), (2, 2), (0, None)])
    def test_kill_9_comes_before_the_step_that_was_asked_for(self, classifier, step, published):
        verb = ["rename-label", "music", "songs", "--no-load", "--repo", str(classifier.root)]
        ended = subprocess.run([sys.executable, kill.STEPS, "1", str(step), *verb], stdout=subprocess.PIPE, check=False)
        said, pending = ended.stdout.splitlines(), classifier.journal.pending()
        assert ended.returncode == (-signal.SIGKILL if step else 0)
        assert said[0] == b"begun"
        assert (pending and pending.published) == published
        assert step or len(json.loads(said[-1])) > 10

    @pytest.mark.server
    @pytest.mark.slow
    def test_kill_9_with_a_server(self):
        found = kill.run(9, seed=3)
        assert found["journal: interrupted"] >= 5


def test_pruning_spares_what_serves_and_its_parent(classifier):
    for label in tiny.NEW:
        patched(classifier, label)
    rollback(classifier, 2)
    assert prune(classifier, 1) == (3,)
    assert classifier.versions() == (1, 2, 4)
    with pytest.raises(VersionError, match="version 3 of intent was pruned; there are 1, 2, 4"):
        rollback(classifier, 3)
    rollback(classifier, 4)
    assert prune(classifier, 1) == (1, 2)
    assert [entry.lineage.version for entry in history(classifier)] == [4]
    assert faults(classifier) == []
    assert patched(classifier, "another") == 5


def test_pruning_makes_room_on_a_full_disk(classifier, monkeypatch):
    for label in tiny.NEW:
        patched(classifier, label)

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")  # as ext4 does for a new folder, but not for a new name

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(StorageError, match="No space left on device; nothing was changed"):
        rollback(classifier)
    assert prune(classifier, 1) == (1, 2)
    assert classifier.versions() == (3, 4)
    assert not list(classifier.root.rglob(".patcher-staging-*"))


def test_a_queue_that_gets_on_is_no_reason_to_give_up(classifier, monkeypatch):
    """As long as the holders of the lock complete changes, a waiter keeps waiting; it gives up once they stop."""

    looks, progress = iter(range(100)), Disk._progress

    def changing(self):
        if next(looks) in range(1, 5):
            classifier.journal.append("done", serving=1)
        return progress(self)

    monkeypatch.setattr(Disk, "_progress", changing)
    waiting = ModelRepository(classifier.root)
    with classifier.repository.lock(), pytest.raises(Busy), waiting.lock(timeout=0.05):
        pass
    assert next(looks) >= 6


@pytest.mark.server
@pytest.mark.slow
def test_patchers_at_once_lose_no_label():
    found = together.run(patchers=3, labels=2)
    assert found["labels_served"] == 6
    assert found["versions"] == 7
    assert found["reachable"] == 7


@pytest.fixture
def mounted(classifier, tmp_path):
    """A separate file system, with room for the repository and one or two versions."""
    folder = tmp_path / "small"
    folder.mkdir()
    size = sum(path.stat().st_blocks * 512 for path in classifier.root.rglob("*")) + 131072
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here; the test with a limit on the size of files stands in")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path):
    with path.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


class TestFaults:
    def test_a_disk_that_is_full(self, classifier, tree):
        """A limit on file sizes makes the kernel refuse real writes, at any stage of the patch."""
        before = tree(classifier.root)
        script = (
            "import sys, resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); limit = int(sys.argv[1])\n"
        )
        script += "from patcher.cli import main; import patcher.labelling; sys.dont_write_bytecode = True\n"
        script += "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); sys.exit(main(sys.argv[2:]))"
        texts = [argument for text in TEN for argument in ("--text", text)]
        sizes = [file.stat().st_size for file in classifier.version_path(1).iterdir()]
        for limit in (10, 700, min(sizes) - 100, max(sizes) - 100):
            command = [sys.executable, "-c", script, str(limit), "add-label", "payday", *texts, "--no-load"]
            done = subprocess.run(
                [*command, "--repo", str(classifier.root)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 1, (limit, done.stderr)
            assert "File too large; nothing was changed" in done.stderr
            assert tree(classifier.root) == before
        # With some limits not even "undone" fits into the journal; the next change then records it.
        assert patched(classifier) > 1
        assert faults(classifier) == []

    def test_a_file_system_without_room_or_read_only(self, classifier, mounted, tree, monkeypatch):
        full = ModelRepository(shutil.copytree(classifier.root, mounted / "repository")).classifier()
        with pytest.raises(OSError, match="No space left"):
            fill(mounted / "ballast")
        before = tree(full.root)
        with pytest.raises(StorageError, match="No space left on device; nothing was changed"):
            patched(full)
        assert tree(full.root) == before
        (mounted / "ballast").unlink()
        assert patched(full) > 1
        assert faults(full) == []
        subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
        before = tree(full.root)
        monkeypatch.setattr(EmbeddedTriton, "start", lambda _: pytest.fail("tuned for nothing"))
        changes = [rollback, lambda target: patched(target, "pizza"), lambda target: prune(target, 1)]
        for change in (*changes, lambda target: tune(target, TEN)):
            with pytest.raises(StorageError, match="Read-only file system; nothing was changed"):
                change(full)
        assert tree(full.root) == before
        assert faults(full) == []

    @pytest.mark.server
    def test_a_server_that_hangs_dies_or_lies(self, classifier, tmp_path, monkeypatch):
        with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log") as triton:
            load = TritonServer.load

            def stopped(self, model):
                freeze(triton.pid)
                hasty.timeout = 3
                load(self, model)

            monkeypatch.setattr(TritonServer, "load", stopped)
            with TritonServer(triton.url) as hasty, pytest.raises(NotServed, match="within 3 s"):
                add_label(classifier.repository, "payday", TEN, server=hasty)
            os.kill(triton.pid, signal.SIGCONT)
            monkeypatch.undo()
            assert classifier.serving() == 1
            with triton.client() as server:
                # The next command completes what the undo could not do.
                assert classifier.journal.pending()
                with changing(classifier, server):
                    pass
                assert faults(classifier, server) == []
                assert server.classify("intent", TEN)[0].head_version == 1

                # Triton reports OK, but the ensemble is gone, because the head lost an output that it maps.
                answers = []

                def lying(self, model):
                    if classifier.serving() != 1:
                        config = classifier.repository.config("intent_head")
                        config.output.remove(next(each for each in config.output if each.name == "in_scope"))
                        (classifier.root / "intent_head" / "config.pbtxt").write_text(str(config))
                    load(self, model)
                    answers.append((classifier.serving(), self.is_ready("intent")))

                monkeypatch.setattr(TritonServer, "load", lying)
                with pytest.raises(NotServed, match="Version 1 serves again"):
                    add_label(classifier.repository, "payday", TEN, server=server)
                monkeypatch.undo()
                assert [ready for _, ready in answers] == [False, True]
                assert server.classify("intent", TEN)[0].head_version == 1

                def killed(self, model):
                    if triton.pid:
                        os.kill(triton.pid, signal.SIGKILL)
                    load(self, model)

                monkeypatch.setattr(TritonServer, "load", killed)
                with pytest.raises(NotServed, match="could not be brought back"):
                    add_label(classifier.repository, "payday", TEN, server=server)
                monkeypatch.undo()
        assert classifier.serving() == 1
        with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log") as triton, triton.client() as server:
            assert server.classify("intent", TEN)[0].head_version == 1
            with pytest.raises(ServerUnreachable, match="nothing was changed"):
                rollback(classifier, 1, TritonServer("127.0.0.1:1"))
            assert add_label(classifier.repository, "payday", TEN, server=server).served
            assert faults(classifier, server) == []

    @pytest.mark.server
    def test_a_server_that_hangs_is_waited_for_once(self, classifier, tmp_path):
        with classifier.repository.lock():
            other = classifier.repository.add_classifier("other", classifier.head(), backbone="intent")
        with EmbeddedTriton(classifier.root, [*MODELS, "other"], log_file=tmp_path / "log") as triton:
            with TritonServer(triton.url) as server:
                assert faults(classifier, server) == []
                freeze(triton.pid)
                server.timeout = 2
                try:
                    (fault,) = faults(classifier, server)
                    with mock.patch.object(server, "_asked", wraps=server._asked) as asked:
                        (state,) = sync(other, server).values()
                finally:
                    os.kill(triton.pid, signal.SIGCONT)
                server.timeout = 60
                assert (fault.what, "no further checks were made on it" in fault.finding) == ("server", True)
                assert "does not answer; run `patcher sync` again when it does" in state
                assert asked.call_count == 1
                assert sync(other, server) == {triton.url: "agreed"}
                (other.version_path(1) / "model.onnx").write_bytes(b"damaged")
                (state,) = sync(other, server).values()  # `patcher sync` continues with the others
                assert state.startswith("failed: ") and "other_head/1/model.onnx" in state

    @pytest.mark.server
    def test_models_whose_process_died_answer_again_after_a_sync(self, classifier, tmp_path):
        with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log") as triton, triton.client() as server:
            for names in (["intent_encoder"], ["intent_head"], ["intent_encoder", "intent_head"]):
                for stub in living_stubs(triton.pid, *names):
                    stub.kill()
                with pytest.raises(ServerError, match="is not healthy"):
                    server.classify("intent", TEN)
                assert server.is_ready("intent")  # according to Triton
                assert faults(classifier, server)
                assert sync(classifier, server) == {server.url: "caught up"}
                assert server.classify("intent", TEN)[0].head_version == 1
                assert server.is_ready("intent_features")
                assert faults(classifier, server) == []
            os.kill(triton.pid, signal.SIGKILL)  # it would wait for the dead stubs

    @pytest.mark.server
    def test_a_response_cache_hides_no_encoder_that_died(self, classifier, tmp_path):
        path = classifier.root / "intent_encoder" / "config.pbtxt"
        path.write_text(with_response_cache(path.read_text(), enable=True))
        options = cache_options(classifier.repository)
        triton = EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log", options=options)
        with triton, triton.client() as server:
            assert faults(classifier, server) == []
            (encoder,) = living_stubs(triton.pid, "intent_encoder")
            encoder.kill()
            assert "is not healthy" in faults(classifier, server)[0].finding
            os.kill(triton.pid, signal.SIGKILL)  # it would wait for the dead stub

    @pytest.mark.server
    def test_a_server_that_lacks_the_backbone_reads_another_repository(self, classifier, tmp_path):
        other = shutil.copytree(classifier.root, tmp_path / "other")
        with EmbeddedTriton(other, ["intent"], log_file=tmp_path / "log") as triton, triton.client() as server:
            shutil.rmtree(other / "intent_backbone")  # the encoder still runs it in its own process
            told = r"has no model intent_backbone.*failed to poll.*is --repo the repository that this server serves"
            with pytest.raises(ServerError, match=told):
                add_label(classifier.repository, "payday", TEN, server=server)
            assert (classifier.versions(), classifier.journal.pending()) == ((1,), None)

    @pytest.mark.server
    @pytest.mark.slow
    def test_one_of_several_instances_that_died_is_seen_each_time(self, classifier, tmp_path):
        for model in ("intent_encoder", "intent_head"):
            path = classifier.root / model / "config.pbtxt"
            path.write_text(path.read_text().replace("count: 1", "count: 3"))
        served = tmp_path / "classifiers"
        served.write_text("intent")
        environment = {**os.environ, "TMPDIR": str(tmp_path), "TRITON_MODEL_REPO": str(classifier.root)}
        with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log") as triton, triton.client() as server:
            health = [sys.executable, str(HEALTH), triton.http_url]

            def seen():
                """Whether doctor, the container's health and liveness checks, and the exporter each notice it."""
                (probe,) = _probes(Targets((triton.url,), ("intent",)))
                codes = [
                    subprocess.run([*health, *live], env=environment, capture_output=True, check=False).returncode
                    for live in ((), ("--live",))
                ]
                return bool(faults(classifier, server)), *map(bool, codes), not probe.up

            assert not any(seen())
            for model in ("intent_encoder", "intent_head"):
                living_stubs(triton.pid, model)[1].kill()
                assert all(seen() + seen())
                assert sync(classifier, server) == {triton.url: "caught up"}
                assert not any(seen())
            os.kill(triton.pid, signal.SIGKILL)  # it would wait for the dead stubs

    @pytest.mark.server
    def test_a_server_that_takes_no_model_control_is_told_so_before_anything_is_published(self, classifier, tmp_path):
        class Fixed(EmbeddedTriton):
            def command(self):
                loaded = [word for word in super().command() if not word.startswith("--load-model")]
                return [word.replace("=explicit", "=none") for word in loaded]

        with Fixed(classifier.root, MODELS, log_file=tmp_path / "log") as triton, triton.client() as server:
            with pytest.raises(ControlRefused, match="start it with --model-control-mode=explicit"):
                add_label(classifier.repository, "payday", TEN, server=server)
            assert (classifier.versions(), classifier.journal.pending()) == ((1,), None)
            # If the server already serves the target of an interrupted change, recovery needs no model control.
            classifier.journal.append("switch", **{"from": 2, "to": 1})
            assert recover(classifier, server) == "finished: version 1 serves"

    @pytest.mark.server
    def test_a_recovery_without_the_key_decides_nothing(self, classifier, tmp_path):
        with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log", admin_key="k" * 32) as triton:
            with triton.client() as server:
                add_label(classifier.repository, "payday", TEN, server=server)
            classifier.journal.append("switch", **{"from": 1, "to": 2})  # killed before it could record the end
            with TritonServer(triton.url) as stranger:
                assert recover(classifier, stranger) == "finished: version 2 serves"
                patched(classifier, "pizza")  # without a server
                classifier.journal.append("switch", **{"from": 2, "to": 3})
                with classifier.repository.lock(), pytest.raises(ControlRefused, match="no admin key"):
                    recover(classifier, stranger)
            assert classifier.serving() == 3
            with triton.client() as server:
                assert recover(classifier, server) == "finished: version 3 serves"
                assert server.classify("intent", TEN)[0].head_version == 3

    @pytest.mark.server
    def test_what_lies_beside_or_was_loaded_by_others_does_not_serve(self, classifier, tmp_path):
        """Triton's traps: a restart beside a corrupt version, readiness after a refused load, a load of raw bytes."""
        patched(classifier)
        rollback(classifier)
        corrupt = classifier.root / "intent_head" / "9"
        corrupt.mkdir()
        (corrupt / "model.onnx").write_bytes(b"torn")
        config = classifier.root / "intent_head" / "config.pbtxt"
        good = config.read_text()
        with (
            EmbeddedTriton(classifier.root, MODELS, open_control=True, log_file=tmp_path / "log") as triton,
            triton.client() as server,
        ):
            assert server.classify("intent", TEN)[0].head_version == 1
            with pytest.raises(RepositoryError, match="not an ONNX file"):
                rollback(classifier, 9, server)
            config.write_text(good.replace("versions: 1", "versions: 9"))
            with pytest.raises(ServerError):
                server.load("intent_head")
            ready = urllib.request.urlopen(f"http://{triton.http_url}/v2/health/ready")
            assert ready.status == 200
            assert server.classify("intent", TEN)[0].head_version == 1
            config.write_text(good)
            shutil.rmtree(corrupt)
            # Somebody loads bytes that the repository does not pin: doctor notices, and sync restores what is pinned.
            by_bytes = json.dumps({"version_policy": {"specific": {"versions": [2]}}, **_as_json(classifier)})
            server._client.load_model("intent_head", config=by_bytes, files={
                "file:2/model.onnx": classifier.head_bytes(2)
            })  # fmt: skip
            assert server.classify("intent", TEN)[0].head_version == 2
            assert "answers from head version 2; expected 1" in faults(classifier, server)[0].finding
            assert sync(classifier, server) == {server.url: "caught up"}
            assert faults(classifier, server) == []

    @pytest.mark.server
    def test_files_dated_ahead_of_the_clock(self, classifier, tmp_path, monkeypatch):
        """Triton reloads a model only if the newest modification time in its folder has increased."""
        ahead = time.time() + 3600
        for path in (classifier.root / "intent_head").rglob("*"):
            os.utime(path, (ahead, ahead))
        with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log") as triton, triton.client() as server:
            assert add_label(classifier.repository, "payday", TEN, server=server).served
            assert rollback(classifier, server=server).served
            load = TritonServer.load

            def refused(self, model):
                load(self, model)
                if classifier.serving() == 2:
                    raise ServerError("no memory")

            monkeypatch.setattr(TritonServer, "load", refused)
            with pytest.raises(NotServed, match="Version 1 serves again"):
                rollback(classifier, 2, server)
            assert server.classify("intent", TEN)[0].head_version == 1

    @pytest.mark.server
    def test_swaps_under_load(self):
        found = swaps.run(6, clients=2, warm=2)
        assert (found["failures"], found["contradictions"], found["versions_seen"]) == (0, [], [1, 2])
        assert found["requests"] > 20


def _as_json(classifier):
    from google.protobuf import json_format

    config = classifier.repository.config("intent_head")
    config.version_policy.Clear()
    return json_format.MessageToDict(config, preserving_proto_field_name=True)


def test_addresses_and_waves():
    assert addresses("a:1, b:2,a:1") == ("a:1", "b:2")
    assert addresses("localhost:8001") == ("localhost:8001",)
    assert resolved("localhost:8001") == ["127.0.0.1:8001"]
    assert resolved("no.such.host.invalid:8001") == ["no.such.host.invalid:8001"]
    assert [len(wave) for wave in waves([TritonServer("a:1")] * 9)] == [1, 2, 4, 2]


@pytest.mark.parametrize(
    "older, newer, found",
    [
        (3, 0, ["10.0.0.1:8001", "10.0.0.2:8001", "10.0.0.3:8001"]),
        (0, 2, ["[fd00::1]:8001", "[fd00::2]:8001"]),
        (2, 2, ["10.0.0.1:8001", "10.0.0.2:8001"]),  # each machine has both kinds of address
        (1, 1, ["triton:8001"]),
        (0, 1, ["triton:8001"]),
    ],
)
def test_a_name_of_several_machines_stands_for_each_of_them_once(monkeypatch, older, newer, found):
    known = [(socket.AF_INET, 1, 6, "", (f"10.0.0.{number + 1}", 8001)) for number in range(older)]
    known += [(socket.AF_INET6, 1, 6, "", (f"fd00::{number + 1}", 8001, 0, 0)) for number in range(newer)]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: known)
    assert list(addresses("triton:8001")) == found
    for url in found:
        assert TritonServer(url).url == url


@pytest.mark.server
class TestFleet:
    @pytest.fixture
    def fleet(self, classifier, tmp_path):
        servers = [EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / f"{n}.log") for n in range(3)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(EmbeddedTriton.start, servers))
        yield servers
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(EmbeddedTriton.stop, servers))

    def test_all_or_none_and_one_that_was_away_catches_up(self, classifier, fleet, tmp_path, capsys):
        from patcher.cli import main

        urls = [triton.url for triton in fleet]

        def versions():
            found = []
            for triton in fleet:
                with triton.client() as server:
                    found.append(server.classify("intent", TEN)[0].head_version if server.is_live() else None)
            return found

        with Fleet(urls, watch_seconds=0.3) as server:
            assert add_label(classifier.repository, "payday", TEN, server=server).version == 2
            assert versions() == [2, 2, 2]
            # The last replica fails: all are put back, including those that already served the new version.
            broken = server.members[2]

            def refuse(_model):
                del broken.load
                raise ServerError("no memory left")

            broken.load = refuse
            with pytest.raises(NotServed, match=r"no memory left.*Version 2 serves again"):
                add_label(classifier.repository, "pizza", tiny.sentences("pizza", 10), server=server)
            assert versions() == [2, 2, 2]
            assert classifier.serving() == 2
        # The first replica fails while it is watched: the others are never asked.
        with Fleet(urls, watch_seconds=1.0) as server:
            asked = []
            for member in server.members[1:]:
                member.load = asked.append
            counts = iter([0, 5])
            server.members[0].statistics = lambda _: [type("Entry", (), {"failures": next(counts)})]
            with pytest.raises(NotServed, match="5 requests to intent_head failed"):
                add_label(classifier.repository, "pizza", tiny.sentences("pizza", 10), server=server)
            assert asked == []
            assert versions() == [2, 2, 2]
        # No replica answered at the start. That one does now proves nothing about what it serves.
        with Fleet(["127.0.0.1:1", "127.0.0.1:2"]) as server:
            server.is_live = lambda: True
            with pytest.raises(ServerUnreachable, match="nothing was changed"):
                rollback(classifier, 1, server)
        fleet[1].stop()
        arguments = [
            "--repo",
            str(classifier.root),
            "--watch",
            "0.2",
            "--url",
            urls[0],
            "--url",
            f"{urls[1]},{urls[2]}",
        ]
        assert main(["rollback", *arguments]) == 0
        assert f"warning: {urls[1]} does not answer" in capsys.readouterr().err
        assert versions() == [1, None, 1]
        assert main(["sync", *arguments, "--json"]) == 1
        states = {entry["url"]: entry["state"] for entry in json.loads(capsys.readouterr().out)}
        assert states == {urls[0]: "agreed", urls[1]: "away", urls[2]: "agreed"}
        # A replica that kept serving while cut off is behind; one that restarts reads the files.
        classifier.pin(2)
        with Fleet([urls[0], urls[2]]) as server:
            assert sync(classifier, server) == {urls[0]: "caught up", urls[2]: "caught up"}
        fleet[1].start()
        assert versions() == [2, 2, 2]


def test_a_patch_can_clear_old_versions_away(classifier, capsys, tmp_path):
    for number, label in enumerate(tiny.NEW):
        file = tiny.write_csv(tmp_path / f"{number}.csv", {label: tiny.sentences(label, 10)})
        command = ["add-label", "--examples", str(file), "--no-load", "--keep", "1", "--json", "--repo"]
        assert main([*command, str(classifier.root)]) == 0
        pruned = json.loads(capsys.readouterr().out)["pruned"]
    assert pruned == [2]
    assert classifier.versions() == (3, 4)  # the serving one and its parent
    assert classifier.serving() == 4


def test_pruning_spares_a_version_on_trial(classifier):
    tried = add_label(classifier.repository, "payday", TEN, settings=PatchSettings(canary=10.0)).version
    for label in tiny.NEW[1:]:
        patched(classifier, label)
    prune(classifier, 1)
    assert tried in classifier.versions()
    # It lacks the labels that were added since, which a promotion would remove silently.
    with pytest.raises(InputError, match=rf"version {tried} of intent was made without"):
        canary.promote(classifier)
    canary.discard(classifier)


def test_a_promotion_holds_although_its_trial_cannot_be_ended(classifier, monkeypatch):
    def full(*_):
        raise StorageError("the disk is full")

    report = add_label(classifier.repository, "payday", TEN, settings=PatchSettings(canary=10.0))
    monkeypatch.setattr(type(classifier.repository), "remove_classifier", full)
    switch = canary.promote(classifier)
    assert (switch.version, classifier.serving()) == (report.version, report.version)
    assert switch.warnings == (
        "version 2 serves, but its trial could not be ended: the disk is full. `patcher canary --discard` ends it",
    )
    monkeypatch.undo()
    assert canary.discard(classifier) == report.version


def test_a_canary_of_a_long_name_can_be_ended(tiny_original, tmp_path):
    name = "n" * 60
    classifier = tiny.make_repository(tmp_path / "repository", tmp_path / "scratch", name)
    version = add_label(classifier.repository, "payday", TEN, settings=PatchSettings(canary=10.0)).version
    assert canary.status(classifier).version == version
    assert canary.discard(classifier) == version
    assert classifier.repository.classifiers() == (name,)


@pytest.mark.parametrize("name", ["patcher.json", "intent.journal", "x.journal.damaged-1"])
def test_names_of_the_repositorys_own_files_are_no_classifiers(name):
    with pytest.raises(InputError, match="own files"):
        check_name(name)


def test_somebody_elses_models_stay(tmp_path, tree):
    root = tmp_path / "repository"
    for model in ("intent_tokenizer", "intent_head"):
        (root / model / "1").mkdir(parents=True)
        (root / model / "1" / "weights.bin").write_bytes(b"precious")
        (root / model / "config.pbtxt").write_text('name: "x" backend: "python" input { name: "A" dims: [1] }')
    (root / "intent_head" / "config.pbtxt").unlink()
    before = tree(root)
    with pytest.raises(InputError, match="which patcher did not create for this classifier; move it away"):
        tiny.make_repository(root, tmp_path / "scratch")
    assert {path: data for path, data in tree(root).items() if path in before} == before


def test_an_export_that_fails_takes_nothing_from_one_that_did_not(classifier):
    location = classifier.root
    (location / "patcher.json").unlink()
    with pytest.raises(RuntimeError), ModelRepository.making(location):
        raise RuntimeError
    assert ModelRepository(location).classifiers() == ("intent",)


@pytest.mark.parametrize("locked", [True, False])
def test_an_export_that_fails_leaves_the_place_to_one_that_works_there(locked, tmp_path):
    location = tmp_path / "new"
    first = ModelRepository.making(location)
    first.__enter__()
    with ModelRepository.making(location) as second, second.lock() if locked else contextlib.nullcontext():
        assert not first.__exit__(RuntimeError, RuntimeError(), None)
        assert (location / "patcher.json").exists() == locked
        assert (location / ".patcher.lock").exists() == locked
    assert ModelRepository(location).classifiers() == ()


def test_a_copy_that_was_cut_off_blocks_nothing_and_is_named(classifier):
    folder = classifier.root / "intent_head" / "2"
    folder.mkdir()
    shutil.copy(classifier.version_path(1) / "memory.safetensors", folder)
    assert patched(classifier) == 3
    notes = [check for check in doctor.diagnose(classifier.root, None, "url") if check.what == "intent, version 2"]
    assert [check.state for check in notes] == ["note"]
    assert "intent_head/2 has files but no model.onnx" in notes[0].finding


@pytest.mark.parametrize("unreadable, of", [("other_head", "repository"), ("intent_head/2", "intent")])
@pytest.mark.parametrize("repair", [False, True])
def test_doctor_goes_on_where_a_folder_cannot_be_read(classifier, command, unreadable, of, repair):
    loop = classifier.root / unreadable
    loop.symlink_to(loop)  # cannot be read even by root
    code, out, err = command("doctor", "--repo", str(classifier.root), "--json", *(["--repair"] if repair else []))
    found = {check["what"]: (check["state"], check["finding"]) for check in json.loads(out)}
    assert (code, err, found["server"][0]) == (1, "", "note")  # the last check
    for what in (of, "remains"):
        assert found[what] == ("fault", f"cannot read {loop}: Too many levels of symbolic links"), what
    if of == "repository":
        assert found["intent"][0] == "ok"
        assert found.get("intent, repair", ("ok",))[0] == "ok"


def test_doctor_goes_on_with_a_server_where_a_folder_cannot_be_read(classifier, monkeypatch):
    server = mock.create_autospec(TritonServer, instance=True, url="url")
    loop = classifier.root / "other_head"
    loop.symlink_to(loop)
    monkeypatch.setattr(doctor, "probe", lambda *_: None)
    server.is_ready.return_value = False
    found = {check.what: check.state for check in doctor.diagnose(classifier.root, server, "url")}
    assert (found["server"], found["intent, served"]) == ("ok", "ok")


def test_doctor_beside_another_patcher_says_that_a_change_is_under_way(classifier):
    def journal():
        (check,) = [each for each in doctor.diagnose(classifier.root, None, "url") if each.what == "intent, journal"]
        return check.state, check.finding

    classifier.journal.append("switch", **{"from": 1, "to": 2})
    with classifier.repository.lock():
        assert journal() == ("note", "in progress: version 2 was about to serve after 1; another patcher is running")
    assert journal()[0] == "fault"


def test_nobody_waits_for_what_the_caller_of_a_repair_does(classifier):
    found = doctor.repair(classifier.root, None)
    assert next(found).finding == "nothing was interrupted"
    assert not classifier.repository.storage.busy()


def test_a_version_that_is_pruned_while_it_is_looked_at_is_no_fault(classifier, monkeypatch):
    patched(classifier)
    read = Classifier.head_bytes

    def pruned(self, version):
        if version == 1 and 1 in self.versions():
            shutil.rmtree(self.version_path(1))
        return read(self, version)

    monkeypatch.setattr(Classifier, "head_bytes", pruned)
    assert [entry.lineage.version for entry in history(classifier)] == [2]
    monkeypatch.undo()
    assert doctor._version(classifier, 1, 2, {}) is None


def test_a_comparison_reads_no_rows_of_the_versions_between(classifier, monkeypatch):
    for _ in range(3):
        rename_label(classifier, "music", "songs")
        rename_label(classifier, "songs", "music")
    rename_label(classifier, "music", "songs")
    read, head = [], Classifier.head
    monkeypatch.setattr(Classifier, "head", lambda self, version=None: read.append(version) or head(self, version))
    assert diff(classifier, 1, 8).renamed == (("music", "songs"),)
    assert sorted(read) == [1, 8]
    between = classifier.root / "intent_head" / "4" / "model.onnx"
    between.write_bytes(b"damaged")
    with pytest.raises(RepositoryError, match=r"4/model\.onnx: .*`patcher rollback --to N`"):
        diff(classifier, 1, 8)


def test_renames_are_known_after_the_versions_between_are_pruned(classifier):
    for old, new in (("music", "m1"), ("m1", "m2"), ("m2", "m3")):
        rename_label(classifier, old, new)
    rollback(classifier, 1)
    assert prune(classifier, 1) == (2, 3)
    assert diff(classifier, 1, 4).renamed == (("music", "m3"),)
    assert diff(classifier, 4, 1).renamed == (("m3", "music"),)


def test_the_versions_between_two_are_not_listed_once_for_each(classifier, monkeypatch):
    for number in range(4):
        rename_label(classifier, f"m{number}" if number else "music", f"m{number + 1}")
    listed, glob = [], Disk.glob
    monkeypatch.setattr(Disk, "glob", lambda self, pattern: listed.append(pattern) or glob(self, pattern))
    assert diff(classifier, 1, 5).renamed == (("music", "m4"),)
    assert len(listed) <= 1


def test_a_change_reads_once_which_versions_the_journal_knows(classifier, monkeypatch):
    for number in range(3):
        rename_label(classifier, f"m{number}" if number else "music", f"m{number + 1}")
    asked, published = [], Journal.published
    monkeypatch.setattr(Journal, "published", lambda self: asked.append(1) or published(self))
    with classifier.repository.lock():
        assert classifier.adopt() == ()
    assert len(asked) == 1


def test_a_path_that_is_not_utf8_is_named(classifier, capsys):
    odd = os.fsdecode(os.fsencode(classifier.root) + b"\xff")
    classifier.root.rename(odd)
    assert main(["doctor", "--repo", odd]) == 1
    captured = capsys.readouterr()
    assert "expected one in UTF-8" in captured.out
    assert "a bug in patcher" not in captured.err


def test_labels_that_changed_names_are_told_apart(classifier, tmp_path):
    one, other, *_ = tiny.OLD
    remove_label(classifier, one)
    rename_label(classifier, other, one)
    found = diff(classifier, 1, 3)
    assert found.renamed == ((other, one),)
    assert found.removed == (f"{one} (of version 1)",)
    assert (found.added, found.changed_rows) == ((), ())


def test_a_merge_is_judged_by_the_texts_of_each_label(classifier, monkeypatch):
    texts = {label: tiny.sentences(label, 40 if label == "music" else 8, seed=5) for label in tiny.OLD}
    pairs = [(text, label) for label, group in texts.items() for text in dict.fromkeys(group)]
    remember(classifier, Examples(*map(tuple, zip(*pairs, strict=True)), "some.csv"))
    counts = {label: sum(each == label for _, each in pairs) for label in ("music", "alarm")}
    heard = {}
    monkeypatch.setattr("patcher.patch.judge", lambda *given, **more: heard.update(more) or judge(*given, **more))
    merge_labels(classifier, ["music", "alarm"], "sound", force=True)
    weights = heard["weights"]["sound"]
    kept = [min(20, count) for count in counts.values()]
    stands_for = [count / rows for count, rows in zip(counts.values(), kept, strict=True)]
    assert weights.tolist() == pytest.approx(np.repeat(stands_for, kept).tolist())
    assert weights.sum() == sum(counts.values())


def test_a_merge_in_a_multi_label_head_takes_texts_that_were_filed_under_another_label():
    rng, labels = np.random.default_rng(0), list("abcdefgh")
    sets = [{first, second} for first in range(8) for second in range(8) for _ in range(20)]  # one label, or two
    features = np.array([[label in each for label in range(8)] for each in sets], np.float32)
    features += 0.1 * rng.standard_normal(features.shape).astype(np.float32)
    rows, ids = np.nonzero([[label in each for label in range(8)] for each in sets])
    eye = np.eye(8, dtype=np.float32)
    head = Head.from_linear(labels, 16 * eye, np.full(8, -8, np.float32), 8, "x", problem=MULTI_LABEL)
    memory = Memory.build(features[rows], ids, labels, 8)
    patch = merged(head, memory, ["a", "b"], "ab", PatchSettings())
    assert (patch.gate, patch.verdict.flips) == ("passed", 0)
    given = patch.head.logits(features)[:, patch.head.index("ab")] > 0
    theirs = np.array([not each.isdisjoint({0, 1}) for each in sets])
    assert given[theirs].mean() > 0.95
    assert given[~theirs].mean() < 0.01


def test_a_merge_in_a_multi_label_head_takes_each_text_once_and_little_memory():
    labels, width = [f"l{i}" for i in range(2000)], 64
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2000, width)).astype(np.float32)
    head = Head.from_linear(labels, rows, np.full(2000, -40, np.float32), width, "x", problem=MULTI_LABEL)
    twice = rows[0] + rows[1]  # a text with both labels, filed under each of them; the second has more texts
    features = np.concatenate([rows, rows, [twice, twice], rows[:1] + rows[5], np.repeat(-rows[1:2], 30, axis=0)])
    ids = np.concatenate([np.arange(2000), np.arange(2000), [0, 1, 5], np.full(30, 1)])
    memory = Memory.build(features, ids, labels, width, per_label=4)
    tracemalloc.start()
    examples, weights = _theirs(head, memory, ["l0", "l1"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6  # all logits take 32 MB
    assert len(np.unique(examples, axis=0)) == len(examples) == len(weights)
    assert (np.abs(examples - features[-31]).max(axis=1) < 0.01).any()  # filed under a third label


def test_a_merge_in_a_multi_label_head_does_not_ask_about_other_labels_of_its_texts():
    eye = np.eye(4, dtype=np.float32)
    ids = np.repeat(np.arange(4), 20)
    features = eye[ids] + np.float32(0.1) * np.random.default_rng(0).standard_normal((80, 4), np.float32)
    features[:40] += eye[2]  # all texts of the two labels have the third one, too
    features[40:60] += eye[np.arange(20) % 2]  # and the other way round
    head = Head.from_linear(list("abcd"), 16 * eye, np.full(4, -8, np.float32), 4, "x", problem=MULTI_LABEL)
    verdict = merged(head, Memory.build(features, ids, list("abcd"), 4), ["a", "b"], "ab", PatchSettings()).verdict
    assert verdict.known == ()
    assert not any("is it the same label?" in line for line in verdict.advice)


def test_a_merge_that_is_refused_or_cannot_be_fitted_is_told_as_a_patch_is(classifier, tree, monkeypatch):
    before = tree(classifier.root)
    with monkeypatch.context() as strict:
        strict.setattr("patcher.gate._FEWEST_INPUTS", 1000)
        with pytest.raises(GateRefused, match=r"(?s)the merge:\n +only \d+ remembered inputs .*\n +`--force`") as told:
            merge_labels(classifier, ["music", "alarm"], "sound")
    report = told.value.report
    assert (report["version"], report["labels"], report["gate"], report["served"]) == (2, 5, "refused", False)
    assert report["verdict"]["reasons"]

    def singular(*_, **__):
        raise np.linalg.LinAlgError("Singular matrix")

    monkeypatch.setattr("patcher.patch.fit", singular)
    with pytest.raises(RepositoryError, match=r"the memory of version 1 is damaged \(Singular matrix\)"):
        merge_labels(classifier, ["music", "alarm"], "sound")
    assert tree(classifier.root) == before


def test_a_merge_is_no_harm(classifier, tmp_path, capsys):
    held_out = tiny.write_csv(tmp_path / "old.csv", {label: tiny.sentences(label, 20, seed=9) for label in tiny.OLD})
    examples = read_examples(held_out)
    merge_labels(classifier, ["balance", "transfer"], "money", force=True)
    rename_label(classifier, "money", "cash")
    remove_label(classifier, "alarm")
    added = add_label(classifier, "payday", TEN, settings=PatchSettings(force=True)).version
    pairs = (("balance", "cash"), ("transfer", "cash"))
    found = diff(classifier, 1, added, examples)
    assert (found.merged, found.renamed) == (pairs, ())
    assert found.removed == ("balance", "transfer", "alarm")
    assert (found.unknown, {flip.label for flip in found.flips}) == (0, {"alarm"})
    back = diff(classifier, added, 1, examples)
    assert (back.merged, back.renamed) == (pairs, ())
    assert (len(back.gains), len(back.flips)) == (len(found.flips), len(found.gains))
    # With the new name in the file, the result is the same.
    lines = held_out.read_text().replace(",balance", ",cash").replace(",transfer", ",cash")
    held_out.write_text(lines)
    assert diff(classifier, 1, added, read_examples(held_out)).flips == found.flips
    assert main(["diff", "1", str(added), "--eval", str(held_out), "--repo", str(classifier.root)]) == 0
    said = capsys.readouterr().out
    assert "; balance merged into cash; transfer merged into cash\n" in said
    assert "merged labels: texts labelled balance, transfer count as cash\n" in said


def test_a_merge_into_one_of_the_labels_and_a_name_that_comes_again(classifier):
    merge_labels(classifier, ["balance", "transfer"], "balance", force=True)
    rename_label(classifier, "balance", "money")
    assert diff(classifier, 1, 3).merged == (("transfer", "money"),)
    assert diff(classifier, 1, 3).renamed == (("balance", "money"),)
    back = diff(classifier, 3, 1)
    assert (back.merged, back.renamed) == ((("transfer", "balance"),), (("money", "balance"),))
    rename_label(classifier, "music", "transfer")  # by then, texts with that name belong to this label
    assert diff(classifier, 1, 4).merged == ()


@pytest.mark.parametrize(
    "old, name, other",
    [
        ("music", "Alarm", "alarm"),
        ("music", "cafe\u0301", "caf\xe9"),
        ("music", "al\u200darm", "alarm"),
        ("music", "Music", None),
    ],
)
def test_a_new_name_that_is_nearly_that_of_another_label_is_told(classifier, capsys, old, name, other):
    rename_label(classifier, "balance", "caf\xe9")
    question = f"{name!r} differs from {other!r} only in case, spaces, '_', '-' or Unicode form: is it the same label?"
    expected = [question] if other else []
    repo = ["--repo", str(classifier.root), "--no-load"]
    assert main(["rename-label", old, name, *repo, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["notes"] == expected
    assert captured.err.count("warning: ") == len(expected)
    assert merge_labels(classifier, [name, "transfer"], name, force=True).notes == tuple(expected)


def test_a_name_that_another_label_has_had_is_no_rename(classifier):
    rename_label(classifier, "music", "songs")
    remove_label(classifier, "songs")
    add_label(classifier, "songs", TEN)
    found = diff(classifier, 1, 4)
    assert (found.renamed, found.added, found.removed) == ((), ("songs",), ("music",))
    rename_label(classifier, "songs", "money")  # version 1 did not have this label under any name
    found = diff(classifier, 1, 5)
    assert (found.renamed, found.added, found.removed) == ((), ("money",), ("music",))
    assert diff(classifier, 4, 5).renamed == (("songs", "money"),)


class TestDamage:
    """A row with a flipped bit is still readable, but nothing is built on it, and it is not served again."""

    @pytest.fixture
    def damaged(self, classifier):
        patched(classifier)

        def damage(version, name):
            path = classifier.version_path(version) / name
            data = bytearray(path.read_bytes())
            row = classifier.head(version).base_weight.tobytes() if name == "model.onnx" else data[-1:]
            data[data.rindex(row)] ^= 1
            path.write_bytes(data)
            classifier.head(version), classifier.memory(version)  # both can be read
            return classifier

        return damage

    def test_no_version_is_built_on_a_damaged_head(self, damaged, tree):
        classifier = damaged(2, "model.onnx")
        before = tree(classifier.root)
        changes = [
            lambda: add_label(classifier, "pizza", tiny.sentences("pizza", 10)),
            lambda: remove_label(classifier, "music"),
            lambda: rename_label(classifier, "music", "songs"),
            lambda: merge_labels(classifier, ["music", "alarm"], "sounds", force=True),
            lambda: remember(classifier, Examples(tuple(TEN), ("payday",) * 10)),
        ]
        for change in changes:
            with pytest.raises(
                RepositoryError, match=r"model\.onnx of version 2 of intent was changed after it was pub"
            ):
                change()
        assert tree(classifier.root) == before
        assert rollback(classifier).version == 1

    def test_a_damaged_head_comes_to_serve_no_more(self, damaged):
        classifier = damaged(1, "model.onnx")
        for change in (lambda: rollback(classifier), lambda: canary.begin(classifier, 1, 10, None)):
            with pytest.raises(RepositoryError, match="version 1 of intent was changed after it was published"):
                change()
        assert classifier.serving() == 2

    def test_a_damaged_memory_is_built_anew_and_keeps_no_version_from_serving(self, damaged):
        classifier = damaged(2, "memory.safetensors")
        with pytest.raises(RepositoryError, match="build it anew by `patcher remember"):
            remove_label(classifier, "music")
        rollback(classifier)
        assert rollback(classifier, 2).version == 2
        remember(classifier, Examples(tuple(TEN), ("payday",) * 10))
        assert classifier.memory().labels == ("payday",)  # the damaged memory's other labels are not taken over
        assert remove_label(classifier, "music").version == 4

    def test_of_a_damaged_memory_no_label_is_taken_over_and_that_is_told(self, damaged, tmp_path, capsys):
        classifier = damaged(2, "memory.safetensors")
        train = tiny.train_set()
        data = tiny.write_csv(tmp_path / "train.csv", train)  # of all labels except the patch's
        assert main(["remember", "--data", str(data), "--no-load", "--repo", str(classifier.root)]) == 0
        assert set(classifier.memory().labels) == set(train)
        assert "warning: the memory has no texts' features of 1 of 7 labels (payday)" in capsys.readouterr().err


def test_all_labels_cannot_be_merged(classifier, tree):
    before = tree(classifier.root)
    with pytest.raises(LabelError, match="one other has to stay"):
        merge_labels(classifier, tiny.OLD, "all", force=True)
    assert tree(classifier.root) == before


def test_a_multi_label_classifiers_labels_have_no_bar(tmp_path):
    classifier = tiny.make_repository(tmp_path / "r", tmp_path / "s", problem="multi_label")
    with pytest.raises(LabelError, match="parts the labels of a text"):
        rename_label(classifier, tiny.OLD[0], "a|b")
    with pytest.raises(LabelError, match="parts the labels of a text"):
        merge_labels(classifier, tiny.OLD[:2], "a|b", force=True)


@pytest.mark.server
def test_without_the_key_nothing_is_published(classifier, tmp_path):
    with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log", admin_key="k" * 32) as running:
        with (
            TritonServer(running.url, admin_key="0" * 32) as stranger,
            pytest.raises(ServerError, match="the wrong admin key"),
        ):
            add_label(classifier.repository, "payday", TEN, server=stranger)
        assert classifier.versions() == (1,)
        # A client's bad request is not the version's fault: no replica is put back for it.
        with running.client() as server, concurrent.futures.ThreadPoolExecutor() as pool:
            watched = pool.submit(watch, classifier, server, 1.5)
            with running.client() as other, pytest.raises(ServerError):
                other.classify("intent", ["x" * (2 << 20)])
            watched.result()
