"""The memory of a classifier: built from labelled data, at export or at any time after."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patcher.arguments import require
from patcher.errors import ExamplesError, RepositoryError
from patcher.examples import as_examples
from patcher.features import extract_features
from patcher.fit.scope import fit_scope
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
    from patcher.examples import Examples, ExamplesLike
    from patcher.head import Head
    from patcher.repository import ClassifierLike

__all__ = ["Remembered", "build_memory", "label_ids", "remember"]

FEATURES_A_LABEL = 20
"""Real features kept of each label: enough to see a flip rate of 1 / (20 labels) with confidence."""

STORED_CLUSTERS = 1
"""Of a label, for a stored head's out-of-scope score: a thousand of them share a server's memory and its caches."""


@dataclass(frozen=True)
class Remembered(Switch):
    """A change of the serving version to one with another memory."""

    texts: int
    """Those that the memory was built from."""
    repeated: int
    """Further ones that were left out, as another of their label has the same words."""


def label_ids(head: Head, examples: Examples, new: Sequence[str] = ()) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which text has which label, one pair a text and label: places in ``examples``, and in the head's labels.

    Labels of a patch to come, ``new``, follow those of the head. Raises LabelError, with the line, for any other.
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
    """The memory of labelled texts with features FP32 ``[n, width]``; ``per_label`` 0 keeps statistics alone.

    Of labels of the head that no text has, all stays that the memory ``before`` knows. ``limits`` are further ones of
    ``Memory.build``.

    Raises LabelError for labels that the head lacks, ExamplesError where no text has a label.
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
    """Build the memory anew from ``examples`` and publish it with the next head version, whose rows are the same.

    A text that comes again under its label, with the same words, counts once: it is no fresh information, and a bound
    on the harm of a patch that took it for such would look surer than it is.

    Labels that no example has stay remembered as they are, with their numbers of texts and what these had in common.

    Raises
    ------
    LabelError, ExamplesError
        for labelled texts that do not fit the head.
    NotServed
        when the server would not serve the new version; the previous one is back.
    """
    require(TritonServer, None, server=server)
    classifier, examples = one_classifier(classifier), as_examples(examples, "examples")
    head = classifier.head()
    label_ids(head, examples)  # before minutes go into features, and those before the lock is held
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
    return Remembered(**vars(switch), texts=len(once), repeated=len(examples) - len(once))


def _limits(classifier: Classifier, before: Memory | None) -> dict[str, int]:
    """Clusters a label: in a head store no more than the memory before had, for one of very many is kept small."""
    if not classifier.in_store:
        return {}
    return {"most_clusters": before.most_clusters if before else STORED_CLUSTERS}


def _readable(classifier: Classifier) -> Memory | None:
    """The memory as it was published; None also for one that is damaged or gone, and is built anew for that."""
    try:
        return classifier.memory(published=True)
    except RepositoryError:
        return None
