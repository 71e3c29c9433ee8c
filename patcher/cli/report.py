"""``patcher report``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patcher.cli.options import (
    FILE,
    CommonOptions,
    common_options,
    eval_option,
    refuse_overwriting,
    version_option,
)

if TYPE_CHECKING:
    from pathlib import Path


@click.command("report")
@version_option
@click.option("--html", "page", type=FILE, help="File to write the page to.")
@eval_option("Labelled file on which to show accuracy, confusions and flips, before and after.")
@common_options("classifier")
def report_command(version: int | None, evaluation: Path | None, page: Path | None, options: CommonOptions) -> None:
    """Write one self-contained page about a head version.

    Shows what changed since its parent, what the gate said, how both answer a labelled file (with --eval), and a map of
    the new label among its neighbours. Runs the repository's own files in this process, without a server.

    \b
    patcher report --html patch.html --eval held-out.csv
    patcher report --version 7 --html patch.html
    """
    if page is None and not options.json:
        raise click.UsageError("expected --html FILE, or --json for the same content as a document")
    from patcher.examples_file import read_examples
    from patcher.report import check_target, make_report, write_page

    refuse_overwriting(page, evaluation)
    if page is not None:
        check_target(page)
    examples = read_examples(evaluation) if evaluation else None
    progress = options.progress(len(examples)) if examples else None
    found = make_report(options.classifier, version, examples, progress)
    if page is not None:
        write_page(found, page)
        options.say(f"version {found.entry.lineage.version} of {found.classifier}: {page}")
    options.emit(found.to_json())
