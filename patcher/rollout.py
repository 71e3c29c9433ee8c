"""Publish a head version, have the server serve it, prove that it does, or put the previous one back."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np

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
from patcher.fleet import Fleet, each, members, present, watch, waves
from patcher.head_file import write_head
from patcher.runtime import check_head_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from patcher.classifier import Classifier
    from patcher.head import Head
    from patcher.memory import Memory
    from patcher.triton.client import TritonServer

__all__ = [
    "PROBE_TEXT",
    "Switch",
    "catch_up",
    "changing",
    "probe",
    "recover",
    "require_live",
    "roll_back",
    "roll_out",
    "serve",
    "set_aside",
    "validate",
]

PROBE_TEXT = "is anybody there?"
"""Any text does: what counts is that label, logits and version of its answer are those of the version asked for."""


@dataclass(frozen=True)
class Switch:
    """A change of the serving version."""

    version: int
    previous: int
    served: bool
    """Whether a server was seen answering from ``version``; False where none was asked."""


def validate(data: bytes, head: Head) -> None:
    """Prove in ONNX Runtime, on a few made-up features, that the file ``data`` is ``head`` before it may serve.

    Raises RepositoryError where the file does not load or does not answer as the numbers say.
    """
    rows = np.random.default_rng(0).standard_normal((3, head.width)).astype(np.float32)
    check_head_file(data, head, rows)


def probe(classifier: Classifier, head: Head, server: TritonServer, text: str = PROBE_TEXT) -> None:
    """ServerError unless the ensemble is ready and answers ``text`` from exactly ``head``.

    A load that Triton calls OK proves little: the ensemble above the head may be gone, or the server may be reading
    another repository. So the answer itself is compared, with the version, the labels and the logits of ``head``.
    """
    if not server.is_ready(classifier.ensemble):
        raise ServerError(f"the server's {classifier.ensemble} is not ready; does --repo name the server's repository?")
    check_same_backbone(classifier, server)  # an ensemble that is ready has its backbone loaded
    (answer,) = server.classify(classifier.address, [text])
    if answer.head_version != head.lineage.version:
        raise ServerError(
            f"the server answers from head version {answer.head_version}; expected {head.lineage.version}. "
            "Does it serve this very repository?"
        )
    features = server.features(classifier.features_model, [text])
    expected, rounding = head.logits(features)[0], head.rounding(features)[0]
    if answer.logits.shape != expected.shape:
        raise ServerError(f"the server answers with {len(answer.logits)} logits; expected {len(expected)}")
    off = np.abs(answer.logits - expected)
    if not (off <= 1e-2 + 1e-3 * np.abs(expected) + rounding).all():
        raise ServerError(f"the server's logits are off by {off.max():.3g} from those of version {answer.head_version}")
    if answer.labels[0] != head.labels[int(answer.logits.argmax())]:
        raise ServerError(f"the server answers {answer.labels[0]!r}, which its own logits contradict")


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
    try:
        return _switch(classifier, head, server)
    except NotServed:
        raise
    except BaseException:
        # Not a version that a server refused, but one that nobody ever asked for: it leaves no trace.
        with contextlib.suppress(StorageError):
            classifier.withdraw(head.lineage.version)
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
    classifier.note("done", serving=classifier.serving())


def require_live(server: TritonServer | None, classifier: Classifier | None = None) -> None:
    """ServerUnreachable where no server answers; before anything is published, so that it costs nothing.

    With a ``classifier`` whose versions are loaded by model control also ServerRefused, where a server wants another
    key for that: its list of models asks for the same one. A head store is told of a version by a plain request.
    """
    if server is not None and not (present(server) and server.is_live()):
        raise ServerUnreachable(
            f"no Triton server answers at {server.url} (gRPC), and nothing was changed; `patcher serve` starts one, "
            "--url or $TRITON_URL names another, --no-load does without"
        )
    for replica in present(server) if classifier is not None and not classifier.in_store else ():
        replica.repository_index()


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
    except BaseException as error:
        if not isinstance(error, LockLost) and classifier.serving() != previous:
            # Only where files are far away: the one that pins could be replaced, and then not any more.
            raise NotServed(
                f"version {version} of {classifier.name} was published, but something failed, and the way back, too: "
                f"{as_sentence(error)} Version {version} may be pinned still; `patcher doctor --repair` finishes "
                "or undoes it, and so does the next verb that changes anything",
                {"version": version, "parent_version": previous, "published": True, "served": False},
            ) from error
        # Whatever it was, the files are as before; now the servers that were asked have to be, too.
        if not asked or version == previous:
            classifier.note("undone", serving=previous)
            raise
        _put_back(classifier, version, asked, error)
    return Switch(version, previous, served=server is not None)


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
    try:
        head = classifier.head(previous)
        each(asked, lambda replica: serve(classifier, head, replica))
    except PatcherError as error:
        state = (
            f"The repository is back on version {previous}, but the server could not be brought back to it ({error}); "
            f"`patcher rollback --to {previous}` tries again, a restarted server comes up on it"
        )
    else:
        classifier.note("undone", serving=previous)
        state = f"Version {previous} serves again"
        if isinstance(cause, KeyboardInterrupt):
            raise cause
    raise NotServed(
        f"version {version} of {classifier.name} was published, but the server would not serve it: "
        f"{as_sentence(str(cause) or type(cause).__name__)} {state}; "
        f"`patcher rollback --to {version}` tries it once more",
        {"version": version, "parent_version": previous, "published": True, "served": False},
    ) from cause


@contextlib.contextmanager
def changing(classifier: Classifier, server: TritonServer | None = None) -> Iterator[None]:
    """Hold the repository's lock for a change, after what an earlier one left half done is finished or undone."""
    with classifier.repository.lock():
        recover(classifier, server)
        classifier.adopt()
        yield


def recover(classifier: Classifier, server: TritonServer | None = None) -> str | None:
    """Finish or undo the change that was interrupted, and say which; None where none was. The lock must be held.

    The pin decides: a version that was pinned is loaded and proven (or else put back), one that was not is withdrawn,
    for nobody was told that it serves. Without a server the files alone are brought in order.
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
            _serve_all(classifier, after, server)
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
    each(present(server), lambda replica: serve(classifier, head, replica))


def _undo(classifier: Classifier, published: int | None) -> str:
    serving = classifier.serving()
    # Where a version comes in parts, one of them may still be on its way from somebody who lost the lock: then the next
    # command takes it away.
    here = published in classifier.versions() or not classifier.store.in_one_step
    if published is not None and here and published != serving:
        classifier.withdraw(published)
        return f"undone: version {published} was never made to serve, and is withdrawn"
    classifier.note("undone", serving=serving)
    return f"undone: version {serving} serves"


def _finish_pruning(classifier: Classifier) -> None:
    gone = classifier.journal.pruned() | classifier.journal.withdrawn()
    left = sorted(gone & set(classifier.versions()) - {classifier.serving()})
    if left:
        classifier.prune(left)


def catch_up(classifier: Classifier, server: TritonServer) -> dict[str, str]:
    """Bring every replica to the version that the files pin; by address ``agreed``, ``caught up`` or why not.

    The lock must be held. A replica that serves the right version already is asked, and otherwise left alone.
    """
    head = classifier.head()
    found = dict.fromkeys((member.url for member in members(server)), "away")
    for replica in present(server):
        try:
            probe(classifier, head, replica)
            found[replica.url] = "agreed"
        except PatcherError:
            try:
                serve(classifier, head, replica)
                found[replica.url] = "caught up"
            except PatcherError as error:
                found[replica.url] = f"failed: {error}"
    return found
