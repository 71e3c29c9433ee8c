"""``patcher remove-label``, ``rename-label`` and ``merge-labels``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from patcher.cli.completion import complete_label
from patcher.cli.options import (
    CommonOptions,
    common_options,
    dry_run_option,
    force_option,
    max_flips_option,
    min_recall_option,
    no_load_option,
)
from patcher.cli.output import gate_lines

if TYPE_CHECKING:
    from collections.abc import Callable

    from patcher.relabelling import Change


@click.command("remove-label")
@click.argument("label", shell_complete=complete_label)
@no_load_option()
@common_options("classifier", "server", "control", "rollout")
def remove_label_command(label: str, no_load: bool, options: CommonOptions) -> None:
    """Remove LABEL. Its texts go to the best of the other labels, whose logits do not change."""
    from patcher.relabelling import remove_label

    _run(options, no_load, f"removed {label}", lambda server: remove_label(options.classifier, label, server))


@click.command("rename-label")
@click.argument("old", shell_complete=complete_label)
@click.argument("new")
@no_load_option()
@common_options("classifier", "server", "control", "rollout")
def rename_label_command(old: str, new: str, no_load: bool, options: CommonOptions) -> None:
    """Rename label OLD to NEW; scores do not change."""
    from patcher.relabelling import rename_label

    _run(options, no_load, f"renamed {old} to {new}", lambda server: rename_label(options.classifier, old, new, server))


@click.command("merge-labels")
@click.argument("labels", nargs=-1, required=True, shell_complete=complete_label)
@click.option(
    "--into",
    required=True,
    metavar="LABEL",
    shell_complete=complete_label,
    help="The label to merge into; may be one of LABELS.",
)
@max_flips_option
@min_recall_option
@dry_run_option
@force_option
@no_load_option()
@common_options("classifier", "server", "control", "rollout")
def merge_labels_command(
    labels: tuple[str, ...],
    into: str,
    max_flips: float,
    min_recall: float,
    dry_run: bool,
    force: bool,
    no_load: bool,
    options: CommonOptions,
) -> None:
    """Merge several LABELS into one, whose row is fitted on what the memory keeps about them.

    \b
    patcher merge-labels card_lost card_stolen --into card_gone
    """
    from patcher.relabelling import merge_labels

    def merge(server: Any) -> Change:
        return merge_labels(
            options.classifier, labels, into, server,
            max_flips=max_flips, min_recall=min_recall, force=force, dry_run=dry_run,
        )  # fmt: skip

    _run(options, no_load or dry_run, f"merged {', '.join(labels)} into {into}", merge)


def _run(options: CommonOptions, no_load: bool, what: str, change: Callable[[Any], Change]) -> None:
    with options.server_unless(no_load) as server:
        done = change(server)
    options.warn(*done.notes, *done.warnings)
    options.emit(done.to_json())
    if options.json:
        return
    if done.published:
        state = "now serves" if done.served else "is published; no server was asked to load it"
        options.say(f"{what}: version {done.version} of {done.classifier} ({done.labels} labels) {state}")
    else:
        options.say(f"dry run: nothing published; version {done.version} would have {done.labels} labels")
    if done.verdict:
        for line in gate_lines(done.verdict, done.gate):
            options.say(line)
