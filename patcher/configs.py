"""What the configurations of a backbone's, a classifier's and a head store's models say."""

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
"""Tokens of padding that texts of different lengths may cost to share a batch (the encoder's own default)."""
# MiniLM on two cores: 8 texts of 10 tokens and one of 20 gain by sharing a batch, with one of 64 they lose.
_PAIR_SLACK = 10_000

# Other values of these two were not measured.
_GPU_SLACK = 512
_GPU_WARMUP = ((1, 8), (MAX_BATCH_SIZE, 128))

# CUDA graphs of MiniLM on an H200: 0.2 to 0.8 of a call's time up to 64 x 32, 0.9 at 64 x 64, no gain at 64 x 128.
GRAPHS = "cuda_graphs"
"""The parameter that names the shapes of calls that a GPU gets as CUDA graphs."""
_GRAPH_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_GRAPH_LENGTHS = (8, 16, 24, 32, 48, 64)

SLACK = "padding_slack"
"""The parameter that says how much padding texts of different lengths may cost."""
PROGRAM_HASH = "program"
"""The parameter that names the program beside the configuration, so that a server tells which one it started with."""
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
    name: str,
    token_inputs: Sequence[str],
    backbone: str,
    width: int,
    device: str = "cpu",
    *,
    unpadded: bool = False,
    graphs: str = "",
) -> ModelConfig:
    """Text to features FP32 ``[width]``, by way of the model ``backbone``.

    Texts gather in front of it while the backbone works on those before them. For a backbone on a ``gpu`` they share
    lengths freely: there a batch more costs far more than padding does, and most are padded to a shape that the setting
    ``graphs`` names. A backbone that is ``unpadded`` has padding in its attention alone.
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

    ``device`` ``gpu`` insists on one, where ``cpu`` leaves the choice to the server; ``tensorrt`` may then be
    the precision of that provider, which builds an engine for each new range of shapes. ``longest`` is the tokens
    beyond which a text is cut, ``graphs`` the setting of the shapes that it runs as CUDA graphs.
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
        warmup=tuple((batch, min(length, longest)) for batch, length in _GPU_WARMUP) if gpu else (),
        dynamic_batching=True,
        parameters={"fingerprint": fingerprint} | ({GRAPHS: graphs} if graphs else {}),
    )


def encoders(*, gpu: bool, graphs: str) -> int:
    """Encoders before a backbone on this device, by CUDA graphs where ``graphs`` names any.

    MiniLM on an H200: without graphs one encoder tokenizes while another waits, and 4 and 8 gave 0.87 and 0.53 of the
    throughput of 2 (32 texts at once). With graphs one gave no less than two, and 1.4 times with one text at once.
    """
    return 2 if gpu and not graphs else 1


def graphed(longest: int) -> str:
    """The setting of the shapes that a GPU gets as CUDA graphs, of texts of up to ``longest`` tokens."""
    lengths = [length for length in _GRAPH_LENGTHS if length <= longest]
    return f"{','.join(map(str, _GRAPH_BATCHES))} x {','.join(map(str, lengths))}" if lengths else ""


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


def asked_by(message: Any) -> str:
    """The model that a parsed encoder's configuration says it asks; empty for any other model."""
    return parameter(message, _BACKBONE, "")


def share_of(message: Any) -> float:
    """The share of the requests, in per cent, that a canary's parsed configuration states."""
    return float(parameter(message, _SHARE, "0"))


def with_program(text: str, program: bytes) -> str:
    """The same configuration naming the ``program`` beside it, by its SHA-256."""
    message = parse(text)
    message.parameters[PROGRAM_HASH].string_value = hashlib.sha256(program).hexdigest()[:12]
    return to_text(message)


def with_share(text: str, percent: float) -> str:
    """The same configuration with another share."""
    message = parse(text)
    message.parameters[_SHARE].string_value = f"{percent:g}"
    return to_text(message)
