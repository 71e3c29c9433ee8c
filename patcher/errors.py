"""The errors of patcher, as one tree, with their exit codes.

PatcherError                 1  failed, nothing changed
├── InputError               2  wrong usage or bad input, nothing changed
│   ├── ExamplesError           a labelled file or a text that cannot be used
│   ├── LabelError              a label that exists already, or that does not exist
│   ├── VersionError            a head version that does not exist
│   ├── RepositoryError         not a model repository of ours, damaged, or of a newer format
│   └── CheckpointError         a checkpoint that cannot be read or must not be trusted
│       └── SplitError          a model that cannot be split into backbone and head
├── ExportError              1  the export started and could not be finished
│   └── ParityError             what was exported does not answer as the checkpoint does
│       └── PrecisionError      a backbone of reduced precision loses more than the limit for it
├── ServerError              1  the server answered with an error
│   ├── ServerUnreachable       no server answers, or not in time
│   │   ├── TlsError            something answers, but without the TLS (or the plain connection) that was asked for
│   │   └── WrongPort           a server answers, but on its HTTP or metrics port
│   └── ServerRefused           the server understood the request and refused it (such as an unknown model)
│       └── ControlRefused      it accepts no model control, or not with this key
├── ToolError                1  a program or library that is needed is missing or failed
├── StorageError             1  the disk or the object store refused a write
│   └── LockLost                another patcher took over the lock, and this one can no longer write
├── Busy                     1  another patcher holds the repository's lock
├── GateRefused              3  the gate refused the patch, nothing published
└── NotServed                4  published, but the server would not serve it; the previous version is back

Messages say what was given, what was expected, and which command to try next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from patcher.wording import redacted

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Busy",
    "CheckpointError",
    "ControlRefused",
    "ExamplesError",
    "ExportError",
    "GateRefused",
    "InputError",
    "LabelError",
    "LockLost",
    "NotServed",
    "ParityError",
    "PatcherError",
    "PrecisionError",
    "RepositoryError",
    "ServerError",
    "ServerRefused",
    "ServerUnreachable",
    "SplitError",
    "StorageError",
    "TlsError",
    "ToolError",
    "VersionError",
    "WrongPort",
    "as_sentence",
]


def as_sentence(error: object) -> str:
    """An error's message with a full stop at its end, so that another sentence can follow."""
    message = str(error)
    return message if message.endswith((".", "?", "!")) else f"{message}."


class PatcherError(Exception):
    """Base of all errors that are reported to the user; ``exit_code`` is the command line's exit status."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(redacted(message))
        self.report = dict(report or {})
        """Details for scripts, in addition to the message; `--json` prints them."""

    @property
    def logged(self) -> str:
        """What the audit log keeps of the message."""
        return str(self)


class InputError(PatcherError):
    """Wrong usage or bad input; nothing was changed."""

    exit_code = 2


class ExamplesError(InputError):
    """A labelled file or a text that cannot be used."""


class LabelError(InputError):
    """A label that exists already, or that does not exist."""


class VersionError(InputError):
    """A head version that does not exist."""


class RepositoryError(InputError):
    """Not a model repository of ours, a damaged one, or one of a newer format."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read or must not be trusted."""


class SplitError(CheckpointError):
    """A model that cannot be split into a backbone and a last linear layer."""


class ExportError(PatcherError):
    """The export started and could not be finished; the repository is unchanged."""


class ParityError(ExportError):
    """What was exported does not answer as the checkpoint does."""


class PrecisionError(ParityError):
    """A backbone of reduced precision loses more than the limit for it; ``report`` holds what was measured."""


class ServerError(PatcherError):
    """The server answered with an error."""


class ServerUnreachable(ServerError):
    """No server answers at the address, or not in time."""


class TlsError(ServerUnreachable):
    """Something answers there, but without the TLS (or the plain connection) that was asked for."""


class WrongPort(ServerUnreachable):
    """A server answers there, but it is its HTTP or metrics port, and gRPC was expected."""


class ServerRefused(ServerError):
    """The server understood the request and refused it."""


class ControlRefused(ServerRefused):
    """The server accepts no model control, or not with the given key; this says nothing about any model."""


class ToolError(PatcherError):
    """A program or a library that is needed is missing or failed."""


class StorageError(PatcherError):
    """The disk or the object store refused a write; what was there before is untouched."""


class LockLost(StorageError):
    """Another patcher took over the lock, or changed the file that was to be written; its changes are untouched."""


class Busy(PatcherError):
    """Another patcher holds the repository's lock."""


class GateRefused(PatcherError):
    """The gate refused the patch; nothing was published. ``report`` holds what it found.

    ``verdict`` is the short form of the message, without the advice, which quotes examples.
    """

    exit_code = 3

    def __init__(self, message: str, report: Mapping[str, Any] | None = None, verdict: str = "") -> None:
        super().__init__(message, report)
        self.verdict = verdict or str(self)

    @property
    def logged(self) -> str:
        """What the audit log keeps of the message: no texts."""
        return self.verdict


class NotServed(PatcherError):
    """Published, but the server would not serve it. The previous version is back, or the message says why not."""

    exit_code = 4
