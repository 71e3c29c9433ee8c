"""What a model's configuration says of how it runs, and where; what it cannot mean is a LoadError."""

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
"""Parameter: the shapes of calls that a GPU gets as CUDA graphs, as batches x lengths."""
SHRINK = "memory.enable_memory_arena_shrinkage"
"""Parameter: the devices on which memory is given back after each call."""
GPUS = ("/dev/nvidiactl", "/dev/dxg")
"""One of these is there where Triton may find a GPU."""
DEVICES = Path("/dev")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class LoadError(Exception):
    """The model cannot be served under its configuration; the message says what was got and what was expected."""


def model_path(config: Mapping[str, Any], folder: str, version: str) -> Path:
    """Where the model's file lies; LoadError when it is missing."""
    path = Path(folder, version, config.get("default_model_filename") or "model.onnx")
    if path.is_dir():
        path /= "model.onnx"
    if not path.is_file():
        raise LoadError(f"no file '{path}'; expected the version's ONNX file there")
    return path


def device_kind(config: Mapping[str, Any]) -> str:
    """CPU or GPU, where it is clear which one the model runs on, and with what; else empty."""
    kinds = {group.get("kind", "KIND_AUTO") for group in config.get("instance_group", [{}])}
    if kinds == {"KIND_GPU"} and len(list(DEVICES.glob("nvidia[0-9]*"))) == 1:
        accelerators = config.get("optimization", {}).get("execution_accelerators", {})
        return "" if accelerators.get("gpu_execution_accelerator") else "GPU"
    return "CPU" if kinds <= {"KIND_CPU", "KIND_AUTO"} and (kinds == {"KIND_CPU"} or not has_gpu()) else ""


def has_gpu() -> bool:
    """Whether Triton may find a GPU on this machine."""
    return any(Path(device).exists() for device in GPUS)


def parameter(config: Mapping[str, Any], name: str) -> str | None:
    """What ``parameters`` has under ``name``; None where it has nothing."""
    entry = config.get("parameters", {}).get(name)
    return None if entry is None else str(entry["string_value"])


def integer(config: Mapping[str, Any], name: str) -> int:
    """A whole number, 0 where it is not set; LoadError for another text."""
    value = parameter(config, name)
    try:
        return int(value or 0)
    except ValueError:
        raise LoadError(f"parameter {name} is '{value}'; expected a whole number") from None


def boolean(config: Mapping[str, Any], name: str) -> bool:
    """A flag, on where it is not set; LoadError for another text."""
    value = parameter(config, name)
    if value is None:
        return True
    if value.lower() not in _BOOLEANS:
        raise LoadError(f"parameter {name} is '{value}'; expected one of {', '.join(_BOOLEANS)}")
    return _BOOLEANS[value.lower()]
