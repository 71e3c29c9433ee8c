"""How the server's process is started and kept discreet."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.errors import InputError, ServerError
from patcher.triton.hidden_options import TRACED, masked, move_options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "accepts",
    "address",
    "free_ports",
    "has_gpu",
    "hide_argument",
    "loopback",
    "reachable",
    "start_with_parent",
]

# Asks the kernel for SIGTERM when the parent goes, and to be stopped where it is to be traced, then becomes the server.
# Done by a program of its own, since code run between fork and exec of a process with threads may hang.
_LAUNCHER = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the starting process is gone")
if sys.argv[2] == "traced" and {TRACED}:
    sys.exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""


def start_with_parent(
    command: Sequence[str], environment: Mapping[str, str], log: int, kept: Sequence[int], secret: str
) -> tuple[subprocess.Popen[bytes], bool]:
    """Start ``command``, output to the descriptor ``log``; it gets SIGTERM when this process ends, however it ends.

    The command and its children have the descriptors ``kept`` open for as long as one of them lives. Also told is
    whether ``secret``, a part of the command, was kept out of the list of processes, which some systems forbid.

    Raises ServerError where it cannot be started.
    """
    # The kernel's "parent died" is about the thread that started the child: one is needed that lasts as long as we do.
    started = threading.Event()
    box: list[tuple[subprocess.Popen[bytes], bool] | OSError] = []

    def launch(how: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - a list of our own, no shell
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), how, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=kept,
            start_new_session=True,  # a Ctrl-C in the terminal is for us to pass on
        )

    def run() -> None:
        stars, moved = masked(command, secret)
        try:
            process = launch("traced", stars, {**environment, **moved})
            hidden = move_options(process.pid, moved)
            if not hidden:
                process.kill()
                process.wait()
                process = launch("as it is", command, environment)
        except OSError as error:
            box.append(error)
            started.set()
            return
        box.append((process, hidden))
        started.set()
        process.wait()

    threading.Thread(target=run, name="tritonserver", daemon=True).start()
    started.wait()
    (outcome,) = box
    if isinstance(outcome, OSError):
        raise ServerError(f"cannot start tritonserver: {outcome}") from outcome
    return outcome


def hide_argument(process: subprocess.Popen[bytes], program: Path, secret: bytes) -> bool:
    """Overwrite ``secret`` in the command line of ``process`` once ``program`` runs in it and has read its options.

    A child's memory may be written by its parent under every setting of ptrace_scope but 2 and 3. False where it may
    not, and the secret stays visible to other users of the machine.
    """
    folder = Path(f"/proc/{process.pid}")
    deadline = time.monotonic() + 30.0
    try:
        # Threads come after the options.
        while (folder / "exe").resolve() != program.resolve() or len(list((folder / "task").iterdir())) == 1:
            if process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, proc(5)
        with (folder / "mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            arguments = memory.read(end - start)
            for found in re.finditer(re.escape(secret), arguments):
                memory.seek(start + found.start())
                memory.write(b"*" * len(secret))
    except OSError:
        return False
    return True


def has_gpu() -> bool:
    """Whether Triton may find a GPU on this machine (its onnxruntime backend's copy of this is ``GPUS``)."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def accepts(host: str, port: int) -> bool:
    """Whether somebody takes connections there."""
    try:
        with socket.create_connection((host.strip("[]"), port), timeout=1.0):
            return True
    except OSError:
        return False


def free_ports(hosts: Sequence[str], wanted: Sequence[int]) -> list[int]:
    """``wanted``, each 0 replaced by a port that is free on its host now; InputError where one asked for is taken."""
    with contextlib.ExitStack() as stack:
        ports = []
        for host, port in zip(hosts, wanted, strict=True):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            probe = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise InputError(
                    f"cannot listen on {host}:{port}: {error.strerror}; name another port, or 0 for any"
                ) from error
            ports.append(int(probe.getsockname()[1]))
        return ports


def address(host: str) -> str:
    """The number of a host to listen on, for Triton's HTTP server takes no names; InputError where it has none."""
    try:
        return str(ipaddress.ip_address(host)) if ":" in host else socket.gethostbyname(host)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot listen on {host!r}: {error}; expected an address of this machine") from error


def loopback(host: str) -> str:
    """The loopback address of the same kind as ``host``."""
    return "::1" if ":" in host else "127.0.0.1"


def reachable(host: str) -> str:
    """How a client of this machine writes the address that a server listens on."""
    number = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - read, not bound to
    return f"[{number}]" if ":" in number else number
