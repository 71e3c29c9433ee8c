"""Says why a request failed, and whether the request is to blame. Loaded when the first one fails."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["differing", "explain"]

_NODE = re.compile(r"^.*?Status Message: ", re.DOTALL)
"""What comes before the reason, if a node of the graph failed: the status, and the node's name."""
_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_SOURCE = re.compile(r"^\S*/\S+\.(?:h|cc|cuh?|hpp|cpp):\d+ .*?\) (?:[^.]* was false\. )?", re.DOTALL)
"""The place in onnxruntime's source (file, line and function), and the check there."""
_SHAPES = "Attempting to broadcast"
"""Only a request's shapes can cause this, since the model's own are fixed; onnxruntime calls it no invalid argument."""


def differing(inputs: Mapping[str, Any]) -> str:
    """The error for token tensors of different shapes."""
    found = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items() if value is not None)
    return f"the inputs differ in their shapes ({found}); expected equal ones"


def explain(error: Exception) -> tuple[str, bool]:
    """One plain line about onnxruntime's ``error``, and whether the request is at fault, not the model."""
    reason = _SOURCE.sub("", _STATUS.sub("", _NODE.sub("", str(error))))
    return f"onnxruntime: {' '.join(reason.split())}", isinstance(error, InvalidArgument) or _SHAPES in reason
