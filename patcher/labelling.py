"""Add new labels from a few examples: compute features, fit, pass the gate, roll out the next head version."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from patcher.arguments import require
from patcher.canary import require_free, start
from patcher.errors import ExamplesError, GateRefused, NotServed, RepositoryError
from patcher.examples import data_hash
from patcher.examples_file import as_examples
from patcher.features import extract_features
from patcher.fit.inputs import Labelled
from patcher.head_file import write_head
from patcher.lineage import next_lineage
from patcher.new_texts import checked, distinct, unknown_to
from patcher.patch import DEFAULTS, Given, Patch, PatchSettings, make_patch
from patcher.recovery import changing
from patcher.remembering import label_ids
from patcher.repository import one_classifier
from patcher.rollout import require_live, roll_out, set_aside, validate, withdrawing
from patcher.stopwatch import Stopwatch
from patcher.triton.client import TritonServer
from patcher.words import label_words, plain_words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from patcher.arrays import Floats
    from patcher.classifier import Classifier
    from patcher.examples import Examples
    from patcher.examples_file import ExamplesLike
    from patcher.fit import Fit
    from patcher.gate import Verdict
    from patcher.head import Head, Lineage
    from patcher.memory import Memory
    from patcher.new_texts import Texts
    from patcher.repository import ClassifierLike
    from patcher.screening import Repeat

__all__ = ["PatchReport", "add_label", "add_labels"]


@dataclass(eq=False)
class PatchReport:
    """What a patch did, and the flips and recall to expect from it."""

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
    canary: float | None = None
    """Percentage of the requests that the version is tried on; None if it serves them all."""
    seconds: dict[str, float] = field(default_factory=dict)
    head_bytes: int = 0
    warnings: tuple[str, ...] = ()
    """What the publication makes impossible: the promotion of a version that is on trial."""

    def __repr__(self) -> str:
        added = ", ".join(f"+{label}" for label in self.labels_added)
        published = "published" if self.published else "not published"
        return f"<PatchReport of {self.classifier}: version {self.version}, {added}, gate {self.gate}, {published}>"

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object, with the gate's verdict."""
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
            "recall_lower_bound": self.recall_lower_bound,
            "method": self.fit.method,
            "gate": self.gate,
            "published": self.published,
            "served": self.served,
            "canary": self.canary,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "head_bytes": self.head_bytes,
            "why": self.fit.why,
            "verdict": self.verdict.to_dict(),
            "warnings": self.warnings,
        }

    @property
    def estimated_recall(self) -> float | None:
        """The lowest estimated recall of any new label; None if none could be estimated."""
        return min((r for r in self.verdict.estimated_recall.values() if r is not None), default=None)

    @property
    def recall_lower_bound(self) -> float | None:
        """The lowest lower bound of any new label's recall, at 95 % confidence; None if none could be estimated."""
        return min((r for r in self.verdict.recall_lower_bound.values() if r is not None), default=None)


def add_label(
    repository: ClassifierLike,
    label: str,
    texts: Texts,
    *,
    server: TritonServer | None = None,
    classifier: str | None = None,
    replay: ExamplesLike | None = None,
    evaluation: ExamplesLike | None = None,
    settings: PatchSettings = DEFAULTS,
) -> PatchReport:
    """Add one label; see ``add_labels``."""
    require(str, label=label)
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
    repository: ClassifierLike,
    examples: Mapping[str, Texts],
    *,
    server: TritonServer | None = None,
    classifier: str | None = None,
    replay: ExamplesLike | None = None,
    evaluation: ExamplesLike | None = None,
    settings: PatchSettings = DEFAULTS,
    skip_known: bool = False,
    progress: Callable[[int], None] | None = None,
    label_progress: Callable[[int], None] | None = None,
) -> PatchReport:
    """Add labels to a classifier in one patch: fit, gate, publish, load, probe.

    Parameters
    ----------
    repository
        The repository that holds the classifier, or the classifier itself.
    examples
        The texts of each new label. From ``Examples`` with labels, only the texts of that label are used.
    server
        The server that serves ``repository``. With None the features are computed in this process and the version is
        published without telling any server.
    replay, evaluation
        Labelled old data, or the path of a file. ``replay`` takes part in the fit; ``evaluation`` is only used to count
        flips and recall, on texts that are neither examples nor replayed.
    skip_known
        Skip labels that the head already has, instead of refusing them.
    progress
        Called with the number of texts whose features have been computed so far, over all arguments.
    label_progress
        Called with the number of new labels that have been fitted so far, first with 0.

    Raises
    ------
    LabelError, ExamplesError
        For a label that exists, an empty text, and the like.
    GateRefused
        If the patch exceeds the limits in ``settings``; nothing was published.
    NotServed
        If the server would not serve the new version; the previous one serves again.
    """
    require(TritonServer, None, server=server)
    require(PatchSettings, settings=settings)
    require(bool, skip_known=skip_known)
    watch = Stopwatch()
    target = one_classifier(repository, classifier)
    head = target.head()
    usable = checked(examples, several=not head.exclusive)
    texts, repeated = distinct(unknown_to(usable, head, target.name, skip_known=skip_known))
    replay = None if replay is None else as_examples(replay, "replay")
    evaluation = None if evaluation is None else as_examples(evaluation, "evaluation")
    require_live(server)
    # Features depend only on the backbone, which never changes, so they are computed before the lock is taken.
    with watch("features"):
        extractor = _Extractor(target, server, progress)
        features = _features(head, texts, replay, evaluation, extractor, use_name=settings.use_name)
    with changing(target, server, dry_run=settings.dry_run):
        patch, report = _patched(
            target, texts, features, repeated, settings, watch, label_progress, skip_known=skip_known
        )
        if report.gate == "refused":
            report.seconds = watch.stop()
            raise GateRefused(report.verdict.refusal("patch"), report.to_json(), report.verdict.sentence)
        with watch("publish"):
            _publish(target, patch, report, settings, server)
    report.seconds = watch.stop()
    return report


def _patched(
    target: Classifier,
    texts: dict[str, list[str]],
    features: _Features,
    repeated: Sequence[Repeat],
    settings: PatchSettings,
    watch: Stopwatch,
    heard: Callable[[int], None] | None,
    *,
    skip_known: bool,
) -> tuple[Patch, PatchReport]:
    """The patch of the serving version, and its report."""
    with watch("read"):
        parent, memory = _read(target, on_trial=settings.canary is not None)
        # Another patcher may have added some of the labels in the meantime.
        texts = unknown_to(texts, parent, target.name, skip_known=skip_known)
        given = _given(parent, texts, features, repeated)
    patch = make_patch(parent, memory, given, settings, watch, heard)
    patch = patch.with_lineage(_lineage(target, parent, patch, texts))
    return patch, _report(target, patch, parent, texts)


def _report(target: Classifier, patch: Patch, parent: Head, texts: Mapping[str, Sequence[str]]) -> PatchReport:
    return PatchReport(
        classifier=target.name,
        labels_added=tuple(texts),
        version=patch.head.lineage.version,
        parent_version=parent.lineage.version,
        labels=len(patch.head.labels),
        examples=patch.examples,
        verdict=patch.verdict,
        fit=patch.fit,
        gate=patch.gate,
    )


def _publish(
    target: Classifier, patch: Patch, report: PatchReport, settings: PatchSettings, server: TritonServer | None
) -> None:
    """Publish a patch and have it served, and update the report; with ``dry_run`` only validate the head's file."""
    data = write_head(patch.head)
    report.head_bytes = len(data)
    if settings.dry_run:
        validate(data, patch.head)
        return
    try:
        report.warnings = _serve(target, patch, data, settings.canary, server)
    except NotServed as error:
        raise NotServed(str(error), {**report.to_json(), **error.report}) from error
    report.published, report.served, report.canary = True, server is not None, settings.canary


def _serve(
    target: Classifier, patch: Patch, data: bytes, canary: float | None, server: TritonServer | None
) -> tuple[str, ...]:
    if canary is None:
        return roll_out(target, patch.head, patch.memory, server, data).warnings
    require_live(server, target)
    set_aside(target, patch.head, patch.memory, data)
    with withdrawing(target, patch.head.lineage.version):
        start(target, patch.head, canary, server)
    return ()


def _read(classifier: Classifier, *, on_trial: bool) -> tuple[Head, Memory | None]:
    """The serving head and its memory; RepositoryError if it was made for another backbone.

    With ``on_trial``, also require that no other version is on trial.
    """
    head = classifier.head(published=True)
    if head.lineage.backbone != classifier.fingerprint():
        raise RepositoryError(
            f"version {head.lineage.version} belongs to backbone {head.lineage.backbone[:12]}, "
            f"{classifier.backbone_model} is {classifier.fingerprint()[:12]}; `patcher doctor` tells more"
        )
    if on_trial:
        require_free(classifier)
    return head, classifier.memory(published=True)


class _Data(NamedTuple):
    """Distinct labelled texts, their features float32 ``[n, width]``, and the number of ``repeated`` texts dropped."""

    examples: Examples
    features: Floats
    repeated: int


class _Features(NamedTuple):
    """Features of the examples, float32 ``[n, width]`` per new label, of label names ``[width]``, and of old data.

    Only label names that consist of words have features.
    """

    examples: dict[str, Floats]
    names: dict[str, Floats]
    replay: _Data | None
    evaluation: _Data | None


@dataclass
class _Extractor:
    """Computes features of one list of texts after the other; ``progress`` hears how many are done in all of them."""

    classifier: Classifier
    server: TritonServer | None
    progress: Callable[[int], None] | None
    done: int = 0

    def __call__(self, texts: Sequence[str]) -> Floats:
        features = extract_features(self.classifier, texts, self.server, self._heard)
        self.done += len(texts)
        return features

    def _heard(self, done: int) -> None:
        if self.progress:
            self.progress(self.done + done)


def _features(
    head: Head,
    texts: Mapping[str, Sequence[str]],
    replay: Examples | None,
    evaluation: Examples | None,
    extract: _Extractor,
    *,
    use_name: bool,
) -> _Features:
    words = {label: text for label in texts if (text := label_words(label))} if use_name else {}
    flat = [text for group in texts.values() for text in group]
    features = extract([*flat, *words.values()])
    shown = (*flat, *(replay.texts if replay else ()))
    *groups, names = np.split(features, np.cumsum([len(group) for group in texts.values()]))
    return _Features(
        dict(zip(texts, groups, strict=True)),
        dict(zip(words, names, strict=True)),
        _data(head, replay, extract),
        _data(head, evaluation, extract, tuple(texts), shown),
    )


def _data(
    head: Head,
    examples: Examples | None,
    extract: _Extractor,
    new: Sequence[str] = (),
    shown: Sequence[str] = (),
) -> _Data | None:
    """Features of old data, without the texts in ``shown``: on texts that the fit has seen, a count proves nothing.

    Repeated texts are dropped as well: they add no information, but would make a count on them look more certain.
    """
    if examples is None:
        return None
    label_ids(head, examples, new)  # checks all labels, before the work and before a text with a bad label is dropped
    seen = {plain_words(text) for text in shown}
    unseen = examples.part([row for row, text in enumerate(examples.texts) if plain_words(text) not in seen])
    if not unseen.texts:
        raise ExamplesError(f"{examples.source}: each text is an example or replayed; expected some that the fit lacks")
    once = unseen.once(several=not head.exclusive)
    return _Data(once, extract(once.texts), len(unseen) - len(once))


def _given(parent: Head, texts: Mapping[str, Sequence[str]], features: _Features, repeated: Sequence[Repeat]) -> Given:
    """The input of a patch that adds the labels in ``texts`` to ``parent``."""
    return Given(
        {label: features.examples[label] for label in texts},
        texts,
        features.names,
        _labelled(parent, features.replay),
        _labelled(parent, features.evaluation, tuple(texts)),
        repeated,
        {
            name: data.repeated
            for name, data in (("--replay", features.replay), ("--eval", features.evaluation))
            if data is not None and data.repeated
        },
    )


def _labelled(head: Head, data: _Data | None, new: Sequence[str] = ()) -> Labelled | None:
    """Old data with label ids: the head's labels, then the ``new`` ones; LabelError for any other label."""
    if data is None:
        return None
    rows, ids = label_ids(head, data.examples, new)
    return Labelled(data.features[rows], ids)


def _lineage(classifier: Classifier, parent: Head, patch: Patch, texts: Mapping[str, Sequence[str]]) -> Lineage:
    flat = [(text, label) for label, group in texts.items() for text in group]
    return next_lineage(
        classifier,
        parent,
        method=patch.fit.method,
        added=tuple(texts),
        data_hash=data_hash([text for text, _ in flat], [label for _, label in flat]),
        gate=patch.gate,
        details=patch.details,
    )
