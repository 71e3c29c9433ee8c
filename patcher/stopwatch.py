"""Wall-clock time: seconds by stage for reports, and the progress of long work."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from patcher.wording import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Stopwatch", "counter"]

_SECONDS_A_LINE = 5.0


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


def counter(tell: Callable[[str], object], total: int, noun: str = "text") -> Callable[[int], None]:
    """A function to call with the number of texts done so far; it reports them through ``tell`` every few seconds.

    Called with 0, it starts anew. Instead of texts it may count what ``noun`` says.
    """
    started = last = time.monotonic()

    def count(done: int) -> None:
        nonlocal started, last
        now = time.monotonic()
        if not done:
            started = last = now
        elif now - last >= _SECONDS_A_LINE and done < total:
            last = now
            left = (now - started) / done * (total - done)
            tell(f"{done:,} of {plural(total, noun)}, {left:.0f} s to go")

    return count
