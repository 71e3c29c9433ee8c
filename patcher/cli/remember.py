"""``patcher remember``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patcher.cli.options import FILE, CommonOptions, common_options, memory_option, no_load_option
from patcher.wording import repeats

if TYPE_CHECKING:
    from pathlib import Path


@click.command("remember")
@click.option(
    "--data",
    type=FILE,
    required=True,
    help="Labelled file, such as the training data of the fine-tuned model.",
)
@memory_option
@no_load_option()
@common_options("classifier", "server", "control", "rollout")
def remember_command(data: Path, kind: str, no_load: bool, options: CommonOptions) -> None:
    """Build a classifier's memory from labelled data; later patches are fitted and judged with it.

    Publishes the next head version with the same rows and labels. `patcher export --train FILE` does this at export.
    The memory of labels that do not occur in FILE does not change.

    Unless `export --eval` has set which texts count as out of scope, FILE is assumed to contain the texts that the
    model was fine-tuned on, and fresh texts are assumed to lie twice as far away.
    """
    from patcher.examples_file import read_examples
    from patcher.remembering import FEATURES_A_LABEL, remember

    examples = read_examples(data)
    classifier = options.classifier
    with options.server_unless(no_load) as server:
        switch = remember(
            classifier,
            examples,
            server,
            per_label=FEATURES_A_LABEL if kind == "features" else 0,
            progress=options.progress(len(examples)),
        )
    # The switch holds: what is told of it is not read back from the repository, which could fail.
    options.warn(*switch.notes, *switch.warnings)
    options.emit(
        {
            "classifier": classifier.name,
            "version": switch.version,
            "served": switch.served,
            "memory_bytes": switch.memory_bytes,
            "texts": switch.texts,
            "repeated": switch.repeated,
            "warnings": switch.warnings,
        }
    )
    if not options.json:
        state = "now serves" if switch.served else "is published; no server was asked to load it"
        options.say(
            f"{switch.texts} texts remembered in {switch.memory_bytes / 1e6:.1f} MB: version {switch.version} {state}"
        )
        if switch.repeated:
            options.say(repeats(switch.repeated))
