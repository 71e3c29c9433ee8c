"""``patcher loadtest``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patcher.cli.options import FILE, CommonOptions, common_options, refuse_overwriting
from patcher.cli.output import table, tell
from patcher.cli.values import Number, WholeNumber
from patcher.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from patcher.measurement import Measurement

_TEXTS = (
    "hello, I need some help please",
    "where is it",
    "can you tell me what I have to do when my order has not come and nobody answers the phone",
    "what is the balance of my account",
)
"""Short and long texts to send if --input does not provide real ones."""


@click.command("loadtest")
@click.option(
    "--concurrency", metavar="START:END:STEP", help="Numbers of concurrent requests, such as 1:16:4.  [default: 1:8:3]"
)
@click.option("--request-rate", metavar="START:END:STEP", help="Requests per second, at random (Poisson) times.")
@click.option("--input", "file", type=FILE, help="File with the texts to send; a few built-in ones by default.")
@click.option(
    "--against",
    metavar="MODEL[@HOST:PORT]",
    help="Another model, or one on another server (gRPC), to compare with in alternating rounds.",
)
@click.option(
    "--window",
    type=Number(0.2, 600),
    default=2.0,
    show_default=True,
    help="Length of a window in seconds; each measurement takes three.",
)
@click.option(
    "--rounds", type=WholeNumber(1, 100), default=1, show_default=True, help="How many times to repeat everything."
)
@click.option("--csv", "csv_file", type=FILE, help="Write the figures as CSV.")
@click.option("--plot", "plot_file", type=FILE, help="Draw latency over throughput (PNG, SVG or PDF).")
@common_options("classifier", "server")
def loadtest_command(
    concurrency: str | None,
    request_rate: str | None,
    file: Path | None,
    against: str | None,
    window: float,
    rounds: int,
    csv_file: Path | None,
    plot_file: Path | None,
    options: CommonOptions,
) -> None:
    """Measure throughput, latency and the time in each step under load, with NVIDIA's perf_analyzer over gRPC.

    \b
    patcher loadtest --concurrency 1:16:5 --input questions.csv --plot load.png
    patcher loadtest --concurrency 4 --against intent@other-host:8001 --rounds 5
    """
    from patcher.examples_file import read_examples
    from patcher.fleet import members
    from patcher.loadtest import load_test, parse_loads
    from patcher.measurement import check_targets, compare, warnings

    if concurrency is None and request_rate is None:
        concurrency = "1:8:3"
    loads = parse_loads(concurrency, request_rate)
    refuse_overwriting(csv_file, file)
    refuse_overwriting(plot_file, file)
    check_targets(csv_file, plot_file)
    texts = read_examples(file).texts if file else _TEXTS
    models = [options.address, *([against] if against else [])]
    with options.server() as server:
        if len(members(server)) > 1:
            options.warn(f"only {server.url} is measured, no other server in --url")
        found = load_test(
            server, models, texts, loads, window=window, rounds=rounds, progress=lambda what: tell(what, err=True)
        )
    not_written = _write(found, csv_file, plot_file)
    ratios = compare(found, against) if against else []
    by_load = {(each.model, each.load): {"ratio": each.ratio, "ratio_range": [each.low, each.high]} for each in ratios}
    documents = [{**each.to_json(), **by_load.get((each.model, each.load), {})} for each in found]
    if not_written is None:
        options.emit(documents)
    else:
        not_written.report["measurements"] = documents  # of which --json prints one document, with the error
    if not options.json:
        options.say(_table(found))
    for each in ratios:
        options.say(
            f"{each.model} / {each.against}, {each.load}: {each.ratio:.3f} of its throughput "
            f"({each.low:.3f} to {each.high:.3f} over {rounds} rounds)"
        )
    options.warn(*warnings(found))
    if not_written is not None:  # only now: the figures took minutes
        raise not_written


def _write(found: Sequence[Measurement], csv_file: Path | None, plot_file: Path | None) -> StorageError | None:
    """Write the files that are asked for; returns the error if one of them cannot be written."""
    from patcher.measurement import plot, write_csv

    failed = []
    for path, write in ((csv_file, write_csv), (plot_file, plot)):
        try:
            if path is not None:
                write(found, path)
        except StorageError as error:
            failed.append(str(error))
    return StorageError("; ".join(failed)) if failed else None


def _table(found: Sequence[Measurement]) -> str:
    rows = [
        (
            each.model,
            f"c{each.concurrency}" if each.concurrency else f"{each.request_rate:g}/s",
            f"{each.throughput:.1f}",
            *(f"{value / 1000:.1f}" for value in (each.p50_us, each.p95_us, each.p99_us)),
            each.failures,
            ", ".join(
                f"{step.model.rpartition('_')[2]} {step.queue_us / 1000:.1f}+{step.compute_us / 1000:.1f}"
                for step in each.steps
            ),
        )
        for each in found
    ]
    header = ("model", "load", "texts/s", "p50 ms", "p95 ms", "p99 ms", "failed", "steps: queue + compute, ms")
    return table(header, rows, right=(2, 3, 4, 5, 6))
