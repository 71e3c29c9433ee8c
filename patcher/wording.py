"""What messages have in common: how a share is written, and how to install what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["counted", "few", "install_hint", "percent"]


def counted(number: int, what: str) -> str:
    """``1 version``, ``2 versions``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def few(names: Sequence[str], most: int) -> str:
    """The names, or the first of them and a mark that there are more."""
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def install_hint(extra: str = "") -> str:
    """How to install an extra of ``pyproject.toml``, or patcher itself: neither is in a package index."""
    return f"pip install '.{f'[{extra}]' if extra else ''}' in the folder of patcher's clone"


def percent(share: float | None, digits: int = 2) -> str:
    """``0.0123`` as ``1.23 %``; an em dash for None."""
    return "—" if share is None else f"{100 * share:.{digits}f} %"
