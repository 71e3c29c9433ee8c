"""The journal of a classifier: which changes began and how they ended, and the hash of every file ever published.

It is a write-ahead log with one JSON object per line, appended and flushed before the change that it announces. Each
line contains the SHA-256 of the line before it, so that a line that is later changed or removed is detected. It answers
three questions: whether a patch was interrupted, and where; which version numbers were ever used; and whether a
version's file is still the one that was published.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher.errors import RepositoryError
from patcher.provenance import author, now

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from patcher.storage import Storage

__all__ = ["Journal", "Pending", "hashes"]

_ENDS = ("done", "undone")
_BEGINS = ("publish", "switch", "back")


@dataclass(frozen=True)
class Pending:
    """A change that was begun and neither finished nor undone.

    ``published`` is the version that it wrote or was about to write. ``switched`` holds the pinned versions before and
    after, if the pin was replaced or about to be. ``back`` says that undoing had begun.
    """

    published: int | None
    switched: tuple[int, int] | None
    back: bool

    def __str__(self) -> str:
        if self.switched is None:
            return f"version {self.published} was being published"
        return f"version {self.switched[1]} was about to serve after {self.switched[0]}"


class Journal:
    """The journal in the file ``name``, which need not exist yet. Only the holder of the lock may append."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        # One change reads the journal about ten times, and it only grows: lines once parsed are not parsed again.
        self._read: tuple[list[bytes], list[dict[str, Any]]] = ([], [])

    @property
    def path(self) -> Path:
        """Path of the journal's file; InputError if the repository is not a folder."""
        return self.storage.root / self.name

    @property
    def _where(self) -> str:
        return f"{self.storage.location}/{self.name}"

    def entries(self) -> list[dict[str, Any]]:
        """All entries, oldest first; an incomplete last line, left by a killed process, is ignored.

        Raises RepositoryError if an entry cannot be read or does not contain the hash of the one before it.
        """
        lines, (known, found) = self._lines(), self._read
        if lines[: len(known)] != known:
            known, found = [], []
        found, previous = list(found), _sha256(known[-1]) if known else ""
        for number, line in enumerate(lines[len(known) :], len(known) + 1):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict) or not isinstance(entry["event"], str):
                    raise ValueError("no event")  # noqa: TRY004  one handler below for all
                _check_types(entry)
                chained = entry["previous"] == previous
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise RepositoryError(
                    f"{self._where}, line {number}, is not an entry of a journal ({error}); `patcher doctor --repair` "
                    "sets the journal aside and starts a new one"
                ) from error
            if not chained:
                raise RepositoryError(
                    f"{self._where}, line {number}, does not follow from the line before it: the journal was changed; "
                    "`patcher doctor --repair` sets it aside and starts a new one"
                )
            previous = _sha256(line)
            found.append(entry)
        self._read = (lines, found)
        return list(found)

    def pending(self) -> Pending | None:
        """The change that was interrupted, if one was."""
        last: dict[str, dict[str, Any]] = {}
        for entry in self.entries():
            if entry["event"] in _ENDS:
                last = {}
            elif entry["event"] in _BEGINS:
                last[entry["event"]] = entry
        if not last:
            return None
        publish, switch = last.get("publish"), last.get("switch")
        return Pending(
            publish["version"] if publish else None,
            (switch["from"], switch["to"]) if switch else None,
            "back" in last,
        )

    def withdrawn(self) -> frozenset[int]:
        """Versions recorded for removal because they never served."""
        return frozenset(v for entry in self.entries() if entry["event"] == "withdrawn" for v in entry["versions"])

    def published(self) -> dict[int, dict[str, str]]:
        """SHA-256 of each file of every version ever published, by version and file name."""
        return {
            entry["version"]: dict(entry["files"])
            for entry in self.entries()
            if entry["event"] in ("publish", "adopted")
        }

    def served(self) -> frozenset[int]:
        """Versions that served until another replaced them."""
        return frozenset(entry["from"] for entry in self.entries() if entry["event"] == "switch")

    def pruned(self) -> frozenset[int]:
        """Versions recorded for removal because they were old."""
        return frozenset(v for entry in self.entries() if entry["event"] == "pruned" for v in entry["versions"])

    def append(self, event: str, **values: Any) -> None:
        """Append an entry durably; StorageError, with nothing appended, if it cannot be written."""
        lines = self._lines()
        self.storage.append(self.name, sum(len(line) + 1 for line in lines), _line(lines, event, values))

    def insist(self, event: str, **values: Any) -> None:
        """Append an entry even if a process that lost the lock is writing; afterwards that process cannot write."""
        self.storage.amend(self.name, lambda data: data + _line(_split(data), event, values))

    def set_aside(self) -> str:
        """Rename a journal that can no longer be read, and return its new name."""
        number = 1
        while self.storage.has(aside := f"{self.name}.damaged-{number}"):
            number += 1
        self.storage.rename(self.name, aside)
        return aside

    def _lines(self) -> list[bytes]:
        return _split(self.storage.find(self.name) or b"")


def _split(data: bytes) -> list[bytes]:
    return data.split(b"\n")[:-1]


def _line(lines: Sequence[bytes], event: str, values: Mapping[str, Any]) -> bytes:
    entry = {
        "event": event, **values, "at": now(), "by": author(), "previous": _sha256(lines[-1]) if lines else "",
    }  # fmt: skip
    return json.dumps(entry, ensure_ascii=False, sort_keys=True).encode() + b"\n"


def hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of each file's content."""
    return {name: _sha256(data) for name, data in files.items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_NEEDED: dict[str, dict[str, type]] = {
    "publish": {"version": int, "files": dict},
    "adopted": {"version": int, "files": dict},
    "switch": {"from": int, "to": int},
    "pruned": {"versions": list},
    "withdrawn": {"versions": list},
}


def _check_types(entry: Mapping[str, Any]) -> None:
    for name, kind in {"previous": str, **_NEEDED.get(entry["event"], {})}.items():
        if not isinstance(entry[name], kind):
            raise ValueError(f"{name} is {entry[name]!r:.40}")  # noqa: TRY004  one handler for all
