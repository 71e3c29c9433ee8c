"""Several servers of one repository: which of them answer, the order of a rollout, and the watch over its first one."""

from __future__ import annotations

import math
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from patcher.arguments import listed, require
from patcher.errors import InputError, PatcherError, ServerError
from patcher.triton.client import TritonServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from patcher.classifier import Classifier

__all__ = [
    "WATCH_SECONDS",
    "Fleet",
    "addresses",
    "attempt",
    "by_address",
    "each",
    "members",
    "present",
    "resolved",
    "split",
    "watch",
    "waves",
]

Result = TypeVar("Result")

WATCH_SECONDS = 2.0
_POLL_SECONDS = 0.1
_KINDS = (socket.AF_INET, socket.AF_INET6)


class Fleet(TritonServer):
    """Several servers as one: requests go to the first live replica, changes to all live ones.

    Liveness is checked once, at construction. A replica that does not answer is listed in ``away`` and left alone; it
    catches up through ``patcher sync``, or from the files when it restarts. ``watch_seconds`` is how long the first
    replica serves a new version alone before the others get it. ``options`` are passed to each ``TritonServer``. Raises
    InputError if ``urls`` is empty or holds an invalid address.
    """

    def __init__(self, urls: str | Iterable[str], *, watch_seconds: float = WATCH_SECONDS, **options: Any) -> None:
        require(float, watch_seconds=watch_seconds)
        if not 0 <= watch_seconds < math.inf:
            raise InputError(f"watch_seconds is {watch_seconds}; expected a finite number of seconds, 0 or more")
        urls = [urls] if isinstance(urls, str) else listed(urls, "urls")
        if not urls:
            raise InputError("no server; expected HOST:PORT, or several with commas between them")
        self.members = tuple(TritonServer(url, **options) for url in dict.fromkeys(urls))
        self.watch_seconds = watch_seconds
        try:
            with ThreadPoolExecutor(len(self.members)) as pool:
                alive = list(pool.map(TritonServer.is_live, self.members))
        except BaseException:  # for example, a server that speaks another protocol
            for member in self.members:
                member.close()
            raise
        self.away = tuple(each.url for each, there in zip(self.members, alive, strict=True) if not there)
        first = alive.index(True) if True in alive else 0
        super().__init__(self.members[first].url, **options)

    def __repr__(self) -> str:
        return f"<Fleet at {', '.join(member.url for member in self.members)}>"

    def close(self) -> None:
        """Close every connection."""
        for member in self.members:
            member.close()
        super().close()

    def load(self, model: str) -> None:
        """Have every live replica load ``model``."""
        self._all(lambda replica: replica.load(model))
        self._configs.clear()

    def unload(self, model: str) -> None:
        """Have every live replica unload ``model``."""
        self._all(lambda replica: replica.unload(model))

    def check_control(self) -> None:
        """ControlRefused if a live replica would not accept model control from this client."""
        self._all(lambda replica: replica.check_control())

    def refresh(self, store: str, classifier: str, width: int) -> None:
        """Have the head store of every live replica serve the version of ``classifier`` that the files pin."""
        self._all(lambda replica: replica.refresh(store, classifier, width))

    def _all(self, do: Callable[[TritonServer], object]) -> None:
        each(present(self) or self.members, do)


def addresses(given: str) -> tuple[str, ...]:
    """The servers that ``--url`` names: a comma-separated list; a name may resolve to several addresses."""
    found: list[str] = []
    for url in split(given):
        # A single machine keeps its name, because its TLS certificate is issued for the name.
        several = resolved(url)
        found += several if len(several) > 1 else [url]
    return tuple(dict.fromkeys(found)) or (given,)


def split(given: str) -> list[str]:
    """The entries of a comma-separated list of servers."""
    return [part.strip() for part in given.split(",") if part.strip()]


def resolved(url: str) -> list[str]:
    """HOST:PORT of every machine behind a name, sorted; ``url`` itself if the name cannot be resolved now.

    A machine may have both an IPv4 and an IPv6 address. To count it once, only the more numerous kind is used.
    """
    host, _, port = url.rpartition(":")
    try:
        known = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError, OverflowError):  # the connection attempt will report it
        return [url]
    older, newer = ({str(entry[4][0]) for entry in known if entry[0] == kind} for kind in _KINDS)
    if len(newer) > len(older):
        return sorted(f"[{number}]:{port}" for number in newer)
    return sorted(f"{number}:{port}" for number in older) or [url]


def members(server: TritonServer | None) -> tuple[TritonServer, ...]:
    """Every replica behind ``server``, live or not."""
    if server is None:
        return ()
    return server.members if isinstance(server, Fleet) else (server,)


def present(server: TritonServer | None) -> tuple[TritonServer, ...]:
    """The replicas that were live when the fleet was created; a single server counts as live."""
    away = server.away if isinstance(server, Fleet) else ()
    return tuple(each for each in members(server) if each.url not in away)


def waves(replicas: Sequence[TritonServer]) -> list[tuple[TritonServer, ...]]:
    """The replicas in groups for a rollout: first one, then two, four, and so on."""
    found, start, size = [], 0, 1
    while start < len(replicas):
        found.append(tuple(replicas[start : start + size]))
        start, size = start + size, size * 2
    return found


def attempt(
    replicas: Sequence[TritonServer], do: Callable[[TritonServer], Result]
) -> tuple[list[Result], dict[str, PatcherError]]:
    """Call ``do`` on all replicas concurrently; return its results, and the errors by address.

    Any exception other than PatcherError is raised once all calls have ended.
    """

    def tried(replica: TritonServer) -> Result | PatcherError:
        try:
            return do(replica)
        except PatcherError as error:
            return error

    if len(replicas) > 1:
        with ThreadPoolExecutor(len(replicas)) as pool:
            futures = [pool.submit(tried, replica) for replica in replicas]  # ``map`` cancels some if one raises
        outcomes = [future.result() for future in futures]
    else:
        outcomes = list(map(tried, replicas))
    failed = {
        replica.url: outcome
        for replica, outcome in zip(replicas, outcomes, strict=True)
        if isinstance(outcome, PatcherError)
    }
    return [outcome for outcome in outcomes if not isinstance(outcome, PatcherError)], failed


def each(replicas: Sequence[TritonServer], do: Callable[[TritonServer], object]) -> None:
    """Call ``do`` on all replicas concurrently, then raise one error that reports every failure.

    The error has the common type of the failures if they all are of one ServerError type, else it is a ServerError.
    With a single replica, its error is raised as it is. An exception other than PatcherError takes precedence.
    """
    _, failed = attempt(replicas, do)
    errors = list(failed.values())
    if len(replicas) == 1 and errors:
        raise errors[0]
    if errors:
        kinds = {type(error) for error in errors}
        kind = kinds.pop() if len(kinds) == 1 else ServerError
        kind = kind if issubclass(kind, ServerError) else ServerError
        raise kind(f"{len(errors)} of {len(replicas)} replicas failed: {by_address(failed)}") from errors[0]


def by_address(errors: Mapping[str, PatcherError]) -> str:
    """The errors that :func:`attempt` returns, in one line."""
    return "; ".join(f"{url}: {error}" for url, error in errors.items())


def watch(classifier: Classifier, replica: TritonServer, seconds: float) -> None:
    """Watch a replica for ``seconds``; ServerError if it stops being ready or the classifier's head fails requests.

    A text that is refused never reaches the head, so that a client's mistake does not abort a rollout. A head store
    counts failures of all its classifiers together, so there only readiness is watched, and a probe checks the answers.
    """
    ensemble, head = classifier.ensemble, None if classifier.in_store else classifier.head_model
    before = _failures(head, replica)
    deadline = time.monotonic() + seconds
    while True:
        if not replica.is_ready(ensemble):
            raise ServerError(f"{ensemble} on {replica.url} was ready, and is not any more")
        failed = _failures(head, replica) - before
        if failed > 0:
            raise ServerError(f"{failed} requests to {head} failed on {replica.url} while it was watched")
        if time.monotonic() >= deadline:
            return
        time.sleep(_POLL_SECONDS)


def _failures(model: str | None, replica: TritonServer) -> int:
    return sum(entry.failures for entry in replica.statistics(model)) if model else 0
