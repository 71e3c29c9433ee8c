"""Files of labelled texts: CSV, TSV, JSON lines, Parquet and plain text lines, read strictly.

A wrong example becomes a wrong row in production, so the readers neither guess nor drop anything: a line that cannot be
used is an error, which names its number.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import io
import json
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from patcher.arguments import require
from patcher.errors import ExamplesError, ToolError
from patcher.examples import LABEL_COLUMNS, LABEL_NAME_COLUMNS, TEXT_COLUMNS, Examples, is_whole_number
from patcher.wording import install_hint, listing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import TypeAlias

    ExamplesLike: TypeAlias = Examples | str | os.PathLike[str]

__all__ = ["as_examples", "read_examples"]

MAX_FILE_BYTES = 1 << 30
"""Files are read into memory whole."""
_PARQUET_ROWS = 256
MAX_EXAMPLES = 1_000_000
"""Maximum number of texts in one file: more than any fine-tuning set has. Their features take ten minutes."""
_KINDS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_KINDS[".txt"] = "lines"
_HINTS = dict.fromkeys((".xlsx", ".xls", ".ods"), ": save the spreadsheet as CSV, in UTF-8")
_HINTS.update(dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip"), ": unpack it first (`gunzip FILE` for .gz)"))
_HINTS[".json"] = ": write one object per line, and end the name in .jsonl"
_ENDINGS = ", ".join(_KINDS)
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_LONGEST_FIELD = 64 << 20
_ONE_AT_A_TIME = threading.Lock()


class _Record(NamedTuple):
    """One text of a file, and ``others``, the names of all columns but those of texts and labels.

    ``label`` is None without a label column, ``name`` without another column of the labels' names.
    """

    line: int
    others: tuple[str, ...]
    text: Any
    label: Any = None
    name: Any = None


class _Columns(NamedTuple):
    text: str
    label: str | None
    name: str | None
    """The column of the label's name, which counts if ``label`` holds ids."""
    others: tuple[str, ...]

    @property
    def read(self) -> tuple[str, str | None, str | None]:
        """All that are read, in the order of a record's fields."""
        return self.text, self.label, self.name


def as_examples(given: ExamplesLike, name: str) -> Examples:
    """Return examples as they are, or read the labelled file at a path; ``name`` is the argument's name for messages.

    Raises ExamplesError if there are no examples, and the errors of ``read_examples``.
    """
    require(Examples, str, os.PathLike, **{name: given})
    examples = given if isinstance(given, Examples) else read_examples(given)
    if not examples:
        raise ExamplesError(f"{examples.source} holds no examples; expected at least one")
    return examples


def read_examples(path: str | os.PathLike[str]) -> Examples:
    """Read a labelled file in the format of its extension: .csv, .tsv, .jsonl, .parquet, or .txt with a text per line.

    Raises
    ------
    ExamplesError
        for anything that cannot be used, with its line: a missing file, no text column, a misspelt label column, an
        unclosed quote, a row with missing fields, an empty text, a NUL byte, bytes that are not UTF-8.
    ToolError
        for Parquet without pyarrow.
    """
    require(str, os.PathLike, path=path)
    path = Path(path)
    _check_size(path)
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        hint = _HINTS.get(path.suffix.lower(), "")
        got = f"cannot read the ending {path.suffix!r}" if path.suffix else "the name has no ending"
        raise ExamplesError(f"{path}: {got}; expected {_ENDINGS}{hint}")
    if kind == "parquet":
        records = _parquet(path)
    else:
        content = _content(path)
        records = {"csv": _csv, "tsv": _tsv, "jsonl": _jsonl, "lines": _lines}[kind](content, path)
    with _long_fields() if kind in ("csv", "tsv") else contextlib.nullcontext():
        return _gathered(records, path)


def _gathered(records: Iterator[_Record], path: Path) -> Examples:
    texts: list[str] = []
    labels: list[Any] = []
    lines: list[int] = []
    label_names: list[Any] = []
    unread: dict[str, None] = {}
    for line, others, text, label, name in records:
        where = f"{path}, line {line}"
        if len(texts) == MAX_EXAMPLES:
            raise ExamplesError(f"{where}: more than {MAX_EXAMPLES:,} examples; give a sample, or split the file")
        if labels and label is None:
            raise ExamplesError(f"{where}: no label, although earlier lines have one")
        if texts and not labels and label is not None:
            raise ExamplesError(f"{path}, line {lines[0]}: no label, although line {line} has one")
        texts.append(text)
        lines.append(line)
        if label is not None:
            labels.append(label)
        label_names.append(name)
        unread.update(dict.fromkeys(others))
    if not texts:
        raise ExamplesError(f"{path} holds no examples; expected a header and at least one line")
    if any(name is not None for name in label_names) and all(map(is_whole_number, labels)):
        if None in label_names:
            row = label_names.index(None)
            raise ExamplesError(
                f"{path}, line {lines[row]}: no name for the label {labels[row]}, although other lines have one; "
                "expected one on each line, or a file without that column"
            )
        labels = label_names
        unread = {column: None for column in unread if _column([column], LABEL_NAME_COLUMNS) is None}
    return Examples(tuple(texts), tuple(labels) or None, str(path), tuple(lines), tuple(unread))


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Let the csv module read long fields. Its limit is the whole process's, so it is put back afterwards."""
    with _ONE_AT_A_TIME:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, _LONGEST_FIELD))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _check_size(path: Path) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise ExamplesError(f"cannot read {path}: {error.strerror or error}") from error
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):
        raise ExamplesError(
            f"{path} is no regular file; expected a file that ends in {_ENDINGS}: write what a pipe holds into one"
        )
    if not size:
        raise ExamplesError(f"{path} is empty; expected a header and at least one line")
    if size > MAX_FILE_BYTES:
        raise ExamplesError(f"{path} has {size:,} bytes; expected at most {MAX_FILE_BYTES:,}: split the file")


def _content(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ExamplesError(f"cannot read {path}: {error.strerror or error}") from error
    if data.startswith(b"PK\x03\x04"):
        raise ExamplesError(f"{path} is an Excel file or another archive, whatever its name; save it as CSV, in UTF-8")
    if data.startswith(b"\x1f\x8b"):
        raise ExamplesError(f"{path} is compressed (gzip), whatever its name; unpack it first (`gunzip < FILE > NEW`)")
    start = data[:1000]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 3 * start.count(0) > len(start):
        raise ExamplesError(
            f"{path} seems to be in UTF-16; save it as UTF-8 (in Excel as CSV UTF-8; or `iconv -f UTF-16 -t UTF-8 FILE "
            "> NEW`)"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ExamplesError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _column(names: Sequence[str], known: Sequence[str]) -> str | None:
    by_lower = {name.strip().lower(): name for name in names}
    return next((by_lower[name] for name in known if name in by_lower), None)


def _columns(names: Sequence[str], where: Path | str, hint: str = "") -> _Columns:
    text = _column(names, TEXT_COLUMNS)
    if text is None:
        found = listing((repr(name[:60]) for name in names), 8)
        raise ExamplesError(
            f"{where} has no text column: found {found}; expected one named {', '.join(TEXT_COLUMNS[:-1])}{hint}"
        )
    label, name = _column(names, LABEL_COLUMNS), _column(names, LABEL_NAME_COLUMNS)
    if name == label:
        name = None
    for chosen in filter(None, (text, label, name)):
        same = [each for each in names if each.strip().lower() == chosen.strip().lower()]
        if len(same) > 1:
            raise ExamplesError(
                f"{where} has {len(same)} columns of the same name, {listing(map(repr, same))}; expected one: rename "
                "or remove the others"
            )
    others = tuple(each for each in names if each not in (text, label))
    if label is None:
        _refuse_misspelt(others, where)
    return _Columns(text, label, name, others)


def _refuse_misspelt(names: Sequence[str], where: Path | str) -> None:
    # If a label column went unrecognized, its texts would have no labels, and all would be taken for one label's.
    for name in names:
        written = name.strip().lower()
        near = difflib.get_close_matches(written, LABEL_COLUMNS, 1, 0.8)
        if near and abs(len(written) - len(near[0])) <= 1:
            raise ExamplesError(f"{where} has a column {name!r}; did you mean {near[0]!r}? Rename or remove it")


def _header_hint(names: Sequence[str], delimiter: str) -> str:
    """A hint on what may be wrong with a header that names no text column; empty if nothing is apparent."""
    if names and names[0].lower().startswith("sep="):
        return ". Its first line, which tells Excel the separator, is no header: remove it"
    for other, called in _DELIMITERS.items():
        parts = [part for name in names for part in name.split(other)]
        if other != delimiter and len(parts) > len(names) and _column(parts, TEXT_COLUMNS):
            instead = f"use {_DELIMITERS[delimiter]}" + (", or end the name in .tsv" if other == "\t" else "")
            return f". Its columns are separated by {called}: {instead}"
    if any(" " in name.strip() for name in names):
        return ". Is the line with the column names missing?"
    return ""


def _csv(content: str, path: Path, delimiter: str = ",") -> Iterator[_Record]:
    if "\0" in content:
        line = content[: content.index("\0")].count("\n") + 1
        raise ExamplesError(f"{path}, line {line}: a NUL byte; is the file a text file in UTF-8?")
    # With a space after each comma, as in ``text, label``, quotes would not count as such.
    spaced = f"{delimiter} " in content[: content.find("\n")]
    rows = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=spaced, strict=True)
    try:
        names = next(rows, [])
        columns = _columns(names, path, _header_hint(names, delimiter))
        places = [None if column is None else names.index(column) for column in columns.read]
        before = rows.line_num
        for row in rows:
            line, before = before + 1, rows.line_num
            if not row:
                continue
            if len(row) != len(names):
                raise ExamplesError(
                    f"{path}, line {line}: {len(row)} fields, expected {len(names)} ({delimiter.join(names)}); "
                    "is the file cut off, or a quote missing?"
                )
            if row == names:
                raise ExamplesError(f"{path}, line {line}: the line with the column names again; was a file appended?")
            yield _Record(line, columns.others, *(None if at is None else row[at] for at in places))
    except csv.Error as error:
        raise ExamplesError(f"{path}, line {rows.line_num}: {error}; is the file cut off inside quotes?") from error


def _tsv(content: str, path: Path) -> Iterator[_Record]:
    return _csv(content, path, "\t")


def _jsonl(content: str, path: Path) -> Iterator[_Record]:
    columns: dict[tuple[str, ...], _Columns] = {}  # most lines have the same fields
    hint = ", not a list of them (`jq -c '.[]' FILE` writes that)" if content[:100].lstrip().startswith("[") else ""
    for line, row in enumerate(content.split("\n"), 1):
        if not row.strip():
            continue
        try:
            record = json.loads(row, object_pairs_hook=_once_each)
        except ExamplesError as error:
            raise ExamplesError(f"{path}, line {line}: {error}") from None
        except (ValueError, RecursionError) as error:
            said = f"not JSON ({error}); expected one object per line{hint}"
            raise ExamplesError(f"{path}, line {line}: {said}") from error
        if not isinstance(record, dict):
            got = type(record).__name__
            raise ExamplesError(f"{path}, line {line}: expected an object, got {got}; write one object per line{hint}")
        names = tuple(record)
        if names not in columns:
            columns[names] = _columns(names, f"{path}, line {line}")
        text, label, name, others = columns[names]
        label_of = None if label is None else _label(record[label], path, line)
        yield _Record(line, others, record[text], label_of, None if name is None else record[name])


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's fields; ExamplesError if one occurs twice, of which Python would keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ExamplesError(f"an object has {twice!r:.60} more than once; expected each name once")
    return fields


def _label(label: Any, path: Path, line: int) -> Any:
    if label is None:
        raise ExamplesError(f"{path}, line {line}: the label is null; expected a label, or a file without that column")
    # A multi-label record lists its labels; inside the program they travel as one string, split by `split_labels`.
    if isinstance(label, list) and all(isinstance(part, str) for part in label):
        return "|".join(label)
    return label


def _lines(content: str, path: Path) -> Iterator[_Record]:
    first = content.split("\n", 1)[0]
    for delimiter, ending in ((",", ".csv"), (";", ".csv"), ("\t", ".tsv")):
        names = [name.strip() for name in first.split(delimiter)]
        # A sentence may also begin with "Question, ...", but the names in a header are single words.
        if len(names) > 1 and not any(" " in name for name in names) and _column(names, TEXT_COLUMNS):
            raise ExamplesError(
                f"{path} looks like a table: its first line {first.strip()!r:.60} is a header, but each line of a "
                f".txt is one text; rename it to end in {ending}"
            )
    # Not splitlines, which also splits at form feeds and the like, unlike an editor's line count.
    for line, text in enumerate(content.split("\n"), 1):
        if text.strip():
            yield _Record(line, (), text.rstrip("\r"))


def _parquet(path: Path) -> Iterator[_Record]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        said = f"reading {path} needs pyarrow, which is not installed: {install_hint('parquet')}"
        raise ToolError(said) from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow.names, path)
            class_names = _class_names(file.schema_arrow.metadata, columns.label)
            if file.metadata.num_rows > MAX_EXAMPLES:
                raise ExamplesError(
                    f"{path}: {file.metadata.num_rows:,} rows; expected at most {MAX_EXAMPLES:,}: give a sample"
                )
            line, size = 0, 0
            wanted = [column for column in columns.read if column is not None]
            # Row by row, because a file of a few KB may decompress to one text a million times.
            for batch in file.iter_batches(_PARQUET_ROWS, columns=wanted):
                for row in zip(*map(batch.column, wanted), strict=True):
                    line += 1
                    text, *labels = (value.as_py() for value in row)
                    if labels:
                        labels[0] = _named(_label(labels[0], path, line), class_names, path, line)
                    size += len(text) if isinstance(text, (str, bytes)) else 0
                    if size > MAX_FILE_BYTES:
                        raise ExamplesError(
                            f"{path}, line {line}: more than {MAX_FILE_BYTES:,} bytes of texts so far; split the file"
                        )
                    yield _Record(line, columns.others, text, *labels)
    except UnicodeDecodeError as error:
        raise ExamplesError(f"{path}: a text or a column's name that is not UTF-8 ({error.reason})") from error
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        raise ExamplesError(f"cannot read {path} as Parquet: {error}") from error


def _class_names(metadata: Mapping[bytes, bytes] | None, label: str | None) -> list[str]:
    """The names of the ids in a label column, where Hugging Face's ``datasets`` wrote them; empty if it did not."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _named(label: Any, names: Sequence[str], path: Path, line: int) -> Any:
    if not names or not isinstance(label, int):
        return label
    if not 0 <= label < len(names):  # -1 stands for none there
        raise ExamplesError(f"{path}, line {line}: no label has the id {label}; expected 0 to {len(names) - 1}")
    return names[label]
