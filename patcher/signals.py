"""Handle termination signals like Ctrl-C, and protect steps that they must not interrupt."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["ignore_signals", "interruptible", "uninterrupted"]

_TOLD = (signal.SIGTERM, signal.SIGHUP)
"""SIGTERM comes from `docker stop`, systemd or a timeout; SIGHUP from a closed terminal or a lost connection."""
_Handler = Any


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt in the body, as Ctrl-C does, so that unfinished work is undone.

    A signal that is ignored stays ignored: `nohup` relies on it. Without a handler, the first process of a container
    would not even end on SIGTERM.
    """
    with _handled(_TOLD, lambda now: now if now == signal.SIG_IGN else signal.default_int_handler):
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore these signals and Ctrl-C in the body, for a rollback or for the last step of a successful change."""
    with _handled((signal.SIGINT, *_TOLD), lambda _: signal.SIG_IGN):
        yield


def ignore_signals() -> None:
    """Ignore these signals and Ctrl-C from now on.

    They would replace the exit code while Python ends, which takes a tenth of a second once gRPC is loaded.
    """
    for number in (signal.SIGINT, *_TOLD):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Callable[[_Handler], _Handler]) -> Iterator[None]:
    """Replace signal handlers for the body; a no-op outside of the main thread, which alone receives signals."""
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
