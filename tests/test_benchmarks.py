from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny

from patcher.memory import Memory
from tests.benchmarks import (
    quality_baselines,
    quality_data,
    quality_life,
    quality_measure,
    quality_others,
    quality_ours,
    random_classifiers,
)
from tests.benchmarks.quality_plot import plot
from tests.benchmarks.quality_pypi import _write_job
from tests.benchmarks.quality_report import markdown

PER_LABEL = 30
PARTS = (("train", 1), ("test", 2))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The tiny classifier's labels as old ones, unseen labels as new ones, and filler words as texts of no label."""
    folder = tmp_path_factory.mktemp("quality")
    old = {part: {label: tiny.sentences(label, PER_LABEL, seed) for label in tiny.OLD} for part, seed in PARTS}
    new = {part: {label: tiny.sentences(label, 12, seed) for label in tiny.NEW} for part, seed in PARTS}
    ids = np.repeat(np.arange(len(tiny.OLD)), PER_LABEL)

    def flat(groups):
        return tuple(text for texts in groups.values() for text in texts)

    train = tiny.encode(folder, flat(old["train"]))
    return quality_data.Setting(
        name="tiny",
        head=tiny.fitted_head(train, ids, "tiny"),
        train=train,
        train_ids=ids,
        train_texts=flat(old["train"]),
        test=tiny.encode(folder, flat(old["test"])),
        test_ids=ids,
        test_texts=flat(old["test"]),
        new={
            label: quality_data.NewLabel(
                train=tiny.encode(folder, new["train"][label]),
                train_texts=tuple(new["train"][label]),
                test=tiny.encode(folder, new["test"][label]),
                test_texts=tuple(new["test"][label]),
            )
            for label in tiny.NEW
        },
        outside=tiny.encode(folder, [" ".join(tiny.FILLERS[i:]) for i in range(8)]),
        fresh=tiny.encode(folder, flat({label: tiny.sentences(label, 6, 77) for label in tiny.OLD})),
    )


def test_outcome_counts_flips_and_the_new_labels_figures():
    truth, before = np.array([0, 1, 2, 0]), np.array([0, 1, 0, 0])
    after, new = np.array([0, 3, 3, 0]), np.array([3, 3, 1, 3])
    found = quality_measure.outcome(truth, before, after, new, place=3)
    assert found.flips == 0.25  # the second text; the third was wrong before
    assert found.change == -0.25
    assert (found.recall, found.precision) == (0.75, 3 / 5)
    assert found.f1 == pytest.approx(2 * 0.75 * 0.6 / 1.35)


def test_recall_at_flips_moves_the_bias_until_so_many_flip():
    old, right = np.array([0.5, 1.0, 2.0, -3.0], np.float32), np.array([True, True, True, False])
    new = np.array([1.0, -0.7, -1.5, -9.0], np.float32)
    # Without a flip the bias rises by at most 0.5, with one by 1.0, with two by 2.0. Wrong answers cannot flip.
    assert quality_measure.recall_at_flips(old, right, new, [0.0, 0.25, 0.5]) == [0.25, 0.5, 0.75]


def test_auroc_counts_pairs_and_halves_ties():
    inside, outside = np.array([3.0, 1.0], np.float32), np.array([2.0, 1.0, 0.0], np.float32)
    assert quality_measure.auroc(inside, outside) == pytest.approx((3 + 1.5) / 6)


def test_summary_knows_which_end_is_the_worst():
    one, two = (quality_measure.Outcome(x, -x, 1 - x, 1 - x, 1 - x) for x in (0.0, 0.5))
    found = quality_measure.summary([one, two])
    assert found["flips"] == {"mean": 0.25, "sd": pytest.approx(0.5 / np.sqrt(2)), "worst": 0.5}
    assert (found["change"]["worst"], found["recall"]["worst"]) == (-0.5, 0.5)


def test_draws_are_nested_and_never_repeat_the_only_choice(setting):
    ten, five = (quality_data.draws_of(setting, "pizza", n, 3) for n in (10, 5))
    assert all((a[:5] == b).all() for a, b in zip(ten, five, strict=True))
    assert len({tuple(sorted(each)) for each in ten}) == 3
    assert len(quality_data.draws_of(setting, "pizza", 12, 3)) == 1
    assert quality_data.draws_of(setting, "pizza", 13, 3) == []


def test_labels_with_too_few_examples_are_left_out(setting, capsys):
    short = dataclasses.replace(setting.new["pizza"], train=setting.new["pizza"].train[:4])
    mixed = dataclasses.replace(setting, new={**setting.new, "pizza": short})
    assert set(mixed.limited(5).new) == {"payday", "holiday"}
    assert "'pizza' has 4 examples" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no new label"):
        setting.limited(99)


def test_read_folder_takes_the_demos_layout_and_a_full_one(tmp_path):
    train, new = {"old": ["a", "b"]}, {"fresh": ["c"]}
    for name, groups in (("train", train), ("test", train), ("new_fresh", new), ("new_fresh_test", new)):
        tiny.write_csv(tmp_path / f"{name}.csv", groups)
    corpus = quality_data.read_folder(tmp_path)
    assert corpus.train == corpus.test == (("a", "old"), ("b", "old"), ("c", "fresh"))
    for name, groups in (("base_train", {"old": ["z"]}), ("new_train", new), ("oos_test", {"oos": ["y"]})):
        tiny.write_csv(tmp_path / f"{name}.csv", groups)
    corpus = quality_data.read_folder(tmp_path)
    assert corpus.train == (("z", "old"), ("c", "fresh"))
    assert corpus.outside == ("y",)


def test_read_folder_says_what_is_missing(tmp_path):
    tiny.write_csv(tmp_path / "train.csv", {"old": ["a"]})
    with pytest.raises(SystemExit, match=r"new_train\.csv"):
        quality_data.read_folder(tmp_path)


def test_logistic_regression_separates_what_can_be_separated(setting):
    score = quality_baselines.logistic_regression(setting.train, setting.train_ids, len(tiny.OLD))
    assert (score(setting.test).argmax(axis=1) == setting.test_ids).mean() > 0.9


def test_imprinting_puts_the_mean_in_the_row(setting):
    examples = setting.new["pizza"].train[:10]
    score = quality_baselines.imprint(setting.head, setting.memory, examples, np.random.default_rng(0))
    assert np.allclose(score(setting.test)[:, :-1], setting.logits, atol=1e-4)
    assert (score(examples).argmax(axis=1) == len(tiny.OLD)).mean() > 0.5


def test_lda_keeps_the_heads_order_when_the_memory_has_another(setting):
    turned = Memory.build(setting.train, len(tiny.OLD) - 1 - setting.train_ids, tiny.OLD[::-1], setting.head.split)
    examples = setting.new["pizza"].train[:10]
    one, other = (
        quality_baselines.lda(setting.head, memory, examples, np.random.default_rng(0))(setting.test)
        for memory in (setting.memory, turned)
    )
    assert np.allclose(one, other, atol=1e-2)
    assert (one.argmax(axis=1) == setting.test_ids).mean() > 0.8


def test_fine_tuning_the_head_alone_raises_the_new_label(setting):
    examples, rng = setting.new["pizza"].train[:10], np.random.default_rng
    before = quality_baselines.random_row(setting.head, setting.memory, examples, rng(0))(examples)
    after = quality_baselines.tuned_row(setting.head, setting.memory, examples, rng(0))(examples)
    assert (after[:, -1] - before[:, -1] > 0).all()


@pytest.fixture(scope="module")
def results(setting):
    """Results of every part that needs only arrays, run on a small scale."""
    about = {
        "data": "tiny",
        "checkpoint": "tiny",
        "old labels": 6,
        "new labels": 3,
        "old test texts": len(setting.test),
        "old accuracy": 1.0,
        "examples": 5,
        "python": "3",
        "processor": "any",
        "threads": "1",
        "load": 0.1,
        "date": "2026-01-01",
        "plot": "tiny.png",
    }
    return {
        "about": about,
        "ours": {"counts": quality_ours.one_label(setting, 1, (1, 5)), "methods": quality_ours.methods(setting, 5, 1)},
        "sequential": quality_ours.sequential(setting, 5, 2),
        "many": quality_life.many_labels(setting, 5, 2),
        "multi_label": quality_life.sigmoids(setting, 5, 1),
        "merges": quality_life.merges(setting),
        "bound": quality_ours.bound(setting, 5, 1),
        "scope": quality_ours.scope(setting, 5),
        "baselines": quality_others.baselines(setting, 5, 2),
        "libraries": {"nobody 1.0": {"failed": "not there"}},
    }


def test_every_part_runs_and_is_reported(results):
    assert json.loads(json.dumps(results))["about"]["data"] == "tiny"
    assert results["ours"]["counts"]["5"]["old rows unchanged"]
    assert results["sequential"]["accuracy"]["old"]["mean"] > 0.8
    assert results["bound"]["patches"] == 9
    assert results["many"]["orders agree"] > 0.7
    assert results["many"]["added"] == len(tiny.OLD) - results["many"]["from"] + len(tiny.NEW)
    assert results["multi_label"]["recall"]["mean"] > 0.5
    assert all(kind["recall"]["mean"] > 0.5 for kind in results["merges"].values())
    text = markdown(results)
    for words in (
        "random row",
        "patcher, default",
        "one after another",
        "multi-label",
        "limit set on fresh",
        "AUROC",
        "failed: not there",
    ):
        assert words in text


def test_the_picture_is_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    plot(results, tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").stat().st_size > 10_000


def test_speed_makes_a_memory_as_large_as_it_says():
    head, memory, examples = quality_ours.made_up(20, 8, 16)
    assert (len(head.labels), memory.width, len(memory.sample), examples.shape) == (20, 16, 400, (10, 16))


def test_a_librarys_answers_become_the_same_figures(setting, tmp_path):
    _write_job(tmp_path, "nobody", tmp_path, setting, examples=5, draws=2, labels=2, sequences=2)
    job = json.loads((tmp_path / "job.json").read_text())
    assert set(setting.test_texts) <= set(job["embedded"])
    assert [(add["label"], add["draw"]) for add in job["adds"]] == [(n, d) for n in tiny.NEW[:2] for d in (0, 1)]
    truth = [tiny.OLD[i] for i in setting.test_ids]
    adds = [{**add, "seconds": 1.0, "old": truth, "new": [add["label"]] * 12} for add in job["adds"]]
    every = truth + [label for label in tiny.NEW for _ in range(12)]
    assert [len(each) for each in job["sequences"]] == [len(setting.new)] * 2
    answers = {"before": truth, "adds": adds, "sequences": [{"seconds": [1.0], "answers": every}] * 2}
    row = quality_others._library_row(setting, answers)
    assert row["figures"]["recall"]["mean"] == row["figures"]["f1"]["mean"] == 1.0
    assert row["figures"]["flips"]["mean"] == 0.0
    assert row["sequential"]["accuracy"]["all"]["mean"] == 1.0


def test_made_up_classifiers_keep_the_rules_of_a_patch():
    found = random_classifiers.run(range(60))
    assert found["broken"] == {}
    assert {"removed", "1 added by auto", "2 added by auto", "1 added by lda", "1 added by ridge"} <= set(
        found["steps"]
    )


def test_a_row_that_lives_on_rounding_is_noticed(monkeypatch):
    monkeypatch.setattr("patcher.fit.model._COARSE", 0.0)
    assert "FP16 moves the new logits" in " ".join(random_classifiers.run(range(60))["broken"].values())
