"""Publish a head version, have the server serve it, verify that it does, and roll back if it does not."""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from patcher import audit
from patcher.backbone import Backbone
from patcher.classifier import Classifier
from patcher.errors import (
    LockLost,
    NotServed,
    PatcherError,
    ServerError,
    ServerUnreachable,
    StorageError,
    VersionError,
    as_sentence,
)
from patcher.features import check_same_backbone
from patcher.fleet import Fleet, each, present, watch, waves
from patcher.head_file import write_head
from patcher.lineage import related
from patcher.names import CANARY, holds
from patcher.runtime import check_head_file
from patcher.signals import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from patcher.files import RepositoryFiles
    from patcher.head import Head
    from patcher.memory import Memory
    from patcher.triton.client import TritonServer

__all__ = [
    "Switch",
    "forget",
    "held_in_stores",
    "let_go",
    "on_trial",
    "overtaken",
    "probe",
    "probe_text",
    "require_answer",
    "require_live",
    "roll_back",
    "roll_out",
    "serve",
    "set_aside",
    "validate",
    "withdrawing",
]


_NOBODY = "-"
"""A name that no classifier has (``check_name`` refuses it)."""


@dataclass(frozen=True)
class Switch:
    """A change of the serving version."""

    version: int
    previous: int
    served: bool
    """Whether a server was verified to answer from ``version``; False if no server was given."""
    warnings: tuple[str, ...] = field(default=(), kw_only=True)
    """What failed after the switch, which holds, or what it makes impossible."""


def probe_text() -> str:
    """A text to probe a server with: random, so that no response cache can answer it in place of the models."""
    return f"is anybody there? {secrets.token_hex(4)}"


def validate(data: bytes, head: Head) -> None:
    """Check in ONNX Runtime, on a few random features, that the file ``data`` computes what ``head`` does.

    Raises RepositoryError if the file does not load or its answers differ from those of ``head``.
    """
    rows = np.random.default_rng(0).standard_normal((3, head.width)).astype(np.float32)
    check_head_file(data, head, rows)


def probe(classifier: Classifier, head: Head, server: TritonServer) -> None:
    """Raise ServerError unless the ensemble is ready and answers from exactly ``head``.

    A load that Triton reports as successful proves little: the ensemble above the head may be gone, or the server may
    be reading another repository. So the ensemble must answer with the version and the labels of ``head``, and the head
    model must return the logits of ``head`` for features computed by this server. The logits of the ensemble's own
    answer cannot be checked against features from a second request: in INT8, a text's features depend on the other
    texts in its batch. Further requests then exercise the remaining instances of the classifier's models.
    """
    if not server.is_ready(classifier.ensemble):
        raise ServerError(
            f"the server's {classifier.ensemble} is not ready; is --repo the repository that this server serves?"
        )
    check_same_backbone(classifier, server)
    text = probe_text()
    (answer,) = server.classify(classifier.address, [text])
    _require_version(answer.head_version, head)
    if len(answer.logits) != len(head.labels):
        raise ServerError(f"the server returned {len(answer.logits)} logits; expected {len(head.labels)}")
    if not np.isfinite(answer.logits).all():
        raise ServerError("the server answers with logits that are not finite numbers")
    if answer.labels[0] != head.labels[int(answer.logits.argmax())]:
        raise ServerError(f"the server answers {answer.labels[0]!r}, but its own logits say otherwise")
    features = server.features(classifier.features_model, [text])
    logits, version = server.head_logits(classifier.head_address, features)
    _require_version(version, head)
    expected, rounding = head.logits(features), head.rounding(features)
    if logits.shape != expected.shape:
        raise ServerError(f"the head answers with logits of shape {logits.shape}; expected {expected.shape}")
    off = np.abs(logits - expected)
    if not (off <= 1e-2 + 1e-3 * np.abs(expected) + rounding).all():
        raise ServerError(f"the server's logits are off by {off.max():.3g} from those of version {version}")
    for _ in range(1, server.instances(classifier.address)):
        server.classify(classifier.address, [probe_text()])


def _require_version(found: int, head: Head) -> None:
    if found != head.lineage.version:
        raise ServerError(
            f"the server answers from head version {found}; expected {head.lineage.version}. "
            "Is --repo the repository that this server serves?"
        )


def roll_out(
    classifier: Classifier,
    head: Head,
    memory: Memory | None,
    server: TritonServer | None,
    data: bytes | None = None,
) -> Switch:
    """Publish ``head`` and make it the serving version. The repository's lock must be held.

    ``data`` is the head's file as bytes, if it has been written already.

    Raises
    ------
    RepositoryError, StorageError, ServerUnreachable
        Nothing was changed.
    NotServed
        If the server would not serve the new version; the previous one is pinned and loaded again.
    """
    require_live(server, classifier)
    with _unchanged(classifier):
        _publish(classifier, head, memory, data)
        with withdrawing(classifier, head.lineage.version):
            return _switch(classifier, head, server)


def _publish(classifier: Classifier, head: Head, memory: Memory | None, data: bytes | None) -> None:
    data = data or write_head(head)
    validate(data, head)
    classifier.publish(head, memory, data)


@contextlib.contextmanager
def _unchanged(classifier: Classifier) -> Iterator[None]:
    """Let the error of an object store say that nothing was changed, as a folder's does by itself.

    A version is several objects there, and those that are written may not be deletable while the store fails.
    """
    try:
        yield
    except LockLost:
        raise
    except StorageError as error:
        if classifier.storage.in_one_step:
            raise
        raise StorageError(
            f"{as_sentence(error)} Nothing was changed: what is left of the new version is taken away by the next "
            "change, or by `patcher doctor --repair`"
        ) from error


@contextlib.contextmanager
def withdrawing(classifier: Classifier, version: int) -> Iterator[None]:
    """Withdraw ``version`` if the body fails, so that it leaves no trace; after NotServed it stays, for a retry.

    Only a version that stays is named in the audit event: the number of another one goes to the next version.
    """
    try:
        yield
    except NotServed:
        audit.note(version=version)
        raise
    except BaseException:
        audit.retract("version")
        with uninterrupted(), contextlib.suppress(StorageError):
            classifier.withdraw(version)
        raise
    audit.note(version=version)


def roll_back(classifier: Classifier, to: int | None = None, server: TritonServer | None = None) -> Switch:
    """Make version ``to`` serve, by default the parent of the serving version. The lock must be held."""
    serving = classifier.serving()
    if to is None:
        to = _parent(classifier, serving)
    require_live(server, classifier)
    head = classifier.head(to, published=True)
    validate(classifier.head_bytes(to), head)
    return _switch(classifier, head, server)


def _parent(classifier: Classifier, serving: int) -> int:
    """The version from which ``serving`` was made; VersionError, with those to go to instead, if it is not there."""
    there = classifier.versions()
    parent = classifier.head(serving).lineage.parent
    if parent in there:
        return parent
    others = ", ".join(str(version) for version in there if version != serving)
    instead = f"name another one with --to (to=...): there are {others}" if others else "and there is no other one"
    gone = f"version {parent}, from which it was made, is gone" if parent else "it has no version before it"
    raise VersionError(f"version {serving} of {classifier.name} serves, and {gone}; {instead} (`patcher history`)")


def set_aside(classifier: Classifier, head: Head, memory: Memory | None, data: bytes | None = None) -> None:
    """Publish ``head``, with the file ``data``, without changing the serving version. The lock must be held."""
    with _unchanged(classifier):
        _publish(classifier, head, memory, data)
        with withdrawing(classifier, head.lineage.version):
            classifier.journal.append("done", serving=classifier.serving())


def on_trial(classifier: Classifier) -> Classifier | None:
    """The canary classifier that serves the version of ``classifier`` on trial; None if there is no trial."""
    name = classifier.name + CANARY
    return Classifier(classifier.repository, name) if holds(classifier.storage, name) else None


def let_go(name: str, replica: TritonServer) -> bool:
    """Unload a classifier's ensemble and head model from ``replica``; return whether the head was loaded.

    Without a head model, ``name`` is left alone: a model of that name may have nothing to do with patcher.
    """
    held = replica.is_ready(f"{name}_head")
    if held:
        replica.unload(name)
        replica.unload(f"{name}_head")
    return held


def held_in_stores(
    repository: RepositoryFiles, names: Sequence[str], replica: TritonServer
) -> dict[Backbone, frozenset[str]]:
    """The classifiers that the head stores of ``replica`` answer for, by backbone.

    A store that is not ready, or whose process died, answers for none, and reads the files again when it comes back.
    A store from before 0.14 cannot list its classifiers: it is asked for each of ``names`` and refuses those it lacks.
    """
    backbones = map(partial(Backbone, repository), repository.stores())
    return {backbone: _held(backbone, names, replica) for backbone in backbones}


def _held(backbone: Backbone, names: Sequence[str], replica: TritonServer) -> frozenset[str]:
    if not replica.is_ready(backbone.store_model):
        return frozenset()
    found = set()
    for name in names or (_NOBODY,):
        try:
            told = replica.held(backbone.store_model, name, backbone.width())
        except ServerUnreachable:
            raise
        except ServerError:
            continue
        if told is not None:
            return told
        found.add(name)
    return frozenset(found)


def forget(repository: RepositoryFiles, name: str, replica: TritonServer) -> bool:
    """Make the head stores of ``replica`` drop a classifier that no store holds any more; return whether any had it."""
    held = held_in_stores(repository, [name], replica)
    answering, failed = [backbone for backbone, there in held.items() if name in there], []
    for backbone in answering:
        try:
            replica.refresh(backbone.store_model, name, backbone.width())
        except ServerError as error:
            if "no classifier" not in str(error):  # "no classifier" is the expected answer: the store dropped it
                failed.append(str(error))
    if failed:
        raise ServerError("; ".join(failed))
    return bool(answering)


def require_live(server: TritonServer | None, classifier: Classifier | None = None) -> None:
    """Raise ServerUnreachable if no server answers. Called before anything is published, so that nothing is undone.

    If the versions of ``classifier`` are loaded through model control, this also raises ControlRefused for a server
    that accepts no model control, or wants another key for it. A head store needs neither: it learns of a version
    through an ordinary inference request.
    """
    if server is not None and not (present(server) and server.is_live()):
        raise ServerUnreachable(
            f"no Triton server answers at {server.url} (gRPC), and nothing was changed; `patcher serve` starts one, "
            "--url or $TRITON_URL (TritonServer(url)) names another, --no-load (server=None) publishes without one"
        )
    for replica in present(server) if classifier is not None and not classifier.in_store else ():
        replica.check_control()


def require_answer(replica: TritonServer) -> None:
    """Raise ServerUnreachable if ``replica`` hangs: every request would time out, and a rollback ignores Ctrl-C."""
    if not replica.is_live():
        raise ServerUnreachable(f"{replica.url} does not answer; run `patcher sync` again when it does")


def _switch(classifier: Classifier, head: Head, server: TritonServer | None) -> Switch:
    version, previous = head.lineage.version, classifier.serving()
    warnings = overtaken(classifier, version)
    asked: list[TritonServer] = []
    try:
        with classifier.pinned(version):
            replicas = present(server)
            for number, wave in enumerate(waves(replicas)):
                asked += wave
                each(wave, lambda replica: serve(classifier, head, replica))
                if number == 0 and len(replicas) > 1 and isinstance(server, Fleet):
                    watch(classifier, wave[0], server.watch_seconds)
                    probe(classifier, head, wave[0])
    except BaseException as error:  # noqa: BLE001 - _come_back raises it again, or a NotServed
        with uninterrupted():
            _come_back(classifier, version, previous, asked, error)
    return Switch(version, previous, served=server is not None, warnings=warnings)


def overtaken(classifier: Classifier, version: int) -> tuple[str, ...]:
    """A warning if a version is on trial that cannot be promoted once ``version`` serves: that would lose a change."""
    with contextlib.suppress(PatcherError):  # a damaged trial is no reason not to switch
        trial = on_trial(classifier)
        if trial is not None and not related(classifier, tried := trial.serving(), version):
            said = (
                f"version {tried} of {classifier.name} is on trial and was made without what was changed in version "
                f"{version}; it cannot be promoted while that serves: `patcher canary --discard` ends the trial; then "
                "make its change again"
            )
            return (said,)
    return ()


def _come_back(
    classifier: Classifier, version: int, previous: int, asked: Sequence[TritonServer], error: BaseException
) -> NoReturn:
    if not isinstance(error, LockLost) and classifier.serving() != previous:
        # Only in an object store: the new pin was written, but writing the old one back failed.
        raise NotServed(
            f"version {version} of {classifier.name} was published, but something failed, and so did the rollback: "
            f"{as_sentence(error)} Version {version} may still be pinned; `patcher doctor --repair`, or the next "
            "verb that changes anything, finishes or undoes it",
            {"version": version, "parent_version": previous, "published": True, "served": False},
        ) from error
    # The files are back in their previous state; now the servers that were asked have to follow.
    if not asked or version == previous:
        classifier.note("undone", serving=previous)
        raise error
    _put_back(classifier, version, asked, error)


def serve(classifier: Classifier, head: Head, replica: TritonServer) -> None:
    """Have ``replica`` serve ``head``, which must be pinned, and verify it; ServerError if it does not serve it."""
    if not classifier.in_store:
        replica.load(classifier.head_model)
    if not replica.is_ready(classifier.ensemble):
        replica.load(classifier.ensemble)  # the classifier, or its store, was created after the server started
    if classifier.in_store:
        replica.refresh(classifier.store_model, classifier.name, head.width)
    probe(classifier, head, replica)


def _put_back(classifier: Classifier, version: int, asked: Sequence[TritonServer], cause: BaseException) -> NoReturn:
    previous = classifier.serving()

    def back(replica: TritonServer) -> None:
        require_answer(replica)
        serve(classifier, head, replica)

    try:
        head = classifier.head(previous)
        each(asked, back)
    except PatcherError as error:
        state = (
            f"The repository is back on version {previous}, but the server could not be brought back to it ({error}); "
            "`patcher sync` has each server that answers serve that version, and so does a restart; `patcher doctor` "
            "calls the change interrupted until `patcher sync`, or the next change, has ended it"
        )
    else:
        classifier.note("undone", serving=previous)
        state = f"Version {previous} serves again"
        if isinstance(cause, KeyboardInterrupt):
            raise cause
    raise NotServed(
        f"version {version} of {classifier.name} was published, but the server would not serve it: "
        f"{as_sentence(str(cause) or type(cause).__name__)} {state}; "
        f"to retry: `patcher rollback --to {version}`",
        {"version": version, "parent_version": previous, "published": True, "served": False},
    ) from cause
