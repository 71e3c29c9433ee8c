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
from patcher.cli.output import gate_lines, seconds, tell
from patcher.cli.values import WholeNumber, named_files
from patcher.errors import PatcherError, as_sentence
from patcher.wording import count_and_some, cut, listing

if TYPE_CHECKING:
    from pathlib import Path

    from patcher.classifier import Classifier
    from patcher.labelling import PatchReport

METHODS = ("auto", "offset-logistic", "ridge", "lda", "anchored")
"""A copy of ``patcher.fit.METHODS``, which would be slow to import just for this; a test keeps the two equal."""


@click.command("add-label")
@click.argument("label", required=False)
@click.option(
    "--examples",
    "file",
    type=FILE,
    help="File of examples: CSV, TSV, JSONL or Parquet with a text column, or .txt with one text per line.",
)
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="One example; repeat the option for more.")
@click.option("--replay", type=FILE, help="Labelled old data to use in the fit.")
@eval_option("Held-out labelled old data on which to count flips.")
@max_flips_option
@min_recall_option
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="auto",
    show_default=True,
    help="How to fit. auto is offset-logistic, which leaves old rows unchanged; ridge and lda refit all rows from the "
    "memory, and anchored refits them on --replay.",
)
@click.option("--many", is_flag=True, help="Without LABEL: add the new labels of the file even if they are very many.")
@click.option("--no-name", is_flag=True, help="Do not use the label's own name as an example.")
@click.option(
    "--canary",
    type=SHARE,
    metavar="PERCENT",
    help="First try the version on this percentage of the requests; continue with `patcher canary`.",
)
@click.option(
    "--keep",
    type=WholeNumber(1),
    metavar="N",
    help="Afterwards delete old versions except the newest N, the serving one, its parent and one on trial.",
)
@dry_run_option
@force_option
@no_load_option("Publish without contacting a server; compute features locally.")
@common_options("classifier", "server", "control", "rollout")
def add_label_command(
    label: str | None,
    file: Path | None,
    texts: tuple[str, ...],
    replay: Path | None,
    evaluation: Path | None,
    max_flips: float,
    min_recall: float,
    method: str,
    many: bool,
    no_name: bool,
    canary: float | None,
    keep: int | None,
    dry_run: bool,
    force: bool,
    no_load: bool,
    options: CommonOptions,
) -> None:
    """Add LABEL to the classifier from a few examples, live.

    Fits the new row, counts the flips, publishes the next head version, makes the server load it, and verifies that the
    server answers from it. If anything fails, the previous version is restored.

    Without LABEL, adds every label in the file's label column that the head lacks, in one patch; more than 20, or more
    than a tenth of the classifier's labels if that is larger, only with --many. By default the rows of
    old labels do not change: only inputs that the new label takes over get another answer, and the gate bounds how many
    do. The methods ridge, lda and anchored change old rows, too; then only --eval bounds the flips of fresh inputs.

    \b
    patcher add-label card_lost --examples examples.csv
    patcher add-label card_lost --text "I lost my card" --text "my card is gone" --dry-run
    """
    from patcher.examples_file import read_examples
    from patcher.labelling import add_labels
    from patcher.patch import PatchSettings

    examples = _examples(file, texts, label, options)
    new = 1 if label is not None else _tell_new(examples, options, many=many)
    _warn_of_cut(examples, options)
    limits = PatchSettings(max_flips, min_recall, method, force, dry_run, not no_name, canary)
    old = [read_examples(path) if path else None for path in (replay, evaluation)]
    classifier = options.classifier
    total = sum(map(len, (*examples.values(), *(each.texts for each in old if each))))
    # A dry run changes nothing, so it needs no server: features computed from the local files are the same.
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
            progress=options.progress(total),
            label_progress=options.progress(new, "label"),
        )
    pruned, warnings = _pruned(classifier, keep) if keep is not None and report.published else ((), ())
    options.warn(*report.warnings, *warnings)
    if options.json:
        extra = {"pruned": pruned} if keep is not None else {}
        options.emit({**report.to_json(), **extra})
    else:
        _render(report, options)
        if pruned:
            options.say(f"pruned    {', '.join(map(str, pruned))}")


def _pruned(classifier: Classifier, keep: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The versions that were deleted, and a warning if that failed: the new version is published all the same."""
    from patcher.lifecycle import prune

    try:
        return prune(classifier, keep), ()
    except (PatcherError, KeyboardInterrupt) as error:  # Ctrl-C may end a long wait for the lock
        reason = as_sentence(str(error) or "interrupted")
        return (), (f"old versions were not deleted: {reason} `patcher prune --keep {keep}` retries",)


def _examples(
    file: Path | None, texts: tuple[str, ...], label: str | None, options: CommonOptions
) -> dict[str, list[str]]:
    """The examples by label, all of them for ``label`` if that is given; warns about columns that are not read."""
    from patcher.examples import LABEL_COLUMNS, TEXT_COLUMNS
    from patcher.examples_file import read_examples
    from patcher.new_texts import new_examples, refuse_ids

    if file is not None and texts:
        raise click.UsageError("expected either --examples FILE or --text TEXT, not both")
    if file is None and not texts:
        meant = f"; did you mean --examples {label}?" if label and named_files([label]) else ""
        raise click.UsageError(f"expected examples: --examples FILE, or --text TEXT several times{meant}")
    if texts and label is None:
        raise click.UsageError("expected LABEL before the --text examples")
    if file is None:
        if named_files(texts):
            options.warn(f"taking {texts[0]!r} as a text, the name of a file; --examples reads the texts in it")
        return {str(label): list(texts)}
    read, head = read_examples(file), options.classifier.head()
    examples = new_examples(read, label, several=not head.exclusive)
    if label is not None and read.labels is None and read.unread:
        columns = ", ".join(f"{name!r:.60}" for name in read.unread)
        told = f"only the texts of {read.source} are read (not {columns}); all {len(read)} become examples of {label!r}"
        options.warn(told)
    elif label is None:
        refuse_ids(examples, read.source, head)
        rivals = [name for name in read.unread if name.strip().lower() in (*TEXT_COLUMNS, *LABEL_COLUMNS)]
        if rivals:
            named = ", ".join(f"{name!r:.60}" for name in rivals)
            options.warn(f"{read.source} has more than one column of texts or labels; not read: {named}")
    return examples


def _tell_new(examples: dict[str, list[str]], options: CommonOptions, *, many: bool) -> int:
    """Say which labels of a file are new, and return their number; refuse very many without ``--many``."""
    from patcher.new_texts import refuse_many

    known = options.classifier.head().labels
    new = [label for label in examples if label not in set(known)]
    if not many:
        refuse_many(new, len(examples), len(known))
    if len(new) > 1:
        told = f"{len(new):,} labels of {len(examples):,} in the file are new: {listing(map(repr, new))}"
        tell(told, err=True)
    return len(new)


def _warn_of_cut(examples: dict[str, list[str]], options: CommonOptions) -> None:
    from patcher.features import count_cut

    texts = [text for group in examples.values() for text in group]
    count, limit = count_cut(options.classifier.tokenizer_path, texts)
    if count:
        options.warn(cut(count, len(texts), limit))


def _render(report: PatchReport, options: CommonOptions) -> None:
    verdict = report.verdict
    added = count_and_some(report.labels_added, "label")
    if report.canary is not None and not report.served:
        done = (
            f"version {report.version} of {report.classifier}, with {added} added, is set up for a trial on "
            f"{report.canary:g} % of the requests; no server was asked to load it"
        )
    elif report.canary is not None:
        done = (
            f"version {report.version} of {report.classifier}, with {added} added, is on trial with "
            f"{report.canary:g} % of the requests; `patcher canary` compares, --promote or --discard ends the trial"
        )
    elif report.served:
        done = f"version {report.version} of {report.classifier} now serves {report.labels} labels: {added} added"
    elif report.published:
        done = (
            f"version {report.version} of {report.classifier} is published with {added}; no server was asked to load it"
        )
    else:
        done = f"dry run: nothing published; version {report.version} would add {added}"
    options.say(done)
    for line in gate_lines(verdict, report.gate):
        options.say(line)
    options.say(f"flips     {verdict.harm}")
    options.say(f"recall    {verdict.gain}")
    options.say(f"method    {report.fit.method}: {report.fit.why}")
    stages = ", ".join(f"{name} {seconds(value)}" for name, value in report.seconds.items())
    options.say(f"seconds   {stages}; head file {report.head_bytes / 1000:.0f} KB")
