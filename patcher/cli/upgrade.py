"""``patcher upgrade``."""

from __future__ import annotations

import click

from patcher.cli.options import CommonOptions, common_options


@click.command("upgrade")
@common_options
def upgrade_command(options: CommonOptions) -> None:
    """Have an export of an earlier version encode texts as this one does.

    That is in batches of like length, and on a CPU without a way to another process and back. Renews the programs of
    the classifier's backbone that run inside Triton; exports before 0.4.0 get an encoder, and the configurations of all
    classifiers on the backbone name it. The backbone, heads, versions, memory and lineage stay as they are. A running
    server goes on as before, and takes it when it is started again.
    """
    from patcher.upgrade import upgrade

    classifier = options.classifier
    changed = upgrade(classifier)
    options.emit({"backbone": classifier.backbone, "changed": list(changed)})
    if not options.json:
        options.say(
            f"{', '.join(changed)}: as this version has them; a server serves with them when it is started again"
            if changed
            else f"{classifier.encoder_model} is of this version already: nothing to do"
        )
