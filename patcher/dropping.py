"""The end of a classifier: off the servers and out of the repository; the backbone stays for the others."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from patcher.canary import require_free
from patcher.errors import ServerError
from patcher.fleet import present
from patcher.rollout import require_live

if TYPE_CHECKING:
    from patcher.repository import Classifier
    from patcher.triton.client import TritonServer

__all__ = ["drop_classifier", "take_out"]


def drop_classifier(classifier: Classifier, server: TritonServer | None = None) -> tuple[int, ...]:
    """Take a classifier off the servers and delete it with all its versions, which are returned; its backbone stays.

    Raises
    ------
    InputError
        where a version of it is on trial.
    ServerError
        where no server answers, or one would not let go of it: then the files are as they were, and a server that did
        let go serves it again after ``patcher sync``.
    """
    require_live(server)
    with classifier.repository.lock():
        if not classifier.in_store:
            require_free(classifier)
        versions = classifier.versions()
        if classifier.in_store:
            take_out(classifier, server)
        else:
            for replica in present(server):
                _take_off(classifier, replica)
            classifier.repository.remove_classifier(classifier.name)
    return versions


def take_out(classifier: Classifier, server: TritonServer | None) -> None:
    """The files go first, so that a server that starts meanwhile knows nothing of it; then what the servers hold."""
    classifier.repository.remove_classifier(classifier.name)
    for replica in present(server):
        with contextlib.suppress(ServerError):  # what a server never had it cannot forget, and says so
            _take_off(classifier, replica)


def _take_off(classifier: Classifier, replica: TritonServer) -> None:
    if classifier.in_store:  # which forgets a head whose files are gone
        replica.refresh(classifier.store_model, classifier.name, classifier.width())
    else:
        replica.unload(classifier.name)
        replica.unload(classifier.head_model)
