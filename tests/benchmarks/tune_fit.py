"""Compares settings and features of the fit, with old labels posing as new ones; test files are not used.

    python tests/benchmarks/tune_backbone.py --seed 0 --out build/tune0
    python tests/benchmarks/tune_backbone.py --seed 1 --out build/tune1
    python tests/benchmarks/tune_fit.py build/tune0 build/tune1

Each folder holds features from a backbone that never saw the posing labels, including sentences of its own labels that
it was not trained on. Prints one line per variant: one value of ``patcher.fit.settings`` changed, or other features.
``recall at f`` is the new label's recall when the bias lets exactly a share f of the old inputs flip, so it judges the
direction of a row alone.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

import patcher.fit.scope
from patcher.fit import fit
from patcher.fit.inputs import Labelled
from patcher.fit.scope import fit_scope
from patcher.fit.settings import SETTINGS
from patcher.head import Head
from patcher.memory import Memory
from tests.benchmarks.quality_measure import auroc, outcome, recall_at_flips, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from patcher.fit.settings import Settings

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

NEW = "a new label"
RATES = (5e-4, 2e-3, 5e-3)
EXPORTED = ("clf", "three")
FEATURES = {
    "the classifier's alone": ("clf",),
    "and the last layer's mean": ("clf", "last"),
    "and the mean over the last three layers (what export takes)": EXPORTED,
    "and, beside it, the mean over the layers below": ("clf", "three", "below"),
    "and the mean over all layers": ("clf", "all"),
}
METHODS: dict[str, tuple[dict[str, float], ...]] = {
    "ridge": (
        *({"refit_ridge": value} for value in (0.1, 0.3, 1.0)),
        *({"refit_taken_weight": value} for value in (0.25, 0.5)),
    ),
    "lda": ({}, {"refit_taken_weight": 0.25}),
    "anchored": tuple({"anchor": value} for value in (1e-5, 1e-4, 1e-3)),
}
SCOPES: tuple[dict[str, float], ...] = (
    {"total": 0.1},
    {"total": 0.3},
    {"ridge_classifier": 0.3},
    {"ridge_hidden": 0.3},
)
CLUSTERS = (1, 3, 5)
"""Maximum number of clusters per label."""
DIRECTIONS = (32, 64)
"""Number of directions in which the out-of-scope score compares, ``scope._RANK``."""
WIDENINGS = (1e9, 3.0, 2.0, 1.5)
"""Values of ``scope._FRESHER``; with the first, an added label is treated like any other."""
STRETCHES = (1.0, 1.5, 2.0, 2.5)
"""Values of ``scope.FINE_TUNED``."""
PRIORS = tuple((prior, penalty) for prior in ("imprint", "lda") for penalty in (1e-3, 1e-2, 1e-1))
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
    """One backbone: its head and memory, and sentences of its own labels and of the posing ones."""

    head: Head
    memory: Memory
    fresh: Floats
    fresh_ids: Ints
    pose: Floats
    pose_labels: NDArray[np.str_]
    pose_places: Ints
    names: dict[str, Floats]
    outside: Floats
    train: Labelled


def load(folder: Path, parts: Sequence[str], **memory: int) -> Tuning:
    """Load a folder that ``tune_backbone.py`` wrote; ``memory`` are options of ``Memory.build``."""
    files = {name: np.load(folder / f"{name}.npz") for name in ("train", "fresh", "pose", "names", "oos", "head")}
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
    built = Memory.build(rows["train"], ids["train"], labels, head.split, **memory)
    names = dict(zip(files["names"]["labels"].tolist(), rows["names"], strict=True))
    pose = files["pose"]
    return Tuning(
        head=head,
        memory=built,
        fresh=rows["fresh"],
        fresh_ids=ids["fresh"],
        pose=rows["pose"],
        pose_labels=pose["labels"],
        pose_places=pose["places"],
        names=names,
        outside=rows["oos"],
        train=Labelled(rows["train"], ids["train"]),
    )


def figures(
    tuning: Tuning,
    settings: Settings,
    count: int,
    draws: int,
    *,
    name: bool = True,
    first: bool = False,
    method: str = "auto",
    every: int = 1,
) -> Iterator[list[float]]:
    """Flips, recall, F1 and recall at fixed flip rates for each posing label and draw, in per cent.

    ``name`` uses the label's name as one more example. ``first`` takes the first examples in the data, which resemble
    each other, instead of random ones. With ``every``, only each n-th label is measured, for slow methods.
    """
    answers = tuning.head.logits(tuning.fresh).argmax(axis=1)
    last = len(tuning.head.labels)
    for place, label in list(enumerate(sorted(set(tuning.pose_labels.tolist()))))[::every]:
        mine = np.flatnonzero(tuning.pose_labels == label)
        names = {NEW: tuning.names[label]} if name else {}
        for draw in range(1 if first else draws):
            by_place = mine[np.argsort(tuning.pose_places[mine])]
            order = by_place if first else np.random.default_rng([place, draw]).permutation(mine)
            examples, rest = {NEW: tuning.pose[order[:count]]}, tuning.pose[order[count:]]
            replay = tuning.train if method == "anchored" else None
            made = fit(
                examples, tuning.head, tuning.memory, names=names, settings=settings, method=method, replay=replay
            )
            head = made.apply(tuning.head)
            old, new = head.logits(tuning.fresh), head.logits(rest)
            found = outcome(tuning.fresh_ids, answers, old.argmax(axis=1), new.argmax(axis=1), last)
            lead_old = old[:, :last].max(axis=1) - old[:, last]
            lead_new = new[:, last] - new[:, :last].max(axis=1)
            at = recall_at_flips(lead_old, answers == tuning.fresh_ids, lead_new, RATES)
            yield [100 * value for value in (found.flips, found.recall, found.f1, *at)]


def variants(groups: Sequence[str]) -> Iterator[tuple[str, Sequence[str], dict[str, Any]]]:
    """Title, features and changed options of each variant."""
    made: dict[str, Iterator[tuple[str, Sequence[str], dict[str, Any]]]] = {
        "features": ((f"features: {name}", parts, {}) for name, parts in FEATURES.items()),
        "name": (
            (f"{words} the label's name, examples {kind}", EXPORTED, {"name": name, "first": first})
            for words, name in (("with", True), ("without", False))
            for kind, first in (("drawn", False), ("first in the data", True))
        ),
        "prior": (_changed({"prior": prior, "penalty": penalty}) for prior, penalty in PRIORS),
        "method": (_changed(changes, method) for method, several in METHODS.items() for changes in several),
        **{name: (_changed({name: value}) for value in values) for name, values in CHANGES.items()},
    }
    for group in groups:
        yield from made.get(group, ())


def _changed(changes: dict[str, Any], method: str = "auto") -> tuple[str, Sequence[str], dict[str, Any]]:
    words = [] if method == "auto" else [method]
    title = " ".join([*words, *(f"{name} {value}" for name, value in changes.items())])
    how = {"settings": dataclasses.replace(SETTINGS, **changes), "method": method}
    if method == "anchored":
        return f"{title} (each third label)", EXPORTED, {**how, "every": 3}
    return title, EXPORTED, how


def scopes(folders: Sequence[Path]) -> Iterator[list[str]]:
    """How well the score separates fresh texts from those of the posing labels, and from those of no label."""

    def row(title: str, parts: Sequence[str], settings: Settings, **memory: int) -> list[str]:
        cells = []
        for folder in folders:
            tuning = load(folder, parts, **memory)
            scope = fit_scope(tuning.memory, tuning.head, settings=settings)
            inside, near, far = (
                scope.score(rows, tuning.head.logits(rows)) for rows in (tuning.fresh, tuning.pose, tuning.outside)
            )
            cells.append(f"{auroc(inside, near):.4f}, {auroc(inside, far):.4f}")
        print(title, *cells, sep=" | ", flush=True)
        return [title, *cells]

    for name, parts in FEATURES.items():
        yield row(f"features: {name}", parts, SETTINGS)
    for changes in SCOPES:
        title = ", ".join(f"{name} {value}" for name, value in changes.items())
        yield row(title, EXPORTED, dataclasses.replace(SETTINGS, **changes))
    for count in CLUSTERS:
        yield row(f"at most {count} cluster{'s' * (count > 1)} a label", EXPORTED, SETTINGS, most_clusters=count)
    for count in DIRECTIONS:
        with mock.patch.object(patcher.fit.scope, "_RANK", count):
            yield row(f"{count} directions", EXPORTED, SETTINGS)


def called_out(tuning: Tuning, stretch: float, count: int) -> str:
    """Shares called out of scope after adding a posing label: its other texts, fresh texts, texts of no label; AUROC.

    The AUROC compares fresh texts with texts of no label.
    """
    found = []
    for place, label in enumerate(sorted(set(tuning.pose_labels.tolist()))):
        mine = np.random.default_rng([place, 0]).permutation(np.flatnonzero(tuning.pose_labels == label))
        examples, rest = tuning.pose[mine[:count]], tuning.pose[mine[count:]]
        head = fit({NEW: examples}, tuning.head, tuning.memory).apply(tuning.head)
        memory = tuning.memory.add([NEW], examples, np.zeros(count, np.int64))
        scope = fit_scope(memory, head, stretch=stretch)
        every = (rest, tuning.fresh[1::2], tuning.outside)
        mine, old, far = (scope.score(rows, head.logits(rows)) for rows in every)
        found.append([np.mean(mine < 0.5), np.mean(old < 0.5), np.mean(far < 0.5), auroc(old, far)])
    shares = np.mean(found, axis=0)
    return ", ".join([*(f"{100 * share:.1f} %" for share in shares[:3]), f"{shares[3]:.4f}"])


def added(folders: Sequence[Path], count: int) -> Iterator[list[str]]:
    """``called_out`` for several values of ``scope._FRESHER``, with the limit set on fresh texts."""
    for value in WIDENINGS:
        cells = []
        for folder in folders:
            tuning = load(folder, EXPORTED)
            with mock.patch.object(patcher.fit.scope, "_FRESHER", value):
                stretch = fit_scope(tuning.memory, tuning.head, fresh=tuning.fresh[::2]).stretch
                cells.append(called_out(tuning, stretch, count))
        print(value, *cells, sep=" | ", flush=True)
        yield ["as any other" if value > 10 else f"{value}", *cells]


def stretches(folders: Sequence[Path], count: int) -> Iterator[list[str]]:
    """``called_out`` without fresh texts, with the limit at several multiples of the remembered texts' own."""
    tunings = [load(folder, EXPORTED) for folder in folders]
    own = [fit_scope(each.memory, each.head, fresh=each.fresh[::2]).stretch for each in tunings]
    for title, values in [*((f"{value}", [value] * len(tunings)) for value in STRETCHES), ("as fresh texts say", own)]:
        cells = [called_out(tuning, value, count) for tuning, value in zip(tunings, values, strict=True)]
        if values is own:
            cells = [f"({value:.2f}) {cell}" for value, cell in zip(own, cells, strict=True)]
        print(title, *cells, sep=" | ", flush=True)
        yield [title, *cells]


SEQUENCES: tuple[tuple[str, dict[str, float]], ...] = (
    ("auto", {}),
    *(("auto", {"taken_weight": value}) for value in (0.5, 1.0)),
    *(("ridge", {"refit_taken_weight": value}) for value in (0.25, 0.5, 1.0)),
    *(("ridge", {"refit_ridge": value}) for value in (0.1, 1.0)),
    *(("lda", {"refit_taken_weight": value}) for value in (0.25, 0.5, 1.0)),
)
"""Methods and changed settings, compared by adding ten labels one after another."""
IN_TURN, ORDERS = 10, 3


def in_turn(tuning: Tuning, settings: Settings, count: int, method: str, order: int) -> tuple[float, float]:
    """Accuracy on fresh texts and on the posing labels' other texts after adding ten posing labels one by one."""
    rng = np.random.default_rng([100, order])
    head, memory, rest = tuning.head, tuning.memory, []
    for label in rng.permutation(sorted(set(tuning.pose_labels.tolist())))[:IN_TURN].tolist():
        mine = rng.permutation(np.flatnonzero(tuning.pose_labels == label))
        examples = tuning.pose[mine[:count]]
        names = {label: tuning.names[label]}
        head = fit({label: examples}, head, memory, names=names, settings=settings, method=method).apply(head)
        memory = memory.add([label], examples, np.zeros(count, np.int64))
        rest.append(tuning.pose[mine[count:]])
    old = float((head.logits(tuning.fresh).argmax(axis=1) == tuning.fresh_ids).mean())
    first = len(tuning.head.labels)
    found = [float((head.logits(rows).argmax(axis=1) == first + i).mean()) for i, rows in enumerate(rest)]
    return old, float(np.mean(found))


def sequences(folders: Sequence[Path], count: int) -> Iterator[list[str]]:
    """Accuracy on old, new and all labels after ``in_turn``, with every label weighted equally."""
    tunings = [load(folder, EXPORTED) for folder in folders]
    for method, changes in SEQUENCES:
        title = " ".join([method, *(f"{name} {value}" for name, value in changes.items())])
        settings, cells = dataclasses.replace(SETTINGS, **changes), []  # type: ignore[arg-type]
        for tuning in tunings:
            runs = [in_turn(tuning, settings, count, method, order) for order in range(ORDERS)]
            old, new = 100 * np.mean(runs, axis=0)
            labels = len(tuning.head.labels)
            cells.append(f"{old:.2f}, {new:.2f}, {(labels * old + IN_TURN * new) / (labels + IN_TURN):.2f}")
        print(title, *cells, sep=" | ", flush=True)
        yield [title, *cells]


def main() -> None:
    """Print the tables and write them to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that tune_backbone.py wrote")
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument(
        "--only", default=",".join(("features", "name", "prior", "method", *CHANGES, "sequence", "scope"))
    )
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
    if "sequence" in given.only.split(","):
        heads = ["variant", *(f"{folder.name}: right of old, of new, of all labels, %" for folder in given.folders)]
        title = f"## {IN_TURN} posing labels one after another, {ORDERS} orders"
        lines += ["", title, "", *table(heads, list(sequences(given.folders, given.examples)))]
    if "scope" in given.only.split(","):
        heads = ["variant", *(f"{folder.name}: AUROC, posing labels, no label" for folder in given.folders)]
        lines += [
            "",
            "## Out of scope: fresh texts against those of the posing labels, and of no label",
            "",
            *table(heads, list(scopes(given.folders))),
        ]
        heads = ["wider", *(f"{folder.name}: called out: added, old, of no label; AUROC" for folder in given.folders)]
        title = f"## Out of scope, a posing label added by {given.examples} examples, the limit set on fresh texts"
        lines += ["", title, "", *table(heads, list(added(given.folders, given.examples)))]
        heads[0] = "times the remembered texts' limit"
        title = "## The same where no fresh texts set the limit"
        lines += ["", title, "", *table(heads, list(stretches(given.folders, given.examples)))]
    given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
