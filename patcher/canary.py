"""Trials: a version serves a share of the requests before it serves all of them.

The canary is a second ensemble on the same backbone, ``NAME_canary``, with a head model of its own; what serves under
``NAME`` is not touched. The share is stored in the canary's configuration, where every client of the server can read
it. ``SplitClient`` always sends the same keys to the canary, and more keys when the share grows. In the end the version
is promoted, which is an ordinary switch, or the canary is discarded.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher import configs
from patcher.arguments import listed, require
from patcher.classifier import Classifier, add_classifier
from patcher.errors import InputError, NotServed, PatcherError, ServerError, ServerRefused, VersionError, as_sentence
from patcher.fleet import attempt, by_address, each, members, present
from patcher.limits import check_share
from patcher.lineage import related
from patcher.model_config import pinned_versions
from patcher.names import CANARY
from patcher.recovery import changing
from patcher.rollout import Switch, let_go, on_trial, probe, require_live, roll_back, validate
from patcher.signals import uninterrupted
from patcher.triton.client import TritonServer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from patcher.head import Head
    from patcher.triton.client import ModelStatistics
    from patcher.triton.tensors import Answer

__all__ = [
    "Arm",
    "Canary",
    "SplitClient",
    "begin",
    "discard",
    "on_trial",
    "promote",
    "require_free",
    "start",
    "status",
    "takes",
]

_REFRESH_SECONDS = 5.0


@dataclass(frozen=True)
class Arm:
    """Statistics of one arm of the trial since it was loaded.

    ``mean_ms`` is the mean time per request in the head's queue and computation, None if there was no request.
    """

    model: str
    version: int
    requests: int
    failures: int
    mean_ms: float | None


@dataclass(frozen=True)
class Canary:
    """A version on trial; ``arms`` are the serving version and the version on trial, if a server was asked."""

    classifier: str
    version: int
    percent: float
    arms: tuple[Arm, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {
            "classifier": self.classifier,
            "version": self.version,
            "percent": self.percent,
            "arms": [vars(arm) for arm in self.arms],
        }


def takes(classifier: str, key: str, percent: float) -> bool:
    """Whether requests with ``key`` go to the canary.

    A hash of both names decides, so that a key always gets the same arm, and a larger share includes the keys of a
    smaller one.
    """
    digest = hashlib.sha256(f"{classifier}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < percent / 100 * 2**64


class SplitClient:
    """Asks a classifier, or its canary for the share of the keys that the canary's configuration on the server states.

    The share is read again every ``refresh_seconds``, and immediately if the canary refuses a request. Raises the
    errors of ``server``, and InputError unless there is one key for each text.
    """

    def __init__(self, server: TritonServer, classifier: str, *, refresh_seconds: float = _REFRESH_SECONDS) -> None:
        require(TritonServer, server=server)
        require(str, classifier=classifier)
        require(float, refresh_seconds=refresh_seconds)
        self.server, self.classifier, self.refresh_seconds = server, classifier, refresh_seconds
        self._percent, self._read = 0.0, float("-inf")

    @property
    def percent(self) -> float:
        """The percentage of the keys that goes to the canary now; 0 if there is none."""
        if time.monotonic() - self._read >= self.refresh_seconds:
            canary = self.classifier + CANARY
            try:
                there = self.server.is_ready(canary)
                self._percent = configs.share_of(self.server.model_config(canary)) if there else 0.0
            except ServerRefused:  # the trial ended between the two questions
                self._percent = 0.0
            self._read = time.monotonic()
        return self._percent

    def classify(self, texts: Iterable[str], keys: Iterable[str]) -> list[Answer]:
        """The answer to each text. Its key, such as the id of a user or a conversation, decides which arm answers."""
        texts, keys = listed(texts, "texts"), listed(keys, "keys")
        if len(keys) != len(texts):
            raise InputError(f"got {len(texts)} texts and {len(keys)} keys; expected one key for each text")
        percent = self.percent
        mine = [i for i, key in enumerate(keys) if takes(self.classifier, key, percent)]
        theirs = sorted(set(range(len(texts))) - set(mine))
        answers = dict(zip(theirs, self.server.classify(self.classifier, [texts[i] for i in theirs]), strict=True))
        try:
            tried = self.server.classify(self.classifier + CANARY, [texts[i] for i in mine])
        except ServerRefused:
            self._read = float("-inf")
            if self.percent:  # the canary still exists, so the refusal is a real error
                raise
            tried = self.server.classify(self.classifier, [texts[i] for i in mine])
        answers |= dict(zip(mine, tried, strict=True))
        return [answers[i] for i in range(len(texts))]


def begin(classifier: Classifier, version: int, percent: float, server: TritonServer | None) -> Canary:
    """Try ``version`` on ``percent`` of the keys, or change the share if it is on trial already.

    Raises
    ------
    VersionError
        if there is no such version, or it serves already.
    InputError
        if the share is not between 0 and 100 %, or another version is on trial.
    NotServed
        if the server would not serve it; the canary was removed again, or has its previous share.
    """
    with changing(classifier, server):
        return start(classifier, classifier.head(version, published=True), percent, server)


def start(classifier: Classifier, head: Head, percent: float, server: TritonServer | None) -> Canary:
    """Like ``begin``, for the head of a published version; the lock must be held."""
    version = head.lineage.version
    check_share(percent)
    if version == classifier.serving():
        raise VersionError(f"version {version} of {classifier.name} already serves; expected another one to try")
    require_live(server, classifier)
    there = require_free(classifier, version)
    repository, name = classifier.repository, classifier.name + CANARY
    before = None if there is None else repository.config_text(name)
    if before is None:
        validate(classifier.head_bytes(version), head)
        add_classifier(repository, name, head, base=classifier, share=percent)
    else:
        repository.write_configs({name: configs.with_share(before, percent)})
    trial = Classifier(repository, name)
    try:
        each(present(server), lambda replica: _serve(trial, head, replica))
    except BaseException as error:
        state, back = "The canary is as it was before", True
        try:
            with uninterrupted():
                _put_back(trial, head, before, server)
        except PatcherError as failed:
            state, back = f"The rollback failed too ({failed})", False
        if back and not isinstance(error, PatcherError):
            raise
        raise NotServed(
            f"version {version} of {classifier.name} could not be tried: "
            f"{as_sentence(str(error) or type(error).__name__)} {state}; "
            f"version {classifier.serving()} serves as before",
            {"version": version, "parent_version": classifier.serving(), "published": False, "served": False},
        ) from error
    return Canary(classifier.name, version, percent)


def _put_back(trial: Classifier, head: Head, before: str | None, server: TritonServer | None) -> None:
    """Undo a failed start: remove the canary, or restore the configuration ``before`` of the one that existed."""
    if before is None:
        _remove(trial, server)
        return
    trial.repository.write_configs({trial.name: before})
    each(present(server), lambda replica: _serve(trial, head, replica))


def require_free(classifier: Classifier, version: int | None = None) -> Classifier | None:
    """The canary, if there is one; InputError if a version other than ``version`` is on trial.

    InputError also for a classifier in a head store: trials need an ensemble of its own.
    """
    if classifier.in_store:
        raise InputError(
            f"{classifier.name} is in the head store of {classifier.backbone_name}, which does not support trials; "
            "expected a classifier with an ensemble of its own, or a rollout to all of them"
        )
    there = on_trial(classifier)
    if there is not None and there.serving() != version:
        raise InputError(
            f"version {there.serving()} of {classifier.name} is on trial; `patcher canary --promote` or "
            "`patcher canary --discard` ends that first"
        )
    return there


def _serve(trial: Classifier, head: Head, replica: TritonServer) -> None:
    replica.load(trial.name)
    probe(trial, head, replica)


def status(classifier: Classifier, server: TritonServer | None = None) -> Canary | None:
    """The canary, with the server's statistics of both arms since they were loaded; None if no version is on trial.

    Raises ServerUnreachable if no server answers, and ServerRefused if one of several has not loaded the trial: what
    the others counted would be mistaken for all there is.
    """
    trial = on_trial(classifier)
    if trial is None:
        return None
    percent = configs.share_of(classifier.repository.config(trial.name))
    arms = [_arm(each, server) for each in (classifier, trial)] if server is not None else []
    return Canary(classifier.name, trial.serving(), percent, tuple(arms))


def promote(classifier: Classifier, server: TritonServer | None = None) -> Switch:
    """Make the version on trial the one that serves, and end the trial.

    Raises
    ------
    InputError
        if no version is on trial, or neither it nor the version that serves descends from the other: a promotion would
        then lose a change.
    NotServed
        if the server would not serve it; the trial continues.

    A failure to end the trial once the version serves raises nothing: it is in ``warnings`` of what is returned.
    """
    with changing(classifier, server, leaving=True):
        trial = on_trial(classifier)
        if trial is None:
            raise _none(classifier)
        tried, previous = trial.serving(), classifier.serving()
        _refuse_stale(classifier, tried)
        try:
            roll_back(classifier, tried, server)
            warnings = _ended(trial, tried, server)
        except KeyboardInterrupt:
            if classifier.serving() != tried or tried == previous or classifier.journal.pending():
                raise
            # The version serves already. Stopping here would leave the trial behind, yet be reported as undone.
            warnings = _ended(trial, tried, server)
        return Switch(tried, previous, served=server is not None, warnings=warnings)


def _ended(trial: Classifier, tried: int, server: TritonServer | None) -> tuple[str, ...]:
    """End the trial of the version ``tried``, which serves now; returns a warning if that fails."""
    try:
        _remove(trial, server)
    except ServerError as error:
        return (f"version {tried} serves, and {error}",)
    except PatcherError as error:
        said = f"version {tried} serves, but its trial could not be ended: {as_sentence(error)}"
        return (f"{said} `patcher canary --discard` ends it",)
    return ()


def discard(classifier: Classifier, server: TritonServer | None = None) -> int:
    """End the trial and return the version that was on trial, which stays on disk.

    If the trial has ended in the repository but a server still holds its models, it ends on that server too.

    Raises InputError if no version is on trial; ServerUnreachable or ControlRefused with nothing changed; ServerError
    if a server still holds the trial's models, which another call, or ``patcher sync``, retries.
    """
    with changing(classifier, server):
        require_live(server, classifier)
        trial = on_trial(classifier)
        if trial is not None:
            version = trial.serving()
            _remove(trial, server)
            return version
        left = _left(classifier, server)
        if left is None:
            raise _none(classifier)
        _release(classifier.name + CANARY, server)
        return left


def _left(classifier: Classifier, server: TritonServer | None) -> int | None:
    """The version that a server still has on trial although the repository has no canary; None if there is none."""
    model = f"{classifier.name}{CANARY}_head"
    holders = (replica for replica in present(server) if replica.is_ready(model))
    found = (pinned_versions(replica.model_config(model)) for replica in holders)
    return next((max(versions) for versions in found if versions), None)


def _refuse_stale(classifier: Classifier, tried: int) -> None:
    serving = classifier.serving()
    if not related(classifier, tried, serving):
        raise InputError(
            f"version {tried} of {classifier.name} was made without what was changed in version {serving}, which "
            "serves now: `patcher canary --discard` ends the trial; then make its change again, or switch to it "
            f"anyway with `patcher rollback --to {tried}`"
        )


def _none(classifier: Classifier) -> InputError:
    return InputError(
        f"no version of {classifier.name} is on trial; `patcher canary --version N --percent 10` starts one"
    )


def _remove(trial: Classifier, server: TritonServer | None) -> None:
    """End a trial: first its files, so that a server starting meanwhile does not load it, then the servers' models."""
    with uninterrupted():
        trial.repository.remove_classifier(trial.name)
        _release(trial.name, server)


def _release(name: str, server: TritonServer | None) -> None:
    """Have all servers unload a trial; ServerError if one of them fails."""
    with uninterrupted():
        _, failed = attempt(present(server), lambda replica: let_go(name, replica))
    if failed:
        raise ServerError(
            f"the trial has ended in the repository, but may still be answered from by {by_address(failed)}. "
            "`patcher sync` ends it there too"
        )


def _arm(classifier: Classifier, server: TritonServer) -> Arm:
    # If none of several answers, one of them has to say so: no count is not a count of 0.
    found = [entry for replica in present(server) or members(server) for entry in _statistics(classifier, replica)]
    served = [entry for entry in found if entry.version == str(classifier.serving())]
    requests = sum(entry.successes for entry in served)
    spent = sum(entry.queue_ns + entry.compute_ns for entry in served)
    return Arm(
        model=classifier.name,
        version=classifier.serving(),
        requests=requests,
        failures=sum(entry.failures for entry in served),
        mean_ms=spent / requests / 1e6 if requests else None,
    )


def _statistics(classifier: Classifier, server: TritonServer) -> list[ModelStatistics]:
    try:
        return server.statistics(classifier.head_model)
    except ServerRefused as error:
        if server.is_ready(classifier.head_model):
            raise
        raise ServerRefused(
            f"{server.url} has not loaded {classifier.name}, version {classifier.serving()}: `patcher sync` loads it"
        ) from error
