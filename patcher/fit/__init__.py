"""Fit rows for new labels to a few examples: one small interface to several methods."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patcher.errors import ExamplesError, InputError, LabelError
from patcher.fit.anchored import anchored_rows, held_back
from patcher.fit.closed import closed_rows
from patcher.fit.fitted import Counted, Fit, HeldOut
from patcher.fit.logistic import NewRow, offset_rows, rows_of
from patcher.fit.model import Rows, full_rows
from patcher.fit.settings import SETTINGS, Settings
from patcher.fit.task import Task
from patcher.limits import MAX_FLIPS
from patcher.wording import listing, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from patcher.arrays import Doubles, Floats, Ints
    from patcher.fit.inputs import Labelled
    from patcher.head import Head
    from patcher.memory import Memory

__all__ = ["METHODS", "Counted", "Fit", "HeldOut", "fit"]

METHODS = ("auto", "offset-logistic", "ridge", "lda", "anchored")
"""``auto`` means ``offset-logistic``: it leaves every old row unchanged and lost the fewest old inputs when measured.

``ridge`` and ``lda`` first refit the old rows from the memory; ``anchored`` refits all rows on replayed inputs.
"""


def fit(
    examples: Mapping[str, Floats],
    head: Head,
    memory: Memory | None,
    *,
    names: Mapping[str, Floats] | None = None,
    replay: Labelled | None = None,
    method: str = "auto",
    max_flips: float = MAX_FLIPS,
    firsts: Mapping[str, Ints] | None = None,
    heard: Callable[[int], None] | None = None,
    settings: Settings = SETTINGS,
) -> Fit:
    """Fit rows for new labels to ``examples``: features per label, float32 ``[n, width]``.

    ``names`` holds the features, float32 ``[width]``, of label names that are words. In the fit, and only there, a name
    counts as one more example; a name that lies clearly nearer to another label is left out.

    ``replay`` is real old data. At most ``max_flips`` of it, and at most ``max_flips`` of the memory's sample, may flip
    to the new labels taken together. Without a ``memory``, one is built from ``replay``; with neither, the rows are
    fitted against the old rows alone, and nothing bounds the flips.

    ``firsts`` holds, for each new label, the position INT64 ``[n]`` of the first example that each of its examples
    repeats. It changes no row: examples that repeat one another are only held out together.

    ``heard`` is called with the number of new labels fitted so far, first with 0.

    Raises LabelError for a label that exists or is empty, ExamplesError for missing or malformed features, and
    InputError for an unknown method or one that does not apply to this head and this data.
    """
    if method not in METHODS:
        raise InputError(f"got method {method!r}; expected one of {', '.join(METHODS)}")
    chosen = "offset-logistic" if method == "auto" else method
    examples = _checked(examples, head)
    task = Task.of(np.concatenate(list(examples.values())), head, memory, replay, max_flips, settings, firsts, heard)
    names = {label: name for label, name in (names or {}).items() if _belongs(label, name, examples, task)}
    found = _rows(chosen, {label: _with_name(rows, names.get(label)) for label, rows in examples.items()}, task)
    count = len(examples)
    return Fit(
        labels=tuple(examples),
        weight=found.rows.weight[-count:],
        bias=found.rows.bias[-count:],
        method=chosen,
        why=_why(chosen, found, task, count, named=bool(names)),
        source=task.source,
        held_out=_held_out(examples, found, head),
        old=task.old,
        old_rows=found.rows.first(-count) if len(found.rows.weight) > count else None,
        counted=_counted(chosen, found, task, remembered=memory is not None),
    )


@dataclass(frozen=True)
class _Found:
    """Rows of the new labels, preceded by those of all old labels if the method changes them.

    ``held_out``: per new label, the new logits of its examples, each from a fit without that example. ``taken``:
    positions of the old inputs that flip in a fit without them. ``way``: how far ``anchored`` moved, from 0 to 1.
    """

    rows: Rows
    held_out: Mapping[str, Doubles]
    taken: Ints
    way: float = 0.0


_NOTHING = np.zeros(0, np.int64)


def _of(new: Mapping[str, NewRow], rows: Rows | None = None) -> _Found:
    """Wrap new rows, or ``rows`` of all labels.

    In the latter case ``taken`` is empty: the fit looked at the inputs under rows other than the final ones.
    """
    taken = np.unique(np.concatenate([row.taken for row in new.values()])) if rows is None else _NOTHING
    return _Found(rows or rows_of(new), {label: row.held_out for label, row in new.items()}, taken)


def _rows(method: str, shown: Mapping[str, Floats], task: Task) -> _Found:
    """Run a method on everything it is shown of each new label: the examples and, if used, the label's name."""
    if method == "offset-logistic":
        return _of(offset_rows(shown, task))
    if not task.head.exclusive:
        raise InputError(
            f"{method} is only for single-label classifiers; expected offset-logistic for a multi-label one"
        )
    return _anchored(shown, task) if method == "anchored" else _closed(method, shown, task)


def _closed(method: str, shown: Mapping[str, Floats], task: Task) -> _Found:
    memory = task.memory
    if memory is None:
        raise InputError(f"{method} refits all rows from the memory, and there is none; `patcher remember --data FILE`")
    lacking = [label for label in task.head.labels if label not in memory.labels]
    if lacking:
        raise InputError(
            f"{method} refits all rows, and the memory knows nothing of {listing(map(repr, lacking))}; "
            "`patcher remember --data FILE` rebuilds it"
        )
    rows, new = closed_rows(method, shown, task, memory)
    return _of(new, rows if len(rows.weight) > len(new) else None)


def _anchored(shown: Mapping[str, Floats], task: Task) -> _Found:
    replayed = task.replayed
    if replayed is None:
        raise InputError("anchored refits all rows on old data; expected `--replay FILE` (replay=...) with it")
    found = _of(offset_rows(shown, task))
    weight, bias = full_rows(task.head)
    start = Rows(np.concatenate([weight, found.rows.weight]), np.concatenate([bias, found.rows.bias]))
    made = anchored_rows(shown, start, task, replayed)
    return dataclasses.replace(found, rows=made.rows, way=made.way)


def _counted(method: str, found: _Found, task: Task, *, remembered: bool) -> tuple[Counted, ...]:
    """The inputs to count flips on.

    Unless a memory was given (``remembered``), the memory's sample is left out: it was built from the replayed inputs
    and would count them twice.
    """
    if task.inputs is None:
        return ()
    first, others = task.inputs.apart()
    own = len(first)
    parts = [Counted(first, found.taken[found.taken < own]), Counted(others, found.taken[found.taken >= own] - own)]
    if method == "anchored":  # ``taken`` describes the rows before this method changed all of them
        parts = [Counted(first.part(held_back(first.ids)), _NOTHING), Counted(others, _NOTHING)]
    return tuple(part for part in parts[: 2 if remembered else 1] if len(part.inputs))


def _checked(examples: Mapping[str, Floats], head: Head) -> dict[str, Floats]:
    if not examples:
        raise ExamplesError("no new label; expected at least one, with examples")
    checked = {}
    for label, given in examples.items():
        if not label or label in head.labels:
            raise LabelError(f"{label!r} is a label of this head already" if label else "a label is empty")
        rows = np.asarray(given, np.float32)
        if rows.shape != (len(rows), head.width) or not len(rows):
            raise ExamplesError(f"{label!r}: got features {rows.shape}, expected [n, {head.width}] with n > 0")
        if not np.isfinite(rows).all():
            raise ExamplesError(f"{label!r}: some features are not finite: the backbone overflowed")
        checked[label] = rows
    return checked


def _belongs(label: str, name: Floats, examples: Mapping[str, Floats], task: Task) -> bool:
    """Whether a label's name lies about as near to its examples as to any other label; if not, it is misleading."""
    if label not in examples:
        return False
    old = task.old
    point, *new = old.whitening.of(np.stack([name, *(rows.mean(axis=0) for rows in examples.values())]))
    distances = ((np.concatenate([old.points, new]) - point) ** 2).sum(axis=1)
    mine = len(old.points) + list(examples).index(label)
    return bool(distances[mine] <= task.settings.name_slack * np.delete(distances, mine).min())


def _with_name(rows: Floats, name: Floats | None) -> Floats:
    return rows if name is None else np.concatenate([rows, np.asarray(name, np.float32)[None]])


def _why(method: str, found: _Found, task: Task, count: int, *, named: bool) -> str:
    against = {"replay": "old data", "none": "the old rows alone"}.get(task.source, "the memory")
    rows = "a row" if count == 1 else f"{count} rows"
    also = ", using the label's name as an extra example" if named else ""
    if method == "offset-logistic":
        return f"{rows} fitted against {against}{also}; old rows unchanged"
    if method == "anchored":
        way = percent(found.way, 0)
        return f"all rows refitted on old data and the examples{also}, moved {way} of the way"
    if len(found.rows.weight) == count:
        return f"{rows} fitted against {against}{also}; old rows unchanged, as they were refitted already"
    return f"old rows refitted from the memory, {rows} against those{also}; old answers may change either way"


def _held_out(examples: Mapping[str, Floats], found: _Found, head: Head) -> dict[str, HeldOut]:
    """Margins of the held-out examples against the final rows of all other labels."""
    count = len(examples)
    held = {}
    for position, (label, features) in enumerate(examples.items()):
        logits = features @ found.rows.weight.T + found.rows.bias
        if len(found.rows.weight) == count:
            logits = np.concatenate([head.logits(features), logits], axis=1)
        logits = np.delete(logits, len(head.labels) + position, axis=1)
        best = logits.max(axis=1) if head.exclusive else np.zeros(len(logits), np.float32)
        names = (*head.labels, *(other for other in examples if other != label))
        rivals = tuple(names[i] for i in logits.argmax(axis=1).tolist()) if head.exclusive else ()
        # The examples may be followed by the label's name, which says nothing about how real inputs fare.
        held[label] = HeldOut((found.held_out[label][: len(features)] - best).astype(np.float32), rivals)
    return held
