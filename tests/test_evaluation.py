from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import tiny

from patcher import PatchSettings, add_label, diff, evaluate, merge_labels, read_examples, remove_label, rename_label
from patcher.classifier import Classifier
from patcher.cli import main
from patcher.errors import LabelError
from patcher.evaluation import evaluate_head
from patcher.head import MULTI_LABEL, SINGLE_LABEL, Head
from patcher.report import make_report, render


def identity_head(problem=SINGLE_LABEL):
    """Logits are the features themselves."""
    return Head.from_linear(
        ["a", "b", "c"], np.eye(3, dtype=np.float32), np.zeros(3, np.float32), 3, "f", problem=problem
    )


def rows(*answers):
    return np.eye(3, dtype=np.float32)[["abc".index(answer) for answer in answers]]


def test_figures_by_hand():
    result = evaluate_head(identity_head(), rows("a", "a", "b", "b", "c"), ["a", "b", "b", "b", "b"])
    assert result.accuracy == pytest.approx(3 / 5)
    a, b, c = (result.per_label[label] for label in "abc")
    assert (a.precision, a.recall, a.support) == (0.5, 1.0, 1)
    assert (b.precision, b.recall, b.f1) == (1.0, 0.5, pytest.approx(2 / 3))
    assert (c.precision, c.recall, c.f1, c.support) == (0, 0, 0, 0)
    assert result.macro_f1 == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert result.confusions == (("b", "a", 1), ("b", "c", 1))


def test_agrees_with_the_table_of_confusions():
    rng = np.random.default_rng(0)
    expected, answered = rng.choice(list("abc"), 200), rng.choice(list("abc"), 200)
    result = evaluate_head(identity_head(), rows(*answered), expected.tolist())
    counts = np.array([[np.sum((expected == x) & (answered == y)) for y in "abc"] for x in "abc"])
    hits = counts.diagonal()
    assert result.accuracy == pytest.approx(hits.sum() / 200)
    assert result.macro_f1 == pytest.approx(np.mean(2 * hits / (counts.sum(axis=0) + counts.sum(axis=1))))


def test_a_label_that_the_head_lacks_counts_as_wrong():
    result = evaluate_head(identity_head(), rows("a", "b"), ["a", "new"])
    assert (result.accuracy, result.unknown) == (0.5, ("new",))


def test_of_many_labels_that_the_head_lacks_a_few_are_named_and_all_counted(classifier, tmp_path, capsys):
    texts = {f"strange {number:02}": ["hello"] for number in range(30)} | {"balance": tiny.sentences("balance", 5)}
    path = tiny.write_csv(tmp_path / "texts.csv", texts)
    assert main(["evaluate", str(path), "--repo", str(classifier.root)]) == 0
    said = capsys.readouterr().out
    assert "lacks, counted as wrong: 30 (strange 00, strange 01, strange 02, strange 03, strange 04 …)\n" in said
    assert main(["evaluate", str(path), "--repo", str(classifier.root), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["unknown_labels"]) == 30
    page = render(make_report(classifier, None, read_examples(path)))
    assert "counted as wrong: 30 (strange 00, " in page
    assert "strange 29" not in page


def test_a_file_of_strange_labels_is_refused():
    with pytest.raises(LabelError, match=r"none of the file's 1 labels \(x\)"):
        evaluate_head(identity_head(), rows("a"), ["x"])


def test_texts_with_an_earlier_name_of_a_label_count_as_that_label(classifier, tmp_path, capsys):
    file = tiny.write_csv(tmp_path / "old.csv", {label: tiny.sentences(label, 12, seed=9) for label in tiny.OLD})
    merge_labels(classifier, ["balance", "transfer"], "money", force=True)
    rename_label(classifier, "money", "funds")
    kept, *_ = set(tiny.OLD) - {"balance", "transfer"}
    rename_label(classifier, kept, "kept")
    rename_label(classifier, "kept", "kept too")
    found = evaluate(classifier, file)
    assert found.unknown == ()
    assert found.per_label["funds"].support == 24
    assert (found.renamed, found.merged) == (
        ((kept, "kept too"),),
        (("balance", "funds"), ("transfer", "funds")),
    )
    assert found.accuracy == make_report(classifier, None, read_examples(file)).after.accuracy
    assert diff(classifier, 4, 5, file).unknown == 0

    arguments = ["evaluate", str(file), "--repo", str(classifier.root)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"renamed labels: texts labelled {kept} count as kept too\n" in out
    assert "merged labels: texts labelled balance, transfer count as funds\n" in out
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["merged"] == [["balance", "funds"], ["transfer", "funds"]]
    assert document["renamed"] == [[kept, "kept too"]]


def test_a_removed_label_is_no_earlier_name(classifier, tmp_path):
    file = tiny.write_csv(tmp_path / "old.csv", {label: tiny.sentences(label, 3, seed=9) for label in tiny.OLD})
    rename_label(classifier, "balance", "funds")
    remove_label(classifier, "funds")
    assert evaluate(classifier, file).unknown == ("balance",)


@pytest.fixture
def named_again(classifier, tmp_path):
    """Texts with the label music: first a label that was renamed, then another one, which ``change`` changes."""

    def make(change):
        rename_label(classifier, "music", "songs")
        add_label(classifier, "music", tiny.sentences("payday", 10), settings=PatchSettings(force=True))
        change(classifier, "music")
        rename_label(classifier, "alarm", "alarms")
        texts = {label: tiny.sentences(label, 3, seed=9) for label in ("music", "alarm", "balance")}
        return tiny.write_csv(tmp_path / "old.csv", texts)

    return make


@pytest.mark.parametrize("damaged", [False, True])
def test_the_latest_version_with_a_label_tells_its_name_now(classifier, named_again, damaged):
    file = named_again(lambda classifier, label: rename_label(classifier, label, "tunes"))
    if damaged:  # the version that renamed it
        (classifier.root / "intent_head" / "4" / "model.onnx").write_bytes(b"damaged")
    assert evaluate(classifier, file).renamed == (("alarm", "alarms"), ("music", "tunes"))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_label_that_was_removed_is_not_an_older_one_of_that_name(classifier, named_again, monkeypatch, damaged):
    file = named_again(remove_label)
    if damaged:
        (classifier.root / "intent_head" / "4" / "model.onnx").write_bytes(b"damaged")
    read, head = [], Classifier.head
    monkeypatch.setattr(Classifier, "head", lambda self, version=None: read.append(version) or head(self, version))
    found = evaluate(classifier, file)
    assert (found.renamed, found.unknown) == ((("alarm", "alarms"),), ("music",))
    assert read == ([None, 3] if damaged else [None])  # the other versions' rows are not needed
    if not damaged:
        assert diff(classifier, 4, 5, file).unknown == 3


def test_a_label_that_was_merged_and_removed_is_unknown(classifier, tmp_path):
    file = tiny.write_csv(tmp_path / "old.csv", {label: tiny.sentences(label, 3, seed=9) for label in tiny.OLD})
    merge_labels(classifier, ["balance", "transfer"], "balance", force=True)
    rename_label(classifier, "balance", "funds")
    found = evaluate(classifier, file)
    assert (found.renamed, found.merged) == ((("balance", "funds"),), (("transfer", "funds"),))
    remove_label(classifier, "funds")
    assert evaluate(classifier, file).unknown == ("balance", "transfer")


def test_multi_label():
    logits = np.array([[1, 1, -1], [1, -1, -1], [-1, -1, -1]], np.float32)
    result = evaluate_head(identity_head(MULTI_LABEL), logits, ["a|b", "a|c", "b"])
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.per_label["a"].f1 == 1
    assert result.per_label["b"].recall == 0.5


@pytest.mark.parametrize("problem", [SINGLE_LABEL, MULTI_LABEL])
def test_many_texts_of_many_labels_take_no_memory_for_all_their_logits(problem):
    count, texts = 400, 20_000
    rng = np.random.default_rng(0)
    codes = np.sign(rng.standard_normal((count, 64))).astype(np.float32)
    head = Head.from_linear(
        [f"l{i}" for i in range(count)], codes, np.full(count, -40, np.float32), 64, "f", problem=problem
    )
    ids = rng.integers(0, count, texts)
    labels, features = [f"l{i}" for i in ids], codes[ids]
    tracemalloc.start()
    result = evaluate_head(head, features, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.accuracy == 1.0
    assert peak < texts * count * 4  # the size of all logits together
