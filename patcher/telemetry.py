"""ONNX Runtime is kept from telling of what it runs."""

from __future__ import annotations

import os

__all__ = ["turn_off"]


def turn_off() -> None:
    """Have an onnxruntime that is imported after this, here or in a process started from here, send no telemetry.

    Its packages for Linux tell Microsoft of each process and each model since 1.29 (``PosixTelemetry``). Whoever set
    the variable meant it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
