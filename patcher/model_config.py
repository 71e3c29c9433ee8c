"""Typed descriptions of the five Triton models of a classifier, and their ``config.pbtxt``.

Descriptions become protobuf messages and the messages become text: nothing here pastes strings. Every output is
declared, because a Triton ensemble over an auto-completed model can answer "loaded" and be gone (each output of the
backends is compared with the declaration at load).
"""

from __future__ import annotations

import dataclasses
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
    "backbone_config",
    "classifier_config",
    "features_config",
    "head_config",
    "on_cpu",
    "on_gpu",
    "parse",
    "pinned_versions",
    "render",
    "tokenizer_config",
    "with_pin",
]

MAX_BATCH_SIZE = 64
"""The largest batch that Triton forms or takes for any model of a classifier."""


@dataclass(frozen=True)
class Tensor:
    """An input or output: ``dtype`` in Triton's words (``FP32``, ``INT64``, ``STRING``), ``dims`` without the batch."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One step of an ensemble; the maps go from the step's own tensor names to the ensemble's."""

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
    """The versions to serve; empty leaves Triton's default, the latest one."""
    instances: int = 0
    """Instances a device; 0 leaves the backend's default."""
    dynamic_batching: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    kind: str = ""
    """``KIND_CPU`` or ``KIND_GPU``; empty leaves it to Triton."""
    tensorrt: str = ""
    """Precision of ONNX Runtime's TensorRT provider (``FP16``, ``FP32``); empty does without it."""


_TEXT = Tensor("text", "STRING", (1,))
_ANSWER = (
    Tensor("label", "STRING", (-1,)),
    Tensor("score", "FP32", (-1,)),
    Tensor("logits", "FP32", (-1,)),
    Tensor("head_version", "INT64", (1,)),
    Tensor("in_scope", "FP32", (1,)),
)


def _features(width: int) -> Tensor:
    return Tensor("features", "FP32", (width,))


def _tokens(names: Sequence[str]) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, "INT64", (-1,)) for name in names)


def tokenizer_config(name: str, token_inputs: Sequence[str]) -> ModelConfig:
    """Text to the token tensors that the backbone takes."""
    return ModelConfig(name, (_TEXT,), _tokens(token_inputs), backend="python", instances=1, dynamic_batching=True)


def backbone_config(name: str, token_inputs: Sequence[str], width: int, fingerprint: str) -> ModelConfig:
    """Token tensors to features FP32 ``[width]``; ``fingerprint`` is the SHA-256 of ``model.onnx``."""
    return ModelConfig(
        name,
        _tokens(token_inputs),
        (_features(width),),
        backend="onnxruntime",
        instances=1,
        dynamic_batching=True,
        parameters={"fingerprint": fingerprint},
    )


def head_config(name: str, width: int, version: int) -> ModelConfig:
    """Features to the answer; serves exactly ``version``, which is how a choice survives a restart."""
    return ModelConfig(
        name,
        (_features(width),),
        _ANSWER,
        backend="onnxruntime",
        versions=(version,),
        instances=1,
        dynamic_batching=True,
        # One core is plenty for a few small matrix products, and more threads would fight the backbone's for theirs.
        parameters={"intra_op_thread_count": "1"},
    )


def _encode_steps(tokenizer: str, backbone: str, token_inputs: Sequence[str]) -> tuple[Step, Step]:
    tokens = {name: name for name in token_inputs}
    return (Step(tokenizer, {"text": "text"}, tokens), Step(backbone, tokens, {"features": "features"}))


def features_config(name: str, tokenizer: str, backbone: str, token_inputs: Sequence[str], width: int) -> ModelConfig:
    """The ensemble text -> features."""
    return ModelConfig(name, (_TEXT,), (_features(width),), steps=_encode_steps(tokenizer, backbone, token_inputs))


def classifier_config(name: str, tokenizer: str, backbone: str, head: str, token_inputs: Sequence[str]) -> ModelConfig:
    """The ensemble text -> label, score, logits, head_version, in_scope."""
    answer = {tensor.name: tensor.name for tensor in _ANSWER}
    steps = (*_encode_steps(tokenizer, backbone, token_inputs), Step(head, {"features": "features"}, answer))
    return ModelConfig(name, (_TEXT,), _ANSWER, steps=steps)


def on_gpu(config: ModelConfig, tensorrt: str = "") -> ModelConfig:
    """The same model on every GPU that Triton sees, through CUDA, or through TensorRT in the precision given."""
    return dataclasses.replace(config, kind="KIND_GPU", tensorrt=tensorrt)


def on_cpu(config: ModelConfig) -> ModelConfig:
    """The same model on the CPU, even where Triton sees a GPU."""
    return dataclasses.replace(config, kind="KIND_CPU")


def _message(config: ModelConfig) -> Any:
    from tritonclient.grpc import model_config_pb2 as pb

    message = pb.ModelConfig(name=config.name, backend=config.backend, max_batch_size=config.max_batch_size)
    for tensor in config.inputs:
        message.input.add(name=tensor.name, data_type=f"TYPE_{tensor.dtype}", dims=tensor.dims)
    for tensor in config.outputs:
        message.output.add(name=tensor.name, data_type=f"TYPE_{tensor.dtype}", dims=tensor.dims)
    if config.versions:
        message.version_policy.specific.versions.extend(config.versions)
    if config.instances:
        message.instance_group.add(count=config.instances, kind=config.kind or "KIND_AUTO")
    if config.tensorrt:
        accelerator = message.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
        accelerator.parameters["precision_mode"] = config.tensorrt
    if config.dynamic_batching:
        message.dynamic_batching.SetInParent()
    for key in sorted(config.parameters):
        message.parameters[key].string_value = config.parameters[key]
    if config.steps:
        message.platform = "ensemble"
        for step in config.steps:
            added = message.ensemble_scheduling.step.add(model_name=step.model, model_version=step.version)
            added.input_map.update(step.inputs)
            added.output_map.update(step.outputs)
    return message


def _text(message: Any) -> str:
    from google.protobuf import text_format

    text: str = text_format.MessageToString(message)
    return text


def render(config: ModelConfig) -> str:
    """The text of ``config.pbtxt``."""
    return _text(_message(config))


def parse(text: str, where: str = "config.pbtxt") -> Any:
    """A ``config.pbtxt`` as a ``ModelConfig`` message; RepositoryError with ``where`` if it does not parse."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    try:
        return text_format.Parse(text, pb.ModelConfig())
    except text_format.ParseError as error:
        raise RepositoryError(f"{where} is no readable Triton model configuration: {error}") from error


def pinned_versions(message: Any) -> tuple[int, ...]:
    """The versions that a parsed configuration serves by number; empty where its policy is another one."""
    return tuple(message.version_policy.specific.versions)


def with_pin(text: str, versions: Sequence[int], where: str = "config.pbtxt") -> str:
    """The same configuration serving ``versions``; whatever else somebody tuned in it stays."""
    message = parse(text, where)
    message.version_policy.Clear()
    message.version_policy.specific.versions.extend(versions)
    return _text(message)
