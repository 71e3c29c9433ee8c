"""Wall-clock seconds by stage, for the reports."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Stopwatch"]


class Stopwatch:
    """``with watch("fit"):`` adds to that stage's ``seconds``; ``stop`` adds the total since the watch was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the body."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def stop(self) -> dict[str, float]:
        """All stages so far, and ``total``."""
        return {**self.seconds, "total": time.perf_counter() - self._start}
