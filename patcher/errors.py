"""Everything that can go wrong, as one tree.

PatcherError                 1  failed, nothing changed
├── InputError               2  wrong usage or bad input, nothing changed
│   ├── ExamplesError           a labelled file or a text that cannot be used
│   ├── LabelError              a label that exists already, or that is not there
│   ├── VersionError            a head version that is not there
│   ├── RepositoryError         not a model repository of ours, damaged, or of a newer format
│   └── CheckpointError         a checkpoint that cannot be read or must not be trusted
│       └── SplitError          a model that cannot be split into backbone and head
├── ExportError              1  the export started and could not be finished
│   └── ParityError             what was exported does not answer as the checkpoint does
│       └── PrecisionError      a backbone in fewer bits loses more than its precision may
├── ServerError              1  the server answered with an error
│   ├── ServerUnreachable       nobody answers, or not in time
│   │   ├── TlsError            somebody answers, but the connection cannot be secured as asked
│   │   └── WrongPort           a server answers, but by HTTP
│   └── ServerRefused           the server understood and said no (an unknown model)
│       └── ControlRefused      it takes no model control at all, or not with this key
├── ToolError                1  a program or library that is needed is missing or failed
├── StorageError             1  the disk, or the object store, would not take what was to be written
│   └── LockLost                another patcher took over meanwhile, and this one writes nothing any more
├── Busy                     1  another patcher holds the repository's lock
├── GateRefused              3  the gate refused the patch, nothing published
└── NotServed                4  published, but the server would not serve it; the previous version is back

Messages say what was got, what was expected, and the next command to try.
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
    """A message with a mark at its end, for another sentence to follow."""
    message = str(error)
    return message if message.endswith((".", "?", "!")) else f"{message}."


class PatcherError(Exception):
    """Anything this program reports to its user; ``exit_code`` is what the command line ends with."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(redacted(message))
        self.report = dict(report or {})
        """What scripts need beside the message; `--json` prints it."""


class InputError(PatcherError):
    """Wrong usage or bad input; nothing was changed."""

    exit_code = 2


class ExamplesError(InputError):
    """A labelled file or a text that cannot be used."""


class LabelError(InputError):
    """A label that exists already, or that is not there."""


class VersionError(InputError):
    """A head version that is not there."""


class RepositoryError(InputError):
    """Not a model repository of ours, a damaged one, or one of a newer format."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read or must not be trusted."""


class SplitError(CheckpointError):
    """A model that cannot be split into a backbone and a last linear layer."""


class ExportError(PatcherError):
    """The export started and could not be finished; the repository is as it was."""


class ParityError(ExportError):
    """What was exported does not answer as the checkpoint does."""


class PrecisionError(ParityError):
    """A backbone in fewer bits loses more than its precision may; ``report`` holds what was measured."""


class ServerError(PatcherError):
    """The server answered with an error."""


class ServerUnreachable(ServerError):
    """Nobody answers at the server's address, or not in time."""


class TlsError(ServerUnreachable):
    """Somebody answers there, but not with the TLS (or the lack of it) that was asked for."""


class WrongPort(ServerUnreachable):
    """A server answers there, but it is its HTTP port, and gRPC was expected."""


class ServerRefused(ServerError):
    """The server understood the request and refused it."""


class ControlRefused(ServerRefused):
    """The server takes no model control at all, or not with the key that it got; that says nothing of any model."""


class ToolError(PatcherError):
    """A program or a library that is needed is missing or failed."""


class StorageError(PatcherError):
    """The disk, or the object store, would not take what was to be written; what was there is untouched."""


class LockLost(StorageError):
    """Another patcher took the lock over, or changed what was to be written; what it wrote is untouched."""


class Busy(PatcherError):
    """Another patcher holds the repository's lock."""


class GateRefused(PatcherError):
    """The gate refused the patch; nothing was published. ``report`` holds what it found."""

    exit_code = 3


class NotServed(PatcherError):
    """The new version was published, but the server would not serve it; the previous one was put back."""

    exit_code = 4
