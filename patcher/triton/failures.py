"""Turn gRPC's status and message of a failed call into one of our errors, which says what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher.errors import ControlRefused, ServerError, ServerRefused, ServerUnreachable, TlsError, WrongPort
from patcher.triton.http_port import http_service
from patcher.triton.tls import handshake_problem, speaks_tls

if TYPE_CHECKING:
    from patcher.triton.tls import ClientTls

__all__ = ["Address"]

_REFUSALS = frozenset(
    ["INVALID_ARGUMENT", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"]
)


@dataclass(frozen=True)
class Address:
    """A server's gRPC address: its ``url``, made of ``host`` and ``port``, and the TLS settings, if any."""

    url: str
    host: str
    port: int
    tls: ClientTls | None

    def failure(self, what: str, error: Any, seconds: float, *, keyed: bool) -> ServerError:
        """The error to raise after gRPC raised ``error`` for a call with a timeout of ``seconds``.

        ``what`` is a verb phrase for what the server was asked to do; ``keyed`` tells whether an admin key was sent.
        """
        status = (error.status() or "").removeprefix("StatusCode.")
        message = " ".join((error.message() or "no reason given").split())
        if problem := _control_problem(message, keyed=keyed):
            return ControlRefused(f"{self.url} {problem}")
        if status == "DEADLINE_EXCEEDED":
            return ServerUnreachable(
                f"{self.url} did not {what} within {seconds:g} s: is it hanging, overloaded, or no gRPC port? "
                "`patcher doctor` asks again"
            )
        if status == "UNAVAILABLE" and "unknown model" not in message:
            return self._unreachable(message)
        if status == "NOT_FOUND" or "unknown model" in message:
            gone = "it is stopping, or has unloaded it: " if "has no available versions" in message else ""
            return ServerRefused(f"{self.url} could not {what}: {gone}{message}; `patcher doctor` says what it serves")
        if status in _REFUSALS:
            return ServerRefused(f"{self.url} refused to {what}: {message}")
        return ServerError(f"{self.url} failed to {what}: {message} ({status or 'no status'})")

    def _unreachable(self, message: str) -> ServerUnreachable:
        if problem := self._tls_problem():
            return TlsError(f"the server at {self.url} {problem}")
        if self.tls is None and (service := http_service(self.host, self.port)):
            return WrongPort(
                f"{self.url} is the {service} port of a server; expected its gRPC port, which is 8001 by default"
            )
        return ServerUnreachable(
            f"no Triton server answers at {self.url} (gRPC: {message}); `patcher serve` starts one, "
            "--url or $TRITON_URL (TritonServer(url)) names another"
        )

    def _tls_problem(self) -> str | None:
        if self.tls is not None:
            return handshake_problem(self.host, self.port, self.tls)
        if speaks_tls(self.host, self.port):
            return (
                "accepts only TLS; pass --tls-ca FILE or $PATCHER_TLS_CA (tls=ClientTls(...)), with the CA that signed "
                "its certificate"
            )
        return None


def _control_problem(message: str, *, keyed: bool) -> str | None:
    if "protocol is restricted" in message:
        got = "the wrong admin key" if keyed else "no admin key"
        return (
            f"restricts model control and got {got}; give its key with --admin-key-file FILE or $PATCHER_ADMIN_KEY, "
            "admin_key=... (one that `patcher serve` made is in the file that it named at its start, for the user who "
            "started it)"
        )
    if "explicit model load / unload is not allowed" in message:
        return (
            "does not allow model control: it runs with --model-control-mode=none or poll; start it with "
            "--model-control-mode=explicit, as `patcher serve` does"
        )
    return None
