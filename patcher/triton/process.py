"""Start the server's process, and keep secrets out of its command line."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.arguments import require
from patcher.errors import InputError, ServerError
from patcher.triton.client import LARGEST_PORT
from patcher.triton.hidden_options import TRACED, masked, move_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "accepts",
    "address",
    "await_ports",
    "check_ports",
    "free_ports",
    "has_gpu",
    "hide_argument",
    "is_taken",
    "loopback",
    "reachable",
    "start_with_parent",
]

# Triton's HTTP library copies forms to the stack of a thread, and its JSON parser recurses. With the usual 8 MB, one
# request of 4.5 MB to any of its HTTP ports ends the server, without a key. Stacks take memory only as far as used.
_STACK = 1 << 30

# Asks the kernel for SIGTERM when the parent ends and, if it is to be traced, to be stopped at exec; then becomes the
# server. This is a separate program because code between fork and exec in a process with threads may hang.
_LAUNCHER = f"""
import ctypes, os, resource, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the starting process is gone")
resource.setrlimit(resource.RLIMIT_STACK, (int(sys.argv[3]), resource.getrlimit(resource.RLIMIT_STACK)[1]))
if sys.argv[2] == "traced" and {TRACED}:
    sys.exit(1)
os.execv(sys.argv[4], sys.argv[4:])
"""


def start_with_parent(
    command: Sequence[str], environment: Mapping[str, str], log: int, kept: Sequence[int], secret: str
) -> tuple[subprocess.Popen[bytes], bool]:
    """Start ``command``, which gets SIGTERM when this process ends, however it ends; output goes to ``log``.

    ``log`` is a descriptor. The command and its children inherit the descriptors ``kept``, which stay open as long as
    one of them runs. Returns the process, and whether ``secret``, a part of the command, was kept out of the process
    list, which some systems do not allow.

    Raises ServerError if it cannot be started.
    """
    # The parent-death signal refers to the thread that started the child, so that thread must live as long as we do.
    started = threading.Event()
    box: list[tuple[subprocess.Popen[bytes], bool] | OSError] = []

    def launch(how: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - a list of our own, no shell
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), how, str(_stack()), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=kept,
            start_new_session=True,  # so that Ctrl-C in the terminal reaches only us, and we pass it on
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


def _stack() -> int:
    """The size in bytes of each of the server's stacks: ours, unless the system counts address space as memory."""
    now, most = resource.getrlimit(resource.RLIMIT_STACK)
    counted = Path("/proc/sys/vm/overcommit_memory")
    strict = counted.exists() and counted.read_text().strip() == "2"
    if strict or now >= _STACK or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return now
    # The kernel refuses a stack that is larger than all of the machine's memory.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = min(_STACK, memory // 4)
    return wanted if most == resource.RLIM_INFINITY else min(wanted, most)


def hide_argument(process: subprocess.Popen[bytes], program: Path, secret: bytes) -> bool:
    """Overwrite ``secret`` in the command line of ``process`` once it runs ``program``, which has read its options.

    A parent may write to its child's memory under every setting of ptrace_scope except 2 and 3. Returns False if that
    fails; the secret then stays visible to other users of the machine.
    """
    folder = Path(f"/proc/{process.pid}")
    deadline = time.monotonic() + 30.0
    try:
        # The program starts threads only after it has read its options.
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
    """Whether Triton may find a GPU on this machine (``GPUS`` in our onnxruntime backend is a copy of this check)."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def accepts(host: str, port: int) -> bool:
    """Whether somebody accepts TCP connections there."""
    try:
        with socket.create_connection((host.strip("[]"), port), timeout=1.0):
            return True
    except OSError:
        return False


def check_ports(**given: int) -> None:
    """InputError unless each number, passed by its name, is a port's, or 0 for any."""
    require(int, **given)
    for name, port in given.items():
        if not 0 <= port <= LARGEST_PORT:
            raise InputError(f"{name} is {port}; expected 0 (any free port) to {LARGEST_PORT}")


def free_ports(hosts: Sequence[str], wanted: Sequence[int]) -> list[int]:
    """``wanted``, with each 0 replaced by a port that is now free on its host; InputError if a wanted port is taken."""
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


def await_ports(hosts: Sequence[str], wanted: Sequence[int], seconds: float, say: Callable[[str], object]) -> None:
    """Wait while a ``wanted`` port is taken, for at most ``seconds``, and ``say`` so: its server may be ending."""
    deadline, told = time.monotonic() + seconds, False
    while time.monotonic() < deadline:
        try:
            free_ports(hosts, wanted)
        except InputError as error:
            if not is_taken(error):
                return  # waiting does not help; the start will say what is wrong
            if not told:
                say(f"waiting up to {seconds:g} s, in case a server is just ending: {error}")
            told = True
            time.sleep(0.1)
        else:
            return


def is_taken(error: InputError) -> bool:
    """Whether an error of ``free_ports`` is about a port that another process has."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE


def address(host: str) -> str:
    """The IP address of a host to listen on, since Triton's HTTP server takes no names; InputError if it has none."""
    try:
        return str(ipaddress.ip_address(host)) if ":" in host else socket.gethostbyname(host)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot listen on {host!r}: {error}; expected an address of this machine") from error


def loopback(host: str) -> str:
    """The loopback address of the same family (IPv4 or IPv6) as ``host``."""
    return "::1" if ":" in host else "127.0.0.1"


def reachable(host: str) -> str:
    """The host that a client on this machine uses to reach a server that listens on ``host``."""
    number = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - read, not bound to
    return f"[{number}]" if ":" in number else number
