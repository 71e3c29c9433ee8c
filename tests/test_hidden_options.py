"""The admin key stays out of the process list, which every user of the machine can read."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from patcher import TritonServer
from patcher.serve import _on_the_key
from patcher.triton import hidden_options, process
from patcher.triton.hidden_options import TRACED, masked
from patcher.triton.server import EmbeddedTriton

MODELS = ["intent", "intent_features"]
WATCH = """
import pathlib, signal, sys
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
print("watching", flush=True)
seen, ended = set(), False
while not ended:
    ended = bool(told)  # after one more look
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\\0")
        except OSError:
            continue
        if not any(word.endswith(sys.argv[1].encode()) for word in words):  # a server of somebody else
            continue
        for word in words:
            if word.startswith(b"--") and b"admin-key=" in word and word not in seen:
                seen.add(word)
                print(word.decode().partition("admin-key=")[2], flush=True)
"""


@pytest.fixture
def listed(classifier):
    """A process that writes each key that it sees in the process list; told to end, it looks once more before."""
    with subprocess.Popen(
        [sys.executable, "-c", WATCH, f"={classifier.root}"], stdout=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout.readline() == "watching\n"
        yield watching
        watching.kill()


def forbid_to_trace(monkeypatch):
    assert TRACED in process._LAUNCHER
    monkeypatch.setattr(process, "_LAUNCHER", process._LAUNCHER.replace(TRACED, "1"))


def forbid_to_write(monkeypatch):
    def move(*_):
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(hidden_options, "_move", move)


@pytest.mark.server
def test_the_key_is_never_in_the_list_of_processes(classifier, tmp_path, listed):
    with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log") as server:
        key = server.key_file.read_text()
        assert (server.key_hidden, server.key_was_listed) == (True, False)
        with TritonServer(server.url) as client:
            client.load("intent_head")
        stubs = psutil.Process(server.pid).children(recursive=True)
        assert stubs
        for stub in stubs:  # they inherit the server's environment
            assert not [name for name in stub.environ() if name.startswith("PATCHER_OPTION")]
            assert key not in stub.environ().values()
        assert Path(f"/proc/{server.pid}/environ").stat().st_mode & 0o077 == 0
        listed.terminate()
        assert set(listed.stdout.read().split()) == {"*" * len(key)}
        assert key not in (tmp_path / "log").read_text()


@pytest.mark.server
@pytest.mark.parametrize("forbid", [forbid_to_trace, forbid_to_write])
def test_where_the_system_forbids_that_it_is_soon_gone_from_there(forbid, classifier, tmp_path, listed, monkeypatch):
    """The key stays in the list until it was seen there, so that the test above would notice a listed key."""
    key, hide = "k" * 64, process.hide_argument

    def hide_what_was_seen(*rest):
        assert any(line.strip() == key for line in listed.stdout)
        return hide(*rest)

    forbid(monkeypatch)
    monkeypatch.setattr("patcher.triton.server.hide_argument", hide_what_was_seen)
    with EmbeddedTriton(classifier.root, MODELS, admin_key=key, log_file=tmp_path / "log") as server:
        assert (server.key_hidden, server.key_was_listed) == (True, True)
        assert b"kkkk" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        with server.client() as client:
            client.load("intent_head")


def test_serve_tells_where_the_key_could_be_seen():
    for hidden, listed, said in ((True, False, []), (True, True, ["until the server"]), (False, True, ["while the"])):
        server = SimpleNamespace(key_file=None, key_hidden=hidden, key_was_listed=listed, tls=None)
        lines = _on_the_key(server, open_control=False)
        assert [line for line, part in zip(lines, said, strict=True) if part not in line] == []


@pytest.mark.parametrize("secret", ["sesame", "s", "/bin/sh", "-c"])
def test_a_program_gets_the_options_that_were_given(secret, tmp_path):
    script = 'for word in "$@"; do echo "$word"; done; env'
    command = ["/bin/sh", "-c", script, "name", "open=sesame", "ünd", "sesame:sesame"]
    with (tmp_path / "log").open("wb") as log:
        started, hidden = process.start_with_parent(command, {"LANG": "C", "A": "1"}, log.fileno(), [], secret)
        assert started.wait(20) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[:3] == command[4:]
    assert not [line for line in lines if line.startswith("PATCHER_OPTION")]
    assert hidden


@pytest.mark.parametrize(
    "limits, size", [("-S -s 4096", 1 << 20), ("-s 4096", 4096), ("-S -s 4096; ulimit -v 9000000", 4096)]
)
def test_the_server_gets_large_stacks_where_they_cost_nothing(limits, size):
    code = (
        "import os, sys; from patcher.triton import process\n"
        "command = ['/bin/sh', '-c', 'ulimit -s']\n"
        "process.start_with_parent(command, dict(os.environ), sys.stdout.fileno(), [], 'key')[0].wait()"
    )
    shell = ["bash", "-c", f'ulimit {limits}; {shlex.quote(sys.executable)} -c "$0"', code]
    said = subprocess.run(shell, capture_output=True, check=True)
    assert int(said.stdout) == size


def test_a_program_that_is_not_there(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        started, hidden = process.start_with_parent(["/nowhere", "key"], dict(os.environ), log.fileno(), [], "key")
        assert started.wait(20) == 1
    assert not hidden
    assert "No such file" in (tmp_path / "log").read_text()


def test_a_program_that_is_told_to_end_before_it_began(tmp_path, monkeypatch):
    early = process._LAUNCHER.replace("os.execv", "os.kill(os.getpid(), signal.SIGTERM); os.execv")
    monkeypatch.setattr(process, "_LAUNCHER", early)
    with (tmp_path / "log").open("wb") as log:
        started, hidden = process.start_with_parent(["/bin/echo", "key"], dict(os.environ), log.fileno(), [], "key")
        assert started.wait(20) == -signal.SIGTERM
    assert not hidden


def test_what_is_masked():
    assert masked(["/key", "x=key,key", "--key"], "key") == (
        ["/key", "x=***,***", "--***"],
        {"PATCHER_OPTION_1": "x=key,key", "PATCHER_OPTION_2": "--key"},
    )


def test_a_child_that_is_not_stopped_is_not_waited_for(monkeypatch):
    """On a system that reports the child as traced although it is not, the start must not hang."""
    monkeypatch.setattr(hidden_options, "_SECONDS", 0.1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert not hidden_options.move_options(child.pid, {})
        child.kill()
