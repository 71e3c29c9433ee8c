"""Each supported architecture: its last layer is found, and the exported files answer as the checkpoint does."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import checkpoints  # noqa: E402  needs both

import export.stages  # noqa: E402
from export import run_export  # noqa: E402
from patcher import configs  # noqa: E402
from patcher.errors import CheckpointError, ExportError, ParityError  # noqa: E402
from patcher.runtime import Encoder, open_session, run_head  # noqa: E402

TEXTS = [
    "hi",
    "I lost my card",
    "please send twenty euros to my landlord today, and tell me the balance of my account afterwards",
    "what are the opening hours of the branch in town on saturdays?",
    "good morning",
    "zebra quagga",
    "block my card " * 12,
]


@pytest.fixture(scope="module", params=[*checkpoints.ARCHITECTURES, "multi-label"])
def exported(request, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp(request.param)
    settings = {"problem_type": "multi_label_classification"} if request.param == "multi-label" else {}
    name = "bert" if settings else request.param
    folder = checkpoints.save_checkpoint(tmp_path / "checkpoint", name, **settings)
    return name, folder, run_export(folder, tmp_path / "model_repository")


def test_the_files_answer_as_the_checkpoint_does(exported):
    name, folder, report = exported
    assert report.layer == checkpoints.ARCHITECTURES[name][3]
    classifier = report.repository.classifier()
    encoder = Encoder(classifier.backbone_path, classifier.tokenizer_path, threads=1)
    head = open_session(classifier.version_path(1) / "model.onnx", threads=1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batches = [[text] for text in TEXTS]
    if model.config.pad_token_id is not None:
        batches += [TEXTS[:3], TEXTS]
    for texts in batches:
        with torch.no_grad():
            expected = model(**tokenizer(texts, padding=len(texts) > 1, return_tensors="pt")).logits.numpy()
        answer = run_head(head, encoder.encode(texts))
        np.testing.assert_allclose(answer.logits, expected, atol=1e-4, rtol=0)
        assert answer.labels[:, 0].tolist() == [checkpoints.LABELS[i] for i in expected.argmax(axis=1)]
        assert answer.version == 1


def test_a_text_alone_and_in_company_gets_the_same_features(exported):
    _, _, report = exported
    classifier = report.repository.classifier()
    encoder = Encoder(classifier.backbone_path, classifier.tokenizer_path, threads=1)
    together = encoder.encode([*TEXTS, ""])
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert together.shape == (len(TEXTS) + 1, report.width)
    np.testing.assert_allclose(together[:-1], alone, atol=1e-4)
    assert np.isfinite(together[-1]).all()
    assert np.isfinite(encoder.encode([""])).all()


PADDED = ("xlnet", "gpt2")
"""Padding is computed: XLNet's tensors do not start with the batch, and GPT-2's products are Gemms of reshaped ones."""


def test_products_with_weights_are_not_computed_for_padding(exported):
    name, _, report = exported
    classifier = report.repository.classifier()
    model = onnx.load(classifier.backbone_path)
    weights = {each.name for each in model.graph.initializer if len(each.dims) == 2}
    products = [node.output[0] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    told = onnx.ModelProto()
    told.CopyFrom(model)
    told.graph.output.extend(onnx.ValueInfoProto(name=each) for each in products)
    session = onnxruntime.InferenceSession(told.SerializeToString(), providers=["CPUExecutionProvider"])
    mask = np.arange(20)[None, :] < np.array([20, 3, 1])[:, None]
    tokens = {each.name: mask.astype(np.int64) for each in session.get_inputs()}
    shapes = {each.shape[:2] for each in session.run(None, tokens)[1:] if each.ndim == 3}
    settings = report.repository.config(classifier.text_model).parameters
    assert report.to_json()["unpadded"] == (name not in PADDED)
    if name in PADDED:
        assert shapes <= {(3, 20), (20, 3)}
        assert "padding_power" not in settings
    else:
        assert shapes == {(1, 24)}
        assert settings["padding_power"].string_value == "2"


def test_the_calls_that_warm_a_gpu_up_are_answered(exported):
    name, _, report = exported
    classifier = report.repository.classifier()
    tokens = [each.name for each in report.repository.config(classifier.backbone_model).input]
    asked = configs.backbone_config("b", tokens, report.width, "f", device="gpu", longest=report.max_length)
    session = open_session(classifier.backbone_path, threads=1)
    for shape in asked.warmup:
        assert shape[1] <= report.max_length
        zeros = dict.fromkeys(tokens, np.zeros(shape, np.int64))
        assert session.run(["features"], zeros)[0].shape == (shape[0], report.width), name


ATTENTIONS = dict.fromkeys(checkpoints.ARCHITECTURES, 0)
ATTENTIONS |= {"bert": 2, "roberta": 2, "xlm-roberta": 2, "distilbert": 2, "electra": 2, "albert": 1}
"""Number of fused attentions of two layers; ALBERT's layers share weights, and only the first is recognised."""


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_gpu_gets_fused_operators_that_answer_alike(name, tmp_path):
    folder = checkpoints.save_checkpoint(tmp_path / "checkpoint", name)
    told: list[str] = []
    report = run_export(folder, tmp_path / "gpu", device="gpu", precision="fp32", progress=told.append)
    path = report.repository.classifier().backbone_path
    model = onnx.load(path)
    ours = [node.op_type for node in model.graph.node if node.domain == "com.microsoft"]
    assert ours.count("Attention") == ATTENTIONS[name]
    assert bool(ours) == any("in fused operators" in line for line in told) == bool(ATTENTIONS[name])
    assert bool(ours) != any(line.startswith("fused operators are left out: ONNX Runtime") for line in told)
    assert {(each.domain, each.version) for each in model.opset_import} <= {("", 17), ("com.microsoft", 1)}

    plain = run_export(folder, tmp_path / "cpu").repository.classifier()
    features = [
        Encoder(each, plain.tokenizer_path, threads=1).encode([*TEXTS, ""]) for each in (path, plain.backbone_path)
    ]
    np.testing.assert_allclose(*features, atol=1e-4)
    half = run_export(folder, tmp_path / "half", device="gpu")
    assert half.noise < 0.01
    halved = [node.op_type for node in onnx.load(half.repository.classifier().backbone_path).graph.node if node.domain]
    assert halved == ours


def test_fused_attention_sees_padding_that_comes_first(tmp_path):
    folder = checkpoints.save_checkpoint(tmp_path / "checkpoint", "bert")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    options = {"tokenizer": tokenizer, "precision": "fp32"}
    fused = run_export(model, tmp_path / "gpu", device="gpu", **options).repository.classifier()
    assert "Attention" in {node.op_type for node in onnx.load(fused.backbone_path).graph.node}
    plain = run_export(model, tmp_path / "cpu", **options).repository.classifier()
    features = [Encoder(each.backbone_path, each.tokenizer_path, threads=1).encode(TEXTS) for each in (fused, plain)]
    np.testing.assert_allclose(*features, atol=1e-4)


def test_the_same_model_gets_the_same_fused_bytes(tmp_path):
    folder = checkpoints.save_checkpoint(tmp_path / "checkpoint", "bert")
    first, second = (run_export(folder, tmp_path / each, device="gpu") for each in ("first", "second"))
    assert first.fingerprint == second.fingerprint


def test_fused_operators_that_cannot_be_halved_are_left_out(tmp_path, monkeypatch):
    folder = checkpoints.save_checkpoint(tmp_path / "checkpoint", "bert")
    honest = export.stages.convert

    def convert(backbone, precision, path):
        if backbone.path.name == "fused.onnx":
            raise ExportError("no shapes")
        return honest(backbone, precision, path)

    monkeypatch.setattr(export.stages, "convert", convert)
    told: list[str] = []
    report = run_export(folder, tmp_path / "r", device="gpu", progress=told.append)
    assert "fused operators are left out: no shapes" in told
    assert {node.domain for node in onnx.load(report.repository.classifier().backbone_path).graph.node} == {""}
    assert (report.precision, report.noise < 0.01) == ("fp16", True)


@pytest.mark.parametrize("how", ["wrong", "broken"])
def test_fused_operators_that_answer_otherwise_are_left_out(how, tmp_path, monkeypatch):
    folder = checkpoints.save_checkpoint(tmp_path / "checkpoint", "bert")
    honest = export.stages.fuse

    def wrong(backbone, config, path, *, left):
        """Fuse without the mask, so that attention takes padding for text; or with a mask that does not exist."""
        made = honest(backbone, config, path, left=left)
        model = onnx.load(path)
        for node in model.graph.node:
            if node.op_type == "Attention":
                node.input[3] = "" if how == "wrong" else "nowhere"
        onnx.save(model, path)
        return made

    monkeypatch.setattr(export.stages, "fuse", wrong)
    told: list[str] = []
    report = run_export(folder, tmp_path / "r", device="gpu", progress=told.append)
    assert any(line.startswith("fused operators are left out: ") and "no fused" not in line for line in told)
    assert {node.domain for node in onnx.load(report.repository.classifier().backbone_path).graph.node} == {""}


def test_the_file_is_what_old_runtimes_load(exported):
    _, _, report = exported
    classifier = report.repository.classifier()
    model = onnx.load(classifier.backbone_path)
    config = report.repository.config(classifier.backbone_model)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]
    assert model.ir_version == 8
    assert {node.domain for node in model.graph.node} == {""}
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert {each.name for each in model.graph.input} == {each.name for each in config.input}
    for each in model.graph.input:
        assert [dim.dim_param for dim in each.type.tensor_type.shape.dim] == ["batch", "sequence"]
    (features,) = model.graph.output
    batch, width = features.type.tensor_type.shape.dim
    assert (features.name, batch.dim_param, width.dim_value) == ("features", "batch", report.width)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_padding_goes_where_it_changes_no_answer(architecture, tmp_path):
    # Both count positions from the left edge of the batch, including padding.
    tokenizer = checkpoints.make_tokenizer(checkpoints.ARCHITECTURES[architecture][2])
    tokenizer.padding_side = "left"
    report = run_export(checkpoints.make_model(architecture, tokenizer), tmp_path / "repository", tokenizer=tokenizer)
    classifier = report.repository.classifier()
    encoder = Encoder(classifier.backbone_path, classifier.tokenizer_path, threads=1)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(encoder.encode(TEXTS), alone, atol=1e-4)


def test_a_model_that_sees_padding_is_refused(tmp_path, monkeypatch):
    tokenizer = checkpoints.make_tokenizer()
    model = checkpoints.make_model("bert", tokenizer)
    forward = model.forward

    def unmasked(input_ids, attention_mask, token_type_ids, **settings):
        return forward(input_ids, torch.ones_like(attention_mask), token_type_ids, **settings)

    monkeypatch.setattr(model, "forward", unmasked)
    with pytest.raises(CheckpointError, match="answers a text otherwise when padding follows or precedes it"):
        run_export(model, tmp_path / "repository", tokenizer=tokenizer)
    assert not (tmp_path / "repository").exists()


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


@pytest.mark.parametrize(
    "prefix, settings, message",
    [
        # Its convolution reads a few tokens past the text's end; in a single sentence that could pass for rounding.
        ("ConvBert", {**_SMALL, "embedding_size": 16}, "answers a text otherwise when padding follows"),
        ("BigBird", _SMALL, "block-sparse .* set attention_type to original_full"),
        ("Canine", _SMALL, "embeds words with no table"),
        ("Bart", _BART, "is a bart, which encodes a text and decodes it again"),
    ],
)
def test_a_model_that_cannot_be_split_truly_is_refused(prefix, settings, message, tmp_path):
    tokenizer = checkpoints.make_tokenizer()
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=len(tokenizer), num_labels=5, max_position_embeddings=80, **settings
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * 0.1)
    with pytest.raises(CheckpointError, match=message):
        run_export(model, tmp_path / "repository", tokenizer=tokenizer)
    assert not (tmp_path / "repository").exists()


def long_decoder(prefix, **settings):
    """A decoder of 96 positions or more, and a tokenizer without a limit of its own."""
    kind = "gpt2" if prefix == "OPT" else "qwen2"
    tokenizer = checkpoints.make_tokenizer(kind)
    tokenizer.model_max_length = 10**30
    names = {"id2label": dict(enumerate(checkpoints.LABELS)), "vocab_size": len(tokenizer), "pad_token_id": 1}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96}
    config = getattr(transformers, f"{prefix}Config")(**{**names, **sizes, **settings})
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}ForSequenceClassification")(config).eval(), tokenizer


def test_a_model_that_takes_long_texts_in_another_way_is_refused(tmp_path, capfd):
    # Its rotary frequencies change beyond this many tokens, which a trace of a short text does not contain.
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 384}
    model, tokenizer = long_decoder("Llama", rope_parameters=rope, **sizes)
    torch.nn.init.normal_(model.model.embed_tokens.weight)  # so that words differ enough for their order to matter
    for name, weights in model.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(weights, std=0.3)
    capfd.readouterr()  # training the tokenizer wrote blank lines
    with pytest.raises(ParityError, match=r"on a batch of 1 texts of 2048 tokens; .*--max-length"):
        run_export(model, tmp_path / "repository", tokenizer=tokenizer)
    report = run_export(model, tmp_path / "repository", tokenizer=tokenizer, max_length=384)
    assert report.max_length == 384
    assert not capfd.readouterr().out


def test_positions_that_begin_behind_some_rows_are_counted(tmp_path):
    model, tokenizer = long_decoder("OPT", ffn_dim=64, word_embed_proj_dim=32)
    assert run_export(model, tmp_path / "repository", tokenizer=tokenizer).max_length == 96


def test_torch_says_nothing_on_stdout_of_a_model_that_it_cannot_export(tmp_path, capfd):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope["original_max_position_embeddings"] = 384
    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "original_max_position_embeddings": 384}
    sizes["max_position_embeddings"] = 384
    model, tokenizer = long_decoder("Phi3", rope_parameters=rope, **sizes)
    capfd.readouterr()  # training the tokenizer wrote blank lines
    with pytest.raises(ExportError, match="torch cannot export Phi3ForSequenceClassification"):
        run_export(model, tmp_path / "repository", tokenizer=tokenizer)
    assert not capfd.readouterr().out


def test_long_texts_go_through_a_few_at_a_time(tmp_path, monkeypatch):
    report = run_export(checkpoints.save_checkpoint(tmp_path / "checkpoint"), tmp_path / "repository")
    classifier = report.repository.classifier()
    encoder = Encoder(classifier.backbone_path, classifier.tokenizer_path, threads=1)
    together = encoder.encode(TEXTS)
    monkeypatch.setattr("patcher.triton.tokenizer.model.MOST_PAIRS", 2 * 40**2)
    seen = []
    run = encoder._session.run
    encoder._session = type("Session", (), {"run": lambda _, n, x: seen.append(x["input_ids"].shape) or run(n, x)})()
    np.testing.assert_allclose(encoder.encode(TEXTS), together, atol=1e-5)
    assert sum(rows for rows, _ in seen) == len(TEXTS)
    assert all(rows == 1 or rows * tokens**2 <= 2 * 40**2 for rows, tokens in seen)
    assert len(seen) > 1
