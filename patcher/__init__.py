"""Add a label to a fine-tuned text classifier that Triton serves: one small head, no downtime, a bound on the harm.

Each function's docstring names its specific errors. In addition, everything that changes a repository raises
InputError for arguments of the wrong type, RepositoryError for damaged files, Busy while another patcher holds the
lock, and StorageError if nothing can be written; with a server, it raises ServerUnreachable if none answers, and
ControlRefused if the server requires another key. In all these cases nothing was changed. ``patcher.errors`` shows the
tree of errors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patcher.canary import SplitClient
    from patcher.classifier import Classifier
    from patcher.difference import diff
    from patcher.dropping import drop_classifier
    from patcher.errors import (
        Busy,
        CheckpointError,
        ControlRefused,
        ExamplesError,
        ExportError,
        GateRefused,
        InputError,
        LabelError,
        LockLost,
        NotServed,
        ParityError,
        PatcherError,
        PrecisionError,
        RepositoryError,
        ServerError,
        ServerRefused,
        ServerUnreachable,
        SplitError,
        StorageError,
        TlsError,
        ToolError,
        VersionError,
        WrongPort,
    )
    from patcher.examples import Examples
    from patcher.examples_file import read_examples
    from patcher.fleet import Fleet
    from patcher.founding import FoundingSettings, NewClassifierReport, new_classifier
    from patcher.head import Head
    from patcher.labelling import PatchReport, add_label, add_labels
    from patcher.lifecycle import evaluate, history, prune, rollback, sync
    from patcher.memory import Memory
    from patcher.patch import PatchSettings
    from patcher.relabelling import merge_labels, remove_label, rename_label
    from patcher.remembering import remember
    from patcher.repository import ModelRepository
    from patcher.triton.client import TritonServer
    from patcher.triton.server import EmbeddedTriton
    from patcher.triton.tensors import Answer
    from patcher.triton.tls import ClientTls

__version__ = "0.17.0"

# Name -> module. Each is imported on first use, so that `import patcher` is nearly free.
_HOMES = {
    "Answer": "patcher.triton.tensors",
    "Busy": "patcher.errors",
    "CheckpointError": "patcher.errors",
    "Classifier": "patcher.classifier",
    "ClientTls": "patcher.triton.tls",
    "ControlRefused": "patcher.errors",
    "EmbeddedTriton": "patcher.triton.server",
    "Examples": "patcher.examples",
    "ExamplesError": "patcher.errors",
    "ExportError": "patcher.errors",
    "Fleet": "patcher.fleet",
    "FoundingSettings": "patcher.founding",
    "GateRefused": "patcher.errors",
    "Head": "patcher.head",
    "InputError": "patcher.errors",
    "LabelError": "patcher.errors",
    "LockLost": "patcher.errors",
    "Memory": "patcher.memory",
    "ModelRepository": "patcher.repository",
    "NewClassifierReport": "patcher.founding",
    "NotServed": "patcher.errors",
    "ParityError": "patcher.errors",
    "PatchReport": "patcher.labelling",
    "PatchSettings": "patcher.patch",
    "PatcherError": "patcher.errors",
    "PrecisionError": "patcher.errors",
    "RepositoryError": "patcher.errors",
    "ServerError": "patcher.errors",
    "ServerRefused": "patcher.errors",
    "ServerUnreachable": "patcher.errors",
    "SplitClient": "patcher.canary",
    "SplitError": "patcher.errors",
    "StorageError": "patcher.errors",
    "TlsError": "patcher.errors",
    "ToolError": "patcher.errors",
    "TritonServer": "patcher.triton.client",
    "VersionError": "patcher.errors",
    "WrongPort": "patcher.errors",
    "add_label": "patcher.labelling",
    "add_labels": "patcher.labelling",
    "diff": "patcher.difference",
    "drop_classifier": "patcher.dropping",
    "evaluate": "patcher.lifecycle",
    "history": "patcher.lifecycle",
    "merge_labels": "patcher.relabelling",
    "new_classifier": "patcher.founding",
    "prune": "patcher.lifecycle",
    "read_examples": "patcher.examples_file",
    "remember": "patcher.remembering",
    "remove_label": "patcher.relabelling",
    "rename_label": "patcher.relabelling",
    "rollback": "patcher.lifecycle",
    "sync": "patcher.lifecycle",
}

__all__ = [
    "Answer",
    "Busy",
    "CheckpointError",
    "Classifier",
    "ClientTls",
    "ControlRefused",
    "EmbeddedTriton",
    "Examples",
    "ExamplesError",
    "ExportError",
    "Fleet",
    "FoundingSettings",
    "GateRefused",
    "Head",
    "InputError",
    "LabelError",
    "LockLost",
    "Memory",
    "ModelRepository",
    "NewClassifierReport",
    "NotServed",
    "ParityError",
    "PatchReport",
    "PatchSettings",
    "PatcherError",
    "PrecisionError",
    "RepositoryError",
    "ServerError",
    "ServerRefused",
    "ServerUnreachable",
    "SplitClient",
    "SplitError",
    "StorageError",
    "TlsError",
    "ToolError",
    "TritonServer",
    "VersionError",
    "WrongPort",
    "add_label",
    "add_labels",
    "diff",
    "drop_classifier",
    "evaluate",
    "history",
    "merge_labels",
    "new_classifier",
    "prune",
    "read_examples",
    "remember",
    "remove_label",
    "rename_label",
    "rollback",
    "sync",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'patcher' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
