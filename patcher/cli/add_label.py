"""``patcher add-label``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from patcher.cli.options import Settings, common_options
from patcher.cli.output import percent, seconds, tell
from patcher.limits import MAX_FLIPS, MIN_RECALL

if TYPE_CHECKING:
    from patcher.labelling import PatchReport

METHODS = ("auto", "offset-logistic", "ridge", "lda", "anchored")
"""Those of ``patcher.fit``, which is not imported for a list of words; a test holds the two equal."""
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("add-label")
@click.argument("label", required=False)
@click.option("--examples", "file", type=_FILE, help="CSV, TSV, JSONL or Parquet with a text column.")
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="One example; give it several times.")
@click.option("--replay", type=_FILE, help="Labelled old data that takes part in the fit.")
@click.option("--eval", "evaluation", type=_FILE, help="Labelled old data, held out, on which flips are counted.")
@click.option(
    "--max-flips",
    type=click.FloatRange(0, 1),
    default=MAX_FLIPS,
    show_default=True,
    help="Share of old inputs that may flip.",
)
@click.option(
    "--min-recall",
    type=click.FloatRange(0, 1),
    default=MIN_RECALL,
    show_default=True,
    help="Recall the new label must reach.",
)
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
    "--canary",
    type=click.FloatRange(0, 100, min_open=True, max_open=True),
    metavar="PERCENT",
    help="Try the version on this share of the requests first; `patcher canary` goes on from there.",
)
@click.option(
    "--keep",
    type=click.IntRange(1),
    metavar="N",
    help="Delete old versions afterwards, but for the newest N, the serving one and its parent.",
)
@click.option("--dry-run", is_flag=True, help="Fit and judge; publish nothing.")
@click.option("--force", is_flag=True, help="Publish in spite of the gate; the lineage records it for ever.")
@click.option("--no-load", is_flag=True, help="Publish without touching a server; features are computed here.")
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
    canary: float | None,
    keep: int | None,
    dry_run: bool,
    force: bool,
    no_load: bool,
    settings: Settings,
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
    from patcher.labelling import add_labels, new_examples
    from patcher.lifecycle import prune
    from patcher.patch import PatchSettings

    if (file is None) == (not texts):
        raise click.UsageError("expected examples: --examples FILE, or --text TEXT several times")
    if texts and label is None:
        raise click.UsageError("expected LABEL before the --text examples")
    limits = PatchSettings(max_flips, min_recall, method, force, dry_run, not no_name, canary)
    old = [read_examples(path) if path else None for path in (replay, evaluation)]
    classifier = settings.classifier
    if file is not None:
        several = not classifier.head().exclusive
        read = read_examples(file)
        examples = new_examples(read, label, several=several)
        if label is not None and read.labels is None and read.unread:
            columns = ", ".join(f"{name!r:.60}" for name in read.unread)
            told = f"of {read.source} only the texts are read (not {columns}): all {len(read)} are taken as {label!r}"
            tell(f"warning: {told}", err=True)
    else:
        examples = {str(label): list(texts)}
    # A dry run changes nothing, so it need not insist on a server: local files give the same features.
    with nullcontext() if no_load or dry_run else settings.server() as server:
        report = add_labels(
            settings.repository,
            examples,
            server=server,
            classifier=classifier.name,
            replay=old[0],
            evaluation=old[1],
            settings=limits,
            skip_known=label is None,
        )
    pruned = prune(classifier, keep) if keep is not None and report.published else ()
    if settings.json:
        settings.emit({**report.to_json(), **({"pruned": list(pruned)} if keep is not None else {})})
    else:
        _render(report, settings)
        if pruned:
            settings.say(f"pruned    {', '.join(map(str, pruned))}")


def _render(report: PatchReport, settings: Settings) -> None:
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
    settings.say(done)
    forced = " Published all the same, by --force." if report.gate == "forced" else ""
    settings.say(f"gate      {verdict.sentence}{forced}")
    for line in (*verdict.reasons, *verdict.advice):
        settings.say(f"          {line}")
    settings.say(
        f"flips     {percent(verdict.flips)} of old inputs seen to flip, at most {percent(verdict.flips_upper_bound)} "
        f"({verdict.bound})"
    )
    settings.say(f"recall    {percent(report.estimated_recall, 1)} expected, each example left out in turn")
    settings.say(f"method    {report.fit.method}: {report.fit.why}")
    stages = ", ".join(f"{name} {seconds(value)}" for name, value in report.seconds.items())
    settings.say(f"seconds   {stages}; head file {report.head_bytes / 1000:.0f} KB")
