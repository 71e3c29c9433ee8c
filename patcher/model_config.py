"""Typed descriptions of Triton models, and their ``config.pbtxt``.

Descriptions become protobuf messages, and messages become text; no strings are pasted together. Every output is
declared explicitly: the load of a Triton ensemble above an auto-completed model can be reported as successful although
the ensemble is gone. Triton compares a backend's outputs with their declaration at load.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patcher.errors import RepositoryError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "MAX_BATCH_SIZE",
    "ModelConfig",
    "Step",
    "Tensor",
    "is_on_gpu",
    "parameter",
    "parse",
    "pinned_versions",
    "render",
    "steps_of",
    "to_text",
    "with_encoding",
    "with_pin",
]

MAX_BATCH_SIZE = 64
"""The largest batch that Triton forms or accepts for any model of a classifier."""


@dataclass(frozen=True)
class Tensor:
    """An input or output: ``dtype`` as in Triton (``FP32``, ``INT64``, ``STRING``), ``dims`` without the batch."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One step of an ensemble; both maps lead from the step's own tensor names to the ensemble's."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    version: int = -1


@dataclass(frozen=True)
class ModelConfig:
    """What a ``config.pbtxt`` says about one model."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    backend: str = ""
    max_batch_size: int = MAX_BATCH_SIZE
    versions: tuple[int, ...] = ()
    """The versions to serve; empty means Triton's default, the latest one."""
    instances: int = 0
    """Instances per device; 0 means the backend's default."""
    kind: str = ""
    """``CPU``, ``GPU``, or empty: a GPU if the server has one and the backend can use it."""
    tensorrt: str = ""
    """Precision of ONNX Runtime's TensorRT provider on a GPU (``FP16``, ``FP32``); empty means no TensorRT."""
    delay_us: int = 0
    """How long, in microseconds, a request may wait for others to share its batch."""
    warmup: tuple[tuple[int, int], ...] = ()
    """Batch size and length of warm-up calls with all-zero inputs, made before the model counts as ready."""
    dynamic_batching: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()


def steps_of(message: Any) -> tuple[Step, ...]:
    """The steps of a parsed ensemble."""
    return tuple(
        Step(step.model_name, dict(step.input_map), dict(step.output_map), step.model_version)
        for step in message.ensemble_scheduling.step
    )


def with_encoding(text: str, encoding: Sequence[Step]) -> str:
    """The same ensemble with ``encoding`` in place of all steps before its last one."""
    message = parse(text)
    last = message.ensemble_scheduling.step[-1]
    steps = [*(_step(each) for each in encoding), last]
    del message.ensemble_scheduling.step[:]
    message.ensemble_scheduling.step.extend(steps)
    return to_text(message)


def is_on_gpu(message: Any) -> bool:
    """Whether a parsed configuration requires a GPU."""
    return any(group.kind == group.Kind.Value("KIND_GPU") for group in message.instance_group)


def _schedule(message: Any, config: ModelConfig) -> None:
    if config.instances:
        group = message.instance_group.add(count=config.instances)
        if config.kind:
            group.kind = group.Kind.Value(f"KIND_{config.kind}")
    if config.tensorrt:
        accelerator = message.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
        accelerator.parameters["precision_mode"] = config.tensorrt
    if config.dynamic_batching:
        message.dynamic_batching.SetInParent()
        if config.delay_us:
            message.dynamic_batching.max_queue_delay_microseconds = config.delay_us


def _warm_up(message: Any, config: ModelConfig) -> None:
    for batch, length in config.warmup:
        call = message.model_warmup.add(name=f"{batch} x {length}", batch_size=batch)
        for tensor in message.input:
            given = call.inputs[tensor.name]
            given.data_type, given.zero_data = tensor.data_type, True
            given.dims.extend(length if size < 0 else size for size in tensor.dims)


def _message(config: ModelConfig) -> Any:
    from tritonclient.grpc import model_config_pb2 as pb

    message = pb.ModelConfig(name=config.name, backend=config.backend, max_batch_size=config.max_batch_size)
    for tensor in config.inputs:
        message.input.add(name=tensor.name, data_type=f"TYPE_{tensor.dtype}", dims=tensor.dims)
    for tensor in config.outputs:
        message.output.add(name=tensor.name, data_type=f"TYPE_{tensor.dtype}", dims=tensor.dims)
    if config.versions:
        message.version_policy.specific.versions.extend(config.versions)
    _schedule(message, config)
    _warm_up(message, config)
    for key in sorted(config.parameters):
        message.parameters[key].string_value = config.parameters[key]
    if config.steps:
        message.platform = "ensemble"
        message.ensemble_scheduling.step.extend(_step(step) for step in config.steps)
    return message


def _step(step: Step) -> Any:
    from tritonclient.grpc import model_config_pb2 as pb

    return pb.ModelEnsembling.Step(
        model_name=step.model, model_version=step.version, input_map=step.inputs, output_map=step.outputs
    )


def to_text(message: Any) -> str:
    """A message as the text of a ``config.pbtxt``."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(message)
    return text


def render(config: ModelConfig) -> str:
    """A description as the text of a ``config.pbtxt``."""
    return to_text(_message(config))


def parse(text: str, where: str = "config.pbtxt") -> Any:
    """A ``config.pbtxt`` as a ``ModelConfig`` message; RepositoryError, which names ``where``, if it does not parse."""
    from google.protobuf import text_format

    try:
        return copy.deepcopy(_parsed(text))
    except text_format.ParseError as error:
        raise RepositoryError(f"{where} is no readable Triton model configuration: {error}") from error


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    """Parse with a cache: parsing takes milliseconds, a copy microseconds, and a change parses the same texts often.

    The metrics exporter goes through the configurations of all classifiers, one or two each, at every scrape. A cache
    smaller than their number would never hit.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    return text_format.Parse(text, pb.ModelConfig())


def pinned_versions(message: Any) -> tuple[int, ...]:
    """The versions that a parsed configuration pins by number; empty if it has another version policy."""
    return tuple(message.version_policy.specific.versions)


def with_pin(text: str, versions: Sequence[int], where: str = "config.pbtxt") -> str:
    """The same configuration with ``versions`` pinned; all other settings stay as they are."""
    message = parse(text, where)
    message.version_policy.Clear()
    message.version_policy.specific.versions.extend(versions)
    return to_text(message)


def parameter(message: Any, key: str, default: str) -> str:
    """A parameter of a parsed configuration, or ``default`` if it is not set."""
    return str(message.parameters[key].string_value) if key in message.parameters else default
