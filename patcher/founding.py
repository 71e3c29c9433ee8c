"""A new classifier on an existing backbone: features, fit, evaluation on held-out texts, publication of version 1."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patcher import __version__, audit
from patcher.arguments import require
from patcher.classifier import add_classifier
from patcher.dropping import forget_other, take_out
from patcher.errors import (
    GateRefused,
    NotServed,
    PatcherError,
    ServerError,
    as_sentence,
)
from patcher.evaluation import Evaluation, evaluate_head
from patcher.examples_file import as_examples
from patcher.features import extract_features
from patcher.fit.scope import fit_scope
from patcher.fit.whole_head import fit_head, pairs_of
from patcher.fleet import each, present
from patcher.head import MULTI_LABEL, SINGLE_LABEL, Head
from patcher.head_file import write_head
from patcher.limits import MIN_ACCURACY, check_limit
from patcher.memory import Memory
from patcher.names import check_name
from patcher.provenance import author, now
from patcher.remembering import FEATURES_A_LABEL, STORED_CLUSTERS
from patcher.repository import ModelRepository
from patcher.rollout import require_live, serve, validate
from patcher.signals import uninterrupted
from patcher.stopwatch import Stopwatch
from patcher.targets import remarks, targets_of
from patcher.triton.client import TritonServer
from patcher.wording import listing, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from patcher.backbone import Backbone
    from patcher.examples import Examples
    from patcher.examples_file import ExamplesLike
    from patcher.fit.whole_head import HeadFit, Targets

__all__ = ["FoundingSettings", "NewClassifierReport", "WeakLabel", "new_classifier", "publish_new"]

METHODS = {SINGLE_LABEL: "softmax", MULTI_LABEL: "sigmoid"}
"""What the lineage calls the fit."""
_WEAK_RECALL = 0.75
"""The report names the labels whose recall on the held-out texts is below this."""


@dataclass(frozen=True)
class FoundingSettings:
    """How a new classifier is made.

    With ``in_store``, the backbone's head store answers for it, which holds many classifiers in one process; otherwise
    it gets an ensemble and a head model of its own. With ``multi_label``, a text can have any number of the labels
    (written ``a|b``), and each label is decided on its own. ``min_accuracy`` is the share of held-out texts that must
    be answered right, with ``multi_label`` by exactly their labels; ``force`` publishes even below it, which is
    recorded. ``dry_run`` publishes nothing. The memory keeps the features of up to ``per_label`` texts of each label; 0
    keeps only statistics.
    """

    in_store: bool = False
    min_accuracy: float = MIN_ACCURACY
    force: bool = False
    dry_run: bool = False
    per_label: int = FEATURES_A_LABEL
    multi_label: bool = False

    def __post_init__(self) -> None:
        check_limit("min_accuracy", self.min_accuracy)
        require(bool, in_store=self.in_store, force=self.force, dry_run=self.dry_run, multi_label=self.multi_label)
        require(int, per_label=self.per_label)


@dataclass(frozen=True)
class WeakLabel:
    """A label with low recall on its ``support`` held-out texts, and the wrong answer they most often get, if any.

    In a multi-label classifier, texts may lack the label and get no wrong one.
    """

    label: str
    recall: float
    support: int
    instead: str | None


@dataclass
class NewClassifierReport:
    """The classifier that was made, and its accuracy: of a trial fit, on the texts held out of it."""

    classifier: str
    backbone: str
    in_store: bool
    problem: str
    address: str
    labels: int
    examples: int
    held_out: int
    evaluation: Evaluation
    penalty: float
    gate: str
    weak: tuple[WeakLabel, ...]
    repeated: int = 0
    """Number of texts that were left out as duplicates of another text of their label."""
    version: int = 1
    published: bool = False
    served: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    head_bytes: int = 0
    memory_bytes: int = 0
    notes: tuple[str, ...] = ()
    """Questions about the labels: names that hardly differ, texts with more than one."""
    warnings: tuple[str, ...] = ()
    """What failed after the classifier was published: an earlier one of that name, which was dropped and served the
    other way (head store or ensemble), could not be unloaded."""

    @property
    def sentence(self) -> str:
        """The gate's verdict in one sentence."""
        word = "Passed" if self.gate == "passed" else "Refused"
        return f"{word}: {self.right}, macro F1 {percent(self.evaluation.macro_f1, 1)}."

    @property
    def right(self) -> str:
        """How many of the held-out texts were answered right, in words."""
        how = "answered right" if self.problem == SINGLE_LABEL else "given exactly their labels"
        return f"{percent(self.evaluation.accuracy, 1)} of {self.held_out} held-out texts {how}"

    def to_json(self) -> dict[str, Any]:
        """The report for JSON, with the figures of every label."""
        return {
            **{name: getattr(self, name) for name in ("classifier", "backbone", "in_store", "problem", "address")},
            **{name: getattr(self, name) for name in ("version", "labels", "examples", "repeated", "held_out")},
            "accuracy": self.evaluation.accuracy,
            "macro_f1": self.evaluation.macro_f1,
            "per_label": self.evaluation.to_json()["per_label"],
            "weak_labels": [dataclasses.asdict(weak) for weak in self.weak],
            "method": METHODS[self.problem],
            **{name: getattr(self, name) for name in ("penalty", "gate", "published", "served")},
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            **{name: getattr(self, name) for name in ("head_bytes", "memory_bytes", "notes", "warnings")},
        }


def new_classifier(
    repository: ModelRepository,
    name: str,
    examples: ExamplesLike,
    *,
    backbone: str | None = None,
    server: TritonServer | None = None,
    settings: FoundingSettings = FoundingSettings(),
    progress: Callable[[int], None] | None = None,
) -> NewClassifierReport:
    """Make a classifier from labelled texts on an existing backbone, without fine-tuning and without torch.

    Its rows are fitted to the frozen features of all texts (multinomial logistic regression, or with
    ``settings.multi_label`` one logistic regression for each label). It is evaluated by a trial fit without a fifth of
    each label's texts, on these texts, which also choose the penalty. With more than 20,000 texts, the trial uses a
    sample of that size. The result is a classifier like any other: ``add_label``, ``rollback`` and the rest work on it.

    Parameters
    ----------
    examples
        Labelled texts, or the path of a file with them: at least two labels, and two texts of each.
    backbone
        The backbone's name; by default the only one of the repository.
    server
        The server that serves ``repository``. With None, the features are computed in this process, and the classifier
        is published without loading it anywhere.

    Raises
    ------
    InputError, LabelError, ExamplesError
        for a name that is taken, an unknown backbone, too few labels or texts, or ``in_store`` on an object store.
    GateRefused
        if too few of the held-out texts are answered right; nothing was published.
    NotServed
        if the server would not serve it; the classifier was removed from the repository again.
    ServerError
        if no server answers, with nothing changed.
    """
    require(ModelRepository, repository=repository)
    require(TritonServer, None, server=server)
    require(FoundingSettings, settings=settings)
    watch = Stopwatch()
    if settings.in_store:
        repository.require_folder()
    base = repository.backbone(backbone)
    repository.refuse_existing(check_name(name))
    given = as_examples(examples, "examples")
    # The trial fit must not have seen the texts that it is evaluated on.
    examples = given.once_a_label(several=settings.multi_label)
    labels, targets = targets_of(examples, several=settings.multi_label)
    with watch("features"):
        features = extract_features(base, examples.texts, server, progress)
    with watch("fit"):
        made = fit_head(features, targets, len(labels))
    with watch("judge"):
        report = _judged(name, base, labels, examples, features, made, settings)
        report.repeated = len(given) - len(examples)
        report.notes = remarks(examples, labels, several=settings.multi_label)
    if report.gate == "refused":
        report.seconds = watch.stop()
        raise GateRefused(_refusal(report, settings), report.to_json())
    with watch("scope"):
        memory = _memory(features, targets, labels, settings)
        head = _head(base, labels, made, memory, report, examples)
    with watch("publish"):
        _publish(base, head, memory, report, settings, server)
    report.seconds = watch.stop()
    return report


def _memory(
    features: NDArray[np.float32], targets: Targets, labels: Sequence[str], settings: FoundingSettings
) -> Memory:
    limits = {"per_label": settings.per_label} | ({"most_clusters": STORED_CLUSTERS} if settings.in_store else {})
    rows, ids = pairs_of(targets)
    return Memory.build(features[rows], ids, labels, features.shape[1], **limits)


def _judged(
    name: str,
    base: Backbone,
    labels: tuple[str, ...],
    examples: Examples,
    features: NDArray[np.float32],
    made: HeadFit,
    settings: FoundingSettings,
) -> NewClassifierReport:
    """The report, with the trial fit evaluated on the held-out texts."""
    problem = MULTI_LABEL if settings.multi_label else SINGLE_LABEL
    rows = made.trial_weight, made.trial_bias
    trial = Head.from_linear(labels, *rows, features.shape[1], base.fingerprint(), problem=problem)
    written = examples.labelled()
    expected = [written[place] for place in made.held_out]
    found = evaluate_head(trial, features[made.held_out], expected)
    passed = found.accuracy >= settings.min_accuracy
    return NewClassifierReport(
        classifier=name,
        backbone=base.backbone_name,
        in_store=settings.in_store,
        problem=problem,
        address=f"{base.any_model}/{name}" if settings.in_store else name,
        labels=len(labels),
        examples=len(examples),
        held_out=len(expected),
        evaluation=found,
        penalty=made.penalty,
        gate="passed" if passed else "forced" if settings.force else "refused",
        weak=_weak(found),
    )


def _weak(found: Evaluation) -> tuple[WeakLabel, ...]:
    """The labels with low recall, the worst first."""
    instead: dict[str, str] = {}
    for label, answered, _ in found.confusions:  # the most frequent first
        instead.setdefault(label, answered)
    weak = [
        WeakLabel(label, score.recall, score.support, instead.get(label))
        for label, score in found.per_label.items()
        if score.support and score.recall < _WEAK_RECALL
    ]
    return tuple(sorted(weak, key=lambda each: (each.recall, -each.support, each.label)))


def _refusal(report: NewClassifierReport, settings: FoundingSettings) -> str:
    worst = listing(
        f"{weak.label!r}" + (f" (answered {weak.instead!r})" if weak.instead else "") for weak in report.weak
    )
    return (
        f"the gate refused {report.classifier}: {report.right}, expected {percent(settings.min_accuracy, 1)} or more. "
        "Found least: "
        f"{worst or 'none in particular'}. "
        "More texts of these help, or another backbone; `--force` (force=True) publishes anyway."
    )


def _head(
    base: Backbone,
    labels: tuple[str, ...],
    made: HeadFit,
    memory: Memory,
    report: NewClassifierReport,
    examples: Examples,
) -> Head:
    facts: dict[str, Any] = {"method": METHODS[report.problem], "data_hash": examples.data_hash(), "gate": report.gate}
    audit.note(classifier=report.classifier, backbone=base.backbone_name, in_store=report.in_store, **facts)
    head = Head.from_linear(
        labels,
        made.weight,
        made.bias,
        memory.width,
        base.fingerprint(),
        problem=report.problem,
        created=now(),
        author=author(),
        tool_version=__version__,
        details={
            "train_examples": report.examples,
            "held_out": report.held_out,
            "accuracy": report.evaluation.accuracy,
            "macro_f1": report.evaluation.macro_f1,
            "penalty": made.penalty,
            "verdict": report.sentence,
        },
        **facts,
    )
    return dataclasses.replace(head, scope=fit_scope(memory, head))


def _publish(
    base: Backbone,
    head: Head,
    memory: Memory,
    report: NewClassifierReport,
    settings: FoundingSettings,
    server: TritonServer | None,
) -> None:
    """Validate the head, then publish and serve it unless ``dry_run``; updates the report."""
    data = write_head(head)
    validate(data, head)
    report.head_bytes, report.memory_bytes = len(data), memory.size
    if settings.dry_run:
        return
    try:
        report.warnings = publish_new(base, report.classifier, head, memory, server, in_store=settings.in_store)
    except (NotServed, ServerError) as error:
        error.report = {**report.to_json(), **error.report}
        raise
    report.published, report.served = True, server is not None
    audit.note(version=1)


def publish_new(
    base: Backbone, name: str, head: Head, memory: Memory | None, server: TritonServer | None, *, in_store: bool = False
) -> tuple[str, ...]:
    """Publish version 1 of the classifier ``name`` and have the server serve it, or change nothing.

    Returns a warning if an earlier classifier of that name, which was dropped, may still be served, too.

    Raises ControlRefused, with nothing changed, if a server refuses model control; NotServed if the server would not
    serve the classifier, which was then removed from the repository again.
    """
    repository = base.repository
    require_live(server)
    for replica in () if in_store and repository.has_store(base.backbone_name) else present(server):
        replica.check_control()
    with repository.lock(), contextlib.ExitStack() as undo:
        repository.refuse_existing(name)  # checked again: another patcher may have added it before we got the lock
        if in_store and not repository.has_store(base.backbone_name):
            base.add_store()
            undo.callback(_take_out_store, base, server)
        classifier = add_classifier(repository, name, head, memory, base=base, in_store=in_store)
        undo.callback(take_out, classifier, server)
        try:
            each(present(server), lambda replica: serve(classifier, head, replica))
        except PatcherError as error:
            undo.close()
            raise NotServed(
                f"{name} was published, but the server would not serve it: {as_sentence(error)} It was removed again; "
                "`patcher doctor` shows what the server serves",
                {"published": False, "served": False},
            ) from error
        with uninterrupted():  # the classifier serves, and nothing is undone any more
            undo.pop_all()
            left = forget_other(classifier, server)
    warning = (
        f"version 1 of {name} serves, but an earlier {name} may still be answered for, too, by {as_sentence(left)} "
        f"`patcher sync --classifier {name}` ends that"
    )
    return (warning,) if left else ()


def _take_out_store(base: Backbone, server: TritonServer | None) -> None:
    base.remove_store()
    for replica in present(server):
        with contextlib.suppress(ServerError):
            replica.unload(base.any_model)
            replica.unload(base.store_model)
