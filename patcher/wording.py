"""What messages have in common: how a share is written, and how to install what is missing."""

from __future__ import annotations

import re

__all__ = ["install_hint", "percent", "redacted"]

_SECRET = re.compile(r"(//)[^\s'\"]*@")
"""What stands before a host: who a URL logs in as. A key may hold a slash, so all of it up to the last ``@``."""


def install_hint(extra: str = "") -> str:
    """How to install an extra of ``pyproject.toml``, or patcher itself: neither is in a package index."""
    return f"pip install '.{f'[{extra}]' if extra else ''}' in the folder of patcher's clone"


def percent(share: float | None, digits: int = 2) -> str:
    """``0.0123`` as ``1.23 %``; an em dash for None."""
    return "—" if share is None else f"{100 * share:.{digits}f} %"


def redacted(message: str) -> str:
    """A message without the passwords and keys of the URLs in it, for terminals, logs and the audit."""
    return _SECRET.sub(r"\1…@", message) if "@" in message else message
