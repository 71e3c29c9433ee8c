"""Slices of many rows: in blocks, as all logits of 100,000 inputs for 5,000 labels would take gigabytes; or thinned."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["blocks", "thinned"]

_ROWS = 1024


def blocks(count: int, rows: int = _ROWS) -> Iterator[slice]:
    """Slices of at most ``rows`` rows that together cover ``count`` of them, in order."""
    return (slice(start, start + rows) for start in range(0, count, rows))


def thinned(count: int, most: int) -> slice:
    """A slice that takes every k-th of ``count`` rows, for the smallest k that leaves at most ``most`` of them."""
    return slice(None, None, max(1, -(-count // most)))
