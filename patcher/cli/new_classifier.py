"""``patcher new-classifier`` and ``drop-classifier``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from patcher import audit
from patcher.cli.completion import complete_classifier
from patcher.cli.options import (
    FILE,
    CommonOptions,
    common_options,
    dry_run_option,
    force_option,
    memory_option,
    no_load_option,
)
from patcher.cli.output import seconds
from patcher.cli.values import Number
from patcher.limits import MIN_ACCURACY
from patcher.names import check_name
from patcher.wording import percent, repeats

if TYPE_CHECKING:
    from pathlib import Path

    from patcher.founding import NewClassifierReport

_SHOWN = 5


@click.command("new-classifier")
@click.argument("name")
@click.option("--backbone", metavar="NAME", help="The backbone to build on; needed only if there are several.")
@click.option(
    "--train",
    type=FILE,
    required=True,
    help="Training file: CSV, TSV, JSONL or Parquet with a text and a label column.",
)
@click.option(
    "--multi-label", is_flag=True, help="A text can have several of the labels; --train writes them as `a|b`."
)
@click.option("--in-store", is_flag=True, help="Serve it from the backbone's head store (for very many classifiers).")
@click.option(
    "--min-accuracy",
    type=Number(0, 1),
    default=MIN_ACCURACY,
    show_default=True,
    help="Smallest share of held-out texts that must be answered right (with --multi-label: by exactly their labels).",
)
@memory_option
@dry_run_option
@force_option
@no_load_option("Publish without contacting a server; compute features locally.")
@common_options("server", "control")
def new_classifier_command(
    name: str,
    backbone: str | None,
    train: Path,
    multi_label: bool,
    in_store: bool,
    min_accuracy: float,
    kind: str,
    dry_run: bool,
    force: bool,
    no_load: bool,
    options: CommonOptions,
) -> None:
    """Make the classifier NAME from labelled texts, on an existing backbone.

    Fits the rows of all labels on the backbone's frozen features, measures them on held-out texts, publishes version 1,
    makes the server load it, and verifies that the server answers from it. Nothing is fine-tuned.

    With --in-store, one process holds the heads of all such classifiers; clients call the ensemble BACKBONE_any with
    `text` and `classifier`, and `canary` is not available. With --multi-label, each label is decided on its own, and a
    text gets all labels with a score above 0.5. `to-transformers` works on exported classifiers only; every
    other verb works on this one, too.

    \b
    patcher new-classifier topics --backbone intent --train topics.csv
    patcher new-classifier customer-17 --backbone intent --train 17.csv --in-store
    patcher new-classifier tags --backbone intent --train tags.csv --multi-label
    """
    from patcher.examples_file import read_examples
    from patcher.founding import FoundingSettings, new_classifier
    from patcher.remembering import FEATURES_A_LABEL

    audit.note(classifier=name)
    if options.classifier_name is not None:
        raise click.UsageError("--classifier is for existing classifiers; give the new name as the argument NAME")
    wishes = FoundingSettings(
        in_store,
        min_accuracy,
        force,
        dry_run,
        per_label=FEATURES_A_LABEL if kind == "features" else 0,
        multi_label=multi_label,
    )
    examples = read_examples(train)
    # A dry run changes nothing, so it needs no server: features computed from the local files are the same.
    with options.server_unless(no_load or dry_run) as server:
        report = new_classifier(
            options.repository,
            name,
            examples,
            backbone=backbone,
            server=server,
            settings=wishes,
            progress=options.progress(len(examples)),
        )
    options.warn(*report.notes, *report.warnings)
    if options.json:
        options.emit(report.to_json())
    else:
        _render(report, options)


def _render(report: NewClassifierReport, options: CommonOptions) -> None:
    what = f"{report.classifier} on {report.backbone}, {report.labels} labels from {report.examples} texts"
    if report.served:
        done = f"{what}: version 1 now serves"
    elif report.published:
        done = f"{what}: version 1 is published; no server was asked to load it"
    else:
        done = f"dry run: nothing published; {what}"
    options.say(done)
    forced = " Published anyway because of --force." if report.gate == "forced" else ""
    options.say(f"gate      {report.sentence}{forced}")
    for weak in report.weak[:_SHOWN]:
        found = f"{percent(weak.recall, 0)} of {weak.support} found"
        instead = f", most of the rest answered as {weak.instead}" if weak.instead else ""
        options.say(f"weak      {weak.label}: {found}{instead}")
    if len(report.weak) > _SHOWN:
        options.say(f"          and {len(report.weak) - _SHOWN} more (--json lists them)")
    if report.repeated:
        options.say(f"repeats   {repeats(report.repeated)}")
    options.say(f"address   {report.address}")
    stages = ", ".join(f"{name} {seconds(value)}" for name, value in report.seconds.items())
    options.say(
        f"seconds   {stages}; head file {report.head_bytes / 1000:.0f} KB, memory {report.memory_bytes / 1e6:.1f} MB"
    )


@click.command("drop-classifier")
@click.argument("name", shell_complete=complete_classifier)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@no_load_option("Delete the files without contacting a server.")
@common_options("server", "control")
def drop_classifier_command(name: str, yes: bool, no_load: bool, options: CommonOptions) -> None:
    """Unload the classifier NAME and delete it with all its versions; this cannot be undone.

    Its backbone and the other classifiers on it stay.

    \b
    patcher drop-classifier customer-17
    """
    from patcher.dropping import drop_classifier

    if options.classifier_name is not None:
        raise click.UsageError("the classifier to drop is the argument NAME; leave --classifier out")
    audit.note(classifier=name)
    count = len(options.repository.versions_of(check_name(name)))
    versions = "its only version" if count == 1 else f"its {count} versions"
    if count and not yes:
        if not sys.stdin.isatty():
            raise click.UsageError(f"this permanently deletes {name} with {versions}; expected --yes")
        if not click.confirm(f"Permanently delete {name} with {versions}?", err=True):
            audit.note(outcome="declined")
            options.say(f"{name} was not changed")
            return
    with options.server_unless(no_load) as server:
        dropped = drop_classifier(options.repository, name, server)
    audit.note(versions=list(dropped))
    options.emit({"classifier": name, "dropped": list(dropped)})
    if not options.json:
        which = (
            f", with {'version' if len(dropped) == 1 else 'versions'} {', '.join(map(str, dropped))}" if dropped else ""
        )
        options.say(f"{name} was deleted{which}; its backbone stays")
