"""Labelled texts, and what a text and a label have to be. ``examples_file`` reads them from files."""

from __future__ import annotations

import dataclasses
import hashlib
import numbers
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patcher.arguments import listed
from patcher.errors import ExamplesError
from patcher.words import plain_words

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "LABEL_COLUMNS",
    "LABEL_NAME_COLUMNS",
    "MAX_TEXT_BYTES",
    "TEXT_COLUMNS",
    "Examples",
    "check_label",
    "check_text",
    "data_hash",
    "is_whole_number",
    "label_parts",
    "split_labels",
]

TEXT_COLUMNS = ("text", "sentence", "utterance", "query", "question", "message", "content", "sentece")
"""The last name is a misspelling that occurs in published data sets; error messages do not offer it."""
LABEL_NAME_COLUMNS = ("label_text", "label_name")
"""Columns that data sets with ids as labels have beside them."""
LABEL_COLUMNS = ("label", "intent", "category", "class", "labels", "target", *LABEL_NAME_COLUMNS)
MAX_TEXT_BYTES = 1 << 20
"""The server's tokenizer refuses longer texts too."""
MAX_LABEL_BYTES = 512
_JOINER = re.compile("[\u200c\u200d]")
_JOINED = re.compile("(?<=.)[\u200c\u200d]+(?=.)")
"""Joiners inside a label, which words of Persian and Indic scripts and families of emoji are spelled with."""


@dataclass(frozen=True)
class Examples:
    """Texts with their labels (None if the file has no label column), and their source and line numbers for messages.

    Raises ExamplesError for a text or label that cannot be used, naming its place, and if ``labels`` or ``lines`` do
    not have one entry for each text.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    source: str = "examples"
    lines: tuple[int, ...] = ()
    unread: tuple[str, ...] = ()
    """Names of the file's columns other than those of texts and labels."""

    def __post_init__(self) -> None:
        texts = listed(self.texts, "texts")
        labels = None if self.labels is None else listed(self.labels, "labels")
        for what, rows in (("labels", labels), ("lines", self.lines or None)):
            if rows is not None and len(rows) != len(texts):
                raise ExamplesError(f"{self.source}: {len(texts)} texts, but {len(rows)} {what}")
        for name, check, rows in (("texts", check_text, texts), ("labels", check_label, labels)):
            if rows is not None:
                checked = tuple(check(each, self.where(row)) for row, each in enumerate(rows))
                object.__setattr__(self, name, checked)  # the dataclass is frozen

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, index: int) -> str:
        """The place of a text for messages: ``file, line 7``."""
        return f"{self.source}, line {self.lines[index]}" if self.lines else f"{self.source}, text {index + 1}"

    def part(self, rows: Sequence[int]) -> Examples:
        """The examples at positions ``rows``."""
        texts = tuple(self.texts[row] for row in rows)
        labels = None if self.labels is None else tuple(self.labels[row] for row in rows)
        return dataclasses.replace(
            self, texts=texts, labels=labels, lines=tuple(self.lines[row] for row in rows if self.lines)
        )

    def once(self, *, several: bool = False) -> Examples:
        """The examples without duplicates; texts with the same words are duplicates.

        Each text keeps its first label, or with ``several`` (multi-label) the labels of all its duplicates.
        """
        places: dict[str, list[int]] = {}
        for row, text in enumerate(self.texts):
            places.setdefault(plain_words(text), []).append(row)
        kept = self.part([rows[0] for rows in places.values()])
        if not several:
            return kept
        labels = self.labels_of_each(several=True)
        parts = ([part for row in rows for part in labels[row]] for rows in places.values())
        return dataclasses.replace(kept, labels=tuple("|".join(dict.fromkeys(each)) for each in parts))

    def once_a_label(self, *, several: bool = False) -> Examples:
        """The examples without duplicates inside a label; texts with the same words are duplicates.

        A text that occurs under two labels stays under both, because neither is known to be wrong. With ``several``
        (multi-label) it is kept once, with all its labels.
        """
        if several:
            return self.once(several=True)
        pairs = zip(map(plain_words, self.texts), self.labelled(), strict=True)
        return self.part(sorted({pair: row for row, pair in reversed([*enumerate(pairs)])}.values()))

    def labelled(self) -> tuple[str, ...]:
        """The labels; ExamplesError if the file has no label column."""
        if self.labels is None:
            expected = ", ".join(LABEL_COLUMNS)
            raise ExamplesError(f"{self.source} has no label column; expected one named {expected}")
        return self.labels

    def labels_of_each(self, *, several: bool = False) -> list[tuple[str, ...]]:
        """The label of each text; ``several`` splits ``a|b`` into two labels."""
        if not several:
            return [(label,) for label in self.labelled()]
        return [split_labels(written, self.where(row)) for row, written in enumerate(self.labelled())]

    def by_label(self, *, several: bool = False) -> dict[str, list[str]]:
        """The texts of each label, labels in order of first appearance; ``several`` splits ``a|b`` into two labels."""
        groups: dict[str, list[str]] = {}
        for text, labels in zip(self.texts, self.labels_of_each(several=several), strict=True):
            for label in labels:
                groups.setdefault(label, []).append(text)
        return groups

    def data_hash(self) -> str:
        """SHA-256 over texts and labels in order."""
        return data_hash(self.texts, self.labels or ("",) * len(self.texts))


def data_hash(texts: Sequence[str], labels: Sequence[str]) -> str:
    """SHA-256 over texts and labels in order, each with its length, so that no two data sets hash the same bytes."""
    digest = hashlib.sha256()
    for text, label in zip(texts, labels, strict=True):
        for part in (text.encode(), label.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def check_text(text: object, where: str) -> str:
    """Return the text if a classifier can take it; otherwise raise ExamplesError that names its place ``where``."""
    if not isinstance(text, str):
        raise ExamplesError(f"{where}: expected a text, got {type(text).__name__} {text!r:.60}")
    if not text.strip():
        raise ExamplesError(f"{where}: the text is empty; expected a sentence")
    if "\0" in text:
        raise ExamplesError(f"{where}: the text holds a NUL byte; is the file a text file in UTF-8?")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ExamplesError(f"{where}: the text is not valid Unicode ({error.reason})") from error
    if size > MAX_TEXT_BYTES:
        raise ExamplesError(f"{where}: the text has {size:,} bytes; expected at most {MAX_TEXT_BYTES:,}")
    return text


def check_label(label: object, where: str) -> str:
    """Return the label, as a string, if it is valid; otherwise raise ExamplesError that names its place ``where``."""
    if isinstance(label, bool) or not isinstance(label, (str, numbers.Integral)):  # NumPy's, too
        raise ExamplesError(f"{where}: expected a label, got {type(label).__name__} {label!r:.60}")
    label = str(label)
    if not label.strip():
        raise ExamplesError(f"{where}: the label is empty")
    if label != label.strip():
        raise ExamplesError(f"{where}: the label {label!r:.80} has spaces around it")
    if unprintable := next((each for each in _JOINED.sub("", label) if not each.isprintable()), ""):
        raise ExamplesError(f"{where}: the label {label!r:.80} has an unprintable character (U+{ord(unprintable):04X})")
    if len(label.encode()) > MAX_LABEL_BYTES:
        raise ExamplesError(f"{where}: the label has {len(label.encode())} bytes; expected at most {MAX_LABEL_BYTES}")
    return label


def is_whole_number(label: object) -> bool:
    """Whether a label is a whole number or the digits of one, as an id is; pandas may write one as ``7.0``."""
    return re.fullmatch(r"-?\d+(\.0+)?", str(label)) is not None


def split_labels(label: str, where: str) -> tuple[str, ...]:
    """The labels of one multi-label example, which files write as ``a|b`` (or as a list, in JSON lines).

    Raises ExamplesError, which names its place ``where``, if there is none, as in ``|``, or one is not valid.
    """
    parts = label_parts(label)
    if not parts:
        raise ExamplesError(f"{where}: the label {label!r} names no label; expected labels with '|' between them")
    if _JOINER.search(label):  # inside the whole label, but perhaps at the end of one of its parts
        for part in parts:
            check_label(part, where)
    return parts


def label_parts(label: str) -> tuple[str, ...]:
    """What stands between the ``|`` of a label; empty for ``|``."""
    return tuple(part.strip() for part in label.split("|") if part.strip())
