"""The Triton configurations of the models of a backbone, a classifier and a head store."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from patcher.errors import InputError
from patcher.model_config import MAX_BATCH_SIZE, ModelConfig, Step, Tensor, parameter, parse, to_text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "GRAPHS",
    "PADDING_SLACK",
    "PROGRAM_HASH",
    "SLACK",
    "any_config",
    "asked_by",
    "backbone_config",
    "classifier_config",
    "encoder_config",
    "encoders",
    "features_config",
    "graphed",
    "head_config",
    "share_of",
    "store_config",
    "tokenizer_config",
    "with_program",
    "with_share",
]

PADDING_SLACK = 12
"""Tokens of padding accepted to put texts of different lengths into one batch (the encoder's own default)."""
# In pairs of tokens, as attention counts them. MiniLM on two cores: 8 texts of 10 tokens gain by sharing a batch with
# one text of 20 tokens, and lose by sharing it with one of 64.
_PAIR_SLACK = 10_000

# No other values of the next two were measured.
_GPU_SLACK = 512
_GPU_WARMUP = ((1, 8), (MAX_BATCH_SIZE, 128))

# MiniLM on an H200: with CUDA graphs a call takes 0.2 to 0.8 of its time without them for batches of up to 64 x 32
# tokens, 0.9 at 64 x 64, and the same at 64 x 128.
GRAPHS = "cuda_graphs"
"""The parameter that names the batch shapes that a GPU runs as CUDA graphs."""
_GRAPH_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_GRAPH_LENGTHS = (8, 16, 24, 32, 48, 64)

SLACK = "padding_slack"
"""The parameter that limits the padding accepted to put texts of different lengths into one batch."""
PROGRAM_HASH = "program"
"""The parameter with the hash of the model's program, which shows what program a server has loaded."""
_POWER = "padding_power"
_BACKBONE = "backbone_model"

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
    """Text to the token tensors that the backbone takes. For inspection only: no ensemble uses it."""
    return ModelConfig(
        name,
        (_TEXT,),
        _tokens(token_inputs),
        backend="python",
        instances=1,
        kind="CPU",  # otherwise a server starts one instance for each of its GPUs
        dynamic_batching=True,
    )


def encoder_config(
    name: str,
    token_inputs: Sequence[str],
    backbone: str,
    width: int,
    device: str = "cpu",
    *,
    unpadded: bool = False,
    graphs: str = "",
) -> ModelConfig:
    """Text to features FP32 ``[width]``; the encoder tokenizes and calls the model ``backbone``.

    Texts queue up, and so form batches, while the backbone is busy. On a ``gpu``, texts of different lengths share a
    batch freely: one more batch costs far more than padding, and most batches are padded anyway, to a shape that the
    setting ``graphs`` names. In an ``unpadded`` backbone, padding costs time in attention only.
    """
    gpu = _is_gpu(device)
    parameters = {_BACKBONE: backbone, "token_inputs": ",".join(token_inputs)}
    if gpu:
        parameters[SLACK] = str(_GPU_SLACK)
        if graphs:
            parameters[GRAPHS] = graphs
    elif unpadded:
        parameters |= {SLACK: str(_PAIR_SLACK), _POWER: "2"}
    return ModelConfig(
        name,
        (_TEXT,),
        (_features(width),),
        backend="python",
        instances=encoders(gpu=gpu, graphs=graphs),
        kind="CPU",
        dynamic_batching=True,
        parameters=parameters,
    )


def backbone_config(
    name: str,
    token_inputs: Sequence[str],
    width: int,
    fingerprint: str,
    device: str = "cpu",
    tensorrt: str = "",
    longest: int = 512,
    graphs: str = "",
) -> ModelConfig:
    """Token tensors to features FP32 ``[width]``; ``fingerprint`` is the SHA-256 of ``model.onnx``.

    ``device`` ``gpu`` requires a GPU, whereas ``cpu`` leaves the choice to the server. On ``gpu``, ``tensorrt`` may
    name a precision; ONNX Runtime's TensorRT provider then builds an engine for each new range of shapes. ``longest``
    is the number of tokens to which texts are truncated, ``graphs`` the setting of the shapes to run as CUDA graphs.
    """
    gpu = _is_gpu(device)
    if tensorrt not in ("", "FP16", "FP32") or (tensorrt and not gpu):
        raise InputError(f"no TensorRT with {tensorrt!r} on a {device}; expected FP16 or FP32, on a gpu")
    return ModelConfig(
        name,
        _tokens(token_inputs),
        (_features(width),),
        backend="onnxruntime",
        # One session, with a thread for each core of the machine. Triton's default of two such sessions would make them
        # compete for the cores; and while a single one is busy, a batch forms. `patcher tune` tries other numbers.
        instances=1,
        kind="GPU" if gpu else "",
        tensorrt=tensorrt,
        # On a GPU the first call loads the kernels, and TensorRT builds an engine for the range of shapes seen so far.
        warmup=tuple((batch, min(length, longest)) for batch, length in _GPU_WARMUP) if gpu else (),
        dynamic_batching=True,
        parameters={"fingerprint": fingerprint} | ({GRAPHS: graphs} if graphs else {}),
    )


def encoders(*, gpu: bool, graphs: str) -> int:
    """Number of encoder instances for a backbone; ``graphs`` is the setting of its CUDA graphs, empty for none.

    Measured with MiniLM on an H200. Without graphs, one encoder tokenizes while another waits for the backbone; 4 and 8
    instances gave 0.87 and 0.53 of the throughput of 2 (at 32 concurrent texts). With graphs, one instance gave at
    least the throughput of two, and 1.4 times as much with one text at a time.
    """
    return 2 if gpu and not graphs else 1


def graphed(longest: int) -> str:
    """The setting that names the shapes for CUDA graphs, for texts of up to ``longest`` tokens; may be empty."""
    lengths = [length for length in _GRAPH_LENGTHS if length <= longest]
    return f"{','.join(map(str, _GRAPH_BATCHES))} x {','.join(map(str, lengths))}" if lengths else ""


def head_config(name: str, width: int, version: int) -> ModelConfig:
    """Features to the answer; pins ``version``, so that the choice survives a restart."""
    return ModelConfig(
        name,
        (_features(width),),
        _ANSWER,
        backend="onnxruntime",
        versions=(version,),
        instances=1,
        kind="CPU",  # a thousandth of the backbone's work, and strings, which a GPU cannot handle
        dynamic_batching=True,
        # One thread is enough for a few small matrix products; more would compete with the backbone's for cores.
        parameters={"intra_op_thread_count": "1"},
    )


def store_config(name: str, width: int, backbone: str) -> ModelConfig:
    """Features and a classifier's name to its answer: one process serves all stored heads of ``backbone``.

    The store's program, ``model.py``, is a file beside this configuration.
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
    """A head store's ensemble text, classifier -> label, score, logits, head_version, in_scope."""
    answer = {tensor.name: tensor.name for tensor in _ANSWER}
    taken = {"features": "features", "classifier": "classifier"}
    return ModelConfig(name, (_TEXT, _CLASSIFIER), _ANSWER, steps=(*encoding, Step(store, taken, answer)))


def features_config(name: str, encoder: str, width: int) -> ModelConfig:
    """The ensemble text -> features."""
    step = Step(encoder, {"text": "text"}, {"features": "features"})
    return ModelConfig(name, (_TEXT,), (_features(width),), steps=(step,))


def classifier_config(name: str, encoding: Sequence[Step], head: str, share: float | None = None) -> ModelConfig:
    """The ensemble text -> label, score, logits, head_version, in_scope; ``encoding`` are the steps to the features.

    ``share`` is for canaries: the percentage of the requests that clients should send to it.
    """
    parameters = {} if share is None else {_SHARE: f"{share:g}"}
    answer = {tensor.name: tensor.name for tensor in _ANSWER}
    steps = (*encoding, Step(head, {"features": "features"}, answer))
    return ModelConfig(name, (_TEXT,), _ANSWER, steps=steps, parameters=parameters)


def asked_by(message: Any) -> str:
    """The backbone model that an encoder calls, from its parsed configuration; empty for any other model."""
    return parameter(message, _BACKBONE, "")


def share_of(message: Any) -> float:
    """The percentage of the requests that a canary's parsed configuration states; 0 if none."""
    return float(parameter(message, _SHARE, "0"))


def with_program(text: str, program: bytes) -> str:
    """The configuration with the hash of ``program`` in it: the first 12 hex digits of its SHA-256."""
    message = parse(text)
    message.parameters[PROGRAM_HASH].string_value = hashlib.sha256(program).hexdigest()[:12]
    return to_text(message)


def with_share(text: str, percent: float) -> str:
    """The configuration of a canary with another share of the requests."""
    message = parse(text)
    message.parameters[_SHARE].string_value = f"{percent:g}"
    return to_text(message)
