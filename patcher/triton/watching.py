"""Whether a server that runs still does its work: it is ended where it hangs, or where one of its processes died."""

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
    """Wait for as long as the server runs; ServerError with its log's words when it ends by itself.

    ``lives`` asks it whether it lives. It is ended when one of its Python processes dies: Triton starts none again,
    says that all is well, and answers no request to the models of that process. And when it hangs: it has not even
    said that it lives for a minute.
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
        # Asked several times: a machine that was paused may have passed the minute in one step.
        if missed > _MISSED and time.monotonic() - heard > _SILENT_SECONDS and process.poll() is None:
            process.kill()
            raise ended(
                f"tritonserver hung: it did not answer for {_SILENT_SECONDS:.0f} s, so it was stopped; start it again"
            )
        before, dead = dead, set(_dead_children(process.pid))
        if before & dead:  # one that Triton itself ended may be seen once, before it asks
            process.kill()
            raise ended(
                "a Python process of tritonserver died (killed, or out of memory?), and the models in it could not "
                "answer any more, so the server was ended; start it again"
            )
        time.sleep(_WATCH_SECONDS)
    raise ended(f"tritonserver exited unexpectedly with exit code {process.returncode}")


def _dead_children(pid: int) -> list[int]:
    """Children of a process that ended without its asking whether they did, as Triton's stubs when they are killed.

    Triton asks after each that it ends itself, or that fails to start.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone meanwhile
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if (state, parent) == ("Z", str(pid)):
                found.append(int(path.parent.name))
    return found
