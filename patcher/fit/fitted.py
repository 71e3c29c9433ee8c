"""What comes out of a fit: new rows, and what was seen of old inputs and of the examples on the way."""

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


@dataclass(frozen=True, eq=False)
class Fit:
    """New rows, and what became of the old ones.

    Parameters
    ----------
    labels, weight, bias
        The new labels and their rows, float32 ``[K, width]`` and ``[K]``.
    method, why
        The fit that was used, and one sentence on why.
    source
        What the bias was set on: ``features`` of the memory, ``replay``, ``draws`` of a model, or ``none``.
    old
        What the rows were fitted against.
    held_out
        For each new label, its examples as a fit sees them that did not have them.
    old_rows
        New rows of the old labels; None where they are unchanged, as in the default method.
    counted
        Real inputs of old labels on which the harm can be counted, the best first: those that took no part in a refit
        of their rows.
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
        """The head with the new rows behind the old ones; lineage and scope are the caller's business."""
        if self.old_rows is not None:
            head = head.refitted(self.old_rows.weight, self.old_rows.bias)
        return head.with_rows(self.labels, self.weight, self.bias)
