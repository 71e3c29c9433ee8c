"""What runs a backbone in the process of its encoder, which then need not ask Triton for it.

No head's start loads this file.
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
    """What runs the model in ``folder`` in the process of another one that asks it alone.

    The model's own configuration counts, as if Triton had loaded it. None where Triton is to be asked for it: it would
    have to choose a GPU, or TensorRT would build its engines twice, or this onnxruntime has no GPU, or the model has
    fewer instances than the one that asks, which has ``instances`` (each would be a session more; by CUDA graphs that
    pays), or it is not there. Raises LoadError where Triton would refuse it on a CPU.
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
    """A runner that is warm: Triton makes its calls to that end to the model alone, not to who runs it.

    None where this onnxruntime cannot have the GPU: the server's own may.
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
    """Triton's message, from the client's generated file alone: its package brings grpc, which nothing here needs."""
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
    """Have the C library return to the system what reading a model's file took: as much as the weights."""
    with contextlib.suppress(AttributeError):  # another C library than Triton's
        ctypes.CDLL(None).malloc_trim(0)
