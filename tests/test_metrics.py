"""The exporter and the audit log on a real server; every metric in the dashboard and the alerts must exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import urllib.request
from pathlib import Path
from unittest.mock import Mock

import promql_parser
import pytest
import tiny
import yaml
from certificates import Authority

from patcher import ModelRepository, metrics, rollout
from patcher.audit import read_event
from patcher.cli import main
from patcher.errors import NotServed, StorageError
from patcher.metrics import Targets, _Changes, _probes, _repository_metrics, expose
from patcher.triton import client
from patcher.triton.server import EmbeddedTriton
from patcher.triton.tls import ClientTls

MONITORING = Path(__file__).parents[1] / "docker" / "monitoring"


def scrape(address):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
        return answer.read().decode()


def sample(text, name, **labels):
    """The value of the only series with this name and these labels."""
    pattern = re.compile(rf"^{name}{{(.*)}} (\S+)$", re.MULTILINE)
    wanted = {f'{key}="{value}"' for key, value in labels.items()}
    (found,) = [value for each, value in pattern.findall(text) if wanted <= set(each.split(","))]
    return float(found)


def events(log):
    """The events in an audit log."""
    return list(filter(None, map(read_event, log.read_bytes().splitlines())))


@pytest.fixture(scope="module")
def two(tiny_original, tmp_path_factory):
    """Two replicas of one repository."""
    folder = tmp_path_factory.mktemp("metrics")
    shutil.copytree(tiny_original, folder / "model_repository")
    models = ["intent", "intent_features"]
    with (
        EmbeddedTriton(folder / "model_repository", models, log_file=folder / "a.log") as one,
        EmbeddedTriton(folder / "model_repository", models, log_file=folder / "b.log") as other,
    ):
        yield one, other


@pytest.fixture(scope="module")
def exported(two, tmp_path_factory):
    """The exporter's output after a refused patch, a forced one on the first replica only, and a failure."""
    one, other = two
    folder = tmp_path_factory.mktemp("changes")
    same = tiny.write_csv(folder / "same.csv", {"rain": tiny.sentences("weather", 10, seed=5)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_MODEL_REPO", str(one.repository))
        patch.setenv("TRITON_URL", one.url)
        patch.setenv("PATCHER_AUDIT_LOG", str(folder / "audit.jsonl"))
        assert main(["add-label", "--examples", str(same)]) == 3
        assert main(["add-label", "--examples", str(same), "--force"]) == 0
        assert main(["rollback", "--to", "9"]) == 2
        assert main(["labels"]) == 0
    texts = tuple(tiny.sentences("weather", 5))
    urls, names = (one.url, other.url, "127.0.0.1:1"), ("intent", "dropped-since")
    targets = Targets(urls, names, ModelRepository(one.repository), folder / "audit.jsonl", texts)
    server, _ = expose(targets, "127.0.0.1", 0)
    yield scrape(f"127.0.0.1:{server.server_port}"), folder / "audit.jsonl"
    server.shutdown()


@pytest.mark.server
def test_each_replica_is_told_apart(exported, two):
    text, _ = exported
    one, other = two
    assert sample(text, "patcher_head_version", replica=one.url) == 2
    assert sample(text, "patcher_head_version", replica=other.url) == 1  # it was not told to load version 2
    assert sample(text, "patcher_labels", replica=one.url) == len(tiny.OLD) + 1
    assert sample(text, "patcher_labels", replica=other.url) == len(tiny.OLD)
    assert sample(text, "patcher_replica_up", replica="127.0.0.1:1") == 0
    assert sample(text, "patcher_pinned_version", classifier="intent") == 2
    assert 0 < sample(text, "patcher_sample_score", replica=one.url, quantile="0.5") <= 1
    assert 0 <= sample(text, "patcher_sample_in_scope", replica=other.url, quantile="0.05") <= 1


@pytest.mark.server
def test_a_classifier_that_was_dropped_is_no_fault(exported):
    assert 'classifier="intent"' in exported[0]
    assert 'classifier="dropped-since"' not in exported[0]


@pytest.mark.server
def test_changes_are_counted_from_the_audit_log(exported):
    text, _ = exported
    assert sample(text, "patcher_changes_total", verb="add-label", outcome="refused") == 1
    assert sample(text, "patcher_changes_total", verb="add-label", outcome="done") == 1
    assert sample(text, "patcher_changes_total", verb="rollback", outcome="bad_input") == 1
    assert sample(text, "patcher_forced_total", classifier="intent") == 1


def line(verb, **more):
    return json.dumps({"verb": verb, "outcome": "done", "classifier": "intent", **more}) + "\n"


def counted(changes):
    """How often each verb was run, and how many changes were forced."""
    runs, forced = ({tuple(s.labels.values()): s.value for s in each.samples} for each in changes.metrics())
    return {verb: value for (_, verb, _), value in runs.items()}, sum(forced.values())


def test_an_audit_log_is_read_on_from_where_the_last_scrape_ended(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr("patcher.metrics.read_event", lambda line: parsed.append(line) or read_event(line))
    log = tmp_path / "audit.jsonl"
    changes = _Changes(log)
    assert counted(changes) == ({}, 0)  # the log does not exist yet
    log.write_text(line("tune") + "torn by a full disk\n" + line("add-label", forced=True))
    assert counted(changes) == counted(changes) == ({"tune": 1, "add-label": 1}, 1)
    with log.open("a") as file:
        file.write(line("tune") + line("prune")[:20])
        file.flush()
        assert counted(changes) == ({"tune": 2, "add-label": 1}, 1)
        file.write(line("prune")[20:])
    assert counted(changes) == ({"tune": 2, "add-label": 1, "prune": 1}, 1)
    assert len(parsed) == 5


def series(changes, names):
    """The value of each series of `patcher_changes` and of `patcher_forced`, by its labels."""
    return [{tuple(s.labels.values()): s.value for s in each.samples} for each in changes.metrics(names)]


def test_counters_start_at_zero(tmp_path):
    """Prometheus sees no increase in a series that appears with its first event."""
    changes = _Changes(tmp_path / "audit.jsonl")  # does not exist yet
    runs, forced = series(changes, ["intent"])
    assert runs["intent", "add-label", "put_back"] == runs["intent", "rollback", "done"] == forced["intent",] == 0
    assert len(runs) < 100
    (tmp_path / "audit.jsonl").write_text(line("rollback"))
    runs, forced = series(changes, ["intent", "topic"])
    assert (runs["intent", "rollback", "done"], runs["topic", "rollback", "done"]) == (1, 0)
    assert set(forced) == {("intent",), ("topic",)}


def test_many_classifiers_get_zeros_only_after_an_event(tmp_path):
    (tmp_path / "audit.jsonl").write_text(line("rollback"))
    names = ["intent", *(f"c{number}" for number in range(50))]
    runs, forced = series(_Changes(tmp_path / "audit.jsonl"), names)
    assert {name for name, _, _ in runs} == {"intent"}
    assert runs["intent", "add-label", "put_back"] == 0
    assert len(forced) == 51


@pytest.mark.parametrize("place", [None, "no-such-folder/audit.jsonl", "."])
def test_a_log_that_cannot_be_read_has_no_zeros(tmp_path, place):
    """Once it can be read again, all that it holds would be an increase."""
    assert series(_Changes(place and tmp_path / place), ["intent"]) == [{}, {}]


@pytest.mark.parametrize("kind", ["cut", "cut, and longer by now", "another", "gone"])
def test_an_audit_log_that_was_rotated_is_counted_anew(tmp_path, kind):
    log = tmp_path / "audit.jsonl"
    log.write_text(line("tune") + line("add-label", forced=True))
    changes = _Changes(log)
    assert counted(changes) == ({"tune": 1, "add-label": 1}, 1)
    if kind == "cut":
        os.truncate(log, len(line("tune")))
    elif kind == "gone":
        log.rename(tmp_path / "audit.jsonl.1")
    else:
        if kind == "another":
            log.unlink()
        log.write_text(line("prune") * 9)
    expected = {"cut": {"tune": 1}, "gone": {}}.get(kind, {"prune": 9})
    assert counted(changes) == (expected, 0)


@pytest.mark.server
def test_one_connection_a_replica_serves_for_all_classifiers(two, monkeypatch):
    opened, plain = [], client._client_class()
    monkeypatch.setattr(client, "_client_class", lambda: lambda url, **more: opened.append(url) or plain(url, **more))
    urls = (two[0].url, two[1].url, "127.0.0.1:1")
    probes = _probes(Targets(urls, ("intent",) * 20))
    assert [probe.up for probe in probes] == [True] * 40 + [False] * 20
    assert sorted(opened) == sorted(urls)


@pytest.mark.server
def test_the_audit_log_says_who_did_what_from_what(exported):
    refused, forced, bad = events(exported[1])
    assert (refused["outcome"], refused["gate"], refused["exit_code"]) == ("refused", "refused", 3)
    assert (forced["outcome"], forced["gate"], forced["forced"], forced["version"]) == ("done", "forced", True, 2)
    assert "version" not in refused  # the next one got that number
    assert forced["data_hash"] == refused["data_hash"]
    assert len(forced["data_hash"]) == 64
    assert forced["seconds"] > 0
    assert {"time", "user", "host", "classifier", "parent_version", "method", "added"} <= forced.keys()
    assert "there are 1, 2" in bad["error"]


def test_the_audit_log_names_the_classifiers_of_verbs_for_all(classifier, monkeypatch, tmp_path):
    log, repo = tmp_path / "audit.jsonl", str(classifier.root)
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    main(["doctor", "--repair", "--repo", repo])
    main(["sync", "--repo", repo, "--url", "127.0.0.1:1"])
    main(["upgrade", "--repo", repo])
    with classifier.repository.lock():
        classifier.repository.add_classifier("later", classifier.head(), backbone="intent")
    main(["sync", "--repo", repo, "--url", "127.0.0.1:1"])
    doctor, sync, upgrade, both = events(log)
    assert [event["classifier"] for event in (doctor, sync)] == ["intent", "intent"]
    assert upgrade["backbones"] == ["intent"]
    assert (both["classifiers"], "classifier" in both) == (["intent", "later"], False)


@pytest.mark.parametrize("error, version", [(StorageError("full"), None), (NotServed("put back"), 2), (None, 2)])
def test_the_audit_log_has_a_version_only_of_what_was_published(error, version, classifier, monkeypatch, tmp_path):
    log, switch = tmp_path / "audit.jsonl", rollout._switch
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    monkeypatch.setattr(rollout, "_switch", Mock(side_effect=error or switch))
    main(["rename-label", "music", "songs", "--no-load", "--repo", str(classifier.root)])
    (event,) = events(log)
    assert event.get("version") == version
    assert classifier.versions() == ((1, 2) if version else (1,))


def test_a_trial_that_cannot_begin_has_published_no_version(classifier, monkeypatch, tmp_path):
    log = tmp_path / "audit.jsonl"
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    monkeypatch.setattr("patcher.labelling.start", Mock(side_effect=StorageError("full")))
    texts = [word for text in tiny.sentences("payday", 10) for word in ("--text", text)]
    options = ["--canary", "10", "--no-load", "--repo", str(classifier.root)]
    assert main(["add-label", "payday", *texts, *options]) == 1
    (event,) = events(log)
    assert ("version" in event, classifier.versions()) == (False, (1,))


def test_a_log_line_beside_json(classifier, monkeypatch, capsys):
    monkeypatch.setenv("PATCHER_LOG", "json")
    assert main(["labels", "--repo", str(classifier.root), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["version"] == 1
    assert json.loads(captured.err)["outcome"] == "done"
    monkeypatch.delenv("PATCHER_LOG")
    verb = ["labels", "--repo", str(classifier.root)]
    for given in (["--log-json", *verb], [*verb, "--log-json"]):
        for version, code, outcome in (("1", 0, "done"), ("7", 2, "bad_input"), ("x", 2, "bad_input")):
            assert main([*given, "--version", version]) == code
            assert json.loads(capsys.readouterr().err.splitlines()[-1])["outcome"] == outcome


@pytest.mark.parametrize("path", ["/proc/nowhere/log", "x" * 300])
def test_an_audit_log_that_cannot_be_written_undoes_nothing(classifier, monkeypatch, capsys, path):
    monkeypatch.setenv("PATCHER_AUDIT_LOG", path)
    assert main(["rename-label", "music", "songs", "--no-load", "--repo", str(classifier.root)]) == 0
    assert "cannot be written" in capsys.readouterr().err
    assert classifier.serving() == 2


def test_an_event_that_does_not_fit_is_said_and_spoils_none_after_it(classifier, monkeypatch, capsys, tmp_path):
    log = tmp_path / "audit.jsonl"
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    write = os.write
    monkeypatch.setattr("os.write", lambda descriptor, data: write(descriptor, data[:50]))  # the disk is full
    assert main(["rename-label", "music", "songs", "--no-load", "--repo", str(classifier.root)]) == 0
    assert "only 50 of" in capsys.readouterr().err
    monkeypatch.setattr("os.write", write)
    assert main(["rename-label", "songs", "tunes", "--no-load", "--repo", str(classifier.root)]) == 0
    assert [event["verb"] for event in events(log)] == ["rename-label"]
    assert len(log.read_bytes().splitlines()) == 2


def test_history_shows_the_data(classifier, capsys, tmp_path):
    file = tiny.write_csv(tmp_path / "a.csv", {"payday": tiny.sentences("payday", 10)})
    assert main(["add-label", "--examples", str(file), "--no-load", "--repo", str(classifier.root)]) == 0
    capsys.readouterr()
    assert main(["history", "--repo", str(classifier.root)]) == 0
    assert classifier.head(2).lineage.data_hash[:12] in capsys.readouterr().out


def expressions():
    """Every PromQL expression in the dashboard and in the alert rules."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    return found + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def names(node):
    """The metrics that a parsed expression reads."""
    if isinstance(node, promql_parser.VectorSelector):
        return {node.name}
    if isinstance(node, promql_parser.MatrixSelector):
        return {node.vector_selector.name}
    parts = [getattr(node, part, None) for part in ("expr", "lhs", "rhs", "param")]
    parts += list(getattr(node, "args", None) or [])
    return {name for part in parts if part is not None for name in names(part)}


def test_no_alert_takes_a_counter_that_starts_at_zero_for_an_event():
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    for rule in rules:
        if rule["alert"] in ("PutBack", "GateForced"):
            found = re.findall(r"_total(?:{[^}]*})?\)( > 0)?\s+unless", rule["expr"])
            assert found == [" > 0"], rule["alert"]


@pytest.mark.server
def test_every_metric_in_use_exists(exported, two):
    text = exported[0] + scrape(two[0].metrics_url)
    there = set(re.findall(r"^(\w+)(?:{| )", text, re.MULTILINE))
    used = {
        name for text in expressions() for name in names(promql_parser.parse(text.replace("$__rate_interval", "5m")))
    }
    assert len(used) > 12
    # Prometheus itself adds `up`; Triton exports the GPU metrics only if there is a GPU.
    assert {name for name in used - there if not name.startswith("nv_gpu_")} <= {"up"}
    assert used & {"patcher_head_version", "patcher_changes_total", "nv_inference_request_success"}


def test_a_replica_that_hangs_is_waited_for_once(monkeypatch):
    """Waiting once for each classifier would take longer than the scrape's timeout."""
    monkeypatch.setattr(metrics, "_TIMEOUT", 0.3)
    monkeypatch.setattr(metrics, "probe_replica", lambda *_: pytest.fail("it hangs"))
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        names = tuple(f"c{number}" for number in range(40))
        probes = _probes(Targets((f"127.0.0.1:{hanging.getsockname()[1]}",), names))
    assert [(probe.classifier, probe.up) for probe in probes] == [(name, False) for name in names]


def test_servers_may_stand_in_one_list_with_commas(tmp_path):
    probes = _probes(Targets(("127.0.0.1:1, 127.0.0.1:2", "127.0.0.1:1"), ("intent",)))
    assert [(probe.replica, probe.up) for probe in probes] == [("127.0.0.1:1", False), ("127.0.0.1:2", False)]
    tls = ClientTls(Authority(tmp_path).ca)
    servers = metrics._servers(Targets(("localhost:1,[::1]:2",), (), tls=tls))
    assert [server.tls.server_name for server in servers] == ["localhost", "::1"]


@pytest.mark.parametrize("url", ["127.0.0.1", "127.0.0.1:1,here", " , "])
def test_an_address_that_is_none_is_refused_before_the_first_scrape(classifier, capsys, url):
    assert main(["metrics", "--repo", str(classifier.root), "--port", "0", "--url", url]) == 2
    assert "expected HOST:PORT" in capsys.readouterr().err


def test_json_says_where_the_metrics_are(classifier, capsys, monkeypatch):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("threading.Thread.join", stopped)
    assert main(["metrics", "--repo", str(classifier.root), "--port", "0", "--url", "127.0.0.1:1", "--json"]) == 0
    captured = capsys.readouterr()
    url = json.loads(captured.out)["url"]
    assert f"metrics at {url}; press Ctrl-C to stop" in captured.err


def test_a_folder_that_cannot_be_read_hides_the_versions_of_its_classifier_alone(classifier):
    with classifier.repository.lock():
        classifier.repository.add_classifier("later", classifier.head(), backbone="intent")

    def counted():
        every = [("intent", classifier), ("later", classifier.repository.classifier("later"))]
        families = {family.name: family.samples for family in _repository_metrics(every)}
        return {sample.labels["classifier"]: sample.value for sample in families["patcher_versions"]}

    assert counted() == {"intent": 1.0, "later": 1.0}
    loop = classifier.root / "intent_head" / "2"
    loop.symlink_to(loop)  # stands for a folder that cannot be read, also by root
    assert counted() == {"later": 1.0}


def test_one_that_cannot_be_read_hides_no_other_and_new_ones_are_seen(classifier, tmp_path):
    repository = classifier.repository
    targets = Targets(("127.0.0.1:1",), ("intent",), repository, every=True)
    assert targets.names() == ("intent",)
    with repository.lock():
        repository.add_classifier("later", classifier.head(), backbone="intent")
    assert targets.names() == ("intent", "later")
    (classifier.root / "later" / "config.pbtxt").write_bytes(b"\xff garbage {")
    assert sorted(probe.classifier for probe in _probes(targets)) == ["intent", "later"]
    loop = classifier.root / "other_head"
    loop.symlink_to(loop)  # stands for a folder that cannot be read, also by root
    assert [(probe.classifier, probe.up) for probe in _probes(targets)] == [("intent", False)]
    loop.unlink()
    shutil.move(classifier.root, tmp_path / "away")
    assert [probe.up for probe in _probes(targets)] == [False]
