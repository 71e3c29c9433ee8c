"""``patcher evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patcher.cli.options import FILE, CommonOptions, common_options, version_option
from patcher.cli.output import counted_as, table
from patcher.cli.values import WholeNumber
from patcher.wording import count_and_some, percent

if TYPE_CHECKING:
    from pathlib import Path


@click.command("evaluate")
@click.argument("file", type=FILE)
@version_option
@click.option(
    "--worst", type=WholeNumber(0), default=10, show_default=True, help="How many labels and confusions to list."
)
@common_options("classifier")
def evaluate_command(file: Path, version: int | None, worst: int, options: CommonOptions) -> None:
    """Measure a head version on a labelled FILE: accuracy, macro F1, and precision, recall and F1 of each label.

    Texts labelled with an earlier name of a label, or with a label that was merged into it, count as that label, unless
    the version that did so was pruned.

    Runs the repository's own files in this process, so it puts no load on a server.
    """
    from patcher.examples_file import read_examples
    from patcher.lifecycle import evaluate

    examples = read_examples(file)
    result = evaluate(options.classifier, examples, version, options.progress(len(examples)))
    if options.json:
        options.emit({"classifier": options.classifier.name, **result.to_json()})
        return
    options.say(
        f"version {result.version} on {result.examples} texts: accuracy {percent(result.accuracy)}, "
        f"macro F1 {percent(result.macro_f1)}"
    )
    for line in (*counted_as("renamed", result.renamed), *counted_as("merged", result.merged)):
        options.say(line)
    if result.unknown:
        options.say(f"labels that this version lacks, counted as wrong: {count_and_some(result.unknown)}")
    there = [item for item in result.per_label.items() if item[1].support]  # the file has no texts of the others
    lowest = sorted(there, key=lambda item: item[1].f1)[:worst]
    rows = [(label, percent(s.precision, 1), percent(s.recall, 1), percent(s.f1, 1), s.support) for label, s in lowest]
    if rows:
        options.say()
        options.say(table(("weakest labels", "precision", "recall", "F1", "texts"), rows, right=(1, 2, 3, 4)))
    if result.confusions and worst:
        options.say()
        options.say(table(("text of", "answered", "times"), result.confusions[:worst], right=(2,)))
