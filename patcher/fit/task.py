"""Everything that new labels are fitted against, put together once for all steps of a fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from patcher.fit.inputs import OldInputs, old_inputs
from patcher.fit.model import OldLabels, from_memory, from_rows
from patcher.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from patcher.arrays import Floats, Ints
    from patcher.fit.inputs import Labelled
    from patcher.fit.settings import Settings
    from patcher.head import Head

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """A head that is to get new labels, and what is known about its old ones.

    Parameters
    ----------
    head
        The head before the patch.
    memory
        The memory of the old labels, or one built from the replayed inputs; None if there is neither.
    old
        The old labels as a Gaussian mixture, from that memory, or else from the head's rows alone.
    inputs
        Real inputs of old labels, replayed ones before those of the memory; None if there are none.
    max_flips
        Share of those inputs that may flip to all new labels together.
    settings
        Settings of the fit.
    firsts
        For each new label, the position INT64 ``[n]`` of the first example that each of its examples repeats.
    heard
        Called with the number of new labels whose rows are fitted so far; None if nobody asks.
    """

    head: Head
    memory: Memory | None
    old: OldLabels
    inputs: OldInputs | None
    max_flips: float
    settings: Settings
    firsts: Mapping[str, Ints]
    heard: Callable[[int], None] | None

    @classmethod
    def of(
        cls,
        examples: Floats,
        head: Head,
        memory: Memory | None,
        replay: Labelled | None,
        max_flips: float,
        settings: Settings,
        firsts: Mapping[str, Ints] | None = None,
        heard: Callable[[int], None] | None = None,
    ) -> Task:
        """Put the task together; ``examples`` are those of all new labels, float32 ``[n, width]``."""
        if memory is None and replay is not None:
            memory = Memory.build(replay.features, replay.ids, head.labels, head.split, most_clusters=1)
        old = from_rows(head, examples, settings) if memory is None else from_memory(memory, head, settings)
        inputs = old_inputs(memory, replay, head)
        if inputs is not None and replay is not None:
            # The flip budget must still hold on the remembered inputs, even if only a few texts are replayed.
            inputs = inputs.beside(old_inputs(memory, None, head))
        if inputs is not None and not head.exclusive:
            # An old text that is also an example of the new label rightly gets it, so it must not count as a flip.
            inputs = inputs.without(examples)
        return cls(head, memory, old, inputs, max_flips, settings, firsts or {}, heard)

    @property
    def replayed(self) -> OldInputs | None:
        """The replayed part of the inputs; None if nothing was replayed."""
        return self.inputs.apart()[0] if self.inputs is not None and self.inputs.source == "replay" else None

    @property
    def source(self) -> str:
        """What the bias is calibrated on: ``replay``, ``features`` of the memory, ``draws`` of a model, or ``none``."""
        if self.inputs is not None:
            return self.inputs.source
        return "none" if self.memory is None else "draws"
