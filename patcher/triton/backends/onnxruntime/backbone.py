"""Runs a backbone in the process of its encoder, which then need not send requests to Triton.

A separate file, so that starting a head does not load it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .session import open_runner, warn
from .settings import GRAPHS, LoadError, device_kind, model_path, parameter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .session import Run

__all__ = ["give_back", "runner"]


def runner(folder: Path, instances: int = 1) -> Run | None:
    """Open the model in ``folder`` in the process of its encoder, with the model's own configuration.

    Returns None if the encoder has to ask Triton instead: the model is missing, Triton would have to choose a GPU,
    TensorRT would build its engines twice, this onnxruntime cannot use the GPU, or the model has fewer instances than
    the encoder, which has ``instances``. In the last case each extra instance would need a session of its own, which
    pays off only with CUDA graphs.

    Raises LoadError if Triton would refuse the model on a CPU.
    """
    from google.protobuf import json_format, text_format

    versions = [path for path in folder.glob("[0-9]*") if path.name.isdecimal()]
    file = folder / "config.pbtxt"
    if not file.is_file() or len(versions) != 1:
        return None
    message = text_format.Parse(file.read_text(encoding="utf-8"), _message())
    config = json_format.MessageToDict(message, preserving_proto_field_name=True)
    kind = device_kind(config)
    count = sum(int(group.get("count", 1)) for group in config.get("instance_group", [{}]))
    pays = kind == "GPU" and parameter(config, GRAPHS)
    if not kind or (instances > count and not pays):
        return None
    path = model_path(config, str(folder), versions[0].name)
    run: Run | None = open_runner(config, path, "CPU", 0) if kind == "CPU" else _on_the_gpu(config, path)
    give_back()
    return run


def _on_the_gpu(config: Mapping[str, Any], path: Path) -> Run | None:
    """Open the model and warm it up, since Triton sends its warm-up requests only to the model that it loaded itself.

    Returns None if this onnxruntime cannot use the GPU; that of the server may be able to.
    """
    try:
        run = open_runner(config, path, "GPU", 0)
        names = [entry["name"] for entry in config["output"]]
        for call in config.get("model_warmup", []):
            shape = {name: [call["batch_size"], *map(int, tensor["dims"])] for name, tensor in call["inputs"].items()}
            run(names, {name: np.zeros(dims, np.int64) for name, dims in shape.items()})
    except Exception as error:  # noqa: BLE001 - LoadError, or one of the dozen kinds that onnxruntime raises
        warn(f"the encoder does not run {config['name']} itself, but asks Triton for it: {error}")
        return None
    return run


def _message() -> Any:
    """An empty ModelConfig, from the client's generated file alone: its package imports grpc, which is not needed."""
    package = importlib.util.find_spec("tritonclient")
    folders = package.submodule_search_locations if package else None
    file = Path(next(iter(folders or ["tritonclient"])), "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    if spec is None or spec.loader is None:
        raise LoadError(f"cannot read a configuration: no {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig()


def give_back() -> None:
    """Have the C library return freed memory to the system: reading a model file takes as much as its weights."""
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
