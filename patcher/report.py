"""One page about a head version: what changed, the gate's verdict, and accuracy on labelled texts before and after."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.difference import Difference, diff
from patcher.errors import InputError, LabelError, ToolError, VersionError
from patcher.evaluation import Evaluation, LabelScore, evaluate_head, expected_sets
from patcher.feature_map import FeatureMap, feature_map
from patcher.features import extract_features
from patcher.label_names import earlier_names
from patcher.lifecycle import Entry, entry
from patcher.report_page import PAGE
from patcher.storage.disk import storage_errors
from patcher.storage.moves import replace
from patcher.wording import count_and_some, install_hint, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from patcher.arrays import Floats
    from patcher.classifier import Classifier
    from patcher.examples import Examples
    from patcher.head import Head

__all__ = ["Report", "check_target", "make_report", "render", "write_page"]

_SHOWN = 100
"""The maximum number of flips and of gains listed on the page; the counts include all."""
_WIDTH, _HEIGHT, _MARGIN = 640.0, 420.0, 16.0
_COLOURS = ("#c2255c", "#1971c2", "#2f9e44", "#e8590c", "#6741d9", "#0c8599", "#868e96", "#a0703c", "#364fc7")


@dataclass(frozen=True)
class Report:
    """Everything known about a version.

    ``parent`` is the version it is compared with, None if there is none in the repository (any more), and
    ``difference`` is what changed since then. ``before`` and ``after`` are the evaluations of both on the labelled
    texts, if some were given; ``before`` is also None if the parent has none of their labels. ``map`` shows the
    features of the changed labels among their neighbours.
    """

    classifier: str
    entry: Entry
    parent: int | None
    difference: Difference | None
    before: Evaluation | None
    after: Evaluation | None
    map: FeatureMap | None

    def to_json(self) -> dict[str, Any]:
        """The report as one JSON document."""
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
    """Gather the report on ``version``, by default the serving one; ``examples`` are labelled texts.

    Raises
    ------
    VersionError
        If there is no such version.
    ExamplesError, LabelError
        For texts without labels, or if the version has none of their labels.
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
        # A renamed or merged label counts as the same in both versions, whichever name the file uses; so does `diff`.
        labels = examples.labelled()
        renamed, merged = earlier_names(classifier, head, frozenset().union(*expected_sets(head, labels)))
        names = {**renamed, **merged, **dict((*difference.renamed, *difference.merged) if difference else ())}
        after = evaluate_head(head, features, labels, names)
        after = dataclasses.replace(after, renamed=tuple(renamed.items()), merged=tuple(merged.items()))
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
    """The parent's evaluation, with its labels under their new names; None if it has none of the texts' labels."""
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
    """Render the page as one self-contained HTML document.

    Raises ToolError if jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ToolError(f"a report needs jinja2, which is not installed: {install_hint('report')}") from None
    # Texts and labels are untrusted, so autoescape is on.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = percent
    environment.filters["count_and_some"] = count_and_some
    environment.filters["at_least"] = partial(percent, down=True)
    template = environment.from_string(PAGE)
    page: str = template.render(report=report, shown=_SHOWN, changes=_changes(report), picture=_picture(report.map))
    return page


def check_target(path: Path) -> None:
    """Raise InputError if ``path`` does not end in .html (another file might be replaced), or has no folder."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"cannot write a page to {path}: expected a name that ends in .html")
    if not path.parent.is_dir():
        raise InputError(
            f"cannot write {path}: there is no folder {path.parent}; expected a path in an existing folder"
        )


def write_page(report: Report, path: Path) -> None:
    """Write the page to a file atomically.

    Raises InputError as ``check_target`` does, and StorageError if the file cannot be written.
    """
    check_target(path)
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
        """The absolute change in F1."""
        return abs((self.after.f1 if self.after else 0.0) - (self.before.f1 if self.before else 0.0))


def _changes(report: Report) -> list[_Change]:
    """Labels whose figures changed, largest change first."""
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
    """The map in the page's coordinates."""
    if shown is None:
        return None
    low, high = shown.points.min(axis=0), shown.points.max(axis=0)
    room = np.array([_WIDTH, _HEIGHT]) - 2 * _MARGIN
    scale = float((room / np.maximum(high - low, 1e-6)).min())  # one scale for both axes, to preserve distances
    places = _MARGIN + (room - (high - low) * scale) / 2 + (shown.points - low) * scale
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(shown.labels)}
    dots = [
        _Dot(round(float(x), 1), round(float(y), 1), label, colours[label], 5.0 if owner < shown.asked else 3.5)
        for (x, y), owner in zip(places, shown.ids.tolist(), strict=True)
        for label in [shown.labels[owner]]
    ]
    return _Picture(_WIDTH, _HEIGHT, tuple(dots), tuple(colours.items()))
