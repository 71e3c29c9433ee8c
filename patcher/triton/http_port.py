"""Detect whether an address that does not speak gRPC is Triton's HTTP or metrics port, easily given by mistake."""

from __future__ import annotations

import http.client

__all__ = ["http_service"]

_SECONDS = 3.0
_READ = 1 << 16


def http_service(host: str, port: int) -> str | None:
    """What a Triton server offers there over plain HTTP, ``HTTP`` or ``metrics``; None if no server answers."""
    try:
        said = _get(host, port, "/v2")  # the status alone proves nothing: the metrics port always answers 200
        if b'"extensions"' in said or b"expecting header 'admin-key'" in said:
            return "HTTP"
        return "metrics" if b"# HELP nv_" in _get(host, port, "/metrics") else None
    except (OSError, http.client.HTTPException):
        return None


def _get(host: str, port: int, path: str) -> bytes:
    """The start of the answer to a GET request."""
    connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().read(_READ)
    finally:
        connection.close()
