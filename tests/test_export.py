"""What an export refuses and why, what it leaves unchanged, and that its output is reproducible byte for byte."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import checkpoints  # noqa: E402  needs both
from tokenizers import Tokenizer, models  # noqa: E402

import export  # noqa: E402
import export.checkpoint  # noqa: E402
import export.stages  # noqa: E402
from export import ExportCallback, export_classifier, run_export  # noqa: E402
from export.checkpoint import from_objects, load_checkpoint  # noqa: E402
from export.last_layer import proven_layer  # noqa: E402
from export.source import locate  # noqa: E402
from export.tokenizer import SAMPLE_TEXTS, _spare, prepare_tokenizer  # noqa: E402
from patcher import ModelRepository, PatchSettings, add_label  # noqa: E402
from patcher.cli import main  # noqa: E402
from patcher.errors import (  # noqa: E402
    CheckpointError,
    ExamplesError,
    ExportError,
    InputError,
    ParityError,
    RepositoryError,
    SplitError,
    StorageError,
)
from patcher.examples import Examples  # noqa: E402
from patcher.examples_file import read_examples  # noqa: E402
from patcher.files import enclosing  # noqa: E402
from patcher.fit.scope import FINE_TUNED  # noqa: E402
from patcher.remembering import remember  # noqa: E402
from patcher.runtime import Encoder, open_session, run_head  # noqa: E402
from patcher.serve import served_models  # noqa: E402
from patcher.triton.server import EmbeddedTriton  # noqa: E402


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A saved BERT checkpoint; tests that change it take a copy."""
    return checkpoints.save_checkpoint(tmp_path_factory.mktemp("bert") / "checkpoint")


@pytest.fixture
def copy(bert, tmp_path):
    return shutil.copytree(bert, tmp_path / "copy")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def train_file(folder, rows):
    path = folder / "train.csv"
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    return path


def in_memory(model):
    return {"model": model, "tokenizer": checkpoints.make_tokenizer()}


# --- checkpoints that are refused -------------------------------------------------------------------------------------


def regression(folder):
    edit_config(folder, problem_type="regression")


def one_label(folder):
    edit_config(folder, id2label={"0": "score"}, label2id={"score": 0})


def repeated_label(folder):
    names = [*checkpoints.LABELS[:-1], checkpoints.LABELS[0]]
    edit_config(folder, id2label={str(index): name for index, name in enumerate(names)}, label2id={})


def label_with_newline(folder):
    names = [*checkpoints.LABELS[:-1], "a\nb"]
    edit_config(folder, id2label={str(index): name for index, name in enumerate(names)}, label2id={})


def list_of_labels(folder):
    edit_config(folder, id2label=list(checkpoints.LABELS))


def labels_by_name(folder):
    edit_config(folder, id2label={f"LABEL_{i}": name for i, name in enumerate(checkpoints.LABELS)}, label2id={})


def labels_of_none(folder):
    config = json.loads((folder / "config.json").read_text()) | {"id2label": None, "label2id": None}
    (folder / "config.json").write_text(json.dumps(config))


def another_task(folder):
    edit_config(folder, architectures=["BertForMaskedLM"])


def no_head(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "classifier" not in k}, folder / "model.safetensors", {"format": "pt"}
    )


def other_shapes(folder):
    edit_config(folder, hidden_size=64)


def quantized(folder):
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


def pickle_only(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickle_of_training(folder):
    pickle_only(folder)
    only_training(folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")


def only_training(folder):
    no_weights(folder)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth"):
        torch.save({}, folder / name)


def no_weights(folder):
    (folder / "model.safetensors").unlink(missing_ok=True)


def cut_weights(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)


def broken_config(folder):
    (folder / "config.json").write_text("{")


def no_config(folder):
    (folder / "config.json").unlink()


def adapter_beside(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def adapter_alone(folder):
    adapter_beside(folder)
    no_config(folder)


def config_below(folder):
    for name in ("checkpoint-500", "runs"):
        (folder / name).mkdir()
    (folder / "config.json").rename(folder / "checkpoint-500" / "config.json")


def sentencepiece_alone(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    checkpoints.make_model("deberta-v2", checkpoints.make_tokenizer()).save_pretrained(folder)
    (folder / "spm.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "DebertaV2Tokenizer"}))


def unknown_model(folder):
    edit_config(folder, model_type="something-new")


def own_code(folder):
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text("raise SystemExit('this code ran')")


def config_that_is_a_list(folder):
    (folder / "config.json").write_text("[]")


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    "damage, reason",
    [
        (regression, "trained for regression"),
        (one_label, r"1 label\(s\), as a regression has"),
        (repeated_label, "'balance' more than once"),
        (label_with_newline, r"id2label 4: the label 'a\\nb' has an unprintable character \(U\+000A\)"),
        (another_task, "is a BertForMaskedLM; expected a model ending in ForSequenceClassification"),
        (no_head, r"lacks 2 weights of BertForSequenceClassification \(classifier.bias, classifier.weight\)"),
        (list_of_labels, r"id2label in config.json is \['balance', .*; expected a name for each number, as in \{\"0\""),
        (labels_by_name, r"id2label in config.json is \{'LABEL_0': 'balance'.*; expected a name for each number"),
        (labels_of_none, r"says \(it counts 2 labels; expected in id2label a name for each row"),
        (other_shapes, r"their shapes are not those that its config.json says \(it counts 5 labels"),
        (quantized, "is quantized"),
        (pickle_only, r"in a pickle \(pytorch_model.bin\), which can run code"),
        (pickle_of_training, r"in a pickle \(pytorch_model-00001-of-00001.bin\), which can run code"),
        (only_training, "cannot read the weights of .*no file named model.safetensors"),
        (no_weights, "cannot read the weights of .*no file named model.safetensors"),
        (cut_weights, "cannot read the weights of .*incomplete metadata"),
        (broken_config, "cannot read the configuration of .*not a valid JSON file"),
        (config_that_is_a_list, "cannot read the configuration of "),
        (no_config, "holds no config.json; expected the folder of a saved transformers model$"),
        (config_below, "holds no config.json; .* model, such as .*/copy/checkpoint-500$"),
        (adapter_beside, r"holds a PEFT adapter \(adapter_config.json\) that is not merged .*`merge_and_unload\(\)`"),
        (adapter_alone, r"holds a PEFT adapter \(adapter_config.json\) that is not merged .*`merge_and_unload\(\)`"),
        (sentencepiece_alone, r"a SentencePiece file alone \(spm.model\); expected tokenizer.json, .*protobuf are"),
        (unknown_model, "cannot read the configuration of .*`something-new`"),
        (own_code, r"brings Python code of its own; --trust-remote-code \(trust_remote_code=True\) runs it"),
        (no_tokenizer, r"has no vocabulary for its BertTokenizer; expected .* such as vocab\.txt\)"),
    ],
)
def test_a_checkpoint_is_refused_with_the_reason(copy, tmp_path, damage, reason):
    damage(copy)
    with pytest.raises(CheckpointError, match=reason) as caught:
        run_export(copy, tmp_path / "model_repository")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "model_repository").exists()


@pytest.mark.parametrize(
    "source, reason",
    [("./not/there", "no folder that is there"), ("not/there/either", "no folder that is there"), (__file__, "a file")],
)
def test_a_source_that_is_no_checkpoint(tmp_path, source, reason):
    with pytest.raises(CheckpointError, match=reason):
        run_export(source, tmp_path / "model_repository")


@pytest.mark.parametrize("mistyped", ["my-finetunedbert", "./my-finetuned-brt", "below/my_finetuned_bert"])
def test_a_folder_that_is_mistyped_is_told_without_asking_the_hub(mistyped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("export.source._hub_answers", lambda: pytest.fail("the hub was asked"))
    for folder in (Path("my-finetuned-bert"), Path("below/my-finetuned-bert")):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    (tmp_path / "my-finetunedbert-logs").mkdir()
    meant = Path(mistyped).parent / "my-finetuned-bert"
    hub = "" if mistyped.startswith("./") else f" hf://{mistyped} is the hub's"
    with pytest.raises(CheckpointError, match=rf"no folder that is there; .*: did you mean {meant}\?{hub}$"):
        run_export(mistyped, tmp_path / "model_repository")


def test_an_id_of_the_hub_is_taken_for_one_when_it_says_so(bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bert, "bert-mini")
    asked = []
    monkeypatch.setattr("export.source._hub_answers", lambda: asked.append(1))
    with pytest.raises(CheckpointError, match=r"^cannot read .* of bertmini \(no folder of that name is"):
        run_export("hf://bertmini", tmp_path / "model_repository")
    assert asked == [1]
    for wrong, reason in (
        ("hf://a/b/c", "'a/b/c' is no id of the hub; expected hf://owner/name"),
        ("hf://", "'' is no id of the hub"),
        ("hf://bert-mini", "bert-mini lies in this folder, where hf://bert-mini cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            run_export(wrong, tmp_path / "model_repository")


def test_a_repository_inside_of_a_repository_is_refused(bert, tmp_path, tree):
    root = tmp_path / "model_repository"
    run_export(bert, root)
    before = tree(root)
    for inside, name in (("intent", "other"), ("new", "other"), ("intent", "intent"), ("a/b", "other")):
        with pytest.raises(
            InputError, match=rf"{root}/{inside} lies in a repository; expected --repo {root} \(repository_dir\)$"
        ):
            run_export("./not/there", root / inside, name=name)
    assert tree(root) == before


def test_what_a_repository_lies_in_is_not_inside_of_it(bert, tmp_path, monkeypatch):
    root = tmp_path / "all" / "model_repository"
    run_export(bert, root)
    monkeypatch.chdir(root)
    for location, found in (
        ("..", None),
        ("../..", None),
        ("../beside", None),
        (".", None),
        ("intent", (str(root), "intent")),
        ("intent/1/..", (str(root), "intent")),
        ("a/b", (str(root), "")),
    ):
        assert enclosing(location) == found
    run_export(bert, Path(".."))
    assert (root.parent / "intent" / "config.pbtxt").is_file()


def test_a_place_in_a_bucket_lies_in_all_that_is_above_it():
    asked = []

    def found(parent):
        asked.append(parent)
        return SimpleNamespace(find=lambda _: b"{}" if parent == "s3://bucket/models" else None, has=lambda _: False)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("patcher.files.open_storage", found)
        assert enclosing("s3://bucket/models/a/b/") == ("s3://bucket/models", "")
        assert enclosing("s3://bucket/other") is None
    assert asked == ["s3://bucket/models/a", "s3://bucket/models", "s3://bucket"]


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        CheckpointError, match=r"of nobody/nothing \(no folder of that name is here, and no hub answers"
    ):
        run_export("nobody/nothing", tmp_path / "model_repository")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as refusing:
        threading.Thread(target=refusing.handle_request).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{refusing.server_port}")
        assert export.source._hub_answers()


@pytest.mark.parametrize("known", [True, False])
def test_an_id_that_the_hub_does_not_know_is_refused_at_once(tmp_path, monkeypatch, known):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200 if known or self.path == "/" else 404)
            if self.path != "/":
                self.send_header("ETag", '"x"')
                self.send_header("X-Repo-Commit", "a" * 40)
                self.send_header("X-Error-Code", "" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/{filename}")
        try:
            if known:
                assert locate("nobody/nothing") == ("nobody/nothing", False)
            else:
                with pytest.raises(CheckpointError, match=r"it was looked for on the hub\): nobody/nothing is not a"):
                    locate("nobody/nothing")
        finally:
            server.shutdown()


@pytest.mark.parametrize("written", ["balance", "0", "LABEL_9"])
def test_labels_without_names_are_told(copy, tmp_path, written):
    edit_config(copy, id2label={str(i): f"LABEL_{i}" for i in range(5)}, label2id={f"LABEL_{i}": i for i in range(5)})
    train = train_file(tmp_path, [("what is the balance", written)])
    with pytest.raises(ExamplesError, match=r"no label .* gives them no names \(LABEL_0 …\); set id2label there, or"):
        run_export(copy, tmp_path / "model_repository", train=train)


def test_a_pickle_is_read_when_asked_for(copy, bert, tmp_path):
    pickle_only(copy)
    ours = run_export(copy, tmp_path / "one", allow_pickle=True)
    assert ours.fingerprint == run_export(bert, tmp_path / "two").fingerprint


@pytest.mark.parametrize("named", ["w.bin", "../outside.safetensors", "/etc/passwd", 5])
def test_an_index_names_no_other_files(copy, tmp_path, named):
    (copy / "model.safetensors").rename(copy / "decoy.safetensors")
    (copy / "w.bin").write_bytes(b"no pickle at all")
    index = {"metadata": {"total_size": 1}, "weight_map": {"bert.pooler.dense.weight": named}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json has weights in .*; expected files beside it"):
        run_export(copy, tmp_path / "model_repository")


@pytest.mark.parametrize(
    "index, weights",
    [
        ("model.safetensors.index.json", None),
        ("other.safetensors.index.json", "other.safetensors.index.json"),
        ("no.json", "adapter_model.bin"),
        ("sub/w.safetensors.index.json", "sub/w.safetensors.index.json"),
    ],
)
@pytest.mark.parametrize("on_hub", [True, False])
def test_no_index_of_a_checkpoint_names_a_pickle(copy, tmp_path, monkeypatch, index, weights, on_hub):
    """The checkpoint is also tried in the cache layout of the hub's library, so that the hub is not contacted."""
    hub = tmp_path / "hub" / "models--somebody--model"
    for target in (copy / index, hub / "snapshots" / "x", hub / "refs" / "x"):
        target.parent.mkdir(parents=True, exist_ok=True)
    (copy / "model.safetensors").unlink()
    (copy / "w.bin").write_bytes(b"no pickle at all")
    (copy / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a.weight": "w.bin"}}))
    if weights:
        edit_config(copy, transformers_weights=weights)
    (hub / "refs" / "main").write_text("a" * 40)
    shutil.copytree(copy, hub / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("export.source._hub_answers", lambda: False)
    with pytest.raises(
        CheckpointError, match=r"w\.bin.*; expected files beside|transformers_weights\); expected a file"
    ):
        run_export("hf://somebody/model" if on_hub else copy, tmp_path / "model_repository")


def test_an_adapter_on_the_hub_is_refused(copy, tmp_path, monkeypatch):
    adapter_beside(copy)
    hub = tmp_path / "hub" / "models--somebody--model"
    shutil.copytree(copy, hub / "snapshots" / ("a" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("export.source._hub_answers", lambda: False)
    with pytest.raises(CheckpointError, match=r"^somebody/model holds a PEFT adapter"):
        run_export("hf://somebody/model", tmp_path / "model_repository")


def test_no_attention_comes_from_the_hub(copy, tmp_path):
    edit_config(copy, _attn_implementation="somebody/kernel")
    with pytest.raises(CheckpointError, match=r"attention 'somebody/kernel'.*; expected eager or sdpa"):
        run_export(copy, tmp_path / "model_repository")


def test_a_pickle_that_would_run_code_is_told(copy, tmp_path):
    pickle_only(copy)
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        run_export(copy, tmp_path / "model_repository", allow_pickle=True)


def test_own_code_runs_when_asked_for(bert, copy, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (copy / "own.py").write_text(
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnForSequenceClassification(BertForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    homes = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnForSequenceClassification"}
    edit_config(copy, model_type="own", auto_map=homes, architectures=["OwnForSequenceClassification"])
    ours = run_export(copy, tmp_path / "one", trust_remote_code=True)
    assert ours.fingerprint == run_export(bert, tmp_path / "two").fingerprint


# --- models that cannot be split --------------------------------------------------------------------------------------


def bert_class(name, **members):
    return type(f"{name}ForSequenceClassification", (transformers.BertForSequenceClassification,), members)


def model_of(kind):
    model = checkpoints.make_model("bert", checkpoints.make_tokenizer())
    model.__class__ = kind
    return model


def scaled_logits(self, **inputs):
    output = transformers.BertForSequenceClassification.forward(self, **inputs)
    output.logits = output.logits * 2
    return output


def cosine_logits(self, input_ids=None, attention_mask=None):
    pooled = torch.nn.functional.normalize(self.bert(input_ids, attention_mask)[1], dim=-1)
    return transformers.modeling_outputs.SequenceClassifierOutput(logits=pooled @ self.classifier.weight.T)


def used_twice(self, input_ids=None, attention_mask=None):
    states, pooled = self.bert(input_ids, attention_mask)[:2]
    self.classifier(states)
    return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.classifier(pooled))


def peeking(self, input_ids=None, attention_mask=None):
    pooled = self.bert(input_ids, attention_mask)[1]
    pooled = pooled * self.classifier.weight.mean() if hasattr(self.classifier, "weight") else pooled
    return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.classifier(pooled))


def failing(self, input_ids=None, attention_mask=None):
    raise ValueError("only one text at a time")


@pytest.mark.parametrize(
    "forward, reason",
    [
        (scaled_logits, "something after the last layer changes them"),
        (cosine_logits, r"no linear layer of .* gives its logits \(linear layers to 5 numbers: none\)"),
        (used_twice, "calls its layer 'classifier' more than once"),
        (peeking, "not made by the layer 'classifier' alone"),
        (failing, r"forward of .* failed on a batch of 8 texts of .*: only one text at a time"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(tmp_path, forward, reason):
    def spelled_out(self, input_ids=None, attention_mask=None, token_type_ids=None):
        return forward(self, input_ids=input_ids, attention_mask=attention_mask)

    model = model_of(bert_class("Odd", forward=spelled_out))
    with pytest.raises(CheckpointError, match=reason):
        run_export(repository_dir=tmp_path / "model_repository", **in_memory(model))
    assert not (tmp_path / "model_repository").exists()


def test_a_layer_with_an_adapter_is_refused(tmp_path):
    class Adapted(torch.nn.Linear):
        def forward(self, given):
            return super().forward(given) + given.sum(dim=-1, keepdim=True)

    model = checkpoints.make_model("bert", checkpoints.make_tokenizer())
    model.classifier.__class__ = Adapted
    with pytest.raises(SplitError, match=r"'classifier' \(Adapted\) gives the logits, but is not linear"):
        run_export(repository_dir=tmp_path / "model_repository", **in_memory(model))


def test_a_last_layer_that_lies_the_other_way_round_is_found(tmp_path):
    model = checkpoints.make_model("bert", checkpoints.make_tokenizer())
    turned = transformers.pytorch_utils.Conv1D(5, 32)
    turned.weight.data, turned.bias.data = model.classifier.weight.data.T.clone(), model.classifier.bias.data.clone()
    model.classifier = turned
    report = run_export(repository_dir=tmp_path / "model_repository", **in_memory(model))
    head = report.repository.classifier().head()
    np.testing.assert_array_equal(head.base_weight, turned.weight.detach().numpy().T)


def test_a_model_that_torch_cannot_export_is_refused(tmp_path):
    sizes = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]}
    model = transformers.FunnelForSequenceClassification(
        transformers.FunnelConfig(vocab_size=200, num_labels=3, **sizes)
    )
    with pytest.raises(ExportError, match="torch cannot export FunnelForSequenceClassification to ONNX"):
        run_export(repository_dir=tmp_path / "model_repository", **in_memory(model.eval()))


# --- options and training files that are refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"name": "a/b"}, "'a/b' cannot name a model"),
        ({"backbone": "x_head"}, "belong to its parts"),
        ({"precision": "int4"}, "no precision 'int4'; expected fp32, fp16, int8"),
        ({"max_length": 81}, "a maximum length of 81 tokens; expected 3 to 78"),
        ({"max_length": 0}, "a maximum length of 0 tokens"),
        ({"max_length": 2}, "a maximum length of 2 tokens; expected 3 to 78"),
    ],
)
def test_an_option_that_makes_no_sense(bert, tmp_path, options, reason):
    with pytest.raises(InputError, match=reason):
        run_export(bert, tmp_path / "model_repository", **options)
    assert not (tmp_path / "model_repository").exists()


@pytest.mark.parametrize(
    "rows, reason",
    [
        (
            [*checkpoints.TRAIN, ("my card", "card lots")],
            "line 12: .*no label 'card lots' among its 5: did you mean card",
        ),
        ([("my card", "2")], "line 2: .*no label '2' among its 5: it looks like an id; expected .*'card lost' for 2"),
        ([("my card", "xyz")], "line 2: .*no label 'xyz' among its 5: expected one of balance, transfer"),
    ],
)
def test_a_label_that_the_model_lacks_is_told_with_its_line(bert, tmp_path, rows, reason):
    with pytest.raises(ExamplesError, match=reason):
        run_export(bert, tmp_path / "model_repository", train=train_file(tmp_path, rows))
    assert not (tmp_path / "model_repository").exists()


def test_a_train_file_without_labels(bert, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("hello\n")
    with pytest.raises(ExamplesError, match="no label column"):
        run_export(bert, tmp_path / "model_repository", train=path)


# --- what is written, and what is not ---------------------------------------------------------------------------------


def test_the_same_checkpoint_gives_the_same_bytes(bert, copy, tmp_path):
    first = run_export(bert, tmp_path / "one")
    second = run_export(copy, tmp_path / "two", name="other")
    script = "import sys; from export import run_export; print(run_export(sys.argv[1], sys.argv[2]).fingerprint)"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    third = subprocess.run(
        [sys.executable, "-c", script, str(bert), str(tmp_path / "three")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert first.fingerprint == second.fingerprint == third
    path = first.repository.classifier().backbone_path
    assert hashlib.sha256(path.read_bytes()).hexdigest() == first.fingerprint
    for secret in (str(tmp_path), str(bert), str(Path(transformers.__file__).parent), torch.__version__):
        assert secret.encode() not in path.read_bytes()


def test_a_model_in_memory_is_copied_and_exported_with_dropout_off(tmp_path):
    tokenizer = checkpoints.make_tokenizer()
    model = checkpoints.make_model("bert", tokenizer, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model.train().half()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention = model.config._attn_implementation
    repository = export_classifier(model, tmp_path / "model_repository", tokenizer=tokenizer)
    graph = onnx.load(repository.classifier().backbone_path).graph
    assert not [node for node in graph.node if "Dropout" in node.op_type or "Random" in node.op_type]
    assert model.training
    assert model.config._attn_implementation == attention
    assert model.dtype == torch.float16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_in_memory_needs_its_tokenizer(tmp_path):
    with pytest.raises(InputError, match="without its tokenizer"):
        run_export(checkpoints.make_model("bert", checkpoints.make_tokenizer()), tmp_path / "model_repository")
    with pytest.raises(CheckpointError, match="not a transformers model, but a Linear"):
        run_export(torch.nn.Linear(2, 2), tmp_path / "model_repository", tokenizer=checkpoints.make_tokenizer())


def test_a_slow_tokenizer_is_refused(tmp_path):
    model = checkpoints.make_model("bert", checkpoints.make_tokenizer())
    with pytest.raises(CheckpointError, match=r"has a slow tokenizer \(CanineTokenizer\)"):
        run_export(model, tmp_path / "model_repository", tokenizer=transformers.CanineTokenizer())


def test_a_tokenizer_that_splits_special_tokens_in_texts_is_refused(copy, tmp_path):
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"split_special_tokens": True}))
    with pytest.raises(ExportError, match=r"split_special_tokens .* as plain words.*; set it to false if"):
        run_export(copy, tmp_path / "model_repository")


def test_a_label_is_spelled_with_joiners(tmp_path):
    labels = ("क्\u200dष", "a\u200cb", "\U0001f468\u200d\U0001f469 family", "d", "e")
    folder = checkpoints.save_checkpoint(tmp_path / "checkpoint", labels=labels)
    train = train_file(tmp_path, [(text, labels[i // 2]) for i, text in enumerate(checkpoints.SENTENCES)])
    repository = export_classifier(folder, tmp_path / "model_repository", train=train)
    new = "श्री\u200cमान"
    add_label(repository, new, ["one pizza please", "a large pizza", "pizza!"], settings=PatchSettings(force=True))
    classifier = ModelRepository(repository.location).classifier()
    assert classifier.head(classifier.serving()).labels == (*labels, new)
    features = np.zeros((1, classifier.head().width), np.float32)
    answer = run_head(open_session(classifier.version_path(classifier.serving()) / "model.onnx"), features)
    assert set(answer.labels[0]) < {*labels, new}
    assert any("\u200d" in label for label in answer.labels[0])


def test_the_memory_is_built_from_the_training_texts(bert, tmp_path):
    heard = []
    report = run_export(
        bert, tmp_path / "model_repository", train=train_file(tmp_path, checkpoints.TRAIN), progress=heard.append
    )
    classifier = report.repository.classifier()
    memory, head = classifier.memory(), classifier.head()
    features = Encoder(classifier.backbone_path, classifier.tokenizer_path).encode(checkpoints.SENTENCES)
    assert dict(zip(memory.labels, memory.counts.tolist(), strict=True)) == dict.fromkeys(checkpoints.LABELS, 2)
    np.testing.assert_allclose(memory.sums[0], features[:2].sum(axis=0), atol=1e-4)
    assert (memory.split, memory.width) == (report.split, report.width) == (32, 64)
    assert head.lineage.data_hash
    assert (head.lineage.version, head.lineage.backbone, head.lineage.method) == (1, report.fingerprint, "export")
    labels = [label for _, label in checkpoints.TRAIN]
    right = np.mean([head.labels[i] == label for i, label in zip(head.logits(features).argmax(1), labels, strict=True)])
    assert report.train_accuracy == pytest.approx(right)
    assert any("last linear layer: classifier" in line for line in heard)
    assert json.loads(json.dumps(report.to_json()))["labels"] == 5
    assert "5 labels" in report.sentence()


def test_training_texts_that_come_again_count_once(bert, tmp_path, capsys):
    again = [(f" {text.upper()}  ", label) for text, label in checkpoints.TRAIN[:3]]
    other = (checkpoints.TRAIN[0][0], checkpoints.TRAIN[-1][1])  # one text with two labels: either may be right
    made = {}
    for name, rows in (("once", [*checkpoints.TRAIN, other]), ("often", [*checkpoints.TRAIN, other, *again, *again])):
        arguments = ["export", str(bert), "--repo", str(tmp_path / name), "--train", str(train_file(tmp_path, rows))]
        assert main(arguments) == 0
        classifier = ModelRepository(tmp_path / name).classifier()
        made[name] = (capsys.readouterr().out, classifier.head().lineage, classifier.files(1)["memory.safetensors"])
    (said, once, memory), (told, often, same) = made["once"], made["often"]
    assert memory == same
    count = len(checkpoints.TRAIN) + 1
    assert f"a memory of {count} texts" in said
    assert "left out" not in said
    assert f"a memory of {count} texts" in told
    assert "6 texts left out as duplicates" in told
    assert (once.details["train_examples"], once.details.get("train_repeated")) == (count, None)
    assert (often.details["train_examples"], often.details["train_repeated"]) == (count, 6)
    assert once.data_hash != often.data_hash


def test_training_texts_that_are_cut_are_told(bert, tmp_path, capsys, monkeypatch):
    rows = [*checkpoints.TRAIN, (" ".join(text for text, _ in 4 * checkpoints.TRAIN), checkpoints.LABELS[0])]
    file = train_file(tmp_path, rows)
    read = []
    monkeypatch.setattr("patcher.examples_file.read_examples", lambda path: read.append(path) or read_examples(path))
    assert main(["export", str(bert), "--repo", str(tmp_path / "r"), "--train", str(file)]) == 0
    assert len(read) == 1  # not again after the export, which a failure would make look like one of the export
    assert f"{file}: 1 of {len(rows)} texts is longer than 78 tokens" in capsys.readouterr().err


def test_training_texts_that_the_model_contradicts_are_told(bert, tmp_path, capsys):
    told = {}
    for name, label in (("all", checkpoints.LABELS[0]), ("other", checkpoints.LABELS[1])):
        rows = [(text, label) for text, _ in checkpoints.TRAIN]
        arguments = ["export", str(bert), "--repo", str(tmp_path / name), "--train", str(train_file(tmp_path, rows))]
        assert main([*arguments, "--json"]) == 0
        captured = capsys.readouterr()
        told[json.loads(captured.out)["train_accuracy"]] = "get the label they have there; is it this" in captured.err
    assert min(told) < 0.5
    assert told == {share: share < 0.5 for share in told}


def test_labels_that_look_the_same_or_have_a_single_text_are_told(copy, tmp_path, capsys):
    names = ["balance", "transfer", "Balance", "card lost", "greeting"]
    edit_config(copy, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    rows = [(f"{text} {number}", label) for text in ("my text", "another") for number, label in enumerate(names)]
    command = ["export", str(copy), "--repo", str(tmp_path / "repository"), "--train"]
    assert main([*command, str(train_file(tmp_path, rows)), "--name", "all"]) == 0
    told = capsys.readouterr().err
    assert "warning: 'Balance' differs from 'balance' only in case" in told
    assert "from a single text" not in told
    assert main([*command, str(train_file(tmp_path, rows[:-2])), "--name", "some"]) == 0
    assert "warning: the memory knows 2 of 5 labels from a single text (card lost, greeting)" in capsys.readouterr().err


def test_a_multi_label_text_counts_for_each_of_its_labels(tmp_path):
    folder = checkpoints.save_checkpoint(tmp_path / "checkpoint", problem_type="multi_label_classification")
    rows = [*checkpoints.TRAIN, ("hello, I lost my card", "greeting|card lost")]
    report = run_export(folder, tmp_path / "model_repository", train=train_file(tmp_path, rows))
    classifier = report.repository.classifier()
    memory = classifier.memory()
    assert dict(zip(memory.labels, memory.counts.tolist(), strict=True))["card lost"] == 3
    answer = run_head(open_session(classifier.version_path(1) / "model.onnx"), np.zeros((1, report.width), np.float32))
    expected = 1 / (1 + np.exp(-np.sort(answer.logits[0])[::-1]))
    np.testing.assert_allclose(answer.scores[0], expected, rtol=1e-5)


@pytest.mark.parametrize("architecture, most", [("bert", 80), ("roberta", 78), ("xlnet", 2048), ("llama", 2048)])
def test_texts_are_cut_where_the_positions_end(tmp_path, architecture, most):
    tokenizer = checkpoints.make_tokenizer(checkpoints.ARCHITECTURES[architecture][2])
    tokenizer.model_max_length = int(1e30)
    model = checkpoints.make_model(architecture, tokenizer)
    assert run_export(model, tmp_path / "model_repository", tokenizer=tokenizer).max_length == most


def test_fresh_texts_set_what_counts_as_out_of_scope(bert, tmp_path):
    train = held_out = train_file(tmp_path, checkpoints.TRAIN)
    plain = export_classifier(bert, tmp_path / "plain", train=train).classifier().head().scope
    fresh = export_classifier(bert, tmp_path / "fresh", train=train, evaluation=held_out).classifier().head().scope
    assert plain.stretch == FINE_TUNED
    assert plain.false_alarms == fresh.false_alarms == 0.05
    assert fresh.stretch > 0
    remembered = float(plain.distance.limit[0]) / FINE_TUNED
    assert float(fresh.distance.limit[0]) == pytest.approx(fresh.stretch * remembered, rel=1e-5)


def test_an_export_can_keep_nothing_of_a_single_text(bert, tmp_path, capsys):
    train = str(train_file(tmp_path, checkpoints.TRAIN))
    command = ["export", str(bert), "--repo", str(tmp_path / "repository"), "--train", train]
    assert main([*command, "--name", "kept"]) == 0, capsys.readouterr().err
    assert main([*command, "--name", "apart", "--memory", "statistics"]) == 0, capsys.readouterr().err
    repository = ModelRepository(tmp_path / "repository")
    kept, apart = (repository.classifier(name).memory() for name in ("kept", "apart"))
    assert (len(kept.sample) > 0, len(apart.sample), len(apart.clusters.means)) == (True, 0, 0)
    np.testing.assert_array_equal(apart.sums, kept.sums)


def test_a_memory_that_comes_later_knows_that_its_texts_were_learnt(bert, tmp_path):
    train = train_file(tmp_path, checkpoints.TRAIN)
    plain = export_classifier(bert, tmp_path / "plain", train=train).classifier().head().scope
    later = export_classifier(bert, tmp_path / "later").classifier()
    assert (later.head().scope.false_alarms, later.head().scope.stretch) == (None, FINE_TUNED)
    remember(later, read_examples(train))
    found = later.head(later.serving()).scope
    assert float(found.distance.limit[0]) == pytest.approx(float(plain.distance.limit[0]), rel=1e-5)


def test_texts_are_cut_where_asked_for(bert, tmp_path):
    report = run_export(bert, tmp_path / "model_repository", max_length=16)
    tokenizer = Tokenizer.from_file(str(report.repository.classifier().tokenizer_path))
    assert report.max_length == len(tokenizer.encode("card " * 100).ids) == 16
    assert report.sentence().startswith("Exported intent: 5 labels, 32 + 32 features")


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("architecture, end", [("gpt2", "<|endoftext|>"), ("llama", "</s>")])
def test_a_decoder_without_padding_gets_an_id_that_no_text_is_read_as(tmp_path, architecture, end, rows):
    tokenizer = checkpoints.make_tokenizer(architecture)
    model = checkpoints.make_model(architecture, tokenizer)
    if rows:
        model.resize_token_embeddings(len(tokenizer) + rows, mean_resizing=False)
    report = run_export(model, tmp_path / "model_repository", tokenizer=tokenizer)
    classifier = report.repository.classifier()
    served = Tokenizer.from_file(str(classifier.tokenizer_path))
    assert served.padding["pad_id"] == (len(tokenizer) if rows else tokenizer.convert_tokens_to_ids("\xff"))
    texts = [f"hello{end}", f"hello {end}", "\xff", "hello there my good friend"]
    with torch.no_grad():
        expected = np.concatenate([model(**tokenizer(text, return_tensors="pt")).logits.numpy() for text in texts])
    features = Encoder(classifier.backbone_path, classifier.tokenizer_path).encode(texts)
    np.testing.assert_allclose(classifier.head().logits(features), expected, atol=1e-4)
    assert not any("padding token" in warning for warning in report.warnings)


def test_a_decoder_that_can_only_pad_with_a_token_of_texts_is_told_of(tmp_path, monkeypatch):
    folder = checkpoints.save_checkpoint(tmp_path / "checkpoint", "gpt2")
    with monkeypatch.context() as patched:
        patched.setattr("export.tokenizer._BYTE_FF", ())  # as earlier versions padded, too
        report = run_export(folder, tmp_path / "model_repository")
    assert report.warnings[0].startswith("a text that ends with '<|endoftext|>' is answered as if it ended before it")
    classifier = report.repository.classifier()
    assert Tokenizer.from_file(str(classifier.tokenizer_path)).padding["pad_id"] == 2
    # Its backbone looks for this padding, so a proof of where it comes from pads as it does.
    assert proven_layer(classifier, load_checkpoint(str(folder)), report.split) == "score"


def test_a_vocabulary_that_falls_back_to_bytes_has_an_id_that_no_text_is_read_as():
    tokens = ["<unk>", "</s>", *"<0xF>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>")  # noqa: S106  a token of the tokenizer's
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>")  # noqa: S106  the same
    assert tokenizer("é")["input_ids"] == [tokens.index("<0xC3>"), tokens.index("<0xA9>")]
    assert _spare(tokenizer, len(tokens)) == (tokens.index("<0xFF>"), "")


def test_a_name_that_is_taken_is_refused_before_anything_is_read(bert, tmp_path, tree):
    report = run_export(bert, tmp_path / "model_repository")
    before = tree(report.repository.root)
    with pytest.raises(InputError, match="holds a classifier 'intent' already"):
        run_export("./not/there", report.repository.root)
    assert tree(report.repository.root) == before


def test_a_backbone_is_shared_when_it_is_the_same(bert, tmp_path, tree):
    root = tmp_path / "model_repository"
    run_export(bert, root, name="first", backbone="shared")
    run_export(bert, root, name="second", backbone="shared")
    assert ModelRepository(root).classifiers() == ("first", "second")
    assert len(list(root.glob("*_backbone"))) == 1
    before = tree(root)
    other = checkpoints.save_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="holds another backbone 'shared'"):
        run_export(other, root, name="third", backbone="shared")
    with pytest.raises(InputError, match="has another tokenizer"):
        run_export(bert, root, name="third", backbone="shared", max_length=9)
    assert tree(root) == before


def test_a_head_store_answers_for_it_when_asked_for(bert, tmp_path, monkeypatch, tree):
    train = train_file(tmp_path, checkpoints.TRAIN)
    exported = run_export(bert, tmp_path / "model_repository", train=train, in_store=True)
    assert exported.address == "intent_any/intent"
    assert exported.sentence().startswith("Exported intent (asked as intent_any/intent): 5 labels")
    classifier = exported.repository.classifier()
    assert classifier.in_store and not (classifier.root / "intent").exists()
    more = len(classifier.memory().clusters.labels)
    assert more > 5
    remember(classifier, read_examples(train))
    assert len(classifier.memory().clusters.labels) == more
    (classifier.root / classifier.version_name(2) / "memory.safetensors").write_bytes(b"damaged")
    remember(classifier, read_examples(train))
    assert len(classifier.memory().clusters.labels) == 5
    with pytest.raises(InputError, match="is not a folder: a head store"):
        export_classifier(bert, "s3://bucket/models", in_store=True)

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    plain = export_classifier(bert, tmp_path / "plain")
    before = tree(plain.location)
    monkeypatch.setattr("patcher.repository.ModelRepository.add_classifier", full)
    with pytest.raises(OSError, match="No space left"):
        export_classifier(bert, plain.location, name="other", backbone="intent", in_store=True)
    assert tree(plain.location) == before


@pytest.mark.server
def test_a_stored_one_is_patched_on_a_live_server(bert, tmp_path):
    repository = export_classifier(
        bert, tmp_path / "model_repository", train=train_file(tmp_path, checkpoints.TRAIN), in_store=True
    )
    models = served_models(repository)
    with EmbeddedTriton(repository.location, models, log_file=tmp_path / "log") as triton, triton.client() as server:
        assert server.classify("intent_any/intent", ["I lost my card"])[0].head_version == 1
        forced = PatchSettings(force=True)
        add_label(repository, "pizza", ["one pizza please", "a large pizza", "pizza!"], server=server, settings=forced)
        (answer,) = server.classify("intent_any/intent", ["one pizza please"])
        assert (answer.head_version, len(answer.logits)) == (2, 6)


def test_a_repository_of_a_newer_format_is_refused(bert, tmp_path):
    (tmp_path / "patcher.json").write_text('{"format": 99}')
    with pytest.raises(RepositoryError, match="install a newer one"):
        run_export(bert, tmp_path)


def test_a_disk_that_is_full_leaves_no_trace(bert, tmp_path, monkeypatch, tree):
    def full(*_args, **_options):
        raise StorageError("no space left on device")

    kept = run_export(bert, tmp_path / "kept")
    (kept.repository.root / "patcher.json").write_text('{"format": 1}')  # older versions must still be able to read it
    before = tree(kept.repository.root)
    monkeypatch.setattr(ModelRepository, "add_classifier", full)
    for root in (tmp_path / "fresh", kept.repository.root):
        with pytest.raises(StorageError):
            run_export(bert, root, name="late")
    assert not (tmp_path / "fresh").exists()
    assert tree(kept.repository.root) == before


def test_a_multi_label_text_that_comes_again_has_the_labels_of_both(tmp_path):
    folder = checkpoints.save_checkpoint(tmp_path / "checkpoint", problem_type="multi_label_classification")
    rows = [*checkpoints.TRAIN, ("hello, I lost my card", "greeting"), ("Hello, I lost my card", "greeting|card lost")]
    report = run_export(folder, tmp_path / "model_repository", train=train_file(tmp_path, rows))
    memory = report.repository.classifier().memory()
    counts = dict(zip(memory.labels, memory.counts.tolist(), strict=True))
    assert (counts["card lost"], counts["greeting"], report.train_repeated) == (3, 3, 1)


def test_what_a_killed_export_left_is_taken_away_by_the_next(bert, tmp_path, monkeypatch):
    (tmp_path / "patcher-export-killed").mkdir()
    (tmp_path / "patcher-export-killed" / ".patcher-alive").touch()
    (tmp_path / "patcher-export-killed" / "model.onnx").write_bytes(b"large")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def killed(_plan, folder, *_):
        assert [path.name for path in tmp_path.glob("patcher-export-*")] == [folder.name]
        assert [path.name for path in folder.iterdir()] == [".patcher-alive"]
        raise KeyboardInterrupt

    monkeypatch.setattr("export.stages.make", killed)
    with pytest.raises(KeyboardInterrupt):
        export_classifier(bert, tmp_path / "models", name="intent")
    assert not list(tmp_path.iterdir())


def alter(monkeypatch, part, change):
    """Make exports write backbones in which the weights ``name`` are changed."""
    honest = export.stages.export_backbone

    def altered(model, split, inputs, path, *, unpad):
        made = honest(model, split, inputs, path, unpad=unpad)
        graph = onnx.load(path)
        for tensor in graph.graph.initializer:
            if part in tensor.name:
                tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), tensor.name))
        onnx.save(graph, path)
        return made

    monkeypatch.setattr(export.stages, "export_backbone", altered)


@pytest.mark.parametrize(
    "damage, reason",
    [(lambda w: w * 1.5, "logits differ from the checkpoint's by"), (lambda w: w * np.nan, "values not finite")],
)
def test_a_backbone_that_answers_otherwise_is_not_published(bert, tmp_path, monkeypatch, damage, reason):
    alter(monkeypatch, "word_embeddings", damage)
    with pytest.raises(ParityError, match=reason):
        run_export(bert, tmp_path / "model_repository")
    assert not (tmp_path / "model_repository").exists()


@pytest.mark.parametrize("change, lies", [(1e-6, False), (1e-3, True)])
def test_a_row_whose_large_terms_cancel_is_judged_by_them(tmp_path, monkeypatch, change, lies):
    """A small logit that is a sum of large terms has the rounding error of those terms."""
    tokenizer = checkpoints.make_tokenizer()
    model = checkpoints.make_model("bert", tokenizer).eval()
    with torch.no_grad():
        model.classifier.weight[-1] *= 3000
        model.classifier.bias[-1] -= model(**tokenizer(SAMPLE_TEXTS[0], return_tensors="pt")).logits[0, -1]
    # Change all features by a few last bits, as sums on another machine may differ, or by more than any rounding.
    alter(monkeypatch, "pooler", lambda w: w * np.float32(1 + change))
    given = {"repository_dir": tmp_path / "model_repository", "model": model, "tokenizer": tokenizer}
    if lies:
        with pytest.raises(ParityError, match="logits differ from the checkpoint's by"):
            run_export(**given)
    else:
        assert run_export(**given).parity > 2e-4


# --- the trainer ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path):
    pytest.importorskip("accelerate")
    tokenizer = checkpoints.make_tokenizer()
    rows = [{**tokenizer(text), "labels": checkpoints.LABELS.index(label)} for text, label in checkpoints.TRAIN]

    def make(**options):
        return transformers.Trainer(
            checkpoints.make_model("bert", tokenizer),
            transformers.TrainingArguments(
                str(tmp_path / "training"),
                max_steps=3,
                learning_rate=1e-2,
                per_device_train_batch_size=5,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=rows,
            processing_class=options.pop("processing_class", tokenizer),
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            callbacks=[ExportCallback(tmp_path / "model_repository", **options)],
        )

    return make


def test_the_trainer_exports_what_it_trained(trainer, tmp_path):
    training = trainer(name="support")
    training.train()
    classifier = ModelRepository(tmp_path / "model_repository").classifier("support")
    features = Encoder(classifier.backbone_path, classifier.tokenizer_path).encode(checkpoints.SENTENCES)
    tokens = training.processing_class(list(checkpoints.SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = training.model.eval()(**tokens).logits.numpy()
    np.testing.assert_allclose(classifier.head().logits(features), expected, atol=1e-4)
    again = trainer(name="support")
    with pytest.raises(InputError, match="holds a classifier 'support' already"):
        again.train()
    assert again.state.global_step == 0


def test_the_trainer_is_told_before_it_starts_that_no_tokenizer_is_known(trainer):
    training = trainer(processing_class=None)
    with pytest.raises(InputError, match="knows no tokenizer"):
        training.train()
    assert training.state.global_step == 0


def test_the_public_face():
    assert sorted(export.__all__) == sorted(export._HOMES)
    for name in export.__all__:
        assert getattr(export, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = export.nothing


def test_an_option_that_is_none_is_refused(bert, tmp_path):
    with pytest.raises(InputError, match="no option precison; there are name, backbone"):
        run_export(bert, tmp_path / "repository", precison="int8")


@pytest.mark.parametrize("option", ["train", "evaluation"])
def test_examples_that_are_none_are_refused(bert, tmp_path, option):
    with pytest.raises(ExamplesError, match="mine holds no examples"):
        run_export(bert, tmp_path / "repository", **{option: Examples((), (), "mine")})


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"precision": "int4"}, "no precision"),
        ({"train": "/nope.csv"}, "nope.csv"),
        ({"train": [{"text": "a"}]}, "train: expected Examples or str or PathLike, got list"),
        ({"max_length": 10**6}, "maximum"),
    ],
)
def test_a_trainer_hears_before_the_first_step_what_cannot_be_exported(tmp_path, options, reason):
    tokenizer = checkpoints.make_tokenizer()
    callback = ExportCallback(tmp_path / "repository", **options)
    with pytest.raises(InputError, match=reason):
        callback.on_train_begin(
            None, None, None, model=checkpoints.make_model("bert", tokenizer), processing_class=tokenizer
        )


def test_tokens_without_an_embedding_are_refused(tmp_path):
    # A client's text with such a token would fail every other text in its batch.
    tokenizer = checkpoints.make_tokenizer("gpt2")
    model = checkpoints.make_model("gpt2", tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(CheckpointError, match=r"no embedding for .*'\[PAD\]'.*resize_token_embeddings"):
        run_export(model, tmp_path / "repository", tokenizer=tokenizer)


def test_odd_limits_of_a_tokenizer_are_none(tmp_path):
    for odd in (-1, 128.5, 1):
        tokenizer = checkpoints.make_tokenizer()
        tokenizer.model_max_length = odd
        encoder = prepare_tokenizer(from_objects(checkpoints.make_model("bert", tokenizer), tokenizer))
        assert encoder.max_length == 80


def test_a_bar_in_a_label_of_a_multi_label_model_is_refused(tmp_path):
    labels = ["a|b", "c", "d"]
    folder = checkpoints.save_checkpoint(
        tmp_path / "checkpoint", labels=labels, problem_type="multi_label_classification"
    )
    with pytest.raises(CheckpointError, match=r"'a\|b' has a '\|'"):
        run_export(folder, tmp_path / "repository")
