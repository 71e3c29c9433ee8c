"""Reads from a model's configuration how and where it runs; invalid settings raise LoadError."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "DEVICES",
    "GPUS",
    "GRAPHS",
    "SHRINK",
    "LoadError",
    "boolean",
    "device_kind",
    "has_gpu",
    "integer",
    "model_path",
    "parameter",
]

GRAPHS = "cuda_graphs"
"""Parameter: the shapes of calls that run as CUDA graphs on a GPU, as batch sizes x lengths."""
SHRINK = "memory.enable_memory_arena_shrinkage"
"""Parameter: the devices whose unused memory is returned after each call."""
GPUS = ("/dev/nvidiactl", "/dev/dxg")
"""Device files, one of which exists if Triton may find a GPU."""
DEVICES = Path("/dev")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class LoadError(Exception):
    """The model cannot be served under its configuration; the message says what was found and what was expected."""


def model_path(config: Mapping[str, Any], folder: str, version: str) -> Path:
    """The path of the model file; LoadError if it is missing."""
    path = Path(folder, version, config.get("default_model_filename") or "model.onnx")
    if path.is_dir():
        path /= "model.onnx"
    if not path.is_file():
        raise LoadError(f"no file '{path}'; expected the version's ONNX file there")
    return path


def device_kind(config: Mapping[str, Any]) -> str:
    """``CPU``, or ``GPU`` (the only one, without an accelerator), if it is clear where the model runs; else empty."""
    kinds = {group.get("kind", "KIND_AUTO") for group in config.get("instance_group", [{}])}
    if kinds == {"KIND_GPU"} and len(list(DEVICES.glob("nvidia[0-9]*"))) == 1:
        accelerators = config.get("optimization", {}).get("execution_accelerators", {})
        return "" if accelerators.get("gpu_execution_accelerator") else "GPU"
    return "CPU" if kinds <= {"KIND_CPU", "KIND_AUTO"} and (kinds == {"KIND_CPU"} or not has_gpu()) else ""


def has_gpu() -> bool:
    """Whether Triton may find a GPU on this machine."""
    return any(Path(device).exists() for device in GPUS)


def parameter(config: Mapping[str, Any], name: str) -> str | None:
    """The value of ``name`` in ``parameters``; None if it is not set."""
    entry = config.get("parameters", {}).get(name)
    return None if entry is None else str(entry["string_value"])


def integer(config: Mapping[str, Any], name: str) -> int:
    """The value of an integer parameter, 0 if it is not set; LoadError if it is not an integer."""
    value = parameter(config, name)
    try:
        return int(value or 0)
    except ValueError:
        raise LoadError(f"parameter {name} is '{value}'; expected a whole number") from None


def boolean(config: Mapping[str, Any], name: str) -> bool:
    """The value of a flag, True if it is not set; LoadError if it is not a boolean."""
    value = parameter(config, name)
    if value is None:
        return True
    if value.lower() not in _BOOLEANS:
        raise LoadError(f"parameter {name} is '{value}'; expected one of {', '.join(_BOOLEANS)}")
    return _BOOLEANS[value.lower()]
