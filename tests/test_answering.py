"""The labels that a classifier's answers give, for a server that answers from a table."""

from __future__ import annotations

import numpy as np
import pytest

from patcher.answering import give, independent
from patcher.triton.tensors import Answer

NAMES = tuple(f"l{number}" for number in range(8))


def answer(text, logits, *, exclusive, kept=True):
    logits = np.array(logits, np.float32)
    shares = np.exp(logits - logits.max())
    scores = shares / shares.sum() if exclusive else (1 + np.tanh(logits / 2)) / 2
    best = np.argsort(-logits, kind="stable")[:5].tolist()
    found = scores[best].tolist()
    return Answer(text, tuple(NAMES[i] for i in best), tuple(found), logits if kept else logits[:0], 3, None)


class Server:
    """Answers a text by the logits under that text; remembers for which it was asked for logits."""

    def __init__(self, table, *, exclusive):
        self.table, self.exclusive, self.asked = table, exclusive, []

    def classify(self, address, texts, *, logits=True):
        self.asked += [text for text in texts if logits]
        return [answer(text, self.table[text], exclusive=self.exclusive, kept=logits) for text in texts]


TABLE = {
    "one": [4, -3, -4, -5, -6, -7, -8, -9],
    "none": [-1, -2, -1, -2, -3, -3, -3, -3],
    "two": [-4, 3, -4, 5, -6, -7, -8, -9],
    "six": [1, 2, 3, 4, 5, 6, -1, -2],
}


def labels(server, names=lambda version: NAMES):
    return [(given.labels, given.unnamed) for given in give(server, "any", tuple(server.table), names)]


def test_of_several_labels_all_above_one_half_are_given_best_first():
    server = Server(TABLE, exclusive=False)
    six = ("l5", "l4", "l3", "l2", "l1", "l0")
    assert labels(server) == [(("l0",), 0), ((), 0), (("l3", "l1"), 0), (six, 0)]
    assert server.asked == ["one", "six"]
    assert labels(server, lambda version: ())[-1] == (six[:5], 1)  # a client without the repository


def test_of_one_label_the_best_is_given():
    server = Server(TABLE, exclusive=True)
    assert labels(server) == [(("l0",), 0), (("l0",), 0), (("l3",), 0), (("l5",), 0)]
    assert server.asked == ["one"]


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("exclusive", [True, False])
def test_logits_tell_sigmoids_from_a_softmax(scale, exclusive):
    rng = np.random.default_rng(0)
    for logits in rng.standard_normal((50, 8)) * scale:
        assert independent(answer("", logits, exclusive=exclusive)) is not exclusive
