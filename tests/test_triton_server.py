"""The embedded server and the client, on a real tritonserver."""

from __future__ import annotations

import fcntl
import gc
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny
from processes import PATIENCE, freeze, living_stubs, needs_ipv6, soon
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from patcher import TritonServer
from patcher.cli import main
from patcher.errors import InputError, ServerError, ServerRefused, ServerUnreachable, ToolError, VersionError, WrongPort
from patcher.serve import damaged
from patcher.triton import installation, prepared, process, server_log
from patcher.triton.failures import Address
from patcher.triton.server import EmbeddedTriton

pytestmark = pytest.mark.server
MODELS = ["intent", "intent_features"]
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  where Triton keeps it
KEY = "a-Key.of_some~length/1+2"


@pytest.fixture(scope="module")
def server(tiny_original, tmp_path_factory):
    """A server with an admin key, on its own copy of the tiny repository."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(tiny_original, folder / "model_repository")
    log = folder / "logs" / "triton.log"
    with EmbeddedTriton(folder / "model_repository", MODELS, admin_key=KEY, log_file=log) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as opened:
        yield opened


def http_status(address, path, headers=None):
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("POST" if "repository" in path else "GET", path, headers=headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


def gone(pid):
    """Whether the process ends soon."""

    def ended():
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    return soon(ended)


@pytest.fixture
def impatient(monkeypatch):
    """A server that starts gets no more time for what it logs: on a fast machine, it might never be silent."""
    monkeypatch.setattr(server_log, "size", lambda _: 0)


class TestServer:
    def test_is_ready_when_start_returns_and_listens_on_loopback_only(self, server):
        assert http_status(server.http_url, "/v2/health/ready") == 200
        assert http_status(server.http_url, "/v2/models/intent/ready") == 200
        metrics = f"127.0.0.1:{server.metrics_port}"
        assert http_status(metrics, "/metrics") == 200
        ports = {f"{port:04X}" for port in (server.grpc_port, server.http_port, server.metrics_port)}
        tables = [path.read_text() for path in map(Path, ("/proc/net/tcp", "/proc/net/tcp6")) if path.exists()]
        lines = [line.split() for table in tables for line in table.splitlines()[1:]]
        listening = {tuple(each[1].split(":")) for each in lines if each[3] == "0A" and each[1].split(":")[1] in ports}
        assert {port for _, port in listening} == ports
        assert {address[-8:] for address, _ in listening} == {"0100007F"}
        assert {address[:-8].replace("0", "") for address, _ in listening} <= {"", "FFFF"}  # gRPC's is IPv4-mapped IPv6

    def test_logs_where_it_was_told(self, server):
        assert "Started GRPCInferenceService" in server.log_file.read_text()

    def test_the_key_is_not_in_the_list_of_processes(self, server):
        command = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert b"admin-key=*" in command
        assert KEY.encode() not in command
        assert KEY not in server.log_file.read_text()

    def test_writes_nothing_into_the_repository(self, server, tiny_original, tree):
        assert tree(server.repository) == tree(tiny_original)

    def test_says_why_it_does_not_start(self, classifier, tmp_path):
        (classifier.root / "intent_head" / "1" / "model.onnx").write_bytes(b"broken")
        broken = EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log")
        with pytest.raises(ServerError, match=r"intent_head[\s\S]*(cannot read|Load model from)[\s\S]*whole log"):
            broken.start()
        assert broken.pid is None

    @pytest.mark.usefixtures("impatient")
    def test_says_which_model_it_waited_for(self, classifier, tmp_path):
        with pytest.raises(ServerError, match=r"not ready after 0\.05 s, waiting for intent"):
            EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log").start(timeout=0.05)

    def test_ends_when_the_process_that_started_it_is_killed(self, classifier, tmp_path):
        code = (
            "import sys, time\nfrom patcher.triton.server import EmbeddedTriton\n"
            "def start():\n"
            "    global server\n"
            "    server = EmbeddedTriton(sys.argv[1], ['intent'], log_file=sys.argv[2]).start()\n"
            # started in a thread that ends: only the end of the process counts
            "import threading; thread = threading.Thread(target=start); thread.start(); thread.join()\n"
            "print(server.pid, server.url, flush=True)\ntime.sleep(300)\n"
        )
        command = [sys.executable, "-c", code, str(classifier.root), str(tmp_path / "log")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            output: Any = parent.stdout
            pid, url = output.readline().split()
            stubs = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            with TritonServer(url) as other:
                assert other.is_ready("intent")
            assert stubs
            parent.kill()
        assert all(gone(each) for each in [pid, *stubs])

    def test_a_server_that_hangs_is_ended(self, classifier, tmp_path, monkeypatch):
        monkeypatch.setattr("patcher.triton.watching._SILENT_SECONDS", 4.0)
        monkeypatch.setattr("patcher.triton.watching._MISSED", 0)
        with EmbeddedTriton(classifier.root, ["intent"], log_file=tmp_path / "log") as running:
            pid = running.pid
            timer = threading.Timer(1.0, os.kill, [pid, signal.SIGSTOP])
            timer.start()
            with pytest.raises(ServerError, match="hung: it did not answer for 4 s, so it was stopped"):
                running.wait()
            assert gone(pid)

    def test_leaves_no_process_and_no_shared_memory(self, classifier, tmp_path):
        with EmbeddedTriton(classifier.root, ["intent"], log_file=tmp_path / "log") as running:
            pid = running.pid
            stubs = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            assert list(SHARED_MEMORY.glob(f"{running._shared_memory}*"))
        assert all(gone(each) for each in [pid, *stubs])
        assert not list(SHARED_MEMORY.glob(f"{running._shared_memory}*"))
        assert running.stop() is None

    def test_shared_memory_of_a_server_that_was_killed_with_its_parent_is_freed_by_the_next(self, classifier, tmp_path):
        def regions(prefix):
            return list(SHARED_MEMORY.glob(f"{prefix}*"))

        with EmbeddedTriton(classifier.root, ["intent"], log_file=tmp_path / "living") as living:
            with serving(classifier, tmp_path / "log") as (served, _, _):
                (triton,) = psutil.Process(served.pid).children()
                (option,) = [word for word in triton.cmdline() if word.startswith("--backend-config=python,shm")]
                family = [triton, *triton.children()]
                served.kill()
                os.killpg(triton.pid, signal.SIGKILL)
                psutil.wait_procs(family, timeout=PATIENCE)
            killed = option.partition("prefix-name=")[2]
            assert len(regions(killed)) > 1
            (tmp_path / "empty").mkdir()
            with EmbeddedTriton(tmp_path / "empty", [], log_file=tmp_path / "next"):
                assert regions(killed) == []
            assert len(regions(living._shared_memory)) > 1
            with living.client() as client:
                assert client.classify("intent", ["please tell me"])

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1"])  # noqa: S104
    def test_refuses_to_open_model_control_to_others(self, host):
        with pytest.raises(InputError, match="admin key"):
            EmbeddedTriton("anywhere", MODELS, host=host)

    @pytest.mark.parametrize("key", ["", " ", "a b", "a=b", "a,b", "\u00fc", "a\nb", " a"])
    def test_refuses_a_key_that_cannot_be_passed_on(self, key):
        with pytest.raises(InputError, match="admin key"):
            EmbeddedTriton("anywhere", MODELS, admin_key=key)

    @pytest.mark.parametrize("host,url", [("localhost", "127.0.0.1:"), pytest.param("::1", "[::1]:", marks=needs_ipv6)])
    def test_listens_where_it_is_told(self, host, url, tmp_path):
        (tmp_path / "empty").mkdir()
        with EmbeddedTriton(tmp_path / "empty", [], host=host, log_file=tmp_path / "log") as running:
            assert running.url.startswith(url)
            assert http_status(running.http_url, "/v2/health/ready") == 200
            with running.client() as opened:
                assert opened.is_live()

    def test_names_a_host_that_is_none(self):
        with pytest.raises(InputError, match=r"no\.such\.host\.invalid"):
            EmbeddedTriton("anywhere", MODELS, host="no.such.host.invalid", admin_key=KEY)

    def test_names_a_port_that_is_taken(self, classifier, tmp_path):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(InputError, match=f"{port}.*another port"):
                EmbeddedTriton(classifier.root, MODELS, http_port=port, log_file=tmp_path / "log").start()

    @pytest.mark.parametrize("name", ["my models", "müsic", "a'b", "a$b", "a;b", "a(b)"])
    def test_names_a_path_that_triton_cannot_bear(self, name, tmp_path):
        with pytest.raises(InputError, match=r"can start no model below .* move it, or mount it elsewhere"):
            EmbeddedTriton(tmp_path / name, MODELS, log_file=tmp_path / "log").start()
        EmbeddedTriton(tmp_path / "a~b[#!*]@,+=", MODELS, log_file=tmp_path / "log").command()

    def test_waits_as_long_as_the_log_goes_on(self, tmp_path, monkeypatch):
        (tmp_path / "empty").mkdir()
        triton = EmbeddedTriton(tmp_path / "empty", ["large"], log_file=tmp_path / "log")
        triton.grpc_port = triton.http_port = triton.metrics_port = 1  # nothing listens there
        monkeypatch.setattr(triton, "_process", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        looks, size = iter(range(1000)), server_log.size

        def growing(path):
            if (number := next(looks)) < 10:  # there is something new whenever somebody looks
                with path.open("a") as file:
                    print(f"successfully loaded {number}", file=file)
            return size(path)

        monkeypatch.setattr(server_log, "size", growing)
        with pytest.raises(ServerError, match=r"not ready after 0\.01 s, waiting for large, .*--start-timeout"):
            triton.wait_ready(0.01)
        assert next(looks) > 10
        triton._process.kill()
        triton._process.wait()

    @pytest.mark.usefixtures("impatient")
    def test_a_start_is_given_up_when_told(self, classifier, tmp_path, capsys):
        arguments = ["serve", "--repo", str(classifier.root), "--log-file", str(tmp_path / "log")]
        for port in ("grpc", "http", "metrics"):
            arguments += [f"--{port}-port", "0"]
        assert main([*arguments, "--start-timeout", "0.05"]) == 1
        assert "not ready after 0.05 s, waiting for intent" in capsys.readouterr().err

    def test_keeps_the_log_of_the_server_before(self, tmp_path):
        (tmp_path / "empty").mkdir()
        log, kept = tmp_path / "log", tmp_path / "log.1"
        for earlier in ("", "what a server that died had said\n"):
            log.write_text(earlier)
            with EmbeddedTriton(tmp_path / "empty", [], log_file=log):
                assert kept.read_text() == earlier
            assert "Started GRPCInferenceService" in log.read_text()
        log.rename(tmp_path / "elsewhere")
        log.symlink_to(tmp_path / "elsewhere")  # like /dev/stdout
        with EmbeddedTriton(tmp_path / "empty", [], log_file=log):
            assert log.is_symlink()

    def test_logs_of_an_earlier_patcher_are_closed_to_others(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        (tmp_path / "empty").mkdir()
        folder = tmp_path / "state" / "patcher"
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        (port,) = tiny.free_ports(1)
        log = folder / f"triton-{port}.log"
        log.write_text("what clients sent")
        log.chmod(0o644)
        with EmbeddedTriton(tmp_path / "empty", [], grpc_port=port) as server:
            assert server.log_file == log
        before = folder / f"{log.name}.1"
        assert before.read_text() == "what clients sent"
        assert [path.stat().st_mode & 0o777 for path in (folder, before, log)] == [0o700, 0o600, 0o600]

    def test_logs_that_nobody_has_written_for_a_month_are_removed(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        folder = tmp_path / "patcher"
        with EmbeddedTriton(tmp_path, []) as silent:
            for name, days in (("triton-1.log", 31), ("triton-1.log.1", 31), ("triton-2.log", 29), ("mine.log", 31)):
                (folder / name).touch()
                os.utime(folder / name, (time.time() - days * 86400,) * 2)
            os.utime(silent.log_file, (1, 1))
            with EmbeddedTriton(tmp_path, []) as new:
                kept = {silent.log_file, folder / "triton-2.log", folder / "mine.log", new.log_file}
                assert {path for path in folder.iterdir() if ".log" in path.name} == kept
        os.utime(silent.log_file, (1, 1))
        server_log.remove_old(folder, "triton-*.log*")
        assert not silent.log_file.exists()

    def test_names_a_log_that_cannot_be_written(self, classifier):
        with pytest.raises(InputError, match="log"):
            EmbeddedTriton(classifier.root, MODELS, log_file=Path("/proc/nowhere/log")).start()


@contextmanager
def serving(classifier, log):
    """``patcher serve`` on free ports in a process of its own: the process, its remaining output, the gRPC address."""
    command = [sys.executable, "-c", "from patcher.cli import main; import sys; sys.exit(main(sys.argv[1:]))", "serve"]
    command += ["--repo", str(classifier.root), "--log-file", str(log)]
    command += ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as served:
        output: Any = served.stdout
        ready = next(line for line in iter(output.readline, "") if "ready: gRPC" in line)
        try:
            yield served, output, ready.split("gRPC ")[1].split(",")[0]
        finally:
            if served.poll() is None:
                served.kill()


class TestServeCommand:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_a_signal_ends_it_cleanly_and_no_answer_is_lost(self, number, classifier, tmp_path):
        ends: list[ServerError] = []

        def loop(url):
            with TritonServer(url) as looping:
                while not ends:
                    try:
                        looping.classify("intent", ["please tell me"])
                    except ServerError as error:
                        ends.append(error)

        with serving(classifier, tmp_path / "log") as (served, output, url):
            threads = [threading.Thread(target=loop, args=[url]) for _ in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            served.send_signal(number)
            for thread in threads:
                thread.join(30)
            rest = output.read()
            assert served.wait(60) == 0, rest
        # Refused by a server that has unloaded its models or is gone: no answer was lost.
        assert ends
        for end in ends:
            assert isinstance(end, ServerUnreachable) or "has no available versions" in str(end)
        assert "Traceback" not in rest

    @pytest.mark.parametrize("file", ["1/model.onnx", "config.pbtxt"])
    def test_one_damaged_classifier_keeps_no_other_from_serving(self, file, classifier, tmp_path):
        with classifier.repository.lock():
            classifier.repository.add_classifier("other", classifier.head(), backbone="intent")
        (classifier.root / "other_head" / file).write_bytes(b"junk {")
        with serving(classifier, tmp_path / "log") as (_, _, url), TritonServer(url) as server:
            assert server.classify("intent", ["please tell me"])
            assert not server.is_ready("other")
        assert list(damaged(classifier.repository)) == ["other"]
        shutil.rmtree(classifier.root / "intent_head" / "1")
        with pytest.raises(VersionError, match="intent has no version 1"):
            damaged(classifier.repository)

    def test_says_when_the_server_dies(self, classifier, tmp_path):
        with serving(classifier, tmp_path / "log") as (served, output, _):
            (triton,) = psutil.Process(served.pid).children()
            stubs = triton.children()
            triton.kill()
            said = output.read()
            assert served.wait(30) == 1
        assert stubs
        assert not psutil.wait_procs(stubs, timeout=PATIENCE)[1]
        assert "exited unexpectedly with exit code -9" in said

    def test_ends_when_a_process_of_a_model_dies(self, classifier, tmp_path):
        with serving(classifier, tmp_path / "log") as (served, output, url):
            with TritonServer(url) as client:
                for _ in range(3):  # stubs that Triton ends itself do not count as dead
                    client.unload("intent_head")
                    client.load("intent_head")
                time.sleep(2.5)
                assert served.poll() is None
                (triton,) = psutil.Process(served.pid).children()
                (encoder,) = living_stubs(triton.pid, "intent_encoder")
                encoder.kill()
            said = output.read()
            assert served.wait(PATIENCE) == 1
        assert "a Python process of tritonserver died" in said


class TestClient:
    def test_answers_in_order_whatever_the_lengths(self, client):
        texts = [" ".join(tiny.sentences(label, 1 + n % 3, n)) for n in range(60) for label in tiny.OLD]
        answers = client.classify("intent", texts)
        assert [answer.text for answer in answers] == texts
        some = [0, 77, 200, 359]
        for index in some:
            (alone,) = client.classify("intent", [texts[index]])
            assert alone.labels == answers[index].labels
            np.testing.assert_allclose(alone.logits, answers[index].logits, rtol=1e-4, atol=1e-5)
        first = answers[0]
        assert first.head_version == 1
        assert len(first.labels) == len(first.scores) == 5
        assert list(first.scores) == sorted(first.scores, reverse=True)
        assert first.logits.shape == (len(tiny.OLD),)
        assert isinstance(first.in_scope, float)
        features = client.features("intent_features", texts)
        np.testing.assert_allclose(
            features[some], client.features("intent_features", [texts[i] for i in some]), atol=1e-5
        )
        assert features.shape == (360, tiny.WIDTH)
        assert features.dtype == np.float32

    def test_no_text_and_an_empty_text(self, client):
        assert client.classify("intent", []) == []
        assert client.features("intent_features", []).shape == (0, tiny.WIDTH)
        found = client.classify("intent", ["", "please tell me", " "])
        assert [answer.text for answer in found] == ["", "please tell me", " "]
        assert all(np.isfinite(answer.logits).all() for answer in found)
        # A client that sends the tensor itself gets the same.
        text = grpc.InferInput("text", [1, 1], "BYTES")
        text.set_data_from_numpy(np.array([[b""]], object))
        raw = grpc.InferenceServerClient(client.url).infer("intent", [text])
        np.testing.assert_allclose(raw.as_numpy("logits")[0], found[0].logits, atol=1e-5)
        assert raw.as_numpy("label")[0, 0].decode() == found[0].labels[0]

    def test_several_threads_may_share_it(self, client):
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda label: client.classify("intent", tiny.sentences(label, 3)), tiny.OLD))
        assert [answer[0].labels[0] for answer in answers] == list(tiny.OLD)

    def test_what_it_says_of_the_server(self, client):
        assert str(client.server_metadata()) == "triton 2.51.0"
        assert client.is_live()
        assert client.is_ready("intent")
        assert not client.is_ready("nobody")
        assert not client.is_ready("intent_head", "77")
        states = {(each.name, each.version): each.state for each in client.repository_index()}
        assert states["intent_head", "1"] == "READY"
        assert client.model_config("intent_head").max_batch_size == 64

        def answered():
            return sum(each.successes for each in client.statistics("intent"))

        before = answered()
        client.classify("intent", ["a"])
        # Triton counts an answer only after it has sent it.
        soon(lambda: answered() > before)
        assert answered() == before + 1

    def test_loads_and_unloads_with_the_key(self, client, server):
        client.unload("intent_features")
        assert not client.is_ready("intent_features")
        client.load("intent_features")
        assert client.is_ready("intent_features")
        with pytest.raises(ServerError, match="nobody"):
            client.load("nobody")
        with pytest.raises(ServerRefused, match=r"nobody.*not found.*doctor"):
            client.classify("nobody", ["a"])
        for path in ("/v2/repository/index", "/v2/repository/models/intent_head/load"):
            assert http_status(server.http_url, path) == 403
            assert http_status(server.http_url, path, {"admin-key": KEY}) == 200

    @pytest.mark.parametrize("key,reason", [(None, "no admin key"), ("another", "the wrong admin key")])
    def test_model_control_without_the_key(self, server, key, reason):
        with TritonServer(server.url, admin_key=key) as other:
            for call in (
                lambda: other.load("intent_head"),
                lambda: other.unload("intent_head"),
                other.repository_index,
            ):
                with pytest.raises(ServerRefused, match=f"{reason}.*--admin-key-file"):
                    call()
            assert other.classify("intent", ["a"])[0].head_version == 1

    def test_bad_texts(self, client):
        with pytest.raises(InputError, match="an unpaired surrogate"):
            client.classify("intent", ["\ud83d"])
        with pytest.raises(ServerRefused, match="1 MiB"):
            client.classify("intent", ["x" * (1 << 20) + "x"])

    @pytest.mark.parametrize("url", ["", "localhost", "localhost:", ":8001", "http://localhost:8001", "host:port"])
    def test_bad_addresses(self, url):
        with pytest.raises(InputError, match="HOST:PORT"):
            TritonServer(url)

    def test_nobody_there(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"localhost:{free.getsockname()[1]}"
        with TritonServer(url) as nobody:
            assert not nobody.is_live()
            for call in (lambda: nobody.classify("intent", ["a"]), lambda: nobody.is_ready("intent")):
                with pytest.raises(ServerUnreachable, match=r"no Triton server answers.*patcher serve.*--url"):
                    call()

    @pytest.mark.parametrize("port", ["HTTP", "metrics"])
    def test_another_port_instead_of_the_grpc_one(self, server, port):
        url = server.http_url if port == "HTTP" else f"127.0.0.1:{server.metrics_port}"
        with TritonServer(url, timeout=5) as wrong, pytest.raises(WrongPort, match=f"is the {port} port of a server"):
            wrong.classify("intent", ["a"])

    def test_a_server_that_hangs(self, server, client):
        assert client.is_ready("intent")
        freeze(server.pid)
        try:
            with TritonServer(server.url, timeout=0.5) as impatient:
                assert not impatient.is_live()
                with pytest.raises(ServerUnreachable, match=r"within 0\.5 s"):
                    impatient.classify("intent", ["a"])
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert client.is_ready("intent")

    def test_swaps_under_load_lose_nothing(self, classifier, tmp_path):
        head_folder = classifier.root / "intent_head"
        shutil.copytree(head_folder / "1", head_folder / "2")
        stop = threading.Event()
        failed: list[str] = []
        answered: list[int] = []
        with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log") as running:

            def loop():
                with running.client() as looping:
                    while not stop.is_set():
                        try:
                            answered.append(len(looping.classify("intent", ["please tell me"])))
                        except ServerError as error:
                            failed.append(str(error))

            threads = [threading.Thread(target=loop) for _ in range(4)]
            for thread in threads:
                thread.start()
            with running.client() as control:
                for version in (2, 1, 2, 1):
                    classifier.pin(version)
                    control.load("intent_head")
                    before = len(answered)
                    assert soon(lambda: failed or len(answered) > before + 4)  # noqa: B023  it does not outlive the turn
                    assert control.is_ready("intent_head", str(version))
                    assert control.classify("intent", ["please"])[0].head_version == 1  # 2 is a copy of 1
            stop.set()
            for thread in threads:
                thread.join()
        assert failed == []


class TestHttpPort:
    def test_is_named_for_what_it_is(self, server):
        with TritonServer(server.http_url, timeout=5) as wrong:
            for ask in (wrong.is_live, wrong.server_metadata, lambda: wrong.classify("intent", ["please"])):
                with pytest.raises(
                    WrongPort, match=rf"{server.http_url} is the HTTP port of a server; .* 8001 by default"
                ):
                    ask()

    def test_doctor_says_so_too(self, server, capsys):
        assert main(["doctor", "--repo", str(server.repository), "--url", server.http_url]) == 1
        assert f"port: {server.http_url} is the HTTP port of a server" in capsys.readouterr().out

    def test_a_port_of_somebody_else_is_not_taken_for_it(self):
        with socket.create_server(("127.0.0.1", 0)) as other:

            def answer():
                while True:
                    with suppress(OSError), other.accept()[0] as asked:
                        asked.recv(1000)
                        asked.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

            threading.Thread(target=answer, daemon=True).start()
            with TritonServer(f"127.0.0.1:{other.getsockname()[1]}", timeout=5) as wrong:
                assert not wrong.is_live()


class TestInstallation:
    def test_no_wheel(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ToolError, match=r"nvidia-pytriton.*pip install '\.\[serve\]'"):
            installation.find_installation()

    def test_no_stub_for_this_python(self, monkeypatch):
        monkeypatch.setattr(installation, "_PYTHON", "3.99")
        with pytest.raises(ToolError, match=r"no stub for Python 3\.99; expected one of 3\.10"):
            installation.find_installation()

    def test_numpy_2(self, monkeypatch):
        monkeypatch.setattr("importlib.metadata.version", lambda name: "2.1.0")
        with pytest.raises(
            ToolError, match=r"needs numpy below 2, this environment has 2\.1\.0: pip install 'numpy<2'"
        ):
            installation.find_installation()

    def test_no_shared_library_of_this_python(self, monkeypatch, tmp_path):
        monkeypatch.setattr(installation, "_PYTHON", "3.99")
        with pytest.raises(ToolError, match=r"libpython3\.99\.so\.1\.0.*apt-get install libpython3\.99"):
            installation.find_libpython(tmp_path)

    def test_a_library_that_the_wheel_brings(self, tmp_path):
        (tmp_path / f"libpython3-abc.{sys.version_info.minor}.so.1.0").touch()
        assert installation.find_libpython(tmp_path) is None

    def test_a_cache_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        code = "from patcher.triton.installation import find_installation as find; first = find()\n"
        code += "assert find() == first; print(first.backends)\n"
        code += "assert (first.backends / 'python' / 'triton_python_backend_stub').is_file()\n"
        code += "assert (first.backends / 'onnxruntime' / 'model.py').is_file()\n"
        code += "assert (first.backends / 'onnxruntime' / 'session.py').is_file()"
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).is_relative_to(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_cache_that_is_closed_to_us(self, monkeypatch, tmp_path):
        """As if `sudo patcher serve` had created it: even listing it is refused."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        is_dir = Path.is_dir

        def closed(path, **options):
            if path.parent == tmp_path / "cache" / "patcher":
                raise PermissionError(13, "Permission denied", str(path))
            return is_dir(path, **options)

        monkeypatch.setattr(Path, "is_dir", closed)
        assert not installation.find_installation().backends.is_relative_to(tmp_path)

    def test_what_was_killed_while_it_was_put_together_is_taken_away(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        code = "import os, shutil; shutil.copy2 = lambda *_: os.kill(os.getpid(), 9)\n"
        code += "from patcher.triton.installation import find_installation; find_installation()"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
        (left,) = (tmp_path / "patcher").iterdir()
        found = installation.find_installation()
        assert [path.name for path in (tmp_path / "patcher").iterdir()] == [found.backends.parent.name]
        assert left.name.startswith(".triton-")

    def test_programs_that_somebody_else_may_have_put_there_are_not_run(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        base = tmp_path / "patcher"
        base.mkdir()
        base.chmod(0o777)
        before = os.umask(0)
        try:
            folder = installation.find_installation().backends.parent
        finally:
            os.umask(before)
        assert folder.parent == base
        assert {path.stat().st_mode & 0o777 for path in (base, folder)} == {0o700}
        assert installation.find_installation().backends.parent == folder
        folder.chmod(0o777)
        assert not installation.find_installation().backends.is_relative_to(tmp_path)
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
        assert not installation.find_installation().backends.is_relative_to(tmp_path)

    def test_is_put_together_once(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with ThreadPoolExecutor(4) as pool:
            found = set(pool.map(lambda _: installation.find_installation().backends, range(4)))
        assert len(found) == 1
        assert [path.name for path in (tmp_path / "patcher").iterdir()] == [found.pop().parent.name]


class TestPreparedFolders:
    """Folders that earlier installations left in the cache."""

    @pytest.fixture
    def base(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return tmp_path / "patcher"

    def left(self, base, name, days, *, mark=True):
        folder = base / name
        (folder / "backends").mkdir(parents=True)
        if mark:
            (folder / prepared.MARK).touch()
        os.utime(folder / prepared.MARK if mark else folder, (time.time() - days * 86400,) * 2)
        return folder

    def test_those_that_nobody_asked_for_in_a_month_are_taken_away(self, base):
        self.left(base, "triton-old", 31)
        self.left(base, "triton-older-patcher", 31, mark=False)
        for days, mark in ((29, True), (29, False)):
            self.left(base, f"triton-{days}-{mark}", days, mark=mark)
        self.left(base, "objects", 99, mark=False)
        (base / "triton-elsewhere").symlink_to(self.left(base, "precious", 99))
        found = installation.find_installation().backends.parent.name
        assert {path.name for path in base.iterdir()} == {
            found, "triton-29-True", "triton-29-False", "objects", "precious"
        }  # fmt: skip

    def test_those_that_a_server_uses_stay(self, base):
        held, named = self.left(base, "triton-held", 0), self.left(base, "triton-named", 99, mark=False)
        descriptor = prepared.in_use(held)
        os.utime(held / prepared.MARK, (1, 1))
        sleeper = [sys.executable, "-c", "import time; time.sleep(300)", f"--backend-directory={named}/backends"]
        with subprocess.Popen([*sleeper[:3], "in-use"], pass_fds=[descriptor]) as server:
            os.close(descriptor)
            with subprocess.Popen(sleeper) as older:
                installation.find_installation()
                assert held.is_dir()
                assert named.is_dir()
                older.kill()
            server.kill()
        installation.find_installation()
        assert not held.exists()
        assert not named.exists()

    def test_a_server_holds_its_own_until_it_ends(self, base, classifier, tmp_path):
        with EmbeddedTriton(classifier.root, [], log_file=tmp_path / "log") as server:
            held = server.installation.backends.parent
            installation._held.pop(held)  # as if the process that started it is gone
            (mark,) = server.installation.kept
            os.close(mark)
            os.utime(held / prepared.MARK, (1, 1))
            prepared.take_away(base, "triton-*", base / "another")
            assert held.is_dir()
        prepared.take_away(base, "triton-*", base / "another")
        assert not held.exists()

    def test_one_that_goes_while_it_is_asked_for_is_put_together_anew(self, base):
        folder = self.left(base, "triton-old", 31)
        with (folder / prepared.MARK).open("r+") as taking:
            fcntl.flock(taking, fcntl.LOCK_EX)
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(prepared.in_use, folder)
                time.sleep(0.2)
                assert not asked.done()
                folder.rename(base / "gone")
                taking.close()
                assert asked.result() is None

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
    def test_one_that_cannot_be_marked_is_used_all_the_same(self, base):
        folder = self.left(base, "triton-read-only", 31, mark=False)
        folder.chmod(0o500)
        assert prepared.in_use(folder) == -1


class TestTheOtherBackend:
    """Triton's own onnxruntime backend, which NVIDIA builds and this project does not ship."""

    @pytest.mark.parametrize("make, reason", [(False, "is no folder"), (True, "has no libtriton_onnxruntime.so")])
    def test_a_folder_without_it(self, make, reason, tmp_path):
        if make:
            (tmp_path / "backend").mkdir()
        with pytest.raises(InputError, match=rf"backend {reason}; expected .*/opt/tritonserver/backends/onnxruntime"):
            installation.find_installation(tmp_path / "backend")

    def test_goes_before_the_python_based_one(self, classifier, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        (tmp_path / "backend").mkdir()
        (tmp_path / "backend" / "libtriton_onnxruntime.so").write_bytes(b"no library")
        triton = EmbeddedTriton(
            classifier.root,
            [classifier.ensemble],
            log_file=tmp_path / "log",
            onnxruntime_backend=tmp_path / "backend",
        )
        with pytest.raises(ServerError, match=r"unable to load shared library: .*libtriton_onnxruntime\.so"):
            triton.start()

    def test_the_environment_names_it(self, monkeypatch, tmp_path):
        (tmp_path / "backend").mkdir()
        (tmp_path / "backend" / "libtriton_onnxruntime.so").write_bytes(b"no library")
        (tmp_path / "backend" / "libonnxruntime.so.1").write_bytes(b"none either")
        (tmp_path / "backend" / "model.py").write_text("raise SystemExit")  # as in the folders that patcher assembles
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        plain = installation.find_installation()
        monkeypatch.setenv("PATCHER_SERVER_ONNXRUNTIME", str(tmp_path / "backend"))
        found = installation.find_installation()
        assert found.backends != plain.backends
        assert {path.name for path in (found.backends / "onnxruntime").glob("*.so*")} == {
            "libtriton_onnxruntime.so",
            "libonnxruntime.so.1",
        }
        assert "SystemExit" not in (found.backends / "onnxruntime" / "model.py").read_text()

    def test_what_cannot_be_copied_leaves_nothing(self, monkeypatch, tmp_path):
        def full(*_args, **_more):
            raise OSError(28, "No space left on device")

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr("shutil.copy2", full)
        with pytest.raises(ToolError, match=r"cannot put the server together.*No space left.*XDG_CACHE_HOME"):
            installation.find_installation()
        assert list((tmp_path / "patcher").iterdir()) == []


@pytest.mark.server
def test_a_python_that_a_relative_path_led_to_runs_the_models_as_any_other(classifier, tmp_path, monkeypatch):
    """With ``PATH=.venv/bin:$PATH patcher serve``, a link to a relative path used to lead nowhere."""
    monkeypatch.setattr(sys, "executable", os.path.relpath(sys.executable))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with EmbeddedTriton(classifier.root, ["intent_features"], log_file=tmp_path / "log") as running:
        assert running.pid
    assert not list(classifier.root.rglob("__pycache__"))


def test_telling_lines_leave_out_the_harmless(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        'I1122 13:00:00.1 1 x.cc:1] "fine"\n'
        'E1122 13:00:00.1 1 server.cc:241] "CudaDriverHelper has not been initialized."\n'
        "E1122 13:00:00.2 1 model.cc:1] \"failed to load 'intent_head'\"\n"
        "+---------+\n|         |\n"
        "error: creating server: no\n"
    )
    assert [line[:5] for line in server_log.telling_lines(log)] == ["E1122", "error"]
    assert server_log.telling_lines(tmp_path / "nowhere") == []


def test_free_ports_differ():
    ports = process.free_ports(["127.0.0.1"] * 3, (0, 0, 0))
    assert len(set(ports)) == 3


# --- how a stub starts and ends ---------------------------------------------------------------------------------------


def stub(program):
    """The output of a process that starts and ends like Triton's stubs."""
    begin = "from patcher.triton import stub_start; stub_start.install(); stub_start.install(); "
    done = subprocess.run([sys.executable, "-c", begin + program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout


def test_a_port_that_is_taken_is_waited_for():
    """A killed `serve` leaves a server that takes a while to end."""
    told = []
    with socket.create_server(("127.0.0.1", 0)) as ending:
        port = ending.getsockname()[1]
        threading.Timer(0.5, ending.close).start()
        process.await_ports(["127.0.0.1"], [port], 30.0, told.append)
        assert process.free_ports(["127.0.0.1"], [port]) == [port]
    (line,) = told
    assert line.startswith("waiting up to 30 s, in case a server is just ending: cannot listen on 127.0.0.1:")


def test_a_port_that_stays_taken_is_left_to_the_start_to_report():
    told = []
    with socket.create_server(("127.0.0.1", 0)) as there:
        process.await_ports(["127.0.0.1"], [there.getsockname()[1]], 0.3, told.append)
    process.await_ports(["203.0.113.1"], [1], 60.0, told.append)  # no address of this machine: nothing to wait for
    assert len(told) == 1


def test_a_server_that_is_stopping_is_not_said_to_lack_the_model():
    said = "Request for unknown model: 'intent' has no available versions"
    error = InferenceServerException(said, status="StatusCode.NOT_FOUND")
    failure = Address("127.0.0.1:8001", "127.0.0.1", 8001, None).failure("answer", error, 1.0, keyed=False)
    assert isinstance(failure, ServerRefused)
    assert f"could not answer: it is stopping, or has unloaded it: {said}; `patcher doctor`" in str(failure)


def test_what_numpy_needs_for_files_comes_when_it_is_asked_for():
    program = """
import sys, numpy
from importlib.util import _LazyModule
print(sum(type(sys.modules.get(name)) is _LazyModule for name in ("pickle", "numpy.random", "ctypes")))
import pickle, ctypes, textwrap
print(pickle.loads(pickle.dumps([1])), ctypes.c_int(7).value, textwrap.shorten("a  b", 9))
print(numpy.random.default_rng(0).integers(5, 6), numpy.fft.fft([1, 0])[0].real, numpy.ma.array([3]).sum())
print(sum(each is stub_start.LazyFinder for each in sys.meta_path))
"""
    assert stub(program.strip()) == "3\n[1] 7 a b\n5 1.0 3\n1\n"


def test_a_stub_leaves_at_once_after_all_others_had_their_turn():
    program = """
import atexit, threading, time
class Kept:
    def __del__(self): print("torn down")
kept = Kept()
atexit.register(print, "others at exit")
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
print("the model", end=", ")
"""
    assert stub(program.strip()) == "the model, a thread\nothers at exit\n"


def test_ctrl_c_while_a_connection_is_made_leaves_no_traceback(monkeypatch):
    import grpc

    def interrupted(*_args, **_more):
        raise KeyboardInterrupt

    said = []
    monkeypatch.setattr(grpc, "insecure_channel", interrupted)
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with TritonServer("127.0.0.1:9") as server, pytest.raises(KeyboardInterrupt):
        server.is_live()
    gc.collect()
    assert said == []
