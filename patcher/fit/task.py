"""What new labels are fitted against, put together once for all that a fit does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from patcher.fit.inputs import OldInputs, old_inputs
from patcher.fit.model import OldLabels, from_memory, from_rows
from patcher.memory import Memory

if TYPE_CHECKING:
    from patcher.arrays import Floats
    from patcher.fit.inputs import Labelled
    from patcher.fit.settings import Settings
    from patcher.head import Head

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """A head that is to get new labels, and what is known of its old ones.

    Parameters
    ----------
    head
        As it is.
    memory
        What is kept of the old labels, or was made of the replayed inputs; None where there is neither.
    old
        The old labels as a mixture, from that memory or else from the head's rows alone.
    inputs
        Real inputs of old labels, replayed ones before those of the memory; None where there are none.
    max_flips
        Share of them that may be lost to all new labels together.
    settings
        Figures of the fit.
    """

    head: Head
    memory: Memory | None
    old: OldLabels
    inputs: OldInputs | None
    max_flips: float
    settings: Settings

    @classmethod
    def of(
        cls,
        examples: Floats,
        head: Head,
        memory: Memory | None,
        replay: Labelled | None,
        max_flips: float,
        settings: Settings,
    ) -> Task:
        """The task of labels whose ``examples`` are float32 ``[n, width]``, those of all together."""
        if memory is None and replay is not None:
            memory = Memory.build(replay.features, replay.ids, head.labels, head.split, most_clusters=1)
        old = from_rows(head, examples, settings) if memory is None else from_memory(memory, head, settings)
        inputs = old_inputs(memory, replay, head)
        if inputs is not None and replay is not None:
            # A few replayed texts must not lift the budget that holds on all remembered ones.
            inputs = inputs.beside(old_inputs(memory, None, head))
        if inputs is not None and not head.exclusive:
            # What is an example of the new label has it by right, and is no input that the label may not have.
            inputs = inputs.without(examples)
        return cls(head, memory, old, inputs, max_flips, settings)

    @property
    def replayed(self) -> OldInputs | None:
        """The replayed ones of the inputs; None where nothing was replayed."""
        return self.inputs.apart()[0] if self.inputs is not None and self.inputs.source == "replay" else None

    @property
    def source(self) -> str:
        """What a row's bias is set on: ``replay``, ``features`` of the memory, ``draws`` of a model, or ``none``."""
        if self.inputs is not None:
            return self.inputs.source
        return "none" if self.memory is None else "draws"
