"""Seconds by stage, for reports."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Stopwatch"]


class Stopwatch:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time of the body as that of ``stage``."""
        start = time.perf_counter()
        yield
        self._stages[stage] = time.perf_counter() - start

    def stop(self) -> dict[str, float]:
        """The stages that ended well, and ``total`` since the watch was made."""
        return {**self._stages, "total": time.perf_counter() - self._start}
