"""Rows for new labels from a few examples: one small interface, several fits behind it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from patcher.errors import ExamplesError, InputError, LabelError
from patcher.fit.anchored import anchored_rows, held_back
from patcher.fit.closed import closed_rows
from patcher.fit.inputs import OldInputs, old_inputs
from patcher.fit.logistic import NewRow, offset_rows, rows_of
from patcher.fit.model import OldLabels, Rows, from_memory, from_rows, full_rows
from patcher.fit.settings import SETTINGS, Settings
from patcher.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from patcher.head import Head

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["METHODS", "Counted", "Fit", "HeldOut", "fit"]

METHODS = ("auto", "offset-logistic", "ridge", "lda", "anchored")
"""``auto`` is offset-logistic; the others change every row."""


@dataclass(frozen=True)
class HeldOut:
    """How each example of a new label fares in a fit that did not see it.

    ``margins`` float32 ``[n]``: the new logit less the best other one (above 0: the example is found; NaN where it is
    the only one); ``rivals``: the label with that best other logit.
    """

    margins: Floats
    rivals: tuple[str, ...]


@dataclass(frozen=True)
class Counted:
    """Real inputs, and the places INT64 ``[m]`` of those that took part in the fit, and that one without them takes."""

    inputs: OldInputs
    taken: Ints


@dataclass(frozen=True)
class Fit:
    """New rows, and what became of the old ones.

    Parameters
    ----------
    labels, weight, bias
        The new labels and their rows, float32 ``[K, width]`` and ``[K]``.
    method, why
        The fit that was used, and one sentence on why.
    old_rows
        New rows of the old labels; None where they are unchanged, as in the default method.
    held_out
        For each new label, its examples as a fit sees them that did not have them.
    counted
        Real inputs of old labels on which the harm can be counted, the best first: those that took no part in a refit
        of their rows.
    old
        What the rows were fitted against.
    calibration
        What the bias was set on: ``features`` of the memory, ``replay``, ``draws`` of a model, or ``none``.
    """

    labels: tuple[str, ...]
    weight: Floats
    bias: Floats
    method: str
    why: str
    max_flips: float
    calibration: str
    old: OldLabels = field(repr=False)
    held_out: Mapping[str, HeldOut] = field(default_factory=dict)
    old_rows: Rows | None = None
    counted: tuple[Counted, ...] = field(default=(), repr=False)

    def apply(self, head: Head) -> Head:
        """The head with the new rows behind the old ones; lineage and scope are the caller's business."""
        if self.old_rows is not None:
            head = head.refitted(self.old_rows.weight, self.old_rows.bias)
        return head.with_rows(self.labels, self.weight, self.bias)


def fit(
    examples: Mapping[str, Floats],
    head: Head,
    memory: Memory | None,
    *,
    names: Mapping[str, Floats] | None = None,
    replay: tuple[Floats, Ints] | None = None,
    method: str = "auto",
    max_flips: float = 0.005,
    seed: int = 0,  # noqa: ARG001  nothing is drawn by these methods
    settings: Settings = SETTINGS,
) -> Fit:
    """Fit rows for new labels.

    Parameters
    ----------
    examples
        Features of each new label, float32 ``[n, width]``.
    memory
        What is kept of the old labels; None fits against their rows alone, and nothing then bounds the flips.
    names
        Features float32 ``[width]`` of new labels' own names, where those are words: a further example each, which
        helps most where the examples resemble each other. A name that lies nearer to another label is left out, and the
        gate counts none.
    replay
        Real old data: features and positions in ``head.labels``. The bias is set on it as well as on the memory's
        sample, and where there is no memory, one is made of it.
    method
        ``auto`` takes ``offset-logistic``, which leaves every old row as it is and lost the fewest old inputs wherever
        it was measured. ``ridge`` and ``lda`` first refit the old rows from the memory, ``anchored`` refits all rows on
        ``replay``.
    max_flips
        Share of the calibration inputs that may move to the new labels, all together.
    settings
        Figures of the fit; the default ones were chosen by old labels posing as new ones.

    Raises
    ------
    LabelError, ExamplesError, InputError
        for labels that exist, features that do not fit, a method that is not known.
    """
    if method not in METHODS:
        raise InputError(f"got method {method!r}; expected one of {', '.join(METHODS)}")
    examples = _checked(examples, head)
    remembered = old_inputs(memory, None, head)
    if memory is None and replay is not None:
        memory = Memory.build(replay[0], replay[1], head.labels, head.split, most_clusters=1)
    old = (
        from_rows(head, np.concatenate(list(examples.values())))
        if memory is None
        else from_memory(memory, head, settings)
    )
    fitting = {label: name for label, name in (names or {}).items() if label in examples}
    fitting = {label: name for label, name in fitting.items() if _belongs(label, name, examples, old, settings)}
    shown = {label: _with_name(rows, fitting.get(label)) for label, rows in examples.items()}
    inputs = old_inputs(memory, replay, head)
    # A few replayed texts must not lift the budget that holds on all remembered ones.
    every = inputs.beside(old_inputs(memory, None, head)) if inputs and inputs.source == "replay" else inputs
    if head.problem != "single_label":
        # What is an example of the new label has it by right, and is no input that the label may not have.
        every = every and every.without(np.concatenate(list(examples.values())))
    chosen = "offset-logistic" if method == "auto" else method
    if chosen in ("ridge", "lda"):
        found = _closed(chosen, shown, head, memory, old, every, max_flips, settings)
    else:
        found = _of(offset_rows(shown, head, old, every, max_flips, settings))
        if chosen == "anchored":
            found = _anchored(found, shown, head, old, inputs, max_flips, settings)
    count = len(examples)
    return Fit(
        labels=tuple(examples),
        weight=found.rows.weight[-count:],
        bias=found.rows.bias[-count:],
        method=chosen,
        why=_why(chosen, found, memory, replay, examples, fitting),
        max_flips=max_flips,
        calibration=inputs.source if inputs else "none" if memory is None else "draws",
        held_out=_held_out(examples, found, head),
        old=old,
        old_rows=found.rows.first(-count) if len(found.rows.weight) > count else None,
        counted=_counted(chosen, found, every, inputs, remembered),
    )


@dataclass(frozen=True)
class _Found:
    """Rows of the new labels, behind those of all old ones where a method changes them.

    ``held_out`` are the new logits of each label's examples in a fit without them, ``taken`` the places of the inputs
    that a fit without them takes; ``way`` is anchored's.
    """

    rows: Rows
    held_out: Mapping[str, Doubles]
    taken: Ints
    way: float = 0.0


_NOTHING = np.zeros(0, np.int64)


def _of(new: Mapping[str, NewRow], rows: Rows | None = None) -> _Found:
    """New rows, or ``rows`` of all labels: then inputs were looked at under other rows than those that stay."""
    taken = np.unique(np.concatenate([row.taken for row in new.values()])) if rows is None else _NOTHING
    return _Found(rows or rows_of(new), {label: row.held_out for label, row in new.items()}, taken)


def _counted(
    method: str, found: _Found, every: OldInputs | None, replayed: OldInputs | None, remembered: OldInputs | None
) -> tuple[Counted, ...]:
    if method == "anchored" and replayed is not None:
        parts = (replayed.part(held_back(len(replayed))), remembered)
        return tuple(Counted(part, _NOTHING) for part in parts if part is not None)
    if every is None:
        return ()
    own = len(every) - every.others
    first = Counted(every.part(np.arange(own)), found.taken[found.taken < own])
    if remembered is None or not every.others:
        return (first,) if own else ()
    others = dataclasses.replace(every.part(np.arange(own, len(every))), source=remembered.source, others=0)
    return first, Counted(others, found.taken[found.taken >= own] - own)


def _closed(
    method: str,
    shown: Mapping[str, Floats],
    head: Head,
    memory: Memory | None,
    old: OldLabels,
    inputs: OldInputs | None,
    max_flips: float,
    settings: Settings,
) -> _Found:
    _refuse_sigmoids(method, head)
    if memory is None:
        raise InputError(f"{method} refits all rows from the memory, and there is none; `patcher remember --data FILE`")
    lacking = [label for label in head.labels if label not in memory.labels]
    if lacking:
        raise InputError(
            f"{method} refits all rows, and the memory knows nothing of {', '.join(map(repr, lacking[:5]))}; "
            "`patcher remember --data FILE` builds it anew"
        )
    rows, new = closed_rows(method, shown, head, memory, old, inputs, max_flips, settings)
    return _of(new, rows if len(rows.weight) > len(new) else None)


def _anchored(
    found: _Found,
    shown: Mapping[str, Floats],
    head: Head,
    old: OldLabels,
    inputs: OldInputs | None,
    max_flips: float,
    settings: Settings,
) -> _Found:
    _refuse_sigmoids("anchored", head)
    if inputs is None or inputs.source != "replay":
        raise InputError("anchored refits all rows on old data; expected `--replay FILE` with it")
    weight, bias = full_rows(head)
    start = Rows(np.concatenate([weight, found.rows.weight]), np.concatenate([bias, found.rows.bias]))
    made = anchored_rows(shown, start, old, inputs, max_flips, settings)
    return dataclasses.replace(found, rows=made.rows, way=made.way)


def _refuse_sigmoids(method: str, head: Head) -> None:
    if head.problem != "single_label":
        raise InputError(
            f"{method} is for labels that exclude each other; expected offset-logistic for a multi-label one"
        )


def _checked(examples: Mapping[str, Floats], head: Head) -> dict[str, Floats]:
    if not examples:
        raise ExamplesError("no new label; expected at least one with its examples")
    checked = {}
    for label, given in examples.items():
        if not label or label in head.labels:
            raise LabelError(f"{label!r} is a label of this head already" if label else "a label is empty")
        rows = np.asarray(given, np.float32)
        if rows.shape != (len(rows), head.width) or not len(rows):
            raise ExamplesError(f"{label!r}: got features {rows.shape}, expected [n, {head.width}] with n > 0")
        if not np.isfinite(rows).all():
            raise ExamplesError(f"{label!r}: features that are not finite: the backbone overflowed")
        checked[label] = rows
    return checked


def _belongs(label: str, name: Floats, examples: Mapping[str, Floats], old: OldLabels, settings: Settings) -> bool:
    """Whether a name lies about as near to its label's examples as to any other label: else it says something else."""
    labels = list(examples)
    point, *new = old.whitening.of(np.stack([name, *(rows.mean(axis=0) for rows in examples.values())]))
    distances = ((np.concatenate([old.points, new]) - point) ** 2).sum(axis=1)
    mine = len(old.points) + labels.index(label)
    return bool(distances[mine] <= settings.name_slack * np.delete(distances, mine).min())


def _with_name(rows: Floats, name: Floats | None) -> Floats:
    return rows if name is None else np.concatenate([rows, np.asarray(name, np.float32)[None]])


def _why(
    method: str,
    found: _Found,
    memory: Memory | None,
    replay: object,
    examples: Mapping[str, Floats],
    names: Mapping[str, Floats],
) -> str:
    against = "old data" if replay is not None else "the memory" if memory is not None else "the old rows alone"
    rows = "a row" if len(examples) == 1 else f"{len(examples)} rows"
    also = ", the label's name as a further example" if any(label in names for label in examples) else ""
    if method == "offset-logistic":
        return f"{rows} fitted against {against}{also}; every old row keeps its bits"
    if method == "anchored":
        return f"all rows refitted on old data and the examples{also}, {found.way:.0%} of the way from the old ones"
    if len(found.rows.weight) == len(examples):
        return f"{rows} fitted against {against}{also}; every old row keeps its bits, as they were refitted already"
    return f"old rows refitted from the memory, {rows} against those{also}; old answers may change either way"


def _held_out(examples: Mapping[str, Floats], found: _Found, head: Head) -> dict[str, HeldOut]:
    """Margins of the held-out examples against the finished rows of all other labels."""
    count = len(examples)
    held = {}
    for position, (label, features) in enumerate(examples.items()):
        logits = features @ found.rows.weight.T + found.rows.bias
        if len(found.rows.weight) == count:
            logits = np.concatenate([head.logits(features), logits], axis=1)
        logits = np.delete(logits, len(head.labels) + position, axis=1)
        best = logits.max(axis=1) if head.problem == "single_label" else np.zeros(len(logits), np.float32)
        names = (*head.labels, *(other for other in examples if other != label))
        rivals = tuple(names[i] for i in logits.argmax(axis=1).tolist())
        # Behind the examples may stand the name, which says nothing of how inputs fare.
        held[label] = HeldOut((found.held_out[label][: len(features)] - best).astype(np.float32), rivals)
    return held
