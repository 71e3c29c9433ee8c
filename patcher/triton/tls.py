"""TLS between client and server: the files each side needs, checks that they can work, and why a handshake failed.

gRPC says little about a failed handshake, so Python's own ssl module repeats it to find the reason.
"""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.arguments import require
from patcher.errors import InputError

if TYPE_CHECKING:
    from typing import TypeAlias

    File: TypeAlias = str | os.PathLike[str]

__all__ = ["ClientTls", "ServerTls", "handshake_problem", "speaks_tls"]

_SECONDS = 3.0


@dataclass(frozen=True)
class ClientTls:
    """A client's TLS settings: ``ca`` is the CA that must have signed the server's certificate.

    ``certificate`` and ``key`` (both or neither) are the client's own, for servers that require them (mutual TLS).
    ``server_name`` is the name expected in the server's certificate if it differs from the host of the address, as for
    individual replicas behind one DNS name. All files are PEM. Raises InputError for files that cannot work.
    """

    ca: File
    certificate: File | None = None
    key: File | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InputError(
                "client certificates need both --tls-cert and --tls-key (certificate=..., key=...); got one"
            )
        _check_ca(self.ca, "--tls-ca (ca=...)")
        if self.certificate and self.key:
            _check_pair(self.certificate, self.key, "client")


@dataclass(frozen=True)
class ServerTls:
    """A server's TLS settings: its ``certificate`` (with the chain) and ``key``, PEM.

    With ``client_ca``, only clients with a certificate signed by that CA are accepted. Raises InputError for files that
    cannot work, including an expired certificate.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        _check_pair(self.certificate, self.key, "server")
        if self.client_ca:
            _check_ca(self.client_ca, "--tls-client-ca (client_ca=...)")

    def options(self) -> list[str]:
        """Triton's command-line options for gRPC."""
        options = [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={self.certificate.resolve()}",
            f"--grpc-server-key={self.key.resolve()}",
        ]
        if self.client_ca:
            options += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.client_ca.resolve()}"]
        return options


def handshake_problem(host: str, port: int, tls: ClientTls) -> str | None:
    """Why a TLS handshake with the server there fails, and what to do; None if it succeeds or nobody answers."""
    context = _client_context(tls.ca)
    if tls.certificate and tls.key:
        context.load_cert_chain(tls.certificate, tls.key)
    name = tls.server_name or host
    try:
        with (
            socket.create_connection((host, port), _SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=name) as wrapped,
        ):
            # In TLS 1.3 the server checks our certificate after our side has finished, so a refusal shows when reading.
            if not wrapped.recv(1):  # to refuse, gRPC just closes the connection; else it sends its HTTP/2 settings
                return _hung_up(tls)
    except ssl.SSLCertVerificationError as error:
        return _unverified(error, name, tls.ca)
    except ssl.SSLError as error:
        return _refused(error, tls)
    except ConnectionResetError:
        return _hung_up(tls)
    except OSError:
        return None
    return None


def speaks_tls(host: str, port: int) -> bool:
    """Whether the server there completes a TLS handshake at all; its certificate is not verified."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host, port), _SECONDS) as raw, context.wrap_socket(raw):
            return True
    except (OSError, ValueError):
        return False


def _client_context(ca: File) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    context.set_alpn_protocols(["h2"])
    # As in gRPC, a certificate in the file is trusted as it is, whoever signed it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _unverified(error: ssl.SSLCertVerificationError, name: str, ca: File) -> str:
    said = error.verify_message
    if "expired" in said:
        return "shows a certificate that has expired; its administrator must renew it"
    if "not yet valid" in said:
        return "shows a certificate that is not valid yet; are the clocks on both sides correct?"
    if "mismatch" in said.lower():
        return (
            f"shows a certificate for another name than {name!r} ({said}); --tls-server-name NAME (server_name=...) "
            "expects another"
        )
    return f"shows a certificate that {ca} did not sign ({said}); pass the CA that did with --tls-ca (ca=...)"


def _hung_up(tls: ClientTls) -> str:
    if tls.certificate is None:
        return (
            "asks for the client's own certificate (mutual TLS); give --tls-cert FILE and --tls-key FILE "
            "(certificate=..., key=...)"
        )
    return f"does not trust the certificate {tls.certificate}; expected one signed by its --tls-client-ca (client_ca)"


def _refused(error: ssl.SSLError, tls: ClientTls) -> str:
    reason = (error.reason or str(error)).upper()
    if any(word in reason for word in ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE", "UNKNOWN_CA", "BAD_CERTIFICATE")):
        return _hung_up(tls)
    if "CERTIFICATE_EXPIRED" in reason:
        return f"refuses the certificate {tls.certificate}: it has expired"
    if any(word in reason for word in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_EOF")):
        return "does not speak TLS; leave --tls-ca out (tls=None), or start the server with --tls-cert and --tls-key"
    return f"does not agree on TLS ({error.reason or error})"


def _check_ca(path: File, option: str) -> None:
    _check_readable(path, option)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise InputError(f"{option} {path} holds no certificate; expected PEM (BEGIN CERTIFICATE)") from error


def _check_pair(certificate: File, key: File, side: str) -> None:
    _check_readable(certificate, "--tls-cert (certificate=...)")
    _check_readable(key, "--tls-key (key=...)")

    def locked() -> str:
        raise InputError(
            f"the key {key} is encrypted, which the server could not read; expected one without a password"
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_cert_chain(certificate, key, password=locked)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InputError(f"the key {key} does not belong to the certificate {certificate}") from error
        raise InputError(f"cannot use {certificate} with {key}; expected a PEM certificate and its PEM key") from error
    said = _validity(certificate, key)
    if "expired" in said or "not yet valid" in said:
        raise InputError(f"the {side}'s certificate {certificate}: {said}; expected one that is valid now")


def _validity(certificate: File, key: File) -> str:
    """OpenSSL's verification error for a certificate on its own, ignoring its purpose; empty if there is none.

    The certificate is verified in a handshake with itself, since the standard library offers no other way.
    """
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), _client_context(certificate)
    server.load_cert_chain(certificate, key)
    client.check_hostname = False
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return error.verify_message
            except ssl.SSLError:
                return ""
    return ""


def _check_readable(path: File, option: str) -> None:
    require(str, os.PathLike, **{option: path})
    try:
        Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {option} {path}: {error.strerror or error}") from error
