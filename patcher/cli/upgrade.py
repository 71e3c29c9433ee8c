"""``patcher upgrade``."""

from __future__ import annotations

import click

from patcher.cli.options import CommonOptions, common_options


@click.command("upgrade")
@click.option(
    "--force", is_flag=True, help="Replace programs that this patcher does not know, such as those of a newer one, too."
)
@common_options("classifier")
def upgrade_command(force: bool, options: CommonOptions) -> None:
    """Update an export made by an earlier version, so that it encodes texts the way this version does.

    That is in batches of similar length, and on a CPU without a round trip to another process. Replaces the programs of
    the classifier's backbone that run inside Triton; exports from before 0.4.0 get an encoder, which is entered in the
    configurations of all classifiers on the backbone. The backbone, heads, versions, memory and lineage do not change.
    A running server uses the new programs after a restart.
    """
    from patcher.upgrade import upgrade

    classifier = options.classifier
    changed = upgrade(classifier, force=force)
    options.emit({"backbone": classifier.backbone_name, "changed": list(changed)})
    if not options.json:
        options.say(
            f"updated {', '.join(changed)}; restart the server to use them"
            if changed
            else f"{classifier.encoder_model} is up to date: nothing to do"
        )
