"""What the verbs of ``walk.py`` are drawn from: sentences, labels, files, and the servers that a verb names."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import numpy as np
    from walk_model import Rules, Twin, World

__all__ = ["KINDS", "NO_LABELS", "Draw", "Drawing", "Plan"]

KINDS = (*tiny.OLD, *tiny.NEW)
ODD = [
    "null", "LABEL_0", "2024", "NaN", "-dash", "--help", "a, b", 'say "x"', "naïve Bayes", "ピザ", "é" * 250, "x" * 500,
    "😀", "'", "True", "a|b", "../../etc", "{json: 1}", "label", "text", "O'Neil; DROP", "0", "1e3", "none of these",
]  # fmt: skip
NO_LABELS = ["", " ", " padded", "line\nbreak", "nul\0", "y" * 600]


@dataclass
class Plan:
    """A verb to run: its options, its positional arguments (``words``, after ``--``), and the allowed exit codes.

    If the verb exits with one of the codes ``done``, ``change`` applies it to the model and ``check`` checks its
    document. ``named`` are the places of the servers in its ``--url``; if empty, all servers.
    """

    verb: str
    options: list[str]
    words: list[str]
    codes: set[int]
    change: Callable[[World], None] | None = None
    check: Callable[[Rules, World, Any], None] | None = None
    done: frozenset[int] = frozenset({0})
    named: tuple[int, ...] = ()

    def does(self) -> bool:
        """Whether, according to the model, the verb may succeed and change something."""
        return self.change is not None and bool(self.done & self.codes)


@dataclass
class Draw:
    """What a verb is drawn for: a classifier, and the servers that it names, some of which may be down."""

    world: World
    name: str
    named: tuple[int, ...]

    @property
    def twin(self) -> Twin:
        """The model of the classifier."""
        return self.world.twins[self.name]

    @property
    def up(self) -> tuple[int, ...]:
        """The named servers that run, in the order in which they are named."""
        return tuple(place for place in self.named if self.world.replicas[place].up)

    @property
    def server(self) -> bool:
        """Whether one of the named servers runs."""
        return bool(self.up)

    @property
    def away(self) -> bool:
        """Whether one of the named servers is down."""
        return len(self.up) < len(self.named)

    @property
    def answering(self) -> set[int]:
        """The versions that an answer may come from; the first named server that runs gives it."""
        return self.world.replicas[self.up[0]].answering.get(self.name, set()) if self.up else set()


@dataclass
class Drawing:
    """Draws sentences, labels, and files, which it writes to ``folder``."""

    rng: np.random.Generator
    folder: Path
    location: Any
    in_folder: bool
    checkpoint: Path | None = None
    seeds: int = 100
    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Every label that was ever used, with the kinds of sentences that it stood for last."""

    def maybe(self, chance: float) -> bool:
        """True with probability ``chance``."""
        return bool(self.rng.random() < chance)

    def pick(self, values: Iterable[Any]) -> Any:
        """One of the values."""
        values = list(values)
        return values[int(self.rng.integers(len(values)))]

    def some(self, values: Iterable[Any], least: int, most: int) -> list[Any]:
        """Between ``least`` and ``most`` of the values, in random order."""
        values = list(values)
        count = min(len(values), int(self.rng.integers(least, most + 1)))
        return [values[i] for i in self.rng.permutation(len(values))[:count]]

    def kinds_of(self, label: str) -> tuple[str, ...]:
        """The kinds of sentences that a label stood for when it was last used."""
        return self.used[label]

    def sentences(self, kinds: Iterable[str], count: int) -> list[str]:
        """``count`` sentences of the given kinds, different ones in each call."""
        self.seeds += 1
        kinds = list(kinds)
        each = [tiny.sentences(kind, count, self.seeds) for kind in kinds]
        return [each[i % len(kinds)][i] for i in range(count)]

    def file(self, groups: Mapping[str, Iterable[str]]) -> str:
        """Write a labelled file; returns its path."""
        self.seeds += 1
        path = self.folder / f"{self.seeds}.csv"
        rows = [(text, label) for label, texts in groups.items() for text in texts]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        return str(path)

    def old_data(self, twin: Twin, count: int = 6, **more: Any) -> str:
        """Write a labelled file with texts of the serving version's labels, and ``more``."""
        known = {label: self.sentences(kinds, count) for label, kinds in twin.now.kinds.items()}
        return self.file(known | more)

    def new_name(self, draw: Draw) -> str:
        """A name for a label: an ordinary one, an odd one, or one that was used before."""
        chosen = self.rng.random()
        if chosen < 0.35 and self.used:
            return str(self.pick(self.used))
        return str(self.pick(ODD)) if chosen < 0.7 else f"label_{self.seeds}_{draw.name}"

    def no_label(self, twin: Twin, label: str) -> bool:
        """Whether the name is invalid for a label."""
        fine = label.strip() == label and label and label.isprintable() and len(label.encode()) <= 512
        return not fine or (not twin.exclusive and "|" in label)
