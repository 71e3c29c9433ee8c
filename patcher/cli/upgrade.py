"""``patcher upgrade``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patcher.cli.options import CommonOptions, common_options

if TYPE_CHECKING:
    from patcher.backbone import Backbone


@click.command("upgrade")
@click.option("--backbone", "backbone_name", metavar="NAME", help="The backbone to update; by default all of them.")
@click.option(
    "--force", is_flag=True, help="Replace programs that this patcher does not know, such as those of a newer one, too."
)
@common_options()
def upgrade_command(backbone_name: str | None, force: bool, options: CommonOptions) -> None:
    """Update an export made by an earlier version, so that it encodes texts the way this version does.

    That is in batches of similar length, and on a CPU without a round trip to another process. Replaces the programs of
    each backbone that run inside Triton; exports from before 0.4.0 get an encoder, which is entered in the
    configurations of all classifiers on the backbone. The backbone, heads, versions, memory and lineage do not change.
    A running server uses the new programs after a restart.
    """
    from patcher.upgrade import planned, upgrade

    backbones = _backbones(options, backbone_name)
    for backbone in backbones:  # what refuses one of them leaves all as they are
        planned(backbone, force=force)
    changed = [model for backbone in backbones for model in upgrade(backbone, force=force)]
    names = [backbone.backbone_name for backbone in backbones]
    options.emit({"backbone": names[0] if len(names) == 1 else None, "backbones": names, "changed": changed})
    if not options.json:
        options.say(
            f"updated {', '.join(changed)}; restart the server to use them"
            if changed
            else f"{', '.join(names) or 'a repository without a backbone'}: up to date, nothing to do"
        )


def _backbones(options: CommonOptions, name: str | None) -> list[Backbone]:
    """The backbone of that name, or else that of ``--classifier``, or else all that there are."""
    repository = options.repository
    if name is None and options.classifier_name is not None:
        name = options.classifier.backbone_name
    return [repository.backbone(each) for each in (repository.backbones() if name is None else (name,))]
