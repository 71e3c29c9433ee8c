"""A classifier small enough for tests, made without torch: an embedding backbone, a fitted head, real files.

Sentences consist of a few key words of their label and filler words. Embeddings are random, so that all labels can be
told apart, including new ones.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import secrets
import socket
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from patcher.head import SINGLE_LABEL, Head
from patcher.layout import BackboneFiles
from patcher.memory import Memory
from patcher.repository import ModelRepository
from patcher.runtime import Encoder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patcher.classifier import Classifier

OLD = ("balance", "transfer", "weather", "music", "alarm", "travel")
NEW = ("payday", "pizza", "holiday")
WORDS_A_LABEL = 8
FILLERS = [
    "please",
    "can",
    "you",
    "tell",
    "me",
    "the",
    "what",
    "is",
    "my",
    "a",
    "of",
    "to",
    "for",
    "now",
    "today",
    "and",
    "so",
]
WIDTH = 48
SPLIT = 24
TOKEN_INPUTS = ("input_ids", "attention_mask")


def words(label: str) -> list[str]:
    return [f"{label}{number}" for number in range(WORDS_A_LABEL)]


def sentences(label: str, count: int, seed: int = 0) -> list[str]:
    """``count`` different sentences of a label; other seeds give other sentences."""
    rng = np.random.default_rng([seed, *label.encode()])
    made: dict[str, None] = {}
    while len(made) < count:
        chosen = [*rng.choice(words(label), 3, replace=False), *rng.choice(FILLERS, rng.integers(1, 9))]
        made[" ".join(rng.permutation(chosen).tolist())] = None
    return list(made)


def write_csv(path: Path, examples: Mapping[str, Sequence[str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((text, label) for label, texts in examples.items() for text in texts)
    return path


def tokenizer_json() -> str:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS, *(w for label in OLD + NEW for w in words(label))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")  # noqa: S106  a token of the tokenizer's
    tokenizer.enable_truncation(64)
    return str(tokenizer.to_str())


def backbone_onnx(seed: int = 0) -> bytes:
    """input_ids, attention_mask -> features: tanh of a projection of the mean embedding, then the mean itself."""
    rng = np.random.default_rng(seed)
    vocabulary = 4 + len(FILLERS) + WORDS_A_LABEL * len(OLD + NEW)
    # Words of one label are close to each other, as in a trained model, and filler words carry little information.
    embedding = rng.standard_normal((vocabulary, WIDTH - SPLIT)).astype(np.float32) * 0.5
    embedding[: 4 + len(FILLERS)] *= 0.2
    embedding[4 + len(FILLERS) :] += np.repeat(
        rng.standard_normal((len(OLD + NEW), WIDTH - SPLIT)), WORDS_A_LABEL, axis=0
    )
    projection = (rng.standard_normal((WIDTH - SPLIT, SPLIT)) / np.sqrt(SPLIT) * 2).astype(np.float32)
    node = helper.make_node
    nodes = [
        node("Gather", ["embedding", "input_ids"], ["embedded"]),
        node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask", "last"], ["weights"]),
        node("Mul", ["embedded", "weights"], ["weighted"]),
        node("ReduceSum", ["weighted", "one"], ["sum"], keepdims=0),
        node("ReduceSum", ["weights", "one"], ["count"], keepdims=0),
        node("Div", ["sum", "count"], ["mean"]),
        node("MatMul", ["mean", "projection"], ["projected"]),
        node("Tanh", ["projected"], ["pooled"]),
        node("Concat", ["pooled", "mean"], ["features"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "backbone",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in TOKEN_INPUTS],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", WIDTH])],
        initializer=[
            numpy_helper.from_array(embedding, "embedding"),
            numpy_helper.from_array(projection, "projection"),
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def backbone_files(folder: Path, seed: int = 0) -> BackboneFiles:
    path = folder / "backbone.onnx"
    path.write_bytes(backbone_onnx(seed))
    return BackboneFiles(path, hashlib.sha256(path.read_bytes()).hexdigest(), tokenizer_json(), TOKEN_INPUTS, WIDTH)


def encode(folder: Path, texts: Sequence[str], seed: int = 0) -> NDArray[np.float32]:
    files = backbone_files(folder, seed)
    (folder / "tokenizer.json").write_text(files.tokenizer_json)
    return Encoder(files.model, folder / "tokenizer.json", threads=1).encode(texts)


def train_set(per_label: int = 40, seed: int = 1) -> dict[str, list[str]]:
    return {label: sentences(label, per_label, seed) for label in OLD}


def fitted_head(
    features: NDArray[np.float32], label_ids: NDArray[np.int64], fingerprint: str, problem: str = SINGLE_LABEL
) -> Head:
    """A least-squares head on the classifier features, scaled so that its probabilities are confident."""
    inputs = np.hstack([features[:, :SPLIT], np.ones((len(features), 1))])
    targets = np.eye(len(OLD))[label_ids] - (0.5 if problem != SINGLE_LABEL else 0.0)
    solution = 12 * np.linalg.solve(inputs.T @ inputs + 0.1 * np.eye(SPLIT + 1), inputs.T @ targets)
    weight, bias = solution[:-1].T.astype(np.float32), solution[-1].astype(np.float32)
    return Head.from_linear(OLD, weight, bias, WIDTH, fingerprint, problem=problem, created="2026-01-01T00:00:00+00:00")


def make_repository(
    root: Path | str, scratch: Path, name: str = "intent", *, memory: bool = True, problem: str = SINGLE_LABEL
) -> Classifier:
    """A repository with one trained tiny classifier in it."""
    scratch.mkdir(parents=True, exist_ok=True)
    texts = train_set()
    flat = [text for group in texts.values() for text in group]
    label_ids = np.repeat(np.arange(len(OLD)), [len(group) for group in texts.values()])
    files = backbone_files(scratch)
    features = encode(scratch, flat)
    head = fitted_head(features, label_ids, files.fingerprint, problem)
    repository = ModelRepository.create(root)
    with repository.lock():
        repository.add_backbone(name, files)
        kept = Memory.build(features, label_ids, OLD, SPLIT) if memory else None
        return repository.add_classifier(name, head, kept, backbone=name)


def free_ports(count: int) -> list[int]:
    """Free ports of the loopback interface, of those that the system itself gives to nobody who asks for any port."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            port = secrets.choice(range(20_000, 32_000))
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
        return found
