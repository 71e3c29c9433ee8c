"""Build the memory of a classifier from labelled data, at export or at any later time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patcher.arguments import require
from patcher.errors import ExamplesError, RepositoryError
from patcher.examples_file import as_examples
from patcher.features import extract_features
from patcher.fit.scope import fit_scope
from patcher.gate_words import scarce, unremembered
from patcher.labelled import flat_ids, places_of
from patcher.lineage import next_lineage
from patcher.memory import Memory
from patcher.recovery import changing
from patcher.repository import one_classifier
from patcher.rollout import Switch, roll_out
from patcher.scope import stretch_of
from patcher.triton.client import TritonServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from patcher.classifier import Classifier
    from patcher.examples import Examples
    from patcher.examples_file import ExamplesLike
    from patcher.head import Head
    from patcher.repository import ClassifierLike

__all__ = ["Remembered", "build_memory", "label_ids", "remember"]

FEATURES_A_LABEL = 20
"""Real features kept per label. If none of them flips, the bound on the flip rate is about 3 / (20 * labels)."""

STORED_CLUSTERS = 1
"""Clusters per label of a head in a head store: a thousand such heads share one server's memory and CPU caches."""


@dataclass(frozen=True)
class Remembered(Switch):
    """A switch to a version with a rebuilt memory."""

    texts: int
    """Number of texts that the memory was built from."""
    repeated: int
    """Number of texts that were left out because another text of their label has the same words."""
    memory_bytes: int
    notes: tuple[str, ...]
    """What the memory knows too little about to count flips."""


def label_ids(head: Head, examples: Examples, new: Sequence[str] = ()) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One pair for each text and label: positions in ``examples`` and in the labels, both INT64 ``[pairs]``.

    The labels are the head's, followed by ``new``, those of a patch to come. Raises LabelError, which names the line,
    for any other label.
    """
    place = {label: index for index, label in enumerate((*head.labels, *new))}
    return flat_ids(
        places_of(
            examples,
            lambda label: place[label] if label in place else head.index(label),
            several=not head.exclusive,
        )
    )


def build_memory(
    head: Head,
    examples: Examples,
    features: NDArray[np.float32],
    *,
    per_label: int = FEATURES_A_LABEL,
    before: Memory | None = None,
    **limits: int,
) -> Memory:
    """Build a memory of labelled texts with features FP32 ``[n, width]``; ``per_label`` 0 keeps only statistics.

    Labels of the head without texts keep everything that the memory ``before`` holds about them. ``limits`` are passed
    on to ``Memory.build``.

    Raises LabelError for labels that the head lacks, and ExamplesError if no text has a label.
    """
    rows, ids = label_ids(head, examples)
    if not len(rows):
        raise ExamplesError(f"{examples.source}: no text has a label; expected labelled texts")
    stays = set(head.labels) - {head.labels[place] for place in np.unique(ids).tolist()}
    if before is None or stays.isdisjoint(before.labels):
        return Memory.build(features[rows], ids, head.labels, head.split, per_label=per_label, **limits)
    kept = before.without([label for label in before.labels if label not in stays])
    return kept.keeping(per_label).add(head.labels, features[rows], ids)


def remember(
    classifier: ClassifierLike,
    examples: ExamplesLike,
    server: TritonServer | None = None,
    *,
    per_label: int = FEATURES_A_LABEL,
    progress: Callable[[int], None] | None = None,
) -> Remembered:
    """Rebuild the memory from ``examples`` and publish it with a new head version that has the same rows.

    Texts of one label with the same words count once: a repeated text adds no information, and counting it would make
    the bound on flips look more certain than it is.

    Labels without examples keep what the memory holds about them: statistics, and up to ``per_label`` features.

    Raises
    ------
    LabelError, ExamplesError
        If labels or texts do not fit the head.
    NotServed
        If the server would not serve the new version; the previous one serves again.
    """
    require(TritonServer, None, server=server)
    require(int, per_label=per_label)
    classifier, examples = one_classifier(classifier), as_examples(examples, "examples")
    head = classifier.head()
    label_ids(head, examples)  # check the labels before spending minutes on features, and do that before locking
    once = examples.once_a_label(several=not head.exclusive)
    features = extract_features(classifier, once.texts, None, progress)
    with changing(classifier, server):
        parent = classifier.head(published=True)
        before = _readable(classifier)
        limits = _limits(classifier, before)
        memory = build_memory(parent, once, features, per_label=per_label, before=before, **limits)
        lineage = next_lineage(classifier, parent, method="remember", data_hash=examples.data_hash())
        scope = fit_scope(memory, parent, stretch=stretch_of(parent.scope))
        head = dataclasses.replace(parent, scope=scope, lineage=lineage)
        switch = roll_out(classifier, head, memory, server)
    return Remembered(
        **vars(switch),
        texts=len(once),
        repeated=len(examples) - len(once),
        memory_bytes=memory.size,
        notes=tuple(filter(None, (unremembered(head.labels, memory), scarce(memory)))),
    )


def _limits(classifier: Classifier, before: Memory | None) -> dict[str, int]:
    """The limit on clusters per label; in a head store that of the previous memory, since one of many must be small."""
    if not classifier.in_store:
        return {}
    return {"most_clusters": before.most_clusters if before else STORED_CLUSTERS}


def _readable(classifier: Classifier) -> Memory | None:
    """The memory as published; None if there is none, or if it is damaged or gone: rebuilding it is the remedy."""
    try:
        return classifier.memory(published=True)
    except RepositoryError:
        return None
