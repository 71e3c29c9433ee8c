"""What messages have in common: how shares, counts and lists are written, and what is left out of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["install_hint", "listing", "percent", "plural", "redacted", "repeats", "versions_are"]

_LOGIN = re.compile(r"(?<=[A-Za-z0-9+.-]://)[^\s'\"/]*@")
"""What stands before a host: who a URL logs in as."""
_PIECE = re.compile(r"[^\s'\"?#]+")
"""As far as a URL goes before its query. A key may hold a slash, so all of it up to the last ``@`` is the login."""

NAMED = 5
"""This many names tell what is meant; a message with all of a thousand would not be read."""


def plural(count: int, noun: str) -> str:
    """``1 example``, ``1,200 examples``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def install_hint(extra: str = "") -> str:
    """How to install an extra of ``pyproject.toml``, or patcher itself: neither is in a package index."""
    return f"pip install '.{f'[{extra}]' if extra else ''}' in the folder of patcher's clone"


def listing(names: Iterable[str], most: int = NAMED) -> str:
    """The first names, with commas, and ``…`` behind them where there are more."""
    names = tuple(names)
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def percent(share: float | None, digits: int = 2) -> str:
    """``0.0123`` as ``1.23 %``; an em dash for None."""
    return "—" if share is None else f"{100 * share:.{digits}f} %"


def repeats(count: int) -> str:
    """What is said of texts of which another of their label has the same words."""
    return f"{plural(count, 'text')} left out as duplicates (the same words of the same label count once)"


def versions_are(versions: Sequence[int]) -> str:
    """``version 2 is``, ``versions 2, 3 are``."""
    numbers = ", ".join(map(str, versions))
    return f"version {numbers} is" if len(versions) == 1 else f"versions {numbers} are"


def redacted(message: str) -> str:
    """A message without the passwords and keys of the URLs in it, for terminals, logs and the audit."""
    return _PIECE.sub(_without_login, _LOGIN.sub("…@", message)) if "@" in message else message


def _without_login(piece: re.Match[str]) -> str:
    # No pattern does this in linear time, and messages may quote long texts.
    before, slashes, login = piece[0].partition("://")
    return f"{before}{slashes}…{login[login.rfind('@') :]}" if before and "@" in login else piece[0]
