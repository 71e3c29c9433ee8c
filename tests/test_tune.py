"""Serving settings: they are read, written without touching anything else, and tried on a real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiny

from patcher import model_config, rollback
from patcher.configs import backbone_config, encoder_config
from patcher.errors import InputError, RepositoryError, ServerError
from patcher.model_config import parse
from patcher.relabelling import rename_label
from patcher.serve import advice, cache_options
from patcher.serving import Serving, serving_of, with_response_cache, with_serving
from patcher.triton.client import TritonServer
from patcher.triton.process import has_gpu
from patcher.triton.server import EmbeddedTriton
from patcher.tune import _copied, candidates, tune

TEXTS = [text for label in tiny.OLD for text in tiny.sentences(label, 5)]
MODELS = ("intent_encoder", "intent_backbone")


def configs(classifier):
    return tuple((classifier.root / model / "config.pbtxt").read_text() for model in MODELS)


def test_settings_are_read_back_and_all_else_stays(classifier):
    before = configs(classifier)
    assert serving_of(*map(parse, before)) == Serving()
    wanted = Serving(instances=3, threads=2, delay_us=700, slack=5, batch=8)
    after = with_serving(*before, wanted)
    assert serving_of(*map(parse, after)) == wanted
    assert parse(after[0]).instance_group[0].count == 3  # an encoder asks one session at a time
    assert parse(after[1]).parameters["fingerprint"] == parse(before[1]).parameters["fingerprint"]
    assert parse(after[1]).max_batch_size == model_config.MAX_BATCH_SIZE
    back = with_serving(*after, Serving())
    assert [parse(text) for text in back] == [parse(text) for text in before]


def test_settings_that_are_no_numbers(classifier):
    encoder, backbone = map(parse, configs(classifier))
    backbone.parameters["intra_op_thread_count"].string_value = "many"
    with pytest.raises(RepositoryError, match="many"):
        serving_of(encoder, backbone)


def test_an_export_without_an_encoder_is_tuned_at_its_tokenizer(older):
    models = (older.text_model, older.backbone_model)
    assert models == ("intent_tokenizer", "intent_backbone")
    before = tuple(map(older.repository.config_text, models))
    wanted = Serving(instances=2, delay_us=700, slack=5, batch=8)
    after = with_serving(*before, wanted)
    assert serving_of(*map(parse, after)) == wanted
    assert list(parse(after[1]).dynamic_batching.preferred_batch_size) == [8]
    assert [parse(text) for text in with_serving(*after, Serving())] == [parse(text) for text in before]


def test_each_group_of_candidates_builds_upon_the_best_before():
    search = candidates(Serving(), cores=4)
    name, group = next(search)
    assert name == "instances and threads"
    assert {(each.instances, each.threads) for each in group} == {(2, 2), (4, 1), (1, 3)}
    best = Serving(instances=2, threads=2)
    for _, group in iter(lambda: search.send(best), None):
        assert all((each.instances, each.threads) == (2, 2) for each in group)
        assert best not in group
        if group[0].batch != best.batch:
            break


def test_a_budget_of_nothing(classifier):
    with pytest.raises(InputError, match="expected more than none"):
        tune(classifier, TEXTS, seconds=0)


def test_a_copy_to_try_on_has_the_head_that_serves_and_no_memory(classifier, tmp_path, tree):
    repository = classifier.repository
    for old, new in (("music", "m1"), ("m1", "m2"), ("m2", "m3")):
        rename_label(classifier, old, new)
    rollback(classifier, 3)
    with repository.lock():
        repository.add_classifier("other", classifier.head(1), classifier.memory(1), backbone="intent")
    copy = _copied(classifier, tmp_path / "copy")
    assert (copy.versions(), copy.head().labels) == ((3,), classifier.head(3).labels)
    there, copied = ({name for name in tree(each.root) if "." in name} for each in (classifier, copy))  # the files
    assert {name for name in there - copied if not name.startswith(".patcher")} == {
        *(f"intent_head/{version}/model.onnx" for version in (1, 2, 4)),
        *(f"intent_head/{version}/memory.safetensors" for version in (1, 2, 3, 4)),
        "other_head/1/model.onnx",
        "other_head/1/memory.safetensors",
    }


@pytest.mark.server
@pytest.mark.slow
def test_tunes_within_its_time_and_writes_only_what_won(classifier, tree):
    before, said = tree(classifier.root), []
    found = tune(classifier, TEXTS, seconds=6, concurrency=4, progress=said.append)
    assert found.trials
    assert said
    assert found.throughput > 1
    assert found.gain >= 1.0
    after = tree(classifier.root)
    changed = {name for name in after if after[name] != before.get(name)}
    if found.best == found.before:
        assert not changed
    else:
        assert changed <= {f"{model}/config.pbtxt" for model in MODELS}
        assert found.written
        assert serving_of(*map(parse, configs(classifier))) == found.best


@pytest.mark.server
def test_what_won_by_chance_is_told_and_not_written(classifier, tree, monkeypatch):
    from patcher import tune as module

    won, before, said = Serving(delay_us=100), tree(classifier.root), []

    def one(best, cores):
        yield "one", [won]

    monkeypatch.setattr(module, "candidates", one)
    ratios = iter([(1.5, 300.0), (0.75, 150.0)] * 2)
    monkeypatch.setattr(module._Search, "versus", lambda *_: next(ratios))
    monkeypatch.setattr(module._Search, "measure", lambda *_: 200.0)
    found = tune(classifier, TEXTS, seconds=300, concurrency=4, progress=said.append)
    assert said[-1] == "the best gives 0.75 of what there was before in a last comparison: it had won by chance"
    assert (found.best, found.gain, found.throughput, found.written) == (found.before, 1.0, 200.0, False)
    assert tree(classifier.root) == before
    found = tune(classifier, TEXTS, seconds=300, concurrency=4, response_cache=True)
    assert (found.best, found.written) == (found.before, True)  # the cache was switched on regardless
    after = tree(classifier.root)
    assert [name for name in after if after[name] != before.get(name)] == ["intent_encoder/config.pbtxt"]


@pytest.mark.server
def test_a_setting_that_does_not_load_is_passed_over(classifier, tmp_path, tree, monkeypatch):
    from patcher import tune as module

    bad, good = Serving(threads=1, slack=77), Serving(threads=1, delay_us=100)
    configs, load, tried = module._configs, TritonServer.load, []

    def remembered(found, serving, response_cache=None):
        tried.append(serving)
        return configs(found, serving, response_cache)

    def loaded(server, model):
        if tried[-1] == bad:
            raise ServerError("no memory left")
        load(server, model)

    def both(best, cores):
        yield "two", [bad, good]

    monkeypatch.setattr(module, "_configs", remembered)
    monkeypatch.setattr(TritonServer, "load", loaded)
    monkeypatch.setattr(module, "candidates", both)
    before = tree(classifier.root)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = tune(classifier, TEXTS, seconds=300, concurrency=2, write=False)
    assert list(tmp_path.glob("patcher-*")) == []
    assert [trial.ratio is None for trial in found.trials] == [True, False]
    assert found.throughput > 1
    assert tree(classifier.root) == before


@pytest.mark.server
def test_the_log_of_a_server_that_does_not_start_is_there_to_be_read(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (classifier.root / "intent_backbone" / "1" / "model.onnx").write_bytes(b"garbage")
    with pytest.raises(ServerError) as caught:
        tune(classifier, TEXTS, seconds=1)
    log = Path(str(caught.value).rpartition("The whole log: ")[2])
    assert "intent_backbone" in log.read_text()
    assert list(tmp_path.glob("patcher-*")) == [log.parent]


@pytest.mark.server
def test_interrupted_the_repository_is_as_it_was(classifier, tmp_path, tree):
    before = tree(classifier.root)
    texts = tiny.write_csv(tmp_path / "texts.csv", {"a": TEXTS})
    command = [sys.executable, "-m", "patcher", "tune", "--repo", str(classifier.root), "--input", str(texts)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        assert "now: 1 instance with a thread for each core" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 130
    assert tree(classifier.root) == before


def test_a_write_that_fails_halfway_puts_the_first_file_back(classifier, tree):
    before = tree(classifier.root)
    (classifier.root / "nobody").mkdir()
    with classifier.repository.lock(), pytest.raises(RepositoryError, match="nobody"):
        classifier.repository.write_configs({MODELS[0]: "x", "nobody": "y"})
    (classifier.root / "nobody").rmdir()
    assert tree(classifier.root) == before


def test_only_what_gives_features_may_have_a_response_cache(classifier):
    for model in MODELS:
        before = (classifier.root / model / "config.pbtxt").read_text()
        cached = with_response_cache(before, enable=True)
        assert parse(cached).response_cache.enable
        assert parse(with_response_cache(cached, enable=False)) == parse(before)
    for model in ("intent", "intent_head", "intent_tokenizer", "intent_features"):
        with pytest.raises(RepositoryError, match="is no encoder or backbone"):
            with_response_cache((classifier.root / model / "config.pbtxt").read_text(), enable=True)


def test_a_gpu_is_asked_for_by_the_names_that_triton_knows():
    tokens = ("input_ids", "attention_mask")
    backbone = backbone_config("b", tokens, 8, "f", device="gpu", tensorrt="FP16")
    text = model_config.render(backbone)
    assert "kind: KIND_GPU" in text
    assert parse(text).optimization.execution_accelerators.gpu_execution_accelerator[0].name == "tensorrt"
    encoder = parse(model_config.render(encoder_config("e", tokens, "b", 8, device="gpu")))
    assert encoder.instance_group[0].count == 2
    graphed = parse(model_config.render(encoder_config("e", tokens, "b", 8, device="gpu", graphs="1 x 8")))
    assert graphed.instance_group[0].count == 1
    assert encoder.instance_group[0].kind == type(encoder.instance_group[0]).KIND_CPU
    for device, tensorrt in (("tpu", ""), ("cpu", "FP16"), ("gpu", "warp")):
        with pytest.raises(InputError, match="expected"):
            backbone_config("b", tokens, 8, "f", device=device, tensorrt=tensorrt)


@pytest.mark.server
def test_a_backbone_for_gpus_is_warm_before_it_is_ready(classifier, tmp_path):
    from patcher.triton.server import EmbeddedTriton

    path = classifier.root / "intent_backbone" / "config.pbtxt"
    mine = parse(path.read_text())
    assert not mine.model_warmup  # on a CPU, warming up lengthened the start and made no answer faster
    tokens = [tensor.name for tensor in mine.input]
    asked = backbone_config("intent_backbone", tokens, classifier.width(), "f", device="gpu", longest=64)
    mine.model_warmup.extend(parse(model_config.render(asked)).model_warmup)
    path.write_text(str(mine))
    log = tmp_path / "log"
    with EmbeddedTriton(classifier.root, list(MODELS), log_file=log, options=["--log-verbose=1"]):
        said = log.read_text()
    for sample in ("1 x 8", "64 x 64"):  # not longer than any text: a backbone that fails on it would not load
        assert f"running warmup sample '{sample}'" in said


@pytest.mark.server
def test_cached_features_never_mix_head_versions(classifier):
    from patcher import add_label
    from patcher.lifecycle import rollback

    path = classifier.root / "intent_encoder" / "config.pbtxt"
    with classifier.repository.lock():
        classifier.repository.write_configs({"intent_encoder": with_response_cache(path.read_text(), enable=True)})
    options = cache_options(classifier.repository)
    assert options
    log = classifier.root.parent / "triton.log"
    models = ["intent", "intent_features"]
    with EmbeddedTriton(classifier.root, models, log_file=log, options=options) as triton, triton.client() as server:
        texts = tiny.sentences("payday", 5, seed=3)

        def ask():
            answers = server.classify("intent", texts)
            # If texts are asked one by one, their features come from the cache.
            return answers, [server.classify("intent", [text])[0] for text in texts for _ in range(2)]

        ask()
        (statistics,) = server.statistics("intent_encoder")
        assert statistics.inferences > statistics.executions  # some came from the cache
        add_label(classifier.repository, "payday", tiny.sentences("payday", 10), server=server)
        for answers in ask():
            assert {(each.head_version, each.labels[0], len(each.logits)) for each in answers} == {(2, "payday", 7)}
        rollback(classifier, server=server)
        for answers in ask():
            assert {(each.head_version, len(each.logits)) for each in answers} == {(1, 6)}


def test_a_server_with_many_cores_says_who_finds_their_use(classifier, monkeypatch):
    (line,) = advice(classifier.repository, 16)
    assert line.startswith("hint: intent_backbone runs as one session over 16 cores")
    assert advice(classifier.repository, 2) == []
    config = classifier.repository.config_text
    encoder, backbone = with_serving(
        config("intent_encoder"), config("intent_backbone"), Serving(instances=4, threads=4)
    )
    (classifier.root / "intent_encoder" / "config.pbtxt").write_text(encoder)
    (classifier.root / "intent_backbone" / "config.pbtxt").write_text(backbone)
    assert advice(classifier.repository, 16) == []


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("verb", ["serve", "tune"])
def test_a_backbone_for_a_gpu_is_refused_where_there_is_none(classifier, tmp_path, command, verb):
    model = classifier.backbone_model
    config = classifier.repository.config(model)
    config.instance_group[0].kind = config.instance_group[0].Kind.Value("KIND_GPU")
    with classifier.repository.lock():
        classifier.repository.write_configs({model: model_config.to_text(config)})
    texts = ["--input", tiny.write_csv(tmp_path / "texts.csv", {"a": TEXTS})] if verb == "tune" else []
    code, _, err = command(verb, "--repo", classifier.root, *texts)
    assert (code, f"{model} is for a GPU (`patcher export --device gpu`), and this machine has none" in err) == (
        1,
        True,
    )
