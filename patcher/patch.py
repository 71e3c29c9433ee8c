"""A patch: features of the examples and the head as it is in, the next head and what it would cost out.

No file and no server is touched here; ``labelling`` brings what is needed and publishes what comes out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from patcher import configs
from patcher.errors import InputError, RepositoryError
from patcher.fit import Fit, fit
from patcher.fit.model import woken
from patcher.fit.scope import fit_scope
from patcher.gate import Verdict, judge
from patcher.scope import Scope, stretch_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from patcher.head import Head
    from patcher.memory import Memory
    from patcher.stopwatch import Stopwatch

    Floats = NDArray[np.float32]
    Labelled = tuple[Floats, NDArray[np.int64]]

__all__ = ["DEFAULTS", "Given", "Patch", "PatchSettings", "make_patch"]


@dataclass(frozen=True)
class PatchSettings:
    """What a patch may cost and how it is made.

    ``max_flips`` is the share of old-label inputs that may turn from right to wrong, ``min_recall`` the share of the
    new label's examples that must be found when each is left out of the fit; ``force`` publishes in spite of the gate
    and is recorded in the lineage for ever; ``use_name`` takes a label's own name, where it is words, as one example
    more; ``canary`` is a share of the requests, in per cent, on which the version is tried before it serves all.
    """

    max_flips: float = 0.005
    min_recall: float = 0.5
    method: str = "auto"
    force: bool = False
    dry_run: bool = False
    use_name: bool = True
    canary: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_flips", "min_recall"):
            value = getattr(self, name)
            if not 0 <= value <= 1:  # NaN, which no comparison stops, is refused here too
                raise InputError(f"{name} is {value}; expected a share from 0 to 1")
        if self.canary is not None:
            configs.check_share(self.canary)


DEFAULTS = PatchSettings()


@dataclass(frozen=True)
class Given:
    """What a patch is made from.

    Parameters
    ----------
    examples, texts
        Of each new label: features float32 ``[n, width]``, and the same in words.
    names
        Features float32 ``[width]`` of the names that are words.
    replay, evaluation
        Features and ids of labelled data, the ids positions in the old labels; of ``evaluation`` in the old labels
        followed by the new ones. A text with several labels is there once for each, side by side.
    repeated
        Examples that were left out because another has the same words: label, that one, the one left out.
    """

    examples: Mapping[str, Floats]
    texts: Mapping[str, Sequence[str]]
    names: Mapping[str, Floats] = field(default_factory=dict)
    replay: Labelled | None = None
    evaluation: Labelled | None = None
    repeated: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True)
class Patch:
    """The next head (its lineage still the old one's) with its memory, and what is to be said about it.

    ``gate`` is ``passed``, ``forced`` or ``refused``.
    """

    head: Head
    memory: Memory | None
    fit: Fit
    verdict: Verdict
    gate: str


def make_patch(parent: Head, memory: Memory | None, given: Given, settings: PatchSettings, watch: Stopwatch) -> Patch:
    """Fit new rows, judge them, and fit the out-of-scope score anew.

    Raises
    ------
    LabelError, ExamplesError, InputError
        for what the fit cannot use.
    RepositoryError
        where the memory is damaged.
    """
    try:
        with watch("fit"):
            made = fit(
                given.examples,
                parent,
                memory,
                names=given.names,
                replay=given.replay,
                method=settings.method,
                max_flips=settings.max_flips,
            )
        with watch("gate"):
            verdict = judge(
                parent,
                made,
                given.examples,
                memory,
                texts=given.texts,
                repeated=given.repeated,
                evaluation=given.evaluation,
                max_flips=settings.max_flips,
                min_recall=settings.min_recall,
            )
        with watch("scope"):
            grown = _grown(memory, given.examples)
            scope = _scope(parent, made, memory, grown, given.evaluation)
    except np.linalg.LinAlgError as error:
        raise RepositoryError(
            f"the memory of version {parent.lineage.version} is damaged ({error}); `patcher remember` builds it anew"
        ) from error
    gate = "passed" if verdict.passed else "forced" if settings.force else "refused"
    return Patch(dataclasses.replace(made.apply(parent), scope=scope), grown, made, verdict, gate)


def _scope(
    parent: Head, made: Fit, memory: Memory | None, grown: Memory | None, evaluation: Labelled | None
) -> Scope | None:
    """Fitted anew: a new row raises every input's logsumexp, and the new label is in scope now."""
    if grown is None:
        return parent.scope
    # Those of the new labels alone would set the limit of all.
    fresh = None if evaluation is None else evaluation[0][evaluation[1] < len(parent.labels)]
    # What no old input ever did, and the new label's do, is no measure of how far apart inputs lie.
    white = None if memory is None or woken(memory, grown) else made.old.whitening
    return fit_scope(grown, made.apply(parent), fresh=fresh, stretch=stretch_of(parent.scope), white=white)


def _grown(memory: Memory | None, groups: Mapping[str, NDArray[np.float32]]) -> Memory | None:
    if memory is None:
        return None
    features = np.concatenate(list(groups.values()))
    ids = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()])
    return memory.add(tuple(groups), features, ids)
