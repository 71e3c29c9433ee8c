"""The labels that a served classifier gives to texts: the best one, or if it is multi-label all above one half."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from patcher.triton.client import TritonServer
    from patcher.triton.tensors import Answer

__all__ = ["Given", "give", "independent"]

_ENOUGH = 0.5
"""A multi-label classifier gives the labels whose score is above this."""


@dataclass(frozen=True, eq=False)
class Given:
    """The ``labels`` that an ``answer`` gives, best first; ``several`` if there may be none, or more than one.

    ``unnamed`` counts the labels that are given, too, but whose names are unknown: an answer has those of the best few.
    """

    answer: Answer
    labels: tuple[str, ...]
    several: bool
    unnamed: int = 0


def give(
    server: TritonServer, address: str, texts: Sequence[str], names: Callable[[int], Sequence[str]]
) -> list[Given]:
    """The labels of each text. ``names`` returns all labels of a version, or an empty sequence if it is not known.

    Logits are asked for one text, as only they tell a softmax from sigmoids whatever the scores, and for the texts of
    which the best few candidates are all given.
    """
    (first,) = server.classify(address, texts[:1])
    answers = [first, *server.classify(address, texts[1:], logits=False)]
    if not independent(first):
        return [Given(answer, answer.labels[:1], several=False) for answer in answers]
    full = [place for place, answer in enumerate(answers) if answer.scores[-1] > _ENOUGH]
    for place, answer in zip(full, server.classify(address, [texts[place] for place in full]), strict=True):
        answers[place] = answer
    return [_above(answer, names) for answer in answers]


def independent(answer: Answer) -> bool:
    """Whether each label is scored on its own (a sigmoid), not as a share of all (a softmax); needs the logits."""
    if not len(answer.logits):  # a model that has none
        return False
    logits = np.sort(answer.logits.astype(np.float64))[::-1]
    best, scores = logits[: len(answer.scores)], np.array(answer.scores)
    shares = np.exp(best - logits[0]) / np.exp(logits - logits[0]).sum()
    own = (1.0 + np.tanh(best / 2.0)) / 2.0  # sigmoids, without an overflow
    return bool(np.abs(scores - own).max() < np.abs(scores - shares).max())


def _above(answer: Answer, names: Callable[[int], Sequence[str]]) -> Given:
    labels = tuple(label for label, score in zip(answer.labels, answer.scores, strict=True) if score > _ENOUGH)
    found = Given(answer, labels, several=True)
    count = int((answer.logits > 0).sum())
    if count <= len(labels):
        return found
    known = names(answer.head_version)
    if len(known) != len(answer.logits):
        return dataclasses.replace(found, unnamed=count - len(labels))
    order = np.argsort(-answer.logits, kind="stable")[len(labels) : count]
    return dataclasses.replace(found, labels=(*labels, *(known[place] for place in order.tolist())))
