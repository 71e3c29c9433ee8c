"""What ends a run: signals as Ctrl-C, and what must not be cut off in the middle by them."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["interruptible", "uninterrupted"]

_TOLD = (signal.SIGTERM, signal.SIGHUP)
"""`docker stop`, systemd or a timeout; the terminal, or the connection to it, that is gone."""
_Handler = Any


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM and SIGHUP interrupt the body as Ctrl-C does, so that what was begun is undone.

    One that is ignored stays so: `nohup` means it. A container's first process would not even end by SIGTERM.
    """
    with _handled(_TOLD, lambda now: now if now == signal.SIG_IGN else signal.default_int_handler):
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore all of them in the body: it is the way back, or the last step of what succeeded."""
    with _handled((signal.SIGINT, *_TOLD), lambda _: signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Callable[[_Handler], _Handler]) -> Iterator[None]:
    """Other handlers in the body; in another thread than the main one signals never arrive anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, _Handler] = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, handler(signal.getsignal(number)))
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
