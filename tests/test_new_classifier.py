"""A new classifier on an existing backbone: the fit, its evaluation, what is refused, and a real server."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tiny
from hypothesis.extra.numpy import arrays

from export import to_transformers
from patcher import (
    Examples,
    Fleet,
    FoundingSettings,
    GateRefused,
    ModelRepository,
    NotServed,
    TritonServer,
    add_label,
    doctor,
    drop_classifier,
    merge_labels,
    new_classifier,
    read_examples,
    remember,
    rollback,
    sync,
)
from patcher.backbone import Backbone
from patcher.classifier import Classifier, add_classifier
from patcher.cli import main
from patcher.errors import (
    ControlRefused,
    ExamplesError,
    InputError,
    LabelError,
    ServerError,
    ServerRefused,
    ServerUnreachable,
)
from patcher.fit.holding_out import hold_out, hold_out_several
from patcher.fit.whole_head import fit_head
from patcher.lifecycle import evaluate, history
from patcher.names import check_name
from patcher.rollout import held_in_stores
from patcher.storage import disk
from patcher.targets import remarks, targets_of
from patcher.triton.failures import Address
from patcher.triton.server import EmbeddedTriton


def examples(labels=tiny.NEW, count=20, seed=3):
    pairs = [(text, label) for label in labels for text in tiny.sentences(label, count, seed)]
    return Examples(tuple(text for text, _ in pairs), tuple(label for _, label in pairs), "made up")


def joined(labels=tiny.NEW, count=40, seed=3):
    """Texts of one label each, and texts made of two with both labels."""
    alone = examples(labels, count, seed)
    pairs = [*zip(alone.texts, alone.labels, strict=True)]
    for first, second in itertools.combinations(labels, 2):
        halves = tiny.sentences(first, count, seed + 1), tiny.sentences(second, count, seed + 2)
        pairs += [(f"{a} and {b}", f"{first}|{second}") for a, b in zip(*halves, strict=True)]
    return Examples(tuple(text for text, _ in pairs), tuple(label for _, label in pairs), "made up")


def clusters(count, labels=4, width=6, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(labels), count)
    return (3 * rng.standard_normal((labels, width))[ids] + rng.standard_normal((len(ids), width))).astype(
        np.float32
    ), ids


def test_a_share_of_every_label_is_held_out():
    ids = np.repeat(np.arange(4), [2, 3, 10, 1000])
    fitted, apart = hold_out(ids)
    assert sorted([*fitted, *apart]) == list(range(len(ids)))
    assert np.bincount(ids[apart]).tolist() == [1, 1, 2, 200]
    again = hold_out(ids)
    assert all(np.array_equal(a, b) for a, b in zip((fitted, apart), again, strict=True))
    fitted, apart = hold_out(ids, most=100)
    assert len(fitted) + len(apart) < 110
    assert np.bincount(ids[apart]).min() >= 1 <= np.bincount(ids[fitted]).min()


@hypothesis.given(arrays(np.bool_, st.tuples(st.integers(1, 6), st.integers(3, 5))))
def test_of_several_labels_each_is_among_those_to_fit(rows):
    twice = np.concatenate([rows | ~rows.any(axis=1, keepdims=True), ~np.eye(rows.shape[1], dtype=bool)])
    targets = np.concatenate([twice, twice])  # two inputs with each label, and two without it
    fitted, apart = hold_out_several(targets)
    assert sorted([*fitted, *apart]) == list(range(len(targets)))
    assert len(apart) > 0
    assert targets[fitted].any(axis=0).all()
    assert not targets[fitted].all(axis=0).any()


def test_of_few_texts_with_several_labels_each_is_among_those_to_fit():
    """Without a second look, a fifth of such sets would lack texts with a label, or without one, to fit."""
    rng, checked = np.random.default_rng(0), 0
    while checked < 200:
        targets = rng.random((rng.integers(4, 14), rng.integers(2, 6))) < rng.choice([0.2, 0.5, 0.8])
        if not targets.any(axis=1).all() or min(targets.sum(axis=0).min(), (~targets).sum(axis=0).min()) < 2:
            continue
        fitted, _ = hold_out_several(targets)
        assert targets[fitted].any(axis=0).all()
        assert not targets[fitted].all(axis=0).any()
        checked += 1


def test_a_text_of_several_labels_is_held_out_for_the_rarest():
    targets = np.zeros((400, 11), np.bool_)
    targets[:, 0] = np.arange(400) < 390
    targets[np.arange(40), np.repeat(np.arange(1, 11), 4)] = True
    _, apart = hold_out_several(targets[:390])
    assert targets[apart, 1:].sum(axis=0).tolist() == [1] * 10


def test_the_fit_is_the_one_that_there_is():
    """Compare with scipy's solution of the same convex problem, which is formulated here independently."""
    from scipy.optimize import minimize

    features, ids = clusters(30)
    made = fit_head(features, ids, 4)
    assert ((features @ made.weight.T + made.bias).argmax(axis=1) == ids).mean() > 0.9
    from patcher.fit.model import whitening
    from patcher.memory import Memory

    white = whitening(Memory.build(features, ids, list("abcd"), 6))
    points = white.of(features)

    def loss(rows):
        weight, bias = rows[:24].reshape(4, 6), rows[24:]
        logits = points @ weight.T + bias
        chosen = logits[np.arange(len(ids)), ids]
        return (np.log(np.exp(logits).sum(axis=1)) - chosen).mean() + 0.5 * made.penalty * (weight**2).sum()

    best = minimize(loss, np.zeros(28), tol=1e-10)
    raw = best.x[:24].reshape(4, 6) @ white.points.T
    scores = features @ raw.T + best.x[24:] - raw @ white.center
    ours = features @ made.weight.T + made.bias
    chances, expected = (np.exp(each) / np.exp(each).sum(axis=1, keepdims=True) for each in (ours, scores))
    np.testing.assert_allclose(chances, expected, atol=0.01)


def test_with_several_labels_each_row_is_a_logistic_regression_of_its_own():
    from scipy.optimize import minimize

    from patcher.fit.model import whitening
    from patcher.memory import Memory

    features, ids = clusters(30)
    targets = (ids[:, None] == np.arange(4)) | (ids[:, None] == (np.arange(4) + 1) % 4)  # two labels each
    made = fit_head(features, targets, 4)
    rows, labels = np.nonzero(targets)
    white = whitening(Memory.build(features[rows], labels, list("abcd"), 6))
    points = white.of(features)
    ours = features @ made.weight.T + made.bias
    for label in range(4):
        sign = np.where(targets[:, label], 1.0, -1.0)

        def loss(row, sign=sign):
            return (
                np.logaddexp(0, -sign * (points @ row[:6] + row[6])).mean() + 0.5 * made.penalty * (row[:6] ** 2).sum()
            )

        best = minimize(loss, np.zeros(7), tol=1e-10).x
        expected, found = (1 / (1 + np.exp(-each)) for each in (points @ best[:6] + best[6], ours[:, label]))
        np.testing.assert_allclose(found, expected, atol=0.01)


def test_the_penalty_grows_with_the_noise():
    features, ids = clusters(30)
    noise = np.random.default_rng(1).permutation(ids)
    assert fit_head(features, noise, 4).penalty > fit_head(features, ids, 4).penalty


def test_a_new_classifier_without_a_server(classifier):
    repository = classifier.repository
    report = new_classifier(repository, "topics", examples(), backbone="intent")
    assert (report.published, report.served, report.gate) == (True, False, "passed")
    assert report.evaluation.accuracy > 0.8
    assert repository.classifiers() == ("intent", "topics")
    made = repository.classifier("topics")
    assert made.head().labels == tiny.NEW
    assert evaluate(made, examples(seed=9)).accuracy > 0.9
    (entry,) = history(made)
    assert (entry.what(), entry.lineage.method, entry.lineage.gate) == ("new", "softmax", "passed")
    assert made.memory().labels == tiny.NEW
    assert made.head().scope.false_alarms is not None
    patch = add_label(repository, "weather", tiny.sentences("weather", 10), classifier="topics")
    assert patch.version == 2
    assert evaluate(made, examples((*tiny.NEW, "weather"), seed=9)).accuracy > 0.9
    rollback(made)
    assert made.serving() == 1


def test_a_new_classifier_of_several_labels(classifier):
    settings = FoundingSettings(multi_label=True)
    report = new_classifier(classifier.repository, "tags", joined(), settings=settings)
    assert (report.published, report.gate, report.problem) == (True, "passed", "multi_label")
    assert "held-out texts given exactly their labels" in report.sentence
    made = classifier.repository.classifier("tags")
    assert made.head().labels == tiny.NEW
    found = evaluate(made, joined(seed=20))
    assert found.accuracy > 0.7
    assert min(score.recall for score in found.per_label.values()) > 0.8
    assert history(made)[0].lineage.method == "sigmoid"
    add_label(classifier.repository, "weather", tiny.sentences("weather", 10), classifier="tags")
    assert evaluate(made, joined(("pizza", "weather"), seed=20)).per_label["weather"].recall > 0.7


def test_a_label_that_nothing_is_answered_instead_of_is_told(classifier):
    rng = np.random.default_rng(0)
    texts = [text for label in tiny.NEW for text in tiny.sentences(label, 20)]
    labels = ["a|b" if chance < 0.2 else "b" if chance < 0.6 else "c" for chance in rng.random(len(texts))]
    settings = FoundingSettings(multi_label=True, force=True, dry_run=True)
    report = new_classifier(
        classifier.repository, "noise", Examples(tuple(texts), tuple(labels), "noise"), settings=settings
    )
    (weak,) = [each for each in report.weak if each.label == "a"]
    assert weak.instead is None or weak.instead in "bc"
    assert report.to_json()["method"] == "sigmoid"
    again = Examples((*texts, texts[0]), (*labels, "a|b|c"), "noise")  # with other labels, but the same text
    more = new_classifier(classifier.repository, "noise", again, settings=settings)
    assert (more.examples, more.repeated) == (report.examples, report.repeated + 1)


@pytest.mark.parametrize(
    "labels, several, said",
    [
        (("x", "x", "X", "X"), False, "'X' differs from 'x' only in case"),
        (("x", "x", "y", "y"), True, "no text has several labels; they are written with '|'"),
        (("x", "y", "x", "y"), False, "2 texts with more than one label"),
        (("x", "x", "y", "y"), False, None),
        (("x|y", "x", "y", "z"), True, None),
    ],
)
def test_what_may_be_wrong_with_labels_is_told(labels, several, said):
    texts = ("a", "a", "b", "b") if labels[:2] == ("x", "y") else ("a", "b", "c", "d")
    found = remarks(Examples(texts, labels, "f"), [*dict.fromkeys("|".join(labels).split("|"))], several=several)
    assert [said] == [line[: len(said)] for line in found] if said else found == ()


def test_a_classifier_that_was_not_exported_goes_into_no_checkpoint(classifier, tmp_path):
    new_classifier(classifier.repository, "topics", examples())
    with pytest.raises(InputError, match="topics was made by `patcher new-classifier`"):
        to_transformers(classifier.repository.classifier("topics"), None, tmp_path / "out")


def test_the_same_texts_give_the_same_head(classifier):
    for name in ("a", "b"):
        new_classifier(classifier.repository, name, examples())
    first, second = (classifier.repository.classifier(name).head() for name in ("a", "b"))
    assert first.rows_hash() == second.rows_hash()


def one_label():
    return Examples(("a", "b"), ("x", "x"), "file.csv")


def labels_of_several():
    return Examples(tuple("abcdef"), ("x|y", "x|y", "x", "x", "y", "y"), "file.csv")


def labels_with_spaces():
    return Examples(tuple("abcdef"), ("x | y", "x | y", "x", "x", "y", "y"), "file.csv")


def one_text():
    return Examples(("a", "b", "c"), ("x", "x", "y"), "file.csv")


@pytest.mark.parametrize(
    "name, backbone, texts, kind, message",
    [
        ("intent", None, examples, InputError, "intent is in .* already"),
        ("topics", "intant", examples, InputError, "no backbone 'intant' in .*; it holds intent"),
        ("a/b", None, examples, InputError, "cannot name a model"),
        ("x_any", None, examples, InputError, "belong to its parts"),
        ("topics", None, one_label, LabelError, r"one label only \('x'\)"),
        ("topics", None, labels_of_several, LabelError, r"has the label 'x\|y' and 'x', 'y', too; .*--multi-label"),
        ("topics", None, labels_with_spaces, LabelError, r"has the label 'x \| y' and 'x', 'y', too"),
        ("topics", None, one_text, ExamplesError, r"a single text of 1 of its 2 labels \('y'\)"),
        ("topics", None, lambda: Examples(("a", " "), ("x", "y"), "f"), ExamplesError, "f, text 2: the text is empty"),
        ("topics", None, lambda: Examples(("a", "b"), None, "f"), ExamplesError, "f has no label column"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(classifier, tree, name, backbone, texts, kind, message):
    before = tree(classifier.root)
    with pytest.raises(kind, match=message):
        new_classifier(classifier.repository, name, texts(), backbone=backbone)
    assert tree(classifier.root) == before


def test_a_label_may_have_a_bar_beside_one_of_its_parts():
    names, targets = targets_of(Examples(tuple("abcd"), ("x|y", "x|y", "x", "x"), "file.csv"), several=False)
    assert (names, targets.tolist()) == (("x|y", "x"), [0, 0, 1, 1])


def test_the_labels_of_each_text_are_its_targets():
    given = Examples(tuple("abcde"), ("x", "x | y|x", "y", "z|y", "z"), "file.csv")
    names, targets = targets_of(given, several=True)
    assert names == ("x", "y", "z")
    assert targets.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    "labels, message",
    [
        (("x", "x", "x|y", "x|y"), "every text, or all but one, has the label 'x'; expected two or more without it"),
        (("x|y", "x", "x", "z | x"), r"a single text of 2 of its 3 labels \('y', 'z'\)"),
        (("x", "x", "x", "x"), r"one label only \('x'\)"),
    ],
)
def test_texts_of_several_labels_that_do_not_do_are_refused(labels, message):
    given = Examples(tuple("abcd"), labels, "file.csv")
    with pytest.raises((LabelError, ExamplesError), match=message):
        targets_of(given, several=True)


def test_labels_that_cannot_be_told_apart_are_refused(classifier, tree):
    before = tree(classifier.root)
    # Each text occurs four times: a text must not be held out if the fit saw a copy of it.
    texts = [text for label in tiny.NEW for text in tiny.sentences(label, 40)] * 4
    labels = np.random.default_rng(0).permutation(np.repeat(list("abcd"), 30)).tolist() * 4
    with pytest.raises(GateRefused, match=r"held-out texts answered right, expected 50.0 % or more. Found least: '\w'"):
        new_classifier(classifier.repository, "noise", Examples(tuple(texts), tuple(labels), "noise"))
    assert tree(classifier.root) == before
    settings = FoundingSettings(force=True, dry_run=True)
    report = new_classifier(
        classifier.repository, "noise", Examples(tuple(texts), tuple(labels), "noise"), settings=settings
    )
    assert (report.gate, report.published) == ("forced", False)
    assert report.sentence.startswith("Refused")
    assert report.weak[0].recall <= report.weak[-1].recall < 0.75
    assert report.weak[0].instead != report.weak[0].label
    assert tree(classifier.root) == before


@pytest.fixture(scope="module")
def triton(tiny_original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    shutil.copytree(tiny_original, folder / "model_repository")
    models = ["intent", "intent_features"]
    with EmbeddedTriton(folder / "model_repository", models, log_file=folder / "triton.log") as server:
        yield server


@pytest.mark.server
@pytest.mark.parametrize("place", [[], ["--in-store"]], ids=["an ensemble of its own", "in the store"])
def test_from_the_shell_onto_a_server(triton, tmp_path, monkeypatch, capsys, command, place):
    monkeypatch.setenv("TRITON_MODEL_REPO", str(triton.repository))
    monkeypatch.setenv("TRITON_URL", triton.url)
    name = "stored" if place else "own"

    def patcher(*arguments):
        code, out, err = command(*arguments)
        assert code == 0, err
        return out

    train = {label: tiny.sentences(label, 20, seed=3) for label in tiny.NEW}
    file = tiny.write_csv(tmp_path / "train.csv", train)
    out = patcher("new-classifier", name, "--backbone", "intent", "--train", file, *place)
    assert f"{name} on intent, 3 labels from 60 texts: version 1 now serves" in out
    question = tiny.sentences("pizza", 1, seed=8)[0]
    (answer,) = json.loads(patcher("classify", question, "--classifier", name, "--json"))
    assert (answer["label"], answer["head_version"]) == ("pizza", 1)
    more = tiny.write_csv(tmp_path / "more.csv", {"music": tiny.sentences("music", 10)})
    report = json.loads(patcher("add-label", "--classifier", name, "--examples", more, "--json"))
    assert (report["version"], report["served"]) == (2, True)
    question = tiny.sentences("music", 1, seed=8)[0]
    (answer,) = json.loads(patcher("classify", question, "--classifier", name, "--json"))
    assert (answer["label"], answer["head_version"]) == ("music", 2)
    patcher("rollback", "--classifier", name)
    (answer,) = json.loads(patcher("classify", question, "--classifier", name, "--json"))
    assert (answer["label"] != "music", answer["head_version"]) == (True, 1)
    patcher("rename-label", "pizza", "food", "--classifier", name)
    assert json.loads(patcher("labels", "--classifier", name, "--json"))["labels"] == ["payday", "food", "holiday"]
    patcher("doctor")
    patcher("sync", "--classifier", name)
    (measured,) = json.loads(
        patcher("loadtest", "--classifier", name, "--concurrency", "2", "--window", "0.5", "--json")
    )
    assert measured["throughput"] > 0
    assert main(["drop-classifier", name]) == 2  # there is no server
    assert "deletes" in capsys.readouterr().err
    if not place:
        patcher("canary", "--classifier", name, "--version", "2", "--percent", "10")
        assert main(["drop-classifier", name, "--yes"]) == 2
        assert "on trial" in capsys.readouterr().err
        patcher("canary", "--classifier", name, "--discard")
    assert json.loads(patcher("drop-classifier", name, "--yes", "--json"))["dropped"] == [1, 2, 3]
    assert name not in ModelRepository(triton.repository).classifiers()
    assert not list(triton.repository.glob(f"{name}*"))
    assert main(["classify", question, "--classifier", f"intent_any/{name}" if place else name]) == (1 if place else 2)
    assert name in capsys.readouterr().err
    assert json.loads(patcher("classify", question, "--classifier", "intent", "--json"))[0]["head_version"] == 1
    patcher("doctor")
    patcher("new-classifier", name, "--backbone", "intent", "--train", file, *place)  # the name can be used again
    (answer,) = json.loads(patcher("classify", question, "--classifier", name, "--json"))
    assert answer["head_version"] == 1


@pytest.mark.server
@pytest.mark.parametrize("in_store", [False, True])
def test_several_labels_are_served(triton, tmp_path, monkeypatch, command, in_store):
    monkeypatch.setenv("TRITON_MODEL_REPO", str(triton.repository))
    monkeypatch.setenv("TRITON_URL", triton.url)
    name, given = f"tags_{in_store}", joined()
    file = tmp_path / "train.csv"
    with file.open("w") as rows:
        csv.writer(rows).writerows([("text", "label"), *zip(given.texts, given.labels, strict=True)])
    place = ["--in-store"] if in_store else []
    code, out, err = command("new-classifier", name, "--backbone", "intent", "--train", file, "--multi-label", *place)
    assert code == 0, err
    assert "held-out texts given exactly their labels" in out
    both = f"{tiny.sentences('pizza', 1, seed=8)[0]} and {tiny.sentences('payday', 1, seed=8)[0]}"
    code, out, err = command("classify", both, "--classifier", name, "--json")
    assert code == 0, err
    (answer,) = json.loads(out)
    assert {each["label"] for each in answer["candidates"] if each["score"] > 0.5} == {"pizza", "payday"}
    assert set(answer["labels"]) == {"pizza", "payday"}
    code, out, err = command("classify", both, tiny.FILLERS[0], "--classifier", name)
    assert code == 0, err
    _, _, *rows = out.splitlines()
    assert re.search(r"  (pizza|payday) \d.\d{3}, (pizza|payday) \d.\d{3}  ", rows[0])
    assert "  none  " in rows[1]
    with TritonServer(triton.url) as server:
        drop_classifier(ModelRepository(triton.repository), name, server)


@pytest.mark.server
def test_a_server_that_will_not_let_go_keeps_the_files(triton, tree, monkeypatch):
    repository = ModelRepository(triton.repository)
    with TritonServer(triton.url) as server:
        new_classifier(repository, "kept", examples(), server=server)
        before = tree(repository.root)

        def refuse(self, model):
            raise ServerRefused(f"unload {model}: no")

        monkeypatch.setattr(TritonServer, "unload", refuse)
        with pytest.raises(ServerRefused):
            drop_classifier(repository, "kept", server)
        assert tree(repository.root) == before
        monkeypatch.undo()
        server.unload("kept")  # as if the patcher had been killed after this
        server.unload("kept_head")
        assert drop_classifier(repository, "kept", server) == (1,)
        with pytest.raises(InputError, match="no classifier 'kept'"):
            drop_classifier(repository, "kept", server)


@pytest.mark.server
def test_where_one_of_several_servers_will_not_let_go_all_serve_it(triton, tmp_path):
    repository = ModelRepository(triton.repository)
    with TritonServer(triton.url) as server:
        new_classifier(repository, "kept", examples(), server=server)
    models, log = ["intent", "kept"], tmp_path / "triton.log"
    with EmbeddedTriton(triton.repository, models, admin_key="another", log_file=log) as other:
        with Fleet([triton.url, other.url]) as both:
            first, second = both.members
            asked: list[str] = []
            first.unload = asked.append
            with pytest.raises(ControlRefused):
                drop_classifier(repository, "kept", both)
            assert asked == []  # the server that refuses our key is found first
            del first.unload
            second.check_control = lambda: None
            with pytest.raises(ControlRefused):
                drop_classifier(repository, "kept", both)
            assert "kept" in repository.classifiers()
            assert [each.classify("kept", ["hello"])[0].head_version for each in both.members] == [1, 1]
            assert drop_classifier(repository, "kept", first) == (1,)


@pytest.mark.server
@pytest.mark.parametrize("in_store", [False, True])
def test_a_server_that_takes_no_model_from_here_is_found_before_anything_is_published(
    triton, tree, monkeypatch, in_store
):
    repository = ModelRepository(triton.repository)
    before = tree(repository.root)
    monkeypatch.setattr(ModelRepository, "has_store", lambda *_: False)
    with TritonServer(triton.url, admin_key="another") as server, pytest.raises(ControlRefused):
        new_classifier(repository, "refused", examples(), server=server, settings=FoundingSettings(in_store=in_store))
    assert tree(repository.root) == before


@pytest.mark.server
def test_what_is_no_classifier_is_left_alone(triton, tree):
    repository = ModelRepository(triton.repository)
    theirs = repository.root / "theirs"
    shutil.copytree(repository.root / "intent_tokenizer", theirs)
    config = theirs / "config.pbtxt"
    config.write_text(config.read_text().replace('"intent_tokenizer"', '"theirs"'))
    before = tree(repository.root)
    try:
        with TritonServer(triton.url) as server:
            server.load("theirs")
            with pytest.raises(InputError, match="no classifier 'theirs'"):
                drop_classifier(repository, "theirs", server)
            assert server.is_ready("theirs")
            with pytest.raises(InputError, match="cannot name a classifier"):
                drop_classifier(repository, "intent_backbone", server)
            assert tree(repository.root) == before
            server.unload("theirs")
    finally:
        shutil.rmtree(theirs)


@pytest.mark.server
def test_a_store_that_did_not_hear_of_it_is_asked_again(triton, monkeypatch):
    repository = ModelRepository(triton.repository)
    with TritonServer(triton.url) as server:
        new_classifier(repository, "unheard", examples(), server=server, settings=FoundingSettings(in_store=True))

        def away(self, *_):
            raise ServerUnreachable("no server answers")

        monkeypatch.setattr(TritonServer, "refresh", away)
        with pytest.raises(ServerError, match=r"is deleted, but may still be answered for .*\. Run .* again to retry"):
            drop_classifier(repository, "unheard", server)
        monkeypatch.undo()
        assert server.classify("intent_any/unheard", ["hello"])[0].head_version == 1
        assert drop_classifier(repository, "unheard", server) == ()
        with pytest.raises(ServerError, match="no classifier 'unheard'"):
            server.classify("intent_any/unheard", ["hello"])


@pytest.mark.server
def test_one_that_was_dropped_unheard_is_gone_when_its_name_is_served_the_other_way(triton):
    repository, name = ModelRepository(triton.repository), "again"
    own, stored = FoundingSettings(), FoundingSettings(in_store=True)
    places = {own: name, stored: f"intent_any/{name}"}
    with TritonServer(triton.url) as server:
        for first, then in ((own, stored), (stored, own)):
            new_classifier(repository, name, examples(), server=server, settings=first)
            drop_classifier(repository, name)
            new_classifier(repository, name, examples(tiny.OLD), server=server, settings=then)
            assert server.classify(places[then], ["hello"])[0].labels[0] in tiny.OLD
            with pytest.raises(ServerRefused):
                server.classify(places[first], ["hello"])
            drop_classifier(repository, name, server)

        told = {own: "from a model that the repository no longer has; ", stored: f"intent_any/{name}, too, which was "}
        for first, then in ((own, stored), (stored, own)):
            new_classifier(repository, name, examples(), server=server, settings=first)
            drop_classifier(repository, name)
            classifier = repository.classifier(new_classifier(repository, name, examples(), settings=then).classifier)
            assert server.classify(places[first], ["hello"])
            found = [
                each.finding for each in doctor.diagnose(repository.location, server, "url") if each.state == "fault"
            ]
            assert any(told[first] in each and "`patcher sync` ends that" in each for each in found)
            assert sync(classifier, server) == {server.url: "caught up"}
            with pytest.raises(ServerRefused):
                server.classify(places[first], ["hello"])
            assert server.classify(places[then], ["hello"])
            assert sync(classifier, server) == {server.url: "agreed"}
            assert [each for each in doctor.diagnose(repository.location, server, "url") if each.state == "fault"] == []
            drop_classifier(repository, name, server)


@pytest.mark.server
def test_a_store_is_asked_nothing_that_it_refuses(triton, monkeypatch):
    repository, refused, failure = ModelRepository(triton.repository), [], Address.failure
    with TritonServer(triton.url) as server:
        new_classifier(repository, "together", examples(), server=server, settings=FoundingSettings(in_store=True))
        monkeypatch.setattr(
            Address, "failure", lambda *given, **more: refused.append(given[1]) or failure(*given, **more)
        )
        new_classifier(repository, "beside", examples(), server=server)
        for name in ("intent", "beside"):
            assert sync(repository.classifier(name), server) == {server.url: "agreed"}
        assert [each for each in doctor.diagnose(repository.location, server, "url") if each.state == "fault"] == []
        assert [what for what in refused if "ready" not in what] == []
        monkeypatch.undo()
        for name in ("beside", "together"):
            drop_classifier(repository, name, server)


@pytest.mark.server
def test_doctor_asks_a_store_once_for_all_classifiers(triton, monkeypatch):
    repository, asked, held = ModelRepository(triton.repository), [], TritonServer.held
    with TritonServer(triton.url) as server:
        for name, settings in (("together", FoundingSettings(in_store=True)), ("beside", FoundingSettings())):
            new_classifier(repository, name, examples(), server=server, settings=settings)
        monkeypatch.setattr(TritonServer, "held", lambda *given: asked.append(given) or held(*given))
        assert [each for each in doctor.diagnose(repository.location, server, "url") if each.state == "fault"] == []
        assert len(asked) == 1
        for name in ("beside", "together"):
            drop_classifier(repository, name, server)


def test_a_store_is_asked_where_no_classifier_is_left(tiny_original, tmp_path):
    repository = ModelRepository(shutil.copytree(tiny_original, tmp_path / "model_repository"))
    new_classifier(repository, "last", examples(), settings=FoundingSettings(in_store=True))
    asked = []

    def held(*given):
        asked.append(given)
        return frozenset(["gone"])

    replica = SimpleNamespace(is_ready=lambda _: True, held=held)
    assert [*held_in_stores(repository, [], replica).values()] == [{"gone"}]
    ((store, name, width),) = asked
    assert (store, width) == ("intent_heads", tiny.WIDTH)
    with pytest.raises(InputError, match="cannot name a model"):
        check_name(name)


@pytest.mark.server
def test_a_store_of_an_earlier_version_tells_by_refusals(triton, monkeypatch):
    repository = ModelRepository(triton.repository)
    in_store, held = FoundingSettings(in_store=True), TritonServer.held

    def older(server, store, name, width):
        """Imitate an older store, which ignores the parameter: it answers from the head, or refuses."""
        server.head_logits(f"{store}/{name}", np.zeros((1, width), np.float32))

    with TritonServer(triton.url) as server:
        for name in ("kept", "gone"):
            new_classifier(repository, name, examples(), server=server, settings=in_store)
        assert held(server, "intent_heads", "nobody", tiny.WIDTH) >= {"kept", "gone"}
        monkeypatch.setattr(TritonServer, "held", older)
        assert [*held_in_stores(repository, ["gone", "nobody"], server).values()] == [{"gone"}]
        for name in ("kept", "gone"):
            drop_classifier(repository, name, server)


@pytest.mark.server
def test_what_was_dropped_without_the_server_and_is_answered_still_is_named(triton, monkeypatch):
    """Doctor reports it as a note, not a fault, and does not report models of other repositories."""
    repository, stored = ModelRepository(triton.repository), FoundingSettings(in_store=True)
    with TritonServer(triton.url) as server:

        def diagnosed():
            return [each for each in doctor.diagnose(repository.location, server, "url") if "served" in each.what]

        def told():
            found = diagnosed()
            assert [each for each in found if each.state == "fault"] == []
            return {each.what: each.finding for each in found if each.state == "note"}

        assert told() == {}
        new_classifier(repository, "alone", examples(), server=server)
        new_classifier(repository, "together", examples(), server=server, settings=stored)
        for name in ("theirs", "theirs_head"):  # as another repository on the same server may have
            folder = shutil.copytree(repository.root / "intent_tokenizer", repository.root / name)
            config = folder / "config.pbtxt"
            config.write_text(config.read_text().replace('"intent_tokenizer"', f'"{name}"'))
            server.load(name)
            shutil.rmtree(folder)
        assert told() == {}
        for name in ("alone", "together"):
            drop_classifier(repository, name)
        found = told()
        assert set(found) == {"alone, served", "intent_any/together, served"}
        assert (
            "the repository has no classifier alone; if it was dropped, `patcher drop-classifier alone` "
            in found["alone, served"]
        )
        with monkeypatch.context() as patched:  # a server of another repository, whose backbone has the same name
            patched.setattr(Backbone, "fingerprint", lambda _: "f" * 64)
            assert [each.what for each in diagnosed() if each.state == "note"] == []
        for name in ("alone", "together"):
            assert drop_classifier(repository, name, server) == ()
        assert told() == {}
        for name in ("theirs", "theirs_head"):
            server.unload(name)


@pytest.mark.server
def test_a_new_one_serves_although_an_earlier_one_cannot_be_ended(triton, monkeypatch):
    repository, name = ModelRepository(triton.repository), "stays"
    real, stuck = TritonServer.refresh, ServerRefused("intent_heads: Stub process 'intent_heads_0_0' is not healthy.")

    def refuse(*_):
        raise stuck

    with TritonServer(triton.url) as server:
        new_classifier(repository, name, examples(), server=server, settings=FoundingSettings(in_store=True))
        drop_classifier(repository, name)
        monkeypatch.setattr(TritonServer, "refresh", refuse)
        report = new_classifier(repository, name, examples(tiny.OLD), server=server)
        (warning,) = report.warnings
        assert "version 1 of stays serves, but an earlier stays may still be" in warning
        assert f"`patcher sync --classifier {name}` ends that" in warning
        assert (report.published, report.served) == (True, True)
        assert server.classify(name, ["hello"])[0].labels[0] in tiny.OLD
        monkeypatch.setattr(TritonServer, "refresh", real)
        assert sync(repository.classifier(name), server) == {server.url: "caught up"}
        drop_classifier(repository, name, server)


@pytest.mark.server
def test_a_head_store_that_fails_stops_no_classifier_beside_it(triton, monkeypatch):
    """A failing store answers for no classifier, so not for an earlier one of the same name either."""
    repository, name = ModelRepository(triton.repository), "beside"

    def dead(*_):
        raise ServerError("Failed to process the request(s) for model 'intent_heads_0_0', stub died unexpectedly")

    with TritonServer(triton.url) as server:
        new_classifier(repository, "other", examples(), server=server, settings=FoundingSettings(in_store=True))
        monkeypatch.setattr(TritonServer, "refresh", dead)
        monkeypatch.setattr(TritonServer, "held", dead)
        assert new_classifier(repository, name, examples(), server=server).served
        assert sync(repository.classifier(name), server) == {server.url: "agreed"}
        assert drop_classifier(repository, name, server) == (1,)
        monkeypatch.undo()
        drop_classifier(repository, "other", server)


@pytest.mark.server
def test_one_exported_beside_a_running_server_is_taken_up(classifier, tmp_path, monkeypatch, capsys):
    file = tiny.write_csv(tmp_path / "more.csv", {"payday": tiny.sentences("payday", 10)})
    verbs = {
        "patched": ["add-label", "--examples", str(file), "--classifier", "patched"],
        "synced": ["sync"],
        "repaired": ["doctor", "--repair"],
    }
    monkeypatch.setenv("TRITON_MODEL_REPO", str(classifier.root))
    models = ["intent", "intent_features"]
    with EmbeddedTriton(classifier.root, models, log_file=tmp_path / "log") as triton, triton.client() as server:
        monkeypatch.setenv("TRITON_URL", triton.url)
        for name, verb in verbs.items():
            tiny.make_repository(classifier.root, tmp_path / "scratch", name)
            assert main(verb) == 0, capsys.readouterr()
            assert server.classify(name, ["hello"])[0].head_version == (2 if name == "patched" else 1)
            assert server.features(f"{name}_features", ["hello"]).shape == (1, tiny.WIDTH)
            capsys.readouterr()
            assert main(["doctor"]) == 0, capsys.readouterr().out


def test_one_of_very_many_stays_small(tiny_original, tmp_path):
    repository = ModelRepository(shutil.copytree(tiny_original, tmp_path / "model_repository"))
    new_classifier(repository, "small", examples(), settings=FoundingSettings(in_store=True))
    classifier = repository.classifier("small")
    merge_labels(classifier, ["payday", "pizza"], "both", force=True)
    assert len(classifier.memory().clusters.labels) == 3  # the merged one keeps both
    given = {"both": ["payday", "pizza"], "holiday": ["holiday"]}
    texts = {label: [text for old in given[label] for text in tiny.sentences(old, 20, seed=3)] for label in given}
    remember(classifier, read_examples(tiny.write_csv(tmp_path / "again.csv", texts)))
    assert len(classifier.memory().clusters.labels) == 2


def test_texts_that_come_again_are_told(tiny_original, tmp_path, capsys):
    shutil.copytree(tiny_original, tmp_path / "model_repository")
    texts = {label: tiny.sentences(label, 10) for label in ("payday", "pizza")}
    path = tiny.write_csv(tmp_path / "topics.csv", {label: [*group, group[3]] for label, group in texts.items()})
    arguments = ["new-classifier", "topics", "--repo", str(tmp_path / "model_repository"), "--train", str(path)]
    assert main([*arguments, "--force", "--no-load"]) == 0
    out = capsys.readouterr().out
    assert "2 labels from 20 texts" in out
    assert "repeats   2 texts left out as duplicates" in out


@pytest.mark.parametrize("lost", [["half"], ["half", "half_head/config.pbtxt"]])
def test_what_a_killed_one_left_is_named_and_taken_away(lost, tiny_original, tmp_path, capsys):
    """In a folder, the head comes before the ensemble; in an object store, the memory comes first of all."""
    root = shutil.copytree(tiny_original, tmp_path / "model_repository")
    repository = ModelRepository(root)
    new_classifier(repository, "half", examples())
    for path in map(root.joinpath, [*lost, "half.journal"]):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (found,) = (check for check in doctor.diagnose(root, None, "url") if check.what == "half, remains")
    assert (found.state, "`patcher drop-classifier half --yes`" in found.finding) == ("note", True)
    with repository.lock():  # it may be one that is just being made
        assert all(check.what != "half, remains" for check in doctor.diagnose(root, None, "url"))
    assert main(["drop-classifier", "half", "--yes", "--no-load", "--repo", str(root)]) == 0
    assert list(root.glob("half*")) == []
    assert capsys.readouterr().out.startswith("half was deleted")


@pytest.mark.parametrize("in_store", [False, True])
def test_a_drop_that_was_killed_is_finished_by_the_next(tiny_original, tmp_path, monkeypatch, capsys, tree, in_store):
    shutil.copytree(tiny_original, tmp_path / "model_repository")
    repository = ModelRepository(tmp_path / "model_repository")
    before = tree(repository.root)
    new_classifier(repository, "half", examples(), settings=FoundingSettings(in_store=in_store))
    add_label(repository, "music", tiny.sentences("music", 10), classifier="half")
    rename, left = Path.rename, [1]

    def killed(self, target):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    monkeypatch.setattr(disk, "move_back", lambda _: None)  # a killed process undoes and removes nothing:
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        drop_classifier(repository, "half")
    monkeypatch.undo()
    assert "half" not in repository.classifiers()
    assert repository.has_remains("half")
    assert main(["drop-classifier", "half", "--yes", "--no-load", "--repo", str(repository.root)]) == 0
    assert capsys.readouterr().out.startswith("half was deleted")
    kept = {
        name: data for name, data in tree(repository.root).items() if not name.startswith("intent_") or name in before
    }
    assert kept == before
    new_classifier(repository, "half", examples())


def test_a_drop_leaves_a_line_for_the_auditors(tiny_original, tmp_path, monkeypatch):
    shutil.copytree(tiny_original, tmp_path / "model_repository")
    monkeypatch.setenv("TRITON_MODEL_REPO", str(tmp_path / "model_repository"))
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(tmp_path / "audit.jsonl"))
    new_classifier(ModelRepository(tmp_path / "model_repository"), "topics", examples())
    assert main(["drop-classifier", "topics", "--yes", "--no-load"]) == 0
    assert main(["drop-classifier", "topics", "--yes", "--no-load"]) == 2
    assert main(["drop-classifier", "intent_canary", "--yes", "--no-load"]) == 2
    events = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(each["verb"], each["classifier"], each["outcome"]) for each in events] == [
        ("drop-classifier", "topics", "done"),
        ("drop-classifier", "topics", "bad_input"),
        ("drop-classifier", "intent_canary", "bad_input"),
    ]
    assert events[0]["versions"] == [1]


def test_with_a_replica_away_nothing_is_dropped(tiny_original, tmp_path, monkeypatch):
    shutil.copytree(tiny_original, tmp_path / "model_repository")
    repository = ModelRepository(tmp_path / "model_repository")
    new_classifier(repository, "topics", examples())
    monkeypatch.setattr(TritonServer, "is_live", lambda self: self.url.endswith(":1"))
    with Fleet(["localhost:1", "localhost:2"]) as fleet, pytest.raises(ServerUnreachable, match="localhost:2 does not"):
        drop_classifier(repository, "topics", fleet)
    assert "topics" in repository.classifiers()


@pytest.mark.server
def test_what_a_server_will_not_serve_is_taken_out_again(triton, monkeypatch, tree):
    repository = ModelRepository(triton.repository)
    before = tree(repository.root)

    def torn(*arguments, **options):
        made = add_classifier(*arguments, **options)
        (made.version_path(1) / "model.onnx").write_bytes(b"damaged after the check")
        return made

    monkeypatch.setattr("patcher.founding.add_classifier", torn)
    with TritonServer(triton.url) as server:
        for place in (False, True):
            settings = FoundingSettings(in_store=place)
            with pytest.raises(NotServed, match="would not serve it"):
                new_classifier(repository, "torn", examples(), server=server, settings=settings)
            assert tree(repository.root) == before
        monkeypatch.undo()
        assert new_classifier(repository, "torn", examples(), server=server).served
        assert server.classify("torn", ["hello"])[0].head_version == 1
        assert isinstance(repository.classifier("torn"), Classifier)
