"""Backbones in lower precision: what is converted, how much accuracy it may cost, and how it is configured."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import checkpoints  # noqa: E402  needs both
from transformers import AutoConfig  # noqa: E402

import export.precision  # noqa: E402
import export.stages  # noqa: E402
from export import run_export  # noqa: E402
from export.backbone import BackboneFile  # noqa: E402
from export.fusion import fuse  # noqa: E402
from export.precision import LIMITS, Limits, check_precision, sample  # noqa: E402
from patcher.cli import main  # noqa: E402
from patcher.errors import ExportError, InputError, PrecisionError  # noqa: E402
from patcher.head import Head  # noqa: E402
from patcher.model_config import parameter  # noqa: E402
from patcher.runtime import Encoder  # noqa: E402

WIDE = {"hidden_size": 128, "intermediate_size": 256}
"""Wide enough that 8-bit weights change the answers of a random model only a little."""
FILE = "\n".join(["text,label", *(f'"{text}",{label}' for text, label in checkpoints.TRAIN)])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A checkpoint with confident answers to ten sentences, because its last layer is fitted to them."""
    tokenizer = checkpoints.make_tokenizer()
    model = checkpoints.make_model("bert", tokenizer, **WIDE)
    tokens = tokenizer(list(checkpoints.SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        pooled = model.bert(**tokens).pooler_output
        wanted = 8 * torch.eye(5)[torch.arange(10) // 2]
        model.classifier.weight.copy_((torch.linalg.pinv(pooled, rtol=1e-3) @ wanted).T)
        model.classifier.bias.zero_()
    folder = tmp_path_factory.mktemp("bert") / "checkpoint"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.csv"
    path.write_text(FILE + "\n")
    return path


@pytest.fixture(scope="module", params=["int8", "fp16"])
def exported(request, bert, train, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param) / "model_repository"
    return request.param, run_export(bert, root, precision=request.param, train=train)


def encoder(report):
    classifier = report.repository.classifier()
    return Encoder(classifier.backbone_path, classifier.tokenizer_path, threads=1)


def test_the_features_are_nearly_those_of_fp32(exported, bert, tmp_path):
    precision, report = exported
    plain = encoder(run_export(bert, tmp_path / "model_repository")).encode(checkpoints.SENTENCES)
    ours = encoder(report).encode(checkpoints.SENTENCES)
    assert ours.dtype == np.float32
    off = np.sqrt(np.square(ours - plain).mean()) / plain.std()
    assert 0 < off < {"int8": 0.2, "fp16": 0.01}[precision]
    assert 0 < report.noise < LIMITS[precision].noise


def test_what_is_converted_and_what_is_not(exported):
    precision, report = exported
    model = onnx.load(report.repository.classifier().backbone_path)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    halves = [name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT16]
    assert {node.domain for node in model.graph.node} == {""}
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert {each.type.tensor_type.elem_type for each in model.graph.input} == {onnx.TensorProto.INT64}
    if precision == "int8":
        assert sum(node.op_type == "MatMulInteger" for node in model.graph.node) == 13  # six per layer, and the pooler
        assert not halves
        scales = [tensor for tensor in model.graph.initializer if tensor.name.endswith("_scale")]
        assert {tuple(tensor.dims) for tensor in scales} == {(128,), (256,)}
    else:
        assert len(halves) > 20
        made = {out: node for node in model.graph.node for out in node.output}
        (states,) = [node for node in model.graph.node if node.name == "/Mul"]
        assert made[states.input[0]].op_type == "Cast"  # the sum over tokens is FP32 again
    embeddings = [name for name in kinds if "word_embeddings" in name]
    expected = onnx.TensorProto.FLOAT if precision == "int8" else onnx.TensorProto.FLOAT16
    assert [kinds[name] for name in embeddings] == [expected]


def test_int8_keeps_onnxruntime_from_its_slow_kernel(bert, train, tmp_path, monkeypatch):
    def fused(name):
        report = run_export(bert, tmp_path / name, precision="int8", train=train)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(report.repository.classifier().backbone_path, options)
        kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
        return kinds.count("SkipLayerNormalization"), kinds.count("LayerNormalization")

    assert fused("ours") == (0, 5)  # two per layer, and the embeddings'
    monkeypatch.setattr(export.precision, "_keep_apart", lambda graph: None)
    assert fused("plain") == (4, 1)


def test_a_long_text_does_not_lift_the_mean_out_of_half_precision(exported):
    _, report = exported
    assert np.isfinite(encoder(report).encode(["card " * 500])).all()


def test_the_same_checkpoint_gives_the_same_bytes(exported, bert, tmp_path):
    precision, report = exported
    again = run_export(bert, tmp_path / "model_repository", precision=precision)
    assert again.fingerprint == report.fingerprint
    data = again.repository.classifier().backbone_path.read_bytes()
    for trace in (str(tmp_path), b"onnxruntime", b"onnx.quantize"):
        assert (trace.encode() if isinstance(trace, str) else trace) not in data


def test_the_cost_is_told_in_report_and_lineage(exported, train):
    precision, report = exported
    head = report.repository.classifier().head()
    found = head.lineage.details["checked"]
    assert (head.lineage.details["precision"], found["texts"], found["source"]) == (precision, 10, str(train))
    assert found["loss"] == found["accuracy_before"] - found["accuracy_after"]
    assert json.loads(json.dumps(report.to_json()))["checked"] == found
    assert f"{precision}: logits" in report.sentence()
    assert "before and" in report.sentence()


def test_the_memory_holds_features_of_the_precision_that_serves(exported):
    _, report = exported
    memory = report.repository.classifier().memory()
    features = encoder(report).encode(checkpoints.SENTENCES)
    np.testing.assert_allclose(memory.sums[0], features[:2].sum(axis=0), atol=1e-3)


def test_without_labelled_texts_the_accuracy_is_not_claimed(bert, tmp_path):
    report = run_export(bert, tmp_path / "model_repository", precision="int8")
    assert report.checked is None
    assert "accuracy not measured" in report.sentence()


def test_a_file_held_out_is_what_counts(bert, train, tmp_path):
    (tmp_path / "val.csv").write_text("\n".join(FILE.splitlines()[:7]) + "\n")
    options = {"precision": "int8", "train": train, "evaluation": tmp_path / "val.csv"}
    checked = run_export(bert, tmp_path / "model_repository", **options).checked
    assert (checked.texts, checked.source) == (6, str(tmp_path / "val.csv"))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits, reason", [(Limits(1e-9, 1, 1), "the logits move by"), (None, "changes the answer")])
def test_too_few_bits_are_refused_and_nothing_is_written(bert, train, tmp_path, monkeypatch, limits, reason):
    if limits:
        monkeypatch.setitem(export.stages.LIMITS, "int8", limits)
    else:
        honest = export.stages.convert

        def rough(backbone, precision, path):
            """Weights of one bit and a sign."""
            made = honest(backbone, precision, path)
            model = onnx.load(path)
            for tensor in model.graph.initializer:
                if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2:
                    signs = np.sign(onnx.numpy_helper.to_array(tensor)) * 40
                    tensor.CopyFrom(onnx.numpy_helper.from_array(signs.astype(np.int8), tensor.name))
            onnx.save(model, path)
            return made

        monkeypatch.setattr(export.stages, "convert", rough)
        monkeypatch.setitem(export.stages.LIMITS, "int8", Limits(99, 1, 0.03))
    with pytest.raises(PrecisionError, match=reason) as caught:
        run_export(bert, tmp_path / "model_repository", precision="int8", train=train)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "model_repository").exists()


def two_rows():
    return Head.from_linear(("a", "b"), np.eye(2, dtype=np.float32), np.zeros(2, np.float32), 2, "none")


@pytest.mark.parametrize("wrong, refused", [(0, False), (1, False), (2, True)])
def test_one_text_may_always_change_but_not_two_of_a_hundred(wrong, refused):
    before = np.tile(np.array([[1.0, 0.0]], np.float32), (100, 1))
    after = before.copy()
    after[:wrong] = after[:wrong, ::-1]
    ids = [[0]] * 100
    if refused:
        with pytest.raises(PrecisionError, match=r"costs 2.00 % of accuracy .*on 100 texts of file") as caught:
            check_precision("int8", two_rows(), before, after, ids, "file")
        assert caught.value.report["loss"] == pytest.approx(0.02)
    else:
        found = check_precision("int8", two_rows(), before, after, ids, "file")
        assert (found.agreement, found.loss) == (1 - wrong / 100, pytest.approx(wrong / 100))


def test_a_change_that_gains_as_much_as_it_loses_still_counts():
    before = np.tile(np.array([[1.0, 0.0]], np.float32), (100, 1))
    after = before.copy()
    after[:10] = after[:10, ::-1]
    ids = [[0]] * 5 + [[1]] * 5 + [[0]] * 90
    with pytest.raises(PrecisionError, match=r"changes the answer to 10.00 % of the texts"):
        check_precision("int8", two_rows(), before, after, ids, "file")


def test_the_sample_of_the_training_texts_is_drawn_of_all_and_bounded():
    for count in (1, 1999, 2000, 2001, 13500):
        chosen = sample(count)
        assert len(set(chosen.tolist())) == len(chosen) == min(count, 2000)
        assert 0 <= chosen.min() <= chosen.max() < count
    # A file that cycles through seven labels: taking every seventh text would give a single label.
    assert np.bincount(sample(14000) % 7).min() > 200


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"device": "tpu"}, "no device 'tpu'; expected cpu, gpu"),
        ({"device": "gpu", "precision": "int8"}, "int8 is made for CPUs"),
        ({"tensorrt": True}, "expected the device gpu"),
    ],
)
def test_targets_that_make_no_sense(bert, tmp_path, options, reason):
    with pytest.raises(InputError, match=reason):
        run_export(bert, tmp_path / "model_repository", **options)
    assert not (tmp_path / "model_repository").exists()


# --- GPUs: what is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensorrt", [False, True])
def test_a_gpu_gets_the_backbone_in_half_precision_and_nothing_else(bert, tmp_path, tensorrt):
    report = run_export(bert, tmp_path / "model_repository", device="gpu", tensorrt=tensorrt)
    assert (report.precision, report.device) == ("fp16", "gpu")
    config = report.repository.config
    kinds = {part: [group.kind for group in config(f"intent_{part}").instance_group] for part in ("backbone", "head")}
    group = config("intent_backbone").instance_group[0]
    assert kinds == {"backbone": [group.KIND_GPU], "head": [group.KIND_CPU]}
    assert config("intent_encoder").instance_group[0].kind == group.KIND_CPU
    accelerators = config("intent_backbone").optimization.execution_accelerators.gpu_execution_accelerator
    assert [(each.name, dict(each.parameters)) for each in accelerators] == (
        [("tensorrt", {"precision_mode": "FP16"})] if tensorrt else []
    )
    assert not config("intent_head").HasField("optimization")
    nodes = onnx.load(report.repository.classifier().backbone_path).graph.node
    assert any(node.domain for node in nodes) != tensorrt  # TensorRT does not know ONNX Runtime's own operators
    shapes = [parameter(config(f"intent_{part}"), "cuda_graphs", "") for part in ("encoder", "backbone")]
    # The checkpoint takes 80 tokens, so no longer shape is recorded.
    assert shapes == ["" if tensorrt else "1,2,4,8,16,24,32,48,64 x 8,16,24,32,48,64"] * 2


def test_the_command_line_passes_it_all_on(bert, train, tmp_path, capsys):
    arguments = ["export", str(bert), "--repo", str(tmp_path / "r"), "--train", str(train), "--eval", str(train)]
    assert main([*arguments, "--precision", "int8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["precision"], document["device"], document["checked"]["texts"]) == ("int8", "cpu", 10)
    assert main([*arguments, "--name", "other", "--device", "gpu", "--precision", "int8", "--json"]) == 2
    assert "int8 is made for CPUs" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("debug", ["1", ""])
def test_why_operators_are_not_fused_shows_whole_only_when_asked_for(bert, tmp_path, monkeypatch, capsys, debug):
    monkeypatch.setenv("PATCHER_DEBUG", debug)
    path = tmp_path / "backbone.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ExportError, match="optimizer fails on this graph"):
        fuse(BackboneFile(path, "", ()), AutoConfig.from_pretrained(bert), tmp_path / "fused.onnx", left=False)
    assert ("Traceback" in capsys.readouterr().err) == bool(debug)
