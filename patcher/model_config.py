"""Typed descriptions of the Triton models of a classifier and of a head store, and their ``config.pbtxt``.

Descriptions become protobuf messages and the messages become text: nothing here pastes strings. Every output is
declared, because a Triton ensemble over an auto-completed model can answer "loaded" and be gone (each output of the
backends is compared with the declaration at load).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patcher.errors import InputError, RepositoryError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "MAX_BATCH_SIZE",
    "PADDING_SLACK",
    "ModelConfig",
    "Serving",
    "Step",
    "Tensor",
    "any_config",
    "asked_by",
    "backbone_config",
    "classifier_config",
    "encoder_config",
    "features_config",
    "head_config",
    "is_on_gpu",
    "parse",
    "pinned_versions",
    "render",
    "serving_of",
    "share_of",
    "steps_of",
    "store_config",
    "tokenizer_config",
    "with_encoding",
    "with_pin",
    "with_response_cache",
    "with_serving",
    "with_share",
]

MAX_BATCH_SIZE = 64
"""The largest batch that Triton forms or takes for any model of a classifier."""

PADDING_SLACK = 12
"""Tokens of padding that texts of different lengths may cost to share a batch (the encoder's own default)."""
# Not measured: no GPU was at hand.
_GPU_ENCODERS, _GPU_SLACK = 2, 512
_GPU_WARMUP = ((1, 8), (MAX_BATCH_SIZE, 128))
_PAIR_SLACK = 10_000
_THREADS, _SLACK, _LARGEST = "intra_op_thread_count", "padding_slack", "largest_batch"
_POWER = "padding_power"
_BACKBONE = "backbone_model"


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
    kind: str = ""
    """``CPU``, ``GPU``, or empty: a GPU where the server has one and the backend can use it."""
    tensorrt: str = ""
    """Precision of ONNX Runtime's TensorRT provider on a GPU (``FP16``, ``FP32``); empty does without it."""
    delay_us: int = 0
    """How long a request may wait for others to share its batch."""
    warmup: tuple[tuple[int, int], ...] = ()
    """Batch and length of calls, all zeros, that the server makes before it says that the model is ready."""
    dynamic_batching: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()


_SHARE = "percent"
_TEXT = Tensor("text", "STRING", (1,))
_CLASSIFIER = Tensor("classifier", "STRING", (1,))
_ANSWER = (
    Tensor("label", "STRING", (-1,)),
    Tensor("score", "FP32", (-1,)),
    Tensor("logits", "FP32", (-1,)),
    Tensor("head_version", "INT64", (1,)),
    Tensor("in_scope", "FP32", (1,)),
)


def _is_gpu(device: str) -> bool:
    if device not in ("cpu", "gpu"):
        raise InputError(f"no device {device!r}; expected cpu or gpu")
    return device == "gpu"


def _features(width: int) -> Tensor:
    return Tensor("features", "FP32", (width,))


def _tokens(names: Sequence[str]) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, "INT64", (-1,)) for name in names)


def tokenizer_config(name: str, token_inputs: Sequence[str]) -> ModelConfig:
    """Text to the token tensors that the backbone takes, for those who want to see them; no ensemble asks it."""
    return ModelConfig(
        name,
        (_TEXT,),
        _tokens(token_inputs),
        backend="python",
        instances=1,
        kind="CPU",  # without it a server with GPUs starts one for each of them
        dynamic_batching=True,
    )


def encoder_config(
    name: str, token_inputs: Sequence[str], backbone: str, width: int, device: str = "cpu", *, unpadded: bool = False
) -> ModelConfig:
    """Text to features FP32 ``[width]``, by way of the model ``backbone``.

    Texts gather in front of it while the backbone works on those before them. For a backbone on a ``gpu`` there are
    two, so that one tokenizes while the other waits, and texts share lengths freely: there a batch more costs far more
    than padding does. A backbone that is ``unpadded`` has padding in its attention alone.
    """
    gpu = _is_gpu(device)
    parameters = {_BACKBONE: backbone, "token_inputs": ",".join(token_inputs)}
    if gpu:
        parameters[_SLACK] = str(_GPU_SLACK)
    elif unpadded:
        parameters |= {_SLACK: str(_PAIR_SLACK), _POWER: "2"}
    return ModelConfig(
        name,
        (_TEXT,),
        (_features(width),),
        backend="python",
        instances=_GPU_ENCODERS if gpu else 1,
        kind="CPU",
        dynamic_batching=True,
        parameters=parameters,
    )


def backbone_config(
    name: str, token_inputs: Sequence[str], width: int, fingerprint: str, device: str = "cpu", tensorrt: str = ""
) -> ModelConfig:
    """Token tensors to features FP32 ``[width]``; ``fingerprint`` is the SHA-256 of ``model.onnx``.

    ``device`` ``gpu`` insists on one, where ``cpu`` leaves the choice to the server; ``tensorrt`` may then be
    the precision of that provider, which builds an engine for each new range of shapes.
    """
    gpu = _is_gpu(device)
    if tensorrt not in ("", "FP16", "FP32") or (tensorrt and not gpu):
        raise InputError(f"no TensorRT with {tensorrt!r} on a {device}; expected FP16 or FP32, on a gpu")
    return ModelConfig(
        name,
        _tokens(token_inputs),
        (_features(width),),
        backend="onnxruntime",
        # One session with a thread for each core of whatever machine it is: Triton's default of two such sessions has
        # them fight, and while one works, a batch forms in front of it. `patcher tune` tries others.
        instances=1,
        kind="GPU" if gpu else "",
        tensorrt=tensorrt,
        # A GPU's first call loads its kernels, and TensorRT's builds an engine for the range of shapes that it saw.
        warmup=_GPU_WARMUP if gpu else (),
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
        kind="CPU",  # a thousandth of the backbone's work, and strings, which no GPU knows
        dynamic_batching=True,
        # One core is plenty for a few small matrix products, and more threads would fight the backbone's for theirs.
        parameters={"intra_op_thread_count": "1"},
    )


def store_config(name: str, width: int, backbone: str) -> ModelConfig:
    """Features and a classifier's name to its answer: one process for all heads of a backbone that are stored.

    Its model.py lies beside it; ``backbone`` names the one whose heads it serves.
    """
    return ModelConfig(
        name,
        (_features(width), _CLASSIFIER),
        _ANSWER,
        backend="python",
        instances=1,
        kind="CPU",
        dynamic_batching=True,
        parameters={"backbone": backbone},
    )


def any_config(name: str, encoding: Sequence[Step], store: str) -> ModelConfig:
    """The ensemble text, classifier -> label, score, logits, head_version, in_scope of a store's classifiers."""
    answer = {tensor.name: tensor.name for tensor in _ANSWER}
    taken = {"features": "features", "classifier": "classifier"}
    return ModelConfig(name, (_TEXT, _CLASSIFIER), _ANSWER, steps=(*encoding, Step(store, taken, answer)))


def features_config(name: str, encoder: str, width: int) -> ModelConfig:
    """The ensemble text -> features."""
    step = Step(encoder, {"text": "text"}, {"features": "features"})
    return ModelConfig(name, (_TEXT,), (_features(width),), steps=(step,))


def classifier_config(name: str, encoding: Sequence[Step], head: str, share: float | None = None) -> ModelConfig:
    """The ensemble text -> label, score, logits, head_version, in_scope; ``encoding`` are the steps to the features.

    A canary's states the ``share`` of the requests, in per cent, that is meant for it.
    """
    parameters = {} if share is None else {_SHARE: f"{share:g}"}
    answer = {tensor.name: tensor.name for tensor in _ANSWER}
    steps = (*encoding, Step(head, {"features": "features"}, answer))
    return ModelConfig(name, (_TEXT,), _ANSWER, steps=steps, parameters=parameters)


def steps_of(message: Any) -> tuple[Step, ...]:
    """The steps of a parsed ensemble."""
    return tuple(
        Step(step.model_name, dict(step.input_map), dict(step.output_map), step.model_version)
        for step in message.ensemble_scheduling.step
    )


def with_encoding(text: str, encoding: Sequence[Step]) -> str:
    """The same ensemble with other steps before its last one."""
    message = parse(text)
    last = message.ensemble_scheduling.step[-1]
    steps = [*(_step(each) for each in encoding), last]
    del message.ensemble_scheduling.step[:]
    message.ensemble_scheduling.step.extend(steps)
    return _text(message)


def is_on_gpu(message: Any) -> bool:
    """Whether a parsed configuration insists on a GPU."""
    return any(group.kind == group.Kind.Value("KIND_GPU") for group in message.instance_group)


def asked_by(message: Any) -> str:
    """The model that a parsed encoder's configuration says it asks; empty for any other model."""
    return _parameter(message, _BACKBONE, "")


def share_of(message: Any) -> float:
    """The share of the requests, in per cent, that a canary's parsed configuration states."""
    return float(_parameter(message, _SHARE, "0"))


def with_share(text: str, percent: float) -> str:
    """The same configuration with another share."""
    message = parse(text)
    message.parameters[_SHARE].string_value = f"{percent:g}"
    return _text(message)


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


@dataclass(frozen=True)
class Serving:
    """How a backbone and what is before it are run: what `patcher tune` chooses for a machine.

    ``instances`` sessions of ``threads`` each (0: as many as there are cores); ``delay_us`` is how long a text may wait
    in front of the encoder for others; ``slack`` the tokens of padding that texts of different lengths may cost
    to share a batch (0: only equal lengths do), or with a backbone that computes none for padding, pairs of tokens in
    its attention; ``batch`` the largest batch of the backbone. Exports before 0.4.0 have no encoder: there it is the
    tokenizer in front of which a text waits.
    """

    instances: int = 1
    threads: int = 0
    delay_us: int = 0
    slack: int = PADDING_SLACK
    batch: int = MAX_BATCH_SIZE


def serving_of(encoder: Any, backbone: Any) -> Serving:
    """What two parsed configurations say; RepositoryError where a setting is no whole number."""
    try:
        limit = max(backbone.dynamic_batching.preferred_batch_size, default=int(backbone.max_batch_size))
        return Serving(
            instances=sum(group.count for group in backbone.instance_group) or 1,
            threads=int(_parameter(backbone, _THREADS, "0")),
            delay_us=int(encoder.dynamic_batching.max_queue_delay_microseconds),
            slack=int(_parameter(encoder, _SLACK, str(PADDING_SLACK))),
            batch=int(_parameter(encoder, _LARGEST, str(limit))),
        )
    except ValueError as error:
        raise RepositoryError(
            f"{backbone.name} or {encoder.name}: {error}; expected whole numbers in {_THREADS}, {_SLACK} and {_LARGEST}"
        ) from error


def with_serving(encoder: str, backbone: str, serving: Serving) -> tuple[str, str]:
    """Both ``config.pbtxt`` with these settings; whatever else somebody tuned in them stays."""
    first, second = parse(encoder), parse(backbone)
    first.dynamic_batching.max_queue_delay_microseconds = serving.delay_us
    _set_parameter(first, _SLACK, serving.slack, PADDING_SLACK)
    if serving.instances != serving_of(first, second).instances and asked_by(first):
        # An encoder asks one backbone at a time.
        _set_instances(first, max(serving.instances, _GPU_ENCODERS if is_on_gpu(second) else 1))
    _set_instances(second, serving.instances)
    _set_parameter(second, _THREADS, serving.threads, 0)
    if asked_by(first):
        _set_parameter(first, _LARGEST, serving.batch, second.max_batch_size)
    else:
        # Triton closes a batch at the largest preferred size; max_batch_size stays, for clients' own batches.
        del second.dynamic_batching.preferred_batch_size[:]
        if serving.batch < second.max_batch_size:
            second.dynamic_batching.preferred_batch_size.append(serving.batch)
    return _text(first), _text(second)


def _set_instances(message: Any, count: int) -> None:
    if not message.instance_group:
        message.instance_group.add()
    message.instance_group[0].count = count


def with_response_cache(text: str, *, enable: bool) -> str:
    """The same configuration with Triton's response cache on or off, for what gives features.

    Only an encoder or a backbone may have it: its answer depends on its input alone, and its file never changes. Heads
    and the ensembles above them do change, and the key of a cached ensemble answer does not know which head gave it:
    RepositoryError for them.
    """
    message = parse(text)
    if message.ensemble_scheduling.step or [output.name for output in message.output] != ["features"]:
        raise RepositoryError(
            f"{message.name} is no encoder or backbone; a cached answer of it could outlive the head that gave it. "
            "Expected a model whose file never changes: NAME_encoder or NAME_backbone"
        )
    if enable:
        message.response_cache.enable = True
    else:
        message.ClearField("response_cache")
    return _text(message)


def _parameter(message: Any, key: str, default: str) -> str:
    return str(message.parameters[key].string_value) if key in message.parameters else default


def _set_parameter(message: Any, key: str, value: int, default: int) -> None:
    if value == default:
        message.parameters.pop(key, None)
    else:
        message.parameters[key].string_value = str(value)
