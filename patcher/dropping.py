"""Drops a classifier from the servers and the repository; its backbone stays for the others."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from patcher.arguments import require
from patcher.canary import require_free
from patcher.errors import InputError, PatcherError, ServerError, ServerUnreachable, as_sentence
from patcher.fleet import Fleet, attempt, by_address, present
from patcher.names import CANARY, check_name
from patcher.repository import ModelRepository
from patcher.rollout import forget, let_go, require_answer, require_live, serve
from patcher.signals import uninterrupted
from patcher.triton.client import TritonServer

if TYPE_CHECKING:
    from patcher.classifier import Classifier
    from patcher.files import RepositoryFiles

__all__ = ["drop_classifier", "forget_other", "take_out"]


def drop_classifier(repository: ModelRepository, name: str, server: TritonServer | None = None) -> tuple[int, ...]:
    """Unload a classifier from the servers and delete it with all its versions, which are returned; its backbone stays.

    If the call is interrupted, call it again to remove what remains on disk or on a server.

    Raises
    ------
    InputError
        if there is no such classifier, or a version of it is on trial.
    ServerError
        if a server does not answer, or would not unload a classifier with an ensemble of its own. The files are then
        unchanged, and servers that had unloaded it already serve it again. A head store forgets a classifier only once
        its files are gone: if a store cannot be told to, the files have been deleted already.
    """
    require(ModelRepository, repository=repository)
    require(str, name=name)
    require(TritonServer, None, server=server)
    if name.endswith(CANARY):
        raise InputError(f"{name} is a version on trial; `patcher canary --discard` ends that")
    check_name(name)
    if isinstance(server, Fleet) and server.away:
        raise ServerUnreachable(
            f"{', '.join(server.away)} does not answer and would go on serving {name}; nothing was changed. "
            "Start it, or leave it out of --url"
        )
    require_live(server)
    with repository.lock():
        classifier = repository.classifier(name) if name in repository.classifiers() else None
        versions = repository.versions_of(name)
        if classifier is not None and not classifier.in_store:
            require_free(classifier)
        models = (name, name + CANARY)  # the trial may have ended in the repository and still be loaded on a server
        # Checked on all servers first: one that refuses model control would keep what the others unload.
        for replica in present(server):
            if any(replica.is_ready(f"{model}_head") for model in models):
                replica.check_control()
        try:
            held = [_unload(model, server) for model in models]
        except BaseException:
            if classifier is not None and not classifier.in_store:
                _bring_back(classifier, server)
            raise
        there = repository.has_remains(name)
        if there:
            repository.remove_classifier(name)
        forgotten = _forget(repository, name, server)
        if not (any(held) or there or forgotten):
            repository.classifier(name)  # raises an error that lists the existing classifiers
    return versions


def take_out(classifier: Classifier, server: TritonServer | None) -> None:
    """Remove a new classifier that no server came to serve; ignores errors of servers that never loaded it."""
    classifier.repository.remove_classifier(classifier.name)
    with contextlib.suppress(ServerError):
        _unload(classifier.name, server)
    with contextlib.suppress(ServerError):
        _forget(classifier.repository, classifier.name, server)


def forget_other(classifier: Classifier, server: TritonServer | None) -> str:
    """Make the servers forget a dropped classifier of the same name that was served the other way.

    That is, from an ensemble if this one is in a head store, and the reverse. A server may still hold it if the drop
    did not reach it. Returns the errors of the servers that would not let go of it; empty if all did.
    """

    def let(replica: TritonServer) -> bool:
        if classifier.in_store:
            return let_go(classifier.name, replica)
        return forget(classifier.repository, classifier.name, replica)

    return by_address(attempt(present(server), let)[1])


def _unload(name: str, server: TritonServer | None) -> bool:
    """Have the servers unload a classifier's ensemble and head; returns whether a server had loaded them."""
    held = [let_go(name, replica) for replica in present(server)]
    return any(held)


def _bring_back(classifier: Classifier, server: TritonServer | None) -> None:
    """Have every server that answers serve the classifier again, which is still in the repository."""
    with uninterrupted(), contextlib.suppress(PatcherError):
        head = classifier.head()

        def back(replica: TritonServer) -> None:
            require_answer(replica)
            serve(classifier, head, replica)

        attempt(present(server), back)


def _forget(repository: RepositoryFiles, name: str, server: TritonServer | None) -> bool:
    """Have the head stores forget a classifier whose files are gone; returns whether a store still answered for it."""
    found, failed = attempt(present(server), lambda replica: forget(repository, name, replica))
    if failed:
        raise ServerError(
            f"{name} is deleted, but may still be answered for by {as_sentence(by_address(failed))} "
            f"Run `patcher drop-classifier {name}` again to retry"
        )
    return any(found)
