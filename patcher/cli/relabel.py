"""``patcher remove-label``, ``rename-label`` and ``merge-labels``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import Settings, common_options
from patcher.limits import MAX_FLIPS, MIN_RECALL

if TYPE_CHECKING:
    from collections.abc import Callable

    from patcher.relabelling import Change

_no_load = click.option("--no-load", is_flag=True, help="Publish without touching a server.")


@click.command("remove-label")
@click.argument("label")
@_no_load
@common_options
def remove_label_command(label: str, no_load: bool, settings: Settings) -> None:
    """Take LABEL out. Its texts go to the best of the other labels, whose logits stay the same to the bit."""
    from patcher.relabelling import remove_label

    _run(settings, no_load, f"{label} removed", lambda server: remove_label(settings.classifier, label, server))


@click.command("rename-label")
@click.argument("old")
@click.argument("new")
@_no_load
@common_options
def rename_label_command(old: str, new: str, no_load: bool, settings: Settings) -> None:
    """Call the label OLD by the name NEW; no number changes."""
    from patcher.relabelling import rename_label

    _run(settings, no_load, f"{old} is {new} now", lambda server: rename_label(settings.classifier, old, new, server))


@click.command("merge-labels")
@click.argument("labels", nargs=-1, required=True)
@click.option("--into", required=True, metavar="LABEL", help="The label they become; may be one of them.")
@click.option("--max-flips", type=click.FloatRange(0, 1), default=MAX_FLIPS, show_default=True)
@click.option("--min-recall", type=click.FloatRange(0, 1), default=MIN_RECALL, show_default=True)
@click.option("--force", is_flag=True, help="Publish in spite of the gate; the lineage records it for ever.")
@_no_load
@common_options
def merge_labels_command(
    labels: tuple[str, ...],
    into: str,
    max_flips: float,
    min_recall: float,
    force: bool,
    no_load: bool,
    settings: Settings,
) -> None:
    """Make one label of several LABELS, by a row fitted on what the memory keeps of them.

    \b
    patcher merge-labels card_lost card_stolen --into card_gone
    """
    from patcher.relabelling import merge_labels

    def merge(server: Any) -> Change:
        return merge_labels(
            settings.classifier, labels, into, server, max_flips=max_flips, min_recall=min_recall, force=force
        )

    _run(settings, no_load, f"{', '.join(labels)} are {into} now", merge)


def _run(settings: Settings, no_load: bool, what: str, change: Callable[[Any], Change]) -> None:
    with nullcontext() if no_load else settings.server() as server:
        done = change(server)
    settings.emit(done.to_json())
    if not settings.json:
        state = "serves" if done.served else "is published; no server was asked to load it"
        settings.say(f"{what}: version {done.version} of {done.classifier}, {done.labels} labels, {state}")
