"""Adding labels with files of old data in addition to the examples: which of their texts count."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from patcher import Examples, PatchSettings, add_labels, head_file
from patcher.errors import ExamplesError, LabelError
from patcher.head import MULTI_LABEL

DRY = PatchSettings(dry_run=True, force=True)
NEW = {"payday": tiny.sentences("payday", 10)}


def file(texts, seed=7):
    """Write a file with the same number of texts of each old label."""
    pairs = [(text, label) for label in tiny.OLD for text in tiny.sentences(label, texts, seed)]
    return Examples(tuple(text for text, _ in pairs), tuple(label for _, label in pairs), "old.csv")


def three_times(examples):
    texts = (*examples.texts, *(text.upper() for text in examples.texts), *(f" {text}  " for text in examples.texts))
    return dataclasses.replace(examples, texts=texts, labels=examples.labels * 3)


@pytest.mark.parametrize("option", ["replay", "evaluation"])
def test_a_text_that_comes_again_counts_once(classifier, option):
    once = add_labels(classifier.repository, NEW, settings=DRY, **{option: file(10)}).verdict
    again = add_labels(classifier.repository, NEW, settings=DRY, **{option: three_times(file(10))}).verdict
    assert again.calibration_size == once.calibration_size == 60
    assert (again.flips, again.flips_upper_bound) == (once.flips, once.flips_upper_bound)
    name = {"replay": "--replay", "evaluation": "--eval"}[option]
    assert f"120 texts of {name} left out as duplicates" in "".join(again.advice)
    assert "left out as duplicates" not in "".join(once.advice)


@pytest.mark.parametrize("canary, times", [(None, 1), (10, 2)])
def test_a_patch_writes_its_heads_file_once(classifier, monkeypatch, canary, times):
    written, plain = [], head_file._model
    monkeypatch.setattr(head_file, "_model", lambda head: written.append(head) or plain(head))
    report = add_labels(classifier.repository, NEW, settings=PatchSettings(canary=canary))
    assert report.published
    assert len(written) == times  # once more for the trial's own model
    assert classifier.head_bytes(report.version) == head_file.write_head(classifier.head(report.version))


def test_of_a_multi_label_text_that_comes_again_all_labels_count(tmp_path):
    classifier = tiny.make_repository(tmp_path / "models", tmp_path / "scratch", problem=MULTI_LABEL)
    texts = tuple(tiny.sentences("payday", 20, seed=7))
    twice = Examples(texts + tuple(map(str.upper, texts)), ("balance",) * 20 + ("payday",) * 20, "old.csv")
    verdict = add_labels(classifier.repository, NEW, settings=DRY, evaluation=twice).verdict
    assert (verdict.calibration_size, verdict.flips) == (20, 0.0)  # they rightly have the new label
    assert verdict.estimated_recall["payday"] > 0.9


def test_a_label_that_is_none_is_not_hidden_by_a_text_that_was_there(classifier):
    old = file(2)
    wrong = Examples((*old.texts, old.texts[0]), (*old.labels, "wether"), "old.csv")
    with pytest.raises(LabelError, match=r"old\.csv, text 13: .*wether"):
        add_labels(classifier.repository, NEW, settings=DRY, evaluation=wrong)


def test_a_text_that_the_fit_saw_is_no_fresh_one(classifier):
    replay, fresh = file(10), file(5, seed=8)
    texts = (*(text.upper() for text in replay.texts), *NEW["payday"], *fresh.texts)
    both = Examples(texts, (*replay.labels, *["payday"] * 10, *fresh.labels), "both.csv")
    verdict = add_labels(classifier.repository, NEW, settings=DRY, replay=replay, evaluation=both).verdict
    assert (verdict.calibration, verdict.calibration_size) == ("eval", 30)
    with pytest.raises(ExamplesError, match=r"old\.csv: each text is an example or replayed"):
        add_labels(classifier.repository, NEW, settings=DRY, replay=replay, evaluation=replay)
