"""Output for people: tables, short figures, what to install."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

from patcher.errors import ToolError
from patcher.wording import install_hint, listing, percent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from patcher.difference import Difference
    from patcher.gate import Verdict

__all__ = [
    "changed_answers",
    "counted_as",
    "gate_lines",
    "not_installed",
    "seconds",
    "shortened",
    "table",
    "tell",
    "unwritten",
]

_unwritten: list[str] = []


def tell(text: str = "", *, err: bool = False) -> None:
    """Print a line; a failure to write ends no work. One of stdout (a full disk) is kept for :func:`unwritten`."""
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # the process was started with the stream closed (`>&-`), as some daemons are
        return
    text = _printable(text)
    try:
        stream.write(text.encode(stream.encoding or "utf-8", "replace").decode(stream.encoding or "utf-8") + "\n")
        stream.flush()
    except OSError as error:
        if not err and error.errno != errno.EPIPE:  # EPIPE: the reader has read enough, as in `| head`
            _unwritten.append(error.strerror or str(error))
        # Otherwise Python would fail again when it flushes the stream at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def unwritten() -> str:
    """Why stdout could not be written since the last call; empty if all was written, or its reader had ended."""
    reasons = "; ".join(dict.fromkeys(_unwritten))
    _unwritten.clear()
    return reasons


def _printable(text: str, kept: str = "\n") -> str:
    """Escape characters that would move a terminal's cursor or change colour or text direction, as in ``\\x1b``."""
    if text.isprintable():
        return text
    # In several languages, joiners are part of words and affect how they look. Surrogates are replaced on encoding.
    kept += "\t\u200c\u200d\xa0\u3000"
    return "".join(
        each
        if each.isprintable() or each in kept or "\ud800" <= each <= "\udfff"
        else each.encode("unicode_escape").decode()
        for each in text
    )


def not_installed(verb: str, error: ModuleNotFoundError) -> ToolError:
    """The error if the packages for exports cannot be imported; transformers does not name those that it lacks."""
    what = f"{error.name}, which is not installed" if error.name else f"packages that do not load ({error})"
    return ToolError(f"`patcher {verb}` needs {what}: {install_hint('export')}")


def changed_answers(difference: Difference, then: str) -> Iterator[str]:
    """Lines on how the answers to labelled texts differ; ``then`` names the other version, as in "now"."""
    if difference.flips is None or difference.gains is None:
        return
    lost, gained = len(difference.flips), len(difference.gains)
    yield (
        f"of {difference.examples} texts: {lost} right before and wrong {then} "
        f"({percent(lost / difference.examples)}), {gained} wrong before and right {then}"
    )
    yield from counted_as("merged", difference.merged)
    if difference.unknown:
        yield f"texts with a label that neither version knows: {difference.unknown}"


def counted_as(how: str, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Lines on texts whose label counts as another; ``how`` it became that one: "renamed" or "merged"."""
    for into in dict.fromkeys(new for _, new in pairs):
        yield f"{how} labels: texts labelled {listing(old for old, new in pairs if new == into)} count as {into}"


def gate_lines(verdict: Verdict, gate: str) -> Iterator[str]:
    """What the gate said, and the advice."""
    yield f"gate      {verdict.sentence}" + (" Published anyway because of --force." if gate == "forced" else "")
    for line in (*verdict.reasons, *verdict.advice):
        yield f"          {line}"


def seconds(duration: float) -> str:
    """``0.1234`` as ``0.12 s``."""
    return f"{duration:.2f} s"


def shortened(text: str, width: int = 60) -> str:
    """Shorten a text, since a single long one would widen the whole table; --json has it in full."""
    return text if len(text) <= width else f"{text[: width - 2]} …"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> str:
    """Columns padded to their widest cell; those whose index is in ``right`` align to the right."""
    cells = [[_printable(str(cell), "") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
