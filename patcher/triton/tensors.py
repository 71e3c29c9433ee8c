"""Convert texts and features to request tensors, and result tensors to answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.arguments import require
from patcher.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Answer", "encode_text", "read_answers", "read_output", "strings", "to_head"]


@dataclass(frozen=True, eq=False)
class Answer:
    """A classifier's answer to one text.

    ``labels`` and ``scores`` are the best few, best first. ``logits`` FP32 ``[labels]`` are those of all labels, in the
    head's own order, or ``[0]`` if they were not requested. ``in_scope`` is None if the classifier does not give it.
    ``head_version`` is the version of the head that answered.
    """

    text: str
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    logits: NDArray[np.float32]
    head_version: int
    in_scope: float | None


def to_head(features: NDArray[np.float32], classifier: str) -> list[Any]:
    """The inputs of a head; ``classifier`` is its name in a head store, or empty for a head that is its own model."""
    import tritonclient.grpc as triton

    tensor = triton.InferInput("features", list(features.shape), "FP32")
    tensor.set_data_from_numpy(features)
    return [tensor, *([strings("classifier", [classifier.encode()] * len(features))] if classifier else [])]


def strings(name: str, values: Sequence[bytes]) -> Any:
    """A BYTES tensor ``[n, 1]`` of the values."""
    import tritonclient.grpc as triton

    column = np.empty((len(values), 1), dtype=object)
    column[:, 0] = values
    tensor = triton.InferInput(name, list(column.shape), "BYTES")
    tensor.set_data_from_numpy(column)
    return tensor


def encode_text(text: str, place: str) -> bytes:
    """A text as UTF-8; InputError, naming its ``place``, if it is not a string or not valid Unicode."""
    require(str, **{place: text})
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a text contains an unpaired surrogate at position {error.start} ({error.reason}): {text!r:.80}"
        ) from None


def read_output(result: Any, name: str) -> Any:
    """The output ``name`` of an answered request; InputError if the model has no such output."""
    found = result.as_numpy(name)
    if found is None:
        raise InputError(
            f"{result.get_response().model_name} has no output {name}: expected a classifier to classify, "
            "NAME_features for features"
        )
    return found


def read_answers(texts: Sequence[str], result: Any) -> list[Answer]:
    """A classifier's answers to ``texts``, from the result of the request."""
    labels, scores, versions = (read_output(result, name) for name in ("label", "score", "head_version"))
    logits, scope = result.as_numpy("logits"), result.as_numpy("in_scope")
    none = np.empty(0, np.float32)
    return [
        Answer(
            text,
            tuple(label.decode() for label in labels[row]),
            tuple(float(score) for score in scores[row]),
            none if logits is None else logits[row],
            int(versions[row, 0]),
            None if scope is None else float(scope[row, 0]),
        )
        for row, text in enumerate(texts)
    ]
