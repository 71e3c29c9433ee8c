"""Triton's ``onnxruntime`` backend as a Python-based one: runs ``model.onnx`` where the C++ backend is not installed.

It stands in for NVIDIA's C++ backend, so that the repository which serves in production serves from ``pip`` alone. What
that one refuses at load, this one refuses (:func:`check_model`): a stand-in that accepts more would hide a fault until
production. It reads the same settings: ``parameters`` (threads, memory, execution mode), ``optimization.graph.level``,
``default_model_filename``, the instances' kind and device. Sequence batching, ragged batches and custom operators it
has not, and says so.

The file runs inside Triton's stub process and must import nothing of this package.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import CoroutineType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Run = Callable[[list[str], Mapping[str, Any]], list[Any]]

try:
    import triton_python_backend_utils as pb_utils
except ImportError:  # imported outside Triton: check_model and the session's options work there too
    pb_utils = None

_ELEMENTS = {  # Triton's data types in onnxruntime's words; other ONNX types cannot pass through Triton
    "TYPE_BOOL": "bool",
    "TYPE_UINT8": "uint8",
    "TYPE_UINT16": "uint16",
    "TYPE_UINT32": "uint32",
    "TYPE_UINT64": "uint64",
    "TYPE_INT8": "int8",
    "TYPE_INT16": "int16",
    "TYPE_INT32": "int32",
    "TYPE_INT64": "int64",
    "TYPE_FP16": "float16",
    "TYPE_FP32": "float",
    "TYPE_FP64": "double",
    "TYPE_STRING": "string",
}
_DATA_TYPES = {f"tensor({element})": name for name, element in _ELEMENTS.items()}
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
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_SHRINK = "memory.enable_memory_arena_shrinkage"
_UNSUPPORTED = ("sequence_batching", "batch_input", "batch_output", "model_operations")

BACKEND = "PATCHER_ONNXRUNTIME_BACKEND"
"""Environment variable, the encoder's own: set where encoders run their backbones themselves, with this file."""
GRAPHS = "cuda_graphs"
"""Parameter: the shapes of calls that a GPU gets as CUDA graphs, as batches x lengths."""
GPUS = ("/dev/nvidiactl", "/dev/dxg")
"""One of these is there where Triton may find a GPU."""
DEVICES = Path("/dev")


class Asyncio(ModuleType):
    """Stands for `asyncio` until more of it is asked for than Triton's stub asks.

    After the first ``execute`` the stub imports `asyncio` to learn whether the answer is a coroutine. That costs ten
    times what the head's session does, and the first answer of every new head version would wait for it.
    """

    @staticmethod
    def iscoroutine(value: object) -> bool:
        """Whether ``value`` is a coroutine."""
        return isinstance(value, CoroutineType)

    def __getattr__(self, name: str) -> Any:
        sys.modules.pop(self.__name__, None)
        return getattr(importlib.import_module(self.__name__), name)


class LoadError(Exception):
    """The model cannot be served under its configuration; the message says what was got and what was expected."""


class Signature(NamedTuple):
    """What an ONNX file says of one tensor: Triton's data type and dims, -1 where they are not fixed."""

    data_type: str
    dims: tuple[int, ...]


class TritonPythonModel:
    """One instance of one model: a session, fed with all requests of a call at once where their shapes agree."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the session and hold the file against the configuration."""
        config = json.loads(args["model_config"])
        try:
            path = model_path(config, args["model_repository"], args["model_version"])
            device = int(args["model_instance_device_id"])
            self._open = functools.partial(open_runner, config, path, args["model_instance_kind"], device)
            self._run: Run = self._open()
        except LoadError as error:
            raise pb_utils.TritonModelException(f"unable to load model '{config['name']}': {error}") from None
        self._inputs = [(entry["name"], entry["data_type"] == "TYPE_STRING") for entry in config["input"]]
        self._batches = int(config.get("max_batch_size", 0)) > 0
        sys.modules.setdefault("asyncio", Asyncio("asyncio"))
        # On a GPU Triton's own calls to warm it up would open it again.
        runs_here = os.environ.get(BACKEND) and _kind(config) == "CPU"
        if runs_here and _encoder_runs(Path(args["model_repository"])):
            self._run = self._opened_late  # it can be opened, and that is enough until somebody comes with tokens
            _give_back()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request; a request that onnxruntime cannot answer gets its error alone."""
        responses: list[Any] = [None] * len(requests)
        feeds: list[dict[str, Any]] = []
        groups: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            feed = self._feed(request)
            feeds.append(feed)
            key = tuple((name, value.shape[1:]) for name, value in feed.items()) if self._batches else index
            groups.setdefault(key, []).append(index)
        for members in groups.values():
            self._answer(requests, feeds, members, responses)
        return responses

    def _opened_late(self, names: list[str], inputs: Mapping[str, Any]) -> list[Any]:
        self._run = self._open()
        return self._run(names, inputs)

    def _feed(self, request: Any) -> dict[str, Any]:
        feed = {}
        for name, text in self._inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:  # an optional input that the client left out
                value = tensor.as_numpy()
                feed[name] = _decode(value) if text else value
        return feed

    def _answer(
        self, requests: Sequence[Any], feeds: Sequence[dict[str, Any]], members: Sequence[int], responses: list[Any]
    ) -> None:
        wanted = [requests[index].requested_output_names() for index in members]
        names = list(dict.fromkeys(name for each in wanted for name in each))
        first = feeds[members[0]]
        joined = len(members) > 1
        feed = {name: np.concatenate([feeds[i][name] for i in members]) for name in first} if joined else first
        try:
            results = dict(zip(names, self._run(names, feed), strict=True))
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen kinds; the client gets it, the server goes on
            if joined:  # find the request that is at fault
                for index in members:
                    self._answer(requests, feeds, [index], responses)
            else:
                responses[members[0]] = pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnxruntime: {error}"))
            return
        start = 0
        for index, outputs in zip(members, wanted, strict=True):
            stop = start + len(next(iter(feeds[index].values()))) if joined else None
            own = ((name, results[name][start:stop] if joined else results[name]) for name in outputs)
            tensors = [pb_utils.Tensor(name, value) for name, value in own]
            responses[index] = pb_utils.InferenceResponse(output_tensors=tensors)
            start = stop or 0


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
    message = text_format.Parse(file.read_text(encoding="utf-8"), _model_config())
    config = json_format.MessageToDict(message, preserving_proto_field_name=True)
    kind = _kind(config)
    count = sum(int(group.get("count", 1)) for group in config.get("instance_group", [{}]))
    pays = kind == "GPU" and _parameter(config, GRAPHS)
    if not kind or (instances > count and not pays):
        return None
    path = model_path(config, str(folder), versions[0].name)
    run: Run | None = open_runner(config, path, "CPU", 0) if kind == "CPU" else _on_the_gpu(config, path)
    _give_back()
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
        _warn(f"the encoder does not run {config['name']} itself, but asks Triton for it: {error}")
        return None
    return run


def _kind(config: Mapping[str, Any]) -> str:
    """CPU or GPU, where it is clear which one the model runs on, and with what; else empty."""
    kinds = {group.get("kind", "KIND_AUTO") for group in config.get("instance_group", [{}])}
    if kinds == {"KIND_GPU"} and len(list(DEVICES.glob("nvidia[0-9]*"))) == 1:
        accelerators = config.get("optimization", {}).get("execution_accelerators", {})
        return "" if accelerators.get("gpu_execution_accelerator") else "GPU"
    return "CPU" if kinds <= {"KIND_CPU", "KIND_AUTO"} and (kinds == {"KIND_CPU"} or not _has_gpu()) else ""


def _model_config() -> Any:
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


def _has_gpu() -> bool:
    return any(Path(device).exists() for device in GPUS)


def _encoder_runs(folder: Path) -> bool:
    """Whether the model in ``folder`` is a backbone whose encoder, beside it, knows how to run it."""
    name, _, role = folder.name.rpartition("_")
    program = folder.with_name(f"{name}_encoder") / "1" / "model.py"
    return role == "backbone" and program.is_file() and BACKEND in program.read_text(encoding="utf-8")


def _give_back() -> None:
    """Have the C library return to the system what reading a model's file took: as much as the weights."""
    import ctypes  # here, for no head's start has to wait for it

    with contextlib.suppress(AttributeError):  # another C library than Triton's
        ctypes.CDLL(None).malloc_trim(0)


def model_path(config: Mapping[str, Any], folder: str, version: str) -> Path:
    """Where the model's file lies; LoadError when it is missing."""
    path = Path(folder, version, config.get("default_model_filename") or "model.onnx")
    if path.is_dir():
        path /= "model.onnx"
    if not path.is_file():
        raise LoadError(f"no file '{path}'; expected the version's ONNX file there")
    return path


def open_runner(config: Mapping[str, Any], path: Path, kind: str, device: int) -> Run:
    """What runs the model: names of outputs and inputs by name to outputs.

    On a GPU it does so by CUDA graphs for the shapes that the configuration names, where each node has a kernel there;
    else the log says why not. Raises LoadError as ``open_session`` and ``check_model`` do, and for a setting that names
    no shapes.
    """
    run = _recorded(config, path, device) if kind == "GPU" and _parameter(config, GRAPHS) else None
    if run is not None:
        return run
    session = open_session(config, path, kind, device)
    check_model(config, session)
    options = _run_options(config)
    return lambda names, inputs: list(session.run(names, inputs, options))


def _recorded(config: Mapping[str, Any], path: Path, device: int) -> Run | None:
    """What runs the model by CUDA graphs; None where it cannot, which the log tells.

    Raises LoadError for a setting that names no shapes, and as ``check_model`` does.
    """
    graphs = _beside("graphs")
    setting = _parameter(config, GRAPHS) or ""
    try:
        shapes = graphs.parse_shapes(setting)
    except ValueError:
        said = f"parameter {GRAPHS} is '{setting}'; expected batches x lengths, as in 1,2,4 x 8,16"
        raise LoadError(said) from None
    try:
        graphs.check_version(ort.__version__)
        if _run_options(config) is not None:
            raise LoadError(f"with {_SHRINK} the memory that they address may be gone")
        session = open_session(config, path, "GPU", device, graphs=True)
        recorded = graphs.GraphedSession(session, shapes, number=device)
        recorded.record()
    except Exception as error:  # noqa: BLE001 - a node without a kernel, or one that cannot be recorded
        _warn(f"{config['name']} runs without CUDA graphs: {error}")
        return None
    check_model(config, session)
    run: Run = recorded.run
    return run


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)  # noqa: T201 - Triton's log


def _beside(name: str) -> Any:
    """A module that lies beside this file: Triton knows of one alone."""
    spec = importlib.util.spec_from_file_location(f"patcher_{name}", Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise LoadError(f"no {name}.py beside {__file__}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_session(config: Mapping[str, Any], path: Path, kind: str, device: int, *, graphs: bool = False) -> Any:
    """A session on the instance's device, with the options that the configuration asks for.

    One for CUDA ``graphs`` can be recorded, and is refused where a node has no kernel on the GPU.

    Raises LoadError for an accelerator that is unknown or not there, a setting that makes no sense, and for a file that
    onnxruntime does not read.
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
    except Exception as error:  # noqa: BLE001 - whatever onnxruntime finds wrong with the file, Triton reports
        raise LoadError(f"onnxruntime {ort.__version__} cannot read '{path}': {error}") from None
    wanted = providers[0][0]
    if session.get_providers()[0] != wanted:  # onnxruntime goes on silently with the CPU
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


def _prepare_cuda() -> None:
    """Have CUDA's libraries found where `pip` puts them, and no attention that is slow on shapes it has not seen."""
    # cuDNN's attention, the default on an H100 since some version, builds a plan for each batch and length: 40 ms.
    os.environ.setdefault("ORT_ENABLE_CUDNN_FLASH_ATTENTION", "0")
    preload = getattr(ort, "preload_dlls", None)  # since 1.21; what is not there, the system's linker may know
    if preload is not None:
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses
            preload()


def session_options(config: Mapping[str, Any]) -> Any:
    """The session's options from ``parameters`` and ``optimization``, by the C++ backend's names and defaults."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = _GRAPH_LEVELS.get(level, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    mode = _integer(config, "execution_mode")
    if mode not in (0, 1):
        raise LoadError(f"execution_mode is {mode}; expected 0 (sequential) or 1 (parallel)")
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL if mode else ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = max(_integer(config, "intra_op_thread_count"), 0)
    options.inter_op_num_threads = max(_integer(config, "inter_op_thread_count"), 0)
    options.enable_cpu_mem_arena = _boolean(config, "enable_mem_arena")
    options.enable_mem_pattern = _boolean(config, "enable_mem_pattern")
    initializers = "session.use_device_allocator_for_initializers"
    if value := _parameter(config, initializers):
        options.add_session_config_entry(initializers, value)
    return options


def check_model(config: Mapping[str, Any], session: Any) -> None:
    """LoadError where the file contradicts the configuration, by the C++ backend's rules.

    As many required inputs as the file has, every name in the file, equal data types, a free first axis under
    ``max_batch_size``, no optional input under it. Dims of an output equal the file's exactly; of an input only where
    the file fixes them. Outputs may be left out. (ValidateInputs, ValidateOutputs and CompareDimsSupported of
    triton-inference-server/onnxruntime_backend.)
    """
    for key in _UNSUPPORTED:
        if config.get(key):
            raise LoadError(f"the configuration asks for {key}, which this Python-based backend does not support")
    batches = int(config.get("max_batch_size", 0)) > 0
    inputs = _signatures(session.get_inputs())
    required = [entry for entry in config["input"] if not entry.get("optional")]
    if len(required) != len(inputs):
        raise LoadError(
            f"configuration expects {len(required)} inputs ({_names(required)}), "
            f"model provides {len(inputs)} ({', '.join(inputs)})"
        )
    inputs |= _signatures(session.get_overridable_initializers())
    for entry in config["input"]:
        if entry.get("optional") and batches:
            raise LoadError(f"optional input '{entry['name']}' is not supported for models that support batching")
        if entry.get("allow_ragged_batch"):
            raise LoadError(
                f"input '{entry['name']}' allows ragged batches, which this Python-based backend does not support"
            )
        _check_tensor("input", entry, inputs, batches)
    outputs = _signatures(session.get_outputs())
    for entry in config["output"]:
        _check_tensor("output", entry, outputs, batches)


def _check_tensor(kind: str, entry: Mapping[str, Any], there: Mapping[str, Signature], batches: bool) -> None:
    name = entry["name"]
    if name not in there:
        raise LoadError(f"unexpected inference {kind} '{name}', allowed {kind}s are: {', '.join(sorted(there))}")
    data_type, dims = there[name]
    if entry["data_type"] != data_type:
        raise LoadError(
            f"configuration expects datatype {entry['data_type']} for {kind} '{name}', model provides {data_type}"
        )
    shape = entry["reshape"].get("shape", []) if "reshape" in entry else entry["dims"]
    stated = tuple(int(dim) for dim in shape)
    if not dims and not batches:
        if any(dim != 1 for dim in stated):
            raise LoadError(f"{kind} '{name}' is a scalar in the model, the configuration specifies {list(stated)}")
        return
    if batches and (not dims or dims[0] != -1):
        raise LoadError(
            f"{kind} '{name}': under max_batch_size > 0 the first dimension must be -1; "
            f"the shape expected by the model is {list(dims)}"
        )
    if batches:
        stated = (-1, *stated)
    loose = kind == "input"
    equal = (a == b or (a == -1 and loose) for a, b in zip(dims, stated, strict=False))
    if len(dims) != len(stated) or not all(equal):
        raise LoadError(
            f"{kind} '{name}': the model expects shape {list(dims)} but the configuration specifies {list(stated)}"
            + (" (with the batch dimension that max_batch_size adds)" if batches else "")
        )


def _signatures(tensors: Sequence[Any]) -> dict[str, Signature]:
    there = {}
    for tensor in tensors:
        if tensor.type not in _DATA_TYPES:
            raise LoadError(
                f"'{tensor.name}' is a {tensor.type} in the model; expected one of {', '.join(_DATA_TYPES)}"
            )
        dims = tuple(dim if isinstance(dim, int) else -1 for dim in tensor.shape)
        there[tensor.name] = Signature(_DATA_TYPES[tensor.type], dims)
    return there


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
    """The provider's options from an accelerator's parameters; onnxruntime refuses the names that it does not know."""
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


def _run_options(config: Mapping[str, Any]) -> Any:
    value = _parameter(config, _SHRINK)
    if value is None:
        return None
    options = ort.RunOptions()
    options.add_run_config_entry(_SHRINK, value)
    return options


def _parameter(config: Mapping[str, Any], name: str) -> str | None:
    entry = config.get("parameters", {}).get(name)
    return None if entry is None else str(entry["string_value"])


def _integer(config: Mapping[str, Any], name: str) -> int:
    value = _parameter(config, name)
    try:
        return int(value or 0)
    except ValueError:
        raise LoadError(f"parameter {name} is '{value}'; expected a whole number") from None


def _boolean(config: Mapping[str, Any], name: str) -> bool:
    value = _parameter(config, name)
    if value is None:
        return True
    if value.lower() not in _BOOLEANS:
        raise LoadError(f"parameter {name} is '{value}'; expected one of {', '.join(_BOOLEANS)}")
    return _BOOLEANS[value.lower()]


def _names(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(entry["name"] for entry in entries)


def _decode(value: Any) -> Any:
    # Triton hands bytes, onnxruntime takes str
    flat = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in value.reshape(-1)]
    return np.array(flat, dtype=object).reshape(value.shape)
