"""Handle termination signals like Ctrl-C, and protect steps that they must not interrupt."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

__all__ = ["ignore_signals", "interruptible", "late_signals", "uninterrupted"]

_TOLD = (signal.SIGTERM, signal.SIGHUP)
"""SIGTERM comes from `docker stop`, systemd or a timeout; SIGHUP from a closed terminal or a lost connection."""
_Handler = Any
_late: list[int] = []
"""Signals that were put off, to be raised again."""
_depth = 0
"""How many bodies of ``late_signals`` the main thread is in."""


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
    """Let neither these signals nor Ctrl-C act in the body: a rollback, or the last step of a successful change.

    One that would only raise KeyboardInterrupt is dropped, for what is done must not be reported as undone. One for
    which the process has another handler, or that would end it, arrives later: see ``late_signals``.
    """
    with late_signals(), _without_wakeups(), _handled((signal.SIGINT, *_TOLD), _put_off):
        yield


@contextlib.contextmanager
def late_signals() -> Iterator[None]:
    """When the outermost such body has ended, raise again the signals that ``uninterrupted`` put off in it, each once.

    The repository's lock is held in such a body: a handler may raise, and amid a change that would leave it unfinished.
    """
    global _depth  # noqa: PLW0603  signals belong to the process, and only its main thread gets here
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            late = list(dict.fromkeys(_late))
            _late.clear()
            with contextlib.ExitStack() as raised:  # all of them, even if the handler of one raises an error
                for number in reversed(late):
                    raised.callback(signal.raise_signal, number)


def _put_off(now: _Handler) -> _Handler:
    # None is a handler that was not set from Python and could not be set again.
    return signal.SIG_IGN if now in (None, signal.SIG_IGN, signal.default_int_handler) else _keep


def _keep(number: int, _: FrameType | None) -> None:
    _late.append(number)


@contextlib.contextmanager
def _without_wakeups() -> Iterator[None]:
    """Wake no event loop in the body: asyncio would handle a signal at once, and again when it is raised later."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    descriptor = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)  # as asyncio sets it


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
