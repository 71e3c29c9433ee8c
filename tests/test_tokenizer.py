"""The tokenizer that runs inside Triton: its output, and that an invalid text does not affect the others."""

from __future__ import annotations

import ast
import json
import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import tritonclient.grpc as triton
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import soon
from tiny import tokenizer_json
from tokenizers import Tokenizer
from triton_models import only_python_based, tensor
from tritonclient.utils import InferenceServerException

from patcher import model_config
from patcher.configs import backbone_config
from patcher.errors import ServerError, ServerRefused
from patcher.triton.backends.onnxruntime import backbone
from patcher.triton.backends.onnxruntime import model as backend
from patcher.triton.backends.onnxruntime import settings as backend_settings
from patcher.triton.server import EmbeddedTriton
from patcher.triton.tokenizer import model as tokenizer_model
from patcher.triton.tokenizer.model import (
    MAX_BYTES,
    TextError,
    encode,
    graphed,
    graphed_shapes,
    like_lengths,
    read_text,
)

NAMES = ("input_ids", "attention_mask", "token_type_ids")
SOURCE = Path(tokenizer_model.__file__)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_str(tokenizer_json())


def test_pads_to_the_longest_as_tokenizer_json_says(tokenizer):
    tokens = encode(tokenizer, ["please tell me", "please"], NAMES)
    alone = tokenizer.encode("please tell me")
    assert {name: (value.dtype, value.shape) for name, value in tokens.items()} == dict.fromkeys(
        NAMES, (np.dtype(np.int64), (2, 5))
    )
    assert tokens["input_ids"][0].tolist() == alone.ids
    assert tokens["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert tokens["input_ids"][1, 3:].tolist() == [0, 0]
    assert not tokens["token_type_ids"].any()


def test_emits_what_is_asked_for_and_leaves_the_tokenizer_as_it_was(tokenizer):
    before = tokenizer.to_str()
    assert list(encode(tokenizer, ["a"], ["attention_mask"])) == ["attention_mask"]
    assert tokenizer.to_str() == before


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_token_and_multiple(side):
    tokenizer = Tokenizer.from_str(tokenizer_json())
    tokenizer.enable_padding(direction=side, pad_id=1, pad_token="[UNK]", pad_to_multiple_of=8)  # noqa: S106
    tokens = encode(tokenizer, ["please tell me", "please"], NAMES)
    assert tokens["input_ids"].shape == (2, 8)
    kept = slice(5, None) if side == "left" else slice(None, 3)
    assert tokens["input_ids"][1, kept].tolist() == tokenizer.encode("please").ids[kept]
    assert tokens["attention_mask"][1].sum() == 3
    assert set(tokens["input_ids"][1][tokens["attention_mask"][1] == 0].tolist()) == {1}


def test_an_empty_text_keeps_its_special_tokens_and_long_ones_are_cut(tokenizer):
    assert encode(tokenizer, [""], NAMES)["input_ids"].tolist() == [[2, 3]]
    assert encode(tokenizer, ["please " * 500], NAMES)["input_ids"].shape == (1, 64)


def test_a_text_without_any_token_becomes_one_of_padding():
    bare = Tokenizer.from_str(tokenizer_json())
    bare.post_processor = None
    assert encode(bare, [""], NAMES)["attention_mask"].tolist() == [[0]]


@settings(max_examples=200)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_together_is_as_alone_but_for_padding(texts):
    tokenizer = Tokenizer.from_str(tokenizer_json())
    together = encode(tokenizer, texts, NAMES)
    for row, text in enumerate(texts):
        alone = encode(tokenizer, [text], NAMES)
        length = alone["input_ids"].shape[1]
        for name in NAMES:
            assert (together[name][row, :length] == alone[name][0]).all()
        assert not together["attention_mask"][row, length:].any()


@settings(max_examples=300)
@given(st.binary(max_size=64))
def test_bytes_are_text_or_refused(value):
    try:
        expected = value.decode()
    except UnicodeDecodeError:
        with pytest.raises(TextError, match="not UTF-8"):
            read_text(value)
    else:
        assert read_text(value) == expected


def test_the_longest_text():
    assert len(read_text(b"x" * MAX_BYTES)) == MAX_BYTES
    with pytest.raises(TextError, match="1 MiB"):
        read_text(b"x" * (MAX_BYTES + 1))


def tokenizer_of(kind):
    """A tokenizer of the given kind, trained on a few sentences; it truncates texts to 16 tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    unknown = "<unk>"
    lines = ["where is my card", "my card was lost", "block the card, please", "卡片丢了。请帮我", "12 34 56"] * 3
    if kind == "words":
        made = Tokenizer(models.WordPiece(unk_token=unknown))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.train_from_iterator(lines, trainers.WordPieceTrainer(vocab_size=80, special_tokens=[unknown]))
    elif kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        made.post_processor = processors.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    elif kind == "pieces":
        made = Tokenizer(models.Unigram())
        made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        made.train_from_iterator(
            lines, trainers.UnigramTrainer(vocab_size=90, unk_token=unknown, special_tokens=[unknown])
        )
    else:  # the whole text is one word, as with Llama
        made = Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=120, special_tokens=[unknown]))
    made.enable_truncation(16)
    return made


@pytest.mark.parametrize("kind", ["words", "bytes", "pieces", "whole"])
@pytest.mark.parametrize("direction", ["right", "left"])
def test_a_long_text_gives_the_tokens_that_all_of_it_gives(kind, direction):
    made = tokenizer_of(kind)
    made.enable_truncation(16, direction=direction)
    drawn = random.Random(0)
    words = [
        "where",
        "is",
        "my",
        "card",
        "lost,",
        "please",
        "卡片丢了。",
        "12",
        "x" * 300,
        "\u0301",
        "  \n\n",
        "?!...",
        "ſﬁ",
    ]
    texts = ["", "card", " " * 5000 + "card", "x" * 5000, "卡片丢了" * 900, "?" * 3000, ("card" + " " * 900) * 30]
    texts += [" ".join(drawn.choices(words, k=drawn.randrange(2000))) for _ in range(30)]
    texts += ["".join(drawn.choices(words, k=drawn.randrange(2000))) for _ in range(30)]
    whole = made.encode_batch(texts)
    assert [(each.ids, each.attention_mask) for each in tokenizer_model.tokenize(made, texts)] == [
        (each.ids, each.attention_mask) for each in whole
    ]


@pytest.mark.parametrize("kind", ["words", "bytes", "pieces", "whole"])
def test_of_a_long_text_only_the_beginning_is_tokenized(kind):
    [found] = tokenizer_model.tokenize(tokenizer_of(kind), ["where is my card, please " * 40_000])
    assert len(found) == 16
    assert len(found.overflowing) < 20


def test_a_batch_takes_the_next_larger_shape_that_has_a_cuda_graph():
    shapes = graphed_shapes("1,4,16 x 16,8", 64)
    assert graphed(1, 8, shapes) == (1, 8)
    assert graphed(3, 9, shapes) == (4, 16)
    assert graphed(16, 1, shapes) == (16, 8)
    assert graphed(17, 8, shapes) == (17, 8)
    assert graphed(3, 17, shapes) == (3, 17)
    assert graphed(3, 5, graphed_shapes("", 64)) == (3, 5)
    assert graphed_shapes("1,4,16 x 8,12,16", 8, 8) == ([1, 4], [8, 16])
    for setting in ("1,2", "1 x 2 x 3", "one x 8"):
        with pytest.raises(ValueError, match=r"."):
            graphed_shapes(setting, 64)


@pytest.mark.server
def test_texts_padded_to_a_shape_have_the_same_features(tiny_original, tmp_path):
    root = shutil.copytree(tiny_original, tmp_path / "model_repository")
    texts = ["please", "how much money do I have on it today", "hello there", "what"] + ["a"] * 5
    found = []
    for setting in ("", "8,16 x 32"):
        if setting:
            path = root / "intent_encoder" / "config.pbtxt"
            path.write_text(
                path.read_text() + f'parameters {{ key: "cuda_graphs" value {{ string_value: "{setting}" }} }}\n'
            )
        models = ["intent_features", "intent_backbone"]
        log = tmp_path / "log"
        with (
            EmbeddedTriton(root, models, log_file=log, encoder_runs_backbone=False) as running,
            running.client() as client,
        ):
            found.append(client.features("intent_features", texts))
            (counted,) = client.statistics("intent_backbone")
    np.testing.assert_allclose(*found, atol=1e-5)
    assert counted.inferences == 16  # of 9 texts


def test_like_lengths_share_one_and_come_out_in_order():
    lengths = [(20, 1), (5, 1), (6, 1), (19, 2), (5, 1)]
    assert like_lengths(lengths, slack=0) == [[1, 4], [2], [3], [0]]
    assert like_lengths(lengths, slack=2) == [[1, 4, 2], [3, 0]]
    assert like_lengths(lengths, slack=1000) == [[1, 4, 2, 3, 0]]
    assert like_lengths(lengths, slack=1000, largest=2) == [[1, 4], [2, 3], [0]]
    assert like_lengths([(20, 1)] * 3, slack=0, most=800) == [[0, 1], [2]]
    assert like_lengths([(50, 1)], slack=0, most=40) == [[0]]
    assert like_lengths([], slack=2) == []
    # In pairs of tokens, padding two texts from 5 to 6 costs 2 x (36 - 25) = 22, and two from 19 to 20 cost 78.
    assert like_lengths(lengths, slack=22, power=2) == [[1, 4, 2], [3], [0]]
    assert like_lengths(lengths, slack=78, power=2) == [[1, 4, 2], [3, 0]]


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 8)), max_size=30),
    st.integers(0, 100),
    st.none() | st.integers(1, 8),
)
def test_no_text_is_cut_and_no_group_pads_more_than_allowed(lengths, slack, largest):
    found = like_lengths(lengths, slack, largest)
    assert sorted(place for group in found for place in group) == list(range(len(lengths)))
    every = [lengths[place][0] for group in found for place in group]
    assert every == sorted(every)
    for group in found:
        assert len(group) <= (largest or len(group))
        shared = lengths[group[-1]][0]
        assert sum((shared - lengths[place][0]) * lengths[place][1] for place in group) <= slack


def test_a_text_that_is_asked_for_again_alone_is_as_short_as_it_is(tokenizer, tmp_path, monkeypatch):
    """The backbone refuses two texts together; each is then sent alone, without the padding of the shared batch."""
    utils = SimpleNamespace(
        Tensor=lambda name, value: SimpleNamespace(name=name, value=value),
        InferenceResponse=lambda tensors: {tensor.name: tensor.value for tensor in tensors},
        get_input_tensor_by_name=lambda request, _: SimpleNamespace(as_numpy=lambda: np.array(request, dtype=object)),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    asked = []

    def run(_names, tensors):
        asked.append(tensors["input_ids"].tolist())
        if len(asked[-1]) > 1:
            raise RuntimeError("out of memory")
        return [np.full((1, 2), tensors["attention_mask"].sum(), np.float32)]

    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "tokenizer.json").write_text(tokenizer.to_str())
    parameters = {"backbone_model": "b", "token_inputs": "input_ids,attention_mask"}
    config = {"output": [], "parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    model = tokenizer_model.TritonPythonModel()
    model.initialize({"model_config": json.dumps(config), "model_repository": str(tmp_path), "model_version": "1"})
    model._run = run
    answers = model.execute([[b"please tell me"], [b"please"]])
    assert [answer["features"].tolist() for answer in answers] == [[[5, 5]], [[3, 3]]]
    together, *alone = asked
    assert [len(ids) for ids in together] == [5, 5]
    assert sorted(len(ids) for (ids,) in alone) == [3, 5]


def test_needs_nothing_that_nvidias_container_could_lack():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    allowed = {
        "__future__",
        "contextlib",
        "importlib.util",
        "json",
        "os",
        "pathlib",
        "re",
        "typing",
        "collections.abc",
        "numpy",
        "numpy.typing",
        "tokenizers",
    }
    assert imported <= allowed | {"triton_python_backend_utils"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer") / "model_repository"
    (root / "tok" / "1").mkdir(parents=True)
    shutil.copy(SOURCE, root / "tok" / "1" / "model.py")
    (root / "tok" / "1" / "tokenizer.json").write_text(tokenizer_json())
    (root / "tok" / "config.pbtxt").write_text(
        'name: "tok" backend: "python" max_batch_size: 64 '
        + tensor("input", "text", "STRING", 1)
        + tensor("output", "attention_mask", "INT64", -1)
        + tensor("output", "input_ids", "INT64", -1)
        + "instance_group { count: 1 kind: KIND_CPU } dynamic_batching { max_queue_delay_microseconds: 500000 }"
    )
    with EmbeddedTriton(root, ["tok"], log_file=root.parent / "log") as running:
        yield running


def tokenize(server, *texts):
    given_tensor = triton.InferInput("text", [len(texts), 1], "BYTES")
    given_tensor.set_data_from_numpy(np.array([[text] for text in texts], dtype=object))
    with triton.InferenceServerClient(server.url) as client:
        return client.infer("tok", [given_tensor])


@pytest.mark.server
def test_served_as_in_this_process_but_for_padding(server, tokenizer):
    requests = [("please tell me",), ("", "can you tell me the balance0 today"), ("Z\u00fcrich \U0001f600",), ("a",)]
    with ThreadPoolExecutor(len(requests)) as pool, server.client() as client:

        def joined():
            """Ask all at once; whether any shared a call, which needs them to arrive within half a second."""
            before = client.statistics("tok")[0]
            given = pool.map(lambda texts: tokenize(server, *(text.encode() for text in texts)), requests)
            answers.extend(zip(requests, given, strict=True))
            # Triton counts a call when it ends, which is after its answers.
            soon(lambda: client.statistics("tok")[0].successes >= before.successes + len(requests))
            after = client.statistics("tok")[0]
            assert after.successes - before.successes == len(requests)
            return after.executions - before.executions < len(requests)

        answers = []
        assert soon(joined)
    for texts, answer in answers:
        expected = encode(tokenizer, texts, ["input_ids", "attention_mask"])
        length = expected["input_ids"].shape[1]
        for name, value in expected.items():
            assert answer.as_numpy(name)[:, :length].tolist() == value.tolist()
        assert not answer.as_numpy("attention_mask")[:, length:].any()
        assert answer.as_numpy("token_type_ids") is None  # not declared


@pytest.mark.server
def test_a_text_that_cannot_be_tokenized_fails_its_own_request_alone(server):
    def outcome(text):
        try:
            return tokenize(server, text).as_numpy("input_ids").shape
        except InferenceServerException as error:
            return f"{error.status()}: {error.message()}"

    texts = [b"please", b"\xff\xfe", b"x" * (MAX_BYTES + 1), b"please tell me"]
    with ThreadPoolExecutor(len(texts)) as pool:
        good, not_utf8, too_long, good_too = pool.map(outcome, texts)
    assert good in ((1, 3), (1, 5))  # padded to its neighbour's length if they shared a call
    assert good_too == (1, 5)
    assert not_utf8.startswith("StatusCode.INVALID_ARGUMENT: ")
    assert "not UTF-8" in not_utf8
    assert "1048577 bytes; expected at most 1048576" in too_long


@pytest.fixture(scope="module", params=["runs the backbone", "asks for it"])
def encoder(tiny_original, tmp_path_factory, request):
    """A server that was told to load only the ensemble and that waits long enough for texts to share a batch."""
    runs = request.param == "runs the backbone"
    root = shutil.copytree(tiny_original, tmp_path_factory.mktemp("encoder") / "model_repository")
    path = root / "intent_encoder" / "config.pbtxt"
    message = model_config.parse(path.read_text())
    message.dynamic_batching.max_queue_delay_microseconds = 300_000
    message.parameters["largest_batch"].string_value = "4"
    path.write_text(text_format.MessageToString(message))
    log = root.parent / "log"
    with (
        EmbeddedTriton(root, ["intent_features"], log_file=log, encoder_runs_backbone=runs) as running,
        running.client() as client,
    ):
        client.runs = runs
        yield client


@pytest.mark.server
def test_the_encoder_gives_what_the_backbone_gives_in_batches_of_like_length(encoder, tmp_path):
    texts = [text for label in tiny.OLD for text in tiny.sentences(label, 2, seed=4)]
    requests = [texts[:1], texts[1:4], *([text] for text in texts[4:]), [""]]
    expected = tiny.encode(tmp_path, [text for request in requests for text in request])
    one = encoder.features("intent_features", requests[0])  # also loads the backbone, which was not loaded yet
    np.testing.assert_allclose(one, expected[:1], atol=1e-6)
    assert encoder.is_ready("intent_backbone") != encoder.runs
    with ThreadPoolExecutor(len(requests)) as pool:

        def joined():
            """Ask all at once; whether any shared a batch, which needs them to arrive within 0.3 seconds."""
            before = None if encoder.runs else encoder.statistics("intent_backbone")[0]
            answers = list(pool.map(lambda request: encoder.features("intent_features", request), requests))
            np.testing.assert_allclose(np.concatenate(answers), expected, atol=1e-6)
            if before is None:
                return True

            def more():
                after = encoder.statistics("intent_backbone")[0]
                return after.inferences - before.inferences, after.executions - before.executions

            soon(lambda: more()[0] >= len(expected))  # Triton counts an answer only after it has sent it
            assert more()[0] == len(expected)
            assert len(expected) / 4 <= more()[1]
            return more()[1] < len(requests)

        assert soon(joined)


@pytest.mark.server
def test_a_text_that_cannot_be_tokenized_costs_no_other_its_features(encoder):
    def outcome(texts):
        try:
            return encoder.features("intent_features", texts).shape
        except ServerRefused as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        good, bad, good_too = pool.map(outcome, (["please"], ["x" * (MAX_BYTES + 1)], ["a b c", "please tell me"]))
    assert (good, good_too) == ((1, tiny.WIDTH), (2, tiny.WIDTH))
    assert "expected at most 1048576" in bad


@pytest.mark.server
def test_without_its_backbone_each_request_gets_an_error(tiny_original, tmp_path):
    root = shutil.copytree(tiny_original, tmp_path / "model_repository")
    models = ["intent_features", "intent_backbone"]
    asking = EmbeddedTriton(root, models, log_file=tmp_path / "log", encoder_runs_backbone=False)
    with asking as running, running.client() as client:
        assert client.features("intent_features", ["please"]).shape == (1, tiny.WIDTH)
        client.unload("intent_backbone")
        assert soon(lambda: not client.is_ready("intent_backbone"))
        for texts in (["please"], ["please", "a b c"]):
            with pytest.raises(ServerError, match="'intent_backbone' is not ready"):
                client.features("intent_features", texts)
        client.load("intent_backbone")
        assert client.features("intent_features", ["please"]).shape == (1, tiny.WIDTH)


@pytest.mark.server
def test_who_comes_with_tokens_gets_the_features_that_the_encoder_finds(tiny_original, tmp_path):
    """The model of the backbone closes its session when the encoder runs the backbone, and opens it again if asked."""
    root = shutil.copytree(tiny_original, tmp_path / "model_repository")
    models = ["intent_features", "intent_backbone"]
    with EmbeddedTriton(root, models, log_file=tmp_path / "log") as running, running.client() as client:
        expected = client.features("intent_features", ["please tell me"])
        (statistics,) = client.statistics("intent_backbone")
        assert statistics.inferences == 0
        ids = Tokenizer.from_str(tiny.tokenizer_json()).encode("please tell me").ids
        given = [triton.InferInput(name, [1, len(ids)], "INT64") for name in tiny.TOKEN_INPUTS]
        given[0].set_data_from_numpy(np.array([ids]))
        given[1].set_data_from_numpy(np.ones((1, len(ids)), np.int64))
        with triton.InferenceServerClient(running.url) as other:
            for _ in range(2):
                found = other.infer("intent_backbone", given).as_numpy("features")
                assert found.tobytes() == expected.tobytes()


@pytest.mark.server
@pytest.mark.parametrize(
    "line, reason",
    [
        ('parameters { key: "intra_op_thread_count" value { string_value: "two" } }', "expected a whole number"),
        ('optimization { execution_accelerators { cpu_execution_accelerator { name: "x" } } }', "Accelerator 'x'"),
    ],
)
def test_runs_the_backbone_as_the_backbones_configuration_says(tiny_original, tmp_path, line, reason):
    root = shutil.copytree(tiny_original, tmp_path / "model_repository")
    with (root / "intent_backbone" / "config.pbtxt").open("a") as file:
        file.write(line)
    with pytest.raises(ServerError) as caught:
        EmbeddedTriton(root, ["intent_features"], log_file=tmp_path / "log").start()
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "before, after, gpu, instances, runs",
    [
        ("count: 1", "count: 1", False, 1, True),
        ("count: 1", "count: 1", True, 1, False),  # Triton may place it on the GPU
        ("count: 1", "count: 1 kind: KIND_CPU", True, 1, True),
        ("count: 1", "count: 1 kind: KIND_GPU", False, 1, False),  # there is no GPU
        ("count: 1", "count: 1", False, 2, False),  # two encoders would be two sessions
        ("count: 1", "count: 2", False, 2, True),
    ],
)
def test_runs_a_backbone_that_is_for_a_cpu(tiny_original, tmp_path, monkeypatch, before, after, gpu, instances, runs):
    (tmp_path / "gpu").touch()
    monkeypatch.setattr(backend_settings, "GPUS", (str(tmp_path / "gpu"),) if gpu else ())
    monkeypatch.setattr(backend_settings, "DEVICES", tmp_path)
    folder = shutil.copytree(tiny_original, tmp_path / "model_repository") / "intent_backbone"
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().replace(before, after))
    found = backend.runner(folder, instances)
    assert (found is not None) == runs
    if found:
        (features,) = found(["features"], {name: np.ones((1, 3), np.int64) for name in tiny.TOKEN_INPUTS})
        assert features.shape == (1, tiny.WIDTH)
    (folder / "2").mkdir()
    assert backend.runner(folder, instances) is None
    assert backend.runner(tmp_path / "intent_backbone") is None


TENSORRT = "optimization { execution_accelerators { gpu_execution_accelerator { name: 'tensorrt' } } }"


@pytest.mark.parametrize(
    "gpus, setting, instances, runs",
    [
        (1, "", 1, True),
        (1, "", 2, False),  # each would be another session
        (1, "1 x 8", 2, True),
        (0, "1 x 8", 1, False),
        (2, "1 x 8", 1, False),  # Triton has an instance on each GPU
        (1, TENSORRT, 1, False),
    ],
)
def test_runs_a_backbone_on_the_only_gpu(
    tiny_original, tmp_path, monkeypatch, capfd, *, gpus, setting, instances, runs
):
    for each in ("nvidiactl", *(f"nvidia{number}" for number in range(gpus))):
        (tmp_path / each).touch()
    monkeypatch.setattr(backend_settings, "DEVICES", tmp_path)
    folder = shutil.copytree(tiny_original, tmp_path / "model_repository") / "intent_backbone"
    config = folder / "config.pbtxt"
    graphs = f'parameters {{ key: "cuda_graphs" value {{ string_value: "{setting}" }} }}'
    more = graphs if setting == "1 x 8" else setting
    message = model_config.parse(config.read_text().replace("count: 1", "count: 1 kind: KIND_GPU") + more)
    asked = backbone_config("b", tiny.TOKEN_INPUTS, 8, "f", device="gpu")
    message.model_warmup.extend(model_config.parse(model_config.render(asked)).model_warmup)
    config.write_text(model_config.to_text(message))
    calls = []

    def opened(config, path, kind, device):
        assert path.is_file()
        return lambda names, inputs: calls.append((kind, device, names, {each.shape for each in inputs.values()}))

    monkeypatch.setattr(backbone, "open_runner", opened)
    assert (backend.runner(folder, instances) is not None) == runs
    assert calls == ([("GPU", 0, ["features"], {(1, 8)}), ("GPU", 0, ["features"], {(64, 128)})] if runs else [])
    monkeypatch.setattr(backbone, "open_runner", backend_refuses)
    assert backend.runner(folder, instances) is None
    assert ("does not run intent_backbone itself, but asks Triton for it: no CUDA" in capfd.readouterr().err) == runs


def backend_refuses(*_):
    raise backend_settings.LoadError("no CUDA")


def test_refuses_a_backbone_that_triton_would_refuse(tiny_original, tmp_path, monkeypatch):
    monkeypatch.setattr(backend_settings, "GPUS", ())
    folder = shutil.copytree(tiny_original, tmp_path / "model_repository") / "intent_backbone"
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().replace(f"dims: {tiny.WIDTH}", "dims: 7"))
    with pytest.raises(backend_settings.LoadError, match="the configuration specifies"):
        backend.runner(folder)


@pytest.mark.server
def test_a_backbone_whose_encoder_does_not_run_it_keeps_its_session(tiny_original, tmp_path, monkeypatch):
    """An encoder from 0.5 asks the model of the backbone, and its first answer does not wait for the file to load."""
    root = shutil.copytree(tiny_original, tmp_path / "model_repository")
    program = root / "intent_encoder" / "1" / "model.py"
    assert backend.BACKEND == tokenizer_model.BACKEND
    program.write_text(program.read_text().replace(backend.BACKEND, "NOT_KNOWN_THEN"))
    models = ["intent_features", "intent_backbone"]
    with EmbeddedTriton(root, models, log_file=tmp_path / "log") as running, running.client() as client:
        (root / "intent_backbone" / "1" / "model.onnx").unlink()
        assert client.features("intent_features", ["please"]).shape == (1, tiny.WIDTH)
        assert client.statistics("intent_backbone")[0].inferences == 1


@pytest.mark.server
@only_python_based("has it open from the start")
def test_a_backbone_that_cannot_be_opened_again_says_so(tiny_original, tmp_path):
    root = shutil.copytree(tiny_original, tmp_path / "model_repository")
    models = ["intent_features", "intent_backbone"]
    with EmbeddedTriton(root, models, log_file=tmp_path / "log") as running, running.client() as client:
        (root / "intent_backbone" / "1" / "model.onnx").write_bytes(b"other")
        given = [triton.InferInput(name, [1, 2], "INT64") for name in tiny.TOKEN_INPUTS]
        for each in given:
            each.set_data_from_numpy(np.ones((1, 2), np.int64))
        with triton.InferenceServerClient(running.url) as other:
            for _ in range(2):
                with pytest.raises(InferenceServerException, match="cannot read"):
                    other.infer("intent_backbone", given)
        assert client.features("intent_features", ["please"]).shape == (1, tiny.WIDTH)


@pytest.mark.server
def test_leaves_nothing_in_the_repository(server):
    assert sorted(path.name for path in server.repository.rglob("*") if path.is_file()) == [
        "config.pbtxt",
        "model.py",
        "tokenizer.json",
    ]
