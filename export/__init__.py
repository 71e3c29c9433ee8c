"""Turns a fine-tuned Hugging Face sequence classifier into a backbone, a head and a tokenizer for Triton."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from patcher.telemetry import turn_off

if TYPE_CHECKING:
    from export.callback import ExportCallback
    from export.classifier import export_classifier, run_export
    from export.options import ExportOptions
    from export.report import ExportReport
    from export.to_transformers import to_transformers

turn_off()  # must run before anything here imports onnxruntime

# Name -> module, imported on first access, because the callback pulls in all of transformers' Trainer.
_HOMES = {
    "ExportCallback": "export.callback",
    "ExportOptions": "export.options",
    "ExportReport": "export.report",
    "export_classifier": "export.classifier",
    "run_export": "export.classifier",
    "to_transformers": "export.to_transformers",
}

__all__ = ["ExportCallback", "ExportOptions", "ExportReport", "export_classifier", "run_export", "to_transformers"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'export' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
