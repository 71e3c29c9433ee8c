"""Draws the verbs of ``walk.py``: how likely each is, and which servers it names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from walk_changes import Changes
from walk_drawing import Draw, Plan
from walk_looks import Looks

if TYPE_CHECKING:
    from walk_model import World

__all__ = ["Plan", "Verbs"]

_CHANGES = {
    "add_label": 20, "rename_label": 8, "remove_label": 8, "merge_labels": 5, "remember": 3, "rollback": 12, "prune": 2,
    "canary": 10, "new_classifier": 5, "drop_classifier": 3,
}  # fmt: skip
_LOOKS = {
    "labels": 2, "history": 4, "diff": 4, "evaluate": 3, "report": 2, "classify": 3, "doctor": 3, "sync": 4,
    "upgrade": 1, "loadtest": 1, "tune": 0.3,
}  # fmt: skip
_OF_ALL = ("new-classifier", "drop-classifier", "sync", "doctor", "export")
"""The verbs that do not work on a single classifier."""


class Verbs(Changes, Looks):
    """Draws a verb at random."""

    def draw(
        self, world: World, *, changing: bool = False, classifier: str | None = None, all_named: bool = False
    ) -> Plan:
        """Draw the next verb; with ``changing`` one that changes something, with ``classifier`` one for it.

        It names all servers, or sometimes only a few (never with ``all_named``), so that the others are then behind.
        """
        name = classifier or str(self.rng.choice(sorted(world.twins)))
        chances = dict(_CHANGES if changing else {**_CHANGES, **_LOOKS})
        if classifier:
            chances.pop("new_classifier")
        if self.checkpoint and not changing:
            chances |= {"export": 1, "to_transformers": 1}
        names = list(chances)
        total = sum(chances.values())
        verb = str(self.rng.choice(names, p=[chances[each] / total for each in names]))
        named = list(range(len(world.replicas)))
        if len(named) > 1 and not all_named:
            named = self.some(named, len(named) if self.maybe(0.85) else 1, len(named))
        plan: Plan = getattr(self, verb)(Draw(world, name, tuple(named)))
        plan.named = tuple(named)
        if plan.verb not in _OF_ALL:
            plan.options += ["--classifier", name]
        return plan
