"""``patcher tune``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from patcher.cli.options import FILE, CommonOptions, common_options
from patcher.cli.output import tell
from patcher.cli.values import Number, WholeNumber

if TYPE_CHECKING:
    from pathlib import Path


@click.command("tune")
@click.option(
    "--seconds",
    type=Number(5, 86_400),
    default=120.0,
    show_default=True,
    help="Time to spend trying settings, in seconds.",
)
@click.option(
    "--concurrency", type=WholeNumber(1, 1024), default=16, show_default=True, help="Number of concurrent requests."
)
@click.option("--input", "file", type=FILE, required=True, help="File with typical texts.")
@click.option("--dry-run", is_flag=True, help="Only print what would be written.")
@click.option(
    "--response-cache/--no-response-cache",
    default=None,
    help="Turn Triton's cache of the features of repeated texts on or off.  [default: unchanged]",
)
@common_options("classifier")
def tune_command(
    seconds: float, concurrency: int, file: Path, dry_run: bool, response_cache: bool | None, options: CommonOptions
) -> None:
    """Find the fastest instances, threads, delays, padding and batch sizes for this machine, and write them.

    Runs its own server on a copy of the repository; if interrupted, the repository is unchanged. A running server uses
    the new settings after a restart.

    \b
    patcher tune --input questions.csv --seconds 120
    """
    from patcher.examples_file import read_examples
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
            f"{rate}, {found.gain:.2f} times as before: {changes}" if changes else f"no better settings found: {rate}"
        )
        options.say("written; restart the server to use it" if found.written else "nothing was written")
