"""Make a patch: from features of the examples and the current head, the next head and the gate's verdict on it.

No file and no server is touched here; ``labelling`` provides the input and publishes the result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.arguments import require
from patcher.errors import RepositoryError
from patcher.fit import Fit, fit
from patcher.fit.model import woken
from patcher.fit.scope import fit_scope
from patcher.gate import Verdict, judge
from patcher.limits import MAX_FLIPS, MIN_RECALL, check_limit, check_share
from patcher.scope import Scope, stretch_of
from patcher.screening import first_alike

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from patcher.arrays import Doubles, Floats
    from patcher.fit.inputs import Labelled
    from patcher.head import Head, Lineage
    from patcher.memory import Memory
    from patcher.screening import Repeat
    from patcher.stopwatch import Stopwatch

__all__ = ["DEFAULTS", "Given", "Patch", "PatchSettings", "make_patch"]


@dataclass(frozen=True)
class PatchSettings:
    """The limits of the gate, and how a patch is made and published.

    - ``max_flips``: the share, from 0 to 1, of old-label inputs that may turn from right to wrong.
    - ``min_recall``: the share, from 0 to 1, of the new label's examples that must be found when each is left out of
      the fit.
    - ``force``: publish although the gate refuses; the lineage records it for good.
    - ``dry_run``: publish nothing.
    - ``use_name``: take a label's own name, if it consists of words, as one more example.
    - ``canary``: the percentage of requests, between 0 and 100, on which the version is tried before it serves all.

    Raises InputError for limits outside of these ranges, and for values of other types.
    """

    max_flips: float = MAX_FLIPS
    min_recall: float = MIN_RECALL
    method: str = "auto"
    force: bool = False
    dry_run: bool = False
    use_name: bool = True
    canary: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_flips", "min_recall"):
            check_limit(name, getattr(self, name))
        require(str, method=self.method)
        require(bool, force=self.force, dry_run=self.dry_run, use_name=self.use_name)
        if self.canary is not None:
            check_share(self.canary)


DEFAULTS = PatchSettings()


@dataclass(frozen=True)
class Given:
    """The input of a patch.

    Parameters
    ----------
    examples, texts
        The examples of each new label: their features float32 ``[n, width]``, and their texts.
    names
        Features float32 ``[width]`` of the label names that consist of words.
    replay, evaluation
        Labelled data. The ids in ``replay`` index the old labels, those in ``evaluation`` the old ones followed by the
        new ones.
    repeated
        Examples that were left out because another has the same words.
    left_out
        How many texts of ``--replay`` and ``--eval`` were left out for that reason.
    weights
        For each new label, how many inputs each of its examples stands for, float64 ``[n]``; equal if missing.
    merged
        For a merge, whose examples are remembered inputs already: the memory with these under the new label. Otherwise
        the examples are added to the memory of the old labels.
    """

    examples: Mapping[str, Floats]
    texts: Mapping[str, Sequence[str]]
    names: Mapping[str, Floats] = field(default_factory=dict)
    replay: Labelled | None = None
    evaluation: Labelled | None = None
    repeated: Sequence[Repeat] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, Doubles] = field(default_factory=dict)
    merged: Memory | None = None


@dataclass(frozen=True)
class Patch:
    """The next head (still with its parent's lineage) and its memory, with the fit and the gate's verdict.

    ``gate`` is ``passed``, ``forced`` or ``refused``; ``examples`` is the number of examples of all new labels.
    """

    head: Head
    memory: Memory | None
    fit: Fit
    verdict: Verdict
    gate: str
    examples: int

    @property
    def details(self) -> dict[str, Any]:
        """What the lineage records of the fit and the verdict."""
        verdict = self.verdict
        return {
            "examples": self.examples,
            "flips": verdict.flips,
            "flips_upper_bound": verdict.flips_upper_bound,
            "calibration": verdict.calibration,
            "bound": verdict.bound,
            "estimated_recall": verdict.estimated_recall,
            "recall_lower_bound": verdict.recall_lower_bound,
            "verdict": verdict.sentence,
        }

    def with_lineage(self, lineage: Lineage) -> Patch:
        """The same patch with the lineage of the version that it becomes."""
        return dataclasses.replace(self, head=dataclasses.replace(self.head, lineage=lineage))


def make_patch(
    parent: Head,
    memory: Memory | None,
    given: Given,
    settings: PatchSettings,
    watch: Stopwatch,
    heard: Callable[[int], None] | None = None,
) -> Patch:
    """Fit new rows, judge them, and refit the out-of-scope scorer; ``heard`` as for ``fit``.

    Raises
    ------
    LabelError, ExamplesError, InputError
        For input that the fit cannot use.
    RepositoryError
        If the memory is damaged.
    """
    try:
        with watch("fit"):
            firsts = {label: first_alike(given.texts.get(label), rows) for label, rows in given.examples.items()}
            made = fit(
                given.examples,
                parent,
                memory,
                names=given.names,
                replay=given.replay,
                method=settings.method,
                max_flips=settings.max_flips,
                firsts=firsts,
                heard=heard,
            )
        with watch("gate"):
            verdict = judge(
                parent,
                made,
                given.examples,
                memory,
                texts=given.texts,
                repeated=given.repeated,
                left_out=given.left_out,
                weights=given.weights,
                firsts=firsts,
                merge=given.merged is not None,
                evaluation=given.evaluation,
                max_flips=settings.max_flips,
                min_recall=settings.min_recall,
            )
        with watch("scope"):
            grown = given.merged
            if grown is None and memory is not None:
                grown = memory.add_groups(given.examples)
            scope = _scope(parent, made, memory, grown, given)
    except np.linalg.LinAlgError as error:
        raise RepositoryError(
            f"the memory of version {parent.lineage.version} is damaged ({error}); `patcher remember` rebuilds it"
        ) from error
    gate = "passed" if verdict.passed else "forced" if settings.force else "refused"
    head = dataclasses.replace(made.apply(parent), scope=scope)
    return Patch(head, grown, made, verdict, gate, sum(map(len, given.examples.values())))


def _scope(parent: Head, made: Fit, memory: Memory | None, grown: Memory | None, given: Given) -> Scope | None:
    """The scorer, refitted because the new label is in scope now; without a memory, the parent's."""
    if grown is None:
        return parent.scope
    # Only old labels: otherwise an evaluation file with texts of the new labels alone would set the limit for all.
    evaluation = given.evaluation
    fresh = None if evaluation is None else evaluation.features[evaluation.ids < len(parent.labels)]
    # If the new examples vary in a feature that hardly varied before, the fit's whitening would overrate that feature.
    # In a merge, it would lack the labels that are merged.
    usable = memory is not None and given.merged is None and not woken(memory, grown)
    white = made.old.whitening if usable else None
    return fit_scope(grown, made.apply(parent), fresh=fresh, stretch=stretch_of(parent.scope), white=white)
