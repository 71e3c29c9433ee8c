"""Runs a verb for ``kill.py``, and kills itself before one of the steps of its change.

    python tests/benchmarks/kill_steps.py PIPE STEP VERB ... --repo DIR

A step is a write of a file of the repository (open, rename, link, remove, ...; in an object store, a PUT or DELETE), or
a model that the server is asked to load. The first is the first write of a journal: what comes before it, reading and
fitting, changes nothing. With STEP 0, nothing is killed here. The descriptor PIPE gets a line when the first step
comes, and at the end a line of JSON: the seconds from the first step to each one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

# Imported before the verb begins, so that a change takes as long as it does in a process that has them.
import onnxruntime  # noqa: F401

import patcher.labelling
import patcher.relabelling  # noqa: F401
from patcher.cli import main
from patcher.triton.client import TritonServer

_WRITES = {f"os.{name}" for name in ("chmod", "link", "mkdir", "remove", "rename", "rmdir", "truncate", "utime")}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Steps:
    """Counts the steps of a change, and kills this process before number ``at``."""

    def __init__(self, pipe: int, at: int) -> None:
        self.pipe, self.at = pipe, at
        self.times: list[float] = []

    def step(self, name: str) -> None:
        if threading.current_thread() is not threading.main_thread():  # who keeps a lease alive makes no change
            return
        if not self.times and not name.endswith(".journal"):
            return
        if not self.times:
            self.tell("begun")
        self.times.append(time.perf_counter())
        if len(self.times) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(self, line: str) -> None:
        os.write(self.pipe, f"{line}\n".encode())

    def watch_folder(self, root: str) -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _WRITES or (event == "open" and arguments[2] & _WRITING):
                name = arguments[0]
                if isinstance(name, (str, os.PathLike)):
                    path = os.fspath(name)
                    if path.startswith(root) or not path.startswith("/"):  # relative where a tree is removed
                        self.step(path)

        sys.addaudithook(hook)

    def before(self, owner: type, method: str) -> None:
        """Count each call of a method, whose first argument is a name, as a step."""
        real = getattr(owner, method)

        def counted(owned: Any, name: str, *rest: Any, **more: Any) -> Any:
            self.step(name)
            return real(owned, name, *rest, **more)

        setattr(owner, method, counted)


def run(pipe: int, at: int, arguments: list[str]) -> int:
    steps = Steps(pipe, at)
    location = arguments[arguments.index("--repo") + 1]
    if "://" in location:
        from patcher.storage.s3 import Bucket

        for method in ("put", "delete"):
            steps.before(Bucket, method)
    else:
        steps.watch_folder(location)
    for method in ("load", "unload"):
        steps.before(TritonServer, method)
    code = main(arguments)
    steps.tell(json.dumps([time - steps.times[0] for time in steps.times]))
    return code


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
