"""Write a memory as one safetensors file, and read it back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.clustering import Clusters
from patcher.errors import InputError, RepositoryError
from patcher.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

__all__ = ["read_memory", "write_memory"]

_FORMAT = 2
"""Format 1 had no clusters."""
_ARRAYS = ("counts", "sums", "second_moment", "sample", "sample_labels")
_CLUSTERS = ("cluster_means", "cluster_counts", "cluster_labels")


def write_memory(memory: Memory) -> bytes:
    """Serialize a memory as a safetensors file; equal memories give equal bytes."""
    from safetensors.numpy import save

    about = {
        "format": _FORMAT,
        "labels": memory.labels,
        "split": memory.split,
        "per_label": memory.per_label,
        "seed": memory.seed,
        "most_clusters": memory.most_clusters,
    }
    tensors = {name: np.ascontiguousarray(array) for name, array in memory.arrays().items()}
    data: bytes = save(tensors, metadata={"patcher": json.dumps(about, ensure_ascii=False)})
    return data


def read_memory(data: bytes) -> Memory:
    """Read a memory from its file; RepositoryError if the bytes are not a memory that patcher wrote."""
    about, arrays = _read(data)
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise RepositoryError("this memory is damaged: it holds values that are not finite")
    try:
        names = ("split", "per_label", "seed", *(["most_clusters"] if about["format"] > 1 else []))
        settings: dict[str, Any] = {name: int(about[name]) for name in names}
        kept: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
        labels = tuple(str(label) for label in about["labels"])
        return Memory(labels=labels, clusters=_clusters(arrays), **kept, **settings)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise RepositoryError(f"this file is not a memory of patcher: {type(error).__name__} {error}") from error


def _read(data: bytes) -> tuple[Mapping[str, Any], Arrays]:
    """Metadata and arrays of a memory's file; RepositoryError unless the arrays are those of its format."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        about = json.loads(header["__metadata__"]["patcher"])
        arrays = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise RepositoryError(f"this file is not a memory of patcher: {type(error).__name__} {error}") from error
    number = about.get("format") if isinstance(about, dict) else None
    if isinstance(number, int) and number > _FORMAT:
        raise RepositoryError(
            f"this memory has format {number}, and this patcher reads up to {_FORMAT}; update patcher"
        )
    if number is None or set(arrays) != {*_ARRAYS, *(() if number == 1 else _CLUSTERS)}:
        raise RepositoryError(f"this file is not a memory of patcher: it holds {', '.join(sorted(arrays))}")
    return about, arrays


def _clusters(arrays: Arrays) -> Clusters:
    """The clusters in the file. For format 1, which had none: one for each label, if real features are kept."""
    if set(_CLUSTERS) <= set(arrays):
        return Clusters(*(arrays[name] for name in _CLUSTERS))
    counts = arrays["counts"] if len(arrays["sample"]) else arrays["counts"][:0]
    try:
        return Clusters.of_means(arrays["sums"][: len(counts)] / np.maximum(counts, 1)[:, None], counts)
    except InputError as error:
        raise RepositoryError(f"this memory is damaged: {error}") from error
