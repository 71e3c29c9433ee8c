"""The lock of a repository in an object store: an object that its holder keeps fresh.

A kernel's lock goes with its process; an object stays. So its holder writes it anew every few seconds, and one that has
not been written for longer (by the store's own clock), or whose holder was a process of this machine that is gone, is
taken over. A holder that was only slow may wake up after that: every write of a patcher is conditional on what it read,
and who takes over changes what the other one's writes are conditional on (``ModelRepository.lock``).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher.errors import Busy, LockLost, PatcherError, StorageError
from patcher.provenance import author

if TYPE_CHECKING:
    from collections.abc import Callable

    from patcher.storage.s3 import Bucket

__all__ = ["Lease"]

LAPSE_SECONDS = 30.0
"""A lock that was not written for so long belongs to nobody."""
_BEAT_SECONDS = 5.0
_SURE_SECONDS = 25.0
"""For so long after a write the holder need not fear that it was taken over."""
_LOOK_SECONDS = 0.25
REQUEST_SECONDS = 5.0
"""For so long one request for the lock may go unanswered: who waits longer could not keep it anyway."""


class Lease:
    """The lock object ``name`` in a bucket, held from :meth:`acquire` until :meth:`release`."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name = bucket, name
        self._token = uuid.uuid4().hex
        self._beats, self._tag, self._fresh = 0, "", 0.0
        self._writing = threading.Lock()
        self._done = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self, timeout: float, progress: Callable[[], Any]) -> str:
        """Take the lock; who held it and never gave it back, else nothing.

        Raises Busy when it is held and ``progress`` has been the same for ``timeout`` seconds.
        """
        seen, deadline = None, time.monotonic() + timeout
        while True:
            found = self._bucket.get(self._name)
            holder = None if found is None else _holder(found.data)
            if found is None or holder is None or _lapsed(found.age, holder):
                # Another one that looks at the same time loses this race, and waits.
                with contextlib.suppress(LockLost):
                    self._write(_me(), found.tag if found else None)
                    self._prove_conditions()
                    self._beating = threading.Thread(target=self._beat, name="patcher-lease", daemon=True)
                    self._beating.start()
                    return "" if holder is None else f"{holder.get('who')} on {holder.get('host')}"
            if (now := (holder and holder.get("token"), progress())) != seen:
                # A queue of patchers that get on is no reason to give up.
                seen, deadline = now, time.monotonic() + timeout
            elif time.monotonic() >= deadline:
                who = f"{holder.get('who')} on {holder.get('host')}" if holder else "others"
                raise Busy(
                    f"another patcher ({who}) has been working on {self._bucket.url} for {timeout:.0f} s; try again "
                    "when it is done"
                )
            time.sleep(_LOOK_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311  so that those who wait do not march in step

    def held(self) -> bool:
        """Whether somebody holds the lock at this moment."""
        found = self._bucket.get(self._name)
        holder = None if found is None else _holder(found.data)
        return found is not None and holder is not None and not _lapsed(found.age, holder)

    def _prove_conditions(self) -> None:
        """StorageError for a store that writes whatever the condition: nothing here would hold there."""
        for wrong in (None, '"no-tag-of-anything"'):
            try:
                self._bucket.put(self._name, b'{"holder": null}', wrong)
            except LockLost:
                continue
            raise StorageError(
                f"the object store of {self._bucket.url} does not honour conditional writes (If-Match and "
                "If-None-Match), so two patchers could overwrite each other's work; nothing was changed. Expected "
                "Amazon S3, or a store that is as strict"
            )

    def check(self) -> None:
        """LockLost where others may think by now that the holder is gone."""
        if time.monotonic() - self._fresh > _SURE_SECONDS:
            raise LockLost(
                f"the lock of {self._bucket.url} could not be kept: the object store did not answer for "
                f"{_SURE_SECONDS:.0f} s; the next command finishes or undoes the interrupted change"
            )

    def release(self) -> None:
        """Give the lock back; where the store does not answer, or it is another's by now, it lapses by itself."""
        self._done.set()
        if self._beating is not None:
            self._beating.join(REQUEST_SECONDS)
            if self._beating.is_alive():
                return
        with contextlib.suppress(PatcherError):
            self._write(None, self._tag)

    def _beat(self) -> None:
        while not self._done.wait(_BEAT_SECONDS):
            try:
                self._write(_me(), self._tag)
            except LockLost:
                self._fresh = 0.0
                return
            except PatcherError:  # the next beat may get through; check() knows how long it has been
                continue

    def _write(self, holder: dict[str, Any] | None, tag: str | None) -> None:
        # Never deleted, and no two contents alike: so its ETag says for certain whether it is the one that was read.
        with self._writing:
            self._beats += 1
            started = time.monotonic()
            content = {"holder": holder and {**holder, "token": self._token}, "by": self._token, "beat": self._beats}
            data = json.dumps(content).encode()
            try:
                self._tag = self._bucket.put(self._name, data, tag)
            except LockLost:
                # A beat whose answer was lost on its way has changed it, too.
                found = self._bucket.get(self._name)
                if found is None or _by(found.data) != self._token:
                    raise
                self._tag = self._bucket.put(self._name, data, found.tag)
            self._fresh = started


def _by(data: bytes) -> str | None:
    """Whose write it is."""
    try:
        return str(json.loads(data)["by"])
    except (ValueError, KeyError, TypeError):
        return None


def _holder(data: bytes) -> dict[str, Any] | None:
    try:
        holder = json.loads(data)["holder"]
    except (ValueError, KeyError, TypeError):  # nothing that a patcher wrote; it has no meaning, and no holder
        return None
    return holder if isinstance(holder, dict) else None


def _lapsed(age: float, holder: dict[str, Any]) -> bool:
    return age > LAPSE_SECONDS or _gone(holder)


def _me() -> dict[str, Any]:
    return {"who": author(), "host": socket.gethostname(), "machine": _machine(), **_process(os.getpid())}


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this very machine, and is no more."""
    pid = holder.get("pid")
    return holder.get("machine") == _machine() and isinstance(pid, int) and holder.get("start") != _start(pid)


def _machine() -> str:
    # This boot of this machine, and the container that process numbers belong to.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _process(pid: int) -> dict[str, Any]:
    return {"pid": pid, "start": _start(pid)}


def _start(pid: int) -> str:
    """When a process began, in the kernel's ticks, so that a number given again is not taken for it; empty: none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
