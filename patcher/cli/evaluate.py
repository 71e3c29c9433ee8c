"""``patcher evaluate``."""

from __future__ import annotations

from pathlib import Path

import click

from patcher.cli.options import Settings, common_options
from patcher.cli.output import percent, table


@click.command("evaluate")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--version", type=click.IntRange(1), help="The serving one by default.")
@click.option("--worst", type=click.IntRange(0), default=10, show_default=True, help="Labels and confusions to list.")
@common_options
def evaluate_command(file: Path, version: int | None, worst: int, settings: Settings) -> None:
    """Accuracy, macro F1, and each label's precision, recall and F1 of a head version on a labelled FILE.

    Runs the repository's own files in this process; no server is asked, none is loaded down.
    """
    from patcher.examples import read_examples
    from patcher.lifecycle import evaluate

    examples = read_examples(file)
    result = evaluate(settings.classifier, examples, version, settings.progress("texts", len(examples)))
    if settings.json:
        settings.emit(result.to_json())
        return
    settings.say(
        f"version {result.version} on {result.examples} texts: accuracy {percent(result.accuracy)}, "
        f"macro F1 {percent(result.macro_f1)}"
    )
    if result.unknown:
        settings.say(f"labels that this version lacks, counted as wrong: {', '.join(result.unknown)}")
    there = [item for item in result.per_label.items() if item[1].support]  # of the others the file says nothing
    lowest = sorted(there, key=lambda item: item[1].f1)[:worst]
    rows = [(label, percent(s.precision, 1), percent(s.recall, 1), percent(s.f1, 1), s.support) for label, s in lowest]
    if rows:
        settings.say()
        settings.say(table(("weakest labels", "precision", "recall", "F1", "texts"), rows, right=(1, 2, 3, 4)))
    if result.confusions and worst:
        settings.say()
        settings.say(table(("text of", "answered", "times"), result.confusions[:worst], right=(2,)))
