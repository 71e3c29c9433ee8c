"""Repositories on an object store: a real S3-compatible server on loopback, real tritonservers that read from it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime as dt
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import s3_server
import tiny
from processes import soon

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import kill

from patcher import (
    Examples,
    Fleet,
    FoundingSettings,
    ModelRepository,
    NotServed,
    PatchSettings,
    add_label,
    canary,
    doctor,
    drop_classifier,
    history,
    lease,
    metrics,
    new_classifier,
    prune,
    rollback,
    sync,
)
from patcher.cli import main
from patcher.errors import Busy, InputError, LockLost, PatcherError, RepositoryError, ServerError, StorageError
from patcher.lease import Lease
from patcher.metrics import Targets
from patcher.recovery import changing
from patcher.relabelling import rename_label
from patcher.rollout import roll_back
from patcher.storage import object_store, s3
from patcher.storage.object_store import ObjectStore
from patcher.storage.s3 import Bucket, _age, parse_url
from patcher.triton.server import EmbeddedTriton

MODELS = ["intent", "intent_features"]
URL = f"s3://{s3_server.BUCKET}/repository"
TEN = tiny.sentences("payday", 10)
TEXTS = [argument for text in TEN for argument in ("--text", text)]
HEAD = "repository/intent_head"


@pytest.fixture(scope="module")
def server():
    server = s3_server.S3Server()
    yield server
    server.stop()


@pytest.fixture
def store(server, monkeypatch, tmp_path):
    """The server with an empty bucket; the environment variables point to it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    server.empty()
    return server


@pytest.fixture
def remote(store, tiny_original):
    """The tiny classifier on the store, as an export writes it."""
    local = ModelRepository(tiny_original).classifier()
    repository = ModelRepository.create(URL)
    with repository.lock():
        files = tiny.BackboneFiles(
            local.backbone_path, local.fingerprint(), local.tokenizer_path.read_text(), tiny.TOKEN_INPUTS, tiny.WIDTH
        )
        repository.add_backbone("intent", files)
        repository.add_classifier("intent", local.head(), local.memory(), backbone="intent")
    store.written()
    return ModelRepository(URL).classifier()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    import checkpoints

    return checkpoints.save_checkpoint(tmp_path_factory.mktemp("bert") / "checkpoint")


def triton(classifier, folder, number=0, **options):
    return EmbeddedTriton(classifier.storage.served_from, MODELS, log_file=folder / f"{number}.log", **options)


def faults(server=None):
    return [check for check in doctor.diagnose(URL, server, "url") if check.state == "fault"]


def test_a_store_that_hangs_is_told_and_given_up(store, monkeypatch, capsys):
    monkeypatch.setattr(s3, "_SMALL_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"s3://http://127.0.0.1:{hanging.getsockname()[1]}/models/repository"
        bucket = Bucket(url, tries=1)
        assert bucket.region == "us-east-1"  # the client is there, which may take longer than the notice
        monkeypatch.setattr(s3, "_NOTICE_SECONDS", 0.05)
        with pytest.raises(StorageError, match="is the object store up"):
            bucket.get("patcher.json")
    assert capsys.readouterr().err == f"still waiting for the object store to read {url}/patcher.json\n"


def test_a_transfer_that_takes_long_is_not_taken_for_a_store_that_hangs(store, monkeypatch):
    calm, before_the_end = threading.Event(), []

    class Timer(threading.Timer):
        def cancel(self):
            super().cancel()
            calm.set()

    monkeypatch.setattr(s3.threading, "Timer", Timer)
    with socket.create_server(("127.0.0.1", 0)) as server:
        bucket = Bucket(f"s3://http://127.0.0.1:{server.getsockname()[1]}/models/repository", tries=1)

        def answer_slowly():
            with server.accept()[0] as connection:
                connection.recv(1 << 16)
                date = "Fri, 27 Nov 2026 00:00:00 GMT"
                head = f'HTTP/1.1 200 OK\r\nETag: "1"\r\nDate: {date}\r\nLast-Modified: {date}\r\n'
                head += "Content-Length: 4\r\n\r\n"
                connection.sendall(head.encode() + b"sl")
                before_the_end.append(calm.wait(20))
                connection.sendall(b"ow")

        slow = threading.Thread(target=answer_slowly, daemon=True)
        slow.start()
        assert bucket.get("patcher.json").data == b"slow"
        slow.join()
    assert before_the_end == [True]  # no notice can come any more, however long the rest takes


def test_a_notice_that_cannot_be_written_is_left_out(monkeypatch):
    written, failed = threading.Event(), []

    class Full:
        def write(self, _):
            written.set()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setattr(s3, "_NOTICE_SECONDS", 0.01)
    monkeypatch.setattr(s3.sys, "stderr", Full())
    with s3._noticed("still waiting"):
        assert written.wait(10)
        time.sleep(0.1)
    monkeypatch.undo()
    assert failed == []


@pytest.mark.parametrize("size, patient", [(1 << 20, False), ((1 << 20) + 1, True)])
def test_only_a_large_object_is_waited_for_longer(size, patient, store, tmp_path):
    for number, content in enumerate((b"0" * size, tmp_path / "large")):
        (tmp_path / "large").write_bytes(b"0" * size)
        bucket = Bucket(URL)
        bucket.put(f"o{number}", content, None)
        assert ("_patient_client" in vars(bucket)) == patient


def objects():
    """The ETags of all objects except lock and journal, to check that the repository is unchanged."""
    return {name: tag for name, tag in Bucket(URL).names().items() if not name.endswith((".patcher.lock", ".journal"))}


def test_the_layout_is_that_of_a_folder_and_every_folder_has_a_file(remote, tiny_original):
    local = {path.relative_to(tiny_original).as_posix() for path in tiny_original.rglob("*") if path.is_file()}
    assert set(Bucket(URL).names()) == local | {".patcher.lock"}
    assert remote.storage.glob("*/1/.keep") == ["intent/1/.keep", "intent_features/1/.keep"]
    original = ModelRepository(tiny_original).classifier()
    assert remote.head_bytes(1) == original.head_bytes(1)
    assert (remote.versions(), remote.serving(), remote.next_version()) == ((1,), 1, 2)


def test_doctor_reads_the_journal_no_oftener_for_more_versions(remote, store):
    def asked():
        store.requests.clear()
        assert faults() == []
        return store.requests.count(("GET", "repository/intent.journal"))

    before = asked()
    for _ in range(2):
        rename_label(remote, "music", "songs")
        rename_label(remote, "songs", "music")
    assert len(remote.versions()) == 5
    assert asked() == before


def test_a_look_for_names_lists_those_alone_that_can_match(remote, store):
    store.requests.clear()
    assert remote.storage.glob("intent_head/1/*") == ["intent_head/1/memory.safetensors", "intent_head/1/model.onnx"]
    assert remote.storage.glob("intent_h*/1/model.onnx", "intent/*") == [
        "intent/config.pbtxt",
        "intent_head/1/model.onnx",
    ]
    assert remote.storage.glob("intent_head/1/model.onnx", "none/*") == ["intent_head/1/model.onnx"]
    assert len(store.requests) == 3
    assert set(Bucket(URL).names("intent_head/1/")) == {"intent_head/1/memory.safetensors", "intent_head/1/model.onnx"}


def test_a_scrape_lists_the_bucket_no_oftener_for_more_classifiers(remote, store):
    pytest.importorskip("prometheus_client")
    repository, head = remote.repository, remote.head()

    def scraped():
        store.requests.clear()
        collector = metrics._Collector(Targets(("127.0.0.1:1",), (), ModelRepository(URL), every=True))
        families = {family.name: family for family in collector.collect()}
        counts = {each.labels["classifier"]: each.value for each in families["patcher_versions"].samples}
        return counts, sum(method == "GET" and not name for method, name in store.requests)

    counts, before = scraped()
    assert counts == {"intent": 1}
    with repository.lock():
        for name in ("second", "third", "fourth"):
            repository.add_classifier(name, head, backbone="intent")
    counts, after = scraped()
    assert counts == {"intent": 1, "second": 1, "third": 1, "fourth": 1}
    assert (before, after) == (2, 2)


def test_downloaded_files_are_kept_until_nobody_has_used_them_for_a_month(remote, tmp_path):
    def old(folder):
        for path in (folder, *folder.iterdir()):
            os.utime(path, (time.time() - 31 * 86400,) * 2)

    unused = remote.backbone_path.parent
    before = tmp_path / "cache" / "patcher" / "objects" / "0123"  # an earlier version's, without a mark
    before.mkdir()
    used = remote.tokenizer_path.parent
    for folder in (unused, before, used):
        old(folder)
    assert remote.tokenizer_path.parent == used
    remote.storage.replace("intent_tokenizer/1/tokenizer.json", b"{}")
    new = remote.tokenizer_path.parent
    assert sorted(used.parent.iterdir()) == sorted([used, new])
    assert remote.backbone_path.is_file()


def test_two_pins_are_never_dated_to_the_same_second(remote, store):
    dates = []
    for version in (2, 1, 2):
        head = remote.head(1)
        with remote.repository.lock():
            if version not in remote.versions():
                lineage = dataclasses.replace(head.lineage, version=2, parent=1)
                remote.publish(dataclasses.replace(head, lineage=lineage), None)
            remote.pin(version)
        dates.append(store.dated(f"{HEAD}/config.pbtxt"))
    assert dates == sorted(set(dates))


def test_a_version_is_there_whole_before_it_is_pinned_and_is_never_written_again(remote, store):
    add_label(remote.repository, "payday", TEN)
    journal, config = ("PUT", "repository/intent.journal"), ("PUT", f"{HEAD}/config.pbtxt")
    files = [("PUT", f"{HEAD}/2/memory.safetensors"), ("PUT", f"{HEAD}/2/model.onnx")]
    assert store.written() == [journal, *files, journal, config, journal]
    rollback(remote)
    assert store.written() == [journal, config, journal]
    assert faults() == []


@pytest.mark.server
def test_an_encoder_runs_nothing_that_somebody_put_beside_it(remote, tmp_path):
    """Triton downloads each model to a folder of its own, by default in /tmp, where others can write."""
    decoy = tmp_path / "fetched" / "intent_backbone"
    (decoy / "1").mkdir(parents=True)
    (decoy / "config.pbtxt").write_text("no configuration")
    where = {"TRITON_AWS_MOUNT_DIRECTORY": str(decoy.parent)}
    with triton(remote, tmp_path, environment=where) as server, server.client() as client:
        assert any(path.is_dir() for path in decoy.parent.iterdir() if path != decoy)
        assert not server.encoder_runs_backbone
        assert client.classify("intent", TEN)[0].head_version == 1
        # Triton counts an answer only after it has sent it.
        soon(lambda: client.statistics("intent_backbone")[0].inferences >= len(TEN))
        assert client.statistics("intent_backbone")[0].inferences == len(TEN)


@pytest.mark.server
@pytest.mark.slow
def test_three_replicas_on_one_repository(remote, store, tmp_path, capsys):
    replicas = [triton(remote, tmp_path, number) for number in range(3)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(EmbeddedTriton.start, replicas))
    urls = [replica.url for replica in replicas]
    common = ["--repo", URL, "--url", ",".join(urls), "--watch", "0.2"]

    def versions():
        found = []
        for replica in replicas:
            with replica.client() as client:
                found.append(client.classify("intent", TEN)[0].head_version)
        return found

    try:
        assert versions() == [1, 1, 1]
        with Fleet(urls, watch_seconds=0.2) as fleet:
            broken = fleet.members[2]

            def refuse(_model):
                del broken.load
                raise ServerError("no memory left")

            broken.load = refuse
            # One fails: all three are put back.
            with pytest.raises(NotServed, match=r"no memory left.*Version 1 serves again"):
                add_label(remote.repository, "payday", TEN, server=fleet)
        assert versions() == [1, 1, 1]
        assert (remote.serving(), remote.versions()) == (1, (1, 2))
        # A replica restarted in between loads the pinned version, despite a higher version and half of a third one.
        replicas[1].stop()
        Bucket(URL).put("intent_head/9/memory.safetensors", b"the head is not there yet", None)
        replicas[1] = triton(remote, tmp_path, 1, grpc_port=replicas[1].grpc_port).start()
        assert versions() == [1, 1, 1]
        # A good version reaches all three.
        assert main(["add-label", "payday", *TEXTS, *common]) == 0, capsys.readouterr().err
        assert versions() == [3, 3, 3]
        assert remote.storage.glob("intent_head/9/*") == []
        # A replica that was away during a rollback reads the store at its start; one that was cut off is synced.
        replicas[0].stop()
        assert main(["rollback", *common]) == 0
        replicas[0] = triton(remote, tmp_path, 0, grpc_port=replicas[0].grpc_port).start()
        assert versions() == [1, 1, 1]
        remote.pin(3)
        with Fleet(urls) as fleet:
            assert set(sync(remote, fleet).values()) == {"caught up"}
            assert faults(fleet) == []
        assert versions() == [3, 3, 3]
        capsys.readouterr()
        assert main(["doctor", "--repair", "--json", *common]) == 0
        assert json.loads(capsys.readouterr().out)
    finally:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(EmbeddedTriton.stop, replicas))


@pytest.mark.server
def test_a_version_on_trial(remote, tmp_path):
    settings = PatchSettings(canary=50.0)
    with triton(remote, tmp_path) as replica, replica.client() as client:
        report = add_label(remote.repository, "payday", TEN, server=client, settings=settings)
        assert client.classify("intent", TEN)[0].head_version == 1
        assert client.classify("intent_canary", TEN)[0].head_version == report.version
        assert canary.begin(remote, report.version, 80.0, client).percent == 80.0
        assert canary.promote(remote, client).version == report.version
        assert client.classify("intent", TEN)[0].head_version == report.version
    assert faults() == []


@pytest.mark.server
@pytest.mark.slow
def test_every_verb_takes_the_url_and_serve_gives_it_to_triton(remote, store, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_MODEL_REPO", URL)
    monkeypatch.delenv("AWS_DEFAULT_REGION")  # without it, tritonserver's own client would search for ten seconds
    log = tmp_path / "triton.log"
    command = [sys.executable, "-m", "patcher", "serve", "--log-file", str(log)]
    command += ["--grpc-port=0", "--http-port=0", "--metrics-port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        try:
            said = [serving.stdout.readline() for _ in range(2)]
            assert "ready: gRPC " in said[1], said
            monkeypatch.setenv("TRITON_URL", said[1].split("gRPC ")[1].split(",")[0])
            children = psutil.Process(serving.pid).children(recursive=True)
            (child,) = [child for child in children if child.name() == "tritonserver"]
            line = " ".join(child.cmdline())
            assert child.environ()["AWS_DEFAULT_REGION"] == "us-east-1"
            assert "testing" not in line and f"--model-repository=s3://{store.endpoint}/models/repository" in line
            old, new = tmp_path / "old.csv", tmp_path / "new.csv"
            tiny.write_csv(old, tiny.train_set())
            tiny.write_csv(new, {"payday": TEN})

            def run(*words):
                code = main([str(word) for word in words])
                captured = capsys.readouterr()
                assert code == 0, captured.err
                return captured.out

            run("add-label", "--examples", new, "--dry-run")
            assert json.loads(run("add-label", "--examples", new, "--json"))["served"]
            assert json.loads(run("classify", TEN[0], "--json"))[0]["label"] == "payday"
            run("rename-label", "music", "songs")
            run("merge-labels", "alarm", "songs", "--into", "sound", "--force")
            run("remove-label", "sound")
            run("remember", "--data", new)
            assert "payday" in run("labels")
            assert json.loads(run("history", "--json"))[-1]["serving"]
            run("diff", 1, 2, "--eval", old)
            assert json.loads(run("evaluate", old, "--version", 2, "--json"))["accuracy"] > 0.9
            run("rollback", "--to", 5)
            assert json.loads(run("prune", "--keep", 1, "--json"))["pruned"] == [1, 2, 3]
            run("sync")
            run("doctor")
        finally:
            serving.terminate()
            serving.wait()


def test_the_form_of_triton_names_the_endpoint_itself(remote, store, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    url = f"s3://{store.endpoint}/models/repository"
    classifier = ModelRepository(url).classifier()
    assert classifier.versions() == (1,)
    assert classifier.storage.served_from == url == remote.storage.served_from
    assert parse_url("s3://localhost:9000/bucket/a/b/") == ("http://localhost:9000", "bucket", "a/b")
    assert parse_url("s3://bucket") == (None, "bucket", "")
    assert Bucket("s3://bucket/path").served_from == "s3://bucket/path"
    assert Bucket("s3://https://minio.example/bucket/p").served_from == "s3://https://minio.example:443/bucket/p"


def test_a_report_compares_with_the_version_before(remote, tmp_path, capsys):
    assert main(["add-label", "payday", *TEXTS, "--no-load", "--repo", URL]) == 0, capsys.readouterr().err
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(["report", "--html", str(page), "--repo", URL, "--json"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["parent"] == 1
    assert "payday" in page.read_text()


@pytest.mark.parametrize(
    "url", ["gs://bucket/path", "s3://", "s3://B/x", "s3://bucket/a b", "s3://http://user:key@host:1/bucket", "s3:///x"]
)
def test_what_is_no_location_is_refused(url, capsys):
    assert main(["labels", "--repo", url]) == 2
    said = capsys.readouterr().err
    assert "expected" in said


class TestKilled:
    """``kill -9`` is simulated: the process exits at a given request, without any cleanup."""

    def patch(self, at, count=1):
        """Run add-label in a process of its own that ends just before the ``count``-th write of ``at``."""
        code = (
            "import os, sys; from patcher.cli import main; from patcher.storage.s3 import Bucket\n"
            "left = [int(sys.argv[2])]\n"
            "def put(self, name, *rest, put=Bucket.put):\n"
            "    if name.endswith(sys.argv[1]):\n"
            "        left[0] -= 1\n"
            "        if left[0] == 0: os._exit(9)\n"
            "    return put(self, name, *rest)\n"
            "Bucket.put = put; sys.exit(main(sys.argv[3:]))"
        )
        command = [sys.executable, "-c", code, at, str(count), "add-label", "payday", *TEXTS, "--no-load"]
        return subprocess.run([*command, "--repo", URL], capture_output=True, check=False).returncode

    @pytest.mark.parametrize(
        "at, count", [("2/memory.safetensors", 1), ("2/model.onnx", 1), (".journal", 2), ("config.pbtxt", 1)]
    )
    def test_between_upload_and_pin_the_next_command_takes_it_back(self, remote, monkeypatch, at, count):
        before = objects()
        assert self.patch(at, count) == 9
        assert remote.serving() == 1
        assert any("interrupted" in check.finding for check in faults())
        monkeypatch.setattr(lease, "LAPSE_SECONDS", 1e6)  # of a lock whose holder on this machine ended, none is needed
        assert main(["doctor", "--repair", "--repo", URL, "--url", "127.0.0.1:1"]) == 1  # no server answers
        config = f"{remote.head_model}/config.pbtxt"
        assert {name: tag for name, tag in objects().items() if name != config} == {
            name: tag for name, tag in before.items() if name != config
        }
        assert (remote.serving(), remote.versions(), faults()) == (1, (1,), [])
        # Its number is not reused.
        assert add_label(remote.repository, "payday", TEN).version == 3

    def test_after_the_pin_the_next_command_finishes_it(self, remote):
        assert self.patch(".journal", 3) == 9
        assert remote.serving() == 2
        assert rename_label(remote, "music", "songs").parent_version == 2
        assert (remote.serving(), faults()) == (3, [])

    def test_parts_of_versions_are_looked_for_once_for_all_classifiers(self, remote, monkeypatch):
        looks, glob = [], ObjectStore.glob
        monkeypatch.setattr(ObjectStore, "glob", lambda self, *given: looks.append(given) or glob(self, *given))
        with remote.repository.lock():
            pass
        alone = len(looks)
        with remote.repository.lock():
            for name in ("first", "second"):
                remote.repository.add_classifier(name, remote.head(), backbone="intent")
                Bucket(URL).put(f"{name}_head/2/memory.safetensors", b"cut off", None)
        looks.clear()
        with remote.repository.lock():
            assert len(looks) == alone
        assert [name for name in Bucket(URL).names() if "_head/2/" in name] == []

    def test_while_a_version_was_taken_away(self, remote):
        for label in ("payday", "pizza", "holiday"):
            add_label(remote.repository, label, tiny.sentences(label, 10))
        remote.journal.append("pruned", versions=[1, 2])
        Bucket(URL).delete(f"{remote.head_model}/1/model.onnx")
        assert remote.versions() == (2, 3, 4)
        with changing(remote):
            pass
        assert [entry.lineage.version for entry in history(remote)] == [3, 4]
        assert remote.storage.glob("intent_head/1/*") == []
        assert prune(remote, 1) == ()

    @pytest.mark.server
    @pytest.mark.slow
    def test_amid_changes_with_a_server(self, store):
        found = kill.run(5, seed=5, location=URL)
        assert found["journal: interrupted"] >= 2


class TestTwo:
    def test_patchers_at_once_lose_no_label(self, remote):
        code = "import sys; from patcher.cli import main; sys.exit(main(sys.argv[1:]))"
        running = []
        for label in ("payday", "pizza", "holiday"):
            texts = [argument for text in tiny.sentences(label, 10) for argument in ("--text", text)]
            command = [sys.executable, "-c", code, "add-label", label, *texts, "--no-load", "--repo", URL]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        said = [process.communicate()[1] for process in running]
        assert [process.returncode for process in running] == [0, 0, 0], said
        assert {"payday", "pizza", "holiday"} <= set(remote.head().labels)
        assert [entry.lineage.parent for entry in history(remote)] == [None, 1, 2, 3]
        assert faults() == []

    def test_one_waits_for_the_other(self, remote):
        with remote.repository.lock():
            other = ModelRepository(URL)
            with pytest.raises(Busy, match=r"^another patcher .*no progress for 0\.5 s;"), other.lock(timeout=0.5):
                pass
        with other.lock(timeout=5):
            pass

    def test_a_lock_that_nobody_keeps_fresh_is_taken_over(self, remote, monkeypatch):
        monkeypatch.setattr(lease, "_me", lambda: {"who": "ann", "host": "elsewhere", "machine": "other"})
        gone = Lease(Bucket(URL), ".patcher.lock")
        gone._beat = lambda: None
        gone.acquire(5, dict)
        with pytest.raises(Busy, match="ann on elsewhere"), remote.repository.lock(timeout=0.5):
            pass
        monkeypatch.setattr(lease, "LAPSE_SECONDS", 2.0)
        with remote.repository.lock(timeout=20):
            pass
        assert remote.journal.entries()[-1]["holder"] == "ann on elsewhere"

    @pytest.mark.parametrize(
        "hidden, start, error, gone",
        [
            (True, "1", PermissionError, False),  # another user's process, with /proc mounted hidepid=2
            (True, "1", None, False),
            (True, "1", ProcessLookupError, True),
            (True, "1", OverflowError, True),
            (False, "own", PermissionError, False),
            (False, "1", PermissionError, True),  # the id is another process's by now
        ],
    )
    def test_the_lock_of_a_process_that_proc_hides_is_not_taken_over(self, monkeypatch, hidden, start, error, gone):
        start = lease._start(os.getpid()) if start == "own" else start

        def signalled(_pid, number):
            assert number == 0
            if error:
                raise error

        monkeypatch.setattr(os, "kill", signalled)
        if hidden:
            monkeypatch.setattr(lease, "_start", lambda _: None)
        holder = {"machine": lease._machine(), "pid": os.getpid(), "start": start}
        assert lease._gone(holder) is gone

    def test_who_cannot_prove_the_lock_does_not_keep_it(self, remote, store):
        """The store answers no more once the lock is taken: the next try must not wait for this one's lease."""
        puts = []

        def fails(method, name):
            if method == "PUT" and name.endswith(".lock"):
                puts.append(name)
                return len(puts) in (2, 3)  # a request is tried twice
            return False

        store.fault = fails
        with pytest.raises(StorageError), remote.repository.lock():
            pass
        with ModelRepository(URL).lock(timeout=0.5):
            pass

    def test_a_lock_that_is_kept_fresh_is_not(self, remote, store, monkeypatch):
        """By the store's clock, it is always as if it had been taken just now."""
        monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.2)
        with remote.repository.lock():
            taken = store.dated("repository/.patcher.lock")
            assert soon(lambda: store.dated("repository/.patcher.lock") >= taken + 2)
            with pytest.raises(Busy), ModelRepository(URL).lock(timeout=0.5):
                pass
            remote.storage.replace("patcher.json", b'{"format": 1}')

    def test_who_could_not_keep_it_fresh_writes_nothing(self, remote, store):
        before = objects()
        with remote.repository.lock():
            remote.storage._lease._fresh -= 26.0
            for change in (
                lambda: remote.storage.replace("patcher.json", b'{"format": 1}'),
                lambda: remote.storage.take_away(["intent_head"]),
                lambda: remote.journal.append("done", serving=1),
            ):
                with pytest.raises(LockLost, match="could not be kept"):
                    change()
        assert objects() == before

    @pytest.mark.parametrize("at", ["intent.journal", "2/model.onnx", "config.pbtxt", ".patcher.lock"])
    def test_an_answer_that_is_lost_is_not_taken_for_somebody_elses_write(self, remote, store, at):
        store.lost = lambda method, name: method == "PUT" and name.endswith(at)
        assert add_label(remote.repository, "payday", TEN).version == 2
        assert store.lost is None
        assert (remote.serving(), faults()) == (2, [])

    def test_a_beat_whose_answer_is_lost_does_not_lose_the_lock(self, remote, monkeypatch):
        monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.2)
        put, beats = Bucket.put, []

        def losing(self, name, content, tag):
            found = put(self, name, content, tag)
            if threading.current_thread().name == "patcher-lease":
                beats.append(found)
                if len(beats) == 1:
                    raise StorageError("no answer within 5 s")
            return found

        monkeypatch.setattr(Bucket, "put", losing)
        with remote.repository.lock():
            while len(beats) < 3:
                time.sleep(0.05)
            remote.storage.replace("patcher.json", b'{"format": 1}')
        assert remote.storage.busy() is False

    def test_who_is_done_does_not_wait_for_a_store_that_does_not_answer(self, remote, store, monkeypatch):
        for module in (lease, object_store):
            monkeypatch.setattr(module, "REQUEST_SECONDS", 0.5)
        monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.1)
        hangs, over, waited = threading.Event(), threading.Event(), []

        def hanging(method, name):
            if method != "PUT" or not name.endswith(".lock"):
                return False
            hangs.set()
            waited.append(over.wait(60))
            return True

        with remote.repository.lock():
            store.fault = hanging
            assert hangs.wait(20)
        assert waited == []  # the store still hangs
        over.set()
        store.fault = None

    @pytest.mark.parametrize("asleep_before", ["publish", "model.onnx", "switch", "config.pbtxt", "done"])
    def test_one_that_was_only_slow_writes_nothing_over_the_others(self, remote, monkeypatch, asleep_before):
        """The worst case: just before one of its writes, the holder of the lock sleeps until its lease has expired."""
        asleep, awake = threading.Event(), threading.Event()
        put = Bucket.put

        def slow(self, name, content, tag):
            mine = threading.current_thread().name == "slow"
            here = name.endswith(asleep_before) or (
                name.endswith(".journal") and f'"event": "{asleep_before}"'.encode() in content.splitlines()[-1]
            )
            if mine and here and not asleep.is_set():
                asleep.set()
                assert awake.wait(60)
            return put(self, name, content, tag)

        monkeypatch.setattr(Bucket, "put", slow)
        monkeypatch.setattr(Lease, "check", lambda _: None)  # without its own clock check, so the store must refuse
        monkeypatch.setattr(Lease, "_beat", lambda _: None)
        errors = []

        def patch():
            try:
                add_label(ModelRepository(URL), "payday", TEN)
            except PatcherError as error:
                errors.append(error)

        sleeper = threading.Thread(target=patch, name="slow")
        sleeper.start()
        assert asleep.wait(60)
        monkeypatch.setattr(lease, "LAPSE_SECONDS", -1.0)
        first = rename_label(remote, "music", "songs")
        monkeypatch.setattr(lease, "LAPSE_SECONDS", 30.0)
        back = rename_label(remote, "songs", "music")
        awake.set()
        sleeper.join(60)
        assert not sleeper.is_alive()
        assert remote.serving() == back.version > first.version
        assert "music" in remote.head().labels
        if asleep_before == "done":  # only the journal entry was missing, and the other change built on it
            assert errors == []
            assert "payday" in remote.head().labels
        else:
            assert isinstance(errors[0], LockLost), errors
            assert "payday" not in remote.head().labels
        with changing(remote):
            pass
        assert {check.what for check in faults()} == set()


class TestFaults:
    """Clear errors with their exit code, and nothing changed."""

    def run(self, capsys, *words, repo=URL):
        code = main([*words, "--repo", repo])
        return code, capsys.readouterr().err

    @pytest.mark.parametrize(
        "verb", [("labels",), ("add-label", "payday", *TEXTS, "--no-load"), ("rollback", "--no-load")]
    )
    def test_no_credentials(self, remote, capsys, monkeypatch, verb):
        before = objects()
        with monkeypatch.context() as without:
            without.delenv("AWS_ACCESS_KEY_ID")
            code, said = self.run(capsys, *verb)
        assert (code, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment" in said) == (2, True), said
        assert objects() == before

    def test_no_bucket(self, store, capsys):
        code, said = self.run(capsys, "labels", repo="s3://nobody/here")
        assert (code, "no bucket 'nobody'" in said) == (2, True), said
        code, said = self.run(capsys, "export", "a-checkpoint-that-is-never-read", repo="s3://nobody/here")
        assert (code, "no bucket 'nobody'" in said) == (2, True), said

    def test_nothing_there_yet(self, store, capsys):
        code, said = self.run(capsys, "labels")
        assert (code, "`patcher export MODEL --repo s3://models/repository` adds a classifier" in said) == (2, True), (
            said
        )

    def test_a_dead_endpoint(self, remote, capsys, monkeypatch):
        with monkeypatch.context() as dead:
            dead.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
            code, said = self.run(capsys, "add-label", "payday", *TEXTS, "--no-load")
        assert (code, "is the object store up" in said) == (1, True), said
        assert remote.versions() == (1,)

    def test_an_endpoint_that_is_none(self, remote, capsys, monkeypatch):
        with monkeypatch.context() as wrong:
            wrong.setenv("AWS_ENDPOINT_URL", "nonsense")
            code, said = self.run(capsys, "labels")
        assert (code, "expected http://HOST:PORT" in said) == (2, True), said

    def test_without_the_library(self, store):
        code = "import sys; sys.modules['botocore'] = None; from patcher.cli import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, "labels", "--repo", URL], capture_output=True, text=True, check=False
        )
        assert (done.returncode, "pip install '.[s3]'" in done.stderr) == (1, True), done.stderr

    def test_a_folder_pays_nothing_for_it(self, classifier):
        code = "import sys; from patcher.cli import main; main(sys.argv[1:])\n"
        code += (
            "sys.exit(any(name.split('.')[0] == 'botocore' or name.endswith('.object_store') for name in sys.modules))"
        )
        command = [sys.executable, "-c", code, "labels", "--repo", str(classifier.root)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0

    @pytest.mark.parametrize("at", ["2/memory.safetensors", "2/model.onnx", "config.pbtxt"])
    def test_a_store_that_takes_no_more(self, remote, store, capsys, at):
        before = objects()
        store.fault = lambda method, name: method == "PUT" and name.endswith(at)
        try:
            code, said = self.run(capsys, "add-label", "payday", *TEXTS, "--no-load")
        finally:
            store.fault = None
        assert (code, "cannot write s3://models/repository/" in said) == (1, True), said
        assert "Nothing was changed: what is left of the new version is taken away by the next change" in said
        with changing(remote):
            pass
        assert objects() == before

    @pytest.mark.slow
    def test_a_store_that_dies_after_the_pin(self, remote, store, monkeypatch):
        class Stub:
            url = "stand-in:1"

            def is_live(self):
                return True

            def check_control(self):
                pass

            def load(self, _model):
                store.fault = lambda *_: True
                raise ServerError("gone")

        add_label(remote.repository, "payday", TEN)
        with remote.repository.lock(), pytest.raises(NotServed, match="so did the rollback") as caught:
            roll_back(remote, 1, Stub())
        store.fault = None
        assert caught.value.exit_code == 4
        assert remote.journal.pending()
        with changing(remote):
            pass
        assert (remote.journal.pending(), faults()) == (None, [])

    def test_a_store_that_knows_no_conditions(self, remote, store, capsys):
        before = objects()
        store.lenient = True
        code, said = self.run(capsys, "add-label", "payday", *TEXTS, "--no-load")
        assert (code, "does not honour conditional writes" in said) == (1, True), said
        assert objects() == before

    def test_credentials_that_are_wrong_or_may_not(self, remote, store, capsys):
        before = objects()
        for code, expected, said in (
            ("AccessDenied", 1, "expected credentials with permission to list, read, write and delete there"),
            ("InvalidAccessKeyId", 2, "are the AWS credentials right?"),
        ):
            store.refuse = code
            found, words = self.run(capsys, "rollback", "--no-load")
            store.refuse = None
            assert (found, said in words) == (expected, True), words
        assert objects() == before

    def test_credentials_that_ran_out_after_a_listing_are_no_wrong_usage(self, remote, store):
        bucket = Bucket(URL)
        assert bucket.names()
        store.refuse = "ExpiredToken"
        try:
            with pytest.raises(StorageError, match="are the AWS credentials right"):
                bucket.get("patcher.json")
        finally:
            store.refuse = None

    @pytest.mark.parametrize("date, age", [("soon", None), ("", None), ("Thu, 01 Jan 2026 00:00:09 -0000", 9.0)])
    def test_a_date_that_is_none_is_told(self, date, age):
        written = dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)
        answer = {"ResponseMetadata": {"HTTPHeaders": {"date": date}}, "LastModified": written}
        if age is not None:
            assert _age(answer) == age
            return
        with pytest.raises(StorageError, match=rf"the object store dates its answers '{date}'; expected a date"):
            _age(answer)

    def test_a_file_that_was_changed_on_the_store_shows(self, remote):
        bucket, name = Bucket(URL), f"{remote.head_model}/1/memory.safetensors"
        bucket.put(name, b"other", bucket.tag(name))
        assert any("changed after it was published" in check.finding for check in faults())

    def test_a_damaged_journal_is_set_aside(self, remote):
        bucket = Bucket(URL)
        bucket.put("intent.journal", b"nonsense\n", bucket.tag("intent.journal"))
        assert faults()
        assert list(doctor.repair(URL, None))
        assert faults() == []
        assert bucket.tag("intent.journal.damaged-1")

    def test_a_part_of_a_repository_is_said_to_lie_in_one(self, remote):
        with pytest.raises(RepositoryError, match=rf"expected --repo {URL} --classifier intent$"):
            ModelRepository(f"{URL}/intent")

    def test_a_folder_is_no_object_store(self, remote):
        with pytest.raises(InputError, match="is not a folder"):
            _ = remote.root
        with pytest.raises(RepositoryError, match="no such object"):
            remote.storage.read("nothing")
        assert isinstance(remote.storage, ObjectStore)
        assert issubclass(LockLost, StorageError)


class TestNewClassifier:
    """A classifier with an ensemble of its own works on an object store; a head store needs a folder."""

    def examples(self):
        pairs = [(text, label) for label in tiny.NEW for text in tiny.sentences(label, 12, seed=3)]
        return Examples(tuple(text for text, _ in pairs), tuple(label for _, label in pairs), "made up")

    @pytest.mark.server
    def test_with_an_ensemble_of_its_own(self, remote, tmp_path):
        before = objects()
        with triton(remote, tmp_path) as replica, replica.client() as client:
            assert new_classifier(remote.repository, "topics", self.examples(), server=client).served
            assert client.classify("topics", TEN)[0].head_version == 1
            assert ModelRepository(URL).classifiers() == ("intent", "topics")
            assert faults() == []
            assert drop_classifier(ModelRepository(URL), "topics", client) == (1,)
            assert not client.is_ready("topics") and not client.is_ready("topics_head")
        assert objects() == before

    def test_in_a_head_store_is_refused(self, remote, tmp_path, capsys):
        before = objects()
        pairs = {label: tiny.sentences(label, 12) for label in tiny.NEW}
        file = tiny.write_csv(tmp_path / "topics.csv", pairs)
        code = main(["new-classifier", "topics", "--train", str(file), "--in-store", "--no-load", "--repo", URL])
        assert (code, "a head store reads its heads from one" in capsys.readouterr().err) == (2, True)
        with remote.repository.lock(), pytest.raises(InputError, match="is not a folder"):
            remote.add_store()
        assert objects() == before

    def test_one_that_was_copied_there_is_not_served(self, remote, tmp_path, capsys):
        root = tmp_path / "model_repository"
        remote.storage.copy_to(root)
        new_classifier(ModelRepository(root), "stored", self.examples(), settings=FoundingSettings(in_store=True))
        for path in root.rglob("*"):
            name = path.relative_to(root).as_posix()
            if path.is_file() and name.startswith(("intent_any/", "intent_heads/", "stored")):
                Bucket(URL).put(name, path.read_bytes(), None)
        assert ModelRepository(URL).classifiers() == ("intent", "stored")
        for verb in (["serve"], ["labels", "--classifier", "stored"]):
            assert main([*verb, "--repo", URL]) == 2
            assert "cannot be served from an object store" in capsys.readouterr().err
        assert [check.what for check in faults()] == ["stored"]
        # Other classifiers are not affected.
        assert add_label(remote.repository, "payday", TEN, classifier="intent").version == 2


class TestExport:
    """An export straight to the store is complete or leaves nothing behind."""

    def test_to_the_store(self, store, bert, capsys):
        assert main(["export", str(bert), "--repo", URL, "--name", "intent"]) == 0, capsys.readouterr().err
        assert f"Next: patcher serve --repo {URL}" in capsys.readouterr().out
        assert store.written()[-2:] == [("DELETE", "repository/intent.journal"), ("PUT", "repository/intent.journal")]
        assert faults() == []
        assert main(["export", str(bert), "--repo", URL, "--name", "intent"]) == 2
        assert "holds a classifier 'intent' already" in capsys.readouterr().err
        # Another classifier on the same backbone.
        assert main(["export", str(bert), "--repo", URL, "--name", "topic", "--backbone", "intent"]) == 0
        assert ModelRepository(URL).classifiers() == ("intent", "topic")

    def test_one_that_fails_leaves_nothing(self, store, bert, capsys):
        store.fault = lambda method, name: method == "PUT" and name.endswith("intent_head/config.pbtxt")
        assert main(["export", str(bert), "--repo", URL, "--name", "intent"]) == 1
        store.fault = None
        assert set(Bucket(URL).names()) == {".patcher.lock"}

    def test_one_that_may_not_write_is_refused_before_the_checkpoint_is_read(self, store, capsys):
        store.fault = lambda method, _: method == "PUT"
        assert main(["export", "a-checkpoint-that-is-never-read", "--repo", URL]) == 1
        store.fault = None
        assert f"cannot write {URL}/.patcher-probe-" in capsys.readouterr().err
        assert Bucket(URL).names() == {}

    def test_one_that_was_killed_is_made_anew(self, store, bert, tmp_path):
        Bucket(URL).put("intent_backbone/1/model.onnx", b"half", None)
        Bucket(URL).put("patcher.json", b'{"format": 1}', None)
        assert main(["export", str(bert), "--repo", URL, "--name", "intent"]) == 0
        assert faults() == []


@pytest.mark.server
@pytest.mark.slow
def test_tune_tries_on_a_copy_and_writes_to_the_store(remote, tmp_path, monkeypatch):
    from patcher import tune

    found, copied = tune.Serving(instances=2, threads=1), []

    def run(search, _):
        copied.extend(path.name for path in search.classifier.root.glob("*_head/*/*"))
        return tune.Serving(), found, []

    monkeypatch.setattr(tune._Search, "run", run)
    monkeypatch.setattr(tune._Search, "versus", lambda *_: (1.5, 100.0))
    assert tune.tune(remote, TEN, seconds=1).written
    assert copied == ["model.onnx"]  # no memory
    config = remote.repository.config(remote.backbone_model)
    assert config.instance_group[0].count == 2
    assert faults() == []


@pytest.mark.server
@pytest.mark.slow
def test_credentials_of_a_profile_are_enough_for_both(remote, tmp_path, monkeypatch):
    file = tmp_path / "credentials"
    file.write_text("[shop]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
    file.chmod(0o600)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "shop")
    classifier = ModelRepository(URL).classifier()
    with triton(classifier, tmp_path) as running, running.client() as server:
        assert add_label(classifier.repository, "payday", TEN, server=server).served
