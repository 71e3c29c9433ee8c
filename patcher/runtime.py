"""Run the ONNX files that Triton serves in this process, without a server."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.errors import RepositoryError
from patcher.onnx_file import check_backbone_file
from patcher.telemetry import turn_off

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from patcher.head import Head

__all__ = [
    "Encoder",
    "HeadAnswer",
    "check_head_file",
    "onnxruntime_errors",
    "open_session",
    "read_tokenizer",
    "run_head",
]

turn_off()  # before anything here imports onnxruntime

_BATCH = 32
_MOST_PADDING = 1 << 16


@dataclass(frozen=True)
class HeadAnswer:
    """A head's outputs for n inputs: labels and scores ``[n, k]``, best first; logits ``[n, C]``; in_scope ``[n]``."""

    labels: NDArray[np.object_]
    scores: NDArray[np.float32]
    logits: NDArray[np.float32]
    version: int
    in_scope: NDArray[np.float32]


def open_session(model: bytes | Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU; RepositoryError if the file does not load. ``threads`` 0: the default."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model
    try:
        if isinstance(source, str):
            source.encode()
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except UnicodeEncodeError as error:
        raise RepositoryError(
            f"{os.fsencode(source)!r} is not a path that ONNX Runtime can open; expected one in UTF-8: rename it"
        ) from error
    except onnxruntime_errors() as error:
        name = model if isinstance(model, Path) else "the file"
        raise RepositoryError(f"ONNX Runtime cannot load {name}: {error}") from error


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """The exceptions that ONNX Runtime raises: they have no common base class, only a common module."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (*kinds, RuntimeError)


def run_head(session: Any, features: NDArray[np.float32]) -> HeadAnswer:
    """Run a head on features FP32 ``[n, width]``."""
    names = ["label", "score", "logits", "head_version", "in_scope"]
    label, score, logits, version, in_scope = session.run(names, {"features": features})
    return HeadAnswer(label, score, logits, int(version[0, 0]), in_scope[:, 0])


def check_head_file(data: bytes, head: Head, features: NDArray[np.float32]) -> None:
    """Check that the file ``data`` loads and answers ``features`` as ``head`` does, before it is published.

    Raises RepositoryError, which says what differs.
    """
    answer = run_head(open_session(data, threads=1), features)
    expected = head.logits(features)
    if not (np.isfinite(answer.logits).all() and np.isfinite(answer.in_scope).all()):
        raise RepositoryError("the head file gives numbers that are not finite; nothing was published")
    if answer.version != head.lineage.version:
        raise RepositoryError(f"the head file answers as version {answer.version}; expected {head.lineage.version}")
    allowed = 1e-3 + 1e-4 * np.abs(expected) + head.rounding(features)
    if answer.logits.shape != expected.shape or not (np.abs(answer.logits - expected) <= allowed).all():
        raise RepositoryError("the head file's logits differ from its rows; nothing was published")
    best = [head.labels[index] for index in answer.logits.argmax(axis=1)]
    if best != answer.labels[:, 0].tolist():
        raise RepositoryError("the head file's labels differ from its logits; nothing was published")


def read_tokenizer(path: Path) -> Any:
    """The ``tokenizers.Tokenizer`` in a file; RepositoryError if there is none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust binding raises plain Exception
        raise RepositoryError(f"cannot read the tokenizer {path}: {error}") from error


class Encoder:
    """Texts to features with a repository's own tokenizer and backbone files."""

    def __init__(self, backbone: Path, tokenizer: Path, threads: int = 0) -> None:
        check_backbone_file(backbone)
        self._session = open_session(backbone, threads)
        self._names = tuple(tensor.name for tensor in self._session.get_inputs())
        self._tokenizer = read_tokenizer(tokenizer)
        padding = self._tokenizer.padding or {}
        longest = max(padding.get(name) or 0 for name in ("length", "pad_to_multiple_of"))
        if longest > _MOST_PADDING:
            raise RepositoryError(f"{tokenizer} pads to {longest:,} tokens; expected at most {_MOST_PADDING:,}")

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> NDArray[np.float32]:
        """Features FP32 ``[n, width]`` of n texts. ``progress`` is called with the number of texts done so far."""
        from patcher.triton.tokenizer.model import MOST_PAIRS, encode

        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        rows: dict[int, NDArray[np.float32]] = {}
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            tokens: Mapping[str, Any] = encode(self._tokenizer, [texts[index] for index in batch], self._names)
            at_once = max(1, MOST_PAIRS // tokens["input_ids"].shape[1] ** 2)
            try:
                features = np.concatenate(
                    [
                        self._session.run(["features"], {name: ids[i : i + at_once] for name, ids in tokens.items()})[0]
                        for i in range(0, len(batch), at_once)
                    ]
                )
            except onnxruntime_errors() as error:
                raise RepositoryError(
                    f"the backbone cannot run what the tokenizer beside it gives ({error}); do they belong together?"
                ) from error
            rows.update(zip(batch, features, strict=True))
            if progress:
                progress(len(rows))
        return np.stack([rows[index] for index in range(len(texts))])
