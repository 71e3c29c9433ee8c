"""Publish a head version, have the server serve it, prove that it does, or put the previous one back."""

from __future__ import annotations

import contextlib
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from patcher.classifier import Classifier
from patcher.errors import (
    ControlRefused,
    InputError,
    LockLost,
    NotServed,
    PatcherError,
    RepositoryError,
    ServerError,
    ServerUnreachable,
    StorageError,
    VersionError,
    as_sentence,
)
from patcher.features import check_same_backbone
from patcher.fleet import Fleet, each, members, present, watch, waves
from patcher.head_file import write_head
from patcher.names import CANARY, holds
from patcher.runtime import check_head_file
from patcher.signals import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from patcher.head import Head
    from patcher.memory import Memory
    from patcher.triton.client import TritonServer

__all__ = [
    "Switch",
    "catch_up",
    "changing",
    "let_go",
    "on_trial",
    "probe",
    "probe_text",
    "recover",
    "require_live",
    "roll_back",
    "roll_out",
    "serve",
    "set_aside",
    "validate",
    "withdrawing",
]

_DEAD_STUB = re.compile(r"Stub process '(\S+)_\d+_\d+' is not healthy")
"""What Triton says of a model whose Python process died, and of each ensemble that asks it."""


@dataclass(frozen=True)
class Switch:
    """A change of the serving version."""

    version: int
    previous: int
    served: bool
    """Whether a server was seen answering from ``version``; False where none was asked."""


def probe_text() -> str:
    """A text to ask a server for: any does, but one that a response cache has seen would not reach the models."""
    return f"is anybody there? {secrets.token_hex(4)}"


def validate(data: bytes, head: Head) -> None:
    """Prove in ONNX Runtime, on a few made-up features, that the file ``data`` is ``head`` before it may serve.

    Raises RepositoryError where the file does not load or does not answer as the numbers say.
    """
    rows = np.random.default_rng(0).standard_normal((3, head.width)).astype(np.float32)
    check_head_file(data, head, rows)


def probe(classifier: Classifier, head: Head, server: TritonServer) -> None:
    """ServerError unless the ensemble is ready and answers from exactly ``head``, each instance of its models.

    A load that Triton calls OK proves little: the ensemble above the head may be gone, or the server may be reading
    another repository. So the answer itself is compared, with the version, the labels and the logits of ``head``.
    """
    if not server.is_ready(classifier.ensemble):
        raise ServerError(
            f"the server's {classifier.ensemble} is not ready; is --repo the repository that this server serves?"
        )
    check_same_backbone(classifier, server)
    text = probe_text()
    (answer,) = server.classify(classifier.address, [text])
    if answer.head_version != head.lineage.version:
        raise ServerError(
            f"the server answers from head version {answer.head_version}; expected {head.lineage.version}. "
            "Is --repo the repository that this server serves?"
        )
    features = server.features(classifier.features_model, [text])
    expected, rounding = head.logits(features)[0], head.rounding(features)[0]
    if answer.logits.shape != expected.shape:
        raise ServerError(f"the server returned {len(answer.logits)} logits; expected {len(expected)}")
    off = np.abs(answer.logits - expected)
    if not (off <= 1e-2 + 1e-3 * np.abs(expected) + rounding).all():
        raise ServerError(f"the server's logits are off by {off.max():.3g} from those of version {answer.head_version}")
    if answer.labels[0] != head.labels[int(answer.logits.argmax())]:
        raise ServerError(f"the server answers {answer.labels[0]!r}, but its own logits say otherwise")
    for _ in range(1, server.instances(classifier.address)):
        server.classify(classifier.address, [probe_text()])


def roll_out(classifier: Classifier, head: Head, memory: Memory | None, server: TritonServer | None) -> Switch:
    """Publish ``head`` and make it the one that serves; the repository's lock must be held.

    Raises
    ------
    RepositoryError, StorageError, ServerUnreachable
        with nothing changed.
    NotServed
        when the server would not serve it; the previous version is pinned and loaded again.
    """
    require_live(server, classifier)
    validate(write_head(head), head)
    classifier.publish(head, memory)
    with withdrawing(classifier, head.lineage.version):
        return _switch(classifier, head, server)


@contextlib.contextmanager
def withdrawing(classifier: Classifier, version: int) -> Iterator[None]:
    """Withdraw ``version`` where the body fails, unless a server refused it: what nobody asked for leaves no trace."""
    try:
        yield
    except NotServed:
        raise
    except BaseException:
        with uninterrupted(), contextlib.suppress(StorageError):
            classifier.withdraw(version)
        raise


def roll_back(classifier: Classifier, to: int | None = None, server: TritonServer | None = None) -> Switch:
    """Make version ``to`` serve, by default the parent of the one that serves now; the lock must be held."""
    serving = classifier.serving()
    if to is None:
        to = classifier.head(serving).lineage.parent
        if to is None:
            raise VersionError(f"version {serving} of {classifier.name} has no version before it (`patcher history`)")
    require_live(server, classifier)
    head = classifier.head(to)
    validate(classifier.head_bytes(to), head)
    return _switch(classifier, head, server)


def set_aside(classifier: Classifier, head: Head, memory: Memory | None) -> None:
    """Publish ``head`` beside the version that goes on serving; the lock must be held."""
    validate(write_head(head), head)
    classifier.publish(head, memory)
    with withdrawing(classifier, head.lineage.version):
        classifier.journal.append("done", serving=classifier.serving())


def on_trial(classifier: Classifier) -> Classifier | None:
    """The model beside a classifier that serves the version on trial; None where there is none."""
    name = classifier.name + CANARY
    return Classifier(classifier.repository, name) if holds(classifier.storage, name) else None


def let_go(name: str, replica: TritonServer) -> bool:
    """Have ``replica`` let go of a head and the ensemble above it; whether it held them.

    Without a head it is no classifier: a model ``name`` alone may be somebody else's.
    """
    held = replica.is_ready(f"{name}_head")
    if held:
        replica.unload(name)
        replica.unload(f"{name}_head")
    return held


def require_live(server: TritonServer | None, classifier: Classifier | None = None) -> None:
    """ServerUnreachable where no server answers; before anything is published, so that it costs nothing.

    With a ``classifier`` whose versions are loaded by model control also ControlRefused, where a server takes none, or
    wants another key for that. A head store is told of a version by a plain request.
    """
    if server is not None and not (present(server) and server.is_live()):
        raise ServerUnreachable(
            f"no Triton server answers at {server.url} (gRPC), and nothing was changed; `patcher serve` starts one, "
            "--url or $TRITON_URL names another, --no-load publishes without one"
        )
    for replica in present(server) if classifier is not None and not classifier.in_store else ():
        replica.check_control()


def _switch(classifier: Classifier, head: Head, server: TritonServer | None) -> Switch:
    version, previous = head.lineage.version, classifier.serving()
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
    except BaseException as error:  # noqa: BLE001 - raised again, or what became of it
        with uninterrupted():
            _come_back(classifier, version, previous, asked, error)
    return Switch(version, previous, served=server is not None)


def _come_back(
    classifier: Classifier, version: int, previous: int, asked: Sequence[TritonServer], error: BaseException
) -> NoReturn:
    if not isinstance(error, LockLost) and classifier.serving() != previous:
        # Only where files are far away: the one that pins could be replaced, and then not any more.
        raise NotServed(
            f"version {version} of {classifier.name} was published, but something failed, and so did the rollback: "
            f"{as_sentence(error)} Version {version} may still be pinned; `patcher doctor --repair`, or the next "
            "verb that changes anything, finishes or undoes it",
            {"version": version, "parent_version": previous, "published": True, "served": False},
        ) from error
    # Whatever it was, the files are as before; now the servers that were asked have to be, too.
    if not asked or version == previous:
        classifier.note("undone", serving=previous)
        raise error
    _put_back(classifier, version, asked, error)


def serve(classifier: Classifier, head: Head, replica: TritonServer) -> None:
    """Have ``replica`` serve ``head``, which is pinned, and prove that it does; ServerError where it does not."""
    if not classifier.in_store:
        replica.load(classifier.head_model)
    if not replica.is_ready(classifier.ensemble):
        replica.load(classifier.ensemble)  # a classifier, or a store, that was made after the server started
    if classifier.in_store:
        replica.refresh(classifier.store_model, classifier.name, head.width)
    probe(classifier, head, replica)


def _put_back(classifier: Classifier, version: int, asked: Sequence[TritonServer], cause: BaseException) -> NoReturn:
    previous = classifier.serving()

    def back(replica: TritonServer) -> None:
        _require_answer(replica)
        serve(classifier, head, replica)

    try:
        head = classifier.head(previous)
        each(asked, back)
    except PatcherError as error:
        state = (
            f"The repository is back on version {previous}, but the server could not be brought back to it ({error}); "
            f"to retry: `patcher rollback --to {previous}`; a restarted server serves it"
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


@contextlib.contextmanager
def changing(classifier: Classifier, server: TritonServer | None = None, *, leaving: bool = False) -> Iterator[None]:
    """Hold the repository's lock for a change, after what an earlier one left half done is finished or undone.

    With ``leaving`` the body goes to another version whatever serves now: that the serving one is damaged, so that no
    server could be brought back to it, is then no reason to stop, and the body's own switch ends what is half done.

    Raises InputError for a version on trial, which only ``patcher.canary`` changes, and NotServed where the body is
    interrupted and leaves something half done.
    """
    if classifier.name.endswith(CANARY):
        name = classifier.name.removesuffix(CANARY)
        raise InputError(
            f"{classifier.name} is a version of {name} on trial; expected --classifier {name}, and "
            "`patcher canary --promote` or `patcher canary --discard` ends the trial"
        )
    with classifier.repository.lock():
        try:
            try:
                recover(classifier, server)
            except (RepositoryError, VersionError):  # where it is of the journal, the next line says it again
                if not leaving:
                    raise
            classifier.adopt()
            yield
        except KeyboardInterrupt as interrupt:
            with uninterrupted():
                pending = classifier.journal.pending()
            if pending is None:
                raise
            raise NotServed(
                f"interrupted, and not undone: {pending}; `patcher doctor --repair`, or the next verb that changes "
                "anything, finishes or undoes it"
            ) from interrupt


def recover(classifier: Classifier, server: TritonServer | None = None) -> str | None:
    """Finish or undo the change that was interrupted, and say which; None where none was. The lock must be held.

    The pin decides: a version that was pinned is loaded and proven (or else put back), one that was not is withdrawn,
    for nobody was told that it serves. A server that does not answer, or takes no model control, says nothing of the
    version: then nothing is decided. Without a server the files alone are brought in order.
    """
    _finish_pruning(classifier)
    pending = classifier.journal.pending()
    if pending is None:
        return None
    if pending.switched is None:
        return _undo(classifier, pending.published)
    require_live(server)
    serving, (before, after) = classifier.serving(), pending.switched
    if serving == after != before and not pending.back:
        try:
            head = classifier.head()
            each(present(server), lambda replica: _bring(classifier, head, replica))
        except (ServerUnreachable, ControlRefused):
            raise
        except PatcherError:
            classifier.pin(before)
            classifier.note("switch", **{"from": before, "to": before})  # the servers have yet to learn of it
            _serve_all(classifier, before, server)
            return _undo(classifier, None)
        classifier.note("done", serving=after)
        return f"finished: version {after} serves"
    _serve_all(classifier, serving, server)
    return _undo(classifier, None if pending.back else pending.published)


def _serve_all(classifier: Classifier, version: int, server: TritonServer | None) -> None:
    head = classifier.head(version)
    each(present(server), lambda replica: _serve_revived(classifier, head, replica))


def _bring(classifier: Classifier, head: Head, replica: TritonServer) -> str:
    """Have ``replica`` serve ``head``, which is pinned: ``agreed`` where it does already, else ``caught up``."""
    with contextlib.suppress(PatcherError):
        probe(classifier, head, replica)
        return "agreed"
    _serve_revived(classifier, head, replica)
    return "caught up"


def _serve_revived(classifier: Classifier, head: Head, replica: TritonServer) -> None:
    """:func:`serve`, after models whose process died were loaded anew."""
    revived: set[str] = set()
    while True:
        try:
            return serve(classifier, head, replica)
        except ServerError as error:
            # Triton starts no process again that died, nor does it load a model again whose files are as they were.
            dead = _DEAD_STUB.search(str(error))
            if dead is None or dead[1] in revived:
                raise
            revived.add(dead[1])
            replica.unload(dead[1])
            replica.load(dead[1])


def _undo(classifier: Classifier, published: int | None) -> str:
    serving = classifier.serving()
    # Where a version comes in parts, one of them may still be on its way from somebody who lost the lock: then the next
    # command takes it away.
    here = published in classifier.versions() or not classifier.storage.in_one_step
    trial = on_trial(classifier)
    if trial is not None and published == trial.serving():
        classifier.note("done", serving=serving)
        return f"finished: version {published} is on trial, and version {serving} serves"
    if published is not None and here and published != serving:
        classifier.withdraw(published)
        return f"undone: version {published} never served and was withdrawn"
    classifier.note("undone", serving=serving)
    return f"undone: version {serving} serves"


def _finish_pruning(classifier: Classifier) -> None:
    gone = classifier.journal.pruned() | classifier.journal.withdrawn()
    left = sorted(gone & set(classifier.versions()) - {classifier.serving()})
    if left:
        classifier.prune(left)


def _require_answer(replica: TritonServer) -> None:
    """ServerUnreachable from one that hangs: each question would wait for it, and no Ctrl-C ends the way back."""
    if not replica.is_live():
        raise ServerUnreachable(f"{replica.url} does not answer; run `patcher sync` again when it does")


def catch_up(classifier: Classifier, server: TritonServer) -> dict[str, str]:
    """Bring every replica to the version that the files pin; by address ``agreed``, ``caught up`` or why not.

    The lock must be held. A replica that serves the right version already is asked, and otherwise left alone. The same
    goes for a version on trial; one whose trial has ended is let go of.
    """
    trial = on_trial(classifier)
    found = dict.fromkeys((member.url for member in members(server)), "away")
    for replica in present(server):
        try:
            _require_answer(replica)
            states = {_bring(each, each.head(), replica) for each in (classifier, trial) if each is not None}
            changed = "caught up" in states or (trial is None and let_go(classifier.name + CANARY, replica))
            found[replica.url] = "caught up" if changed else "agreed"
        except PatcherError as error:
            found[replica.url] = f"failed: {error}"
    return found
