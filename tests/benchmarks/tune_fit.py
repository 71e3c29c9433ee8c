"""Choose the figures of a fit and the features it sees by old labels posing as new ones; test files take no part.

    python tests/benchmarks/tune_backbone.py --seed 0 --out build/tune0
    python tests/benchmarks/tune_backbone.py --seed 1 --out build/tune1
    python tests/benchmarks/tune_fit.py build/tune0 build/tune1

Each folder holds the features of a backbone that never saw the posing labels, and sentences of its own labels that it
was not trained on. Prints one line a variant: one figure of ``patcher.fit.settings`` changed, or other features.
``recall at f`` is the new label's recall where the bias lets just a share f of the old inputs flip: it judges the
direction of a row alone.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.fit import fit
from patcher.fit.settings import SETTINGS
from patcher.head import Head
from patcher.memory import Memory
from tests.benchmarks.quality_measure import outcome, recall_at_flips, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from patcher.fit.settings import Settings

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

NEW = "a new label"
RATES = (5e-4, 2e-3, 5e-3)
FEATURES = {
    "the classifier's alone": ("clf",),
    "and the last layer's mean": ("clf", "h6"),
    "and the last two layers', side by side": ("clf", "h6", "h5"),
    "and the last three layers', side by side": ("clf", "h6", "h5", "h4"),
    "and the mean over the last three layers (what export takes)": ("clf", "wide"),
}
CHANGES: dict[str, tuple[float, ...]] = {
    "ridge_classifier": (0.5, 2.0),
    "ridge_hidden": (0.05, 0.2),
    "total": (0.5, 2.0),
    "positive_variance": (2.0, 6.0),
    "penalty": (3e-4, 3e-3),
    "hard": (32, 128),
    "hard_weight": (0.05, 0.2),
    "taken_weight": (0.1, 0.15, 0.2, 0.4),
}


@dataclass(frozen=True)
class Tuning:
    """One backbone: its head and memory, sentences of its own labels, and those of the posing ones."""

    head: Head
    memory: Memory
    fresh: Floats
    fresh_ids: Ints
    pose: Floats
    pose_labels: NDArray[np.str_]
    pose_places: Ints
    names: dict[str, Floats]


def load(folder: Path, parts: Sequence[str]) -> Tuning:
    """Features of one folder that ``tune_backbone.py`` wrote."""
    files = {name: np.load(folder / f"{name}.npz") for name in ("train", "fresh", "pose", "names", "head")}
    rows = {
        name: np.concatenate([file[part] for part in parts], axis=1).astype(np.float32)
        for name, file in files.items()
        if name != "head"
    }
    layer = files["head"]
    labels = layer["labels"].tolist()
    place = {label: i for i, label in enumerate(labels)}
    ids = {name: np.array([place[label] for label in files[name]["labels"]], np.int64) for name in ("train", "fresh")}
    head = Head.from_linear(labels, layer["W"], layer["b"], rows["train"].shape[1], "tuning")
    memory = Memory.build(rows["train"], ids["train"], labels, head.split)
    names = dict(zip(files["names"]["labels"].tolist(), rows["names"], strict=True))
    pose = files["pose"]
    return Tuning(head, memory, rows["fresh"], ids["fresh"], rows["pose"], pose["labels"], pose["places"], names)


def figures(
    tuning: Tuning, settings: Settings, count: int, draws: int, *, name: bool = True, first: bool = False
) -> Iterator[list[float]]:
    """Flips, recall, F1 and the recalls at fixed flips of each posing label and draw, in per cent.

    ``name`` takes the label's name as one example more; ``first`` takes the first examples in the data,
    which resemble each other, instead of a draw.
    """
    before = tuning.head.logits(tuning.fresh)
    answers = before.argmax(axis=1)
    for place, label in enumerate(sorted(set(tuning.pose_labels.tolist()))):
        mine = np.flatnonzero(tuning.pose_labels == label)
        names = {NEW: tuning.names[label]} if name else {}
        for draw in range(1 if first else draws):
            by_place = mine[np.argsort(tuning.pose_places[mine])]
            order = by_place if first else np.random.default_rng([place, draw]).permutation(mine)
            examples, rest = tuning.pose[order[:count]], tuning.pose[order[count:]]
            made = fit({NEW: examples}, tuning.head, tuning.memory, names=names, settings=settings)
            old, new = tuning.fresh @ made.weight[0] + made.bias[0], rest @ made.weight[0] + made.bias[0]
            last = len(tuning.head.labels)
            after = np.where(old > before.max(axis=1), last, answers)
            lead = new - tuning.head.logits(rest).max(axis=1)
            found = outcome(tuning.fresh_ids, answers, after, np.where(lead > 0, last, -1), last)
            at = recall_at_flips(before.max(axis=1) - old, answers == tuning.fresh_ids, lead, RATES)
            yield [100 * value for value in (found.flips, found.recall, found.f1, *at)]


def variants(changed: Sequence[str]) -> Iterator[tuple[str, Sequence[str], dict[str, Any]]]:
    """Name, features and what is different in each."""
    if "features" in changed:
        for name, parts in FEATURES.items():
            yield f"features: {name}", parts, {}
    if "name" in changed:
        for words, name in (("with", True), ("without", False)):
            for kind, first in (("drawn", False), ("first in the data", True)):
                yield f"{words} the label's name, examples {kind}", ("clf", "wide"), {"name": name, "first": first}
    for setting, values in CHANGES.items():
        if setting in changed:
            for value in values:
                settings = dataclasses.replace(SETTINGS, **{setting: value})
                yield f"{setting} {value:g}", ("clf", "wide"), {"settings": settings}


def main() -> None:
    """Print the table, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="what tune_backbone.py wrote")
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--only", default=",".join(("features", "name", *CHANGES)))
    parser.add_argument("--out", type=Path, default=Path("tests/benchmarks/results/tuning.md"))
    given = parser.parse_args()
    heads = ["variant", *(f"{folder.name}: flips, recall, F1 / recall at 0.05, 0.2, 0.5 %" for folder in given.folders)]
    rows = []
    for title, parts, how in variants(given.only.split(",")):
        cells = []
        for folder in given.folders:
            options = {"settings": SETTINGS, **how}
            found = np.array(list(figures(load(folder, parts), count=given.examples, draws=given.draws, **options)))
            mean = found.mean(axis=0)
            cells.append(f"{mean[0]:.3f}, {mean[1]:.1f}, {mean[2]:.1f} / " + ", ".join(f"{x:.1f}" for x in mean[3:]))
        rows.append([title, *cells])
        print(title, *cells, sep=" | ", flush=True)
    lines = [
        "# Old labels posing as new ones",
        "",
        f"Mean over labels and draws, {given.examples} examples.",
        "",
        *table(heads, rows),
    ]
    given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
