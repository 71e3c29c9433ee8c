"""``patcher upgrade``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patcher import audit
from patcher.cli.options import CommonOptions, common_options

if TYPE_CHECKING:
    from patcher.backbone import Backbone


@click.command("upgrade")
@click.option("--backbone", "backbone_name", metavar="NAME", help="The backbone to update; by default all of them.")
@click.option("--dry-run", is_flag=True, help="Say what would change; change nothing.")
@click.option(
    "--force", is_flag=True, help="Replace programs that this patcher does not know, such as those of a newer one, too."
)
@common_options()
def upgrade_command(backbone_name: str | None, dry_run: bool, force: bool, options: CommonOptions) -> None:
    """Update an export made by an earlier version, so that it encodes texts the way this version does.

    That is in batches of similar length, and on a CPU without a round trip to another process. Replaces each backbone's
    programs that run inside Triton; exports from before 0.4.0 get an encoder, which is entered in the configurations of
    all classifiers on the backbone. The backbone, heads, versions, memory and lineage do not change. A running server
    uses the new programs after a restart.

    Upgrade every server and every patcher that uses the repository first, and run this last: it may raise the
    repository's format. Older patchers then refuse the repository, and so does an older `patcher serve` at its next
    start. To be able to go back, copy the repository beforehand.
    """
    from patcher.files import FORMAT
    from patcher.upgrade import is_quantized, lacks_encoder, planned, upgrade

    backbones = _backbones(options, backbone_name)
    audit.note(backbones=[backbone.backbone_name for backbone in backbones])
    # Planned for all backbones first: if one is refused, none is changed.
    changed = [model for backbone in backbones for model in planned(backbone, force=force)]
    before = options.repository.format
    encoders = [backbone for backbone in backbones if lacks_encoder(backbone)]
    after = FORMAT if encoders else before
    quantized = [backbone.backbone_model for backbone in encoders if is_quantized(backbone)]
    if not dry_run:
        changed = [model for backbone in backbones for model in upgrade(backbone, force=force)]
    names = [backbone.backbone_name for backbone in backbones]
    options.emit(
        {
            "backbone": names[0] if len(names) == 1 else None,
            "backbones": names,
            "changed": changed,
            "quantized": quantized,
            "format_before": before,
            "format": after,
            "dry_run": dry_run,
        }
    )
    if options.json:
        return
    if not changed:
        options.say(f"{', '.join(names) or 'a repository without a backbone'}: up to date, nothing to do")
        return
    models = ", ".join(changed)
    options.say(f"would update {models}" if dry_run else f"updated {models}; restart the server to use them")
    if after > before:
        options.say(_raised(after, dry_run))
    if quantized:
        options.say(
            f"{', '.join(quantized)}: in INT8 a text's scores shift slightly with the texts that share its batch, and "
            "an encoder forms other batches, so some answers may change (in FP32 they stay, within rounding)"
        )


def _raised(number: int, dry_run: bool) -> str:
    """The notice that older patchers cannot read the repository's new format."""
    from patcher.files import FORMAT_SINCE

    if dry_run:
        return f"would raise the repository's format to {number}: patchers before {FORMAT_SINCE} would not read it"
    return f"the repository has format {number} now: patchers before {FORMAT_SINCE} no longer read it"


def _backbones(options: CommonOptions, name: str | None) -> list[Backbone]:
    """The backbone called ``name``, or else that of ``--classifier``, or else all backbones."""
    repository = options.repository
    if name is None and options.classifier_name is not None:
        name = options.classifier.backbone_name
    return [repository.backbone(each) for each in (repository.backbones() if name is None else (name,))]
