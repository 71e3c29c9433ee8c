"""Verifying which version a server answers from, with a backbone whose features depend on the rest of the batch."""

from __future__ import annotations

import threading
from itertools import cycle

import numpy as np
import onnx
import pytest
import tiny
from google.protobuf import text_format
from processes import soon
from test_rollout import Server
from tritonclient.grpc import model_config_pb2 as pb

from patcher import PatchSettings, add_label, rollback
from patcher import canary as trials
from patcher.errors import ServerError
from patcher.rollout import probe
from patcher.serve import served_models
from patcher.triton.server import EmbeddedTriton

TEN = tiny.sentences("payday", 10)


class Shifting(Server):
    """Gives a text different features each time, as INT8 does under load."""

    asked = 0

    def _features(self, texts):
        self.asked += 1
        return self.encoder.encode(texts) * np.float32(1 + 0.2 * self.asked)


def test_features_of_two_requests_are_not_compared(classifier):
    server = Shifting(classifier)
    for _ in range(3):
        probe(classifier, classifier.head(), server)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda logits: logits + 1, "logits are off by 1 from those of version 1"),
        (lambda logits: logits * np.nan, "logits are off by nan"),
        (lambda logits: logits[:, 1:], r"the head answers with logits of shape \(1, 5\); expected \(1, 6\)"),
    ],
)
def test_a_head_that_computes_something_else_is_found(classifier, change, said):
    server = Server(classifier)
    ask = server.head_logits
    server.head_logits = lambda *asked: (change(ask(*asked)[0]), 1)
    with pytest.raises(ServerError, match=said):
        probe(classifier, classifier.head(), server)


def test_the_ensemble_and_the_head_both_have_to_answer_from_the_version(classifier):
    server = Server(classifier)
    add_label(classifier.repository, "payday", TEN)
    head = classifier.head(2)
    with pytest.raises(ServerError, match="answers from head version 1; expected 2"):
        probe(classifier, head, server)
    server.serving = 2
    ask = server.head_logits
    server.head_logits = lambda *asked: (ask(*asked)[0], 1)
    with pytest.raises(ServerError, match="answers from head version 1; expected 2"):
        probe(classifier, head, server)


def quantise(classifier):
    """Round the backbone's features with one scale for the whole batch, and let batches form."""
    model = onnx.load(classifier.backbone_path)
    for node in model.graph.node:
        if node.output[0] == "features":
            node.output[0] = "plain"
    dynamic = ["rounded", "scale", "zero"]
    model.graph.node.extend(
        [
            onnx.helper.make_node("DynamicQuantizeLinear", ["plain"], dynamic),
            onnx.helper.make_node("DequantizeLinear", dynamic, ["features"]),
        ]
    )
    onnx.save(model, classifier.backbone_path)
    path = classifier.root / classifier.encoder_model / "config.pbtxt"
    config = text_format.Parse(path.read_text(), pb.ModelConfig())
    config.dynamic_batching.max_queue_delay_microseconds = 20_000
    path.write_text(text_format.MessageToString(config))


@pytest.mark.server
def test_labels_come_and_go_while_a_quantised_backbone_is_busy(classifier, tmp_path):
    quantise(classifier)
    repository, stop = classifier.repository, threading.Event()

    def ask(texts):
        with triton.client() as client:
            while not stop.is_set():
                client.classify("intent", [next(texts)])

    # As long as the probe's text, so that they share its batch. One word repeated lies farther out than any sentence,
    # and each word at a different distance.
    texts = [" ".join([word] * 5) for label in tiny.OLD for word in tiny.words(label)]
    with EmbeddedTriton(classifier.root, served_models(repository), log_file=tmp_path / "log") as triton:
        clients = [threading.Thread(target=ask, args=(cycle(texts[at:]),)) for at in range(4)]
        for client in clients:
            client.start()
        try:
            with triton.client() as server:
                seen = set()

                def varies():
                    seen.add(server.features(classifier.features_model, ["is it so now?"]).tobytes())
                    return len(seen) > 1

                assert soon(varies)  # otherwise this test tests nothing
                assert add_label(repository, "payday", TEN, server=server).version == 2
                assert rollback(classifier, server=server).version == 1
                tried = PatchSettings(canary=10.0)
                assert add_label(repository, "payday", TEN, server=server, settings=tried).version == 3
                assert trials.promote(classifier, server).version == 3
        finally:
            stop.set()
            for client in clients:
                client.join()
