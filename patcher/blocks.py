"""Many rows a few at a time: the logits of 5,000 labels for 100,000 inputs take gigabytes, and are soon done with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["blocks"]

_ROWS = 1024


def blocks(count: int, rows: int = _ROWS) -> Iterator[slice]:
    """Slices of at most so many ``rows``, which together are all of ``count``, in order."""
    return (slice(start, start + rows) for start in range(0, count, rows))
