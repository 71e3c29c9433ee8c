"""The main use case on a real tritonserver: add a label live, answer over gRPC, roll back, survive a restart."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiny
from processes import soon

from patcher import ModelRepository, NotServed, TritonServer, add_label, rollback
from patcher.runtime import Encoder
from patcher.triton.server import EmbeddedTriton

pytestmark = pytest.mark.server
MODELS = ["intent", "intent_features"]


@pytest.fixture(scope="module")
def triton(tiny_original, tmp_path_factory):
    """One server for the module, on its own copy of the tiny repository."""
    folder = tmp_path_factory.mktemp("road")
    shutil.copytree(tiny_original, folder / "model_repository")
    with EmbeddedTriton(folder / "model_repository", MODELS, log_file=folder / "triton.log") as server:
        yield server


@pytest.fixture
def live(triton):
    """Classifier and client, on version 1 whatever the previous test did."""
    classifier = ModelRepository(triton.repository).classifier()
    with TritonServer(triton.url) as server:
        if classifier.serving() != 1:
            rollback(classifier, 1, server)
        yield classifier, server


@pytest.fixture
def patcher(live, monkeypatch, command):
    classifier, server = live
    monkeypatch.setenv("TRITON_MODEL_REPO", str(classifier.root))
    monkeypatch.setenv("TRITON_URL", server.url)

    return command


def test_the_server_answers_as_the_files_do(live):
    classifier, server = live
    texts = [text for label in tiny.OLD for text in tiny.sentences(label, 15, seed=3)]
    answers = server.classify("intent", texts)
    features = Encoder(classifier.backbone_path, classifier.tokenizer_path).encode(texts)
    expected = classifier.head().logits(features)
    np.testing.assert_allclose([answer.logits for answer in answers], expected, atol=1e-4)
    assert [answer.labels[0] for answer in answers] == [tiny.OLD[i] for i in expected.argmax(axis=1)]
    np.testing.assert_allclose(server.features("intent_features", texts), features, atol=1e-5)
    assert {answer.head_version for answer in answers} == {1}


def test_a_label_from_the_shell_and_back(patcher, live, tmp_path):
    classifier, _ = live
    question = tiny.sentences("payday", 30, seed=7)[-1]
    (before,) = json.loads(patcher("classify", question, "--json")[1])
    code, _, err = patcher("classify", question, "--classifier", "typo")
    assert (code, "no classifier 'typo' in" in err) == (2, True), err
    assert before["label"] != "payday"
    file = tiny.write_csv(tmp_path / "a.csv", {"payday": tiny.sentences("payday", 10)})
    code, out, err = patcher("add-label", "--examples", file, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["published"], report["served"], report["gate"]) == (True, True, "passed")
    (after,) = json.loads(patcher("classify", question, "--json")[1])
    assert (after["label"], after["head_version"]) == ("payday", report["version"])
    assert [c["score"] for c in after["candidates"]] == sorted((c["score"] for c in after["candidates"]), reverse=True)
    assert patcher("doctor")[0] == 0
    assert patcher("rollback")[0] == 0
    (again,) = json.loads(patcher("classify", question, "--json")[1])
    assert (again["label"], again["head_version"]) == (before["label"], 1)
    assert classifier.serving() == 1


def test_the_api_of_the_contract(live):
    classifier, server = live
    patch = add_label(classifier.repository, "pizza", tiny.sentences("pizza", 10), server=server)
    assert patch.served
    assert server.classify("intent", tiny.sentences("pizza", 1, seed=4))[0].labels[0] == "pizza"


def test_the_rest_of_a_labels_life(patcher, live):
    _, server = live
    text = tiny.sentences("music", 1, seed=8)[0]
    assert patcher("rename-label", "music", "songs")[0] == 0
    assert server.classify("intent", [text])[0].labels[0] == "songs"
    assert patcher("remove-label", "songs")[0] == 0
    answer = server.classify("intent", [text])[0]
    assert len(answer.logits) == len(tiny.OLD) - 1
    code, _, err = patcher("merge-labels", "alarm", "weather", "--into", "morning", "--max-flips", "0.05")
    assert code == 0, err
    answers = server.classify("intent", tiny.sentences("alarm", 5, seed=8) + tiny.sentences("weather", 5, seed=8))
    assert [answer.labels[0] for answer in answers].count("morning") >= 9


def test_a_rollback_survives_a_restart(live, tmp_path):
    classifier, server = live
    add_label(classifier.repository, "payday", tiny.sentences("payday", 10), server=server)
    version = classifier.serving()
    rollback(classifier, None, server)
    with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log") as again, again.client() as client:
        assert client.classify("intent", ["hello"])[0].head_version == 1
        rollback(classifier, version, client)
    with EmbeddedTriton(classifier.root, MODELS, log_file=tmp_path / "log") as again, again.client() as client:
        assert client.classify("intent", ["hello"])[0].head_version == version
    server.load("intent_head")


@pytest.mark.usefixtures("torn")
def test_what_the_server_will_not_serve_is_taken_back(live, monkeypatch, patcher):
    classifier, server = live
    texts = [a for text in tiny.sentences("payday", 10) for a in ("--text", text)]
    code, out, err = patcher("add-label", "payday", *texts)
    assert (code, out) == (4, "")
    assert "Version 1 serves again" in err
    assert classifier.serving() == 1
    assert server.classify("intent", ["hello"])[0].head_version == 1
    with pytest.raises(NotServed, match="would not serve it"):
        add_label(classifier.repository, "payday", tiny.sentences("payday", 10), server=server)
    monkeypatch.undo()
    assert add_label(classifier.repository, "payday", tiny.sentences("payday", 10), server=server).served


def test_a_server_of_another_repository_is_noticed(live, classifier, tmp_path):
    """The copy on disk has the same backbone, so only the answer shows that the server reads other files."""
    _, server = live
    with pytest.raises(NotServed, match="Is --repo the repository that this server serves"):
        add_label(classifier.repository, "payday", tiny.sentences("payday", 10), server=server)
    assert classifier.serving() == 1
    other = tiny.backbone_files(tmp_path, seed=5)
    with classifier.repository.lock():
        classifier.repository.add_backbone("other", other)
    (classifier.root / "intent_backbone").rename(tmp_path / "old")
    (classifier.root / "other_backbone").rename(classifier.root / "intent_backbone")
    with pytest.raises(Exception, match="serves backbone"):
        add_label(classifier.repository, "payday", tiny.sentences("payday", 10), server=server)


def test_fifty_patches_and_rollbacks_under_load(live):
    classifier, server = live
    texts = [tiny.sentences(label, 1, seed=6)[0] for label in (*tiny.OLD, *tiny.NEW)]
    heads = {1: classifier.head(1)}
    stop = threading.Event()
    answers, failures = [], []

    def loop():
        with TritonServer(server.url) as client:
            while not stop.is_set():
                try:
                    answers.extend(client.classify("intent", texts))
                except Exception as error:  # noqa: BLE001
                    failures.append(error)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(loop) for _ in range(4)]
        try:
            for _ in range(25):
                label = tiny.NEW[len(heads) % len(tiny.NEW)]
                report = add_label(classifier.repository, label, tiny.sentences(label, 10), server=server)
                heads[report.version] = classifier.head(report.version)
                assert soon(lambda: failures or answers[-1].head_version == report.version)  # noqa: B023  at once
                rollback(classifier, None, server)
        finally:
            stop.set()
        for client in clients:
            client.result()
    assert failures == []
    for answer in answers:
        head = heads[answer.head_version]
        assert len(answer.logits) == len(head.labels)
        assert answer.labels[0] == head.labels[int(answer.logits.argmax())]
    assert {answer.head_version for answer in answers} == set(heads)


def test_two_patchers_at_once_both_win(live, tmp_path):
    classifier, server = live
    commands = [
        [sys.executable, "-m", "patcher", "add-label", "--json", "--examples",
         str(tiny.write_csv(tmp_path / f"{label}.csv", {label: tiny.sentences(label, 10)}))]
        for label in tiny.NEW
    ]  # fmt: skip
    environment = {**os.environ, "TRITON_MODEL_REPO": str(classifier.root), "TRITON_URL": server.url}
    running = [subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for c in commands]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * 3, outputs
    assert set(classifier.head().labels) == {*tiny.OLD, *tiny.NEW}
    answers = server.classify("intent", [tiny.sentences(label, 1, seed=6)[0] for label in tiny.NEW])
    assert [answer.labels[0] for answer in answers] == list(tiny.NEW)


def test_loopback_only(triton):
    import psutil

    addresses = {c.laddr.ip for c in psutil.Process(triton.pid).net_connections() if c.status == "LISTEN"}
    assert addresses
    assert {address.removeprefix("::ffff:") for address in addresses} <= {"127.0.0.1", "::1"}
