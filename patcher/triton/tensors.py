"""Texts and features as tensors of a request, and the tensors of its result as answers."""

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
    """What a classifier said about one text.

    ``labels`` and ``scores`` are the best few, best first; ``logits`` FP32 ``[labels]`` are all of them, in the head's
    own order, ``[0]`` where they were not asked for; ``in_scope`` is None where the classifier gives none. All come
    from head ``head_version``.
    """

    text: str
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    logits: NDArray[np.float32]
    head_version: int
    in_scope: float | None


def to_head(features: NDArray[np.float32], classifier: str) -> list[Any]:
    """The inputs of a head, with the name of a ``classifier`` where it is one of a store."""
    import tritonclient.grpc as triton

    tensor = triton.InferInput("features", list(features.shape), "FP32")
    tensor.set_data_from_numpy(features)
    return [tensor, *([strings("classifier", [classifier.encode()] * len(features))] if classifier else [])]


def strings(name: str, values: Sequence[bytes]) -> Any:
    """A BYTES tensor ``[n, 1]`` of as many values."""
    import tritonclient.grpc as triton

    column = np.empty((len(values), 1), dtype=object)
    column[:, 0] = values
    tensor = triton.InferInput(name, list(column.shape), "BYTES")
    tensor.set_data_from_numpy(column)
    return tensor


def encode_text(text: str, place: str) -> bytes:
    """A text as it goes over the wire; InputError, naming its ``place``, where it is none or no valid Unicode."""
    require(str, **{place: text})
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a text contains an unpaired surrogate at position {error.start} ({error.reason}): {text!r:.80}"
        ) from None


def read_output(result: Any, name: str) -> Any:
    """An output of an answered request; InputError where the model has none of that name."""
    found = result.as_numpy(name)
    if found is None:
        raise InputError(
            f"{result.get_response().model_name} has no output {name}: expected a classifier to classify, "
            "NAME_features for features"
        )
    return found


def read_answers(texts: Sequence[str], result: Any) -> list[Answer]:
    """What a classifier said about each of ``texts``, from the answered request."""
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
