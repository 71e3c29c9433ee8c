"""The command line without a server: its output and exit codes; bad input must change nothing."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import tiny

from patcher import Examples, FoundingSettings, audit, new_classifier, rename_label
from patcher.canary import Canary
from patcher.classifier import Classifier
from patcher.cli.output import not_installed
from patcher.difference import Difference
from patcher.errors import Busy, ServerUnreachable, StorageError, as_sentence
from patcher.features import count_cut
from patcher.rollout import Switch
from patcher.serve import serve
from patcher.triton.tokenizer.model import tokenize

DEAD = "127.0.0.1:1"
"""Nobody listens on port 1."""


@pytest.fixture
def patcher(classifier, command, monkeypatch):
    """Run a verb on the tiny repository: (exit code, stdout, stderr)."""
    monkeypatch.setenv("TRITON_MODEL_REPO", str(classifier.root))
    monkeypatch.setenv("TRITON_URL", DEAD)

    return command


@pytest.fixture
def examples(tmp_path):
    return tiny.write_csv(tmp_path / "payday.csv", {"payday": tiny.sentences("payday", 10)})


def test_texts_that_are_cut_are_told(patcher, classifier, tmp_path):
    texts = [*tiny.sentences("payday", 8), " ".join(tiny.sentences("payday", 40)), "nothing" * 40]
    assert count_cut(classifier.tokenizer_path, texts) == (1, 64)
    assert count_cut(classifier.tokenizer_path, texts[:8]) == (0, 0)
    file = tiny.write_csv(tmp_path / "long.csv", {"payday": texts})
    code, _, err = patcher("add-label", "--examples", file, "--dry-run")
    assert code == 0, err
    assert "1 of 10 texts is longer than 64 tokens; what exceeds that does not count" in err
    assert "tokens" not in patcher("add-label", "payday", "--text", texts[0], "--text", texts[1], "--dry-run")[2]


@pytest.mark.parametrize("text", ["a " * 63, "一 " * 63, "a " * 500_000])
def test_texts_are_cut_whatever_their_number_of_characters(classifier, text):
    assert count_cut(classifier.tokenizer_path, [text, "short"]) == (1, 64)


def test_long_texts_are_counted_a_few_at_a_time(classifier, monkeypatch):
    counted = []
    monkeypatch.setattr(
        "patcher.triton.tokenizer.model.tokenize",
        lambda tokenizer, texts: counted.append(len(texts)) or tokenize(tokenizer, texts),
    )
    assert count_cut(classifier.tokenizer_path, ["a " * 70] * 150) == (150, 64)
    assert sum(counted) == 150
    assert max(counted) <= 64


def test_short_texts_need_no_tokenizer(classifier, monkeypatch):
    monkeypatch.delattr("patcher.features.read_tokenizer")
    assert count_cut(classifier.tokenizer_path, ["my card was lost"]) == (0, 0)


def test_add_label_without_a_server(patcher, classifier, examples):
    code, out, err = patcher("add-label", "--examples", examples, "--no-load", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["labels_added"] == ["payday"]
    assert (report["version"], report["parent_version"], report["labels"], report["examples"]) == (2, 1, 7, 10)
    assert (report["gate"], report["published"], report["served"]) == ("passed", True, False)
    assert report["flips"] <= report["flips_upper_bound"] <= 1
    assert report["estimated_recall"] >= 0.5
    assert report["head_bytes"] == (classifier.root / "intent_head" / "2" / "model.onnx").stat().st_size
    assert report["seconds"]["total"] > 0
    assert classifier.serving() == 2
    assert classifier.head(2).base_hash() == classifier.head(1).base_hash()
    assert classifier.memory(2).labels[-1] == "payday"


def test_the_flips_are_a_few_words_and_explained_in_json(patcher, examples):
    code, out, err = patcher("add-label", "--examples", examples, "--no-load", "--dry-run", "--method", "ridge")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("flips ")]
    assert re.fullmatch(
        r"flips     \d+ of \d+ remembered inputs; at most \d+\.\d\d % of inputs like them \(95 % confidence\)", line
    )
    assert not re.search(r"\d%", out)
    code, out, err = patcher("add-label", "--examples", examples, "--no-load", "--dry-run", "--json")
    assert "one-sided Clopper-Pearson" in json.loads(out)["verdict"]["bound"]


def test_the_new_label_is_found_and_the_old_ones_still_are(patcher, examples, tmp_path):
    held_out = {label: tiny.sentences(label, 20, seed=9) for label in (*tiny.OLD, "payday")}
    test = tiny.write_csv(tmp_path / "test.csv", held_out)
    before = json.loads(patcher("evaluate", test, "--json")[1])
    patcher("add-label", "--examples", examples, "--no-load")
    after = json.loads(patcher("evaluate", test, "--json")[1])
    assert before["per_label"]["payday"]["recall"] == 0
    assert after["per_label"]["payday"]["recall"] >= 0.9
    assert all(after["per_label"][label]["recall"] >= before["per_label"][label]["recall"] - 0.06 for label in tiny.OLD)
    difference = json.loads(patcher("diff", 1, 2, "--eval", test, "--json")[1])
    assert (before["classifier"], difference["classifier"]) == ("intent", "intent")
    assert difference["added"] == ["payday"]
    assert (difference["same_rows"], difference["changed_rows"]) == (len(tiny.OLD), [])
    assert len(difference["gains"]) >= 18


def test_labels_that_neither_version_knows_are_refused_or_told(patcher, examples, tmp_path):
    patcher("add-label", "--examples", examples, "--no-load")
    strange = tiny.write_csv(tmp_path / "strange.csv", {"wetter": ["is it raining"], "Weather": ["will it snow"]})
    code, out, err = patcher("diff", 1, 2, "--eval", strange)
    assert (code, out) == (2, "")
    assert "none of the file's 2 labels (Weather, wetter) is one of the 7 of versions 1 and 2" in err
    some = tiny.write_csv(tmp_path / "some.csv", {"wetter": ["is it raining"], "weather": tiny.sentences("weather", 3)})
    code, out, err = patcher("diff", 1, 2, "--eval", some)
    assert (code, "neither version knows: 1" in out) == (0, True), err
    assert json.loads(patcher("diff", 1, 2, "--eval", some, "--json")[1])["unknown"] == 1


def test_several_labels_are_one_patch_and_known_ones_are_left_alone(patcher, classifier, tmp_path):
    groups = {label: tiny.sentences(label, 10) for label in (*tiny.NEW, tiny.OLD[0])}
    code, out, err = patcher(
        "add-label", "--examples", tiny.write_csv(tmp_path / "a.csv", groups), "--no-load", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["labels_added"] == list(tiny.NEW)
    assert classifier.versions() == (1, 2)


def test_very_many_new_labels_are_asked_about(patcher, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr("patcher.stopwatch._SECONDS_A_LINE", 0.0)
    groups = {f"l{number}": [text] for number, text in enumerate(tiny.sentences("payday", 21))} | {"music": ["music0"]}
    file = tiny.write_csv(tmp_path / "many.csv", groups)
    code, out, err = patcher("add-label", "--examples", file, "--no-load", "--dry-run")
    assert (code, out) == (2, "")
    assert "21 labels of 22 in the file are new ('l0', 'l1', 'l2', 'l3', 'l4' …); expected at most 20 at once" in err
    code, out, err = patcher("add-label", "--examples", file, "--no-load", "--dry-run", "--many", "--force")
    assert code == 0, err
    assert "21 labels of 22 in the file are new: 'l0', 'l1', " in err
    assert "would add 21 labels (l0, l1, l2, l3, l4 …)\n" in out
    assert re.search(r"\n20 of 21 labels, \d+ s to go\n", err)
    refusal = patcher("add-label", "--examples", file, "--no-load", "--many")[2]
    assert 0 < refusal.partition("the gate refused")[2].count("\n") < 10
    assert classifier.versions() == (1,)


def test_without_a_memory_it_works_and_says_that_nothing_bounds_the_flips(patcher, tmp_path, examples):
    classifier = tiny.make_repository(tmp_path / "without", tmp_path / "scratch_of_it", memory=False)
    code, out, err = patcher("add-label", "--examples", examples, "--no-load", "--repo", classifier.root)
    assert code == 0, err
    assert "no bound" in out
    code, out, _ = patcher("history", "--json", "--repo", classifier.root)
    assert json.loads(out)[1]["details"]["flips_upper_bound"] is None


def test_a_memory_that_is_gone_is_told_and_not_done_without(patcher, classifier, examples, tree):
    (classifier.root / "intent_head" / "1" / "memory.safetensors").unlink()
    before = tree(classifier.root)
    code, out, err = patcher("add-label", "--examples", examples, "--no-load")
    assert (code, out) == (2, "")
    assert "memory.safetensors of version 1 of intent was published and is gone" in err
    assert "build it anew by `patcher remember --data FILE`" in err
    assert tree(classifier.root) == before
    assert classifier.memory() is None
    data = tiny.write_csv(classifier.root.parent / "train.csv", tiny.train_set())
    assert patcher("remember", "--data", data, "--no-load")[0] == 0
    assert patcher("add-label", "--examples", examples, "--no-load")[0] == 0


def test_a_dry_run_changes_nothing(patcher, classifier, examples, tree):
    before = tree(classifier.root)
    code, out, err = patcher("add-label", "--examples", examples, "--dry-run", "--json")
    assert (code, json.loads(out)["published"]) == (0, False), err
    assert tree(classifier.root) == before


def test_the_gate_refuses_and_force_is_recorded(patcher, classifier, tmp_path, tree):
    # Sentences of an old label under a new name cannot be told apart from it.
    same = tiny.write_csv(tmp_path / "same.csv", {"rain": tiny.sentences("weather", 10, seed=5)})
    before = tree(classifier.root)
    code, out, err = patcher("add-label", "--examples", same, "--no-load", "--json")
    assert code == 3
    assert json.loads(out)["gate"] == "refused"
    assert err.splitlines()[0] == "error: the gate refused the patch:"
    assert err.splitlines()[-1].strip() == "`--force` (force=True) publishes anyway"
    assert "weather" in err
    assert tree(classifier.root) == before
    code, out, err = patcher("add-label", "--examples", same, "--no-load", "--json", "--force")
    assert (code, json.loads(out)["gate"]) == (0, "forced"), err
    assert [entry["gate"] for entry in json.loads(patcher("history", "--json")[1])] == ["none", "forced"]


def test_rollback_and_history(patcher, classifier, examples):
    patcher("add-label", "--examples", examples, "--no-load")
    code, out, _ = patcher("rollback", "--no-load", "--json")
    assert (code, json.loads(out)) == (
        0, {"classifier": "intent", "version": 1, "previous": 2, "served": False, "warnings": []}
    )  # fmt: skip
    assert json.loads(patcher("labels", "--json")[1])["labels"] == list(tiny.OLD)
    patcher("add-label", "pizza", *(a for t in tiny.sentences("pizza", 10) for a in ("--text", t)), "--no-load")
    entries = json.loads(patcher("history", "--json")[1])
    assert [(e["version"], e["parent"], e["added"], e["serving"]) for e in entries] == [
        (1, None, [], False), (2, 1, ["payday"], False), (3, 1, ["pizza"], True)
    ]  # fmt: skip
    code, _, err = patcher("rollback", "--to", 9, "--no-load")
    assert code == 2
    assert "there are 1, 2, 3" in err


def test_a_rollback_to_a_version_that_is_gone_names_those_that_are_there(patcher, classifier, tree):
    for old, new in (("music", "songs"), ("songs", "tunes"), ("tunes", "songs")):
        assert patcher("rename-label", old, new, "--no-load")[0] == 0
    assert patcher("rollback", "--to", 1, "--no-load")[0] == 0
    said = "version 1 of intent serves, and it has no version before it; name another one with --to (to=...): there are"
    assert f"{said} 2, 3, 4 (`patcher history`)" in patcher("rollback", "--no-load")[2]
    assert patcher("rollback", "--to", 4, "--no-load")[0] == patcher("prune", "--keep", 2)[0] == 0
    assert patcher("rollback", "--no-load")[0] == 0
    before = tree(classifier.root)
    code, out, err = patcher("rollback", "--no-load")
    said = "version 3 of intent serves, and version 2, from which it was made, is gone; name another one with --to"
    assert (code, out, f"{said} (to=...): there are 4 (`patcher history`)" in err) == (2, "", True), err
    assert tree(classifier.root) == before


def test_a_memory_built_later_and_without_anybodys_sentence(patcher, classifier, examples, tmp_path):
    (classifier.root / "intent_head" / "1" / "memory.safetensors").unlink()
    data = tiny.write_csv(tmp_path / "train.csv", tiny.train_set())
    code, out, err = patcher("remember", "--data", data, "--memory", "statistics", "--no-load", "--json")
    assert (code, json.loads(out)["version"]) == (0, 2), err
    assert len(classifier.memory().sample) == 0
    assert classifier.head().rows_hash() == classifier.head(1).rows_hash()
    code, out, err = patcher("remember", "--data", data, "--no-load", "--json")
    assert code == 0, err
    assert len(classifier.memory().sample) == 20 * len(tiny.OLD)
    report = json.loads(patcher("add-label", "--examples", examples, "--no-load", "--json")[1])
    assert report["flips_upper_bound"] < 0.05
    strange = tiny.write_csv(tmp_path / "strange.csv", {"unheard-of": ["a sentence"]})
    code, _, err = patcher("remember", "--data", strange, "--no-load")
    assert (code, "strange.csv, line 2: no label 'unheard-of'" in err) == (2, True)


WRONG = {
    "no verb": (["add-lable"], 2, "did you mean `patcher add-label`?"),
    "no option": (["labels", "--verison", "1"], 2, "no option '--verison'; did you mean --version?"),
    "an option after --": (["add-label", "--", "-x", "--text", "a b"], 2, "put options before `--`"),
    "a value after --": (["merge-labels", "--", "music", "travel", "--into=x"], 2, "put options before `--`"),
    "a pipe": (["add-label", "payday", "--examples", os.devnull], 2, "is no regular file; expected"),
    "no examples": (["add-label", "payday"], 2, "expected examples: --examples FILE"),
    "two kinds of examples": (["add-label", "payday", "--examples", "a.csv", "--text", "a"], 2, "not both"),
    "texts and a file": (["classify", "hello", "--file", "a.csv"], 2, "not both"),
    "text without a label": (["add-label", "--text", "hi"], 2, "expected LABEL"),
    "a label that exists": (["add-label", "weather", "--text", "a b"], 2, "already in intent"),
    "an empty label": (["add-label", " ", "--text", "a b"], 2, "the label is empty"),
    "an empty text": (["add-label", "payday", "--text", ""], 2, "example 1: the text is empty"),
    "10 MB of text": (["add-label", "payday", "--text", "a" * 10_000_000], 2, "has 10,000,000 bytes"),
    "no file": (["add-label", "--examples", "none.csv"], 2, "No such file"),
    "no classifier": (["labels", "--classifier", "other"], 2, "it holds intent"),
    "a path for a classifier": (["labels", "--classifier", "../intent"], 2, "cannot name a model"),
    "no version": (["labels", "--version", "7"], 2, "there are 1"),
    "nothing to roll back to": (["rollback", "--no-load"], 2, "no version before it"),
    "a budget above one": (["add-label", "payday", "--text", "x", "--max-flips", "2"], 2, "--max-flips"),
    "an unknown method": (["add-label", "payday", "--text", "x", "--method", "magic", "--no-load"], 2, "magic"),
    "a dead server": (["add-label", "payday", "--text", "x"], 1, "nothing was changed; `patcher serve"),
    "a dead server to classify": (["classify", "hello"], 1, "no Triton server answers at 127.0.0.1:1"),
    "a dead server to roll back": (["rollback", "--to", "1"], 1, "no Triton server answers"),
    "nothing to classify": (["classify"], 2, "expected texts"),
    "an empty text to classify": (["classify", ""], 2, "the text is empty"),
    "no repository": (["labels", "--repo", "nowhere"], 2, "patcher export MODEL --repo nowhere"),
    "no labelled file": (["evaluate", "none.csv"], 2, "No such file"),
    "an address that is none": (["classify", "hello", "--url", "what:ever:this"], 2, "expected HOST:PORT"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_with_its_code_and_changes_nothing(case, patcher, classifier, tree):
    arguments, expected, message = WRONG[case]
    before = tree(classifier.root)
    code, out, err = patcher(*arguments)
    assert (code, message in err) == (expected, True), err
    assert out == ""
    assert "Traceback" not in err
    assert tree(classifier.root) == before


FILES = {
    "truncated.csv": 'text,label\nhello there,payday\n"my pay',
    "short.csv": "text,label\nhello there,payday\nmy pay\n",
    "empty-text.csv": "text,label\n,payday\n",
    "nul.csv": "text,label\nhel\0lo,payday\n",
    "no-label.csv": "text\nhello\n",
    "known.csv": "text,label\nhello there,weather\n",
    "empty.csv": "",
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_ends_with_2_and_changes_nothing(name, patcher, classifier, tree, tmp_path):
    path = tmp_path / name
    path.write_text(FILES[name])
    before = tree(classifier.root)
    code, out, err = patcher("add-label", "--examples", path, "--no-load", "--json")
    assert code == 2
    document = json.loads(out)
    assert document.pop("kind") == ("LabelError" if name == "known.csv" else "ExamplesError")
    assert document == {"error": err.removeprefix("error: ").strip(), "exit_code": 2, "warnings": []}
    assert name in err or name == "known.csv"
    assert tree(classifier.root) == before


def test_a_newer_repository_is_left_alone(patcher, classifier, examples, tree):
    (classifier.root / "patcher.json").write_text('{"format": 99}')
    before = tree(classifier.root)
    code, _, err = patcher("add-label", "--examples", examples, "--no-load")
    assert (code, "install a newer one" in err) == (2, True)
    assert tree(classifier.root) == before


def test_doctor_finds_what_is_wrong(patcher, classifier, monkeypatch):
    code, out, _ = patcher("doctor", "--json")
    checks = {check["what"]: check for check in json.loads(out)}
    assert (code, checks["intent"]["state"], checks["server"]["state"]) == (1, "ok", "fault")
    monkeypatch.delenv("TRITON_URL")  # without it, no server is expected
    code, out, _ = patcher("doctor", "--json")
    assert (code, {check["what"]: check for check in json.loads(out)}["server"]["state"]) == (0, "note")
    backbone = classifier.root / "intent_backbone" / "1" / "model.onnx"
    backbone.write_bytes(backbone.read_bytes() + b"\0")
    code, out, _ = patcher("doctor")
    assert code == 1
    assert "FAULT  intent_backbone: its file's SHA-256 is" in out


def test_doctor_does_not_bury_faults_under_what_is_in_order(patcher, classifier, monkeypatch):
    monkeypatch.delenv("TRITON_URL")
    texts = [(text, label) for label in tiny.NEW for text in tiny.sentences(label, 6)]
    given = Examples(tuple(text for text, _ in texts), tuple(label for _, label in texts), "made up")
    for number in range(5):
        settings = FoundingSettings(force=True)
        new_classifier(classifier.repository, f"c{number}", given, settings=settings)
    broken = classifier.root / "c3_head" / "1" / "model.onnx"
    broken.write_bytes(broken.read_bytes() + b"\0")
    code, out, _ = patcher("doctor")
    assert code == 1
    assert "6 classifiers (c0, c1, c2, c3, c4 …)" in out
    assert "c0, journal" not in out
    in_order, *last = out[out.index("ok     5 classifiers: as published\n") :].splitlines()
    assert in_order == "ok     5 classifiers: as published"
    assert {line[:5] for line in last} == {"note ", "FAULT"}
    assert any(line.startswith("FAULT  c3, version 1: ") for line in last)
    checks = json.loads(patcher("doctor", "--json")[1])
    assert {f"c{number}, journal" for number in range(5)} < {check["what"] for check in checks}
    repaired = patcher("doctor", "--repair")[1]
    assert ", repair" not in repaired
    assert "ok     5 classifiers: as published\n" in repaired


def test_a_backbone_that_cannot_be_read_is_told_before_a_server_starts(patcher, classifier, monkeypatch):
    monkeypatch.setattr("patcher.serve.EmbeddedTriton", lambda *_, **__: pytest.fail("nothing to serve"))
    backbone = classifier.root / "intent_backbone" / "1" / "model.onnx"
    backbone.unlink()
    backbone.symlink_to(backbone)  # root can read every file, but not follow this
    expected = f"cannot read {backbone}: Too many levels of symbolic links; check its owner, its mode and the disk"
    assert f"FAULT  intent_backbone: {expected}" in patcher("doctor")[1]
    code, _, err = patcher("serve")
    assert (code, expected in err) == (2, True)


@pytest.mark.parametrize(
    "http, tls, said",
    [(True, False, "HTTP h:1, metrics"), (False, False, "HTTP h:1 for health checks only (--http opens it), metrics"),
     (False, True, "HTTP h:1 for health checks only, metrics")],
)  # fmt: skip
def test_serve_says_what_opens_http_where_it_only_answers_health_checks(http, tls, said, classifier, monkeypatch):
    server = MagicMock(http=http, http_url="h:1", tls=tls)
    server.stop.return_value = 0
    monkeypatch.setattr("patcher.serve.EmbeddedTriton", lambda *_, **__: server)
    told = []
    assert serve(classifier.repository, tls=MagicMock() if tls else None, say=told.append) == 0
    (ready,) = (line for line in told if line.startswith("ready: "))
    assert said in ready


def completed(words):
    """What the shell offers for the last of ``words``, which may be empty, and what is printed beside it."""
    environment = {
        **os.environ,
        "_PATCHER_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    command = [str(Path(sys.executable).parent / "patcher")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return [line.removeprefix("plain,") for line in done.stdout.splitlines() if line], done.stderr


def test_the_shell_completes_verbs_and_options():
    assert completed("patcher ro") == (["rollback"], "")
    assert completed("patcher add-label --me") == (["--method"], "")


def test_the_shell_completes_classifiers_labels_and_versions(patcher, examples):
    for old, new in (("music", "two words"), ("travel", "größe")):
        assert patcher("rename-label", old, new, "--no-load")[0] == 0
    assert completed("patcher remove-label ") == (["balance", "transfer", "weather", "alarm", "größe"], "")
    assert completed("patcher merge-labels weather --into ba") == (["balance"], "")
    assert completed("patcher rollback --to ") == (["3", "2", "1"], "")
    assert completed("patcher diff 1 --classifier intent 3") == (["3"], "")
    assert completed("patcher drop-classifier ") == completed("patcher labels --classifier ") == (["intent"], "")


@pytest.mark.parametrize("words", ["patcher remove-label ", "patcher rollback --to ", "patcher labels --classifier "])
def test_the_shell_offers_nothing_where_nothing_can_be_read(words, patcher, classifier, monkeypatch):
    (classifier.root / "patcher.json").write_text("{")
    assert completed(words) == ([], "")
    for elsewhere in ("s3://bucket/models", "/nowhere", str(classifier.root / "patcher.json")):
        monkeypatch.setenv("TRITON_MODEL_REPO", elsewhere)
        assert completed(words) == ([], "")


@pytest.mark.parametrize("words", ["patcher rollback --to ", "patcher labels --classifier "])
def test_the_shell_waits_for_no_heavy_import(words, patcher):
    script = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
        "from patcher.cli import main; main()"
    )
    environment = {**os.environ, "_PATCHER_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "3"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() in (["plain,1"], ["plain,intent"])
    assert {"patcher.files"} <= set(done.stderr.split())
    assert not {"numpy", "onnx", "tritonclient", "scipy"} & set(done.stderr.split())


def test_every_verb_explains_itself(patcher):
    from patcher.cli import _VERBS

    for verb in _VERBS:
        code, out, _ = patcher(verb, "--help")
        assert (code, "Usage: patcher" in out, "--help" in out) == (0, True, True)
        assert patcher(verb, "-h")[:2] == (0, out)


COMMON = {"--classifier": "intent", "--url": DEAD, "--watch": "1", "--admin-key-file": "key", "--tls-server-name": "x"}


@pytest.mark.parametrize(
    "verb, shown",
    [
        *((verb, {"--classifier"}) for verb in ("labels", "history", "diff", "evaluate", "report", "prune")),
        *((verb, {"--classifier"}) for verb in ("tune", "to-transformers")),
        ("upgrade", set()),
        *((verb, set(COMMON) - {"--watch", "--admin-key-file"}) for verb in ("classify", "loadtest", "metrics")),
        *((verb, set(COMMON)) for verb in ("add-label", "remember", "rollback", "canary", "merge-labels")),
        ("doctor", set(COMMON) - {"--classifier", "--watch"}),
        ("sync", set(COMMON) - {"--watch"}),
        ("new-classifier", set(COMMON) - {"--classifier", "--watch"}),
    ],
)
def test_the_help_of_a_verb_shows_no_option_that_it_ignores(verb, shown, patcher):
    out = patcher(verb, "--help")[1]
    assert {option for option in COMMON if f"  {option} " in out} == shown


def test_every_verb_takes_the_common_options_so_that_scripts_need_not_know(patcher, classifier):
    given = [word for option, value in COMMON.items() if "tls" not in option for word in (option, value)]
    code, out, err = patcher("labels", *given, "--json")
    assert (code, json.loads(out)["labels"]) == (0, list(tiny.OLD)), err
    code, _, err = patcher("prune", "--keep", "1", *given)
    assert code == 0, err


def test_help_leaves_no_event_in_the_audit_log(patcher, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(tmp_path / "audit.jsonl"))
    assert (patcher("rename-label", "--help")[0], (tmp_path / "audit.jsonl").exists()) == (0, False)


def test_help_answers_at_once_and_without_heavy_imports():
    script = "import sys; from patcher.cli import main; main(['--help']); print(sorted(sys.modules), file=sys.stderr)"

    def run(code):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    done = run(script)[0]
    assert "add-label" in done.stdout
    for heavy in ("torch", "transformers", "onnx", "onnxruntime", "numpy", "tritonclient", "scipy"):
        assert f"'{heavy}'" not in done.stderr
    # Six times as long as Python itself takes to start; with numpy it would be fifteen times, on any machine.
    assert min(run(script)[1] for _ in range(4)) < 12 * min(run("pass")[1] for _ in range(4))


def test_a_mistake_is_refused_before_torch_is_imported(classifier, tmp_path):
    (tmp_path / "file").touch()
    there = tmp_path / "checkpoint"
    there.mkdir()
    (there / "config.json").touch()
    repo, new = ["--repo", str(classifier.root)], ["--repo", str(tmp_path / "new")]
    mistakes = [
        (["export", "nosuch", *new], 2, "cannot read the configuration of nosuch (no folder of that name"),
        (["export", "nosuch", *new, "--train", str(tmp_path / "no.csv")], 2, "no.csv: No such file or directory"),
        (["export", "nosuch", *new, "--name", "foo bar"], 2, "'foo bar' cannot name a model"),
        (["export", "nosuch", *new, "--tensorrt"], 2, "TensorRT runs on GPUs"),
        (["export", "nosuch", *new, "--memory", "statistics"], 2, "expected --train FILE"),
        (["export", "nosuch", *repo], 2, "holds a classifier 'intent' already"),
        (["export", "nosuch", "--repo", str(tmp_path / "file" / "below")], 1, "file/below: Not a directory; nothing"),
        (["to-transformers", str(tmp_path), *repo], 2, "already exists and is not empty"),
        (["to-transformers", str(tmp_path / "to"), *repo, "--version", "7"], 2, "version 7"),
        (["to-transformers", str(tmp_path / "to"), *repo], 2, "nothing says what intent was exported from"),
        (["to-transformers", str(tmp_path / "to"), *repo, "--checkpoint", "./no"], 2, "no folder that is there"),
        (["to-transformers", str(tmp_path / "to"), *repo, "--checkpoint", str(tmp_path)], 2, "no config.json"),
        (["to-transformers", str(tmp_path / "file" / "to"), *repo, "--checkpoint", str(there)], 1, "to: File exists"),
    ]
    script = (
        "import sys, json; from patcher.cli import main; codes = [main(each) for each in json.loads(sys.argv[1])]; "
        "print(json.dumps([codes, [name for name in ('torch', 'transformers') if name in sys.modules]]))"
    )
    commands = json.dumps([command for command, _, _ in mistakes])
    done = subprocess.run(
        [sys.executable, "-c", script, commands],
        capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    codes, imported = json.loads(done.stdout)
    said = done.stderr.splitlines()
    assert [(code, part in line) for code, (_, _, part), line in zip(codes, mistakes, said, strict=True)] == [
        (code, True) for _, code, _ in mistakes
    ], said
    assert imported == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "file", "model_repository"]


@pytest.mark.parametrize("debug", ["1", ""])
def test_a_traceback_shows_only_when_asked_for_and_changes_nothing_else(patcher, monkeypatch, tmp_path, debug):
    log, same = tmp_path / "audit.jsonl", tmp_path / "same.csv"
    tiny.write_csv(same, {"rain": tiny.sentences("weather", 10, seed=5)})
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    monkeypatch.setenv("PATCHER_DEBUG", debug)
    code, out, err = patcher("add-label", "--examples", same, "--no-load", "--json")
    assert (code, json.loads(out)["exit_code"], "Traceback" in err) == (3, 3, bool(debug)), err
    assert json.loads(log.read_text())["outcome"] == "refused"
    monkeypatch.setattr("patcher.lifecycle.prune", lambda *_: 1 / 0)
    code, _, err = patcher("prune", "--keep", "1")
    assert (code, "This is a bug in patcher" in err, "Traceback" in err) == (1, True, bool(debug))


@pytest.mark.parametrize(
    "error, said",
    [
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            "needs torch, which is not installed: pip install",
        ),
        (
            ModuleNotFoundError("Could not import module 'Bert'"),
            "do not load (Could not import module 'Bert'): pip install",
        ),
    ],
)
def test_an_export_without_its_packages_says_what_to_install(error, said):
    message = str(not_installed("export", error))
    assert said in message
    assert "pip install '.[export]' in the folder of patcher's clone" in message


def test_the_same_words_are_one_example(patcher, tmp_path):
    texts = tiny.sentences("payday", 3)
    file = tiny.write_csv(tmp_path / "again.csv", {"payday": [*texts, texts[0].upper(), f"  {texts[1]} ", *texts]})
    code, out, err = patcher("add-label", "--examples", file, "--no-load", "--json", "--force")
    assert code == 0, err
    report = json.loads(out)
    assert report["examples"] == 3
    assert report["verdict"]["too_few"] == ["payday"]
    assert len(report["verdict"]["duplicates"]) == 5
    once = ("add-label", "payday2", "--text", "one and the same", "--no-load")
    assert "has only one example" in patcher(*once)[2]
    assert "has only one example" in patcher(*once, "--text", "One and the  same")[2]


def test_a_label_under_another_name_is_refused(patcher, classifier, tmp_path):
    # Texts in an old label's region may take only a part of that label, however small their share of all texts is.
    file = tiny.write_csv(tmp_path / "again.csv", {"again": tiny.sentences("weather", 20, seed=1)})
    code, _, err = patcher("add-label", "--examples", file, "--no-load", "--min-recall", "0", "--max-flips", "0.2")
    assert (code, classifier.serving()) == (3, 1)
    assert "'weather' alone would lose" in err


def test_a_memory_of_some_labels_says_so_and_keeps_what_it_had_of_the_others(patcher, classifier, examples, tmp_path):
    assert patcher("add-label", "--examples", examples, "--no-load")[0] == 0
    train = tiny.train_set()
    data = tiny.write_csv(tmp_path / "train.csv", train)
    code, _, err = patcher("remember", "--data", data, "--no-load")
    assert (code, "warning" in err) == (0, False)
    memory = classifier.memory()
    assert dict(zip(memory.labels, memory.counts.tolist(), strict=True))["payday"] == 10
    (classifier.root / "intent_head" / "3" / "memory.safetensors").unlink()
    some = tiny.write_csv(tmp_path / "some.csv", {label: train[label] for label in tiny.OLD[:2]})
    code, _, err = patcher("remember", "--data", some, "--no-load")
    assert code == 0
    assert f"the memory has no texts' features of {len(tiny.OLD) - 1} of {len(tiny.OLD) + 1} labels" in err
    more = tiny.write_csv(tmp_path / "more.csv", {"refund": tiny.sentences("refund", 10)})
    out = patcher("add-label", "--examples", more, "--no-load", "--force", "--json")[1]
    assert any("the memory has no texts' features of" in line for line in json.loads(out)["verdict"]["advice"])


def test_a_column_that_is_not_read_is_told_where_all_texts_are_taken_as_one_label(patcher, tmp_path):
    file = tmp_path / "mixed.csv"
    file.write_text("text,topic\n" + "".join(f"{text},pay\n" for text in tiny.sentences("payday", 10)))
    code, _, err = patcher("add-label", "payday", "--examples", file, "--dry-run")
    assert code == 0, err
    assert "are read (not 'topic'); all 10 become examples of 'payday'" in err


def test_a_trial_that_no_server_was_asked_for_says_so(patcher, examples):
    code, out, err = patcher("add-label", "--examples", examples, "--no-load", "--canary", "10")
    assert (code, "no server was asked to load it" in out) == (0, True), err


def test_a_classifier_that_is_there_can_be_dropped(patcher, examples):
    code, _, err = patcher("new-classifier", "intent", "--backbone", "intent", "--train", examples, "--no-load")
    assert (code, "or delete it with `patcher drop-classifier intent` first" in err) == (2, True), err


def test_sync_takes_every_classifier_unless_one_is_named(patcher, classifier, monkeypatch):
    with classifier.repository.lock():
        classifier.repository.add_classifier("other", classifier.head(), backbone="intent")
    monkeypatch.setattr("patcher.lifecycle.sync", lambda each, _: {DEAD: "away"})
    for arguments, names in (([], ["intent", "other"]), (["--classifier", "other"], ["other"])):
        code, out, err = patcher("sync", "--json", *arguments)
        assert (code, [entry["classifier"] for entry in json.loads(out)]) == (1, names), err


def test_sync_goes_on_after_a_classifier_that_is_damaged(patcher, classifier):
    with classifier.repository.lock():
        damaged = classifier.repository.add_classifier("a", classifier.head(), backbone="intent")
    damaged.journal.path.write_text("garbage\n")
    code, out, err = patcher("sync", "--json")
    first, second = json.loads(out)
    assert (code, first["classifier"], first["url"], second["classifier"]) == (1, "a", DEAD, "intent"), err
    assert first["state"].startswith("failed: ")
    assert "line 1, is not an entry" in first["state"]
    assert second["state"] == f"failed: {DEAD} does not answer; run `patcher sync` again when it does"


def test_without_a_verb_there_is_the_help_alone(patcher):
    code, out, err = patcher()
    assert (code, out, err.count("Usage:"), "error:" in err) == (2, "", 1, False)


def test_one_mark_ends_a_sentence():
    assert [as_sentence(said) for said in ("is it?", "it is", "It is.")] == ["is it?", "it is.", "It is."]


def test_a_share_that_is_none_is_refused_before_anything_is_published(patcher, classifier, examples):
    for share in ("nan", "100", "0"):
        code, _, err = patcher("add-label", "--examples", examples, "--no-load", "--canary", share)
        assert (code, classifier.versions()) == (2, (1,)), err


def test_a_dry_run_and_a_refusal_by_the_user_are_no_change(patcher, examples, monkeypatch, tmp_path):
    log = tmp_path / "audit.jsonl"
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    assert patcher("add-label", "--examples", examples, "--no-load", "--dry-run")[0] == 0
    assert patcher("add-label", "--examples", examples, "--no-load", "--dry-run", "--max-flips", "2")[0] == 2
    assert patcher("add-label", "--examples", examples, "--no-load")[0] == 0
    assert patcher("prune", "--keep", "1")[0] == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(event["verb"], event["outcome"]) for event in events] == [
        ("add-label", "dry_run"), ("add-label", "bad_input"), ("add-label", "done"), ("prune", "done"),
    ]  # fmt: skip
    assert [event["classifier"] for event in events if event["outcome"] != "bad_input"] == ["intent"] * 3


def test_an_interrupt_while_the_event_is_recorded_does_not_cut_it_off(patcher, monkeypatch, tmp_path):
    log, finish = tmp_path / "audit.jsonl", audit.finish

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        finish(*arguments, **options)

    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    monkeypatch.setattr("patcher.audit.finish", interrupted)
    assert patcher("prune", "--keep", "1")[0] == 0
    assert json.loads(log.read_text())["outcome"] == "done"


def test_a_change_that_fails_and_a_repair_are_recorded_with_what_they_were_about(patcher, monkeypatch, tmp_path):
    log = tmp_path / "audit.jsonl"
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    assert patcher("rollback", "--no-load")[0] == 2  # there is no earlier version
    assert patcher("doctor", "--url", "127.0.0.1:1")[0] == 1  # a server is named, but none answers
    assert patcher("doctor", "--repair", "--url", "127.0.0.1:1")[0] == 1
    events = [json.loads(line) for line in log.read_text().splitlines()]
    found = [(event["verb"], event["outcome"], event.get("classifier")) for event in events]
    assert found == [("rollback", "bad_input", "intent"), ("doctor", "failed", "intent")]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    "arguments, said",
    [
        ("rename-label music Balance", "balance"),
        ("merge-labels music alarm --into Balance --force", "balance"),
        ("add-label payday --examples FILE", "only the texts of"),
        ("add-label --examples FILE", "more than one column of texts or labels"),
        ("add-label --examples FILE", "longer than 64 tokens"),
        ("remember --data FILE --repo WITHOUT", "balance"),
    ],
)
def test_the_audit_log_and_the_document_hold_every_warning(patcher, monkeypatch, tmp_path, arguments, said):
    log, file = tmp_path / "audit.jsonl", tmp_path / "file.csv"
    rows = [*tiny.sentences("payday", 9), " ".join(tiny.sentences("payday", 40))]
    if arguments == "add-label payday --examples FILE":
        file.write_text("text,channel\n" + "".join(f"{text},web\n" for text in rows))
    elif "WITHOUT" in arguments:
        tiny.write_csv(file, {"music": tiny.sentences("music", 10)})
        tiny.make_repository(tmp_path / "without", tmp_path / "scratch", memory=False)
    else:
        file.write_text("text,label,sentence\n" + "".join(f"{text},payday,x\n" for text in rows))
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    places = {"FILE": str(file), "WITHOUT": tmp_path / "without"}
    code, out, err = patcher(*(places.get(word, word) for word in arguments.split()), "--no-load", "--json")
    told = [line.removeprefix("warning: ") for line in err.splitlines() if line.startswith("warning: ")]
    assert (code, said in err) == (0, True), err
    assert json.loads(log.read_text())["warnings"] == told
    assert json.loads(out)["warnings"] == told


@pytest.mark.parametrize("arguments", ["music2 --examples FILE", "music2 --text WORDS more", "music2 --text WORDS"])
def test_no_text_of_an_example_is_in_the_audit_log(patcher, monkeypatch, tmp_path, arguments):
    log, file = tmp_path / "audit.jsonl", tmp_path / "file.csv"
    words = tiny.sentences("music", 1)[0]
    tiny.write_csv(file, {"music2": tiny.sentences("music", 10)})
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    places = {"FILE": str(file), "WORDS": words}
    code, _, err = patcher("add-label", *(places.get(word, word) for word in arguments.split()), "--no-load")
    assert code in {2, 3}
    event = json.loads(log.read_text())
    assert event["error"]
    assert not any(text in log.read_text() for text in tiny.sentences("music", 10)), err


@pytest.mark.parametrize(
    "arguments, kind",
    [
        ("rollback --verison 1", "UsageError"),
        ("labels --version x", "UsageError"),
        ("labels --version 7", "VersionError"),
        ("labels --repo nowhere", "RepositoryError"),
        ("rollback --to 1", "ServerUnreachable"),
        ("merge-labels music nothing --into sound --no-load", "LabelError"),
    ],
)
def test_the_kind_of_an_error_is_in_the_document_and_in_the_event(patcher, arguments, kind):
    code, out, err = patcher("--log-json", *arguments.split(), "--json")
    document, event = json.loads(out), json.loads(err.splitlines()[-1])
    assert (document["kind"], event["kind"]) == (kind, kind)
    assert (document["exit_code"], document["warnings"]) == (code, [])


@pytest.mark.parametrize(
    "error, kind", [(KeyboardInterrupt(), "KeyboardInterrupt"), (OSError(errno.ENOSPC, "full"), "OSError")]
)
def test_what_is_no_error_of_patcher_has_a_kind_too(patcher, monkeypatch, error, kind):
    monkeypatch.setattr("patcher.lifecycle.history", MagicMock(side_effect=error))
    assert json.loads(patcher("history", "--json")[1])["kind"] == kind


def test_a_failure_holds_the_warnings_before_it(patcher, tmp_path):
    file = tmp_path / "payday.csv"
    file.write_text("text,label,sentence\nhello there,payday,x\n")
    key = tmp_path / "key"
    key.write_text("secret")
    key.chmod(0o666)
    code, out, err = patcher("add-label", "--examples", file, "--admin-key-file", key, "--json")
    told = [line.removeprefix("warning: ") for line in err.splitlines() if line.startswith("warning: ")]
    assert (code, json.loads(out)["warnings"]) == (1, told), err
    assert [said.split(";")[0] for said in told] == [
        f"{file} has more than one column of texts or labels", f"others can read {key}"
    ]  # fmt: skip


def test_a_server_that_is_left_out_is_in_the_document(patcher, monkeypatch):
    monkeypatch.setattr("patcher.fleet.Fleet", lambda *_, **__: MagicMock(away=("a:1",)))
    monkeypatch.setattr("patcher.lifecycle.rollback", lambda *_: Switch(1, 2, served=True))
    code, out, err = patcher("rollback", "--to", "1", "--url", "a:1,b:1", "--json")
    assert code == 0, err
    assert json.loads(out)["warnings"] == ["a:1 does not answer and is left out; run `patcher sync` when it is back"]


def test_a_trial_made_without_a_server_is_ended_without_one(patcher, classifier, examples):
    assert patcher("add-label", "--examples", examples, "--canary", "10", "--no-load")[0] == 0
    code, out, err = patcher("canary", "--no-load")
    assert (code, "version 2 of intent is on trial with 10 % of the keys; no server was asked" in out) == (0, True), err
    assert json.loads(patcher("canary", "--no-load", "--json")[1])["arms"] == []
    document = json.loads(patcher("canary", "--discard", "--no-load", "--json")[1])
    assert (document["discarded"], document["version"]) == (2, 1)
    document = json.loads(patcher("canary", "--version", "2", "--percent", "20", "--no-load", "--json")[1])
    assert (document["version"], document["percent"]) == (2, 20)
    document = json.loads(patcher("canary", "--promote", "--no-load", "--json")[1])
    assert (document["version"], document["previous"], document["served"]) == (2, 1, False)
    assert (classifier.serving(), patcher("canary", "--no-load")[1]) == (2, "no version of intent is on trial\n")


def test_a_merge_on_trial_publishes_nothing(patcher, classifier, monkeypatch, tree):
    merge = ("merge-labels", "music", "alarm", "--into", "sound", "--dry-run")
    before = tree(classifier.root)
    code, out, err = patcher(*merge, "--json", "--log-json")
    document, event = json.loads(out), json.loads(err.splitlines()[-1])
    assert code == 0, err
    assert (document["published"], document["served"], document["gate"]) == (False, False, "passed")
    assert (document["labels_added"], document["labels_removed"]) == (["sound"], ["music", "alarm"])
    assert (document["verdict"]["passed"], event["outcome"]) == (True, "dry_run")
    said = patcher(*merge)[1]
    assert "dry run: nothing published; version 2 would have" in said
    assert f"\ngate      {document['verdict']['sentence']}\n" in said
    assert all(f"\n          {line}\n" in said for line in document["verdict"]["advice"])
    monkeypatch.setattr("patcher.gate._FEWEST_INPUTS", 1000)
    code, out, _ = patcher(*merge, "--json")
    assert (code, json.loads(out)["published"], json.loads(out)["kind"]) == (3, False, "GateRefused")
    assert tree(classifier.root) == before


def test_a_prune_can_be_tried(patcher, classifier, tree):
    for name in ("sound", "noise", "din"):
        old = classifier.head().labels[0]
        assert patcher("rename-label", old, name, "--no-load")[0] == 0
    before = tree(classifier.root)
    document = json.loads(patcher("prune", "--keep", "1", "--dry-run", "--json")[1])
    assert (document["pruned"], document["versions"], document["dry_run"]) == ([1, 2], [3, 4], True)
    _, out, err = patcher("prune", "--keep", "1", "--dry-run")
    assert out == "dry run: would prune 1, 2; 2 versions left\n"
    assert "go with these versions: texts labelled 'balance' will count as wrong" in err
    assert tree(classifier.root) == before
    document = json.loads(patcher("prune", "--keep", "1", "--json")[1])
    assert (document["pruned"], document["versions"], document["dry_run"]) == ([1, 2], [3, 4], False)


def test_a_merge_that_is_refused_is_recorded_with_what_it_was(patcher, monkeypatch, tmp_path):
    log = tmp_path / "audit.jsonl"
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    monkeypatch.setattr("patcher.gate._FEWEST_INPUTS", 1000)
    assert patcher("merge-labels", "music", "alarm", "--into", "sound", "--no-load")[0] == 3
    event = json.loads(log.read_text())
    assert (event["gate"], event["forced"], event["parent_version"]) == ("refused", False, 1)
    assert (event["added"], event["removed"], "version" in event) == (["sound"], ["music", "alarm"], False)


def test_ctrl_c_after_a_verb_ended_loses_nothing_of_the_audit_log(patcher, examples, monkeypatch, tmp_path):
    log, fsync = tmp_path / "audit.jsonl", os.fsync
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))

    def interrupted(descriptor):
        if os.fstat(descriptor).st_ino == log.stat().st_ino:
            os.kill(os.getpid(), signal.SIGINT)
        fsync(descriptor)

    log.touch()
    monkeypatch.setattr(os, "fsync", interrupted)
    assert patcher("prune", "--keep", "1")[0] == 0
    assert json.loads(log.read_text())["outcome"] == "done"


@pytest.mark.parametrize(
    "error, reason",
    [(Busy("another patcher is at work"), "another patcher is at work."), (KeyboardInterrupt(), "interrupted.")],
)
def test_old_versions_that_cannot_be_deleted_undo_no_patch(
    patcher, classifier, examples, monkeypatch, tmp_path, error, reason
):
    log = tmp_path / "audit.jsonl"
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    monkeypatch.setattr("patcher.lifecycle.prune", MagicMock(side_effect=error))
    code, out, err = patcher("add-label", "--examples", examples, "--no-load", "--keep", "1", "--json")
    warning = f"old versions were not deleted: {reason} `patcher prune --keep 1` retries"
    assert (code, f"warning: {warning}" in err, classifier.serving()) == (0, True, 2), err
    report, event = json.loads(out), json.loads(log.read_text())
    assert (report["version"], report["published"], report["pruned"]) == (2, True, [])
    assert report["warnings"] == event["warnings"] == [warning]
    assert event["outcome"] == "done"


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_an_earlier_classifier_of_the_name_is_ended_comes_too_late(
    patcher, classifier, monkeypatch, tmp_path
):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        return "stand-in:1: no."

    monkeypatch.setattr("patcher.founding.forget_other", interrupted)
    train = tiny.write_csv(tmp_path / "train.csv", tiny.train_set(10))
    code, out, err = patcher("new-classifier", "topics", "--train", train, "--no-load", "--json")
    (warning,) = json.loads(out)["warnings"]
    assert (code, "may still be answered for, too, by stand-in:1: no. `patcher sync" in warning) == (0, True), err
    assert "topics" in classifier.repository.classifiers()


@pytest.mark.parametrize("error", [ServerUnreachable("gone"), KeyboardInterrupt()])
def test_a_trial_that_has_begun_is_no_failure(patcher, monkeypatch, error):
    monkeypatch.setattr("patcher.canary.begin", lambda *_: Canary("intent", 2, 10.0))
    monkeypatch.setattr("patcher.canary.status", MagicMock(side_effect=error))
    code, out, err = patcher("canary", "--version", "2", "--percent", "10", "--json")
    document = json.loads(out)
    assert (code, document["version"], document["arms"]) == (0, 2, []), err
    assert document["warnings"] == [
        f"the trial has begun, but its requests were not counted: {str(error) or 'interrupted'}"
    ]


@pytest.mark.parametrize(
    "verb, api, told",
    [
        (("remember", "--data", "train.csv", "--no-load"), "remembering.remember", {"version": 4, "texts": 60}),
        (("prune", "--keep", "1"), "lifecycle.prune", {"pruned": [1], "versions": None}),
        (("canary", "--discard"), "canary.discard", {"discarded": 2, "version": 3}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_store_that_fails_after_a_change_does_not_make_it_a_failure(
    patcher, classifier, monkeypatch, tmp_path, verb, api, told
):
    rename_label(classifier, "music", "songs")
    rename_label(classifier, "songs", "music")
    monkeypatch.chdir(tmp_path)
    tiny.write_csv(tmp_path / "train.csv", tiny.train_set(10))
    change = getattr(importlib.import_module(f"patcher.{api.partition('.')[0]}"), api.partition(".")[2])

    def then_fail(*arguments, **options):
        found = 2 if api == "canary.discard" else change(*arguments, **options)
        for read in ("serving", "versions", "head", "memory"):
            monkeypatch.setattr(Classifier, read, MagicMock(side_effect=StorageError("no answer within 5 s")))
        return found

    monkeypatch.setattr(f"patcher.{api}", then_fail)
    code, out, err = patcher(*verb, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert {key: document[key] for key in told} == told
    assert any("could not be listed: no answer" in said for said in document.get("warnings", [])) == (
        verb[0] == "prune"
    )


def test_a_file_of_no_use_begins_no_trial(patcher, examples, monkeypatch, tmp_path):
    assert patcher("add-label", "--examples", examples, "--no-load")[0] == 0
    monkeypatch.setattr("patcher.canary.begin", begin := MagicMock())
    useless = tiny.write_csv(tmp_path / "useless.csv", {"unknown": ["no label of any version"]})
    code, _, err = patcher("canary", "--version", "1", "--percent", "10", "--eval", useless)
    assert (code, begin.called) == (2, False), err


def test_a_text_that_looks_like_a_flag_is_a_text(patcher, monkeypatch, tmp_path):
    log = tmp_path / "audit.jsonl"
    monkeypatch.setenv("PATCHER_AUDIT_LOG", str(log))
    texts = [word for text in ("--dry-run", "--json", "rollback") for word in ("--text", text)]
    code, out, err = patcher("add-label", "payday", *texts, "--no-load", "--force")
    assert (code, out.startswith("{")) == (0, False), err
    code, out, err = patcher("add-label", "pizza", *texts, "--no-load", "--max-flips", "2")
    assert (code, out) == (2, ""), err
    code, out, err = patcher("add-label", "--dry-run", "pizza", "--verison", "--json", "--max-flips")
    assert (code, json.loads(out)["exit_code"], "no option '--verison'" in err) == (2, 2, True)
    code, out, err = patcher("nonsense", "prune", "--json")
    assert (code, json.loads(out)["exit_code"]) == (2, 2), err
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(event["verb"], event["outcome"]) for event in events] == [
        ("add-label", "done"), ("add-label", "bad_input"), ("add-label", "bad_input"),
    ]  # fmt: skip


def test_doctor_goes_on_where_a_configuration_is_gone(patcher, classifier):
    for damage in (b"", None):
        path = classifier.root / "intent_features" / "config.pbtxt"
        if damage is None:
            path = classifier.root / "intent_backbone" / "config.pbtxt"
            path.unlink()
        else:
            path.write_bytes(damage)
        code, out, err = patcher("doctor")
        assert code == 1
        assert "a bug in patcher" not in out + err
        assert "no server answers" in out


def test_doctor_misses_a_version_that_is_gone(patcher, classifier, examples):
    assert patcher("add-label", "--examples", examples, "--no-load")[0] == 0
    assert patcher("rollback", "--to", "1", "--no-load")[0] == 0
    shutil.rmtree(classifier.root / "intent_head" / "2")
    code, out, _ = patcher("doctor")
    assert (code, "version 2 is missing, and not pruned" in out) == (1, True)
    assert "version 2 is written off" in patcher("doctor", "--repair")[1]
    assert "is missing" not in patcher("doctor")[1]


def test_one_is_not_told_as_several_nor_a_whole_list_as_a_part(patcher, monkeypatch):
    assert "1 version left" in patcher("prune", "--keep", "1")[1]
    out = patcher("doctor")[1]
    assert "1 classifier (intent)" in out
    assert "1 version, 1 serves" in out
    assert patcher("rename-label", "music", "songs", "--no-load")[0] == 0
    assert "2 versions left" in patcher("prune", "--keep", "2")[1]
    for count, said in ((5, "5 changed (a, b, c, d, e)\n"), (6, "6 changed (a, b, c, d, e …)\n"), (0, "0 changed\n")):
        found = Difference(1, 2, (), (), (), same_rows=3, changed_rows=tuple("abcdef"[:count]))
        monkeypatch.setattr("patcher.difference.diff", lambda *_, found=found: found)
        assert said in patcher("diff", 1, 2)[1]


def test_weakest_labels_are_among_those_with_texts(patcher, tmp_path):
    file = tiny.write_csv(tmp_path / "some.csv", {"weather": tiny.sentences("weather", 5)})
    out = patcher("evaluate", file)[1]
    assert "weather" in out
    assert not [label for label in tiny.OLD if label != "weather" and f"\n{label} " in out and " 0" in out]


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_what_was_done_is_done_with_the_output_closed(closed, classifier, tmp_path):
    log = tmp_path / "audit.jsonl"
    program = shlex.join([sys.executable, "-m", "patcher", "rename-label", "music", "songs", "--no-load"])
    command = f"{program} --repo {shlex.quote(str(classifier.root))} {closed}"
    environment = {**os.environ, "PATCHER_AUDIT_LOG": str(log), "PATCHER_LOG": "json"}
    assert subprocess.run(["bash", "-c", command], env=environment, check=False).returncode == 0
    assert json.loads(log.read_text())["outcome"] == "done"


@pytest.mark.parametrize(
    "arguments, where, code, said",
    [
        ("labels", ">/dev/full", 1, "error: the output could not be written to stdout: No space left on device\n"),
        ("history --json", ">/dev/full", 1, "error: the output could not be written"),
        ("labels --version 7 --json", ">/dev/full", 2, "error: intent has no version 7"),
        ("labels --version 7 --json", ">/dev/full", 2, "warning: the output could not be written to stdout: No space"),
        ("doctor --url 127.0.0.1:1 --json", ">/dev/full", 1, "warning: the output could not be written to stdout"),
        ("--help labels", ">/dev/full", 1, "error: the output could not be written to stdout: No space left on device"),
        ("--version labels", ">/dev/full", 1, "error: the output could not be written to stdout: No space left"),
        ("rename-label --help", ">/dev/full", 1, "error: the output could not be written to stdout: No space left"),
        ("rename-label music songs --no-load --json", ">/dev/full", 0, "; what the verb has changed stays changed\n"),
        ("labels", "| true", 0, ""),
        ("labels", "2>/dev/full", 0, ""),
    ],
)
def test_output_that_cannot_be_written_is_told(classifier, arguments, where, code, said):
    command = f"{shlex.quote(sys.executable)} -m patcher {arguments} --repo {shlex.quote(str(classifier.root))} {where}"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (run.returncode, said in run.stderr, bool(said) == bool(run.stderr)) == (code, True, True), run.stderr


def test_sigterm_undoes_what_was_begun(classifier, tmp_path, tree):
    """It comes while the texts are encoded."""
    before = tree(classifier.root)
    data = tiny.write_csv(tmp_path / "train.csv", tiny.train_set(10))
    code = (
        "import sys, time; from patcher.cli import program; from patcher.runtime import Encoder\n"
        "def encode(*_, **__): print('encoding', flush=True); time.sleep(300)\n"
        "Encoder.encode = encode; sys.exit(program())"
    )
    command = [sys.executable, "-c", code, "remember", "--data", data, "--no-load", "--repo", classifier.root]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "encoding\n"
    run.terminate()
    said = run.communicate(timeout=60)[1]
    assert (run.returncode, "interrupted" in said) == (130, True), said
    assert tree(classifier.root) == before


def test_one_long_label_does_not_widen_every_line_of_the_history(patcher):
    assert patcher("rename-label", "music", "x" * 500, "--no-load")[0] == 0
    assert max(map(len, patcher("history")[1].splitlines())) < 200
    assert json.loads(patcher("history", "--json")[1])[1]["renamed"] == [["music", "x" * 500]]


def test_texts_of_another_label_than_the_named_one_are_refused_with_what_helps(patcher, tmp_path):
    path = tiny.write_csv(tmp_path / "payday.csv", {"payday": tiny.sentences("payday", 10)})
    code, _, err = patcher("add-label", "Wages", "--examples", path, "--no-load", "--dry-run")
    assert code == 2
    assert "label column without 'Wages' (it has payday); leave LABEL out to add the labels of the column" in err
    assert "`patcher rename-label` gives them other names), or remove the column" in err


def test_labels_that_look_like_ids_are_added_only_by_name(patcher, tmp_path):
    path = tiny.write_csv(tmp_path / "ids.csv", {"7": tiny.sentences("payday", 10), "8": tiny.sentences("weather", 10)})
    arguments = ["--examples", path, "--no-load", "--dry-run"]
    code, _, err = patcher("add-label", *arguments)
    assert code == 2
    assert "ids.csv are numbers (7, 8) and look like ids" in err
    assert "expected names, or LABEL (7) to add a number as a label" in err
    code, out, _ = patcher("add-label", "7", *arguments)
    assert (code, "would add 7" in out) == (0, True)


def test_of_several_columns_of_labels_those_that_are_not_read_are_named(patcher, tmp_path):
    rows = [f"{text},payday,other" for text in tiny.sentences("payday", 10)]
    (tmp_path / "two.csv").write_text("\n".join(["text,label,intent", *rows]))
    code, out, err = patcher("add-label", "--examples", tmp_path / "two.csv", "--no-load", "--dry-run")
    assert (code, "would add payday" in out) == (0, True)
    assert "two.csv has more than one column of texts or labels; not read: 'intent'" in err


def test_long_work_says_how_far_it_is(patcher, examples, tmp_path, monkeypatch):
    monkeypatch.setattr("patcher.stopwatch._SECONDS_A_LINE", 0.0)
    old = tiny.write_csv(tmp_path / "old.csv", {label: tiny.sentences(label, 12, seed=3) for label in tiny.OLD})
    code, _, err = patcher("add-label", "--examples", examples, "--replay", old, "--no-load", "--dry-run")
    assert (code, " of 82 texts, 0 s to go" in err) == (0, True), err


def test_no_input_is_overwritten(patcher, examples):
    before = examples.read_bytes()
    code, _, err = patcher("loadtest", "--input", examples, "--csv", examples)
    assert (code, "is read by this very command" in err) == (2, True)
    assert examples.read_bytes() == before


def test_a_full_disk_is_no_bug(patcher, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.EFBIG, "File too large", "/data/x")

    monkeypatch.setattr("patcher.repository.ModelRepository.classifier", full)
    code, _, err = patcher("labels")
    assert (code, err) == (1, "error: cannot write /data/x: File too large; make room, or raise the limit\n")


@pytest.mark.parametrize("text", ["-5 degrees outside", "--help me"])
def test_a_text_that_begins_with_a_dash_is_told_how(text, patcher):
    code, _, err = patcher("classify", text)
    assert (code, "put `--` before words that begin with -" in err) == (2, True)


def test_once_all_is_told_no_signal_changes_the_exit_code():
    script = (
        "import atexit, os, signal, sys; from patcher.cli import program; "
        "atexit.register(lambda: [os.kill(os.getpid(), number) for number in (signal.SIGINT, signal.SIGTERM)]); "
        "sys.argv[1:] = ['--version']; sys.exit(program())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
