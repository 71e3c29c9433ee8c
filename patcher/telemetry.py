"""Turn off the telemetry of ONNX Runtime."""

from __future__ import annotations

import os

__all__ = ["turn_off"]


def turn_off() -> None:
    """Turn off telemetry in an onnxruntime imported later, in this process or in processes that it starts.

    Since 1.29 its Linux packages report each process and each model to Microsoft (``PosixTelemetry``). A variable that
    the user has set is left alone.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
