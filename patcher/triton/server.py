"""Runs a Triton server on this machine: starts it, watches it, and stops it with the process that started it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import signal
import subprocess
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.arguments import listed, require
from patcher.errors import InputError, ServerError
from patcher.storage import is_url
from patcher.telemetry import turn_off
from patcher.triton import over_http, regions, server_log
from patcher.triton.client import TritonServer, admin_headers
from patcher.triton.installation import find_installation
from patcher.triton.kept_key import KeptKey, state_folder
from patcher.triton.prepared import make_private
from patcher.triton.process import (
    accepts,
    address,
    await_ports,
    check_paths,
    check_ports,
    free_ports,
    has_gpu,
    hide_argument,
    loopback,
    reachable,
    start_with_parent,
)
from patcher.triton.watching import watch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from patcher.triton.installation import Installation
    from patcher.triton.tls import ClientTls, ServerTls

__all__ = ["START_SECONDS", "EmbeddedTriton"]

START_SECONDS = 120.0
"""A start fails once the server's log has had nothing new for this long."""
_POLL_SECONDS = 0.02
_PORT_TRIES = 3
_KEY_VARIABLE = "PATCHER_ADMIN_KEY"
_PYTHON_BACKENDS = ("python", "onnxruntime")
# For administrators only: model control can run code, the trace and log settings can write files, and whoever registers
# shared memory can have answers written over the regions of the server's own processes.
_RESTRICTED = "model-repository,shared-memory,trace,logging"
# Triton's HTTP does not support TLS, and deeply nested JSON crashes the server, even without a key. If gRPC uses TLS,
# HTTP listens on loopback only; there, and where others can reach it, all but health checks need a key.
_ALL_BUT_HEALTH = "inference,metadata,model-config,model-repository,statistics,shared-memory,trace,logging"


class EmbeddedTriton:
    """A tritonserver that serves ``models`` of ``repository``, from :meth:`start` until :meth:`stop`.

    ``repository`` is a folder, or the URL of an object store in tritonserver's notation. The server finds the
    credentials in the environment, as this process does; ``environment`` adds variables that this process lacks.

    Model control is explicit: the server loads ``models`` (an ensemble with its steps), and anything else only on
    request. It listens on ``host`` only; a port of 0 means a free one. It logs to ``log_file``, by default in the
    user's state folder; the previous log is kept with ``.1`` appended to its name. ``exit_timeout`` is the number of
    seconds that :meth:`stop` gives requests in flight to finish. If the process that started the server dies, for
    whatever reason, the server is told to stop, too.

    ``admin_key`` restricts model control, shared memory, and trace and log settings to clients that send the key, over
    gRPC and HTTP. The server accepts the key on its command line only (not in a file or an environment variable), which
    other users of the machine can list. So the key is written directly into the memory of the server before it runs.
    If the system does not let a parent trace its child, the key is listed for some tenths of a second
    (``key_was_listed``) and then overwritten, once the server has read it. If the system does not let a parent write
    its child's memory either, the key stays listed (``key_hidden`` is False). Where that matters, do not share the
    machine, or mount /proc with hidepid=2.

    Without ``admin_key`` the server gets a generated key. While it runs, the key is in ``key_file``, which nobody else
    can read; :meth:`client` uses it, and so does every :class:`TritonServer` of the same user, or of root, on this
    machine. With ``open_control`` gRPC requires no key: every user of the machine can then load models, which runs code
    as the user who started the server. HTTP still requires one, since any web page that a browser on this machine shows
    can post to loopback.

    On a ``host`` that others can reach, HTTP answers only health checks without the key, since a single request with
    nested JSON crashes the server (Triton parses it without a depth limit). ``http`` opens the rest of HTTP there, too
    (not with TLS).

    ``tls`` encrypts gRPC; with a client CA, only clients whose certificate it signed are admitted. Triton does not
    support TLS for HTTP and metrics, so both then listen on loopback only (``metrics_host`` moves the metrics), and
    HTTP answers only health checks without the key; with ``open_control``, nobody knows that key.

    With ``encoder_runs_backbone`` an encoder runs its backbone in its own process, which saves a round trip through
    Triton. That needs a repository in a folder and a backbone on a CPU or on the only GPU; otherwise the encoder asks
    Triton, as it does on servers that were started without patcher.

    ``onnxruntime_backend`` is a folder with Triton's C++ backend, to be used instead of the Python-based one (see
    :func:`~patcher.triton.installation.find_installation`).

    Raises InputError for a ``host`` that others can reach without an ``admin_key``, a key that cannot be sent in a
    header or on Triton's command line, a key together with ``open_control``, ``http`` together with ``tls``, or a
    number that no port has.
    """

    def __init__(
        self,
        repository: Path | str,
        models: Sequence[str],
        *,
        host: str = "127.0.0.1",
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        admin_key: str | None = None,
        open_control: bool = False,
        tls: ServerTls | None = None,
        metrics_host: str | None = None,
        http: bool = False,
        log_file: Path | str | None = None,
        exit_timeout: int = 30,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        encoder_runs_backbone: bool = True,
        onnxruntime_backend: Path | str | None = None,
    ) -> None:
        require(str, os.PathLike, repository=repository)
        require(str, host=host)
        require(str, None, metrics_host=metrics_host)
        check_ports(grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port)
        require(int, exit_timeout=exit_timeout)
        require(bool, open_control=open_control, http=http, encoder_runs_backbone=encoder_runs_backbone)
        models = listed(models, "models")
        self.host = address(host)
        local = ipaddress.ip_address(self.host).is_loopback
        _check_access(host, admin_key, local=local, open_control=open_control)
        if http and tls:
            raise InputError(
                "Triton's HTTP does not support TLS, beside which it only answers health checks on loopback; "
                "leave out --http (http=True), or TLS"
            )
        self.tls = tls
        self.http_host = loopback(self.host) if tls else self.host
        self.http = not tls and (local or http)
        self.metrics_host = address(metrics_host) if metrics_host else self.http_host
        self.repository = str(repository) if is_url(repository) else Path(repository).resolve()
        self.models = tuple(models)
        self.exit_timeout = exit_timeout
        self.log_file = None if log_file is None else Path(log_file)
        self._wanted_ports = (grpc_port, http_port, metrics_port)
        self.grpc_port, self.http_port, self.metrics_port = self._wanted_ports
        self._kept = KeptKey() if admin_key is None and not open_control else None
        self._admin_key = admin_key
        self._options = tuple(options)
        self._environment = dict(environment or {})
        # Triton copies each model from an object store to a separate folder in /tmp, where anybody can create others.
        self.encoder_runs_backbone = encoder_runs_backbone and not is_url(repository)
        self.onnxruntime_backend = onnxruntime_backend
        self._process: subprocess.Popen[bytes] | None = None
        self._http_key = admin_key or secrets.token_hex(32)
        self.key_was_listed = self.key_hidden = False
        self._shared_memory = f"patcher_{os.getpid()}_{secrets.token_hex(4)}_"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The gRPC address, HOST:PORT."""
        return f"{reachable(self.host)}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """The HTTP address, HOST:PORT."""
        return f"{reachable(self.http_host)}:{self.http_port}"

    @property
    def metrics_url(self) -> str:
        """The address of the metrics, HOST:PORT."""
        return f"{reachable(self.metrics_host)}:{self.metrics_port}"

    @property
    def pid(self) -> int | None:
        """The process id of the server; None if it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def key_file(self) -> Path | None:
        """The file with the generated key; None if no key was generated."""
        return self._kept.path if self._kept else None

    def client(self, timeout: float = 60.0, tls: ClientTls | None = None) -> TritonServer:
        """A client that may control models; ``tls`` is required if the server uses TLS."""
        return TritonServer(self.url, admin_key=self._admin_key, timeout=timeout, tls=tls)

    def start(self, timeout: float = START_SECONDS) -> Self:
        """Start the server and wait until every model answers, for as long as it makes progress.

        It fails once the log has had nothing new for ``timeout`` seconds. Thousands of models take long to load, but
        the log names each one that is loaded.

        Raises
        ------
        ToolError
            if tritonserver, or something that it needs, is not installed.
        ServerError
            if the server does not become ready; the message quotes its log.
        InputError
            if a port is taken, the log or the generated key cannot be written, or Triton cannot bear a path.
        """
        if self.pid:
            return self
        for attempt in range(_PORT_TRIES):
            try:
                if self._kept:
                    self._admin_key = self._http_key = self._kept.write()
                self._launch()
                self.wait_ready(timeout)
                if self._kept:  # not earlier: until then the address may be another server's
                    self._kept.show(self.url)
            except ServerError as error:
                self.stop()
                # Somebody may take a free port between our look and the server's.
                if 0 not in self._wanted_ports or "already in use" not in str(error) or attempt == _PORT_TRIES - 1:
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                break
        return self

    def await_ports(self, seconds: float, say: Callable[[str], object]) -> None:
        """Wait for ports that are taken, at most ``seconds``: the server of a killed process takes a while to end."""
        await_ports((self.host, self.http_host, self.metrics_host), self._wanted_ports, seconds, say)

    def wait_ready(self, timeout: float) -> None:
        """Wait until every model answers; ServerError, which quotes the log, if that does not happen.

        The ``timeout``, in seconds, starts anew whenever the log grows.
        """
        require(float, timeout=timeout)
        told, deadline = server_log.size(self.log_file), time.monotonic() + timeout
        addresses = [url.rsplit(":", 1) for url in (self.url, self.http_url, self.metrics_url)]
        with self.client(timeout=5.0) as client:

            def ready(model: str = "") -> bool:
                # With TLS the server may require a client certificate; health over HTTP is open on loopback.
                if self.tls:
                    return over_http.says(self.http_url, f"models/{model}/ready" if model else "health/live")
                return client.is_ready(model) if model else client.is_live()

            # HTTP and metrics start a little later than gRPC.
            while not (
                ready() and all(map(ready, self.models)) and all(accepts(host, int(port)) for host, port in addresses)
            ):
                if self._process is None or self._process.poll() is not None:
                    code = "none" if self._process is None else self._process.returncode
                    raise ServerError(
                        f"tritonserver ended with exit code {code} before it was ready.{self._log_says()}"
                    )
                if (size := server_log.size(self.log_file)) != told:
                    told, deadline = size, time.monotonic() + timeout
                if time.monotonic() > deadline:
                    waiting = [model for model in self.models if not (ready() and ready(model))]
                    raise ServerError(
                        f"tritonserver was not ready after {timeout:g} s, waiting for {', '.join(waiting) or 'HTTP'}, "
                        "without a new word in its log (a model that takes longer to load wants a longer "
                        f"--start-timeout (timeout=...)).{self._log_says()}"
                    )
                time.sleep(_POLL_SECONDS)

    def stop(self) -> int | None:
        """Stop the server after requests in flight have finished; return its exit code, or None if it did not run."""
        if self._kept:
            self._kept.remove()
        process = self._process
        if process is None:
            return None
        try:
            over_http.drain(self.http_url, self._http_key, self.models, self.exit_timeout)
            process.terminate()
            process.wait(self.exit_timeout + 10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        except KeyboardInterrupt:  # Ctrl-C while stopping: do not wait any longer
            process.kill()
            process.wait()
            raise
        finally:
            self._process = None
        # If the server was killed, its stubs still run, in its process group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        regions.free(self._shared_memory)
        return process.returncode

    def wait(self) -> None:
        """Wait while the server runs; ServerError, which quotes its log, when it ends by itself.

        A server that hangs, or one of whose Python processes died, is killed (see :mod:`~patcher.triton.watching`).
        """
        if self._process is not None:
            watch(self._process, lambda: over_http.says(self.http_url, "health/live"), self.log_file)

    @cached_property
    def installation(self) -> Installation:
        """The tritonserver to start; ToolError or InputError if there is none."""
        return find_installation(self.onnxruntime_backend)

    def command(self) -> list[str]:
        """The command line of the server, without the key."""
        installation = self.installation
        check_paths(self.repository, installation.backends)
        bracketed = f"[{self.host}]" if ":" in self.host else self.host
        command = [
            str(installation.binary),
            f"--model-repository={self.repository}",
            f"--backend-directory={installation.backends}",
            f"--cache-directory={installation.caches}",
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in self.models),
            f"--grpc-address={bracketed}",
            *(
                f"--{service}-address={'ipv6:' * (':' in host)}{host}"
                for service, host in (("http", self.http_host), ("metrics", self.metrics_host))
            ),
            f"--grpc-port={self.grpc_port}",
            f"--http-port={self.http_port}",
            f"--metrics-port={self.metrics_port}",
            "--strict-readiness=false",  # with true, every swap and every refused load turns the server unready
            "--disable-auto-complete-config",  # they are complete; completing them takes a process per load
            f"--exit-timeout-secs={self.exit_timeout}",
            *(f"--backend-config={name},shm-region-prefix-name={self._shared_memory}" for name in _PYTHON_BACKENDS),
        ]
        if not has_gpu():
            command.append("--allow-gpu-metrics=false")
        return [*command, *(self.tls.options() if self.tls else ()), *self._options]

    def _launch(self) -> None:
        from patcher.triton.tokenizer.model import BACKEND  # imported here, since it imports tokenizers

        hosts = (self.host, self.http_host, self.metrics_host)
        self.grpc_port, self.http_port, self.metrics_port = free_ports(hosts, self._wanted_ports)
        if self.log_file is None:
            folder = state_folder()
            make_private(folder)  # earlier versions created it readable for all
            server_log.remove_old(folder, "triton-*.log*")
            self.log_file = folder / f"triton-{self.grpc_port}.log"
        command = self.command()
        if self._admin_key is not None:
            command.append(f"--grpc-restricted-protocol={_RESTRICTED}:admin-key={self._admin_key}")
        closed = _RESTRICTED if self.http else _ALL_BUT_HEALTH
        command.append(f"--http-restricted-api={closed}:admin-key={self._http_key}")
        installation = self.installation
        runs = str(installation.backends / "onnxruntime" / "model.py") if self.encoder_runs_backbone else ""
        turn_off()
        environment = {**self._environment, **os.environ, **installation.environment, BACKEND: runs}
        environment.pop(_KEY_VARIABLE, None)  # for clients only: models in the server do not need it
        with server_log.open_log(self.log_file) as log, regions.mine(self._shared_memory) as mark:
            kept = [mark.fileno(), *installation.kept]
            self._process, hidden = start_with_parent(command, environment, log.fileno(), kept, self._http_key)
        self.key_was_listed = not hidden
        self.key_hidden = hidden or hide_argument(self._process, installation.binary, self._http_key.encode())

    def _log_says(self) -> str:
        return server_log.last_words(self.log_file)


def _check_access(host: str, admin_key: str | None, *, local: bool, open_control: bool) -> None:
    """Raise InputError for a key that cannot be sent, or if model control would have two rules or none at all."""
    admin_headers(admin_key)
    if admin_key is not None and not re.fullmatch(r"[\w.~+/-]+", admin_key, re.ASCII):
        raise InputError(
            "the admin key may hold letters, digits and . _ ~ + / - only: Triton's options split at others"
        )
    if admin_key is not None and open_control:
        raise InputError(
            "got an admin key (--admin-key-file FILE or $PATCHER_ADMIN_KEY, admin_key=...) and --no-admin-key "
            "(open_control=True); leave out one of them"
        )
    if admin_key is None and not local:
        raise InputError(
            f"{host} can be reached by others, who could load models and so run code; "
            "pass an admin key (--admin-key-file FILE or $PATCHER_ADMIN_KEY, admin_key=...), or listen on 127.0.0.1"
        )
