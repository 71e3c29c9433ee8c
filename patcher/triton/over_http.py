"""HTTP requests to a server from the process that started it: health checks, and draining it before it stops."""

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
"""Timeout of each request while draining, so that a server that hangs does not delay its stop."""


def says(address: str, what: str) -> bool:
    """Whether the server at ``address`` confirms ``what``: ``health/live`` or ``models/NAME/ready``."""
    try:
        with _no_proxy().open(f"http://{address}/v2/{what}", timeout=5.0):
            return True
    except (OSError, urllib.error.HTTPError):
        return False


def drain(address: str, key: str, models: Sequence[str], seconds: float) -> None:
    """Refuse new requests, and let those in flight finish while encoders can still ask their backbones.

    Waits up to ``seconds``. A server that was told to stop lets ensembles finish, but refuses requests from one of its
    models to another.
    """
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):  # the server is gone, or hangs
        for model in models:
            if not model.endswith("_backbone"):  # encoders still need it
                _control(address, key, f"models/{model}/unload")
        while time.monotonic() < deadline:
            states = {each.get("state") for each in json.loads(_control(address, key, "index"))}
            if "UNLOADING" not in states:
                return
            time.sleep(_POLL_SECONDS)


def _control(address: str, key: str, what: str) -> bytes:
    """Send a request to model control over HTTP, which accepts the key even if gRPC uses TLS."""
    request = urllib.request.Request(f"http://{address}/v2/repository/{what}", b"{}", {"admin-key": key})
    with _no_proxy().open(request, timeout=_DRAIN_SECONDS) as answer:
        data: bytes = answer.read()
    return data


def _no_proxy() -> urllib.request.OpenerDirector:
    # A proxy set in the environment would be used even for this machine.
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
