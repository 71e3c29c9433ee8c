"""The lock of a repository in an object store: a lease, an object that its holder keeps renewing.

A kernel lock ends with its process; an object stays. So the holder rewrites the object every few seconds. The lease is
taken over if it has not been renewed for ``LAPSE_SECONDS`` (by the store's own clock), or if its holder was a process
of this machine that has ended. A holder that was only slow may wake up after that and must not write: every write of a
patcher is conditional on what it read (compare-and-swap), and taking over changes the objects that the former holder's
writes are conditional on (``ModelRepository.lock``).
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
"""A lease that was not renewed for this long has expired."""
_BEAT_SECONDS = 5.0
_SURE_SECONDS = 25.0
"""For this long after a renewal the holder can be sure that nobody has taken the lease over."""
_LOOK_SECONDS = 0.25
REQUEST_SECONDS = 5.0
"""Timeout of one request for the lock: a holder whose requests take longer could not keep the lease anyway."""


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
        """Take the lock; return who held it before without releasing it, or an empty string.

        Raises Busy if somebody else holds it, and neither the holder nor ``progress()`` has changed for ``timeout``
        seconds.
        """
        seen, deadline = None, time.monotonic() + timeout
        while True:
            found = self._bucket.get(self._name)
            holder = None if found is None else _holder(found.data)
            if found is None or holder is None or _lapsed(found.age, holder):
                # Of several that try at the same time, the conditional write lets one win; the others wait.
                with contextlib.suppress(LockLost):
                    self._take(found.tag if found else None)
                    return "" if holder is None else f"{holder.get('who')} on {holder.get('host')}"
            if (now := (holder and holder.get("token"), progress())) != seen:
                # As long as the patchers ahead make progress, keep waiting.
                seen, deadline = now, time.monotonic() + timeout
            elif time.monotonic() >= deadline:
                who = f"{holder.get('who')} on {holder.get('host')}" if holder else "others"
                raise Busy(
                    f"another patcher ({who}) is working on {self._bucket.url} and made no progress for {timeout:g} s; "
                    "try again when it is done"
                )
            time.sleep(_LOOK_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311  jitter against polling in lockstep

    def _take(self, tag: str | None) -> None:
        """Take the lock if the object is still the one that was read as ``tag``, else LockLost; then keep renewing."""
        try:
            self._write(_me(), tag)
            self._prove_conditions()
        except LockLost:
            raise
        except BaseException:  # the object may name us by now, and our next try would wait for ourselves
            self.release()
            raise
        self._beating = threading.Thread(target=self._beat, name="patcher-lease", daemon=True)
        self._beating.start()

    def held(self) -> bool:
        """Whether anybody holds the lock at this moment."""
        found = self._bucket.get(self._name)
        holder = None if found is None else _holder(found.data)
        return found is not None and holder is not None and not _lapsed(found.age, holder)

    def _prove_conditions(self) -> None:
        """Raise StorageError for a store that ignores write conditions: no lock would hold there."""
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
        """Raise LockLost if the last renewal is so old that others may soon take the lease over."""
        if time.monotonic() - self._fresh > _SURE_SECONDS:
            raise LockLost(
                f"the lock of {self._bucket.url} could not be kept: the object store did not answer for "
                f"{_SURE_SECONDS:.0f} s; the next command finishes or undoes the interrupted change"
            )

    def release(self) -> None:
        """Release the lock. If the store does not answer, the lease expires; another holder's lease is left alone."""
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
            except PatcherError:  # the next renewal may succeed; check() knows how old the last one is
                continue

    def _write(self, holder: dict[str, Any] | None, tag: str | None) -> None:
        # The object is never deleted and no two contents are equal, so its ETag identifies exactly what was read.
        with self._writing:
            self._beats += 1
            started = time.monotonic()
            content = {"holder": holder and {**holder, "token": self._token}, "by": self._token, "beat": self._beats}
            data = json.dumps(content).encode()
            try:
                self._tag = self._bucket.put(self._name, data, tag)
            except LockLost:
                # Perhaps the object changed through our own renewal, whose response was lost.
                found = self._bucket.get(self._name)
                if found is None or _by(found.data) != self._token:
                    raise
                self._tag = self._bucket.put(self._name, data, found.tag)
            self._fresh = started


def _by(data: bytes) -> str | None:
    """The token of the process that wrote the object, or None."""
    try:
        return str(json.loads(data)["by"])
    except (ValueError, KeyError, TypeError):
        return None


def _holder(data: bytes) -> dict[str, Any] | None:
    try:
        holder = json.loads(data)["holder"]
    except (ValueError, KeyError, TypeError):  # not written by a patcher, so there is no holder
        return None
    return holder if isinstance(holder, dict) else None


def _lapsed(age: float, holder: dict[str, Any]) -> bool:
    return age > LAPSE_SECONDS or _gone(holder)


def _me() -> dict[str, Any]:
    return {"who": author(), "host": socket.gethostname(), "machine": _machine(), **_process(os.getpid())}


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    pid = holder.get("pid")
    if holder.get("machine") != _machine() or not isinstance(pid, int):
        return False
    start = _start(pid)
    return not _exists(pid) if start is None else holder.get("start") != start


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def _machine() -> str:
    # Identifies this boot of this machine and the PID namespace (container) that process ids belong to.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _process(pid: int) -> dict[str, Any]:
    return {"pid": pid, "start": _start(pid)}


def _start(pid: int) -> str | None:
    """A process's start time in kernel ticks, which tells it from a later one with the same id; empty if it ended.

    None if /proc does not show the process: it does not exist, or /proc hides those of other users (hidepid).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
