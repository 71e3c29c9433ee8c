"""A Prometheus exporter for what Triton's own metrics lack, above all the head version each replica answers from.

Requests, latencies, queues and failures of every step are in Triton's own ``/metrics`` on each replica. This exporter
adds what a probe of each replica, the repository and the audit log say, read anew at each scrape. Counters come from
the audit log, which only grows, so that several exporters, or a restarted one, report the same values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.audit import CHANGES, OUTCOMES, read_event
from patcher.errors import InputError, PatcherError, RepositoryError, ToolError
from patcher.fleet import resolved, split
from patcher.names import CANARY
from patcher.rollout import probe_text
from patcher.triton.client import TritonServer
from patcher.wording import install_hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from patcher.classifier import Classifier
    from patcher.repository import ModelRepository
    from patcher.triton.tls import ClientTls

__all__ = ["Probe", "Targets", "expose", "probe_replica"]

_TIMEOUT = 5.0
_AT_ONCE = 16
_MOST_WITH_ZEROS = 50
"""Up to this many classifiers, every outcome of every verb starts at 0, which takes some 70 series for each."""
_OF_NO_CLASSIFIER = frozenset(["export", "serve", "upgrade"])
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Targets:
    """What to monitor.

    ``urls`` are servers by address, several separated by commas; a host name stands for every replica behind it.
    ``texts`` is a sample whose scores are reported.
    """

    urls: tuple[str, ...]
    classifiers: tuple[str, ...]
    repository: ModelRepository | None = None
    audit_log: Path | None = None
    texts: tuple[str, ...] = ()
    tls: ClientTls | None = None
    every: bool = False
    """Whether to include classifiers that are added to the repository later."""

    def names(self) -> tuple[str, ...]:
        """The classifiers to probe now.

        Those dropped from the repository are left out. If it lists none at all, or not all can be listed, it is
        probably unavailable: then all named ones are probed, so that the fault shows.
        """
        try:
            here = self.repository.classifiers() if self.repository is not None else ()
        except PatcherError:
            here = ()
        if not here:
            return self.classifiers
        return here if self.every else tuple(name for name in self.classifiers if name in here)


@dataclass(frozen=True)
class Probe:
    """What one replica answered for one classifier; without an answer ``up`` is False and the rest None or empty."""

    replica: str
    classifier: str
    up: bool
    version: int | None = None
    labels: int | None = None
    seconds: float | None = None
    scores: tuple[float, ...] = ()
    in_scope: tuple[float, ...] = ()


def probe_replica(server: TritonServer, classifier: str, address: str, texts: Sequence[str]) -> Probe:
    """Probe one replica: its version, number of labels, response time in seconds, and the scores of ``texts``."""
    try:
        start = time.perf_counter()
        (answer,) = server.classify(address, [probe_text()])
        seconds = time.perf_counter() - start
        for _ in range(1, server.instances(address)):
            server.classify(address, [probe_text()])
        sample = server.classify(address, texts, logits=False)
    except PatcherError:
        return Probe(server.url, classifier, up=False)
    scopes = tuple(each.in_scope for each in sample if each.in_scope is not None)
    scores = tuple(each.scores[0] for each in sample)
    return Probe(server.url, classifier, True, answer.head_version, len(answer.logits), seconds, scores, scopes)  # noqa: FBT003


def _probes(targets: Targets, classifiers: Sequence[tuple[str, Classifier | None]] | None = None) -> list[Probe]:
    found = _classifiers(targets) if classifiers is None else classifiers
    names = [(name, classifier.address if classifier else name) for name, classifier in found]
    if not names:
        return []
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(server) for server in _servers(targets)]
        pool = stack.enter_context(ThreadPoolExecutor(_AT_ONCE))
        # A replica that hangs costs one timeout here instead of one for each classifier: a scrape has ten seconds.
        alive = [server for server, lives in zip(servers, pool.map(_lives, servers), strict=True) if lives]

        def ask(server: TritonServer, name: str, address: str) -> Probe:
            if server not in alive:
                return Probe(server.url, name, up=False)
            return probe_replica(server, name, address, targets.texts)

        return list(pool.map(lambda job: ask(*job), [(server, *name) for server in servers for name in names]))


def _servers(targets: Targets) -> Iterator[TritonServer]:
    """A client for every replica; one connection serves all its probes."""
    for url in dict.fromkeys(split(",".join(targets.urls))):
        for replica in resolved(url):
            yield TritonServer(replica, timeout=_TIMEOUT, tls=_named(targets.tls, url))


def _named(tls: ClientTls | None, url: str) -> ClientTls | None:
    """TLS settings that expect the host name in ``url``: replicas are reached by address, but certified by name."""
    if tls is None or tls.server_name is not None:
        return tls
    return dataclasses.replace(tls, server_name=url.rpartition(":")[0].strip("[]"))


def _lives(server: TritonServer) -> bool:
    try:
        return server.is_live()
    except PatcherError:
        return False


def _classifiers(targets: Targets) -> list[tuple[str, Classifier | None]]:
    """The classifiers to probe now; None for one whose files cannot be read, which must not hide the others."""
    return [(name, _readable(targets.repository, name)) for name in targets.names()]


def _readable(repository: ModelRepository | None, name: str) -> Classifier | None:
    try:
        return repository.classifier(name) if repository else None
    except PatcherError:
        return None


class _Collector:
    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._changes = _Changes(targets.audit_log)

    def describe(self) -> list[Any]:
        # Without this, registering the collector would already probe the servers.
        return []

    def collect(self) -> Iterator[Any]:
        classifiers = _classifiers(self._targets)
        yield from _replica_metrics(_probes(self._targets, classifiers))
        yield from _repository_metrics(classifiers)
        yield from self._changes.metrics([name for name, _ in classifiers if not name.endswith(CANARY)])


def _replica_metrics(probes: Sequence[Probe]) -> Iterator[Any]:
    gauges: tuple[tuple[str, str, Callable[[Probe], float | None]], ...] = (
        ("patcher_replica_up", "Whether the classifier answers on this replica", lambda probe: float(probe.up)),
        ("patcher_head_version", "Head version that this replica answers from", lambda probe: probe.version),
        ("patcher_labels", "Labels that this replica answers with", lambda probe: probe.labels),
        ("patcher_probe_seconds", "Time of one answer to the exporter", lambda probe: probe.seconds),
    )
    from prometheus_client.core import GaugeMetricFamily

    for name, text, read in gauges:
        family = GaugeMetricFamily(name, text, labels=["replica", "classifier"])
        for probe in probes:
            if (value := read(probe)) is not None:
                family.add_metric([probe.replica, probe.classifier], value)
        yield family
    distributions: tuple[tuple[str, Callable[[Probe], Sequence[float]]], ...] = (
        ("score", lambda probe: probe.scores),
        ("in_scope", lambda probe: probe.in_scope),
    )
    for field, several in distributions:
        family = GaugeMetricFamily(
            f"patcher_sample_{field}",
            f"Quantiles of {field} over the exporter's own sample of texts, not over the traffic",
            labels=["replica", "classifier", "quantile"],
        )
        for probe in probes:
            if values := several(probe):
                for share, value in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True):
                    family.add_metric([probe.replica, probe.classifier, str(share)], float(value))
        yield family


def _repository_metrics(classifiers: Sequence[tuple[str, Classifier | None]]) -> Iterator[Any]:
    from prometheus_client.core import GaugeMetricFamily

    pinned = GaugeMetricFamily("patcher_pinned_version", "Head version pinned in the repository", labels=["classifier"])
    count = GaugeMetricFamily("patcher_versions", "Head versions in the repository", labels=["classifier"])
    found = [classifier for _, classifier in classifiers if classifier]
    versions = _versions(found)
    for each in found:
        with contextlib.suppress(PatcherError):
            pinned.add_metric([each.name], each.serving())
            if each.name in versions:  # it may have been dropped in the meantime
                count.add_metric([each.name], len(versions[each.name]))
    yield from (pinned, count)


def _versions(classifiers: Sequence[Classifier]) -> dict[str, tuple[int, ...]]:
    """The versions by classifier, without those that cannot be listed."""
    if len(classifiers) > 1:
        try:
            return classifiers[0].repository.versions_by_name()  # in an object store each listing is a request
        except RepositoryError:  # a folder that cannot be read must hide only the versions of its own classifier
            pass
        except PatcherError:
            return {}
    versions = {}
    for each in classifiers:
        with contextlib.suppress(PatcherError):
            versions[each.name] = each.versions()
    return versions


class _Changes:
    """Counts of the audit log's events; lines are read once, unless the file was truncated or replaced."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()  # several scrapes may come at once
        self._forget()

    def _forget(self) -> None:
        # The last counted line tells whether it is still the same file.
        self._end, self._last = 0, b""
        self._runs: Counter[tuple[str, str, str]] = Counter()
        self._forced: Counter[str] = Counter()

    def metrics(self, classifiers: Sequence[str] = ()) -> Iterator[Any]:
        """Both counters, over everything in the file so far.

        ``classifiers`` start at 0: Prometheus sees no increase in a series that appears with its first event, as 1.
        With many of them only ``forced`` does, and the changes of those that have had any. If the file cannot be read,
        there is nothing, since a 0 would make an increase of all that it holds.
        """
        from prometheus_client.core import CounterMetricFamily

        runs = CounterMetricFamily(
            "patcher_changes", "Runs of verbs that change models, by outcome", labels=["classifier", "verb", "outcome"]
        )
        forced = CounterMetricFamily(
            "patcher_forced", "Changes published although the gate refused", labels=["classifier"]
        )
        with self._lock:
            names = classifiers if self._read_on() else ()
            known = {name for name, _, _ in self._runs}
            few = names if len(names) <= _MOST_WITH_ZEROS else [name for name in names if name in known]
            zeros = dict.fromkeys(product(few, CHANGES - _OF_NO_CLASSIFIER, OUTCOMES.values()), 0)
            for key, value in sorted({**zeros, **self._runs}.items()):
                runs.add_metric(list(key), value)
            for name, value in sorted({**dict.fromkeys(names, 0), **self._forced}.items()):
                forced.add_metric([name], value)
        yield from (runs, forced)

    def _read_on(self) -> bool:
        """Count the lines added since the last time; returns whether what is counted now is all of a file's events."""
        if self._path is None:
            return False
        try:
            with self._path.open("rb") as file:
                file.seek(self._end - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._forget()
                    file.seek(0)
                for line in file:
                    if not line.endswith(b"\n"):  # still being written
                        break
                    self._count(line)
        except FileNotFoundError:  # not written yet, or rotated
            self._forget()
            return self._path.parent.is_dir()
        except OSError:
            self._forget()
            return False
        return True

    def _count(self, line: bytes) -> None:
        self._end, self._last = self._end + len(line), line
        if event := read_event(line):
            name = str(event.get("classifier", ""))
            self._runs[name, event["verb"], event["outcome"]] += 1
            if event.get("forced"):
                self._forced[name] += 1


def expose(targets: Targets, host: str, port: int) -> tuple[Any, Any]:
    """Serve ``/metrics`` at ``host``:``port`` (0 picks a free one); return the HTTP server and its thread.

    Raises InputError without a valid server address, and ToolError if prometheus-client is not installed or the port
    is not available.
    """
    if not list(_servers(targets)):
        raise InputError("no server; expected HOST:PORT, or several with commas between them")
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise ToolError(
            f"`patcher metrics` needs prometheus-client, which is not installed: {install_hint('metrics')}"
        ) from error
    registry = CollectorRegistry()
    registry.register(_Collector(targets))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror or error}; name another port") from error
    return server, thread
