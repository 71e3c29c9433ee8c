"""``patcher serve``."""

from __future__ import annotations

from pathlib import Path

import click

from patcher.cli.options import read_key, repo_option
from patcher.cli.output import tell


@click.command("serve")
@repo_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="0 picks a free one.")
@click.option("--http-port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), default=8002, show_default=True, help="0 picks a free one."
)
@click.option(
    "--admin-key-file",
    "key_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the key that model control then takes  [env: PATCHER_ADMIN_KEY holds the key itself]",
)
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Where Triton writes its log.")
def serve_command(
    repo: Path,
    host: str,
    grpc_port: int,
    http_port: int,
    metrics_port: int,
    key_file: Path | None,
    log_file: Path | None,
) -> None:
    """Serve the repository's classifiers with a real Triton server on this machine, until Ctrl-C or SIGTERM.

    Model control is explicit: what serves changes only when a verb (or you) asks for it. Listens on loopback unless
    told otherwise.
    """
    from patcher.repository import ModelRepository
    from patcher.triton.server import serve

    repository = ModelRepository(repo)
    serve(
        repository,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        admin_key=read_key(key_file),
        log_file=log_file,
        say=tell,
    )
