"""The end of a classifier: off the servers and out of the repository; the backbone stays for the others."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from patcher.arguments import require
from patcher.canary import require_free
from patcher.errors import InputError, PatcherError, ServerError, ServerUnreachable, as_sentence
from patcher.fleet import Fleet, present
from patcher.names import CANARY, check_name
from patcher.repository import ModelRepository
from patcher.rollout import forget, let_go, require_answer, require_live, serve
from patcher.signals import uninterrupted
from patcher.triton.client import TritonServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from patcher.classifier import Classifier
    from patcher.files import RepositoryFiles

__all__ = ["drop_classifier", "forget_other", "take_out"]


def drop_classifier(repository: ModelRepository, name: str, server: TritonServer | None = None) -> tuple[int, ...]:
    """Take a classifier off the servers and delete it with all its versions, which are returned; its backbone stays.

    One that was interrupted is finished by the next call: then there are only remains, on disk or on a server.

    Raises
    ------
    InputError
        where there is none of that name, or a version of it is on trial.
    ServerError
        where a server does not answer, or would not let go of a classifier with an ensemble of its own: then the files
        are as they were, and servers that had let go of it serve it again. A head store forgets a classifier when its
        files are gone, so that there the files are deleted although a store would not hear of it.
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
        models = (name, name + CANARY)  # also of a trial that ended without a server hearing of it
        for replica in present(server):  # first: one that takes no control would keep what others let go of
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
            repository.classifier(name)  # which says what there is instead
    return versions


def take_out(classifier: Classifier, server: TritonServer | None) -> None:
    """The way back of what no server came to serve; what a server never had it cannot forget, and says so."""
    classifier.repository.remove_classifier(classifier.name)
    with contextlib.suppress(ServerError):
        _unload(classifier.name, server)
    with contextlib.suppress(ServerError):
        _forget(classifier.repository, classifier.name, server)


def forget_other(classifier: Classifier, server: TritonServer | None) -> None:
    """End one of the same name that was dropped without a server hearing of it, where it was served the other way.

    ServerError where a server would not let go of it.
    """
    name = classifier.name
    if classifier.in_store:
        _each(server, lambda replica: let_go(name, replica))
    else:
        _each(server, lambda replica: forget(classifier.repository, name, replica))


def _unload(name: str, server: TritonServer | None) -> bool:
    """Have the servers let go of a classifier; whether one held it."""
    held = [let_go(name, replica) for replica in present(server)]
    return any(held)


def _bring_back(classifier: Classifier, server: TritonServer | None) -> None:
    """Have every server that answers serve it again: it is still in the repository."""
    with uninterrupted(), contextlib.suppress(PatcherError):
        head = classifier.head()
        for replica in present(server):
            with contextlib.suppress(PatcherError):
                require_answer(replica)
                serve(classifier, head, replica)


def _forget(repository: RepositoryFiles, name: str, server: TritonServer | None) -> bool:
    """Have the head stores look for files that are gone; whether one answered for them."""
    try:
        return _each(server, lambda replica: forget(repository, name, replica))
    except ServerError as error:
        raise ServerError(
            f"{name} is deleted, but may still be answered for by {as_sentence(error)} "
            f"Run `patcher drop-classifier {name}` again to retry"
        ) from error


def _each(server: TritonServer | None, do: Callable[[TritonServer], bool]) -> bool:
    """Do something on every replica, and say whether one had it; what is wrong with one is said when all were asked."""
    found, failed = False, []
    for replica in present(server):
        try:
            found |= do(replica)
        except ServerError as error:
            failed.append(f"{replica.url}: {error}")
    if failed:
        raise ServerError("; ".join(failed))
    return found
