"""Opens an ONNX file under a configuration: providers, options, a session, and CUDA graphs if configured."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from .check import check_model
from .settings import GRAPHS, SHRINK, LoadError, boolean, integer, parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Run = Callable[[list[str], Mapping[str, Any]], list[Any]]

__all__ = ["open_runner", "open_session", "session_options", "warn"]

_GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
_TENSORRT_NAMES = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}


def open_runner(config: Mapping[str, Any], path: Path, kind: str, device: int) -> Run:
    """Open the model as a function that takes the names of outputs and the inputs by name, and returns the outputs.

    On a GPU it uses CUDA graphs for the shapes that the configuration names, provided that every node has a kernel
    there; otherwise the log says why not. Raises LoadError as ``open_session`` and ``check_model`` do, and if the
    setting for CUDA graphs names no shapes.
    """
    run = _recorded(config, path, device) if kind == "GPU" and parameter(config, GRAPHS) else None
    if run is not None:
        return run
    session = open_session(config, path, kind, device)
    check_model(config, session)
    options = _run_options(config)
    return lambda names, inputs: list(session.run(names, inputs, options))


def _recorded(config: Mapping[str, Any], path: Path, device: int) -> Run | None:
    """Like ``open_runner``, with CUDA graphs; None, with a warning in the log, if they cannot be used.

    Raises LoadError if the setting names no shapes, and as ``check_model`` does.
    """
    from .graphs import GraphedSession, check_version, parse_shapes

    setting = parameter(config, GRAPHS) or ""
    try:
        shapes = parse_shapes(setting)
    except ValueError:
        said = f"parameter {GRAPHS} is '{setting}'; expected batches x lengths, as in 1,2,4 x 8,16"
        raise LoadError(said) from None
    try:
        check_version(ort.__version__)
        if _run_options(config) is not None:
            raise LoadError(f"with {SHRINK} the memory that they address may be gone")
        session = open_session(config, path, "GPU", device, graphs=True)
        recorded = GraphedSession(session, shapes, number=device)
        recorded.record()
    except Exception as error:  # noqa: BLE001 - a node without a kernel, or one that cannot be recorded
        warn(f"{config['name']} runs without CUDA graphs: {error}")
        return None
    check_model(config, session)
    run: Run = recorded.run
    return run


def warn(text: str) -> None:
    """Write a warning to Triton's log."""
    print(f"warning: {text}", file=sys.stderr)  # noqa: T201 - Triton's log


def open_session(config: Mapping[str, Any], path: Path, kind: str, device: int, *, graphs: bool = False) -> Any:
    """Open a session on the instance's device, with the options that the configuration asks for.

    With ``graphs``, CUDA graphs can be recorded; onnxruntime then refuses a model with a node that has no GPU kernel.

    Raises LoadError for an accelerator that is unknown or unavailable, an invalid setting, or a file that onnxruntime
    cannot read.
    """
    providers = _providers(config, kind, device)
    if graphs:
        if providers[0][0] != "CUDAExecutionProvider":
            raise LoadError(f"{providers[0][0]} runs it; expected CUDAExecutionProvider")
        providers[0][1]["enable_cuda_graph"] = "1"
    options = session_options(config)
    if kind == "GPU":
        _prepare_cuda()
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # noqa: BLE001 - Triton reports whatever onnxruntime finds wrong with the file
        raise LoadError(f"onnxruntime {ort.__version__} cannot read '{path}': {error}") from None
    wanted = providers[0][0]
    if session.get_providers()[0] != wanted:  # onnxruntime silently falls back to the CPU
        needs = (
            "TensorRT's libraries of its version, which no extra of it brings"
            if wanted == "TensorrtExecutionProvider"
            else "CUDA's and cuDNN's libraries of its version (pip install 'onnxruntime-gpu[cuda,cudnn]')"
        )
        raise LoadError(
            f"an instance of kind {kind} got {session.get_providers()[0]}; expected {wanted}: onnxruntime "
            f"{ort.__version__} needs a GPU, a driver that is new enough, and {needs}"
        )
    return session


def _providers(config: Mapping[str, Any], kind: str, device: int) -> list[tuple[str, dict[str, str]]]:
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    for entry in accelerators.get("cpu_execution_accelerator", []):
        raise LoadError(f"unknown Execution Accelerator '{entry['name']}' is requested for the CPU; expected none")
    providers = []
    if kind == "GPU":
        cuda = {"device_id": str(device)}
        for entry in accelerators.get("gpu_execution_accelerator", []):
            if entry["name"] == "tensorrt":
                providers.append(("TensorrtExecutionProvider", _tensorrt_options(entry, device)))
            elif entry["name"] == "cuda":
                cuda |= entry.get("parameters", {})
            else:
                raise LoadError(
                    f"unknown Execution Accelerator '{entry['name']}' is requested; expected tensorrt or cuda"
                )
        providers.append(("CUDAExecutionProvider", cuda))
    providers.append(("CPUExecutionProvider", {}))
    missing = [name for name, _ in providers if name not in ort.get_available_providers()]
    if missing:
        raise LoadError(f"this onnxruntime has no {missing[0]}; expected one of {ort.get_available_providers()}")
    return providers


def _tensorrt_options(accelerator: Mapping[str, Any], device: int) -> dict[str, str]:
    """Provider options from an accelerator's parameters; onnxruntime itself refuses unknown ``trt_`` names."""
    options = {"device_id": str(device)}
    for name, value in accelerator.get("parameters", {}).items():
        if name == "precision_mode":
            if value not in ("FP32", "FP16", "BF16", "INT8"):
                raise LoadError(f"unsupported precision mode '{value}' is requested; expected FP32, FP16, BF16 or INT8")
            if value != "FP32":
                options[f"trt_{value.lower()}_enable"] = "1"
        elif name in _TENSORRT_NAMES:
            options[_TENSORRT_NAMES[name]] = value
        elif name.startswith("trt_"):
            options[name] = value
        else:
            raise LoadError(f"unknown parameter '{name}' is provided for TensorRT; expected precision_mode, trt_…")
    return options


def _prepare_cuda() -> None:
    """Load CUDA's libraries from where `pip` installs them, and avoid an attention that is slow on new shapes."""
    # cuDNN's attention, in newer versions the default on an H100, takes 40 ms to plan each new batch size and length.
    os.environ.setdefault("ORT_ENABLE_CUDNN_FLASH_ATTENTION", "0")
    preload = getattr(ort, "preload_dlls", None)  # since 1.21; the system's linker may find what it misses
    if preload is not None:
        with contextlib.redirect_stdout(sys.stderr):  # it prints the libraries that it misses
            preload()


def session_options(config: Mapping[str, Any]) -> Any:
    """Session options from ``parameters`` and ``optimization``, with the C++ backend's names and defaults."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = _GRAPH_LEVELS.get(level, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    mode = integer(config, "execution_mode")
    if mode not in (0, 1):
        raise LoadError(f"execution_mode is {mode}; expected 0 (sequential) or 1 (parallel)")
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL if mode else ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = max(integer(config, "intra_op_thread_count"), 0)
    options.inter_op_num_threads = max(integer(config, "inter_op_thread_count"), 0)
    options.enable_cpu_mem_arena = boolean(config, "enable_mem_arena")
    options.enable_mem_pattern = boolean(config, "enable_mem_pattern")
    initializers = "session.use_device_allocator_for_initializers"
    if value := parameter(config, initializers):
        options.add_session_config_entry(initializers, value)
    return options


def _run_options(config: Mapping[str, Any]) -> Any:
    value = parameter(config, SHRINK)
    if value is None:
        return None
    options = ort.RunOptions()
    options.add_run_config_entry(SHRINK, value)
    return options
