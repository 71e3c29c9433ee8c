"""The load test, with the real perf_analyzer against a real server."""

from __future__ import annotations

import csv
import json
import shutil
import stat
import sys

import numpy as np
import pytest
import tiny

from patcher.cli import main
from patcher.errors import InputError, ServerError, ServerRefused, ServerUnreachable, ToolError
from patcher.loadtest import _intervals, load_test, parse_loads
from patcher.measurement import Load, Measurement, StepTime, check_targets, compare, plot, warnings, write_csv
from patcher.triton import perf_analyzer
from patcher.triton.client import TritonServer
from patcher.triton.perf_analyzer import find_perf_analyzer
from patcher.triton.server import EmbeddedTriton

MODELS = ["intent", "intent_features"]
ROLES = ("intent_encoder", "intent_backbone", "intent_head")


@pytest.fixture(scope="module")
def client(tiny_original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loadtest")
    shutil.copytree(tiny_original, folder / "model_repository")
    models, log = [*MODELS, "intent_backbone"], folder / "triton.log"
    asking = EmbeddedTriton(folder / "model_repository", models, log_file=log, encoder_runs_backbone=False)
    with asking as server, server.client() as opened:
        yield opened


@pytest.fixture(scope="module")
def texts():
    return [
        'a "quoted"\ttext,\nZ\u00fcrich \U0001f600',
        "",
        *(text for label in tiny.OLD for text in tiny.sentences(label, 5)),
    ]


@pytest.mark.server
def test_a_backbone_that_its_encoder_runs_is_no_step_of_its_own(classifier, texts, tmp_path):
    models = [*MODELS, "intent_backbone"]
    with EmbeddedTriton(classifier.root, models, log_file=tmp_path / "log") as server, server.client() as opened:
        (found,) = load_test(opened, ["intent"], texts, [Load(concurrency=1)], window=0.4)
    assert [step.model for step in found.steps] == ["intent_encoder", "intent_head"]
    assert all(step.requests > 5 for step in found.steps)


@pytest.mark.server
def test_measures_each_model_under_each_load(client, texts, tmp_path):
    said: list[str] = []
    loads = [*parse_loads("1:2"), Load(request_rate=20)]
    found = load_test(client, MODELS, texts, loads, window=0.4, progress=said.append)
    assert said == [
        f"{model}, {load}" for load in ("concurrency 1", "concurrency 2", "20 requests/s") for model in MODELS
    ]
    assert [(each.model, each.concurrency, each.request_rate) for each in found] == [
        (model, load.concurrency, load.request_rate) for load in loads for model in MODELS
    ]
    for each in found:
        assert each.throughput > 1
        assert 0 < each.p50_us <= each.p95_us <= each.p99_us < 60e6
        assert each.failures == 0
        expected = ROLES if each.model == "intent" else ROLES[:2]
        assert tuple(step.model for step in each.steps) == expected
        for step in each.steps:
            assert step.requests > 5
            assert step.compute_us > 0
            assert step.queue_us >= 0
            assert step.batch >= 1
        assert sum(step.compute_us for step in each.steps) > 100
    rate = [each for each in found if each.request_rate]
    assert all(each.throughput < 60 for each in rate)

    write_csv(found, tmp_path / "load.csv")
    with (tmp_path / "load.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["throughput"]) for row in rows] == [each.throughput for each in found]
    assert float(rows[0]["head_compute_us"]) == found[0].steps[2].compute_us
    document = found[0].to_json()
    assert {"model", "concurrency", "throughput", "p50_us", "p95_us", "p99_us", "failures"} <= document.keys()
    plot(found, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.server
def test_a_request_rate_is_what_the_server_gets(client):
    # A machine that stands still for a second misses the rate once, but not three times.
    tries = (load_test(client, ["intent"], ["a", "b"], [Load(request_rate=5)])[0] for _ in range(3))
    idle = next(each for each in tries if each.throughput == pytest.approx(5, rel=0.1))
    (flooded,) = load_test(client, ["intent"], ["a", "b"], [Load(request_rate=50_000)])
    assert (idle.planned, idle.failures) == (36, 0)
    assert not [said for said in warnings([idle]) if "came through" in said]
    assert "could not keep up" in "".join(warnings([flooded]))


@pytest.mark.server
def test_says_what_went_wrong(client):
    with pytest.raises(ServerRefused, match=r"does not serve nobody; .patcher doctor"):
        load_test(client, ["nobody"], ["a"], [Load(1)])
    with pytest.raises(ServerError, match=r"intent failed a request under concurrency 2: .*1 MiB"):
        load_test(client, ["intent"], ["a", "x" * (1 << 20) + "x"], [Load(2)], window=0.3)
    with pytest.raises(InputError, match="no texts"):
        load_test(client, ["intent"], [], [Load(1)])
    with pytest.raises(InputError, match="an unpaired surrogate"):
        load_test(client, ["intent"], ["\udc00"], [Load(1)])


@pytest.mark.server
def test_a_model_on_another_server_is_asked_there(client):
    other = f"intent@{client.url}"
    found = load_test(client, ["intent", other], ["a", "b"], [Load(2)], window=0.3, rounds=2)
    assert [each.model for each in found] == ["intent", other] * 2
    (ratio,) = compare(found, other)
    assert (ratio.model, ratio.against, ratio.load) == ("intent", other, Load(2))
    assert 0 < ratio.low <= ratio.ratio <= ratio.high
    assert all(0 < each.client_share < 1 for each in found)
    with pytest.raises(ServerError):
        load_test(client, ["intent@localhost:9"], ["a"], [Load(1)])


def measured(model, throughput, **more):
    return Measurement(model, 4, None, throughput, 1.0, 2.0, 3.0, more.pop("failures", 0), (), **more)


@pytest.mark.parametrize("option, name", [("--csv", "full.csv"), ("--plot", "full.png")])
def test_figures_that_cannot_be_written_are_printed(option, name, tiny_original, command, monkeypatch, tmp_path):
    monkeypatch.setattr("patcher.loadtest.load_test", lambda *_, **__: [measured("intent", 123.4)])
    (tmp_path / name).symlink_to("/dev/full")
    arguments = ["loadtest", "--repo", tiny_original, "--url", "127.0.0.1:1", option, tmp_path / name]
    said = f"cannot write to {tmp_path / name}: No space left on device; it does not hold all figures"
    code, out, err = command(*arguments)
    assert (code, "123.4" in out, err) == (1, True, f"error: {said}\n")
    code, out, err = command(*arguments, "--json")
    document = json.loads(out)
    assert (code, document["error"], document["measurements"][0]["throughput"]) == (1, said, 123.4), err
    assert document["warnings"] == []
    monkeypatch.setattr("patcher.measurement.warnings", lambda _: ["the client may be the bottleneck"])
    _, out, err = command(*arguments, "--json")
    assert json.loads(out)["warnings"] == ["the client may be the bottleneck"]
    assert err.count("warning: the client may be the bottleneck\n") == 1


@pytest.mark.server
def test_of_several_servers_the_one_that_is_measured_is_named(client, tiny_original, capsys):
    options = ["--repo", str(tiny_original), "--concurrency", "1", "--window", "0.3", "--json"]
    assert main(["loadtest", "--url", f"127.0.0.1:1,{client.url}", *options]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 1
    assert f"warning: only {client.url} is measured" in err
    assert main(["loadtest", "--url", client.url, *options]) == 0
    assert "warning: only" not in capsys.readouterr().err


def test_compares_round_by_round():
    found = [measured("a", 90.0), measured("b", 100.0), measured("a", 300.0), measured("b", 200.0)]
    (ratio,) = compare([*found, measured("a", 50.0), measured("b", 50.0)], "b")
    assert (ratio.ratio, ratio.low, ratio.high) == (1.0, 0.9, 1.5)
    assert compare(found, "nobody") == []


def test_says_what_makes_figures_doubtful():
    assert warnings([measured("a", 90.0)]) == []
    assert "the client may be the bottleneck" in warnings([measured("a", 90.0, client_share=0.8)])[0]
    assert "3 requests failed" in warnings([measured("a", 90.0, failures=3)])[0]
    slow = Measurement("a", None, 100.0, 60.0, 1.0, 2.0, 3.0, 0, ())
    assert "could not keep up" in warnings([slow])[0]
    late = Measurement("a", None, 100.0, 99.0, 1.0, 2.0, 3.0, 0, (), delayed=True, planned=720)
    (said,) = warnings([late])
    assert "sent late" in said
    assert "came through" not in said


@pytest.mark.parametrize(
    "throughput,p50_ms,short", [(4.3, 3, False), (3.5, 3, True), (3.5, 300, False), (1, 300, True)]
)
def test_the_last_requests_of_a_short_test_are_no_overload(throughput, p50_ms, short):
    measured = Measurement("a", None, 5.0, throughput, p50_ms * 1e3, 0.0, 0.0, 0, (), planned=7)
    assert bool(warnings([measured])) == short


def test_request_intervals_keep_the_rate_and_are_random():
    gaps = _intervals(20.0, 144)
    assert sum(gaps) == pytest.approx(144 / 20 * 1e6)
    assert len(gaps) == 144
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.25)


def test_nobody_there():
    with pytest.raises(ServerUnreachable, match="patcher serve"):
        load_test(TritonServer("localhost:9"), ["intent"], ["a"], [Load(1)])


@pytest.mark.parametrize(
    "text,levels",
    [("1:16:4", [1, 5, 9, 13]), ("3", [3]), ("2:4", [2, 3, 4]), ("1:1:5", [1]), ("8:8", [8])],
)
def test_reads_a_range_as_perf_analyzer_does(text, levels):
    assert [load.concurrency for load in parse_loads(text)] == levels


def test_reads_rates():
    assert [load.request_rate for load in parse_loads(None, "0.5:1:0.25")] == [0.5, 0.75, 1.0]
    assert parse_loads("1", "10") == [Load(concurrency=1), Load(request_rate=10.0)]


@pytest.mark.parametrize("text", ["", "a", "0", "-1", "1:2:3:4", "4:1", "1:2:0", "1.5", "nan", "inf", "1:1e9", "1:2:"])
def test_refuses_other_ranges(text):
    with pytest.raises(InputError, match="--concurrency"):
        parse_loads(text)


def test_nothing_to_plot(tmp_path):
    with pytest.raises(InputError, match="no measurement"):
        plot([], tmp_path / "plot.png")


def test_a_measurement_as_json():
    step = StepTime("intent_head", 3, 1.0, 2.0, 1.0)
    measured = Measurement("intent", 1, None, 100.0, 1.0, 2.0, 3.0, 0, (step,))
    assert json.loads(json.dumps(measured.to_json()))["steps"][0]["model"] == "intent_head"


class TestFinding:
    def test_the_installed_one_runs(self):
        outcome = find_perf_analyzer().run(["--version"], timeout=60)
        assert outcome.returncode == 0
        assert "Perf Analyzer" in outcome.stdout + outcome.stderr

    def test_named_one_first_then_installed_then_path(self, monkeypatch, tmp_path):
        script = tmp_path / "perf_analyzer"
        script.write_text("#!/bin/sh\necho named\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATCHER_PERF_ANALYZER", str(script))
        assert find_perf_analyzer().run([], timeout=60).stdout == "named\n"
        monkeypatch.setenv("PATCHER_PERF_ANALYZER", str(tmp_path / "nowhere"))
        with pytest.raises(ToolError, match=r"nowhere.*perf_analyzer install"):
            find_perf_analyzer()
        monkeypatch.delenv("PATCHER_PERF_ANALYZER")
        monkeypatch.setattr(perf_analyzer, "_target", lambda: tmp_path / "nowhere")
        monkeypatch.setenv("PATH", str(tmp_path))
        assert find_perf_analyzer().path == script
        script.unlink()
        with pytest.raises(ToolError, match=r"not installed; .*-m patcher\.triton\.perf_analyzer install"):
            find_perf_analyzer()

    def test_the_command_says_what_is_missing(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setenv("PATCHER_PERF_ANALYZER", str(tmp_path / "nowhere"))
        assert perf_analyzer.main([]) == 1
        assert "nowhere" in capsys.readouterr().err

    def test_one_that_cannot_be_run(self, tmp_path):
        (tmp_path / "perf_analyzer").write_text("text")
        with pytest.raises(ToolError, match="cannot run"):
            perf_analyzer.PerfAnalyzer(tmp_path / "perf_analyzer").run([], timeout=5)

    def test_one_that_does_not_end(self, tmp_path):
        script = tmp_path / "perf_analyzer"
        script.write_text("#!/bin/sh\nexec sleep 60\n")
        script.chmod(0o755)
        with pytest.raises(ToolError, match="did not end within 0 s"):
            perf_analyzer.PerfAnalyzer(script).run([], timeout=0.2)

    def test_libraries_that_are_not_there(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ToolError, match=r"nvidia-pytriton.*pip install"):
            perf_analyzer._wanted_libraries()


def test_what_could_not_be_written_afterwards_is_refused_before(tmp_path):
    for name, said in ((tmp_path / "nope" / "x.csv", "there is no folder"), (tmp_path / "x.doc", "ends in")):
        with pytest.raises(InputError, match=said):
            check_targets(None, name)
    check_targets(tmp_path / "figures", tmp_path / "x.PNG")


def test_a_plot_without_matplotlib_is_refused_before(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ToolError, match="needs matplotlib"):
        check_targets(None, tmp_path / "x.PNG")
