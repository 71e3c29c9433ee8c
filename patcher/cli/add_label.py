"""``patcher add-label``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patcher.cli.options import (
    FILE,
    SHARE,
    CommonOptions,
    common_options,
    dry_run_option,
    eval_option,
    force_option,
    max_flips_option,
    min_recall_option,
    no_load_option,
)
from patcher.cli.output import seconds, tell
from patcher.wording import percent

if TYPE_CHECKING:
    from pathlib import Path

    from patcher.labelling import PatchReport

METHODS = ("auto", "offset-logistic", "ridge", "lda", "anchored")
"""Those of ``patcher.fit``, which is not imported for a list of words; a test holds the two equal."""


@click.command("add-label")
@click.argument("label", required=False)
@click.option("--examples", "file", type=FILE, help="CSV, TSV, JSONL or Parquet with a text column.")
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="One example; give it several times.")
@click.option("--replay", type=FILE, help="Labelled old data that takes part in the fit.")
@eval_option("Labelled old data, held out, on which flips are counted.")
@max_flips_option
@min_recall_option
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="auto",
    show_default=True,
    help="auto is offset-logistic: old rows keep their bits. ridge and lda refit all rows from the memory, anchored on "
    "--replay.",
)
@click.option("--no-name", is_flag=True, help="Do not take the label's own name, where it is words, as an example.")
@click.option(
    "--no-variants", is_flag=True, help="Fit the examples alone, not also with a word left out or two swapped: faster."
)
@click.option(
    "--canary",
    type=SHARE,
    metavar="PERCENT",
    help="Try the version on this share of the requests first; `patcher canary` goes on from there.",
)
@click.option(
    "--keep",
    type=click.IntRange(1),
    metavar="N",
    help="Delete old versions afterwards, but for the newest N, the serving one and its parent.",
)
@dry_run_option
@force_option
@no_load_option("Publish without touching a server; features are computed here.")
@common_options
def add_label_command(
    label: str | None,
    file: Path | None,
    texts: tuple[str, ...],
    replay: Path | None,
    evaluation: Path | None,
    max_flips: float,
    min_recall: float,
    method: str,
    no_name: bool,
    no_variants: bool,
    canary: float | None,
    keep: int | None,
    dry_run: bool,
    force: bool,
    no_load: bool,
    options: CommonOptions,
) -> None:
    """Teach the classifier LABEL from a few examples, live.

    Fits the new row, checks the harm, publishes the next head version, has the server load it, and proves that the
    server answers from it; otherwise the previous version is put back.

    Without LABEL, every label in the file's label column that the head lacks is added, in one patch. Old labels keep
    their rows to the bit; only an input that the new label takes over can change its answer, and the gate bounds how
    many do.

    \b
    patcher add-label card_lost --examples examples.csv
    patcher add-label card_lost --text "I lost my card" --text "my card is gone" --dry-run
    """
    from patcher.examples import read_examples
    from patcher.labelling import add_labels
    from patcher.lifecycle import prune
    from patcher.patch import PatchSettings

    examples = _examples(file, texts, label, options)
    limits = PatchSettings(max_flips, min_recall, method, force, dry_run, not no_name, not no_variants, canary)
    old = [read_examples(path) if path else None for path in (replay, evaluation)]
    classifier = options.classifier
    # A dry run changes nothing, so it need not insist on a server: local files give the same features.
    with options.server_unless(no_load or dry_run) as server:
        report = add_labels(
            options.repository,
            examples,
            server=server,
            classifier=classifier.name,
            replay=old[0],
            evaluation=old[1],
            settings=limits,
            skip_known=label is None,
        )
    pruned = prune(classifier, keep) if keep is not None and report.published else ()
    if options.json:
        options.emit({**report.to_json(), **({"pruned": list(pruned)} if keep is not None else {})})
    else:
        _render(report, options)
        if pruned:
            options.say(f"pruned    {', '.join(map(str, pruned))}")


def _examples(
    file: Path | None, texts: tuple[str, ...], label: str | None, options: CommonOptions
) -> dict[str, list[str]]:
    """The examples by label, all of them ``label``'s where it is given; a word on columns that are not read."""
    from patcher.examples import read_examples
    from patcher.new_texts import new_examples

    if (file is None) == (not texts):
        raise click.UsageError("expected examples: --examples FILE, or --text TEXT several times")
    if texts and label is None:
        raise click.UsageError("expected LABEL before the --text examples")
    if file is None:
        return {str(label): list(texts)}
    read = read_examples(file)
    examples = new_examples(read, label, several=not options.classifier.head().exclusive)
    if label is not None and read.labels is None and read.unread:
        columns = ", ".join(f"{name!r:.60}" for name in read.unread)
        told = f"of {read.source} only the texts are read (not {columns}): all {len(read)} are taken as {label!r}"
        tell(f"warning: {told}", err=True)
    return examples


def _render(report: PatchReport, options: CommonOptions) -> None:
    verdict = report.verdict
    added = ", ".join(report.labels_added)
    if report.canary is not None and not report.served:
        done = (
            f"version {report.version} of {report.classifier} is set up to be tried on {report.canary:g} % of the "
            f"requests, with {added} added; no server was asked to load it"
        )
    elif report.canary is not None:
        done = (
            f"version {report.version} of {report.classifier} is tried on {report.canary:g} % of the requests, with "
            f"{added} added; `patcher canary` compares, --promote or --discard ends it"
        )
    elif report.served:
        done = f"version {report.version} of {report.classifier} serves, with {report.labels} labels: {added} added"
    elif report.published:
        done = (
            f"version {report.version} of {report.classifier} is published with {added}; no server was asked to load it"
        )
    else:
        done = f"dry run: nothing published; version {report.version} would add {added}"
    options.say(done)
    forced = " Published all the same, by --force." if report.gate == "forced" else ""
    options.say(f"gate      {verdict.sentence}{forced}")
    for line in (*verdict.reasons, *verdict.advice):
        options.say(f"          {line}")
    options.say(f"flips     {verdict.harm}")
    options.say(f"recall    {percent(report.estimated_recall, 1)} expected, each example left out in turn")
    options.say(f"method    {report.fit.method}: {report.fit.why}")
    stages = ", ".join(f"{name} {seconds(value)}" for name, value in report.seconds.items())
    options.say(f"seconds   {stages}; head file {report.head_bytes / 1000:.0f} KB")
