"""The demo's data: there is enough of it, it is clean, and test files share no texts with the training files."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "demo" / "data"
NEW_LABELS = ("card_swallowed", "warranty_claim")
TRAINING = ("train.csv", *(f"new_{label}.csv" for label in NEW_LABELS))
TESTING = ("test.csv", *(f"new_{label}_test.csv" for label in NEW_LABELS))


def rows(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def words(text: str) -> frozenset[str]:
    return frozenset(re.sub(r"[^a-z0-9 ]", "", text.lower()).split())


@pytest.mark.parametrize("name", [*TRAINING, *TESTING])
def test_files_hold_texts_and_labels(name: str) -> None:
    assert rows(name)
    for row in rows(name):
        assert set(row) == {"text", "label"}
        assert row["text"] == row["text"].strip() != ""
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", row["label"])


def test_every_intent_has_enough_sentences() -> None:
    train, test = (Counter(row["label"] for row in rows(name)) for name in ("train.csv", "test.csv"))
    assert len(train) == 24
    assert train.keys() == test.keys()
    assert min(train.values()) >= 25
    assert min(test.values()) >= 8


@pytest.mark.parametrize("label", NEW_LABELS)
def test_new_labels_are_unknown_and_have_ten_examples(label: str) -> None:
    assert label not in {row["label"] for row in rows("train.csv")}
    assert [row["label"] for row in rows(f"new_{label}.csv")] == [label] * 10
    assert {row["label"] for row in rows(f"new_{label}_test.csv")} == {label}
    assert len(rows(f"new_{label}_test.csv")) >= 12


def test_no_sentence_stands_twice() -> None:
    texts = Counter(words(row["text"]) for name in (*TRAINING, *TESTING) for row in rows(name))
    assert [sorted(text) for text, count in texts.items() if count > 1] == []


def test_no_test_sentence_is_close_to_a_training_sentence() -> None:
    train = [words(row["text"]) for name in TRAINING for row in rows(name)]
    close = [
        row["text"]
        for name in TESTING
        for row in rows(name)
        if any(len(words(row["text"]) & other) / len(words(row["text"]) | other) > 0.6 for other in train)
    ]
    assert close == []
