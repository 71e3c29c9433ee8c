"""``patcher labels``, ``history``, ``diff``, ``rollback``, ``prune`` and ``sync``: the versions of a head."""

from __future__ import annotations

from pathlib import Path

import click

from patcher import audit
from patcher.cli.options import Settings, common_options
from patcher.cli.output import percent, table


@click.command("labels")
@click.option("--version", type=click.IntRange(1), help="The serving one by default.")
@common_options
def labels_command(version: int | None, settings: Settings) -> None:
    """List the labels of a head version, in the order of its logits."""
    head = settings.classifier.head(version)
    document = {
        "classifier": settings.classifier.name,
        "version": head.lineage.version,
        "labels": list(head.labels),
    }
    if settings.json:
        settings.emit(document)
    else:
        settings.say("\n".join(head.labels))


@click.command("history")
@common_options
def history_command(settings: Settings) -> None:
    """Show the lineage: each version, its parent, what it added, by which method, what the gate said, which serves."""
    from patcher.lifecycle import history

    entries = history(settings.classifier)
    if settings.json:
        settings.emit([entry.to_json() for entry in entries])
        return
    rows = [
        (
            ("* " if entry.serving else "  ") + str(entry.lineage.version),
            entry.lineage.parent or "—",
            entry.lineage.created[:19],
            entry.labels,
            entry.what(),
            entry.lineage.method,
            entry.lineage.gate,
            entry.lineage.author or "—",
            entry.lineage.data_hash[:12] or "—",
        )
        for entry in entries
    ]
    header = ("version", "parent", "created", "labels", "change", "method", "gate", "by", "data")
    settings.say(table(header, rows, right=(3,)))


@click.command("diff")
@click.argument("a", type=click.IntRange(1))
@click.argument("b", type=click.IntRange(1))
@click.option(
    "--eval", "evaluation", type=click.Path(path_type=Path, dir_okay=False), help="Labelled file: counts the flips too."
)
@common_options
def diff_command(a: int, b: int, evaluation: Path | None, settings: Settings) -> None:
    """Show what changed from version A to version B: labels, rows, and with --eval every answer that flipped."""
    from patcher.difference import diff
    from patcher.examples import read_examples

    examples = read_examples(evaluation) if evaluation else None
    difference = diff(settings.classifier, a, b, examples)
    if settings.json:
        settings.emit(difference.to_json())
        return
    settings.say(f"version {a} -> {b}: added {', '.join(difference.added) or 'nothing'}; "
                 f"removed {', '.join(difference.removed) or 'nothing'}"
        + "".join(f"; {old} is {new} now" for old, new in difference.renamed))  # fmt: skip
    settings.say(
        f"rows of labels in both: {difference.same_rows} the same to the bit, {len(difference.changed_rows)} changed"
        + (f" ({', '.join(difference.changed_rows[:5])} …)" if difference.changed_rows else "")
    )
    if difference.flips is not None and difference.gains is not None:
        settings.say(
            f"of {difference.examples} texts: {len(difference.flips)} right before and wrong now "
            f"({percent(len(difference.flips) / difference.examples)}), "
            f"{len(difference.gains)} wrong before and right now"
        )
        if difference.unknown:
            settings.say(f"texts with a label that neither version knows: {difference.unknown}")
        if difference.flips:
            rows = [(flip.text[:60], flip.label, flip.before, flip.after) for flip in difference.flips[:20]]
            settings.say(table(("text", "label", f"version {a}", f"version {b}"), rows))


@click.command("rollback")
@click.option("--to", type=click.IntRange(1), help="Version to go to; the serving one's parent by default.")
@click.option("--no-load", is_flag=True, help="Change the repository only; a server learns of it when it restarts.")
@common_options
def rollback_command(to: int | None, no_load: bool, settings: Settings) -> None:
    """Make an earlier version serve again: at once, and after a restart.

    Nothing is deleted: the same verb with --to goes forward again.
    """
    from patcher.lifecycle import rollback

    classifier = settings.classifier
    if no_load:
        switch = rollback(classifier, to)
    else:
        with settings.server() as server:
            switch = rollback(classifier, to, server)
    audit.note(classifier=classifier.name, version=switch.version, previous=switch.previous)
    settings.emit(
        {
            "classifier": classifier.name,
            "version": switch.version,
            "previous": switch.previous,
            "served": switch.served,
        }
    )
    if not settings.json:
        state = "serves" if switch.served else "is pinned (no server was asked)"
        settings.say(f"version {switch.version} of {classifier.name} {state}; before it was {switch.previous}")


@click.command("prune")
@click.option("--keep", type=click.IntRange(1), required=True, help="So many of the newest versions stay.")
@common_options
def prune_command(keep: int, settings: Settings) -> None:
    """Delete old head versions for good, but for the newest ones, the serving one and its parent.

    A rollback cannot go back to a pruned version; its number is never given again.
    """
    from patcher.lifecycle import prune

    classifier = settings.classifier
    pruned = prune(classifier, keep)
    audit.note(classifier=classifier.name, versions=list(pruned))
    settings.emit({"classifier": classifier.name, "pruned": list(pruned), "versions": list(classifier.versions())})
    if not settings.json:
        settings.say(f"pruned {', '.join(map(str, pruned)) or 'nothing'}; {len(classifier.versions())} versions left")


@click.command("sync")
@common_options
def sync_command(settings: Settings) -> int:
    """Have every server of --url serve the version that is pinned in the repository, those that were away too.

    Of every classifier, or of that of --classifier.

    Ends with 1 where one of them does not answer, or will not.
    """
    from patcher.lifecycle import sync

    names = settings.repository.classifiers() if settings.classifier_name is None else ()
    classifiers = [settings.repository.classifier(name) for name in names] or [settings.classifier]
    with settings.server() as server:
        found = [(each.name, url, state) for each in classifiers for url, state in sync(each, server).items()]
    settings.emit([{"classifier": name, "url": url, "state": state} for name, url, state in found])
    if not settings.json:
        settings.say("\n".join(f"{name}  {url}  {state}" for name, url, state in found))
    return int(any(state not in ("agreed", "caught up") for _, _, state in found))
