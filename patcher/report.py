"""One page about a head version: what changed, what the gate said, and on labelled texts before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.difference import Difference, diff
from patcher.errors import InputError, LabelError, ToolError, VersionError
from patcher.evaluation import Evaluation, LabelScore, evaluate_head
from patcher.feature_map import FeatureMap, feature_map
from patcher.features import extract_features
from patcher.lifecycle import Entry, entry
from patcher.report_page import PAGE
from patcher.storage.disk import storage_errors
from patcher.storage.moves import replace
from patcher.wording import install_hint, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from patcher.arrays import Floats
    from patcher.classifier import Classifier
    from patcher.examples import Examples
    from patcher.head import Head

__all__ = ["Report", "make_report", "render", "write_page"]

_SHOWN = 100
"""Flips and gains in words on the page; the counts are of all."""
_WIDTH, _HEIGHT, _MARGIN = 640.0, 420.0, 16.0
_COLOURS = ("#c2255c", "#1971c2", "#2f9e44", "#e8590c", "#6741d9", "#0c8599", "#868e96", "#a0703c", "#364fc7")


@dataclass(frozen=True)
class Report:
    """What is known of a version.

    ``parent`` is the version it is compared with, None where there is none on disk any more; ``difference`` what
    changed since then; ``before`` and ``after`` how both answer the labelled texts, where some were given (``before``
    is None, too, where the parent knows none of their labels); ``map`` the changed label among its neighbours.
    """

    classifier: str
    entry: Entry
    parent: int | None
    difference: Difference | None
    before: Evaluation | None
    after: Evaluation | None
    map: FeatureMap | None

    def to_json(self) -> dict[str, Any]:
        """As one document; the map's points as lists."""
        points = self.map and {
            "labels": list(self.map.labels),
            "points": [[round(float(x), 3), round(float(y), 3)] for x, y in self.map.points],
            "ids": self.map.ids.tolist(),
        }
        return {
            "classifier": self.classifier,
            "version": self.entry.to_json(),
            "parent": self.parent,
            "difference": self.difference and self.difference.to_json(),
            "before": self.before and self.before.to_json(),
            "after": self.after and self.after.to_json(),
            "map": points,
        }


def make_report(
    classifier: Classifier,
    version: int | None = None,
    examples: Examples | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Gather what there is about ``version``, the serving one by default; ``examples`` are labelled texts.

    Raises
    ------
    VersionError
        where there is no such version.
    ExamplesError, LabelError
        for texts without labels, or of labels that the version does not know.
    """
    serving = classifier.serving()
    number = serving if version is None else version
    head = classifier.head(number)
    about = entry(classifier, number, serving)
    parent = _parent(classifier, about)
    difference = before = after = None
    features = None if examples is None else extract_features(classifier, examples.texts, None, progress)
    if parent is not None:
        difference = diff(classifier, parent, number, examples, features)
    if examples is not None and features is not None:
        # A label that was renamed or merged is the same in both, as in the difference, whichever name the file has.
        names = dict((*difference.renamed, *difference.merged)) if difference else {}
        labels = examples.labelled()
        after = evaluate_head(head, features, labels, names)
        before = None if parent is None else _before(classifier.head(parent), names, features, labels)
    memory = classifier.memory(number)
    changed = [*about.lineage.added, *(new for _, new in about.lineage.renamed)]
    return Report(
        classifier=classifier.name,
        entry=about,
        parent=parent,
        difference=difference,
        before=before,
        after=after,
        map=feature_map(memory, changed) if memory is not None and changed else None,
    )


def _before(head: Head, names: Mapping[str, str], features: Floats, labels: Sequence[str]) -> Evaluation | None:
    """How the parent answers, its labels under their new names; None for texts of labels that it lacks alone."""
    try:
        return evaluate_head(head, features, labels, names)
    except LabelError:
        return None


def _parent(classifier: Classifier, about: Entry) -> int | None:
    parent = about.lineage.parent
    if parent is None:
        return None
    try:
        classifier.version_name(parent)
    except VersionError:  # pruned
        return None
    return parent


def render(report: Report) -> str:
    """The page, one HTML document that asks for nothing from elsewhere.

    Raises ToolError where jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ToolError(f"a report needs jinja2, which is not installed: {install_hint('report')}") from None
    # Texts and labels are whatever somebody wrote: all of them are escaped.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = percent
    template = environment.from_string(PAGE)
    page: str = template.render(report=report, shown=_SHOWN, changes=_changes(report), picture=_picture(report.map))
    return page


def write_page(report: Report, path: Path) -> None:
    """The page as a file, whole or not at all.

    Raises InputError where its folder is not there, StorageError where the file cannot be written.
    """
    if not path.parent.is_dir():
        raise InputError(
            f"cannot write {path}: there is no folder {path.parent}; expected a path in an existing folder"
        )
    page = render(report)
    with storage_errors(path):
        replace(path, page.encode())


@dataclass(frozen=True)
class _Change:
    label: str
    before: LabelScore | None
    after: LabelScore | None

    @property
    def size(self) -> float:
        """By how much the F1 changed."""
        return abs((self.after.f1 if self.after else 0.0) - (self.before.f1 if self.before else 0.0))


def _changes(report: Report) -> list[_Change]:
    """Labels whose figures changed, the most first."""
    if report.after is None or report.before is None:
        return []
    old, new = report.before.per_label, report.after.per_label
    found = [_Change(label, old.get(label), new.get(label)) for label in sorted({*old, *new})]
    return sorted((each for each in found if each.before != each.after), key=lambda each: -each.size)


@dataclass(frozen=True)
class _Dot:
    x: float
    y: float
    label: str
    colour: str
    radius: float


@dataclass(frozen=True)
class _Picture:
    width: float
    height: float
    dots: tuple[_Dot, ...]
    legend: tuple[tuple[str, str], ...]


def _picture(shown: FeatureMap | None) -> _Picture | None:
    """The map in the page's own units."""
    if shown is None:
        return None
    low, high = shown.points.min(axis=0), shown.points.max(axis=0)
    room = np.array([_WIDTH, _HEIGHT]) - 2 * _MARGIN
    scale = float((room / np.maximum(high - low, 1e-6)).min())  # the same both ways: distances stay distances
    places = _MARGIN + (room - (high - low) * scale) / 2 + (shown.points - low) * scale
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(shown.labels)}
    dots = [
        _Dot(round(float(x), 1), round(float(y), 1), label, colours[label], 5.0 if owner < shown.asked else 3.5)
        for (x, y), owner in zip(places, shown.ids.tolist(), strict=True)
        for label in [shown.labels[owner]]
    ]
    return _Picture(_WIDTH, _HEIGHT, tuple(dots), tuple(colours.items()))
