"""``patcher export``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from patcher import audit
from patcher.cli.options import (
    FILE,
    allow_pickle_option,
    eval_option,
    memory_option,
    repo_option,
    trust_remote_code_option,
)
from patcher.cli.output import not_installed, tell
from patcher.cli.values import WholeNumber
from patcher.wording import repeats

if TYPE_CHECKING:
    from pathlib import Path

    from export.report import ExportReport


@click.command("export")
@click.argument("model", metavar="MODEL")
@repo_option
@click.option("--name", default="intent", show_default=True, help="Name of the classifier, which clients call.")
@click.option(
    "--train",
    type=FILE,
    help="Labelled file that the model was fine-tuned on; builds the memory, which bounds the harm of later patches.",
)
@memory_option
@eval_option(
    "Labelled file that was not used in the fine-tuning; sets which texts count as out of scope, and measures the "
    "cost of a lower precision."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="Precision of the backbone: int8 for CPUs, fp16 for GPUs.  [default: fp16 with --device gpu, else fp32]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "gpu"]),
    default="cpu",
    show_default=True,
    help="Where Triton runs the backbone; everything else stays on the CPU.",
)
@click.option(
    "--max-length",
    type=WholeNumber(1),
    help="Truncate texts after this many tokens.  [default: what the tokenizer and the model allow, at most 2048]",
)
@click.option("--tensorrt", is_flag=True, help="Run the backbone with TensorRT on the GPU.")
@click.option("--backbone", metavar="NAME", help="Name for the backbone's models, to share it between classifiers.")
@click.option(
    "--in-store",
    is_flag=True,
    help="Serve it from the backbone's head store; clients call BACKBONE_any. On a server started by `patcher serve`, "
    "a new version then needs no process of its own. `canary` is not available.",
)
@trust_remote_code_option
@allow_pickle_option
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document to stdout and everything else to stderr."
)
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
    """Turn MODEL, a fine-tuned checkpoint (folder or hub id), into a Triton model repository.

    hf://ID always means the hub, even if a local folder has the name ID.

    The backbone is exported once; the head becomes version 1. Nothing is written unless the exported files give the
    same answers as the checkpoint.

    \b
    patcher export my-finetuned-bert --repo model_repository --name intent --train train.csv
    patcher export my-finetuned-bert --repo model_repository --train train.csv --eval val.csv --precision int8
    """
    import json

    from patcher.remembering import FEATURES_A_LABEL

    try:
        from export import run_export

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
    except ModuleNotFoundError as error:  # only now, since torch is imported after all checks that do not need it
        raise not_installed("export", error) from error
    audit.warn(*report.warnings)
    for said in report.warnings:
        tell(f"warning: {said}", err=True)
    if as_json:
        tell(json.dumps(report.to_json(), indent=2))
    else:
        _show(report, train)


def _show(report: ExportReport, train: Path | None) -> None:
    tell(report.sentence())
    if report.train_repeated:
        tell(f"{train}: {repeats(report.train_repeated)}")
    tell(f"Next: patcher serve --repo {shlex.quote(str(report.repository.location))}")
