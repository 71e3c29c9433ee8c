"""Remove, rename and merge labels; each makes a new head version that goes through the same rollout."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.arguments import listed, require
from patcher.blocks import blocks
from patcher.errors import GateRefused, InputError, LabelError
from patcher.examples import check_label
from patcher.fit.inputs import once
from patcher.fit.model import full_rows
from patcher.fit.scope import fit_scope
from patcher.gate_words import twins
from patcher.head import refuse_joined
from patcher.head_file import write_head
from patcher.limits import MAX_FLIPS, MIN_RECALL
from patcher.lineage import MERGE, next_lineage
from patcher.patch import Given, PatchSettings, make_patch
from patcher.recovery import changing
from patcher.repository import one_classifier
from patcher.rollout import roll_out, validate
from patcher.scope import stretch_of
from patcher.stopwatch import Stopwatch
from patcher.triton.client import TritonServer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from patcher.arrays import Bools, Ints
    from patcher.classifier import Classifier
    from patcher.gate import Verdict
    from patcher.head import Head
    from patcher.memory import Memory
    from patcher.patch import Patch
    from patcher.repository import ClassifierLike

_FEWEST = 2
"""The minimum number of labels of a classifier, and of labels to merge."""

__all__ = ["Change", "merge_labels", "merged", "remove_label", "rename_label"]


@dataclass(frozen=True)
class Change:
    """A change of labels; ``published`` unless it was a dry run or the gate refused it.

    ``renamed`` and ``merged`` hold pairs of a label and the one that it became, as those of a ``Difference`` do. Of a
    merge, ``verdict`` is the gate's. ``notes`` asks about other labels with nearly the new name, and ``warnings`` are
    those of a ``Switch``.
    """

    classifier: str
    version: int
    parent_version: int
    labels: int
    served: bool
    gate: str
    labels_added: tuple[str, ...] = ()
    labels_removed: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    merged: tuple[tuple[str, str], ...] = ()
    verdict: Verdict | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    published: bool = True

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        verdict = self.verdict.to_dict() if self.verdict else None
        return {**vars(self), "verdict": verdict, "notes": list(self.notes)}


def remove_label(classifier: ClassifierLike, label: str, server: TritonServer | None = None) -> Change:
    """Remove a label. Its texts go to the best of the other labels, whose logits stay bit-for-bit the same.

    Raises LabelError if the head has no such label, or only two labels; NotServed if the server would not serve the new
    version: the previous one then serves again.
    """
    require(str, label=label)
    require(TritonServer, None, server=server)
    classifier = one_classifier(classifier)
    with changing(classifier, server):
        parent, memory = classifier.head(published=True), classifier.memory(published=True)
        head = parent.without(label)
        if len(head.labels) < _FEWEST:
            raise LabelError(f"{classifier.name} has {len(parent.labels)} labels; a classifier needs at least two")
        rest = _forgotten(memory, label)
        if rest is not None:
            head = dataclasses.replace(head, scope=fit_scope(rest, head, stretch=stretch_of(parent.scope)))
        made = next_lineage(classifier, parent, method="remove", removed=(label,))
        return _publish(classifier, parent, dataclasses.replace(head, lineage=made), rest, server)


def rename_label(classifier: ClassifierLike, old: str, new: str, server: TritonServer | None = None) -> Change:
    """Rename a label; rows and scores do not change.

    Raises LabelError if the head has no label ``old`` or already has ``new``; ExamplesError if ``new`` is not a valid
    label; NotServed if the server would not serve the new version: the previous one then serves again.
    """
    require(str, old=old, new=new)
    check_label(new, "the new name")
    require(TritonServer, None, server=server)
    classifier = one_classifier(classifier)
    with changing(classifier, server):
        parent, memory = classifier.head(published=True), classifier.memory(published=True)
        if old == new:
            raise LabelError(f"{old!r} already has that name; nothing to change")
        refuse_joined(parent, new)
        head = parent.renamed(old, new)
        renamed = memory.rename(old, new) if memory and old in memory.labels else memory
        made = next_lineage(classifier, parent, method="rename", renamed=((old, new),))
        change = _publish(classifier, parent, dataclasses.replace(head, lineage=made), renamed, server)
        return dataclasses.replace(change, notes=_twins(head, new))


def merge_labels(
    classifier: ClassifierLike,
    labels: Iterable[str],
    into: str,
    server: TritonServer | None = None,
    *,
    max_flips: float = MAX_FLIPS,
    min_recall: float = MIN_RECALL,
    force: bool = False,
    dry_run: bool = False,
) -> Change:
    """Merge several labels into one: a single row, fitted on their remembered features, replaces their rows.

    With ``dry_run`` nothing is published, and ``server`` is not asked.

    Raises
    ------
    InputError
        For fewer than two labels, or if the memory does not have features of all of them.
    LabelError
        If the head lacks one of them, ``into`` is another existing label, or no other label would be left.
    GateRefused
        If the new row would flip more inputs of the other labels, or find less of its own, than the limits allow.
    NotServed
        If the server would not serve the new version; the previous one serves again.
    """
    require(str, into=into)
    check_label(into, "the label to merge into")
    settings = PatchSettings(max_flips, min_recall, force=force, dry_run=dry_run)
    labels = listed(labels, "labels")
    require(str, **{f"labels[{place}]": label for place, label in enumerate(labels)})
    labels = tuple(dict.fromkeys(labels))
    if len(labels) < _FEWEST:
        raise InputError(f"expected two different labels to merge, got {', '.join(labels)}")
    require(TritonServer, None, server=server)
    classifier = one_classifier(classifier)
    with changing(classifier, server, dry_run=dry_run):
        parent, memory = classifier.head(published=True), classifier.memory(published=True)
        patch = merged(parent, memory, labels, into, settings)
        made = next_lineage(
            classifier, parent, method=MERGE, gate=patch.gate, details=patch.details,
            added=(into,), removed=tuple(label for label in labels if label != into),
        )  # fmt: skip
        head = dataclasses.replace(patch.head, lineage=made)
        if patch.gate == "refused":
            refused = dataclasses.replace(_planned(classifier, parent, head), verdict=patch.verdict)
            raise GateRefused(patch.verdict.refusal("merge"), refused.to_json(), patch.verdict.sentence)
        if dry_run:
            validate(write_head(head), head)
            change = _planned(classifier, parent, head)
        else:
            change = _publish(classifier, parent, head, patch.memory, server)
        pairs = tuple((label, into) for label in labels)
        return dataclasses.replace(change, merged=pairs, verdict=patch.verdict, notes=_twins(head, into))


def merged(parent: Head, memory: Memory | None, labels: Sequence[str], into: str, settings: PatchSettings) -> Patch:
    """The patch that adds ``into`` to a head without ``labels``, whose remembered inputs are the examples.

    Pure: nothing is published. Raises like ``merge_labels``.
    """
    head = parent
    for label in labels:
        parent.index(label)  # its error lists all existing labels, not only the remaining ones
        head = head.without(label)
    known = _remembering(memory, labels)
    rest: Memory | None = known
    for label in labels:
        rest = _forgotten(rest, label)
    if into in head.labels:
        raise LabelError(f"{into!r} is another existing label; list it among those to merge")
    refuse_joined(parent, into)
    if not head.labels:
        raise LabelError(
            f"there are no labels but these {len(labels)}; a classifier needs at least two, so one other has to stay"
        )
    examples, weights = _theirs(parent, known, labels)
    given = Given({into: examples}, texts={}, weights={into: weights}, merged=known.merge(labels, into))
    return make_patch(head, rest, given, settings, Stopwatch())


def _twins(head: Head, name: str) -> tuple[str, ...]:
    return twins((name,), [label for label in head.labels if label != name])


def _remembering(memory: Memory | None, labels: Sequence[str]) -> Memory:
    """The memory; InputError unless it has features of all of the labels."""
    lacking = [label for label in labels if memory is None or not len(memory.features_of(label))]
    if memory is None or lacking:
        raise InputError(
            f"the memory has nothing on {lacking[0]!r}, so no row can be fitted for it; "
            "merging needs a memory with features (`patcher export … --train FILE`)"
        )
    return memory


def _theirs(parent: Head, memory: Memory, labels: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The remembered inputs of some labels, and how many texts each stands for: FP32 ``[n, width]`` and ``[n]``.

    In a multi-label head that is also what was remembered for another label and is given one of these: a text with
    several labels was filed under one of them, and if it counted as a text without the merged label, the fit would push
    the row away from its own texts.
    """
    filed = [np.flatnonzero(memory.sample_labels == memory.labels.index(label)) for label in labels]
    if not parent.exclusive:
        others = np.setdiff1d(np.arange(len(memory.sample)), np.concatenate(filed))
        filed.append(others[_given(parent, memory.sample, others, labels)])
    rows = np.concatenate(filed)
    kept = np.bincount(memory.sample_labels, minlength=len(memory.labels))
    features, of = memory.sample[rows].astype(np.float32), memory.sample_labels[rows]
    weights: NDArray[np.float64] = memory.counts[of] / kept[of]
    if parent.exclusive:
        return features, weights
    first, weights = once(features, weights)
    return features[first], weights


def _given(parent: Head, sample: NDArray[np.float16], places: Ints, labels: Sequence[str]) -> Bools:
    """Whether a multi-label head gives the inputs at ``places`` one of some labels, BOOL ``[n]``.

    Only these labels' rows are used, and in blocks: all logits of 100,000 inputs for 5,000 labels take gigabytes.
    """
    rows = [parent.index(label) for label in labels]
    weight, bias = (every[rows] for every in full_rows(parent))
    given = np.zeros(len(places), np.bool_)
    for block in blocks(len(places)):
        features = sample[places[block]].astype(np.float32)
        given[block] = (features @ weight.T + bias > 0).any(axis=1)
    return given


def _forgotten(memory: Memory | None, label: str) -> Memory | None:
    if memory is None or label not in memory.labels:
        return memory
    return memory.remove(label) if len(memory.labels) > 1 else None


def _publish(
    classifier: Classifier, parent: Head, head: Head, memory: Memory | None, server: TritonServer | None
) -> Change:
    switch = roll_out(classifier, head, memory, server)
    planned = _planned(classifier, parent, head)
    return dataclasses.replace(planned, served=switch.served, warnings=switch.warnings, published=True)


def _planned(classifier: Classifier, parent: Head, head: Head) -> Change:
    """The change that ``head`` makes, before it is published."""
    made = head.lineage
    return Change(
        classifier.name, made.version, parent.lineage.version, len(head.labels), served=False, gate=made.gate,
        labels_added=made.added, labels_removed=made.removed, renamed=made.renamed, published=False,
    )  # fmt: skip
