"""Command lines that make no sense: the message says what was expected, and the command that was probably meant."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import tiny

from patcher.triton.running import find_running

DEAD = "127.0.0.1:1"
"""Nobody listens on port 1."""


@pytest.fixture
def patcher(classifier, command, monkeypatch, tmp_path):
    """Run a verb on the tiny repository, in a folder with the file ``pets``: (exit code, stdout, stderr)."""
    monkeypatch.setenv("TRITON_MODEL_REPO", str(classifier.root))
    monkeypatch.setenv("TRITON_URL", DEAD)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").write_text("a cat\na dog\n")
    return command


LEFT_OVER = {
    "rollback 2": "takes only options; got also '2'; did you mean `patcher rollback --to 2`?",
    "rollback to 2": "got also 'to', '2'; did you mean `patcher rollback --to 2`?",
    "rollback 2 --classifier 2": "did you mean `patcher rollback --to 2 --classifier 2`?",
    "rollback --to 1 2": "got also '2'; `patcher rollback --help` lists the options",
    "labels 1": "did you mean `patcher labels --version 1`?",
    "labels intent": "did you mean `patcher labels --classifier intent`?",
    "prune 3": "did you mean `patcher prune --keep 3`?",
    "canary 50": "did you mean `patcher canary --percent 50` (or --version)?",
    "canary 1": "did you mean `patcher canary --version 1` (or --percent)?",
    "canary promote": "did you mean `patcher canary --promote`?",
    "doctor localhost:8001": "did you mean `patcher doctor --url localhost:8001`?",
    "serve model_repository": "did you mean `patcher serve --repo model_repository` (or --onnxruntime-backend)?",
    "add-label payday pets.csv --dry-run": "takes LABEL and options; got also 'pets.csv'; "
    "did you mean `patcher add-label payday --examples pets.csv --dry-run` (or --replay, --eval)?",
    "add-label payday pets": "did you mean `patcher add-label payday --examples pets` (or --replay, --eval)?",
    "add-label payday --text a b": "got also 'b'; put quotes around a name with spaces, and give one at a time",
    "remove-label music travel": "takes LABEL and options; got also 'travel'; put quotes around a name with spaces",
    "rename-label two words one": "takes OLD NEW and options; got also 'one'; put quotes around a name with spaces\n",
    "new-classifier topics pets.csv": "did you mean `patcher new-classifier topics --train pets.csv`?",
    "remember pets.csv statistics --data x": "got also 'pets.csv', 'statistics'; `patcher remember --help` lists",
    "remember statistics --data x": "did you mean `patcher remember --memory statistics --data x` (or --classifier)?",
    "report page.html": "did you mean `patcher report --html page.html` (or --eval)?",
    "loadtest 1:8:3": "did you mean `patcher loadtest --concurrency 1:8:3` (or --request-rate)?",
    "to-transformers out bert": "did you mean `patcher to-transformers out --checkpoint bert` (or --classifier)?",
    "diff 1 2 pets": "takes A B and options; got also 'pets'; did you mean `patcher diff 1 2 --eval pets`",
    "history 3": "takes only options; got also '3'; `patcher history --help` lists the options",
}
MISTAKES = LEFT_OVER | {
    "labels -version 1": "there is no option '-version'; did you mean --version?",
    "labels --repository x": "there is no option '--repository'; did you mean --repo?",
    "labels --keep 1": "there is no option '--keep'; `patcher labels --help` lists the options\n",
    "report --hmtl x": "there is no option '--hmtl'; did you mean --html?",
    "labels -x": "there is no option '-x'; `patcher labels --help` lists the options\n",
    "--repo x labels": "there is no option '--repo' before the verb: a verb's options follow it",
    "add-label --example x": "there is no option '--example'; did you mean --examples?",
    "diff one two": "error: A: expected the number of a version, got 'one'; `patcher history` lists the versions\n",
    "diff 1 0": "error: B: expected the number of a version, got '0'; `patcher history` lists the versions\n",
    "diff 1": "B is missing; expected `patcher diff A B`; `patcher history` lists the versions\n",
    "rollback --to x": "--to: expected the number of a version, got 'x'; `patcher history` lists the versions\n",
    "canary --version x --percent 1": "--version: expected the number of a version, got 'x'",
    "canary --version 1 --percent nan": "--percent: expected a number above 0 and below 100, got 'nan'\n",
    "prune --keep 0": "--keep: expected a whole number of at least 1, got '0'\n",
    "serve --grpc-port 70000": "--grpc-port: expected a whole number from 0 to 65535, got '70000'\n",
    "serve --start-timeout 0": "--start-timeout: expected a number above 0, got '0'\n",
    "loadtest --window x": "--window: expected a number from 0.2 to 600, got 'x'\n",
    "merge-labels music": "--into is missing; expected `patcher merge-labels LABELS... --into LABEL`\n",
    "new-classifier": "NAME is missing; expected `patcher new-classifier NAME --train FILE`\n",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_told_with_what_was_probably_meant(line, patcher, classifier, tree):
    before = tree(classifier.root)
    code, out, err = patcher(*line.split())
    assert (code, out) == (2, "")
    assert err.startswith("Usage: patcher ")
    assert MISTAKES[line] in err
    assert "valid" not in err
    assert tree(classifier.root) == before


def test_a_long_command_is_not_repeated(patcher):
    err = patcher("add-label", "payday", "pets.csv", "--text", "a " * 5000)[2]
    assert "did you mean `patcher add-label … --examples pets.csv` (or --replay, --eval)?" in err


def test_a_word_that_is_longer_than_any_name_is_no_file(patcher):
    code, _, err = patcher("history", "two words " * 1000)
    assert (code, "takes only options; got also 'two words two" in err, len(err) < 300) == (2, True, True), err


def test_of_many_words_left_over_none_is_tried_as_an_option(patcher):
    began = time.monotonic()
    assert "did you mean" not in patcher("labels", *["1"] * 500)[2]
    assert time.monotonic() - began < 10


def test_the_name_of_a_file_is_a_text_with_a_warning(patcher):
    said = "warning: classifying 'pets' as a text, the name of a file; for those in it: `patcher classify"
    assert f"{said} --file pets`\n" in patcher("classify", "pets")[2]
    for texts in (["pets", "a cat"], ["a cat"], ["x" * 5000]):
        assert "warning" not in patcher("classify", *texts)[2]
    err = patcher("add-label", "payday", "--text", "pets", "--no-load", "--dry-run")[2]
    assert "warning: taking 'pets' as a text, the name of a file; --examples reads the texts in it\n" in err


def test_a_file_in_place_of_the_label_is_told(patcher):
    assert "several times; did you mean --examples pets?" in patcher("add-label", "pets")[2]


@pytest.mark.parametrize("own", [True, False])
def test_a_port_that_a_server_of_the_same_repository_has_is_told(own, patcher, classifier, monkeypatch):
    monkeypatch.setattr("patcher.serve._PORT_SECONDS", 0.0)
    grpc, web, metrics, other = tiny.free_ports(4)
    listen = f"import socket; s = socket.create_server(('127.0.0.1', {web})); print(flush=True); s.accept()"
    options = [f"--model-repository={classifier.root if own else classifier.root.parent}", "--grpc-address=127.0.0.1"]
    options += [f"--{name}-port={port}" for name, port in (("grpc", grpc), ("http", web), ("metrics", metrics))]
    with subprocess.Popen(
        ["tritonserver", "-c", listen, *options], executable=sys.executable, stdout=subprocess.PIPE
    ) as there:
        there.stdout.readline()
        code, _, err = patcher("serve", "--grpc-port", grpc, "--http-port", web, "--metrics-port", metrics)
        elsewhere = find_running(classifier.root, [other])
        there.kill()
    assert elsewhere is None  # beside it, on other ports, another one may start
    told = f"error: this repository is served already: gRPC 127.0.0.1:{grpc}, by process {there.pid}. Use that server, "
    told += f"or stop it (kill {there.pid}), or start another one beside it"
    usual = f"error: cannot listen on 127.0.0.1:{web}: Address already in use; name another port, or 0 for any\n"
    assert (code, told in err, usual in err) == (2, own, not own), err
