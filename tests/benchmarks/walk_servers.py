"""The servers of a walk: real processes on one repository, each at its own port, which it keeps when it comes back."""

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

_SHARED = Path("/dev/shm")  # noqa: S108 - where Triton's stubs keep theirs


class Servers:
    """So many servers of the repository at ``location``; their logs lie in ``folder``."""

    def __init__(self, location: Any, folder: Path, count: int) -> None:
        self.location, self.folder = location, folder
        self._running: list[EmbeddedTriton | None] = [None] * count
        self._ports = [0] * count

    def start(self, place: int, world: World) -> None:
        """Start one on what the files say; the model goes along."""
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
        """Stop one."""
        if triton := self._running[place]:
            triton.stop()
        self._running[place] = None
        world.stop(place)

    def kill(self, place: int, world: World) -> None:
        """``kill -9``; what it leaves is cleared away, as the process that started it does."""
        triton = self._running[place]
        if triton and triton.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(triton.pid, signal.SIGKILL)
        self.stop(place, world)

    def hang(self, place: int, *, still: bool) -> None:
        """Have one answer nobody, or go on."""
        triton = self._running[place]
        if triton and triton.pid:
            os.kill(triton.pid, signal.SIGSTOP if still else signal.SIGCONT)

    def processes(self, place: int) -> list[int]:
        """The processes in which one runs its models."""
        triton = self._running[place]
        if not triton or not triton.pid:
            return []
        threads = Path(f"/proc/{triton.pid}/task").glob("*/children")  # each knows the children that it started
        return sorted(int(each) for thread in threads for each in thread.read_text().split())

    def kill_process(self, number: int) -> None:
        """``kill -9`` one of these, and wait until it is gone."""
        os.kill(number, signal.SIGKILL)
        time.sleep(0.1)

    def left(self) -> list[str]:
        """What lies in shared memory although none of them runs."""
        if any(self._running):
            return []
        return [entry.name for entry in _SHARED.iterdir() if entry.name.startswith(f"patcher_{os.getpid()}_")]
