"""Add a label to a fine-tuned text classifier that Triton serves: one small head, no downtime, a bound on the harm.

Each function's docstring names its specific errors. In addition, everything that changes a repository raises
InputError for arguments of the wrong type, RepositoryError for damaged files, Busy while another patcher holds the
lock, and StorageError if nothing can be written; with a server, it raises ServerUnreachable if none answers, and
ControlRefused if the server requires another key. In all these cases nothing was changed. ``patcher.errors`` shows the
tree of errors.

Trials are in ``patcher.canary``: ``begin``, ``status``, ``promote`` and ``discard``; exports are in the package
``export``. ``TritonServer.classify`` classifies, and ``EmbeddedTriton`` runs a server. Only the command line has
doctor, loadtest, metrics, report, tune and upgrade: the modules behind them may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patcher.canary import SplitClient
    from patcher.classifier import Classifier
    from patcher.difference import Difference, diff
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
    from patcher.evaluation import Evaluation
    from patcher.examples import Examples
    from patcher.examples_file import read_examples
    from patcher.fleet import Fleet
    from patcher.founding import FoundingSettings, NewClassifierReport, new_classifier
    from patcher.gate import Verdict
    from patcher.head import Head, Lineage
    from patcher.labelling import PatchReport, add_label, add_labels
    from patcher.lifecycle import Entry, evaluate, history, prune, rollback, sync
    from patcher.memory import Memory
    from patcher.patch import PatchSettings
    from patcher.relabelling import Change, merge_labels, remove_label, rename_label
    from patcher.remembering import Remembered, remember
    from patcher.repository import ModelRepository
    from patcher.rollout import Switch
    from patcher.triton.client import TritonServer
    from patcher.triton.server import EmbeddedTriton
    from patcher.triton.tensors import Answer
    from patcher.triton.tls import ClientTls, ServerTls

__version__ = "0.17.0"

# Name -> module. Each is imported on first use, so that `import patcher` is nearly free.
_HOMES = {
    "Answer": "patcher.triton.tensors",
    "Busy": "patcher.errors",
    "Change": "patcher.relabelling",
    "CheckpointError": "patcher.errors",
    "Classifier": "patcher.classifier",
    "ClientTls": "patcher.triton.tls",
    "ControlRefused": "patcher.errors",
    "Difference": "patcher.difference",
    "EmbeddedTriton": "patcher.triton.server",
    "Entry": "patcher.lifecycle",
    "Evaluation": "patcher.evaluation",
    "Examples": "patcher.examples",
    "ExamplesError": "patcher.errors",
    "ExportError": "patcher.errors",
    "Fleet": "patcher.fleet",
    "FoundingSettings": "patcher.founding",
    "GateRefused": "patcher.errors",
    "Head": "patcher.head",
    "InputError": "patcher.errors",
    "LabelError": "patcher.errors",
    "Lineage": "patcher.head",
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
    "Remembered": "patcher.remembering",
    "RepositoryError": "patcher.errors",
    "ServerError": "patcher.errors",
    "ServerRefused": "patcher.errors",
    "ServerTls": "patcher.triton.tls",
    "ServerUnreachable": "patcher.errors",
    "SplitClient": "patcher.canary",
    "SplitError": "patcher.errors",
    "StorageError": "patcher.errors",
    "Switch": "patcher.rollout",
    "TlsError": "patcher.errors",
    "ToolError": "patcher.errors",
    "TritonServer": "patcher.triton.client",
    "Verdict": "patcher.gate",
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
    "Change",
    "CheckpointError",
    "Classifier",
    "ClientTls",
    "ControlRefused",
    "Difference",
    "EmbeddedTriton",
    "Entry",
    "Evaluation",
    "Examples",
    "ExamplesError",
    "ExportError",
    "Fleet",
    "FoundingSettings",
    "GateRefused",
    "Head",
    "InputError",
    "LabelError",
    "Lineage",
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
    "Remembered",
    "RepositoryError",
    "ServerError",
    "ServerRefused",
    "ServerTls",
    "ServerUnreachable",
    "SplitClient",
    "SplitError",
    "StorageError",
    "Switch",
    "TlsError",
    "ToolError",
    "TritonServer",
    "Verdict",
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
