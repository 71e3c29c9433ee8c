"""Finish or undo interrupted changes, and bring replicas that were away to the version that the files pin."""

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
"""Triton's error for a model whose Python process died, and for each ensemble that calls it."""


@contextlib.contextmanager
def changing(
    classifier: Classifier, server: TritonServer | None = None, *, leaving: bool = False, dry_run: bool = False
) -> Iterator[None]:
    """Hold the repository's lock for a change; an interrupted earlier change is finished or undone first.

    ``leaving`` says that the body switches to another version whatever serves now. A damaged serving version, to which
    no server could be brought back, is then no reason to stop: the body's own switch completes the interrupted change.
    With ``dry_run`` the body changes nothing, so nothing is locked, finished or undone.

    Raises InputError for a version on trial, which only ``patcher.canary`` may change, and NotServed if the body is
    interrupted and leaves a change pending.
    """
    if classifier.name.endswith(CANARY):
        name = classifier.name.removesuffix(CANARY)
        raise InputError(
            f"{classifier.name} is a version of {name} on trial; expected --classifier {name}, and "
            "`patcher canary --promote` or `patcher canary --discard` ends the trial"
        )
    if dry_run:
        yield
        return
    with classifier.repository.lock():
        try:
            try:
                recover(classifier, server)
            except (RepositoryError, VersionError):  # if the journal is to blame, adopt() below raises it again
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
    """Finish or undo an interrupted change and say what was done; None if there was none. The lock must be held.

    The pin decides. A version that was pinned is loaded and verified; if that fails, the previous version is pinned
    again. A version that was not pinned is withdrawn, since nobody was told that it serves. A server that does not
    answer, or accepts no model control, proves nothing about the version: ServerUnreachable or ControlRefused is then
    raised, and the change stays pending. Without a server, only the files are repaired.
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
            classifier.note("switch", **{"from": before, "to": before})  # pending until the servers serve it again
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
    """Have ``replica`` serve ``head``, which must be pinned: ``agreed`` if it already did, else ``caught up``."""
    with contextlib.suppress(PatcherError):
        probe(classifier, head, replica)
        return "agreed"
    _serve_revived(classifier, head, replica)
    return "caught up"


def _serve_revived(classifier: Classifier, head: Head, replica: TritonServer) -> None:
    """:func:`serve`, reloading models whose Python process died."""
    revived: set[str] = set()
    while True:
        try:
            return serve(classifier, head, replica)
        except ServerError as error:
            # Triton neither restarts a dead process nor reloads a model whose files have not changed.
            dead = _DEAD_STUB.search(str(error))
            if dead is None or dead[1] in revived:
                raise
            revived.add(dead[1])
            replica.unload(dead[1])
            replica.load(dead[1])


def _undo(classifier: Classifier, published: int | None) -> str:
    serving = classifier.serving()
    # In an object store a version is several objects, and one of them may still arrive from a process that lost the
    # lock. So the withdrawal is recorded even if nothing is there yet: the next command then removes what arrives.
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
    """Bring every replica to the version that the files pin; the result by address.

    Results are ``agreed``, ``caught up``, ``away``, or ``failed: …`` with the reason. The lock must be held. A replica
    that already serves the right version is only probed. A version on trial is brought up the same way, and a canary
    whose trial has ended is unloaded. An earlier classifier of the same name may have been served the other way (from
    models of its own, or from a head store): its models are unloaded, or the store drops it.
    """
    trial = on_trial(classifier)
    found = dict.fromkeys((member.url for member in members(server)), "away")
    for replica in present(server):
        try:
            require_answer(replica)
            states = {_bring(each, each.head(), replica) for each in (classifier, trial) if each is not None}
            # Leftovers: the canary of an ended trial, and an earlier classifier of that name, served the other way.
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
