"""Untrusted data (labels, lineages, texts, URLs) is only data: it neither controls the terminal nor stops a verb."""

from __future__ import annotations

import dataclasses
import json
import time

import onnx
import pytest

from patcher import InputError, TritonServer, trial
from patcher.cli import main, output
from patcher.cli.options import CommonOptions
from patcher.doctor import diagnose
from patcher.errors import PatcherError, RepositoryError
from patcher.head_file import read_head, write_head
from patcher.wording import redacted

ESCAPE = "\x1b]0;OWNED\x07\x1b[2J"
LINEAGES = {
    "details": [{"details": [1]}, {"details": "x"}, {"details": {"flips": "x"}}, {"details": {"estimated_recall": [1]}},
                {"details": {"estimated_recall": {"a": "b"}}}, {"details": {"recall_lower_bound": {"a": "b"}}},
                {"details": {"checkpoint": [1]}}, {"details": {"checkpoint": "/a\0b"}}],
    "labels": [{"added": "abc"}, {"added": [1]}, {"removed": [{"a": 1}]}, {"renamed": [[1, 2]]}, {"renamed": [[1]]}],
    "versions": [{"version": 10**30}, {"version": -1}, {"version": True}, {"parent": 10**30}, {"parent": [1]},
                 {"parent": []}],
    "texts": [{"author": "\ud800"}, {"method": 5}],
}  # fmt: skip


def with_metadata(data, change):
    model = onnx.load_from_string(data)
    (entry,) = (each for each in model.metadata_props if each.key == "patcher")
    values = json.loads(entry.value)
    change(values)
    entry.value = json.dumps(values)
    return model.SerializeToString()


@pytest.mark.parametrize("kind", LINEAGES)
def test_a_lineage_of_other_types_is_no_head(kind, classifier):
    data = classifier.head_bytes(1)
    for lineage in LINEAGES[kind]:
        with pytest.raises(RepositoryError, match="not a head of patcher"):
            read_head(with_metadata(data, lambda values, lineage=lineage: values["lineage"].update(lineage)))


@pytest.mark.parametrize("label", ["a\x1b[31m", "two\nlines", "\u202egnp.exe", "a\x9bb"])
def test_a_label_that_moves_the_cursor_is_no_label(label, classifier):
    head = classifier.head()
    odd = dataclasses.replace(head, labels=(label, *head.labels[1:]))
    with pytest.raises(RepositoryError, match="does not print"):
        read_head(write_head(odd))
    kept = dataclasses.replace(head, labels=("=cmd|calc", "né\u200dé <b>", *head.labels[2:]))
    assert read_head(write_head(kept)).labels[:2] == kept.labels[:2]


def test_nothing_moves_a_terminals_cursor(capsys):
    output.tell(f"a{ESCAPE} b\n\u202ec é 日本\t\u200d")
    assert capsys.readouterr().out == "a\\x1b]0;OWNED\\x07\\x1b[2J b\n\\u202ec é 日本\t\u200d\n"
    assert output.table(["x"], [["m\nok    all is fine"]]).splitlines()[2:] == ["m\\nok    all is fine"]
    main(["labels", "--repo", f"/nowhere/{ESCAPE}"])
    assert "\x1b" not in capsys.readouterr().err


def test_json_with_odd_characters_is_json(capsys):
    odd = {"a\u00adb\x85\x7f\U000e0067": ["\ud800\x1b\t\n\u202e", "é 日本 \u200d\xa0"]}
    CommonOptions("", None, "", json=True, key_file=None, watch=2.0).emit(odd)
    said = capsys.readouterr().out
    assert json.loads(said) == {**odd, "warnings": []}
    assert "é 日本 " in said
    assert said.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "url", ["https://user:TOKEN@hub.example/a", "s3://http://KEY:TO/KEN@h:1/b", "http://user:TOKEN@127.0.0.1:9/x"]
)
def test_no_message_holds_a_password(url, capsys, monkeypatch, tmp_path):
    assert str(PatcherError(f"cannot reach {url}; try")).endswith(f"//…@{url.rpartition('@')[2]}; try")
    audit = tmp_path / "audit"
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(audit))
    assert main(["export", url, "--repo", str(tmp_path / "model_repository"), "--json"]) != 0
    said = capsys.readouterr()
    for text in (str(PatcherError(url)), said.out, said.err, audit.read_text()):
        assert "TOKEN" not in text
        assert "KEN@" not in text


@pytest.mark.parametrize(
    "text", ["https://a.b/c?x=foo@bar", "https://a.b/c#foo@bar", "/data//x/me@host/f", "://a@b", "x://y me@host"]
)
def test_what_is_no_password_is_left(text):
    assert redacted(f"see {text}.") == f"see {text}."


def test_a_password_is_left_out_however_long_it_is():
    for login in ("me:p#w?d", "me:" + "k/" * 5000, "http://u:p@"):
        assert redacted(f"is http://{login}@h/b, not s3://b") == "is http://…@h/b, not s3://b"
    assert redacted("a://b@c,d://e@f g://h") == "a://…@f g://h"


@pytest.mark.parametrize("many", ["/" * 50_000, "a://" * 50_000, "a://b?" * 20_000])
def test_a_long_message_is_soon_read(many):
    start = time.process_time()
    redacted(f"@ {many}")
    redacted(f"{many} @")
    assert time.process_time() - start < 1


def test_a_refused_text_is_not_quoted_in_full():
    with TritonServer("localhost:1") as server, pytest.raises(InputError, match="unpaired surrogate") as refused:
        server.classify("intent", ["\udc00" + "x" * 10_000])
    assert len(str(refused.value)) < 250


def test_the_scheme_of_an_object_store_may_be_in_capitals(capsys):
    assert main(["labels", "--repo", "S3://KEY:SECRET@bucket/path"]) == 2
    assert "credentials do not belong in a URL" in capsys.readouterr().err


def findings(classifier):
    return {check.what: check.finding for check in diagnose(classifier.root, None, "nobody") if check.state == "fault"}


def test_doctor_is_not_ended_by_what_it_tries(classifier, monkeypatch):
    path = classifier.root / "intent_tokenizer" / "1" / "tokenizer.json"
    tokenizer, there = json.loads(path.read_text()), path.read_text()
    tokenizer["padding"]["pad_to_multiple_of"] = 2**31
    path.write_text(json.dumps(tokenizer))
    assert "pads to 2,147,483,648 tokens" in findings(classifier)["intent_encoder"]
    path.write_text(there)
    assert findings(classifier) == {}
    said = "from patcher.features import extract_features\n"
    monkeypatch.setattr("patcher.trial._CODE", trial._CODE.replace(said, f"{said}print('a library')\n"))
    assert findings(classifier) == {}
    path.write_text("{}")
    assert "tokenizer" in findings(classifier)["intent_encoder"]
    path.write_text(there)
    monkeypatch.undo()
    monkeypatch.setattr("patcher.trial._SECONDS", 0.01)
    assert "gave no features of a short text in 0.01 s" in findings(classifier)["intent_encoder"]
    monkeypatch.undo()
    monkeypatch.setattr("patcher.trial._CODE", "import os; os.abort()")
    assert "ended the process that tried them (exit code -6" in findings(classifier)["intent_encoder"]


def test_doctor_tells_of_a_head_for_other_features(classifier):
    path = classifier.root / "intent_head" / "1" / "model.onnx"
    path.write_bytes(with_metadata(path.read_bytes(), lambda values: values.update(width=49)))
    (classifier.root / "intent.journal").unlink()
    assert "is for 49 features; expected 48" in findings(classifier)["intent, version 1"]


def test_a_head_is_not_made_for_any_width(classifier):
    with pytest.raises(RepositoryError, match="not a head of patcher"):
        read_head(with_metadata(classifier.head_bytes(1), lambda values: values.update(width=2**40)))


def test_doctor_calls_what_nobody_expected_a_fault(classifier, monkeypatch):
    def fail(*_):
        raise MemoryError("too much")

    monkeypatch.setattr("patcher.doctor._version", fail)
    assert "cannot be read: MemoryError too much" in findings(classifier)["intent"]
