"""Writing a patched head back into a checkpoint."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import checkpoints
import numpy as np
import pytest
import torch
import transformers

from export import export_classifier, to_transformers
from export.precision import LIMITS, Limits
from export.to_transformers import _recorded
from patcher import PatchSettings, add_label, prune, remove_label
from patcher.cli import main
from patcher.errors import ExportError, InputError, ParityError
from patcher.head import Lineage
from patcher.narrow import narrow_head
from patcher.runtime import Encoder
from tests.test_fit import world

FORCED = PatchSettings(force=True)
PIZZA = ["one large pizza please", "order a pizza with cheese", "pizza for two", "I want pizza", "bring me a pizza"]


def train_file(folder):
    path = folder / "train.csv"
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in checkpoints.TRAIN))
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return checkpoints.save_checkpoint(tmp_path_factory.mktemp("back") / "checkpoint")


@pytest.fixture(scope="module")
def patched(bert, tmp_path_factory):
    """A classifier with one label removed and two patched in."""
    folder = tmp_path_factory.mktemp("patched")
    repository = export_classifier(bert, folder / "model_repository", train=train_file(folder))
    add_label(repository, "pizza", PIZZA, settings=FORCED)
    classifier = repository.classifier()
    remove_label(classifier, "greeting")
    add_label(repository, "parting", ["goodbye", "see you later", "bye bye"], settings=FORCED)
    return classifier


def test_the_checkpoint_has_the_labels_and_rows_of_the_head(bert, patched, tmp_path):
    made = to_transformers(patched, bert, tmp_path / "new")
    head = patched.head()
    assert (made.version, made.labels, set(made.refitted)) == (4, 6, {"pizza", "parting"})
    assert made.agreement is not None
    model = transformers.AutoModelForSequenceClassification.from_pretrained(made.folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.folder)
    assert tuple(model.config.id2label.values()) == head.labels
    with torch.no_grad():
        logits = model(**tokenizer(list(checkpoints.SENTENCES), padding=True, return_tensors="pt")).logits.numpy()
    features = Encoder(patched.backbone_path, patched.tokenizer_path).encode(checkpoints.SENTENCES)
    fine_tuned = [i for i, row in enumerate(head.order) if row < len(head.base_weight)]
    np.testing.assert_allclose(logits[:, fine_tuned], head.logits(features)[:, fine_tuned], atol=1e-3)
    plain = narrow_head(head, patched.memory())
    np.testing.assert_allclose(logits, plain.logits(features[:, : head.split]), atol=1e-3)
    # It can be exported again; the new labels then count as fine-tuned ones.
    again = export_classifier(made.folder, tmp_path / "again").classifier()
    assert again.head().labels == head.labels


def test_rows_on_the_classifier_features_find_the_label():
    head, memory, features, ids, new = world()
    from patcher.fit import fit

    wide = fit({"new": new(10)}, head, memory).apply(head)
    memory = memory.add(["new"], new(10), np.zeros(10, np.int64))
    plain = narrow_head(wide, memory)
    assert (plain.width, plain.labels) == (head.split, wide.labels)
    assert plain.base_weight[:8].tobytes() == head.base_weight.tobytes()
    assert (plain.logits(new(200, seed=9)[:, :12]).argmax(axis=1) == 8).mean() > 0.8
    assert (plain.logits(features[:, :12]).argmax(axis=1) == ids).mean() > 0.95
    with pytest.raises(InputError, match="the memory has nothing on 'new'"):
        narrow_head(wide, None)
    assert narrow_head(head, None).base_weight.tobytes() == head.base_weight.tobytes()


@pytest.mark.parametrize("method", ["ridge", "lda"])
def test_rows_that_were_all_refitted_are_fitted_on_the_classifier_features(method):
    head, memory, features, ids, new = world()
    from patcher.fit import fit

    wide = fit({"new": new(10)}, head, memory, method=method).apply(head)
    plain = narrow_head(wide, memory.add(["new"], new(10), np.zeros(10, np.int64)))
    assert (plain.width, plain.labels) == (head.split, wide.labels)
    assert (plain.logits(new(200, seed=9)[:, :12]).argmax(axis=1) == 8).mean() > 0.8
    assert (plain.logits(features[:, :12]).argmax(axis=1) == ids).mean() > 0.95


def test_what_does_not_fit_is_refused_and_nothing_written(bert, patched, tmp_path):
    other = checkpoints.save_checkpoint(tmp_path / "other", "bert", hidden_size=16, num_attention_heads=2)
    with pytest.raises(ParityError, match="exported from another checkpoint"):
        to_transformers(patched, other, tmp_path / "new")
    other = checkpoints.save_checkpoint(tmp_path / "untyped", "distilbert")
    with pytest.raises(ParityError, match=r"not exported from .*takes token_type_ids, the checkpoint does not"):
        to_transformers(patched, other, tmp_path / "new")
    short = checkpoints.save_checkpoint(tmp_path / "short", max_position_embeddings=40)
    with pytest.raises(ParityError, match=r"not exported from .*for a maximum length of 78 tokens; expected 3 to 40"):
        to_transformers(patched, short, tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        to_transformers(patched, bert, tmp_path / "full")
    gpt2 = checkpoints.save_checkpoint(tmp_path / "gpt2", "gpt2")
    repository = export_classifier(gpt2, tmp_path / "repository", train=train_file(tmp_path))
    add_label(repository, "pizza", PIZZA, settings=FORCED)
    with pytest.raises(ExportError, match="has no bias"):
        to_transformers(repository.classifier(), gpt2, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".patcher-*"))


def test_the_verb(bert, patched, tmp_path, capsys):
    command = ["to-transformers", str(tmp_path / "new"), "--checkpoint", str(bert), "--repo", str(patched.root)]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    assert main([*command, "--version", "1", "--json"]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert said.err == ""  # no progress bars of transformers
    assert transformers.utils.logging.is_progress_bar_enabled() == bars
    found = json.loads(said.out)
    assert (found["version"], found["refitted"], found["agreement"]) == (1, [], 1.0)
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_checkpoint_of_the_hub_is_named_as_one():
    lineage = Lineage(version=1, parent=None, backbone="b", details={"checkpoint": "distilbert-mine"})
    assert _recorded("intent", SimpleNamespace(lineage=lineage)) == "hf://distilbert-mine"


def test_the_checkpoint_is_taken_from_where_the_export_found_it(bert, tmp_path, monkeypatch, capsys):
    shutil.copytree(bert, tmp_path / "fine-tuned")
    monkeypatch.chdir(tmp_path)
    repository = export_classifier("fine-tuned", "repository", train=train_file(tmp_path))
    add_label(repository, "pizza", PIZZA, settings=FORCED)
    add_label(repository, "parting", ["goodbye", "see you later", "bye bye"], settings=FORCED)
    assert prune(repository.classifier(), 1) == (1,)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    command = ["to-transformers", "--repo", str(tmp_path / "repository"), "--json"]
    assert main([*command, "new"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["labels"] == len(checkpoints.LABELS) + 2
    shutil.rmtree(tmp_path / "fine-tuned")
    assert main([*command, "newer"]) == 2
    assert "fine-tuned, which is not there any more; expected --checkpoint MODEL" in capsys.readouterr().err
    checkpoints.save_checkpoint(tmp_path / "fine-tuned", "bert", hidden_size=16, num_attention_heads=2)
    assert main([*command, "newer"]) == 1
    assert "exported from another checkpoint" in capsys.readouterr().err


def test_a_classifier_whose_checkpoint_nobody_noted_needs_it_named(classifier, tmp_path):
    how = r"expected --checkpoint MODEL \(checkpoint=...\)"
    for given in (classifier, classifier.repository):
        with pytest.raises(InputError, match=f"nothing says what intent was exported from; {how}"):
            to_transformers(given, None, tmp_path / "new")


def test_arguments_of_other_types_are_refused(classifier, tmp_path):
    new = tmp_path / "new"
    for call, message in (
        (lambda: to_transformers(None, None, new), "classifier: expected ModelRepository or Classifier, got None"),
        (lambda: to_transformers(classifier, 1, new), "checkpoint: expected str or PathLike or None, got int"),
        (lambda: to_transformers(classifier, None, None), "folder: expected str or PathLike, got None"),
        (lambda: to_transformers(classifier, None, new, "1"), "version: expected int or None, got str"),
        (lambda: to_transformers(classifier, None, new, allow_pickle="no"), "allow_pickle: expected bool, got str"),
        (lambda: export_classifier(None, new), "model: expected str or PathLike or Module, got None"),
        (lambda: export_classifier("bert", None), "location: expected str or PathLike, got None"),
        (lambda: export_classifier("bert", new, in_store="no"), "in_store: expected bool, got str"),
        (lambda: export_classifier("bert", new, max_length="9"), "max_length: expected int or None, got str"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(TypeError, match="allow_pikle"):
        to_transformers(classifier, None, new, allow_pikle=True)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_one_of_a_lower_precision_and_shorter_texts_comes_back_too(bert, tmp_path, precision, monkeypatch):
    monkeypatch.setitem(LIMITS, precision, Limits(99, 1, 1))  # so small a model loses too much in low precision
    repository = export_classifier(
        bert, tmp_path / "repository", train=train_file(tmp_path), precision=precision, max_length=20
    )
    monkeypatch.setitem(LIMITS, precision, Limits(0.3, 1, 1))
    add_label(repository, "pizza", PIZZA, settings=FORCED)
    add_label(repository, "parting", ["goodbye", "see you later", "bye bye"], settings=FORCED)
    assert prune(repository.classifier(), 1) == (1,)  # the version that records what was exported
    made = to_transformers(repository.classifier(), bert, tmp_path / "new")
    assert made.labels == len(checkpoints.LABELS) + 2


def test_it_keeps_its_own_precision_and_padding(bert, tmp_path):
    # BERT tolerates padding on the right only, whatever its tokenizer is set to.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert, padding_side="left")
    model.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    repository = export_classifier(tmp_path / "half", tmp_path / "repository", train=train_file(tmp_path))
    add_label(repository, "pizza", PIZZA, settings=FORCED)
    made = to_transformers(repository.classifier(), tmp_path / "half", tmp_path / "new")
    back = transformers.AutoModelForSequenceClassification.from_pretrained(made.folder)
    assert {weights.dtype for weights in back.parameters()} == {torch.bfloat16}
    assert back.config.dtype == torch.bfloat16
    assert transformers.AutoTokenizer.from_pretrained(made.folder).padding_side == "left"
    rows = model.classifier.weight
    assert torch.equal(back.classifier.weight[: len(rows)], rows)
