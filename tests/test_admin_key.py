"""The admin key that a server generates if it is given none: who can find it, who cannot, and how it is removed."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import grpc as grpcio
import psutil
import pytest
import tiny
from certificates import Authority
from processes import needs_ipv6
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from patcher import Fleet, InputError, TritonServer
from patcher.cli import main
from patcher.errors import ControlRefused, ServerError
from patcher.triton import kept_key, server_log
from patcher.triton.kept_key import KeptKey, find_key
from patcher.triton.server import EmbeddedTriton
from patcher.triton.tls import ClientTls, ServerTls

OPERATIONS = Path(__file__).parent.parent / "docs" / "operations.md"
MODELS = ["intent", "intent_features"]
FREE = ["--grpc-port=0", "--http-port=0", "--metrics-port=0"]
RENAME = ["rename-label", "music", "songs"]
NOBODY = 65534
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
# Let this user read root's files, so that it can run this Python wherever it is installed.
AS_NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
STRANGER = f"""
import os, sys
from patcher import TritonServer
url, file = sys.argv[1:]
for user in (None, {NOBODY}):  # the first imports what the second may not read
    if user:
        os.setgroups([]), os.setgid(user), os.setuid(user)
        try:
            open(file)
        except PermissionError:
            print("closed")
    with TritonServer(url) as server:
        server.load("intent_head")
        print("loaded")
"""


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """A separate state folder for the test, used by servers and verbs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "patcher"


@pytest.fixture
def other_user():
    """A folder that another user may read; needs root, since only root can act as two users."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a process as another user")
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        yield Path(folder)


def test_a_given_key_goes_only_with_model_control():
    """Without TLS, it would cross the network with every text."""
    with TritonServer("triton.example:8001", admin_key="0123456789abcdef") as client:
        client.__dict__["_client"] = connection = MagicMock()
        client.is_live()
        client.is_ready("intent")
        client.server_metadata()
        client.model_config("intent")
        client.statistics()
        client.refresh("intent_heads", "intent", 8)
        client.load("intent")
        client.unload("intent")
        client.repository_index()
    calls = [(name, given["headers"]) for name, _, given in connection.method_calls if "headers" in given]
    keyed = {name for name, headers in calls if headers}
    assert len(calls) == 9
    assert keyed == {"load_model", "unload_model", "get_model_repository_index"}


@contextlib.contextmanager
def serving(root, *options, ports=FREE, prefix=(), **more):
    """``patcher serve`` in a process of its own, once it is ready: the process, its remaining output, its address."""
    command = [*prefix, sys.executable, "-u", "-m", "patcher", "serve", "--repo", root, *ports, *options]
    with subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    ) as served:
        output: Any = served.stdout
        try:
            ready = next(line for line in iter(output.readline, "") if "ready: gRPC" in line)
            yield SimpleNamespace(process=served, output=output, url=ready.split("gRPC ")[1].split(",")[0])
        finally:
            if served.poll() is None:
                served.terminate()
                output.read()


def plainly(url):
    """Load a model as a script with Triton's own client would, without a key."""
    with grpc.InferenceServerClient(url) as client:
        client.load_model("intent_head")


def refused(url):
    with pytest.raises(InferenceServerException, match="admin-key"):
        plainly(url)
    return True


def keys(state):
    return sorted(state.glob("*.key"))


@pytest.mark.server
class TestServe:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_the_key_is_there_while_the_server_is(self, number, classifier, state):
        with serving(classifier.root) as server:
            (file,) = keys(state)
            assert str(file) in server.output.readline()
            assert [path.stat().st_mode & 0o777 for path in (state, file)] == [0o700, 0o600]
            assert refused(server.url)
            (snippet,) = re.findall(
                r"^```\n(client\.load_model\(.*?)^```", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL
            )
            with grpc.InferenceServerClient(server.url) as client:
                exec(snippet, {"client": client, "Path": Path, "key_file": file})  # noqa: S102  the manual's snippet
            for url, words in ((server.url, RENAME), (server.url.replace("127.0.0.1", "localhost"), ["rollback"])):
                assert main([*words, "--repo", str(classifier.root), "--url", url]) == 0
                with TritonServer(url) as client:
                    assert client.repository_index()
            with TritonServer(server.url, admin_key="another") as client, pytest.raises(ControlRefused, match="wrong"):
                client.load("intent_head")  # an explicit key takes precedence
            server.process.send_signal(number)
            server.output.read()
            assert server.process.wait(60) == 0
        assert keys(state) == []

    def test_another_user_is_refused_and_told_what_to_do(self, classifier, other_user, state, monkeypatch, capsys):
        with serving(classifier.root) as server:
            (file,) = keys(state)
            command = [sys.executable, "-c", STRANGER, server.url, str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.stdout.split() == ["loaded", "closed"]
            assert "ControlRefused" in done.stderr
            assert "got no admin key; give its key with --admin-key-file FILE or $PATCHER_ADMIN_KEY" in done.stderr
            # The same on the command line, for a user who cannot find the key.
            where = ["--repo", str(classifier.root), "--url", server.url]
            monkeypatch.setenv("XDG_STATE_HOME", str(other_user))
            assert main([*RENAME, *where]) == 1
            assert "--admin-key-file" in capsys.readouterr().err
            assert classifier.versions() == (1,)
            assert main([*RENAME, *where, "--admin-key-file", str(file)]) == 0
            monkeypatch.setenv("PATCHER_ADMIN_KEY", file.read_text())
            assert main(["rollback", *where]) == 0

    @pytest.mark.slow
    def test_root_finds_the_key_of_a_server_that_another_user_started(self, classifier, other_user, monkeypatch):
        root = shutil.copytree(classifier.root, other_user / "model_repository")
        for path in (root, *root.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        places = {"HOME": str(other_user), "XDG_STATE_HOME": "", "XDG_CACHE_HOME": str(other_user / "cache")}
        home = SimpleNamespace(pw_dir=str(other_user))
        with serving(root, prefix=AS_NOBODY, env={**os.environ, **places}) as server:
            assert str(other_user / ".local" / "state" / "patcher") in server.output.readline()
            assert refused(server.url)
            verb = [*RENAME, "--repo", str(root), "--url", server.url]
            assert main(verb) == 1  # according to the system, that user's home is elsewhere
            monkeypatch.setattr(pwd, "getpwuid", {NOBODY: home}.__getitem__)
            assert main(verb) == 0

    def test_after_kill_9_a_stale_key_does_no_harm(self, classifier, state, tmp_path):
        ports = [
            f"--{name}-port={port}" for name, port in zip(("grpc", "http", "metrics"), tiny.free_ports(3), strict=True)
        ]
        with serving(classifier.root, ports=ports) as server:
            (triton,) = psutil.Process(server.process.pid).children()
            server.process.kill()
            server.process.wait()
            assert not psutil.wait_procs([triton], timeout=60)[1]
        (stale,) = keys(state)
        before = stale.read_text()
        host, port = server.url.split(":")
        assert find_key(host, int(port)) is None
        # Servers that others start at the same address: one without a key, and one with another key.
        with EmbeddedTriton(classifier.root, MODELS, grpc_port=int(port), open_control=True, log_file=tmp_path / "log"):
            for url in (server.url, f"localhost:{port}"):
                with TritonServer(url) as client:
                    client.load("intent_head")
        with EmbeddedTriton(
            classifier.root, MODELS, grpc_port=int(port), admin_key="k" * 20, log_file=tmp_path / "log"
        ):
            with TritonServer(server.url) as client, pytest.raises(ControlRefused, match="no admin key; give its key"):
                client.load("intent_head")
        with serving(classifier.root, ports=ports):
            assert keys(state) == [stale]
            assert stale.read_text() != before
            with TritonServer(server.url) as client:
                client.load("intent_head")
        assert keys(state) == []

    def test_without_a_key_when_asked_to(self, classifier, state, capsys):
        with serving(classifier.root, "--no-admin-key") as server:
            assert (
                "warning: model control over gRPC takes no key: every user of this machine" in server.output.readline()
            )
            plainly(server.url)
            with TritonServer(server.url) as client:
                client.load("intent_head")
            with TritonServer(server.url, admin_key="one-that-nobody-asked-for") as client:
                client.load("intent_head")
        assert keys(state) == []

    def test_a_key_that_is_given_is_kept_nowhere(self, classifier, state, tmp_path):
        (tmp_path / "key").write_text("k" * 32)
        (tmp_path / "key").chmod(0o600)
        with serving(classifier.root, "--admin-key-file", tmp_path / "key") as server:
            assert keys(state) == []
            with TritonServer(server.url) as client, pytest.raises(ControlRefused, match="no admin key"):
                client.load("intent_head")

    def test_what_cannot_be_kept_is_told_before_a_server_starts(self, classifier, tmp_path, monkeypatch, capsys):
        verb = ["serve", "--repo", str(classifier.root), *FREE, "--log-file", str(tmp_path / "log")]
        monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
        assert main(verb) == 2
        said = capsys.readouterr().err
        assert "cannot keep this server's own admin key in /proc/nowhere/patcher: " in said
        assert all(way in said for way in ("$XDG_STATE_HOME", "--admin-key-file FILE", "--no-admin-key"))
        assert not (tmp_path / "log").exists()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        monkeypatch.setattr(server_log, "size", lambda _: 0)  # with every line of the log, its time would begin anew
        assert main([*verb, "--start-timeout", "0.01"]) == 1  # no key is kept if the server does not start
        assert list((tmp_path / "state" / "patcher").iterdir()) == []

        def homeless():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setattr(Path, "home", homeless)
        assert main(verb) == 2
        assert "set $HOME, or name a folder for logs and keys in $XDG_STATE_HOME" in capsys.readouterr().err
        assert find_key("localhost", 8001) is None  # other verbs continue
        monkeypatch.setenv("PATCHER_ADMIN_KEY", "k" * 32)
        assert main([*verb, "--no-admin-key"]) == 2
        assert "leave out one of them" in capsys.readouterr().err


@pytest.mark.server
def test_servers_at_several_ports_have_keys_of_their_own(classifier, state, tmp_path):
    with contextlib.ExitStack() as stack:
        one, two = (
            stack.enter_context(EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / f"{n}.log"))
            for n in range(2)
        )
        assert one.key_file.read_text() != two.key_file.read_text()
        assert set(keys(state)) == {one.key_file, two.key_file}
        stack.enter_context(Fleet([one.url, two.url])).load("intent_head")
        one.stop()
        assert keys(state) == [two.key_file]
        one.start()  # on another port, with another key
        with TritonServer(one.url) as client:
            client.load("intent_head")


class Trap(grpcio.GenericRpcHandler):
    """Another user's server, which records what it receives and refuses everything."""

    def __init__(self):
        self.heard = []

    def service(self, call):
        self.heard.append((call.method, dict(call.invocation_metadata)))


@pytest.mark.server
@needs_ipv6
def test_the_key_goes_to_nobody_else_who_listens_on_that_port(classifier, tmp_path):
    """Another user takes the port at the other address of localhost, and waits for a verb to send the key."""
    trap, header = Trap(), "triton-grpc-protocol-admin-key"
    with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log") as server, ThreadPoolExecutor(2) as pool:
        other = grpcio.server(pool, [trap])
        other.add_insecure_port(f"[::1]:{server.grpc_port}")
        other.start()
        with TritonServer(f"[::1]:{server.grpc_port}", admin_key="given") as client, pytest.raises(ServerError):
            client.load("intent_head")
        assert [heard[header] for _, heard in trap.heard] == ["given"]
        with TritonServer(f"localhost:{server.grpc_port}") as client:
            client.load("intent_head")
            assert client.repository_index()
        with TritonServer(f"[::1]:{server.grpc_port}") as client, pytest.raises(ServerError):
            client.load("intent_head")
        assert [heard.get(header) for _, heard in trap.heard] == ["given", None]
        other.stop(None)


@pytest.mark.server
def test_with_tls_it_is_the_certificate_that_tells_who_gets_it(classifier, tmp_path):
    authority = Authority(tmp_path)
    pair = authority.sign("server")
    tls = ServerTls(pair.certificate, pair.key)
    with EmbeddedTriton(classifier.root, MODELS, tls=tls, log_file=tmp_path / "log") as server:
        for url in (server.url, f"localhost:{server.grpc_port}"):
            with TritonServer(url, tls=ClientTls(authority.ca)) as client:
                client.load("intent_head")
                assert client._others == {}


@pytest.mark.server
def test_a_live_key_that_is_not_that_of_the_server(classifier, tmp_path):
    """The key belongs to a server that was stopped; another one was then started by hand at the same address."""
    with EmbeddedTriton(classifier.root, MODELS, admin_key="k" * 20, log_file=tmp_path / "log") as server:
        mine = KeptKey()
        mine.write()
        mine.show(server.url)
        try:
            with TritonServer(server.url) as client, pytest.raises(ControlRefused, match="the wrong admin key"):
                client.load("intent_head")
        finally:
            mine.remove()


class TestKeptKey:
    def test_others_leave_its_file_alone(self, state):
        first, second = KeptKey(), KeptKey()
        key = first.write()
        assert find_key("127.0.0.1", 1) is None  # the key is not shown yet
        first.show("127.0.0.1:1")
        assert find_key("localhost", 1) == ("127.0.0.1:1", key)
        other = second.write()
        second.show("127.0.0.1:1")
        first.remove()
        assert find_key("127.0.0.1", 1) == ("127.0.0.1:1", other)
        second.remove()
        assert keys(state) == []

    def test_is_for_its_address_alone(self):
        mine = KeptKey()
        key = mine.write()
        mine.show("[::1]:1")
        assert find_key("::1", 1) == find_key("localhost", 1) == ("[::1]:1", key)
        for place in (("127.0.0.1", 1), ("::1", 2), ("localhost.example", 1), ("127.example", 1), ("10.0.0.1", 1)):
            assert find_key(*place) is None
        mine.remove()

    def test_files_of_killed_servers_are_taken_away_by_the_next(self, state):
        living = KeptKey()
        living.write()
        living.show("127.0.0.1:1")
        for name, age in (("a.key", 3600), ("b.key", 0)):
            path = living.path.with_name(f"{kept_key._node()}-{name}")
            path.write_text("0" * 64)
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
        os.utime(living.path, (0, 0))
        (state / "triton-1.log").touch()
        os.utime(state / "triton-1.log", (0, 0))
        later = KeptKey()
        later.write()
        left = {path.name.removeprefix(f"{kept_key._node()}-") for path in state.iterdir()}
        assert left == {"127.0.0.1:1.key", "b.key", "triton-1.log", later.path.name.split("-", 1)[1]}
        living.remove()
        later.remove()

    @pytest.mark.parametrize("content", [b"", b"no key", b"\xff" * 64, b"0" * 65])
    def test_what_is_no_key_is_none(self, content, state):
        mine = KeptKey()
        mine.write()
        mine.show("127.0.0.1:1")
        mine.path.write_bytes(content)
        assert find_key("127.0.0.1", 1) is None
        mine.remove()

    def test_a_link_or_a_pipe_in_its_place_is_not_followed(self, state, tmp_path):
        mine = KeptKey()
        mine.write()
        mine.show("127.0.0.1:1")
        path = mine.path
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        assert find_key("127.0.0.1", 1) is None
        path.unlink()
        os.mkfifo(path)
        assert find_key("127.0.0.1", 1) is None
        mine.remove()
        assert path.exists()  # not the file that KeptKey wrote

    def test_a_folder_that_somebody_else_made_is_not_used(self, other_user, monkeypatch):
        """In a shared parent folder, anyone could have created it first."""
        monkeypatch.setenv("XDG_STATE_HOME", str(other_user))
        folder = other_user / "patcher"
        folder.mkdir(mode=0o777)
        os.chown(folder, NOBODY, NOBODY)
        with pytest.raises(InputError, match=r"patcher is another user's; name another folder"):
            KeptKey().write()
        folder.rmdir()
        (other_user / "mine").mkdir(mode=0o700)
        folder.symlink_to(other_user / "mine")
        with pytest.raises(InputError, match=r"patcher is a link; name another folder"):
            KeptKey().write()
        assert list((other_user / "mine").iterdir()) == []

    def test_a_file_system_that_closes_nothing_to_others(self, state, monkeypatch):
        monkeypatch.setattr(kept_key.stat, "S_IRWXO", 0o700)  # as if everyone could read what the owner can
        with pytest.raises(InputError, match="is open to others"):
            KeptKey().write()
        assert keys(state) == []

    def test_a_file_of_another_user_is_none(self, other_user, state):
        mine = KeptKey()
        mine.write()
        mine.show("127.0.0.1:1")
        os.chown(mine.path, NOBODY, NOBODY)
        assert find_key("127.0.0.1", 1) is None
        mine.remove()


@pytest.mark.server
def test_doctor_notes_that_nothing_can_be_loaded_from_here(classifier, tmp_path, monkeypatch, capsys):
    def noted():
        assert main(["doctor", "--repo", str(classifier.root), "--url", server.url, "--json"]) == 0
        checks = json.loads(capsys.readouterr().out)
        return [each["finding"] for each in checks if (each["what"], each["state"]) == ("server", "note")]

    with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log") as server:
        assert noted() == []
        monkeypatch.setenv("PATCHER_ADMIN_KEY", "wrong")
        (found,) = noted()
        assert found.startswith("no version can be loaded there from here: ")
        assert "admin key" in found
