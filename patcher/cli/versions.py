"""``patcher labels``, ``history``, ``diff``, ``rollback``, ``prune`` and ``sync``: the versions of a head."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from patcher import audit
from patcher.cli.completion import complete_version
from patcher.cli.options import CommonOptions, common_options, eval_option, no_load_option, version_option
from patcher.cli.output import changed_answers, shortened, table
from patcher.cli.switching import tell_switch
from patcher.cli.values import VERSION, WholeNumber
from patcher.errors import InputError, NotServed, PatcherError, ServerError
from patcher.wording import count_and_some, listing, plural

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from patcher.classifier import Classifier
    from patcher.triton.client import TritonServer


_SHOWN = 20
"""Flips that `diff` lists."""


@click.command("labels")
@version_option
@common_options("classifier")
def labels_command(version: int | None, options: CommonOptions) -> None:
    """List the labels of a head version, in the order of its logits."""
    head = options.classifier.head(version)
    document = {
        "classifier": options.classifier.name,
        "version": head.lineage.version,
        "labels": list(head.labels),
    }
    if options.json:
        options.emit(document)
    else:
        options.say("\n".join(head.labels))


@click.command("history")
@common_options("classifier")
def history_command(options: CommonOptions) -> None:
    """Show the lineage of every version: its parent, what it added and how, the gate's verdict, and which serves."""
    from patcher.lifecycle import history

    entries = history(options.classifier)
    if options.json:
        options.emit([entry.to_json() for entry in entries])
        return
    rows = [
        (
            ("* " if entry.serving else "  ") + str(entry.lineage.version),
            entry.lineage.parent or "—",
            entry.lineage.created[:19],
            entry.labels,
            shortened(entry.what(), 80),
            entry.lineage.method,
            entry.lineage.gate,
            entry.lineage.author or "—",
            entry.lineage.data_hash[:12] or "—",
        )
        for entry in entries
    ]
    header = ("version", "parent", "created", "labels", "change", "method", "gate", "by", "data")
    options.say(table(header, rows, right=(3,)))


@click.command("diff")
@click.argument("a", type=VERSION, shell_complete=complete_version)
@click.argument("b", type=VERSION, shell_complete=complete_version)
@eval_option("Labelled file on which to count flips.")
@common_options("classifier")
def diff_command(a: int, b: int, evaluation: Path | None, options: CommonOptions) -> None:
    """Show what changed from version A to version B: labels, rows, and with --eval the answers that flipped."""
    from patcher.difference import diff
    from patcher.examples_file import read_examples

    examples = read_examples(evaluation) if evaluation else None
    difference = diff(options.classifier, a, b, examples)
    if options.json:
        options.emit({"classifier": options.classifier.name, **difference.to_json()})
        return
    options.say(f"version {a} -> {b}: added {count_and_some(difference.added) or 'nothing'}; "
                 f"removed {count_and_some(difference.removed) or 'nothing'}"
        + "".join(f"; {old} renamed to {new}" for old, new in difference.renamed)
        + "".join(f"; {old} merged into {new}" for old, new in difference.merged if a < b))  # fmt: skip
    options.say(
        f"rows of labels in both: {difference.same_rows} identical, {len(difference.changed_rows)} changed"
        + (f" ({listing(difference.changed_rows)})" if difference.changed_rows else "")
    )
    for line in changed_answers(difference, "now"):
        options.say(line)
    if difference.flips:
        rows = [(shortened(flip.text), flip.label, flip.before, flip.after) for flip in difference.flips[:_SHOWN]]
        options.say(table(("text", "label", f"version {a}", f"version {b}"), rows))
        if (more := len(difference.flips) - _SHOWN) > 0:
            options.say(f"and {more} more (--json lists them all)")


@click.command("rollback")
@click.option(
    "--to",
    type=VERSION,
    shell_complete=complete_version,
    help="Version to go to; by default the parent of the one that serves.",
)
@no_load_option("Change the repository only; a server picks the change up when it restarts.")
@common_options("classifier", "server", "control", "rollout")
def rollback_command(to: int | None, no_load: bool, options: CommonOptions) -> None:
    """Go back to an earlier version, immediately and across restarts.

    Nothing is deleted; use --to to go forward again. Scripts should always name the version with --to: two rollbacks
    without it go back two versions.
    """
    from patcher.lifecycle import rollback

    classifier = options.classifier
    with options.server_unless(no_load) as server:
        switch = rollback(classifier, to, server)
    tell_switch(classifier.name, switch, options)


@click.command("prune")
@click.option("--keep", type=WholeNumber(1), required=True, help="How many of the newest versions to keep.")
@click.option("--dry-run", is_flag=True, help="Show what would be deleted; delete nothing.")
@common_options("classifier")
def prune_command(keep: int, dry_run: bool, options: CommonOptions) -> None:
    """Permanently delete old head versions except the newest ones, the serving one, its parent and one on trial.

    A rollback cannot go back to a pruned version; its number is never reused. Earlier names of labels go with the
    versions in which they were renamed or merged: texts with these names then count as wrong.
    """
    from patcher.lifecycle import prune

    classifier = options.classifier
    names = _old_names(classifier)  # read first: they go with their versions
    pruned = prune(classifier, keep, dry_run=dry_run)
    if forgotten := [name for version in pruned for name in names.get(version, ())]:
        told = listing(map(repr, dict.fromkeys(forgotten)))
        options.warn(f"earlier names of labels go with these versions: texts labelled {told} will count as wrong")
    if not dry_run:
        audit.note(versions=list(pruned))
    left = _left(classifier, pruned, options)
    options.emit({"classifier": classifier.name, "pruned": pruned, "versions": left, "dry_run": dry_run})
    if not options.json:
        rest = "" if left is None else f"; {plural(len(left), 'version')} left"
        done = "dry run: would prune" if dry_run else "pruned"
        options.say(f"{done} {', '.join(map(str, pruned)) or 'nothing'}{rest}")


def _old_names(classifier: Classifier) -> dict[int, list[str]]:
    """The labels that each version renamed, or merged into others; a damaged version tells of none."""
    from patcher.lineage import merges

    names = {}
    for version in classifier.versions():
        with contextlib.suppress(PatcherError):
            step = classifier.lineage(version)
            names[version] = [old for old, _ in (*step.renamed, *merges(step))]
    return names


def _left(classifier: Classifier, pruned: Sequence[int], options: CommonOptions) -> tuple[int, ...] | None:
    """The versions without those ``pruned``; None, with a warning, if they cannot be listed: a prune holds anyway."""
    try:
        return tuple(version for version in classifier.versions() if version not in pruned)
    except PatcherError as error:
        options.warn(f"the old versions are deleted, but those that are left could not be listed: {error}")
        return None


@click.command("sync")
@common_options("classifier", "server", "control")
def sync_command(options: CommonOptions) -> int:
    """Make every server in --url serve the pinned version, including servers that were unreachable earlier.

    Covers all classifiers unless --classifier names one. Exits with 1 if any server does not answer or cannot comply,
    or if a classifier's files are damaged; the other classifiers are made to agree all the same.
    """
    from patcher.names import CANARY

    names = options.repository.classifiers() if options.classifier_name is None else ()
    audit.concern(names)
    own = [name for name in names if not name.endswith(CANARY)]  # a trial is synchronised along with its classifier
    with options.server() as server:
        states = {name: _synced(name, server, options) for name in own or [options.classifier.name]}
    found = [(name, url, state) for name, by_url in states.items() for url, state in by_url.items()]
    options.emit([{"classifier": name, "url": url, "state": state} for name, url, state in found])
    if not options.json:
        options.say("\n".join(f"{name}  {url}  {state}" for name, url, state in found))
    return int(any(state not in ("agreed", "caught up") for _, _, state in found))


def _synced(name: str, server: TritonServer, options: CommonOptions) -> dict[str, str]:
    """The result for one classifier by address; ``failed: …`` for all if its files or a change left pending forbid it.

    Raises what concerns the whole repository: Busy and StorageError.
    """
    from patcher.fleet import members
    from patcher.lifecycle import sync

    try:
        return sync(options.repository.classifier(name), server)
    except (InputError, ServerError, NotServed) as error:
        return {member.url: f"failed: {error}" for member in members(server)}
