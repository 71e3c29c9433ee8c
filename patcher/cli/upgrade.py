"""``patcher upgrade``."""

from __future__ import annotations

import click

from patcher.cli.options import Settings, common_options


@click.command("upgrade")
@common_options
def upgrade_command(settings: Settings) -> None:
    """Give an export of an earlier version the encoder of this one: texts of different lengths then share batches.

    Touches the configurations of the classifier's backbone, and of all classifiers on it; heads, versions, memory and
    lineage stay as they are. A running server goes on as before, and takes it when it is started again.
    """
    from patcher.upgrade import upgrade

    classifier = settings.classifier
    changed = upgrade(classifier)
    settings.emit({"backbone": classifier.backbone, "changed": list(changed)})
    if not settings.json:
        settings.say(
            f"{classifier.encoder_model} stands before {classifier.backbone_model}; a restarted server serves with it"
            if changed
            else f"{classifier.encoder_model} is there already: nothing to do"
        )
