"""What a change left half done is finished or undone, and replicas that were away get what the files pin."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from patcher.errors import (
    ControlRefused,
    InputError,
    NotServed,
    PatcherError,
    RepositoryError,
    ServerError,
    ServerUnreachable,
    VersionError,
)
from patcher.fleet import each, members, present
from patcher.names import CANARY
from patcher.rollout import forget, let_go, on_trial, probe, require_answer, require_live, serve
from patcher.signals import uninterrupted
from patcher.wording import versions_are

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patcher.classifier import Classifier
    from patcher.head import Head
    from patcher.triton.client import TritonServer

__all__ = ["catch_up", "changing", "recover"]

_DEAD_STUB = re.compile(r"Stub process '(\S+)_\d+_\d+' is not healthy")
"""What Triton says of a model whose Python process died, and of each ensemble that asks it."""


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
    if half_gone := classifier.half_gone():
        classifier.prune(half_gone)
    pending = classifier.journal.pending()
    if pending is None:
        return f"finished: {versions_are(half_gone)} pruned" if half_gone else None
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


def catch_up(classifier: Classifier, server: TritonServer) -> dict[str, str]:
    """Bring every replica to the version that the files pin; by address ``agreed``, ``caught up`` or why not.

    The lock must be held. A replica that serves the right version already is asked, and otherwise left alone. The same
    goes for a version on trial; one whose trial has ended is let go of, and so is a model that a stored classifier has
    no more, and a head store that answers for one that is not in it any more.
    """
    trial = on_trial(classifier)
    found = dict.fromkeys((member.url for member in members(server)), "away")
    for replica in present(server):
        try:
            require_answer(replica)
            states = {_bring(each, each.head(), replica) for each in (classifier, trial) if each is not None}
            # Of a trial that has ended, and of a classifier of that name that was here before, served the other way.
            ended = ([] if trial else [classifier.name + CANARY]) + ([classifier.name] if classifier.in_store else [])
            held = [let_go(name, replica) for name in ended]
            if not classifier.in_store:
                held.append(forget(classifier.repository, classifier.name, replica))
            if any(held):
                states.add("caught up")
            found[replica.url] = "caught up" if "caught up" in states else "agreed"
        except PatcherError as error:
            found[replica.url] = f"failed: {error}"
    return found
