"""The result of a fit: new rows, and what the fit learned about old inputs and about the examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from patcher.arrays import Floats, Ints
    from patcher.fit.inputs import OldInputs
    from patcher.fit.model import OldLabels, Rows
    from patcher.head import Head

__all__ = ["Counted", "Fit", "HeldOut"]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """How each example of a new label fares in a fit that saw neither it nor those that it repeats.

    ``margins`` float32 ``[n]``: the new logit minus the best other logit, or minus 0 in a multi-label head (above 0:
    the example is found; NaN if there is no other example to fit); ``rivals``: the labels with the best other logit,
    none in a multi-label head, where no label takes a text from another.
    """

    margins: Floats
    rivals: tuple[str, ...]


@dataclass(frozen=True)
class Counted:
    """Real inputs, and positions INT64 ``[m]`` of those that the fit used and that flip in a fit without them."""

    inputs: OldInputs
    taken: Ints


@dataclass(frozen=True, eq=False)
class Fit:
    """New rows, and what happened to the old ones.

    Parameters
    ----------
    labels, weight, bias
        The new labels and their rows, float32 ``[K, width]`` and ``[K]``.
    method, why
        The method that was used, and one sentence on what it did.
    source
        What the bias was calibrated on: ``features`` of the memory, ``replay``, ``draws`` from a model, or ``none``.
    old
        What the rows were fitted against.
    held_out
        For each new label, how its examples fare in a fit without them.
    old_rows
        New rows of the old labels; None if they are unchanged, as with the default method.
    counted
        Real inputs of old labels to count flips on, the most reliable first. They include inputs on which ``ridge`` and
        ``lda`` refitted the old rows, so a count under changed ``old_rows`` is marked ``refitted``; replayed inputs on
        which ``anchored`` refitted them are left out.
    """

    labels: tuple[str, ...]
    weight: Floats
    bias: Floats
    method: str
    why: str
    source: str
    old: OldLabels = field(repr=False)
    held_out: Mapping[str, HeldOut] = field(default_factory=dict)
    old_rows: Rows | None = None
    counted: tuple[Counted, ...] = field(default=(), repr=False)

    def apply(self, head: Head) -> Head:
        """The head with the new rows appended; setting lineage and scope is up to the caller."""
        if self.old_rows is not None:
            head = head.refitted(self.old_rows.weight, self.old_rows.bias)
        return head.with_rows(self.labels, self.weight, self.bias)
