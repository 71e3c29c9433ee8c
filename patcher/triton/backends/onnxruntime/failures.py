"""Says why onnxruntime failed on a request, and whether the request is to blame. Loaded when the first one fails."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["explain"]

_NODE = re.compile(r"^.*?Status Message: ", re.DOTALL)
"""What comes before the reason, if a node of the graph failed: the status, and the node's name."""
_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_SOURCE = re.compile(r"^\S*/\S+\.(?:h|cc|cuh?|hpp|cpp):\d+ .*?\) ", re.DOTALL)
"""The place in onnxruntime's source: file, line and function."""


def explain(error: Exception, inputs: Mapping[str, Any]) -> tuple[str, bool]:
    """One plain line about ``error``, and whether the request with these ``inputs`` is at fault, not the model.

    Token tensors of different shapes are the request's fault, too: onnxruntime then fails in some node, and does not
    call that an invalid argument.
    """
    invalid = isinstance(error, InvalidArgument)
    tokens = {name: value.shape for name, value in inputs.items() if value.dtype == np.int64}
    if not invalid and len(set(tokens.values())) > 1:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in tokens.items())
        return f"the inputs differ in their shapes ({found}); expected equal ones", True
    reason = _SOURCE.sub("", _STATUS.sub("", _NODE.sub("", str(error))))
    return f"onnxruntime: {' '.join(reason.split())}", invalid
