"""The serving benchmarks measure what they claim to; run on a small scale."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import tiny

from patcher.measurement import Measurement
from patcher.runtime import Encoder, open_session, run_head
from tests.benchmarks import gpu, serving, serving_swaps
from tests.benchmarks.serving_monolith import TOKENS, WHOLE, add_contenders, merged, with_tritons_defaults

TEXTS = [text for label in tiny.OLD for text in tiny.sentences(label, 5)]


def test_the_merged_graph_answers_as_the_two_halves(classifier):
    head_path = classifier.version_path(1) / "model.onnx"
    whole = ort.InferenceSession(merged(classifier.backbone_path, head_path))
    rows = serving.token_rows(classifier, TEXTS[:3])
    encoder, head = Encoder(classifier.backbone_path, classifier.tokenizer_path), open_session(head_path)
    for text, row in zip(TEXTS, rows, strict=False):
        feed = {name: np.array([each["content"]], dtype=np.int64) for name, each in row.items()}
        answer = dict(zip([output.name for output in whole.get_outputs()], whole.run(None, feed), strict=True))
        expected = run_head(head, encoder.encode([text]))
        assert np.allclose(answer["logits"], expected.logits, atol=1e-4)
        assert answer["label"].tolist() == expected.labels.tolist()


@pytest.mark.server
@pytest.mark.slow
def test_every_contender_is_served_in_turns_and_summed_up(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "LEVELS", (2,))
    monkeypatch.setattr(serving, "REST", 0)
    plain = serving.copied(classifier.root, tmp_path / "plain")
    with_tritons_defaults(plain)
    assert plain.repository.config("intent_backbone").instance_group[0].count == 2
    outside = {}
    with serving.in_process({"": classifier}, None, TEXTS, outside) as once:
        asking = serving.copied(classifier.root, tmp_path / "asking")
        others = {serving.DEFAULTS: plain, serving.ASKING: asking}
        measured = serving.served({"": classifier, **others}, TEXTS, 2, 0.2, once)
    titles = [serving.titled("intent", each) for each in others]
    assert sorted(each.model for each in measured) == sorted(["intent", WHOLE, TOKENS, *titles] * 2 + ["intent"] * 2)
    assert [each.request_rate for each in measured if each.request_rate] == [measured[-1].request_rate] * 2
    assert not any(each.failures for each in measured)
    assert {step.model for each in measured if each.model == WHOLE for step in each.steps} == {
        "intent_tokenizer", "whole_model"
    }  # fmt: skip
    steps = {each.model: {step.model for step in each.steps} for each in measured}
    assert steps["intent"] == {"intent_encoder", "intent_head"}
    assert all(steps[title] == {"intent_encoder", "intent_backbone", "intent_head"} for title in titles)
    assert len(outside[serving.LIMIT]) == 2
    rows = serving.summary({serving.LIMIT: outside[serving.LIMIT]}, measured, "intent")
    assert len(rows) == 7
    for ratio in ("of the whole", "of the defaults", "of asking", "of the limit"):
        assert rows[1][f"{ratio}, low"] <= rows[1][ratio] <= rows[1][f"{ratio}, high"]
    assert rows[-1]["p99 / p50"] >= 1
    assert serving.table(rows).count("\n") == 8


def test_ratios_are_taken_round_by_round():
    def measured(model, throughput):
        return Measurement(model, 4, None, throughput, 1e3, 2e3, 3e3, 0, ())

    found = [measured("intent", 97.0), measured(WHOLE, 100.0), measured("intent", 50.0), measured(WHOLE, 50.0)]
    rows = serving.summary({serving.LIMIT: [200.0, 100.0]}, found, "intent")
    assert rows[1]["of the whole"] == pytest.approx(0.985)
    assert rows[1]["of the limit"] == pytest.approx((0.485 + 0.5) / 2)


@pytest.mark.server
@pytest.mark.slow
def test_swapping_heads_under_load_fails_nothing(classifier):
    for seconds in (2, 4, 8):  # again if the machine stood still meanwhile
        found = serving_swaps.measure(classifier, TEXTS, seconds=seconds, concurrency=4, window=seconds)
        assert found["failures"] == 0
        if found["swaps"] >= 2 and found["texts/s while swapping"] > 0.3 * found["texts/s undisturbed"]:
            break
    assert found["swaps"] >= 2
    assert 0 < found["seconds a swap without load, median"] < found["seconds from start to ready, median"] * 20
    assert found["texts/s while swapping"] > 0.3 * found["texts/s undisturbed"]


def test_add_contenders_leaves_the_classifier_alone(classifier, tree):
    before = tree(classifier.root)
    add_contenders(classifier)
    after = tree(classifier.root)
    assert {name: after[name] for name in before} == before


@pytest.mark.server
@pytest.mark.slow
def test_a_gpus_benchmark_runs_where_there_is_none(tmp_path):
    pytest.importorskip("transformers")
    import checkpoints

    checkpoint = checkpoints.save_checkpoint(tmp_path / "checkpoint", "bert")
    classifier, graphs = gpu.exported(checkpoint, tmp_path, "KIND_CPU")
    (plain, _), (fused, fast) = graphs.items()
    assert plain == "plain operators"
    assert all(each > 0 for each in gpu.stream(fast, "KIND_CPU", shapes=3).values())
    rows = gpu.streams({fused: fast}, "KIND_CPU")
    assert [row["what"] for row in rows] == [fused + way for way in ("", ", cuDNN's attention", ", CUDA graphs")]
    found = gpu.served(classifier, TEXTS, 1, 0.2, [2])
    assert [each["what"] for each in found["rows"]] == ["intent, concurrency 2", "whole, concurrency 2"]
    assert not any(each["failures"] for each in found["rows"])
    assert "| intent, concurrency 2 |" in gpu.table(found["rows"])
    assert found["of the whole"][0]["ratio"] > 0
