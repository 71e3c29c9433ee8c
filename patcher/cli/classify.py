"""``patcher classify``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import FILE, CommonOptions, common_options
from patcher.cli.output import shortened, table
from patcher.cli.values import named_files
from patcher.errors import ServerRefused

if TYPE_CHECKING:
    from pathlib import Path

    from patcher.triton.tensors import Answer


@click.command("classify")
@click.argument("texts", metavar="TEXT...", nargs=-1)
@click.option(
    "--file", "file", type=FILE, help="File of texts: CSV, TSV, JSONL, Parquet, or .txt with one text per line."
)
@common_options("classifier", "server")
def classify_command(texts: tuple[str, ...], file: Path | None, options: CommonOptions) -> None:
    """Classify each TEXT on the server: the best labels with their scores, and the head version that answered.

    An empty text is refused as a mistake, although the server answers clients that send one.

    \b
    patcher classify "my card is gone" "where is my parcel"
    patcher classify --file questions.csv --json
    """
    from patcher.examples import check_text
    from patcher.examples_file import read_examples

    if bool(texts) == (file is not None):
        raise click.UsageError("expected texts, or --file FILE with texts")
    if file is not None:
        texts = read_examples(file).texts
    else:
        texts = tuple(check_text(text, f"text {number}") for number, text in enumerate(texts, 1))
        if named_files(texts):  # a warning, since a text may be any word
            inside = shlex.join(["patcher", "classify", "--file", texts[0]])
            options.warn(f"classifying {texts[0]!r} as a text, the name of a file; for those in it: `{inside}`")
    with options.server() as server:
        try:
            answers = server.classify(options.address, texts, logits=False)
        except ServerRefused:
            if not server.is_ready(options.address):
                options.require_held()  # a name that is in neither place is a mistake
            raise
    if options.json:
        options.emit([_document(answer) for answer in answers])
        return
    rows = [
        (
            shortened(answer.text),
            answer.labels[0],
            f"{answer.scores[0]:.3f}",
            "" if answer.in_scope is None else f"{answer.in_scope:.2f}",
            answer.head_version,
            ", ".join(
                f"{label} {score:.3f}" for label, score in zip(answer.labels[1:3], answer.scores[1:3], strict=True)
            ),
        )
        for answer in answers
    ]
    options.say(table(("text", "label", "score", "in scope", "head", "next"), rows, right=(2, 3, 4)))


def _document(answer: Answer) -> dict[str, Any]:
    document = {
        "text": answer.text,
        "label": answer.labels[0],
        "score": answer.scores[0],
        "head_version": answer.head_version,
        "candidates": [
            {"label": label, "score": score} for label, score in zip(answer.labels, answer.scores, strict=True)
        ],
    }
    return document if answer.in_scope is None else {**document, "in_scope": answer.in_scope}
