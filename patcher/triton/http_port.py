"""Whether an address that speaks no gRPC is that of Triton's HTTP service: a port that is easily given by mistake."""

from __future__ import annotations

import http.client

__all__ = ["serves_http"]

_SECONDS = 3.0


def serves_http(host: str, port: int) -> bool:
    """Whether a Triton server answers there by plain HTTP."""
    connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    try:
        connection.request("GET", "/v2")
        said = connection.getresponse().read()  # the metrics' port says 200 to anything
        return b'"extensions"' in said or b"expecting header 'admin-key'" in said
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
