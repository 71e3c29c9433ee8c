"""Rows for new labels from a few examples: one small interface, several fits behind it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from patcher.errors import ExamplesError, InputError, LabelError
from patcher.fit.inputs import old_inputs
from patcher.fit.logistic import NewRow, offset_rows
from patcher.fit.model import HeadLike, OldLabels, from_memory, from_rows
from patcher.fit.settings import SETTINGS, Settings
from patcher.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from patcher.head import Head

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["METHODS", "Fit", "HeldOut", "fit"]

METHODS = ("auto", "offset-logistic")


@dataclass(frozen=True)
class HeldOut:
    """How each example of a new label fares in a fit that did not see it.

    ``margins`` float32 ``[n]``: the new logit less the best other one (above 0: the example is found; NaN where it is
    the only one); ``rivals``: the label with that best other logit.
    """

    margins: Floats
    rivals: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """New rows, and what became of the old ones.

    Parameters
    ----------
    labels, weight, bias
        The new labels and their rows, float32 ``[K, width]`` and ``[K]``.
    method, why
        The fit that was used, and one sentence on why.
    base_weight, base_bias, patch_weight, patch_bias
        New values of old rows; None where they are unchanged, as in the default method.
    held_out
        For each new label, its examples as a fit sees them that did not have them.
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
    base_weight: Floats | None = None
    base_bias: Floats | None = None
    patch_weight: Floats | None = None
    patch_bias: Floats | None = None

    def apply(self, head: Head) -> Head:
        """The head with the new rows behind the old ones; lineage and scope are the caller's business."""
        names = ("base_weight", "base_bias", "patch_weight", "patch_bias")
        changed = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(head, **changed).with_rows(self.labels, self.weight, self.bias)


def fit(
    examples: Mapping[str, Floats],
    head: HeadLike,
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
        Real old data: features and positions in ``head.labels``. The bias is set on it instead of the memory's sample,
        and where there is no memory, one is made of it.
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
    if memory is None and replay is not None:
        memory = Memory.build(replay[0], replay[1], head.labels, head.split)
    old = (
        from_rows(head, np.concatenate(list(examples.values())))
        if memory is None
        else from_memory(memory, head, settings)
    )
    fitting = {label: name for label, name in (names or {}).items() if label in examples}
    fitting = {label: name for label, name in fitting.items() if _belongs(label, name, examples, old, settings)}
    shown = {label: _with_name(rows, fitting.get(label)) for label, rows in examples.items()}
    inputs = old_inputs(memory, replay, head)
    rows = offset_rows(shown, head, old, inputs, max_flips, settings)
    return Fit(
        labels=tuple(examples),
        weight=np.stack([row.weight for row in rows.values()]),
        bias=np.array([row.bias for row in rows.values()], np.float32),
        method="offset-logistic",
        why=_why(memory, replay, examples, fitting),
        max_flips=max_flips,
        calibration=inputs.source if inputs else "none" if memory is None else "draws",
        held_out=_held_out(examples, rows, head),
        old=old,
    )


def _checked(examples: Mapping[str, Floats], head: HeadLike) -> dict[str, Floats]:
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
    others = [rows.mean(axis=0) for other, rows in examples.items() if other != label]
    white = old.whitening.of
    point = white(np.asarray(name)[None])
    own = float(((point - white(examples[label].mean(axis=0)[None])) ** 2).sum())
    rivals = ((white(np.stack([*old.means, *others])) - point) ** 2).sum(axis=1)
    return own <= settings.name_slack * float(rivals.min())


def _with_name(rows: Floats, name: Floats | None) -> Floats:
    return rows if name is None else np.concatenate([rows, np.asarray(name, np.float32)[None]])


def _why(memory: Memory | None, replay: object, examples: Mapping[str, Floats], names: Mapping[str, Floats]) -> str:
    against = "old data" if replay is not None else "the memory" if memory is not None else "the old rows alone"
    rows = "a row" if len(examples) == 1 else f"{len(examples)} rows"
    also = ", the label's name as a further example" if any(label in names for label in examples) else ""
    return f"{rows} fitted against {against}{also}; every old row keeps its bits"


def _held_out(examples: Mapping[str, Floats], rows: Mapping[str, NewRow], head: HeadLike) -> dict[str, HeldOut]:
    """Margins of the held-out examples against the finished rows of all other labels."""
    held = {}
    for label, features in examples.items():
        others = [other for other in rows if other != label]
        logits = head.logits(features)
        if others:
            weight = np.stack([rows[other].weight for other in others])
            news = features @ weight.T + np.array([rows[other].bias for other in others])
            logits = np.concatenate([logits, news], axis=1)
        best = logits.max(axis=1) if head.problem == "single_label" else np.zeros(len(logits), np.float32)
        names = (*head.labels, *others)
        rivals = tuple(names[i] for i in logits.argmax(axis=1).tolist())
        # Behind the examples may stand the name, which says nothing of how inputs fare.
        held[label] = HeldOut((rows[label].held_out[: len(features)] - best).astype(np.float32), rivals)
    return held
