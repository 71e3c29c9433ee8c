"""New labels from a few examples: features, fit, gate, and the next head version live."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.errors import GateRefused, InputError, LabelError, NotServed, RepositoryError
from patcher.examples import Examples, check_label, check_text, data_hash, label_words
from patcher.features import extract_features
from patcher.fit import Fit, fit
from patcher.gate import Verdict, judge
from patcher.head import MULTI_LABEL
from patcher.head_file import write_head
from patcher.lineage import next_lineage
from patcher.remembering import label_ids
from patcher.rollout import changing, roll_out, validate
from patcher.scope import fit_scope
from patcher.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from patcher.head import Head, Lineage
    from patcher.memory import Memory
    from patcher.repository import Classifier, ModelRepository
    from patcher.triton.client import TritonServer

    Data = tuple[Examples, NDArray[np.float32]]
    Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]

__all__ = ["PatchReport", "PatchSettings", "add_label", "add_labels", "new_examples"]


@dataclass(frozen=True)
class PatchSettings:
    """What a patch may cost and how it is made.

    ``max_flips`` is the share of old-label inputs that may turn from right to wrong, ``min_recall`` the share of the
    new label's examples that must be found when each is left out of the fit; ``force`` publishes in spite of the gate
    and is recorded in the lineage for ever; ``use_name`` takes a label's own name, where it is words, as one example
    more.
    """

    max_flips: float = 0.005
    min_recall: float = 0.5
    method: str = "auto"
    force: bool = False
    dry_run: bool = False
    use_name: bool = True

    def __post_init__(self) -> None:
        for name in ("max_flips", "min_recall"):
            value = getattr(self, name)
            if not 0 <= value <= 1:  # NaN, which no comparison stops, is refused here too
                raise InputError(f"{name} is {value}; expected a share from 0 to 1")


@dataclass
class PatchReport:
    """What a patch did, and what it is expected to cost."""

    classifier: str
    labels_added: tuple[str, ...]
    version: int
    parent_version: int
    labels: int
    examples: int
    verdict: Verdict
    fit: Fit
    gate: str
    published: bool = False
    served: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    head_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """As the contract has it, with what the gate found."""
        return {
            "classifier": self.classifier,
            "labels_added": list(self.labels_added),
            "version": self.version,
            "parent_version": self.parent_version,
            "labels": self.labels,
            "examples": self.examples,
            "flips": self.verdict.flips,
            "flips_upper_bound": self.verdict.flips_upper_bound,
            "estimated_recall": self.estimated_recall,
            "method": self.fit.method,
            "gate": self.gate,
            "published": self.published,
            "served": self.served,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "head_bytes": self.head_bytes,
            "why": self.fit.why,
            "verdict": self.verdict.to_dict(),
        }

    @property
    def estimated_recall(self) -> float | None:
        """Of the label that is found least; None where nothing could be estimated."""
        return min((r for r in self.verdict.estimated_recall.values() if r is not None), default=None)


def add_label(
    repository: ModelRepository,
    label: str,
    texts: Sequence[str],
    *,
    server: TritonServer | None = None,
    classifier: str | None = None,
    replay: Examples | None = None,
    evaluation: Examples | None = None,
    settings: PatchSettings = PatchSettings(),
) -> PatchReport:
    """Add one label; ``add_labels`` tells the rest."""
    return add_labels(
        repository,
        {label: texts},
        server=server,
        classifier=classifier,
        replay=replay,
        evaluation=evaluation,
        settings=settings,
    )


def add_labels(
    repository: ModelRepository,
    examples: Mapping[str, Sequence[str]],
    *,
    server: TritonServer | None = None,
    classifier: str | None = None,
    replay: Examples | None = None,
    evaluation: Examples | None = None,
    settings: PatchSettings = PatchSettings(),
    skip_known: bool = False,
) -> PatchReport:
    """Add labels to a classifier in one patch: fit, gate, publish, load, probe.

    Parameters
    ----------
    examples
        Texts of each new label.
    server
        The server that serves ``repository``; None publishes without touching one, with features computed here.
    replay, evaluation
        Labelled old data: ``replay`` takes part in the fit, ``evaluation`` only counts flips.
    skip_known
        Leave labels alone that the head has already, instead of refusing them.

    Raises
    ------
    LabelError, ExamplesError
        for a label that exists, an empty text, and the like.
    GateRefused
        when the patch would cost more than ``settings`` allow; nothing was published.
    NotServed
        when the server would not serve the new version; the previous one is back.
    """
    watch = Stopwatch()
    target = repository.classifier(classifier)
    texts = _new(_checked(examples), target.head(), target.name, skip_known=skip_known)
    # Features depend on the backbone alone, which never changes: the lock is held for the rest only.
    with watch("features"):
        words = {label: text for label in texts if (text := label_words(label))} if settings.use_name else {}
        flat = [text for group in texts.values() for text in group]
        features = extract_features(target, [*flat, *words.values()], server)
        groups = _grouped(features[: len(flat)], texts)
        names = dict(zip(words, features[len(flat) :], strict=True))
        old, held_out = (_features(target, data, server) for data in (replay, evaluation))
    with contextlib.nullcontext() if settings.dry_run else changing(target, server):
        with watch("read"):
            parent, memory = target.head(), target.memory()
            _check_backbone(target, parent)
            # Another patcher may have added some of them meanwhile.
            texts = _new(texts, parent, target.name, skip_known=skip_known)
            groups = {label: groups[label] for label in texts}
        patch = _judged(target, parent, memory, groups, names, texts, old, held_out, settings=settings, watch=watch)
        report = patch.report
        if report.gate == "refused":
            report.seconds = watch.stop()
            raise GateRefused(_refusal(report.verdict), report.to_json())
        with watch("publish"):
            data = write_head(patch.head)
            report.head_bytes = len(data)
            if settings.dry_run:
                validate(data, patch.head)
            else:
                report.served = _published(target, patch, server)
                report.published = True
    report.seconds = watch.stop()
    return report


@dataclass(frozen=True)
class _Patch:
    head: Head
    memory: Memory | None
    report: PatchReport


def _judged(
    target: Classifier,
    parent: Head,
    memory: Memory | None,
    groups: Mapping[str, NDArray[np.float32]],
    names: Mapping[str, NDArray[np.float32]],
    texts: Mapping[str, Sequence[str]],
    old: Data | None,
    held_out: Data | None,
    *,
    settings: PatchSettings,
    watch: Stopwatch,
) -> _Patch:
    """Fit and judge: the next head with its memory, and what is to be said about it."""
    replay = _labelled(parent, old)
    try:
        with watch("fit"):
            made = fit(
                groups,
                parent,
                memory,
                names=names,
                replay=replay,
                method=settings.method,
                max_flips=settings.max_flips,
            )
        with watch("gate"):
            patched = made.apply(parent)
            verdict = judge(
                parent,
                made,
                groups,
                memory,
                texts=texts,
                replay=replay,
                evaluation=_labelled(patched, held_out),
                max_flips=settings.max_flips,
                min_recall=settings.min_recall,
            )
        with watch("scope"):
            # The new row raises every input's logsumexp, and the new label is in scope now: fitted anew.
            grown = _grown(memory, groups)
            scope = parent.scope if grown is None else fit_scope(grown, patched)
    except np.linalg.LinAlgError as error:
        raise RepositoryError(
            f"the memory of version {parent.lineage.version} is damaged ({error}); `patcher remember` builds it anew"
        ) from error
    gate = "passed" if verdict.passed else "forced" if settings.force else "refused"
    head = dataclasses.replace(patched, scope=scope, lineage=_lineage(target, parent, made, verdict, gate, texts))
    report = PatchReport(
        classifier=target.name,
        labels_added=tuple(texts),
        version=head.lineage.version,
        parent_version=parent.lineage.version,
        labels=len(head.labels),
        examples=sum(map(len, texts.values())),
        verdict=verdict,
        fit=made,
        gate=gate,
    )
    return _Patch(head, grown, report)


def _published(target: Classifier, patch: _Patch, server: TritonServer | None) -> bool:
    try:
        return roll_out(target, patch.head, patch.memory, server).served
    except NotServed as error:
        raise NotServed(str(error), {**patch.report.to_json(), **error.report}) from error


def new_examples(examples: Examples, label: str | None, *, several: bool = False) -> dict[str, list[str]]:
    """The texts of a file by label.

    With ``label``: the file's texts, or where it has a label column those that it gives this label. Without: the texts
    of every label in the column. ``several`` reads ``a|b`` as two labels, as files of multi-label classifiers have it.
    """
    if label is None:
        return examples.by_label(several=several)
    if examples.labels is None:
        return {label: list(examples.texts)}
    groups = examples.by_label(several=several)
    if label not in groups:
        found = ", ".join(list(groups)[:5])
        raise LabelError(
            f"{examples.source} has a label column without {label!r} (it has {found}); "
            "leave LABEL out to add the labels of the column"
        )
    return {label: groups[label]}


def _checked(examples: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    if not examples:
        raise LabelError("no new label; expected at least one with its examples")
    checked = {}
    for given, texts in examples.items():
        label = check_label(given, f"label {given!r:.60}")
        if isinstance(texts, str) or not texts:
            raise LabelError(f"no examples of {label!r}; expected a list of a few texts, ten are good")
        checked[label] = [check_text(text, f"{label}, example {number}") for number, text in enumerate(texts, 1)]
    return checked


def _new(texts: dict[str, list[str]], head: Head, classifier: str, *, skip_known: bool) -> dict[str, list[str]]:
    """The labels that the head lacks; LabelError for one that it knows, or with ``skip_known`` if it knows them all."""
    known = [label for label in texts if label in head.labels]
    if known and not (skip_known and len(known) < len(texts)):
        raise LabelError(
            f"{', '.join(map(repr, known[:5]))}: a label of {classifier} already, in version {head.lineage.version} "
            f"with {len(head.labels)} labels; expected new ones (`patcher labels` lists those there are)"
        )
    joined = [label for label in texts if head.problem == MULTI_LABEL and "|" in label]
    if joined:
        raise LabelError(f"{joined[0]!r}: '|' parts the labels of a text in the files of a multi-label classifier")
    return {label: group for label, group in texts.items() if label not in known}


def _check_backbone(classifier: Classifier, head: Head) -> None:
    if head.lineage.backbone != classifier.fingerprint():
        raise RepositoryError(
            f"version {head.lineage.version} belongs to backbone {head.lineage.backbone[:12]}, "
            f"{classifier.backbone_model} is {classifier.fingerprint()[:12]}; `patcher doctor` tells more"
        )


def _grouped(features: NDArray[np.float32], texts: Mapping[str, Sequence[str]]) -> dict[str, NDArray[np.float32]]:
    ends = np.cumsum([len(group) for group in texts.values()])[:-1]
    return dict(zip(texts, np.split(features, ends), strict=True))


def _features(classifier: Classifier, examples: Examples | None, server: TritonServer | None) -> Data | None:
    if examples is None:
        return None
    examples.labelled()  # before the work
    return examples, extract_features(classifier, examples.texts, server)


def _labelled(head: Head, data: Data | None) -> Labelled | None:
    """Features and label indices of old data; texts of labels that the head lacks are refused."""
    if data is None:
        return None
    examples, features = data
    rows, ids = label_ids(head, examples)
    return features[rows], ids


def _lineage(
    classifier: Classifier, parent: Head, made: Fit, verdict: Verdict, gate: str, texts: Mapping[str, Sequence[str]]
) -> Lineage:
    flat = [(text, label) for label, group in texts.items() for text in group]
    return next_lineage(
        classifier,
        parent,
        method=made.method,
        added=tuple(texts),
        data_hash=data_hash([text for text, _ in flat], [label for _, label in flat]),
        gate=gate,
        details={
            "examples": len(flat),
            "flips": verdict.flips,
            "flips_upper_bound": verdict.flips_upper_bound,
            "calibration": verdict.calibration,
            "estimated_recall": dict(verdict.estimated_recall),
            "verdict": verdict.sentence,
        },
    )


def _grown(memory: Memory | None, groups: Mapping[str, NDArray[np.float32]]) -> Memory | None:
    if memory is None:
        return None
    features = np.concatenate(list(groups.values()))
    ids = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()])
    return memory.add(tuple(groups), features, ids)


def _refusal(verdict: Verdict) -> str:
    advice = " ".join(verdict.advice)
    return f"the gate refused the patch: {verdict.sentence} {advice} `--force` publishes all the same.".replace(
        "  ", " "
    )
