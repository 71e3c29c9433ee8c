"""Checks that the exported files answer as the checkpoint does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from export.checkpoint import own_logits
from export.split import allowed_gaps
from export.tokenizer import SAMPLE_TEXTS, embeddings
from patcher.errors import ParityError, PrecisionError
from patcher.runtime import onnxruntime_errors, open_session
from patcher.wording import percent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from export.precision import Limits
    from export.split import Split
    from export.tokenizer import TextEncoder

    Tokens = Mapping[str, NDArray[np.int64]]

__all__ = ["Parity", "check_parity", "token_batch"]

# Text lengths of each batch; one more batch has a text of the maximum length. None has the shape that the export was
# traced with, so anything that tracing froze shows up here.
_SHAPES = ((1,), (5,), (12, 3, 7), (33, 1, 16, 2, 8, 21, 5), (64, 40))
_TOGETHER = 4
"""Texts per batch; kept small because texts may be long and attention needs memory quadratic in their length."""


@dataclass(frozen=True)
class Parity:
    """What was compared, and the largest difference found in any logit."""

    batches: int
    texts: int
    difference: float
    features: NDArray[np.float32]
    """Features FP32 ``[texts, width]`` of all texts compared."""
    noise: float = 0.0
    """RMS of the change in the logits, divided by the RMS of the logits about their mean."""


def token_batch(
    encoder: TextEncoder, vocabulary: int, lengths: Sequence[int], seed: int = 0
) -> dict[str, torch.Tensor]:
    """A padded batch of random tokens, one row for each of ``lengths``, INT64 ``[batch, longest]`` each."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths))
    ids = rng.integers(0, vocabulary - 1, shape)
    ids += ids >= encoder.pad_id
    position = np.arange(shape[1])[None, :]
    size = np.array(lengths)[:, None]
    real = position >= shape[1] - size if encoder.left else position < size
    tensors = {
        "input_ids": np.where(real, ids, encoder.pad_id),
        "attention_mask": real.astype(np.int64),
        "token_type_ids": np.where(real, 0, encoder.pad_type_id),
    }
    return {name: torch.from_numpy(tensors[name].astype(np.int64)) for name in encoder.inputs}


def check_parity(
    model: PreTrainedModel,
    split: Split,
    encoder: TextEncoder,
    path: Path,
    texts: Sequence[str] = (),
    limits: Limits | None = None,
) -> Parity:
    """Compare the backbone at ``path`` plus the split-off layer with the checkpoint, on padded batches of many lengths.

    Random tokens reveal what tracing froze; real texts (``texts`` and a few built-in ones) check that the tokenizer
    fits. With ``limits``, for a lower precision, single logits may move further, and only their noise over all texts
    is bounded.

    Raises
    ------
    ParityError
        if a logit differs by more than rounding explains (`allowed_gaps`).
    PrecisionError
        if the noise exceeds ``limits``.
    """
    session = open_session(path)
    names = [tensor.name for tensor in session.get_inputs()]
    worst, features, logits = 0.0, [], []
    for tokens in _batches(model, encoder, texts):
        expected = own_logits(model, tokens)
        shape = tuple(tokens["input_ids"].shape)
        try:
            given = session.run(["features"], {name: tokens[name].numpy() for name in names})[0]
        except onnxruntime_errors() as error:
            raise ParityError(
                f"the exported backbone fails {_where(shape)}: the export froze something that depends on the input "
                f"({error})"
            ) from error
        _refuse_unusable(given, split, shape)
        found = given[:, : split.split] @ split.weight.T + split.bias
        worst = max(worst, float(np.abs(found - expected).max()))
        if limits is None:
            _compare(found, expected, allowed_gaps(given[:, : split.split], split.weight, split.bias), _where(shape))
        features.append(given)
        logits.append((found, expected))
    rows = np.concatenate(features)
    noise = _noise(*(np.concatenate(each) for each in zip(*logits, strict=True)))
    if limits is not None and noise > limits.noise:
        raise PrecisionError(
            f"in this precision the logits move by {percent(noise, 1)} of their spread on {len(rows)} texts; expected "
            f"at most {percent(limits.noise, 1)}: this model loses too much at this precision; use a higher "
            "--precision"
        )
    return Parity(len(features), len(rows), worst, rows, noise)


def _noise(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    spread = float(np.sqrt(np.square(expected - expected.mean()).mean()))
    return float(np.sqrt(np.square(found - expected).mean())) / max(spread, 1e-12)


def _batches(model: PreTrainedModel, encoder: TextEncoder, texts: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    vocabulary = embeddings(model).num_embeddings
    for seed, lengths in enumerate((*_SHAPES, (encoder.max_length,))):
        yield token_batch(encoder, vocabulary, [min(length, encoder.max_length) for length in lengths], seed)
    longest_first = sorted(texts, key=len, reverse=True)
    some = [longest_first[i : i + _TOGETHER] for i in range(0, len(longest_first), _TOGETHER)]
    for group in ([SAMPLE_TEXTS[0]], SAMPLE_TEXTS, *some):
        yield {name: torch.from_numpy(ids) for name, ids in encoder(list(group)).items()}


def _where(shape: tuple[int, ...]) -> str:
    return f"on a batch of {shape[0]} texts of {shape[1]} tokens"


def _refuse_unusable(given: NDArray[np.float32], split: Split, shape: tuple[int, ...]) -> None:
    if given.shape != (shape[0], split.width) or not np.isfinite(given).all():
        raise ParityError(
            f"the exported backbone gives features {list(given.shape)} {_where(shape)}, or values not finite"
        )


def _compare(
    logits: NDArray[np.float32], expected: NDArray[np.float32], allowed: NDArray[np.float32], where: str
) -> None:
    gaps = np.abs(logits - expected)
    text, label = np.unravel_index(int((gaps - allowed).argmax()), gaps.shape)
    if gaps[text, label] > allowed[text, label]:
        raise ParityError(
            f"the exported model's logits differ from the checkpoint's by {gaps[text, label]:.2g} {where}; expected at "
            f"most {allowed[text, label]:.2g}: the export froze something that depends on the input, or the model "
            "takes long texts otherwise than short ones (--max-length N leaves those out)"
        )
