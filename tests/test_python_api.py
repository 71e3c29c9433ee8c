"""The Python API as a notebook uses it: what it accepts, and what it says about mistakes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from patcher import (
    ClientTls,
    EmbeddedTriton,
    Examples,
    ExamplesError,
    Fleet,
    FoundingSettings,
    GateRefused,
    InputError,
    ModelRepository,
    PatchSettings,
    ServerUnreachable,
    SplitClient,
    TritonServer,
    WrongPort,
    add_label,
    add_labels,
    diff,
    drop_classifier,
    evaluate,
    history,
    merge_labels,
    new_classifier,
    prune,
    read_examples,
    remember,
    remove_label,
    rename_label,
    rollback,
    sync,
)
from patcher.fleet import attempt

DRY = PatchSettings(dry_run=True, force=True)
TEN = tiny.sentences("payday", 10)
NOBODY = "127.0.0.1:1"
"""No server listens at this address, so whatever is refused with it is refused without contacting a server."""


class Grpc:
    """A stand-in for tritonclient, which answers every text with ``outputs``."""

    def __init__(self, outputs=("label", "score", "logits", "head_version")):
        self.outputs, self.asked = outputs, []

    def get_model_config(self, _model, **_):
        return SimpleNamespace(config=SimpleNamespace(max_batch_size=8))

    def is_model_ready(self, *_, **__):
        return False

    def infer(self, model, inputs, **_):
        count = inputs[0].shape()[0]
        self.asked.append(count)
        values = {
            "label": np.full((count, 1), b"music", object),
            "score": np.ones((count, 1), np.float32),
            "logits": np.zeros((count, 2), np.float32),
            "head_version": np.ones((count, 1), np.int64),
            "features": np.zeros((count, 3), np.float32),
        }
        return SimpleNamespace(
            as_numpy=lambda name: values[name] if name in self.outputs else None,
            get_response=lambda: SimpleNamespace(model_name=model),
        )


def connected(*outputs):
    server = TritonServer(NOBODY)
    server.__dict__["_client"] = Grpc(*outputs)
    return server


@pytest.fixture
def files(tmp_path):
    """Files with labelled texts of the old labels: for training and held out."""
    return [
        tiny.write_csv(tmp_path / f"{seed}.csv", {label: tiny.sentences(label, 5, seed) for label in tiny.OLD})
        for seed in (21, 22)
    ]


@pytest.mark.parametrize("texts", ["lost my card", b"lost my card"])
def test_one_text_is_no_list_of_letters(texts):
    server = connected()
    for ask in (
        lambda: server.classify("intent", texts),
        lambda: server.features("intent_features", texts),
        lambda: SplitClient(server, "intent").classify(texts, ["user"]),
    ):
        with pytest.raises(InputError, match=r"texts: expected a list, got (str|bytes); put brackets around"):
            ask()
    with pytest.raises(InputError, match="keys: expected a list"):
        SplitClient(server, "intent").classify(["lost"], "user")
    assert server._client.asked == []


@pytest.mark.parametrize("wrong, called", [(None, "None"), (3, "int"), (b"lost", "bytes"), (float("nan"), "float")])
def test_a_text_that_is_none_is_named_by_its_place(wrong, called):
    with pytest.raises(InputError, match=rf"texts\[1\]: expected str, got {called}"):
        connected().classify("intent", ["lost my card", wrong])


def test_texts_come_in_anything_that_can_be_listed():
    for texts in (["a", ""], ("a", ""), np.array(["a", ""]), (text for text in ["a", ""]), {"a": 1, "": 2}.keys()):
        assert [answer.text for answer in connected().classify("intent", texts)] == ["a", ""]
    assert len(SplitClient(connected(), "intent").classify(iter(["a", "b"]), iter(["u", "v"]))) == 2


def test_a_model_that_gives_something_else_is_named():
    with pytest.raises(InputError, match=r"intent_features has no output label: expected a classifier"):
        connected(("features",)).classify("intent_features", ["a"])
    with pytest.raises(InputError, match=r"intent has no output features: .*NAME_features"):
        connected().features("intent", ["a"])
    with pytest.raises(InputError, match="model: expected str, got None"):
        connected().classify(None, ["a"])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TritonServer(8001), "url: expected str, got int"),
        (lambda: TritonServer(NOBODY, timeout=None), "timeout: expected float, got None"),
        (lambda: TritonServer(NOBODY, timeout=-1), "timeout is -1; expected a number of seconds above 0"),
        (lambda: TritonServer(NOBODY, timeout=float("nan")), "timeout is nan"),
        (lambda: TritonServer(NOBODY, tls="/ca.pem"), "tls: expected ClientTls or None, got str"),
        (lambda: TritonServer(NOBODY, admin_key=b"secret"), "^admin_key: expected str or None, got bytes$"),
        (lambda: Fleet([8001]), "url: expected str, got int"),
        (lambda: Fleet(None), "urls: expected Iterable, got None"),
        (lambda: Fleet(NOBODY, watch_seconds="2"), "watch_seconds: expected float, got str"),
        (lambda: SplitClient(NOBODY, "intent"), "server: expected TritonServer, got str"),
        (lambda: SplitClient(None, "intent"), "server: expected TritonServer, got None"),
        (lambda: SplitClient(TritonServer(NOBODY), None), "classifier: expected str, got None"),
        (lambda: SplitClient(TritonServer(NOBODY), "intent", refresh_seconds="5"), "refresh_seconds: expected float"),
        (lambda: EmbeddedTriton(None, []), "repository: expected str or PathLike, got None"),
        (lambda: EmbeddedTriton("repository", "intent"), "models: expected a list, got str"),
        (lambda: EmbeddedTriton("repository", [], host=None), "host: expected str, got None"),
        (lambda: EmbeddedTriton("repository", [], grpc_port="8001"), "grpc_port: expected int, got str"),
        (
            lambda: TritonServer(NOBODY, timeout=float("inf")),
            "timeout is inf; expected a number of seconds above 0, at most 1,000",
        ),
        (lambda: Fleet(NOBODY, watch_seconds=-1), "watch_seconds is -1; expected a finite number of seconds, 0 or"),
        (lambda: Fleet(NOBODY, watch_seconds=float("nan")), "watch_seconds is nan"),
        (lambda: EmbeddedTriton("repository", [], grpc_port=70000), r"grpc_port is 70000; expected 0 .* to 65535"),
        (lambda: EmbeddedTriton("repository", [], http_port=-5), "http_port is -5"),
        (lambda: EmbeddedTriton("repository", [], open_control="no"), "open_control: expected bool, got str"),
        (lambda: EmbeddedTriton("repository", [], http="no"), "http: expected bool, got str"),
        (lambda: EmbeddedTriton("repository", [], exit_timeout="9"), "exit_timeout: expected int, got str"),
        (lambda: TritonServer(NOBODY).classify("intent", ["a"], logits="no"), "logits: expected bool, got str"),
        (lambda: ClientTls(None), r"--tls-ca \(ca=...\): expected str or PathLike, got None"),
        (lambda: ClientTls("/nowhere.pem"), r"cannot read --tls-ca \(ca=...\) /nowhere.pem"),
        (lambda: ModelRepository(None), "location: expected str or PathLike, got None"),
        (lambda: read_examples(None), "path: expected str or PathLike, got None"),
        (lambda: PatchSettings(max_flips="0.01"), "max_flips: expected float, got str"),
        (lambda: PatchSettings(max_flips=True), "max_flips: expected float, got bool"),
        (lambda: PatchSettings(canary="10"), "percent: expected float, got str"),
        (lambda: PatchSettings(method=None), "method: expected str, got None"),
        (lambda: PatchSettings(force="no"), "force: expected bool, got str"),
        (lambda: PatchSettings(dry_run="false"), "dry_run: expected bool, got str"),
        (lambda: PatchSettings(use_name=0), "use_name: expected bool, got int"),
        (lambda: FoundingSettings(min_accuracy="0.5"), "min_accuracy: expected float, got str"),
        (lambda: FoundingSettings(force="no"), "force: expected bool, got str"),
        (lambda: FoundingSettings(in_store=None), "in_store: expected bool, got None"),
        (lambda: FoundingSettings(per_label="20"), "per_label: expected int, got str"),
    ],
)
def test_what_is_made_of_the_wrong_things(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_truth_values_of_numpy_are_taken_too():
    assert PatchSettings(force=np.True_).force
    with pytest.raises(InputError, match="max_flips: expected float, got bool"):
        PatchSettings(max_flips=np.True_)


def test_one_address_is_a_fleet_and_whole_numbers_are_seconds():
    with Fleet(NOBODY) as fleet:
        assert (fleet.away, repr(fleet)) == ((NOBODY,), f"<Fleet at {NOBODY}>")
    assert TritonServer(NOBODY, timeout=np.int64(3)).timeout == 3


def test_a_fleet_changes_every_replica_that_is_there(monkeypatch):
    monkeypatch.setattr(TritonServer, "is_live", lambda server: server.url != "c:1")
    asked = []
    for name in ("load", "unload", "check_control", "refresh"):
        monkeypatch.setattr(TritonServer, name, lambda server, *given, name=name: asked.append((server.url, *given)))
        with Fleet(["a:1", "b:1", "c:1"]) as fleet:
            given = {"check_control": (), "refresh": ("intent_heads", "s1", 3)}.get(name, ("intent",))
            getattr(fleet, name)(*given)
        assert sorted(asked) == [("a:1", *given), ("b:1", *given)], name
        asked.clear()
    monkeypatch.setattr(TritonServer, "is_live", lambda _: False)

    def gone(server, model):
        raise ServerUnreachable(f"nobody answers at {server.url}")

    monkeypatch.setattr(TritonServer, "load", gone)
    with Fleet(["a:1", "b:1"]) as fleet, pytest.raises(ServerUnreachable, match="2 of 2 replicas failed"):
        fleet.load("intent")


def test_an_unexpected_error_of_a_replica_cancels_no_call_to_another():
    # Whether any would be depends on when the threads run, hence many times.
    for _ in range(50):
        asked = []

        def ask(number, asked=asked):
            asked.append(number)
            if number == 0:
                raise ValueError("unexpected")

        with pytest.raises(ValueError, match="unexpected"):
            attempt(range(32), ask)
        assert sorted(asked) == list(range(32))


def test_a_fleet_that_cannot_be_made_leaves_no_connection_open(monkeypatch):
    closed = []

    def asked(server):
        if server.url == "b:1":
            raise WrongPort("b:1 is an HTTP port")
        return True

    monkeypatch.setattr(TritonServer, "is_live", asked)
    monkeypatch.setattr(TritonServer, "close", lambda server: closed.append(server.url))
    with pytest.raises(WrongPort):
        Fleet(["a:1", "b:1"])
    assert closed == ["a:1", "b:1"]


def test_arguments_in_the_wrong_place(classifier, tree):
    server, held = TritonServer(NOBODY), Examples(("a",), ("music",))
    before = tree(classifier.root)
    for call, message in (
        (lambda: rollback(classifier, server), "to: expected int or None, got TritonServer"),
        (lambda: rollback(classifier, "1"), "to: expected int or None, got str"),
        (lambda: rollback(classifier, None, NOBODY), "server: expected TritonServer or None, got str"),
        (lambda: sync(classifier, None), "server: expected TritonServer, got None"),
        (lambda: evaluate(classifier, held, server), "version: expected int or None, got TritonServer"),
        (lambda: evaluate(held, classifier), "classifier: expected ModelRepository or Classifier, got Examples"),
        (lambda: evaluate(classifier, None), "examples: expected Examples or str or PathLike, got None"),
        (lambda: prune(classifier, "3"), "keep: expected int, got str"),
        (lambda: diff(classifier, "1", "2"), "a: expected int, got str"),
        (lambda: remember(classifier, held, 1), "server: expected TritonServer or None, got int"),
        (lambda: remove_label(classifier, "music", 1), "server: expected TritonServer or None, got int"),
        (lambda: rename_label(classifier, "music", "songs", 1), "server: expected TritonServer or None, got int"),
        (lambda: merge_labels(classifier, "music", "songs"), "labels: expected a list, got str"),
        (lambda: merge_labels(classifier, ["music", "alarm"], "songs", 1), "server: expected TritonServer or None"),
        (lambda: merge_labels(classifier, ["music", "alarm"], "songs", force="no"), "force: expected bool, got str"),
        (lambda: merge_labels(classifier, ["music", ["alarm"]], "songs"), r"labels\[1\]: expected str, got list"),
        (lambda: merge_labels(classifier, ["music", "alarm"], 7), "into: expected str, got int"),
        (lambda: remove_label(classifier, 0), "label: expected str, got int"),
        (lambda: rename_label(classifier, "music", 7), "new: expected str, got int"),
        (lambda: rename_label(classifier, 0, "songs"), "old: expected str, got int"),
        (lambda: add_label(classifier, 5, TEN), "label: expected str, got int"),
        (lambda: add_label(classifier, ["payday"], TEN), "label: expected str, got list"),
        (lambda: add_labels(classifier, {5: TEN}), "label: expected str, got int"),
        (lambda: add_labels(classifier, {"payday": TEN}, skip_known="no"), "skip_known: expected bool, got str"),
        (lambda: remember(classifier, held, per_label="20"), "per_label: expected int, got str"),
        (lambda: drop_classifier(classifier, "intent"), "repository: expected ModelRepository, got Classifier"),
        (lambda: drop_classifier(classifier.repository, None), "name: expected str, got None"),
        (lambda: drop_classifier(classifier.repository, "intent", 1), "server: expected TritonServer or None"),
        (lambda: new_classifier(classifier, "topics", held), "repository: expected ModelRepository, got Classifier"),
        (lambda: new_classifier(classifier.repository, 3, held), "name: expected str, got int"),
        (
            lambda: new_classifier(classifier.repository, "topics", held, settings={"dry_run": True}),
            "settings: expected FoundingSettings, got dict",
        ),
        (
            lambda: new_classifier(classifier.repository, "topics", held, server=NOBODY),
            "server: expected TritonServer or None, got str",
        ),
        (lambda: add_label(str(classifier.root), "payday", TEN), "expected ModelRepository or Classifier, got str"),
        (lambda: add_label(classifier, "payday", TEN, classifier="other"), "got the classifier intent, and the name"),
        (lambda: add_label(classifier.repository, "payday", TEN, classifier=classifier), "name: expected str or None"),
        (lambda: add_label(classifier, "payday", TEN, server=NOBODY), "server: expected TritonServer or None, got str"),
        (lambda: add_label(classifier, "payday", TEN, settings={"force": True}), "expected PatchSettings, got dict"),
        (lambda: add_label(classifier, "payday", "pay.csv"), r"examples of 'payday': .*read_examples\(PATH\) reads"),
        (lambda: add_label(classifier, "payday", [*TEN, float("nan")]), "payday, example 11: expected a text"),
        (lambda: add_label(classifier, "payday", TEN, replay=TEN), "replay: expected Examples or str or PathLike"),
        (lambda: add_label(classifier, "payday", TEN, evaluation=Examples((), ())), "examples holds no examples"),
        (lambda: add_labels(classifier, ["payday"]), "examples: expected Mapping, got list"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert tree(classifier.root) == before


def test_a_repository_of_one_stands_for_its_classifier_and_a_classifier_for_itself(classifier, files):
    repository = classifier.repository
    assert add_label(classifier, "payday", TEN, classifier="intent", settings=PatchSettings(force=True)).version == 2
    assert [entry.lineage.version for entry in history(repository)] == [1, 2]
    assert rename_label(repository, "music", "songs").version == 3
    assert rollback(repository).version == 2
    assert evaluate(repository, files[1]).version == 2
    assert diff(repository, 1, 2).added == ("payday",)
    assert remember(repository, files[0]).version == 4
    assert merge_labels(repository, ["alarm", "travel"], "planning", force=True).version == 5
    assert remove_label(repository, "planning").version == 6
    assert prune(repository, 1)


def test_a_change_of_labels_says_what_was_changed(classifier):
    renamed = rename_label(classifier, "music", "songs").to_json()
    assert (renamed["renamed"], renamed["labels_added"], renamed["labels_removed"]) == ((("music", "songs"),), (), ())
    removed = remove_label(classifier, "songs").to_json()
    assert (removed["renamed"], removed["labels_removed"]) == ((), ("songs",))
    merged = merge_labels(classifier, ["alarm", "travel"], "planning", force=True).to_json()
    assert merged["merged"] == (("alarm", "planning"), ("travel", "planning"))
    assert (merged["labels_added"], merged["labels_removed"]) == (("planning",), ("alarm", "travel"))


def test_messages_name_the_keywords_too(classifier):
    strict = {"max_flips": 0.0, "min_recall": 1.0}
    with pytest.raises(GateRefused, match=r"(?s)limit: 100 %, --min-recall or min_recall\).*`--force` \(force=True\)"):
        add_label(classifier, "payday", [*TEN[:3], tiny.sentences("music", 1)[0]], settings=PatchSettings(**strict))
    with pytest.raises(InputError, match=r"`--replay FILE` \(replay=...\)"):
        add_label(classifier, "payday", TEN, settings=PatchSettings(method="anchored"))
    with pytest.raises(ServerUnreachable, match=r"TRITON_URL \(TritonServer\(url\)\).*--no-load \(server=None\)"):
        add_label(classifier, "payday", TEN, server=TritonServer(NOBODY))


def test_a_path_is_taken_wherever_labelled_texts_are(classifier, files):
    train, held = files
    assert evaluate(classifier, held).accuracy == evaluate(classifier, read_examples(held)).accuracy
    assert diff(classifier, 1, 1, str(held)).examples == 30
    report = add_label(classifier, "payday", TEN, replay=str(train), evaluation=held, settings=DRY)
    assert report.verdict.calibration_size == 30
    made = new_classifier(classifier.repository, "topics", train, settings=FoundingSettings(dry_run=True, force=True))
    assert made.examples == 30
    with pytest.raises(ExamplesError, match=r"cannot read none\.csv"):
        evaluate(classifier, "none.csv")


def test_examples_of_a_new_label_come_in_anything_that_can_be_listed(classifier, tmp_path):
    path = tiny.write_csv(tmp_path / "new.csv", {"payday": TEN, "music": tiny.sentences("music", 3)})
    given = [np.array(TEN), tuple(TEN), iter(TEN), Examples(tuple(TEN), None), read_examples(path)]
    reports = [add_label(classifier, "payday", texts, settings=DRY) for texts in (TEN, *given)]
    assert {report.examples for report in reports} == {10}
    assert len({report.estimated_recall for report in reports}) == 1


def test_examples_made_by_hand_are_looked_at():
    made = Examples(["play a song", "wake me"], np.array(["music", "alarm"]))
    assert (made.texts, made.labels, made.source) == (("play a song", "wake me"), ("music", "alarm"), "examples")
    for arguments, message in (
        ((("a", "b"), ("music",)), "examples: 2 texts, but 1 labels"),
        ((("a",), None, "file.csv", (1, 2)), r"file\.csv: 1 texts, but 2 lines"),
        (((1, 2), None), "examples, text 1: expected a text, got int"),
        ((("a", " "), ("music", "music"), "file.csv", (2, 5)), r"file\.csv, line 5: the text is empty"),
        ((("a", "b"), ("music", 1.5)), "examples, text 2: expected a label, got float"),
        ((("a",), (" music",)), "examples, text 1: the label ' music' has spaces"),
    ):
        with pytest.raises(ExamplesError, match=message):
            Examples(*arguments)
    with pytest.raises(InputError, match="texts: expected a list, got str"):
        Examples("play a song", ("music",))
    with pytest.raises(ExamplesError, match="text 1: the text is empty"):
        dataclasses.replace(made, texts=("", "b"))


def test_what_holds_arrays_is_equal_to_itself_alone(classifier):
    answers = connected().classify("intent", ["a", "a"])
    report = add_label(classifier, "payday", TEN, settings=DRY)
    again = add_label(classifier, "payday", TEN, settings=DRY)
    head, memory = classifier.head(), classifier.memory()
    pairs = [answers, (report, again), (report.fit, again.fit), (head, classifier.head())]
    pairs += [(memory, classifier.memory()), (memory.clusters, classifier.memory().clusters)]
    for one, other in pairs:
        assert one == one and one != other  # noqa: PLR0124  identity is what is tested
        assert len({one, other, one}) == 2


def test_everything_says_in_a_line_what_it_is(classifier):
    root = classifier.root
    report = add_label(classifier, "payday", TEN, settings=DRY)
    assert repr(classifier) == f"<Classifier intent at {root}>"
    assert repr(classifier.repository) == f"<ModelRepository at {root}>"
    assert repr(classifier.head()) == f"<Head version 1: 6 labels on {tiny.WIDTH} features>"
    assert repr(classifier.memory()) == f"<Memory of 240 texts of 6 labels, with 120 of them as {tiny.WIDTH} features>"
    assert repr(TritonServer(NOBODY, admin_key="secret")) == f"<TritonServer at {NOBODY}>"
    assert repr(report) == f"<PatchReport of intent: version 2, +payday, gate {report.gate}, not published>"
