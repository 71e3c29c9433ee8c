"""The versions of a classifier after they are published: history, accuracy, the way back."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher import canary
from patcher.arguments import require
from patcher.errors import InputError, RepositoryError, VersionError
from patcher.evaluation import Evaluation, evaluate_head
from patcher.examples import as_examples
from patcher.features import extract_features
from patcher.head import Lineage
from patcher.recovery import catch_up, changing
from patcher.repository import one_classifier
from patcher.rollout import Switch, roll_back
from patcher.triton.client import TritonServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from patcher.classifier import Classifier
    from patcher.examples import ExamplesLike
    from patcher.repository import ClassifierLike

__all__ = ["Entry", "entry", "evaluate", "history", "prune", "rollback", "sync"]


@dataclass(frozen=True)
class Entry:
    """One version in the lineage."""

    lineage: Lineage
    labels: int
    serving: bool

    def what(self) -> str:
        """The change in a few words."""
        first = "exported" if self.lineage.method == "export" else "new"
        added = [f"+{label}" for label in self.lineage.added] if self.lineage.parent else [first]
        removed = [f"-{label}" for label in self.lineage.removed]
        renamed = [f"{old} -> {new}" for old, new in self.lineage.renamed]
        return ", ".join([*added, *removed, *renamed])

    def to_json(self) -> dict[str, Any]:
        """As the contract has it, with what else is known."""
        record = dataclasses.asdict(self.lineage)
        return {
            "version": record.pop("version"),
            "parent": record.pop("parent"),
            "created": record.pop("created"),
            "labels": self.labels,
            "added": record.pop("added"),
            "removed": record.pop("removed"),
            "method": record.pop("method"),
            "gate": record.pop("gate"),
            "backbone": record.pop("backbone"),
            "serving": self.serving,
            **record,
        }


def history(classifier: ClassifierLike) -> list[Entry]:
    """Every version on disk, oldest first."""
    classifier = one_classifier(classifier)
    serving, found = classifier.serving(), []
    for version in classifier.versions():
        with contextlib.suppress(VersionError):  # pruned meanwhile
            found.append(entry(classifier, version, serving))
    return found


def entry(classifier: Classifier, version: int, serving: int) -> Entry:
    """One version on disk, and whether it is the one that serves."""
    try:
        head = classifier.head(version)
    except RepositoryError:
        classifier.version_name(version)  # one that was pruned while it was read is not damaged
        # One damaged file must not hide the history of all others; `patcher doctor` says what is wrong with it.
        return Entry(Lineage(version, backbone="", method="damaged"), 0, version == serving)
    return Entry(head.lineage, len(head.labels), version == serving)


def rollback(classifier: ClassifierLike, to: int | None = None, server: TritonServer | None = None) -> Switch:
    """Make version ``to`` serve again, the serving one's parent by default.

    Raises
    ------
    VersionError
        where there is no such version, or the serving one has no parent.
    NotServed
        when the server would not serve it; the version that served before is put back.
    """
    require(int, None, to=to)
    require(TritonServer, None, server=server)
    classifier = one_classifier(classifier)
    with changing(classifier, server, leaving=to is not None):
        return roll_back(classifier, to, server)


def sync(classifier: ClassifierLike, server: TritonServer) -> dict[str, str]:
    """Have every replica behind ``server`` serve what the files pin; what became of each, by address.

    ``agreed`` had it already, ``caught up`` was made to, ``away`` was not there when the fleet was made, ``failed: …``
    does not answer, or would not.
    """
    require(TritonServer, server=server)
    classifier = one_classifier(classifier)
    with changing(classifier, server):
        return catch_up(classifier, server)


def prune(classifier: ClassifierLike, keep: int) -> tuple[int, ...]:
    """Take all versions but the newest ``keep`` off the disk, and return which those were.

    The serving version, its parent and one on trial stay, whatever their age. Numbers of pruned versions are not given
    again. Raises InputError where ``keep`` is below 1.
    """
    require(int, keep=keep)
    if keep < 1:
        raise InputError(f"keep is {keep}; expected at least 1")
    classifier = one_classifier(classifier)
    with changing(classifier):
        serving = classifier.serving()
        versions = classifier.versions()
        tried = canary.on_trial(classifier)
        spared = {serving, classifier.head(serving).lineage.parent, tried and tried.serving(), *versions[-keep:]}
        old = tuple(version for version in versions if version not in spared)
        if old:
            classifier.prune(old)
        return old


def evaluate(
    classifier: ClassifierLike,
    examples: ExamplesLike,
    version: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Accuracy, F1 and confusions of a version (the serving one by default) on labelled texts, computed here.

    Raises ExamplesError where the file has no labels, LabelError where none of them is the head's, VersionError where
    there is no such version.
    """
    require(int, None, version=version)
    classifier, examples = one_classifier(classifier), as_examples(examples, "examples")
    labels = examples.labelled()
    head = classifier.head(version)
    return evaluate_head(head, extract_features(classifier, examples.texts, None, progress), labels)
