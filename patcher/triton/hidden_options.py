"""Pass options to a program without showing them to other users in the process list.

A process's command line is readable by every user of the machine, its environment only by its own user. So a secret
option is passed in an environment variable, and asterisks take its place on the command line. The program is stopped,
as by a debugger, once it is loaded and before its first instruction runs. Then the argv pointer to the asterisks is
redirected to the variable's value, and the variable's own pointer to another variable, so that neither the program nor
its children find the secret in their environment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["TRACED", "masked", "move_options"]

TRACED = "ctypes.CDLL(None).ptrace(0, 0, 0, 0)"
"""Python code (PTRACE_TRACEME) to run before exec of the program to be stopped; not 0 if the system forbids tracing."""
_DETACH = 17
_SECONDS = 10.0
_WORD = struct.calcsize("P")
_VARIABLE = "PATCHER_OPTION_"


def masked(command: Sequence[str], secret: str) -> tuple[list[str], dict[str, str]]:
    """The command with asterisks for ``secret`` in its options, and the variables that hold the real options."""
    program, *options = command
    moved = {f"{_VARIABLE}{place}": word for place, word in enumerate(options, start=1) if secret in word}
    return [program, *(word.replace(secret, "*" * len(secret)) for word in options)], moved


def move_options(pid: int, moved: Mapping[str, str]) -> bool:
    """Restore the ``moved`` options of a stopped child, which this thread must have started, and let it run.

    Returns False if that fails; the caller must then end the child.
    """
    state = _stopped(pid)
    if state is None or (state.si_code, state.si_status) != (os.CLD_TRAPPED, signal.SIGTRAP):
        return False
    try:
        _move(pid, moved)
    except (OSError, ValueError, struct.error):
        return False
    return bool(ctypes.CDLL(None).ptrace(_DETACH, pid, 0, 0) == 0)


def _stopped(pid: int) -> os.waitid_result | None:
    """How a child stopped or ended; None if neither happens in time: some systems accept tracing but never stop it."""
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        # WNOWAIT leaves the child to be reaped by its own Popen.
        state = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT | os.WNOHANG)
        if state is not None:
            return state
        time.sleep(0.001)
    return None


def _move(pid: int, moved: Mapping[str, str]) -> None:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    stack, begin, end = int(fields[25]), int(fields[47]), int(fields[48])  # startstack, env_start and env_end, proc(5)
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        file = memory.fileno()
        strings = os.pread(file, end - begin, begin).split(b"\0")[:-1]
        # On the stack: argc, a pointer per argument, a null pointer, and a pointer per environment variable.
        (count,) = struct.unpack("P", os.pread(file, _WORD, stack))
        variables = stack + (count + 2) * _WORD
        pointers = struct.unpack(f"{len(strings)}P", os.pread(file, len(strings) * _WORD, variables))
        names = [string.partition(b"=")[0].decode(errors="replace") for string in strings]
        innocent = next(pointer for name, pointer in zip(names, pointers, strict=True) if name not in moved)
        for name, word in moved.items():
            place = names.index(name)
            value = pointers[place] + len(name) + 1
            if os.pread(file, len(word.encode()) + 1, value) != word.encode() + b"\0":
                raise ValueError(f"{name} is not where its pointer leads")
            number = int(name.removeprefix(_VARIABLE))
            os.pwrite(file, struct.pack("P", value), stack + (number + 1) * _WORD)
            os.pwrite(file, struct.pack("P", innocent), variables + place * _WORD)
