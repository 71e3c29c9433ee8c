"""Watches a running server, and kills it if it hangs or one of its Python processes dies."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.errors import ServerError
from patcher.triton import server_log

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from typing import NoReturn

__all__ = ["watch"]

_WATCH_SECONDS = 1.0
_SILENT_SECONDS, _MISSED = 60.0, 3


def watch(process: subprocess.Popen[bytes], lives: Callable[[], bool], log_file: Path | None) -> NoReturn:
    """Wait while the server runs; ServerError, which quotes its log, when it ends or has to be killed.

    It is killed if it hangs, which means that ``lives``, its liveness check, has failed for a minute. It is also killed
    if one of its Python processes dies: Triton does not restart that process, still reports itself as healthy, and
    answers no request to the models in it.
    """

    def ended(why: str) -> ServerError:
        return ServerError(f"{why}.{server_log.last_words(log_file)}")

    dead: set[int] = set()
    heard, missed = time.monotonic(), 0
    while process.poll() is None:
        if lives():
            heard, missed = time.monotonic(), 0
        else:
            missed += 1
        # Several checks must have failed, since the minute passes in one step if the machine is suspended.
        if missed > _MISSED and time.monotonic() - heard > _SILENT_SECONDS and process.poll() is None:
            process.kill()
            raise ended(
                f"tritonserver hung: it did not answer for {_SILENT_SECONDS:.0f} s, so it was stopped; start it again"
            )
        before, dead = dead, set(_dead_children(process.pid))
        if before & dead:  # seen only once, Triton may have ended it itself and not yet reaped it
            process.kill()
            raise ended(
                "a Python process of tritonserver died (killed, or out of memory?), and the models in it could not "
                "answer any more, so the server was ended; start it again"
            )
        time.sleep(_WATCH_SECONDS)
    raise ended(f"tritonserver exited unexpectedly with exit code {process.returncode}")


def _dead_children(pid: int) -> list[int]:
    """Ids of a process's zombies: children that ended and that it has not waited for, such as Triton's killed stubs.

    Triton does wait for stubs that it ends itself or that fail to start.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if (state, parent) == ("Z", str(pid)):
                found.append(int(path.parent.name))
    return found
