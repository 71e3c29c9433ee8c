"""``patcher classify``."""

from __future__ import annotations

import functools
import shlex
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import FILE, CommonOptions, common_options
from patcher.cli.output import shortened, table
from patcher.cli.values import named_files
from patcher.errors import PatcherError, ServerRefused
from patcher.wording import plural

if TYPE_CHECKING:
    from pathlib import Path

    from patcher.answering import Given
    from patcher.triton.tensors import Answer

_HEADER = ("text", "label", "score", "in scope", "head", "next")
_NEXT = 2


@click.command("classify")
@click.argument("texts", metavar="TEXT...", nargs=-1)
@click.option(
    "--file", "file", type=FILE, help="File of texts: CSV, TSV, JSONL, Parquet, or .txt with one text per line."
)
@common_options("classifier", "server")
def classify_command(texts: tuple[str, ...], file: Path | None, options: CommonOptions) -> None:
    """Classify each TEXT on the server: the best labels with their scores, and the head version that answered.

    A multi-label classifier gives a text all labels with a score above 0.5, perhaps none.

    An empty text is refused as a mistake, although the server answers clients that send one.

    \b
    patcher classify "my card is gone" "where is my parcel"
    patcher classify --file questions.csv --json
    """
    from patcher.answering import give
    from patcher.examples import check_text
    from patcher.examples_file import read_examples

    if texts and file is not None:
        raise click.UsageError("expected either texts or --file FILE, not both")
    if not texts and file is None:
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
            given = give(server, options.address, texts, functools.cache(lambda version: _names(options, version)))
        except ServerRefused:
            if not server.is_ready(options.address):
                options.require_held()  # a name that is in neither place is a mistake
            raise
    if unnamed := sum(each.unnamed > 0 for each in given):
        options.warn(
            f"{plural(unnamed, 'text')} of more labels than an answer names: the others are counted only, as the "
            "version that answered is in no repository here (--repo)"
        )
    if options.json:
        options.emit([_document(each) for each in given])
        return
    several = given[0].several
    header = ("text", "labels", "in scope", "head", "next") if several else _HEADER
    rows = [_several(each) if several else _one(each.answer) for each in given]
    options.say(table(header, rows, right=(2, 3) if several else (2, 3, 4)))


def _names(options: CommonOptions, version: int) -> tuple[str, ...]:
    """All labels of a version; empty if the repository does not hold it, as on a machine that is only a client."""
    try:
        return options.classifier.head(version).labels
    except PatcherError:
        return ()


def _one(answer: Answer) -> tuple[object, ...]:
    scope = "" if answer.in_scope is None else f"{answer.in_scope:.2f}"
    others = ", ".join(_scored(answer)[1 : 1 + _NEXT])
    return shortened(answer.text), answer.labels[0], f"{answer.scores[0]:.3f}", scope, answer.head_version, others


def _several(given: Given) -> tuple[object, ...]:
    """The row of a text of a multi-label classifier: the labels with their scores, and the best of the others."""
    answer, count = given.answer, len(given.labels)
    scope = "" if answer.in_scope is None else f"{answer.in_scope:.2f}"
    scored = _scored(answer)
    labels = [*scored[:count], *given.labels[len(scored) :], *([f"{given.unnamed} more"] if given.unnamed else [])]
    return (
        shortened(answer.text),
        ", ".join(labels) or "none",
        scope,
        answer.head_version,
        ", ".join(scored[count : count + _NEXT]),
    )


def _scored(answer: Answer) -> list[str]:
    return [f"{label} {score:.3f}" for label, score in zip(answer.labels, answer.scores, strict=True)]


def _document(given: Given) -> dict[str, Any]:
    answer = given.answer
    document = {
        "text": answer.text,
        "label": answer.labels[0],
        "score": answer.scores[0],
        "labels": given.labels,
        "head_version": answer.head_version,
        "candidates": [
            {"label": label, "score": score} for label, score in zip(answer.labels, answer.scores, strict=True)
        ],
    }
    return document if answer.in_scope is None else {**document, "in_scope": answer.in_scope}
