"""What messages have in common: how a share is written, and how to install what is missing."""

from __future__ import annotations

__all__ = ["install_hint", "percent", "plural"]


def install_hint(extra: str = "") -> str:
    """How to install an extra of ``pyproject.toml``, or patcher itself: neither is in a package index."""
    return f"pip install '.{f'[{extra}]' if extra else ''}' in the folder of patcher's clone"


def percent(share: float | None, digits: int = 2) -> str:
    """``0.0123`` as ``1.23 %``; an em dash for None."""
    return "—" if share is None else f"{100 * share:.{digits}f} %"


def plural(count: int, noun: str) -> str:
    """``1 example``, ``1,200 examples``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
