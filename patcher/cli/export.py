"""``patcher export``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from patcher.cli.options import (
    FILE,
    allow_pickle_option,
    eval_option,
    memory_option,
    repo_option,
    trust_remote_code_option,
)
from patcher.cli.output import not_installed, tell
from patcher.wording import percent, repeats

if TYPE_CHECKING:
    from pathlib import Path

    from export.report import ExportReport

_CONTRADICTED = 0.5
"""Share of the training texts answered as labelled, below which they may be another model's."""


@click.command("export")
@click.argument("model", metavar="MODEL")
@repo_option
@click.option("--name", default="intent", show_default=True, help="Name of the classifier: what clients call.")
@click.option(
    "--train",
    type=FILE,
    help="Labelled file the model was fine-tuned on: builds the memory that bounds the harm of later patches.",
)
@memory_option
@eval_option(
    "Labelled file that took no part in the fine-tuning: sets which texts count as out of scope, and the "
    "cost of a lower precision is measured on it."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="Of the backbone: int8 for CPUs, fp16 for GPUs.  [default: fp16 with --device gpu, else fp32]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "gpu"]),
    default="cpu",
    show_default=True,
    help="Where Triton runs the backbone; all else stays on the CPU.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    help="Tokens beyond which a text is cut.  [default: what tokenizer and model allow, 2048 at most]",
)
@click.option("--tensorrt", is_flag=True, help="TensorRT runs the backbone on the GPU.")
@click.option("--backbone", metavar="NAME", help="Name of the backbone's models, for several classifiers on one.")
@click.option(
    "--in-store",
    is_flag=True,
    help="The backbone's head store answers for it, and clients ask BACKBONE_any: on the server that `patcher serve` "
    "starts a new version then needs no process of its own. No trials by `canary`.",
)
@trust_remote_code_option
@allow_pickle_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, all else on stderr.")
def export_command(
    model: str,
    repo: Path | str,
    name: str,
    train: Path | None,
    kind: str,
    evaluation: Path | None,
    precision: str | None,
    device: str,
    max_length: int | None,
    tensorrt: bool,
    backbone: str | None,
    in_store: bool,
    trust_remote_code: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Split MODEL, a fine-tuned checkpoint (folder or hub id), into a Triton model repository.

    hf://ID names the hub alone, where an id looks like the name of a folder that is here.

    The backbone is exported once, the head becomes version 1. Before anything appears in the repository, the exported
    files must answer as the checkpoint does; otherwise nothing is written.

    \b
    patcher export my-finetuned-bert --repo model_repository --name intent --train train.csv
    patcher export my-finetuned-bert --repo model_repository --train train.csv --eval val.csv --precision int8
    """
    import json

    from patcher.remembering import FEATURES_A_LABEL

    try:
        from export import run_export
    except ModuleNotFoundError as error:
        raise not_installed("export", error) from error

    report = run_export(
        model,
        repo,
        name=name,
        train=train,
        per_label=FEATURES_A_LABEL if kind == "features" else 0,
        evaluation=evaluation,
        precision=precision,
        device=device,
        max_length=max_length,
        tensorrt=tensorrt,
        backbone=backbone,
        in_store=in_store,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        progress=lambda text: tell(text, err=True),
    )
    _warn(report, train)
    if as_json:
        tell(json.dumps(report.to_json(), indent=2))
    else:
        tell(report.sentence())
        if report.train_repeated:
            tell(f"{train}: {repeats(report.train_repeated)}")
        tell(f"Next: patcher serve --repo {repo}")


def _warn(report: ExportReport, train: Path | None) -> None:
    """A word on what later patches will miss."""
    from patcher.gate import unremembered

    classifier = report.repository.classifier(report.classifier)
    if said := unremembered(report.labels, classifier.memory()):
        tell(f"warning: {said}", err=True)
    if report.train_accuracy is not None and report.train_accuracy < _CONTRADICTED:
        right = percent(report.train_accuracy, 1)
        said = f"only {right} of {train} is answered as labelled; is it this model's training data?"
        tell(f"warning: {said}", err=True)
