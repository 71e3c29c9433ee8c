"""Splits many rows into blocks: all logits of 100,000 inputs for 5,000 labels at once would take gigabytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["blocks"]

_ROWS = 1024


def blocks(count: int, rows: int = _ROWS) -> Iterator[slice]:
    """Slices of at most ``rows`` rows that together cover ``count`` of them, in order."""
    return (slice(start, start + rows) for start in range(0, count, rows))
