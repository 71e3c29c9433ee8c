"""Prepare the texts of new labels: check them, refuse labels that already exist, and drop duplicates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from patcher.arguments import listed, require
from patcher.errors import LabelError
from patcher.examples import Examples, check_label, check_text, is_whole_number
from patcher.head import refuse_joined
from patcher.screening import Repeat
from patcher.wording import listing
from patcher.words import plain_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TypeAlias

    from patcher.head import Head

    Texts: TypeAlias = Iterable[str] | Examples

__all__ = ["checked", "distinct", "new_examples", "refuse_ids", "refuse_many", "unknown_to"]


_MANY = 20
"""Any classifier may get this many new labels at once."""


def new_examples(examples: Examples, label: str | None, *, several: bool = False) -> dict[str, list[str]]:
    """The texts of a file, by label.

    With ``label``: all texts of the file, or, if it has a label column, those with this label (LabelError if there are
    none). Without: the texts of every label in the column. ``several`` reads ``a|b`` as two labels, the notation in
    files of multi-label classifiers.
    """
    if label is None:
        return examples.by_label(several=several)
    if examples.labels is None:
        return {label: list(examples.texts)}
    groups = examples.by_label(several=several)
    if label not in groups:
        raise LabelError(
            f"{examples.source} has a label column without {label!r} (it has {listing(groups)}); leave LABEL out to "
            "add the labels of the column (`patcher rename-label` gives them other names), or remove the column"
        )
    return {label: groups[label]}


def refuse_ids(labels: Iterable[str], source: str, head: Head) -> None:
    """Raise LabelError if all labels of a file are whole numbers and none of the head's is: they may be ids."""
    labels = tuple(labels)
    if all(map(is_whole_number, labels)) and not any(map(is_whole_number, head.labels)):
        raise LabelError(
            f"the labels of {source} are numbers ({listing(labels)}) and look like ids, as the classifier's labels are "
            f"names ({listing(head.labels, 2)}); expected names, or LABEL ({labels[0]}) to add a number as a label"
        )


def refuse_many(new: Sequence[str], of: int, there: int) -> None:
    """Raise LabelError if a file's labels are perhaps those of the classifier, in another spelling.

    That is, if more than 20 of them are ``new``, and more than a tenth of the number of labels ``there`` are.
    """
    most = max(_MANY, there // 10)
    if len(new) > most:
        raise LabelError(
            f"{len(new):,} labels of {of:,} in the file are new ({listing(map(repr, new))}); expected at most {most:,} "
            f"at once for a classifier of {there:,}. `--many` adds them, if they are no other spelling of its labels"
        )


def checked(examples: Mapping[str, Texts], *, several: bool) -> dict[str, list[str]]:
    """The texts of each label as lists; ``several`` as in ``new_examples``.

    Raises LabelError, ExamplesError or InputError for an invalid label or text, and for missing ones.
    """
    require(Mapping, examples=examples)
    if not examples:
        raise LabelError("no new label; expected at least one with its examples")
    found = {}
    for written, given in examples.items():
        require(str, label=written)  # a number might be meant as the label's index
        label = check_label(written, f"label {written!r:.60}")
        if isinstance(given, Examples):
            texts = new_examples(given, label, several=several)[label]
        else:
            texts = listed(given, f"examples of {label!r}", "; read_examples(PATH) reads a file")
        if not texts:
            raise LabelError(f"no examples of {label!r}; expected a list of a few texts, ten are good")
        found[label] = [check_text(text, f"{label}, example {number}") for number, text in enumerate(texts, 1)]
    return found


def unknown_to(texts: dict[str, list[str]], head: Head, classifier: str, *, skip_known: bool) -> dict[str, list[str]]:
    """The texts of labels that the head lacks.

    Raises LabelError for a label that it already has; with ``skip_known`` only if it has them all.
    """
    known = [label for label in texts if label in head.labels]
    if known and not (skip_known and len(known) < len(texts)):
        raise LabelError(
            f"{listing(map(repr, known))}: already in {classifier} (version {head.lineage.version}, "
            f"{len(head.labels)} labels); expected new labels (`patcher labels` lists the existing ones)"
        )
    for label in texts:
        refuse_joined(head, label)
    return {label: group for label, group in texts.items() if label not in known}


def distinct(texts: dict[str, list[str]]) -> tuple[dict[str, list[str]], tuple[Repeat, ...]]:
    """Each label's texts without those that repeat the words of an earlier one, and the repeated ones.

    Leave-one-out recall would be meaningless if a copy of the left-out example stayed in the fit.
    """
    kept, repeated = {}, []
    for label, group in texts.items():
        first: dict[str, str] = {}
        for text in group:
            words = plain_words(text)
            if words in first:
                repeated.append(Repeat(label, first[words], text))
            first.setdefault(words, text)
        kept[label] = list(first.values())
    return kept, tuple(repeated)
