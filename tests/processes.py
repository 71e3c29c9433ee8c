"""Processes and conditions that tests wait for, without a guess at how long something takes on this machine."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 60.0
"""Longer than a slow machine needs for anything that ends by itself; a test that passes never waits that long."""


def has_ipv6() -> bool:
    """Whether ::1 can be listened on; many containers have no IPv6 although Python knows it."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")


def soon(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Whether ``condition`` comes true within that time; it is asked at least twice."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return bool(condition())
        time.sleep(0.02)
    return True


def freeze(pid: int) -> None:
    """Send SIGSTOP, and return when every thread has stopped: the kernel stops one after another."""
    os.kill(pid, signal.SIGSTOP)

    def states() -> set[str]:
        tasks = Path(f"/proc/{pid}/task").glob("*/stat")
        return {task.read_text().rpartition(")")[2].split()[0] for task in tasks}

    assert soon(lambda: states() <= {"T", "t"})


def living_stubs(pid: int, *names: str) -> list[psutil.Process]:
    """The living children of a tritonserver that run one of these models; others may be ending meanwhile."""
    found = []
    for child in psutil.Process(pid).children():
        try:
            command = child.cmdline()
        except psutil.Error:  # has ended, or is a zombie
            continue
        if any(f"{name}/" in " ".join(command[1:2]) for name in names):
            found.append(child)
    return found
