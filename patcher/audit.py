"""The audit log: what was done, by whom and with what outcome, as one JSON object for each run of a verb."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher.names import CANARY
from patcher.provenance import author

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "CHANGES",
    "OUTCOMES",
    "begin",
    "concern",
    "finish",
    "is_change",
    "note",
    "read_event",
    "retract",
    "warn",
    "warned",
]

CHANGES = frozenset(
    [
        "export",
        "new-classifier",
        "drop-classifier",
        "add-label",
        "rollback",
        "canary",
        "prune",
        "sync",
        "remove-label",
        "rename-label",
        "merge-labels",
        "remember",
        "tune",
        "upgrade",
        "serve",
    ]
)
"""The verbs whose events the audit log (``$PATCHER_AUDIT_LOG``) keeps; it also keeps those of `doctor --repair`."""
OUTCOMES = {0: "done", 1: "failed", 2: "bad_input", 3: "refused", 4: "put_back", 130: "interrupted"}
"""The outcome for each exit code. With 0, a verb may note another: ``dry_run``, ``declined``."""
_MOST_ERROR = 2000

_event: ContextVar[dict[str, Any] | None] = ContextVar("event", default=None)


def begin(verb: str) -> None:
    """Start the event of a run of ``verb``."""
    _event.set({"verb": verb, "started": time.time(), "since": time.monotonic()})


def note(**facts: Any) -> None:
    """Add facts to this run's event, if there is one: versions, data hash, gate, an ``outcome`` other than done."""
    event = _event.get()
    if event is not None:
        event.update(facts)


def warn(*warnings: str) -> None:
    """Add warnings to this run's event, if there is one."""
    event = _event.get()
    if event is not None and warnings:
        event.setdefault("warnings", []).extend(warnings)


def warned(told: Iterable[str] = ()) -> list[str]:
    """The warnings in ``told``, then the others of this run, each once."""
    return list(dict.fromkeys([*told, *(_event.get() or {}).get("warnings", ())]))


def is_change() -> bool:
    """Whether this run may change something: its verb does, and no other outcome than done (a dry run) was noted."""
    event = _event.get()
    return event is not None and _is_kept(event) and "outcome" not in event


def retract(fact: str) -> None:
    """Remove a fact from this run's event, if it is there: it no longer holds."""
    event = _event.get()
    if event is not None:
        event.pop(fact, None)


def concern(classifiers: Sequence[str]) -> None:
    """Note the classifiers that this run concerns; a trial counts as its classifier."""
    own = [name for name in classifiers if not name.endswith(CANARY)]
    if len(own) == 1:
        note(classifier=own[0])
    elif own:
        note(classifiers=own)


def finish(code: int, error: str = "", *, to_stderr: bool = False) -> None:
    """End the event: write a line to stderr if asked, and for a change a line to the file ``$PATCHER_AUDIT_LOG``.

    If the file cannot be written, there is only a warning on stderr: the change has already been made.
    """
    event = _event.get()
    _event.set(None)
    if event is None:
        return
    started, since, outcome = event.pop("started"), event.pop("since"), event.pop("outcome", "done")
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "verb": event.pop("verb"),
        "outcome": outcome if code == 0 else OUTCOMES.get(code, "failed"),
        "exit_code": code,
        "seconds": round(time.monotonic() - since, 3),
        "user": author(),
        "host": socket.gethostname(),
        **event,
    }
    if "gate" in record:
        record["forced"] = record["gate"] == "forced"
    if error:
        record["error"] = error[:_MOST_ERROR]
    line = json.dumps(record, ensure_ascii=True, default=str)
    if to_stderr:
        _complain(line)
    path = os.environ.get("PATCHER_AUDIT_LOG")
    if path and _is_kept(record):
        data = (b"" if _ends_whole(Path(path)) else b"\n") + line.encode() + b"\n"
        try:
            # A single write to a file opened for appending, so that the lines of several patchers do not mix.
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            try:
                if (written := os.write(descriptor, data)) < len(data):
                    raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes of this event fitted")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as problem:
            _complain(f"warning: the audit log {path} cannot be written: {problem.strerror or problem}")


def _is_kept(event: dict[str, Any]) -> bool:
    return event["verb"] in CHANGES or bool(event.get("repair"))


def _ends_whole(path: Path) -> bool:
    """Whether a file is missing, empty or ends with a newline; otherwise a new line would be appended to a torn one."""
    try:
        if not path.is_file():
            return True
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return True
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
    except OSError:  # perhaps writable and not readable: a needless empty line does no harm
        return False


def _complain(line: str) -> None:
    if sys.stderr is not None:  # None if it was closed at the start (`2>&-`)
        sys.stderr.write(line + "\n")


def read_event(line: bytes) -> dict[str, Any] | None:
    """The event in a line of the audit log; None if there is none, such as in a line that a full disk cut off."""
    try:
        event = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    if isinstance(event, dict) and isinstance(event.get("verb"), str) and isinstance(event.get("outcome"), str):
        return event
    return None
