"""``patcher tune``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from patcher.cli.options import FILE, CommonOptions, common_options
from patcher.cli.output import tell

if TYPE_CHECKING:
    from pathlib import Path


@click.command("tune")
@click.option("--seconds", type=click.FloatRange(5, 86_400), default=120.0, show_default=True, help="To try settings.")
@click.option("--concurrency", type=click.IntRange(1, 1024), default=16, show_default=True, help="Requests at once.")
@click.option("--input", "file", type=FILE, required=True, help="File with typical texts.")
@click.option("--dry-run", is_flag=True, help="Only say what would be written.")
@click.option(
    "--response-cache/--no-response-cache",
    default=None,
    help="Have Triton remember the features of texts that come again, or not.  [default: as it is]",
)
@common_options
def tune_command(
    seconds: float, concurrency: int, file: Path, dry_run: bool, response_cache: bool | None, options: CommonOptions
) -> None:
    """Find the instances, threads, delays, padding and batches that are fastest on this machine, and write them.

    Runs a server of its own over a copy of the repository; interrupted, the repository is as it was. A running server
    takes the new settings when it is restarted.

    \b
    patcher tune --input questions.csv --seconds 120
    """
    from patcher.examples import read_examples
    from patcher.tune import tune

    found = tune(
        options.classifier,
        read_examples(file).texts,
        seconds=seconds,
        concurrency=concurrency,
        write=not dry_run,
        response_cache=response_cache,
        progress=lambda what: tell(what, err=True),
    )
    options.emit(found.to_json())
    if not options.json:
        before, best = dataclasses.asdict(found.before), dataclasses.asdict(found.best)
        changes = ", ".join(f"{key} {before[key]} -> {best[key]}" for key in best if best[key] != before[key])
        rate = f"{found.throughput:.0f} texts/s at concurrency {concurrency}"
        options.say(
            f"{rate}, {found.gain:.2f} times what it was: {changes}"
            if changes
            else f"nothing tried was better than what is there: {rate}"
        )
        options.say("written; a restarted server serves with it" if found.written else "nothing was written")
