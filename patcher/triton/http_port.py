"""Detect whether an address that does not speak gRPC is Triton's HTTP port, which is easily given by mistake."""

from __future__ import annotations

import http.client

__all__ = ["serves_http"]

_SECONDS = 3.0


def serves_http(host: str, port: int) -> bool:
    """Whether a Triton server answers there over plain HTTP."""
    connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    try:
        connection.request("GET", "/v2")
        said = connection.getresponse().read()  # the status alone proves nothing: the metrics port always answers 200
        return b'"extensions"' in said or b"expecting header 'admin-key'" in said
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
