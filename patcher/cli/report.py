"""``patcher report``."""

from __future__ import annotations

from pathlib import Path

import click

from patcher.cli.options import Settings, common_options


@click.command("report")
@click.option("--version", type=click.IntRange(1), help="The serving one by default.")
@click.option(
    "--eval",
    "evaluation",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Labelled file: accuracy, confusions and flips, before and after.",
)
@click.option("--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Where the page goes.")
@common_options
def report_command(version: int | None, evaluation: Path | None, page: Path | None, settings: Settings) -> None:
    """Write one self-contained page about a head version.

    What changed since its parent, what the gate said, with --eval how both answer a labelled file, and a map of the new
    label among its neighbours. Runs the repository's own files in this process; no server is asked.

    \b
    patcher report --html patch.html --eval held-out.csv
    patcher report --version 7 --html patch.html
    """
    if page is None and not settings.json:
        raise click.UsageError("expected --html FILE, or --json for the same as one document")
    from patcher.examples import read_examples
    from patcher.report import make_report, write_page

    examples = read_examples(evaluation) if evaluation else None
    progress = settings.progress("texts", len(examples)) if examples else None
    found = make_report(settings.classifier, version, examples, progress)
    if page is not None:
        write_page(found, page)
        settings.say(f"version {found.entry.lineage.version} of {found.classifier}: {page}")
    settings.emit(found.to_json())
