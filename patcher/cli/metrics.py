"""``patcher metrics``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patcher.cli.options import FILE, CommonOptions, common_options
from patcher.cli.values import WholeNumber
from patcher.errors import RepositoryError

if TYPE_CHECKING:
    from pathlib import Path


@click.command("metrics")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=WholeNumber(0, 65535),
    default=9108,
    show_default=True,
    help="Port to listen on; 0 picks a free one.",
)
@click.option("--server", "more", multiple=True, metavar="HOST:PORT", help="Another server besides --url; repeatable.")
@click.option(
    "--texts",
    type=FILE,
    help="File of texts; the first 200 are classified at each scrape, for quantiles of score and in_scope.",
)
@click.option(
    "--audit-log",
    type=FILE,
    envvar="PATCHER_AUDIT_LOG",
    help="Audit log whose events to count.  [env: PATCHER_AUDIT_LOG]",
)
@common_options("classifier", "server")
def metrics_command(
    host: str, port: int, more: tuple[str, ...], texts: Path | None, audit_log: Path | None, options: CommonOptions
) -> None:
    """Export metrics for Prometheus that Triton itself does not provide, until Ctrl-C.

    Asks every replica behind --url which head version it answers from and how many labels that has, and counts patches,
    rollbacks and refusals in the audit log.
    """
    from patcher.examples_file import read_examples
    from patcher.metrics import Targets, expose

    try:
        repository = options.repository
    except RepositoryError:
        if options.classifier_name is None:
            raise
        repository = None  # the servers' repository need not be on this machine
    names = (options.classifier_name,) if options.classifier_name else options.repository.classifiers()
    sample = read_examples(texts).texts[:200] if texts else ()
    every = options.classifier_name is None
    targets = Targets((options.url, *more), names, repository, audit_log, sample, options.tls, every)
    server, thread = expose(targets, host, port)
    url = f"http://{host}:{server.server_port}/metrics"
    options.emit({"url": url})
    options.say(f"metrics at {url}; press Ctrl-C to stop")
    try:
        thread.join()
    except KeyboardInterrupt:
        options.say("stopped")
    finally:
        server.shutdown()
