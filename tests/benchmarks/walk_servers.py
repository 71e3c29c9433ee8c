"""The servers of a walk: real processes on one repository, each with a port that it keeps across restarts."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher import ModelRepository
from patcher.serve import served_models
from patcher.triton.server import EmbeddedTriton

if TYPE_CHECKING:
    from walk_model import World

__all__ = ["Servers"]

_SHARED = Path("/dev/shm")  # noqa: S108 - where Triton's stubs have their shared memory


class Servers:
    """``count`` servers of the repository at ``location``; their logs are in ``folder``."""

    def __init__(self, location: Any, folder: Path, count: int) -> None:
        self.location, self.folder = location, folder
        self._running: list[EmbeddedTriton | None] = [None] * count
        self._ports = [0] * count

    def start(self, place: int, world: World) -> None:
        """Start a server on the repository as it is, and tell the model."""
        repository = ModelRepository(self.location)
        triton = EmbeddedTriton(
            repository.storage.served_from,
            served_models(repository),
            grpc_port=self._ports[place],
            log_file=self.folder / f"triton-{place}.log",
        )
        triton.start()
        self._running[place], self._ports[place] = triton, triton.grpc_port
        world.start(place, triton.url)

    def stop(self, place: int, world: World) -> None:
        """Stop a server."""
        if triton := self._running[place]:
            triton.stop()
        self._running[place] = None
        world.stop(place)

    def kill(self, place: int, world: World) -> None:
        """Kill a server with SIGKILL and clean up after it, as the process that started it would."""
        triton = self._running[place]
        if triton and triton.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(triton.pid, signal.SIGKILL)
        self.stop(place, world)

    def hang(self, place: int, *, still: bool) -> None:
        """Suspend a server, or resume it."""
        triton = self._running[place]
        if triton and triton.pid:
            os.kill(triton.pid, signal.SIGSTOP if still else signal.SIGCONT)

    def processes(self, place: int) -> list[int]:
        """Ids of the processes in which a server runs its models."""
        triton = self._running[place]
        if not triton or not triton.pid:
            return []
        threads = Path(f"/proc/{triton.pid}/task").glob("*/children")  # each lists the children that it started
        return sorted(int(each) for thread in threads for each in thread.read_text().split())

    def kill_process(self, number: int) -> None:
        """Kill one of these processes with SIGKILL, and give it time to end."""
        os.kill(number, signal.SIGKILL)
        time.sleep(0.1)

    def left(self) -> list[str]:
        """Names of shared-memory regions that are left although no server runs."""
        if any(self._running):
            return []
        return [entry.name for entry in _SHARED.iterdir() if entry.name.startswith(f"patcher_{os.getpid()}_")]
