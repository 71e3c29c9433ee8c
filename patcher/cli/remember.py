"""``patcher remember``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from patcher.cli.options import Settings, common_options
from patcher.cli.output import tell


@click.command("remember")
@click.option(
    "--data",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Labelled file, such as the training data of the fine-tuned model.",
)
@click.option(
    "--memory",
    "kind",
    type=click.Choice(["features", "statistics"]),
    default="features",
    show_default=True,
    help="Keep features of a few texts too, or nothing of any single text.",
)
@click.option("--no-load", is_flag=True, help="Publish without touching a server.")
@common_options
def remember_command(data: Path, kind: str, no_load: bool, settings: Settings) -> None:
    """Build the memory of a classifier from labelled data: what later patches are fitted and judged with.

    Publishes the next head version with the same rows and labels. `patcher export --train FILE` does it from the start.
    Where no fresh texts have set which texts count as out of scope (`export --eval`), those of FILE are taken for texts
    that the model was fine-tuned on, and fresh ones for twice as far away.
    """
    from patcher.examples import read_examples
    from patcher.gate import unremembered
    from patcher.remembering import FEATURES_A_LABEL, remember

    examples = read_examples(data)
    classifier = settings.classifier
    with nullcontext() if no_load else settings.server() as server:
        switch = remember(
            classifier,
            examples,
            server,
            per_label=FEATURES_A_LABEL if kind == "features" else 0,
            progress=settings.progress("texts", len(examples)),
        )
    memory = classifier.memory(switch.version)
    size = memory.size if memory else 0
    settings.emit(
        {"classifier": classifier.name, "version": switch.version, "served": switch.served, "memory_bytes": size}
    )
    if not settings.json:
        state = "serves" if switch.served else "is published; no server was asked to load it"
        settings.say(f"{len(examples)} texts remembered in {size / 1e6:.1f} MB: version {switch.version} {state}")
    head = classifier.head(switch.version)
    if said := unremembered(head.labels, memory):
        tell(f"warning: {said}", err=True)
