"""The head store: many classifiers of one backbone behind one model, on a real tritonserver."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tiny
from processes import living_stubs, soon

from patcher import (
    Examples,
    Fleet,
    FoundingSettings,
    ModelRepository,
    NotServed,
    PatchSettings,
    TritonServer,
    add_label,
    new_classifier,
    rollback,
    sync,
)
from patcher.cli import main
from patcher.errors import InputError, ServerRefused
from patcher.founding import publish_new
from patcher.serve import served_models
from patcher.triton.heads import model as store
from patcher.triton.server import EmbeddedTriton

HEALTH = Path(__file__).parents[1] / "docker" / "healthcheck.py"
LABELS = (*tiny.OLD, *tiny.NEW)
IN_STORE = FoundingSettings(in_store=True)
TEXTS = [tiny.sentences(label, 1, seed=6)[0] for label in LABELS]


def found(repository, number, server=None, *, settings=IN_STORE, name=None):
    """Add the classifier ``s<number>`` with three of the tiny labels, which depend on the number."""
    labels = [LABELS[(number + step) % len(LABELS)] for step in range(3)]
    pairs = [(text, label) for label in labels for text in tiny.sentences(label, 12, seed=3)]
    examples = Examples(tuple(text for text, _ in pairs), tuple(label for _, label in pairs), "made up")
    new_classifier(repository, name or f"s{number}", examples, server=server, settings=settings)
    return repository.classifier(name or f"s{number}")


@pytest.fixture(scope="module")
def stored(tiny_original, tmp_path_factory):
    """A repository whose store holds ten classifiers, beside the one with an ensemble of its own."""
    root = tmp_path_factory.mktemp("store") / "model_repository"
    shutil.copytree(tiny_original, root)
    repository = ModelRepository(root)
    for number in range(10):
        found(repository, number)
    return repository


@pytest.fixture
def triton(stored, tmp_path):
    """A server on a copy of that repository."""
    root = tmp_path / "model_repository"
    shutil.copytree(stored.root, root)
    models = served_models(ModelRepository(root))
    with EmbeddedTriton(root, models, log_file=tmp_path / "log") as server:
        yield server


@pytest.fixture
def live(triton):
    with TritonServer(triton.url) as server:
        yield ModelRepository(triton.repository), server


def stubs(triton):
    children = psutil.Process(triton.pid).children(recursive=True)
    return {child.pid for child in children if "triton_python_backend_stub" in child.name()}


def test_the_files_of_a_stored_classifier(stored):
    assert stored.classifiers() == ("intent", *(f"s{number}" for number in range(10)))
    assert stored.stores() == ("intent",)
    classifier = stored.classifier("s3")
    assert (classifier.ensemble, classifier.address, classifier.in_store) == ("intent_any", "intent_any/s3", True)
    assert (classifier.backbone_name, classifier.features_model) == ("intent", "intent_features")
    assert not (stored.root / "s3").exists()
    assert served_models(stored) == ["intent", "intent_features", "intent_backbone", "intent_any"]
    with pytest.raises(InputError, match=r"s3 is in .* already"):
        found(stored, 3)
    with pytest.raises(InputError, match=r"no classifier 's33' in .*; it holds s3, .* 11 in all"):
        stored.classifier("s33")
    with pytest.raises(InputError, match=r"11 classifiers .* expected --classifier"):
        stored.classifier()


def test_a_store_needs_a_backbone_that_has_one(classifier):
    with classifier.repository.lock(), pytest.raises(InputError, match="no head store"):
        classifier.repository.add_classifier("x", classifier.head(), backbone="intent", in_store=True)


@pytest.mark.parametrize(
    "name", ["", "nobody", "../s1", "s1/../s1", "/etc", "intent", "s1_head", "s" * 300, "s1\n", "ä", "\0"]
)
def test_nothing_but_a_stored_classifier_is_read(stored, name):
    heads = store.Heads(stored.root, "intent", tiny.WIDTH)
    with pytest.raises(store.HeadError, match="no classifier"):
        heads.get(name)


def test_a_head_of_another_backbone_is_refused(stored):
    with pytest.raises(store.HeadError, match="belongs to the store of intent"):
        store.Heads(stored.root, "other", tiny.WIDTH).get("s1")


def test_one_head_is_read_again_and_no_other(stored, tmp_path):
    root = tmp_path / "model_repository"
    shutil.copytree(stored.root, root)
    heads = store.Heads(root, "intent", tiny.WIDTH)
    before = {name: heads.get(name) for name in ("s1", "s2")}
    forced = PatchSettings(force=True)
    add_label(ModelRepository(root), "new", ["good day", "hello there"], classifier="s1", settings=forced)
    assert heads.get("s1") is before["s1"]  # unchanged until the store is told
    assert heads.refresh("s1").version == 2
    assert heads.get("s2") is before["s2"]
    path = root / "s1_head" / "2" / "model.onnx"
    path.write_bytes(b"damaged")
    with pytest.raises(store.HeadError, match="cannot serve"):
        heads.refresh("s1")
    assert heads.get("s1").version == 2
    shutil.copyfile(root / "s1_head" / "1" / "model.onnx", path)
    with pytest.raises(store.HeadError, match="answers as version 1; expected 2"):
        heads.refresh("s1")
    shutil.rmtree(root / "s1_head")
    with pytest.raises(store.HeadError, match="no classifier 's1'"):
        heads.refresh("s1")
    with pytest.raises(store.HeadError, match="no classifier 's1'"):
        heads.get("s1")


@pytest.mark.parametrize(
    "parameters, refreshed",
    [
        ('{"refresh":true}', True),
        ('{"refresh": true, "sequence_id": 3}', True),
        ('{"refresh":false}', False),
        ('{"trace":"before the refresh"}', False),
        ('{"refreshed_by":"ann"}', False),
        ("", False),
        (None, False),
    ],
)
def test_only_the_parameter_has_a_head_read_again(monkeypatch, parameters, refreshed):
    asked = []
    tensors = {"classifier": np.array([[b"s1"]], object), "features": np.zeros((1, 3), np.float32)}
    monkeypatch.setattr(store, "_input", lambda _, name: tensors[name])
    monkeypatch.setattr(store, "_response", lambda *_: "answered")
    monkeypatch.setattr(store, "answer", lambda *_: [{}])
    served = store.Served(1, None)
    model = store.TritonPythonModel()
    model._heads = SimpleNamespace(
        get=lambda name: asked.append(("get", name)) or served,
        refresh=lambda name: asked.append(("refresh", name)) or served,
    )
    assert model.execute([SimpleNamespace(parameters=lambda: parameters)]) == ["answered"]
    assert asked == [("refresh" if refreshed else "get", "s1")]


def test_a_store_tells_whose_heads_it_has_loaded_and_loads_none_for_that(stored, monkeypatch):
    model = store.TritonPythonModel()
    model._heads = store.Heads(stored.root, "intent", tiny.WIDTH)
    monkeypatch.setattr(store, "_response", lambda _, outputs: outputs)
    request = SimpleNamespace(parameters=lambda: '{"held":true}')
    for held in ([], ["s1", "s2"]):
        for name in reversed(held):
            model._heads.get(name)
        (answer,) = model.execute([request])
        assert json.loads(answer["label"][0, 0]) == held
        assert int(answer["head_version"][0, 0]) == 0
        assert {(name, value.shape) for name, value in answer.items()} == {(name, (1, 1)) for name in store._ANSWER}


@pytest.mark.parametrize(
    "config",
    [
        "",
        'name: "x"',
        "version_policy { latest { num_versions: 1 } }",
        "version_policy { specific { versions: 1 versions: 2 } }",
    ],
)
def test_a_configuration_without_a_pin_is_refused(config):
    with pytest.raises(store.HeadError, match="pins no version"):
        store.pinned(config, "x")


def test_a_pin_is_read_as_protobuf_reads_it(stored):
    from patcher.model_config import parse, pinned_versions

    written = (stored.root / "s1_head" / "config.pbtxt").read_text()
    short, long = "version_policy{specific{versions:7}}", "version_policy: { specific: { versions: [ 12 ] } }"
    for config in (written, short, long):
        assert (store.pinned(config, "x"),) == pinned_versions(parse(config))


@pytest.mark.server
def test_it_answers_as_a_head_of_its_own_does(live):
    repository, server = live
    publish_new(repository.backbone(), "own", repository.classifier("s4").head(), None, server)
    pairs = zip(server.classify("own", TEXTS), server.classify("intent_any/s4", TEXTS), strict=True)
    for first, second in pairs:
        assert (first.labels, first.scores, first.in_scope) == (second.labels, second.scores, second.in_scope)
        assert first.logits.tobytes() == second.logits.tobytes()


@pytest.mark.server
def test_texts_for_many_classifiers_at_once_each_get_their_own(live):
    repository, server = live
    names = [f"s{number}" for number in range(10)]
    expected = {name: repository.classifier(name).head() for name in names}
    features = server.features("intent_features", TEXTS)

    def ask(turn):
        name = names[turn % len(names)]
        with TritonServer(server.url) as client:
            return name, client.classify(f"intent_any/{name}", TEXTS)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for name, answers in pool.map(ask, range(80)):
            logits = np.array([answer.logits for answer in answers])
            np.testing.assert_allclose(logits, expected[name].logits(features), atol=1e-3)
            assert [a.labels[0] for a in answers] == [expected[name].labels[i] for i in logits.argmax(axis=1)]


@pytest.mark.server
def test_what_is_wrong_with_one_request_fails_that_one_alone(live):
    import tritonclient.grpc as triton

    _, server = live
    with pytest.raises(ServerRefused, match="no classifier 'nobody' in the store of intent"):
        server.classify("intent_any/nobody", ["hello"])
    with pytest.raises(ServerRefused, match="no classifier"):
        server.classify("intent_any/../intent", ["hello"])
    inputs = []
    for name, values in (("text", [b"hello", b"you"]), ("classifier", [b"s1", b"s2"])):
        tensor = triton.InferInput(name, [2, 1], "BYTES")
        tensor.set_data_from_numpy(np.array(values, dtype=object).reshape(2, 1))
        inputs.append(tensor)
    client = triton.InferenceServerClient(server.url)
    with pytest.raises(Exception, match="2 classifiers; expected one"):
        client.infer("intent_any", inputs)
    client.close()
    assert server.classify("intent_any/s1", ["hello"])[0].head_version == 1


@pytest.mark.server
def test_a_new_head_starts_no_process_and_survives_a_restart(live, triton, tmp_path):
    repository, server = live
    before = stubs(triton)
    classifier = found(repository, 3, server, name="late")
    add_label(repository, "balance", tiny.sentences("balance", 10), server=server, classifier="late")
    assert server.classify(classifier.address, ["hello"])[0].head_version == 2
    assert stubs(triton) == before
    models = ["intent_any", "intent_features"]
    with EmbeddedTriton(repository.root, models, log_file=tmp_path / "log2") as again, again.client() as client:
        assert client.classify(classifier.address, ["hello"])[0].head_version == 2
        rollback(classifier, None, client)
        assert client.classify(classifier.address, ["hello"])[0].head_version == 1


@pytest.mark.server
def test_several_servers_of_one_repository(live, tmp_path):
    repository, server = live
    models = ["intent_any", "intent_features"]
    with EmbeddedTriton(repository.root, models, log_file=tmp_path / "log2") as other:
        with Fleet([server.url, other.url], watch_seconds=0.2) as fleet, TritonServer(other.url) as second:
            late = found(repository, 3, fleet, name="late")
            assert second.classify(late.address, ["hello"])[0].head_version == 1
            add_label(repository, "balance", tiny.sentences("balance", 10), server=server, classifier="late")
            assert second.classify(late.address, ["hello"])[0].head_version == 1  # the store was not told
            assert set(sync(late, fleet).values()) == {"agreed", "caught up"}
            assert second.classify(late.address, ["hello"])[0].head_version == 2
            rollback(late, None, fleet)
            assert [each.classify(late.address, ["hello"])[0].head_version for each in (server, second)] == [1, 1]


@pytest.mark.server
def test_the_exporter_asks_stored_classifiers_too(live):
    from patcher.metrics import Targets, _probes

    repository, server = live
    probes = _probes(Targets((server.url,), ("intent", "s1"), repository))
    assert [(probe.classifier, probe.up, probe.version, probe.labels) for probe in probes] == [
        ("intent", True, 1, len(tiny.OLD)),
        ("s1", True, 1, 3),
    ]


@pytest.mark.server
def test_the_containers_health_check_takes_the_stores_word(live, triton, tmp_path):
    """A damaged head affects only its own classifier; a dead store process affects all of them."""
    repository, server = live
    (tmp_path / "classifiers").write_text("intent_any")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "TRITON_MODEL_REPO": str(repository.root)}
    command = [sys.executable, str(HEALTH), triton.http_url]

    def code():
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode

    (repository.classifier("s0").version_path(1) / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ServerRefused, match="cannot serve"):
        server.classify("intent_any/s0", ["hello"])
    assert code() == 0
    (process,) = living_stubs(triton.pid, "intent_heads")
    process.kill()
    assert code() == 1
    os.kill(triton.pid, signal.SIGKILL)  # it would wait for the dead stub


@pytest.mark.server
@pytest.mark.parametrize("name", ["intent", "s1"])
def test_classify_fetches_the_logits_of_one_text_and_says_the_same(live, monkeypatch, capsys, name):
    import tritonclient.grpc as triton

    repository, server = live
    (whole,) = server.classify(repository.classifier(name).address, ["hello"])
    got, infer = [], triton.InferenceServerClient.infer

    def noted(*args, **more):
        result = infer(*args, **more)
        got.append({each.name: each.shape[0] for each in result.get_response().outputs})
        return result

    monkeypatch.setattr(triton.InferenceServerClient, "infer", noted)
    options = ["--repo", str(repository.root), "--url", server.url, "--classifier", name]
    assert main(["classify", "hello", "there", "again", "--json", *options]) == 0
    said, *_ = json.loads(capsys.readouterr().out)
    assert said["labels"] == [whole.labels[0]]
    assert tuple(each["label"] for each in said["candidates"]) == whole.labels
    assert tuple(each["score"] for each in said["candidates"]) == pytest.approx(whole.scores)
    assert (said["head_version"], said.get("in_scope")) == (1, pytest.approx(whole.in_scope))
    outputs = ["label", "score", "head_version", *(["in_scope"] if whole.in_scope is not None else [])]
    assert got == [dict.fromkeys([*outputs, "logits"], 1), dict.fromkeys(outputs, 2)]
    (bare,) = server.classify(repository.classifier(name).address, ["hello"], logits=False)
    assert bare.logits.shape == (0,)


@pytest.mark.server
def test_one_configuration_tells_of_all_classifiers_in_a_store(live, monkeypatch):
    asked, config = [], TritonServer.model_config
    monkeypatch.setattr(TritonServer, "model_config", lambda self, model: asked.append(model) or config(self, model))
    with TritonServer(live[1].url) as server:
        for number in range(5):
            server.classify(f"intent_any/s{number}", ["hello"])
    assert asked == ["intent_any"]


@pytest.mark.server
@pytest.mark.usefixtures("torn")
def test_what_the_store_will_not_serve_is_taken_back(live):
    repository, server = live
    with pytest.raises(NotServed, match="Version 1 serves again"):
        add_label(repository, "payday", tiny.sentences("payday", 10), server=server, classifier="s0")
    assert server.classify("intent_any/s0", ["hello"])[0].head_version == 1
    assert repository.classifier("s0").serving() == 1


@pytest.mark.server
def test_swaps_of_one_head_under_traffic_on_all(live):
    """Label, version and logits of every answer belong together, and no request fails."""
    repository, server = live
    classifier = repository.classifier("s0")
    heads = {("s1", 1): repository.classifier("s1").head(), ("s0", 1): classifier.head()}
    stop = threading.Event()
    answers, failures = [], []

    def seen(found):
        return found[0], found[1].head_version

    def loop(name):
        with TritonServer(server.url) as client:
            while not stop.is_set():
                try:
                    answers.extend((name, answer) for answer in client.classify(f"intent_any/{name}", TEXTS))
                except Exception as error:  # noqa: BLE001
                    failures.append(error)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(loop, name) for name in ("s0", "s1", "s0", "s1")]
        try:
            for turn in range(15):
                label = tiny.NEW[turn % len(tiny.NEW)]
                report = add_label(repository, label, tiny.sentences(label, 10), server=server, classifier="s0")
                heads["s0", report.version] = classifier.head(report.version)
                assert soon(lambda: failures or ("s0", report.version) in map(seen, answers[-99:]))  # noqa: B023  at once
                rollback(classifier, None, server)
        finally:
            stop.set()
        for client in clients:
            client.result()
    assert failures == []
    for name, answer in answers:
        head = heads[seen((name, answer))]
        assert len(answer.logits) == len(head.labels)
        assert answer.labels[0] == head.labels[int(answer.logits.argmax())]
    assert set(map(seen, answers)) == set(heads)


def test_a_share_of_the_requests_is_for_classifiers_with_an_ensemble(stored):
    with pytest.raises(InputError, match="s1 is in the head store of intent"):
        add_label(
            stored,
            "payday",
            tiny.sentences("payday", 10),
            classifier="s1",
            settings=PatchSettings(canary=10, force=True),
        )
    assert stored.classifier("s1").versions() == (1,)


def test_a_file_that_cannot_be_read_is_one_classifiers_fault(stored, tmp_path):
    root = shutil.copytree(stored.root, tmp_path / "repository")
    heads = store.Heads(root, "intent", tiny.WIDTH)
    (root / "s1_head" / "store").write_bytes(b"\xff\xfe")
    (root / "s2_head" / "config.pbtxt").write_bytes(b"\xff")
    for name in ("s1", "s2"):
        with pytest.raises(store.HeadError, match=f"cannot read .*{name}_head"):
            heads.get(name)
    assert heads.get("s3").version == 1
