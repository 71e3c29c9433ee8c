"""What Triton's own metrics do not tell, asked anew at each scrape: the head version that each replica answers from.

Requests, latencies, queues and failures of every step are in Triton's own ``/metrics``, on each replica. Here is what a
probe of each replica, the repository and the audit log say. Counters come from the audit log, which only grows, so that
several exporters, or one started again, tell the same.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.audit import read_events
from patcher.errors import PatcherError, ToolError
from patcher.fleet import resolved
from patcher.rollout import probe_text
from patcher.triton.client import TritonServer
from patcher.wording import install_hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from patcher.repository import ModelRepository
    from patcher.triton.tls import ClientTls

__all__ = ["Probe", "Targets", "expose", "probe_replica"]

_TIMEOUT = 5.0
_AT_ONCE = 16
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Targets:
    """What to look at: servers by address (a DNS name means every replica behind it), classifiers, files."""

    urls: tuple[str, ...]
    classifiers: tuple[str, ...]
    repository: ModelRepository | None = None
    audit_log: Path | None = None
    texts: tuple[str, ...] = ()
    tls: ClientTls | None = None
    every: bool = False
    """Look at classifiers that come to the repository later, too."""

    def names(self) -> tuple[str, ...]:
        """The classifiers to ask for now: one that was dropped since is no fault, a repository that is away is one."""
        here = self.repository.classifiers() if self.repository is not None else ()
        if not here:
            return self.classifiers
        return here if self.every else tuple(name for name in self.classifiers if name in here)


@dataclass(frozen=True)
class Probe:
    """What one replica answered for one classifier; all but ``up`` is None where it did not."""

    replica: str
    classifier: str
    up: bool
    version: int | None = None
    labels: int | None = None
    seconds: float | None = None
    scores: tuple[float, ...] = ()
    in_scope: tuple[float, ...] = ()


def probe_replica(replica: str, classifier: str, address: str, texts: Sequence[str], tls: ClientTls | None) -> Probe:
    """Ask one replica: its version, its number of labels, how long an answer takes, and what it says of ``texts``."""
    try:
        with TritonServer(replica, timeout=_TIMEOUT, tls=tls) as server:
            start = time.perf_counter()
            (answer,) = server.classify(address, [probe_text()])
            seconds = time.perf_counter() - start
            for _ in range(1, server.instances(address)):
                server.classify(address, [probe_text()])
            sample = server.classify(address, texts)
    except PatcherError:
        return Probe(replica, classifier, up=False)
    scopes = tuple(each.in_scope for each in sample if each.in_scope is not None)
    scores = tuple(each.scores[0] for each in sample)
    return Probe(replica, classifier, True, answer.head_version, len(answer.logits), seconds, scores, scopes)  # noqa: FBT003


def _probes(targets: Targets) -> list[Probe]:
    names = [(name, _address(targets.repository, name)) for name in targets.names()]
    replicas = [(replica, _named(targets.tls, url)) for url in dict.fromkeys(targets.urls) for replica in resolved(url)]
    if not replicas or not names:
        return []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        # One that hangs is waited for once, and not for each of its classifiers: a scrape has ten seconds.
        live = list(pool.map(lambda replica: _is_live(*replica), replicas))
        up = [replica for replica, lives in zip(replicas, live, strict=True) if lives]
        jobs = [(replica, *name, targets.texts, tls) for replica, tls in up for name in names]
        answered = list(pool.map(lambda job: probe_replica(*job), jobs))
    down = [replica for replica, lives in zip(replicas, live, strict=True) if not lives]
    return [*answered, *(Probe(replica, name, up=False) for replica, _ in down for name, _ in names)]


def _named(tls: ClientTls | None, url: str) -> ClientTls | None:
    """Replicas are reached by address, while their certificate is made out to the name."""
    if tls is None or tls.server_name is not None:
        return tls
    return dataclasses.replace(tls, server_name=url.rpartition(":")[0].strip("[]"))


def _is_live(replica: str, tls: ClientTls | None) -> bool:
    try:
        with TritonServer(replica, timeout=_TIMEOUT, tls=tls) as server:
            return server.is_live()
    except PatcherError:
        return False


def _address(repository: ModelRepository | None, name: str) -> str:
    """What clients ask for a classifier; its name where its files cannot be read, which hides no other."""
    try:
        return repository.classifier(name).address if repository else name
    except PatcherError:
        return name


class _Collector:
    def __init__(self, targets: Targets) -> None:
        self._targets = targets

    def describe(self) -> list[Any]:
        # Nothing is asked of the servers when the collector is registered.
        return []

    def collect(self) -> Iterator[Any]:
        yield from _replica_metrics(_probes(self._targets))
        yield from _repository_metrics(self._targets)
        yield from _change_metrics(self._targets.audit_log)


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


def _repository_metrics(targets: Targets) -> Iterator[Any]:
    from prometheus_client.core import GaugeMetricFamily

    pinned = GaugeMetricFamily("patcher_pinned_version", "Head version pinned in the repository", labels=["classifier"])
    count = GaugeMetricFamily("patcher_versions", "Head versions in the repository", labels=["classifier"])
    for name in targets.names() if targets.repository else ():
        try:
            classifier = targets.repository.classifier(name) if targets.repository else None
            if classifier:
                pinned.add_metric([name], classifier.serving())
                count.add_metric([name], len(classifier.versions()))
        except PatcherError:
            continue
    yield from (pinned, count)


def _change_metrics(audit_log: Path | None) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily

    events = read_events(audit_log) if audit_log else []
    changes = CounterMetricFamily(
        "patcher_changes", "Runs of verbs that change models, by outcome", labels=["classifier", "verb", "outcome"]
    )
    counted = Counter((str(e.get("classifier", "")), e["verb"], e["outcome"]) for e in events)
    for key, value in sorted(counted.items()):
        changes.add_metric(list(key), value)
    forced = CounterMetricFamily("patcher_forced", "Changes published in spite of the gate", labels=["classifier"])
    for name, value in sorted(Counter(str(e.get("classifier", "")) for e in events if e.get("forced")).items()):
        forced.add_metric([name], value)
    yield from (changes, forced)


def expose(targets: Targets, host: str, port: int) -> tuple[Any, Any]:
    """Serve ``/metrics`` at ``host``:``port`` (0 picks one): the HTTP server and its thread.

    Raises ToolError without prometheus-client, or where the port cannot be had.
    """
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
        raise ToolError(f"cannot listen on {host}:{port}: {error.strerror or error}; name another port") from error
    return server, thread
