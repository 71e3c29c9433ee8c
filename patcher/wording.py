"""Formatting for messages: shares, counts and lists, and the redaction of logins."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "count_and_some",
    "cut",
    "install_hint",
    "listing",
    "percent",
    "plural",
    "redacted",
    "repeats",
    "versions_are",
]

_LOGIN = re.compile(r"(?<=[A-Za-z0-9+.-]://)[^\s'\"/]*@")
"""The login in front of a URL's host."""
_PIECE = re.compile(r"[^\s'\"?#]+")
"""A URL up to its query. A key may contain a slash, so everything up to the last ``@`` counts as the login."""

_ALL = 1.0 - 1e-9
_HUNDRED = 100

NAMED = 5
"""The number of names that a message lists; nobody would read a thousand."""


def plural(count: int, noun: str) -> str:
    """``1 example``, ``1,200 examples``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def install_hint(extra: str = "") -> str:
    """How to install an extra of ``pyproject.toml``, or patcher itself; patcher is in no package index."""
    return f"pip install '.{f'[{extra}]' if extra else ''}' in the folder of patcher's clone"


def listing(names: Iterable[str], most: int = NAMED) -> str:
    """The first ``most`` names, separated by commas, and ``…`` if there are more."""
    names = tuple(names)
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def count_and_some(names: Iterable[str], noun: str = "") -> str:
    """All names if they are few; else their number, with a ``noun``, and a few: ``4,950 labels (a, b, c, d, e …)``."""
    names = tuple(names)
    many = plural(len(names), noun) if noun else f"{len(names):,}"
    return listing(names) if len(names) <= NAMED else f"{many} ({listing(names)})"


def percent(share: float | None, digits: int = 2, *, up: bool = False, down: bool = False) -> str:
    """``0.0123`` as ``1.23 %``; an em dash for None. Bounds are rounded ``up`` or ``down``.

    A share of less than all is 100 % only if it is rounded ``up``.
    """
    if share is None:
        return "—"
    # In decimal: 100 times a float such as 0.07 is a little more than 7, which would be rounded up to 7.01.
    exact = Decimal(repr(float(share))).scaleb(2)
    # Nearly all is not all, unless what is missing is rounding in a mean.
    down = down or (share < _ALL and not up and round(100 * float(share), digits) == _HUNDRED)
    way = ROUND_CEILING if up else ROUND_FLOOR
    shown = exact.quantize(Decimal(1).scaleb(-digits), way) if up or down else 100 * share
    return f"{shown:.{digits}f} %"


def repeats(count: int) -> str:
    """The message about texts that were left out because another text of their label has the same words."""
    return f"{plural(count, 'text')} left out as duplicates (the same words of the same label count once)"


def cut(count: int, texts: int, limit: int) -> str:
    """The message about texts that the backbone does not read to their end."""
    are = "is" if count == 1 else "are"
    return f"{count:,} of {plural(texts, 'text')} {are} longer than {limit:,} tokens; what exceeds that does not count"


def versions_are(versions: Sequence[int]) -> str:
    """``version 2 is``, ``versions 2, 3 are``."""
    numbers = ", ".join(map(str, versions))
    return f"version {numbers} is" if len(versions) == 1 else f"versions {numbers} are"


def redacted(message: str) -> str:
    """A message without the logins (passwords, keys) in its URLs, for terminals, logs and the audit log."""
    return _PIECE.sub(_without_login, _LOGIN.sub("…@", message)) if "@" in message else message


def _without_login(piece: re.Match[str]) -> str:
    # Not a regular expression: none does this in linear time, and messages may quote long texts.
    before, slashes, login = piece[0].partition("://")
    return f"{before}{slashes}…{login[login.rfind('@') :]}" if before and "@" in login else piece[0]
