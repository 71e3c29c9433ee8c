"""``patcher to-transformers``."""

from __future__ import annotations

from pathlib import Path

import click

from patcher.cli.options import (
    CommonOptions,
    allow_pickle_option,
    common_options,
    trust_remote_code_option,
    version_option,
)
from patcher.cli.output import not_installed
from patcher.wording import percent


@click.command("to-transformers")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    metavar="MODEL",
    help="Checkpoint that the classifier was exported from.  [default: where the export found it]",
)
@version_option
@allow_pickle_option
@trust_remote_code_option
@common_options("classifier")
def to_transformers_command(
    folder: Path,
    checkpoint: str | None,
    version: int | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    options: CommonOptions,
) -> None:
    """Write the checkpoint to FOLDER with the labels and rows of the head, to fine-tune further or use without Triton.

    A checkpoint has one linear layer on the classifier features. Fine-tuned rows are written back unchanged. Patched
    rows use more features than that layer has, so they are refitted on the classifier features, from the memory.

    \b
    patcher to-transformers my-bert-with-new-labels
    patcher to-transformers my-bert-with-new-labels --checkpoint my-finetuned-bert
    """
    try:
        from export import to_transformers

        made = to_transformers(
            options.classifier,
            checkpoint,
            folder,
            version,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
    except ModuleNotFoundError as error:
        raise not_installed("to-transformers", error) from error
    options.emit({**vars(made), "folder": str(made.folder), "refitted": list(made.refitted)})
    if not options.json:
        options.say(f"{made.folder}: version {made.version} with {made.labels} labels")
        if made.refitted:
            options.say(f"refitted on the classifier features alone: {', '.join(made.refitted)}")
        if made.agreement is not None:
            options.say(
                f"{percent(made.agreement)} of the remembered inputs get the same answer as from the served head"
            )
