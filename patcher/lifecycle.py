"""Operations on published versions of a classifier: history, evaluation, rollback, sync, pruning."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher import canary
from patcher.arguments import require
from patcher.errors import InputError, RepositoryError, VersionError
from patcher.evaluation import Evaluation, evaluate_head, expected_sets
from patcher.examples_file import as_examples
from patcher.features import extract_features
from patcher.head import Lineage
from patcher.label_names import earlier_names
from patcher.lineage import merges
from patcher.recovery import catch_up, changing
from patcher.repository import one_classifier
from patcher.rollout import Switch, roll_back
from patcher.triton.client import TritonServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from patcher.classifier import Classifier
    from patcher.examples_file import ExamplesLike
    from patcher.repository import ClassifierLike

__all__ = ["Entry", "entry", "evaluate", "history", "prune", "rollback", "sync"]


@dataclass(frozen=True)
class Entry:
    """One version in a classifier's history."""

    lineage: Lineage
    labels: int
    serving: bool

    def what(self) -> str:
        """The change in a few words."""
        if merged := merges(self.lineage):
            return f"{', '.join(old for old, _ in merged)} merged into {merged[0][1]}"
        first = "exported" if self.lineage.method == "export" else "new"
        added = [f"+{label}" for label in self.lineage.added] if self.lineage.parent else [first]
        removed = [f"-{label}" for label in self.lineage.removed]
        renamed = [f"{old} -> {new}" for old, new in self.lineage.renamed]
        return ", ".join([*added, *removed, *renamed])

    def to_json(self) -> dict[str, Any]:
        """The entry as a JSON object, with the rest of the lineage."""
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
            "merged": merges(self.lineage),
            **record,
        }


def history(classifier: ClassifierLike) -> list[Entry]:
    """Every version in the repository, oldest first."""
    classifier = one_classifier(classifier)
    serving, found = classifier.serving(), []
    for version in classifier.versions():
        with contextlib.suppress(VersionError):  # pruned in the meantime
            found.append(entry(classifier, version, serving))
    return found


def entry(classifier: Classifier, version: int, serving: int) -> Entry:
    """The entry of one version; one whose head cannot be read gets the method ``damaged``."""
    try:
        head = classifier.head(version)
    except RepositoryError:
        classifier.version_name(version)  # VersionError if it was pruned while being read: then it is not damaged
        # One damaged file must not hide the history of all others; `patcher doctor` says what is wrong with it.
        return Entry(Lineage(version, backbone="", method="damaged"), 0, version == serving)
    return Entry(head.lineage, len(head.labels), version == serving)


def rollback(classifier: ClassifierLike, to: int | None = None, server: TritonServer | None = None) -> Switch:
    """Make version ``to`` serve again, by default the parent of the serving version.

    Raises
    ------
    VersionError
        If there is no such version, or the serving one has no parent.
    NotServed
        If the server would not serve it; the version that served before serves again.
    """
    require(int, None, to=to)
    require(TritonServer, None, server=server)
    classifier = one_classifier(classifier)
    with changing(classifier, server, leaving=to is not None):
        return roll_back(classifier, to, server)


def sync(classifier: ClassifierLike, server: TritonServer) -> dict[str, str]:
    """Make every replica behind ``server`` serve the version that the files pin; return the result by address.

    ``agreed``: the replica already served it. ``caught up``: it does now. ``away``: it did not answer when the fleet
    was created. ``failed: …``: it does not answer now, or would not serve the version.
    """
    require(TritonServer, server=server)
    classifier = one_classifier(classifier)
    with changing(classifier, server):
        return catch_up(classifier, server)


def prune(classifier: ClassifierLike, keep: int, *, dry_run: bool = False) -> tuple[int, ...]:
    """Delete all versions but the newest ``keep``, and return the deleted ones; with ``dry_run``, only return them.

    The serving version, its parent and a version on trial stay, whatever their age. Numbers of pruned versions are
    never reused. Raises InputError if ``keep`` is below 1.
    """
    require(int, keep=keep)
    require(bool, dry_run=dry_run)
    if keep < 1:
        raise InputError(f"keep is {keep}; expected at least 1")
    classifier = one_classifier(classifier)
    with changing(classifier, dry_run=dry_run):
        serving = classifier.serving()
        versions = classifier.versions()
        tried = canary.on_trial(classifier)
        spared = {serving, classifier.head(serving).lineage.parent, tried and tried.serving(), *versions[-keep:]}
        old = tuple(version for version in versions if version not in spared)
        if old and not dry_run:
            classifier.prune(old)
        return old


def evaluate(
    classifier: ClassifierLike,
    examples: ExamplesLike,
    version: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Accuracy, F1 and confusions of a version (by default the serving one) on labelled texts, without a server.

    A label of the texts that the version only has under a later name, or that was merged into one of its labels, counts
    as that one, as it does for ``diff``.

    Raises ExamplesError if the texts have no labels, LabelError if the head has none of these labels, and VersionError
    if there is no such version.
    """
    require(int, None, version=version)
    classifier, examples = one_classifier(classifier), as_examples(examples, "examples")
    labels = examples.labelled()
    head = classifier.head(version)
    names, merged = earlier_names(classifier, head, frozenset().union(*expected_sets(head, labels)))
    features = extract_features(classifier, examples.texts, None, progress)
    found = evaluate_head(head, features, labels, {**names, **merged})
    return dataclasses.replace(found, renamed=tuple(names.items()), merged=tuple(merged.items()))
