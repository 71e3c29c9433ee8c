"""``patcher serve``."""

from __future__ import annotations

from pathlib import Path

import click

from patcher.cli.options import FILE, read_key, repo_option, warn_if_open
from patcher.cli.output import tell
from patcher.cli.values import Number, WholeNumber
from patcher.errors import InputError


@click.command("serve")
@repo_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--grpc-port", type=WholeNumber(0, 65535), default=8001, show_default=True, help="gRPC port; 0 picks a free one."
)
@click.option(
    "--http-port", type=WholeNumber(0, 65535), default=8000, show_default=True, help="HTTP port; 0 picks a free one."
)
@click.option(
    "--metrics-port",
    type=WholeNumber(0, 65535),
    default=8002,
    show_default=True,
    help="Metrics port; 0 picks a free one.",
)
@click.option(
    "--admin-key-file",
    "key_file",
    type=FILE,
    help="File with the admin key that model control will require; without one, a key is made for this run.  "
    "[env: PATCHER_ADMIN_KEY holds the key itself]",
)
@click.option(
    "--no-admin-key",
    "open_control",
    is_flag=True,
    help="Require no key over gRPC: every user of this machine may then load models, which runs code as you. For "
    "scripts that load models with another client and send no key.",
)
@click.option(
    "--tls-cert",
    type=FILE,
    envvar="PATCHER_SERVER_TLS_CERT",
    help="Use TLS for gRPC with this certificate; HTTP then only answers health checks on loopback.  "
    "[env: PATCHER_SERVER_TLS_CERT]",
)
@click.option(
    "--tls-key",
    type=FILE,
    envvar="PATCHER_SERVER_TLS_KEY",
    help="Private key of that certificate.  [env: PATCHER_SERVER_TLS_KEY]",
)
@click.option(
    "--tls-client-ca",
    type=FILE,
    envvar="PATCHER_SERVER_TLS_CLIENT_CA",
    help="Accept only clients whose certificate this CA signed.  [env: PATCHER_SERVER_TLS_CLIENT_CA]",
)
@click.option(
    "--metrics-host", help="Address for metrics, which do not support TLS.  [default: --host; with TLS, loopback]"
)
@click.option("--log-file", type=FILE, help="File for Triton's log.")
@click.option(
    "--start-timeout",
    type=Number(min=0, min_open=True),
    default=120,
    show_default=True,
    metavar="SECONDS",
    help="Give up if the server is not ready and its log shows nothing new for this many seconds. Each loaded model is "
    "logged, so only a single one that takes longer to load needs more.",
)
@click.option(
    "--http",
    is_flag=True,
    help="Let HTTP answer more than health checks even where others can reach the server. Anyone who reaches it can "
    "then end the server with one request, without a key: Triton reads nested JSON without a limit.",
)
@click.option(
    "--ask-backbone",
    is_flag=True,
    help="Make encoders call the backbone's own model (as on servers started by other means) instead of running the "
    "backbone in their own process.",
)
@click.option(
    "--onnxruntime-backend",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="PATCHER_SERVER_ONNXRUNTIME",
    help="Folder with Triton's C++ onnxruntime backend (libtriton_onnxruntime.so and the libonnxruntime.so that it "
    "needs), to use instead of the Python-based one that comes with patcher; a new version then needs no process of "
    "its own. Encoders still run a backbone of their own unless --ask-backbone is given.  "
    "[env: PATCHER_SERVER_ONNXRUNTIME, which `patcher tune` uses too]",
)
def serve_command(
    repo: Path | str,
    host: str,
    grpc_port: int,
    http_port: int,
    metrics_port: int,
    key_file: Path | None,
    open_control: bool,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    metrics_host: str | None,
    http: bool,
    log_file: Path | None,
    start_timeout: float,
    ask_backbone: bool,
    onnxruntime_backend: Path | None,
) -> None:
    """Run a Triton server for the repository's classifiers on this machine, until Ctrl-C, SIGTERM or SIGHUP.

    Model control is explicit: what is served changes only when a verb (or you) asks for it. By default the server
    listens on loopback; listening elsewhere requires an admin key, and should use TLS. On loopback without a given key,
    one is generated for this run and kept in a file that only you can read, while the server runs. Your patcher
    commands on this machine, and those of root, find it by themselves; for other clients, `patcher serve` prints where
    it is.
    """
    from patcher.repository import ModelRepository
    from patcher.serve import serve
    from patcher.triton.tls import ServerTls

    tls = None
    if tls_cert and tls_key:
        warn_if_open(tls_key)
        tls = ServerTls(tls_cert, tls_key, tls_client_ca)
    elif tls_cert or tls_key or tls_client_ca:
        raise InputError("TLS requires both --tls-cert FILE and --tls-key FILE; got only some of the TLS options")
    repository = ModelRepository(repo)
    serve(
        repository,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        admin_key=read_key(key_file),
        open_control=open_control,
        tls=tls,
        metrics_host=metrics_host,
        http=http,
        log_file=log_file,
        encoder_runs_backbone=not ask_backbone,
        onnxruntime_backend=onnxruntime_backend,
        start_timeout=start_timeout,
        say=tell,
    )
