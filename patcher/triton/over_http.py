"""What a server is asked over its HTTP by the process that started it: whether it is up, and to turn requests away."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["drain", "says"]

_POLL_SECONDS = 0.02
_DRAIN_SECONDS = 2.0
"""What a server that is to stop may take to answer: one that hangs is not waited for."""


def says(address: str, what: str) -> bool:
    """Whether the server at ``address`` says yes to ``what``: ``health/live``, ``models/NAME/ready``."""
    try:
        with _no_proxy().open(f"http://{address}/v2/{what}", timeout=5.0):
            return True
    except (OSError, urllib.error.HTTPError):
        return False


def drain(address: str, key: str, models: Sequence[str], seconds: float) -> None:
    """Turn new requests away, and let those in flight finish while an encoder may still ask its backbone.

    A server that was told to stop lets ensembles go on, but refuses what one model asks of another.
    """
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):  # it is gone, or hangs
        for model in models:
            if not model.endswith("_backbone"):  # which is still asked
                _control(address, key, f"models/{model}/unload")
        while time.monotonic() < deadline:
            states = {each.get("state") for each in json.loads(_control(address, key, "index"))}
            if "UNLOADING" not in states:
                return
            time.sleep(_POLL_SECONDS)


def _control(address: str, key: str, what: str) -> bytes:
    """Ask the server's model control by HTTP, which takes the key beside TLS, too."""
    request = urllib.request.Request(f"http://{address}/v2/repository/{what}", b"{}", {"admin-key": key})
    with _no_proxy().open(request, timeout=_DRAIN_SECONDS) as answer:
        data: bytes = answer.read()
    return data


def _no_proxy() -> urllib.request.OpenerDirector:
    # A proxy from the environment would be asked for this very machine, too.
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
