"""Trials: a version serves a share of the requests, on a real tritonserver."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny

from patcher import (
    Fleet,
    ModelRepository,
    PatchSettings,
    SplitClient,
    TritonServer,
    add_label,
    canary,
    doctor,
    merge_labels,
    prune,
    remove_label,
    rename_label,
    rollback,
    sync,
)
from patcher.canary import takes
from patcher.cli import main
from patcher.errors import InputError, NotServed, ServerError, ServerRefused, ServerUnreachable, VersionError
from patcher.recovery import recover
from patcher.triton.server import EmbeddedTriton

KEYS = [f"user-{i}" for i in range(400)]


def test_a_key_stays_where_it_is_and_a_larger_share_keeps_the_keys_of_a_smaller_one():
    ten, forty = ({key for key in KEYS if takes("intent", key, share)} for share in (10, 40))
    assert ten < forty
    assert 20 < len(ten) < 60
    assert 130 < len(forty) < 190
    assert ten != {key for key in KEYS if takes("other", key, 10)}
    assert not any(takes("intent", key, 0) for key in KEYS)


@pytest.fixture(scope="module")
def triton(tiny_original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("canary")
    shutil.copytree(tiny_original, folder / "model_repository")
    with EmbeddedTriton(folder / "model_repository", ["intent", "intent_features"]) as server:
        yield server


@pytest.fixture
def live(triton):
    """Classifier and client, on version 1 without a canary."""
    classifier = ModelRepository(triton.repository).classifier()
    with TritonServer(triton.url) as server:
        yield classifier, server
        if canary.status(classifier):
            canary.discard(classifier, server)
        if classifier.serving() != 1:
            rollback(classifier, 1, server)


def on_trial(live, label="payday", percent=30.0):
    """Publish a version with one more label as a trial."""
    classifier, server = live
    settings = PatchSettings(canary=percent)
    return add_label(classifier.repository, label, tiny.sentences(label, 10), server=server, settings=settings)


@pytest.mark.server
def test_a_share_of_the_keys_gets_the_new_version_and_all_others_the_old_one(live, tree):
    classifier, server = live
    serving = classifier.serving()
    report = on_trial(live)
    assert (report.published, report.served, report.canary) == (True, True, 30.0)
    assert classifier.serving() == serving
    client = SplitClient(server, "intent", refresh_seconds=0.0)
    texts = [tiny.sentences("payday", 30, seed=7)[-1]] * len(KEYS)
    answers = client.classify(texts, KEYS)
    for key, answer in zip(KEYS, answers, strict=True):
        tried = takes("intent", key, 30)
        assert answer.head_version == (report.version if tried else serving)
        assert (answer.labels[0] == "payday") == tried
    assert [each.head_version for each in server.classify("intent", texts[:3])] == [serving] * 3
    old, new = canary.status(classifier, server).arms
    assert (old.version, new.version, new.failures) == (serving, report.version, 0)
    assert new.requests > 0
    assert new.mean_ms > 0
    # The share can grow; keys that were in it stay.
    canary.begin(classifier, report.version, 60.0, server)
    assert client.percent == 60.0
    more = client.classify(texts, KEYS)
    assert all(
        b.head_version == report.version for a, b in zip(answers, more, strict=True) if a.head_version != serving
    )


@pytest.mark.server
def test_promote_makes_it_serve_all_and_discard_leaves_things_as_they_were(live):
    classifier, server = live
    report = on_trial(live)
    switch = canary.promote(classifier, server)
    assert (switch.version, switch.served) == (report.version, True)
    assert server.classify("intent", ["hello"])[0].head_version == report.version
    assert canary.status(classifier) is None
    assert not server.is_ready("intent_canary")
    assert SplitClient(server, "intent").classify(["hello"], ["me"])[0].head_version == report.version
    rollback(classifier, 1, server)
    canary.begin(classifier, report.version, 50, server)
    assert canary.discard(classifier, server) == report.version
    assert server.classify("intent", ["hello"])[0].head_version == 1
    assert report.version in classifier.versions()
    assert classifier.repository.classifiers() == ("intent",)


@pytest.mark.server
@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_promotion_that_is_stopped_after_the_switch(live, monkeypatch, end):
    """A signal now comes too late to undo it. After kill -9, running the same verb again finishes it."""
    classifier, server = live
    report = on_trial(live)
    remove = canary._remove

    def stopped(*arguments):
        monkeypatch.setattr(canary, "_remove", remove)
        raise end

    monkeypatch.setattr(canary, "_remove", stopped)
    killed = end is SystemExit
    if killed:
        with pytest.raises(SystemExit):
            canary.promote(classifier, server)
        assert canary.status(classifier).version == classifier.serving() == report.version
    switch = canary.promote(classifier, server)
    assert (switch.version, switch.previous, switch.served) == (report.version, report.version if killed else 1, True)
    assert canary.status(classifier) is None
    assert not server.is_ready("intent_canary")
    assert server.classify("intent", ["hello"])[0].head_version == classifier.serving() == report.version


@pytest.mark.server
def test_a_client_that_does_not_know_yet_that_the_trial_is_over_asks_the_serving_version(live):
    classifier, server = live
    on_trial(live, percent=99.0)
    client = SplitClient(server, "intent", refresh_seconds=3600.0)
    assert client.percent == 99.0
    canary.discard(classifier, server)
    assert {answer.head_version for answer in client.classify(["hello"] * 20, KEYS[:20])} == {1}
    assert client.percent == 0.0


@pytest.mark.server
def test_a_restarted_server_serves_both(live, tmp_path):
    classifier, _ = live
    report = on_trial(live)
    shutil.copytree(classifier.root, tmp_path / "model_repository")
    repository = ModelRepository(tmp_path / "model_repository")
    with (
        EmbeddedTriton(repository.root, ["intent", "intent_features", "intent_canary"]) as other,
        TritonServer(other.url) as server,
    ):
        assert server.classify("intent", ["hello"])[0].head_version == 1
        assert server.classify("intent_canary", ["hello"])[0].head_version == report.version


@pytest.mark.server
def test_a_trial_on_several_servers_is_counted_on_all_that_are_there(live, tmp_path):
    classifier, server = live
    report = on_trial(live)
    with pytest.raises(ServerUnreachable), Fleet(["127.0.0.1:1", "127.0.0.1:2"]) as nobody:
        canary.status(classifier, nobody)
    with Fleet([server.url, "127.0.0.1:1"]) as one:
        assert canary.status(classifier, one).version == report.version
    # The other server has loaded the classifier, but not the trial.
    with EmbeddedTriton(classifier.root, ["intent"], log_file=tmp_path / "triton.log") as second:
        with Fleet([server.url, second.url]) as both:
            with pytest.raises(ServerRefused, match=rf"{second.url} has not loaded .* `patcher sync` loads it"):
                canary.status(classifier, both)
            said = [check.finding for check in doctor.diagnose(classifier.root, both, "url") if check.state == "fault"]
            assert len(said) == 1
            assert said[0].startswith(f"{second.url}: ")
            assert sync(classifier, both) == {server.url: "agreed", second.url: "caught up"}
            assert canary.status(classifier, both).version == report.version


@pytest.mark.server
def test_a_version_that_the_server_will_not_serve_is_not_on_trial(live, monkeypatch):
    classifier, server = live
    report = on_trial(live)
    canary.discard(classifier, server)

    def refuse(_model):
        raise ServerError("no")

    monkeypatch.setattr(server, "load", refuse)
    with pytest.raises(NotServed, match="could not be tried"):
        canary.begin(classifier, report.version, 10, server)
    assert canary.status(classifier) is None
    assert classifier.serving() == 1


@pytest.mark.server
def test_sync_of_all_classifiers_goes_on_beside_a_trial(live, command):
    classifier, server = live
    on_trial(live)
    code, out, _ = command("sync", "--json", "--repo", classifier.root, "--url", server.url)
    assert code == 0
    found = json.loads(out)
    assert [(each["classifier"], each["state"]) for each in found] == [("intent", "agreed")]


@pytest.mark.server
def test_a_trial_that_a_server_did_not_let_go_of_is_said_and_ended_by_sync(live, monkeypatch):
    classifier, server = live

    def faults():
        return [check.what for check in doctor.diagnose(classifier.root, server, "url") if check.state == "fault"]

    def hang(_model):
        raise ServerUnreachable("hangs")

    report = on_trial(live)
    monkeypatch.setattr(server, "check_control", lambda: hang(""))
    with pytest.raises(ServerUnreachable, match="hangs"):
        canary.discard(classifier, server)
    assert canary.status(classifier).version == report.version
    monkeypatch.undo()
    monkeypatch.setattr(server, "unload", hang)
    for _ in range(2):  # the second time, the files are already gone
        with pytest.raises(ServerError, match=r"^the trial has ended .* `patcher sync` ends it there too"):
            canary.discard(classifier, server)
    monkeypatch.undo()
    assert canary.discard(classifier, server) == report.version
    assert not server.is_ready("intent_canary")
    with pytest.raises(InputError, match="no version of intent is on trial"):
        canary.discard(classifier, server)
    canary.begin(classifier, report.version, 10, server)
    monkeypatch.setattr(server, "unload", hang)
    (warning,) = canary.promote(classifier, server).warnings
    assert warning.startswith(f"version {report.version} serves, and the trial has ended in the repository")
    monkeypatch.undo()
    rollback(classifier, 1, server)
    assert faults() == ["intent_canary, served"]
    assert sync(classifier, server) == {server.url: "caught up"}
    assert not server.is_ready("intent_canary")
    assert faults() == []
    # A server has lost the models of the trial.
    canary.begin(classifier, report.version, 10, server)
    server.unload("intent_canary")
    server.unload("intent_canary_head")
    assert faults() == ["intent_canary, served"]
    assert sync(classifier, server) == {server.url: "caught up"}
    assert faults() == []


@pytest.mark.server
@pytest.mark.parametrize("error", [ServerUnreachable("hiccup"), KeyboardInterrupt()])
def test_a_share_that_cannot_be_changed_is_as_it_was(live, monkeypatch, error):
    classifier, server = live
    report = on_trial(live, percent=10.0)
    load, errors = server.load, [error]

    def once(model):
        if errors:
            raise errors.pop()
        load(model)

    monkeypatch.setattr(server, "load", once)
    with pytest.raises((NotServed, KeyboardInterrupt)):
        canary.begin(classifier, report.version, 20, server)
    assert (canary.status(classifier).version, canary.status(classifier).percent) == (report.version, 10.0)
    assert SplitClient(server, "intent").percent == 10.0


@pytest.mark.server
def test_a_trial_that_ends_while_a_client_asks_for_its_share(live, monkeypatch):
    _, server = live
    on_trial(live)
    client = SplitClient(server, "intent")

    def gone(_model):
        raise ServerRefused("unknown model")

    monkeypatch.setattr(server, "model_config", gone)
    assert client.percent == 0.0


@pytest.mark.server
def test_promote_loses_nothing_that_was_changed_meanwhile(live):
    classifier, server = live
    on_trial(live)
    remove_label(classifier, "travel", server)
    with pytest.raises(InputError, match="was made without what was changed in version"):
        canary.promote(classifier, server)
    assert "travel" not in classifier.head().labels


OTHER = ("add-label", "mail", *(part for text in tiny.sentences("mail", 10) for part in ("--text", text)))


@pytest.mark.parametrize(
    "verb",
    [
        (*OTHER, "--force"),
        ("remove-label", "music"),
        ("rename-label", "music", "songs"),
        ("merge-labels", "balance", "transfer", "--into", "money", "--force"),
        ("remember", "--data", "train.csv"),
        ("rollback", "--to", "2"),
    ],
    ids=lambda verb: verb[0],
)
def test_a_change_that_a_version_on_trial_lacks_is_told_when_it_is_made(
    classifier, capsys, tmp_path, monkeypatch, verb
):
    monkeypatch.chdir(tmp_path)
    tiny.write_csv(tmp_path / "train.csv", tiny.train_set(10))
    rename_label(classifier, "alarm", "alarms")
    rollback(classifier, 1)
    add_label(
        classifier.repository, "payday", tiny.sentences("payday", 10), settings=PatchSettings(canary=30.0, force=True)
    )
    assert main([*verb, "--no-load", "--repo", str(classifier.root), "--json"]) == 0
    out, err = capsys.readouterr()
    (warning,) = json.loads(out)["warnings"]
    assert f"warning: {warning}\n" in err
    told = f"version 3 of intent is on trial and was made without what was changed in version {classifier.serving()}"
    assert warning.startswith(told)
    assert main(["canary", "--no-load", "--repo", str(classifier.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == [warning]
    with pytest.raises(InputError, match="version 3 of intent was made without what was changed in version"):
        canary.promote(classifier)
    rollback(classifier, 1)
    assert canary.promote(classifier).warnings == ()


@pytest.mark.server
def test_promote_needs_no_version_but_two(live):
    classifier, server = live
    first = classifier.root / "intent_head" / "1" / "model.onnx"
    data = first.read_bytes()
    rename_label(classifier, "music", "songs", server)
    report = on_trial(live)
    first.write_bytes(b"damaged")
    assert canary.promote(classifier, server).version == report.version
    first.write_bytes(data)


@pytest.mark.server
def test_a_recovery_spares_the_version_on_trial(live):
    classifier, server = live
    report = on_trial(live)
    entry = next(each for each in classifier.journal.entries() if each.get("version") == report.version)
    classifier.journal.append("publish", version=report.version, parent=1, files=entry["files"])
    with classifier.repository.lock():
        assert "is on trial" in recover(classifier, server)
    assert canary.promote(classifier, server).version == report.version


@pytest.mark.parametrize(
    "change",
    [
        lambda trial: prune(trial, 1, dry_run=True),
        lambda trial: merge_labels(trial, ["music", "alarm"], "sound", dry_run=True),
        lambda trial: add_label(trial, "picnic", ["a", "b"], settings=PatchSettings(dry_run=True)),
    ],
)
def test_a_dry_run_refuses_a_version_on_trial_as_the_change_does(change, classifier):
    on_trial((classifier, None))
    with pytest.raises(InputError, match="is a version of intent on trial; expected --classifier intent,"):
        change(classifier.repository.classifier("intent_canary"))


@pytest.mark.server
def test_a_version_on_trial_is_no_classifier_to_change(live):
    classifier, server = live
    on_trial(live)
    with pytest.raises(InputError, match="expected --classifier intent,"):
        remove_label(classifier.repository.classifier("intent_canary"), "payday", server)
    with pytest.raises(InputError, match=r"it holds intent$"):
        classifier.repository.classifier("nobody")


@pytest.mark.server
def test_what_makes_no_sense_is_refused(live):
    classifier, server = live
    with pytest.raises(InputError, match="--version N --percent 10"):
        canary.promote(classifier, server)
    with pytest.raises(VersionError, match="already serves"):
        canary.begin(classifier, 1, 10, server)
    with pytest.raises(VersionError, match="no version 99"):
        canary.begin(classifier, 99, 10, server)
    report = on_trial(live)
    with pytest.raises(InputError, match="between 0 and 100"):
        canary.begin(classifier, report.version, 100, server)
    with pytest.raises(InputError, match="is on trial"):
        on_trial(live, tiny.NEW[1])
    assert max(classifier.versions()) == report.version
    with pytest.raises(InputError, match="one key for each text"):
        SplitClient(server, "intent").classify(["a", "b"], ["one"])


@pytest.mark.server
def test_the_verb(live, monkeypatch, command, tmp_path):
    classifier, server = live
    monkeypatch.setenv("TRITON_MODEL_REPO", str(classifier.root))
    monkeypatch.setenv("TRITON_URL", server.url)

    file = tiny.write_csv(tmp_path / "a.csv", {"payday": tiny.sentences("payday", 10)})
    code, out, err = command("add-label", "--examples", file, "--canary", "25")
    assert code == 0, err
    assert "is on trial with 25 % of the requests" in out
    held_out = tiny.write_csv(tmp_path / "e.csv", {"payday": tiny.sentences("payday", 20, seed=9)})
    code, out, err = command("canary", "--eval", held_out)
    assert code == 0, err
    assert "intent_canary" in out
    assert "wrong before and right in the trial" in out
    code, out, _ = command("canary", "--json")
    version = json.loads(out)["version"]
    assert json.loads(out)["percent"] == 25
    assert command("canary", "--promote", "--discard")[0] == 2
    assert command("canary", "--version", "3")[0] == 2
    assert command("canary", "--discard")[0] == 0
    assert "no version of intent is on trial" in command("canary")[1]
    file = tiny.write_csv(tmp_path / "b.csv", {"pizza": tiny.sentences("pizza", 10)})
    assert command("add-label", "--examples", file, "--canary", "25", "--no-load")[0] == 0
    code, _, err = command("canary")
    assert (code, "`patcher sync` loads it" in err) == (1, True)
    assert "has not loaded intent_canary, version" in err
    assert command("canary", "--eval", tmp_path / "nothing.csv")[0] == 2
    assert command("sync")[0] == 0
    assert "is on trial with 25 %" in command("canary")[1]
    assert command("canary", "--discard")[0] == 0
    useless = tiny.write_csv(tmp_path / "useless.csv", {"unknown": ["no label of any version"]})
    assert command("canary", "--version", version, "--percent", "5", "--eval", useless)[0] == 2
    assert canary.status(classifier) is None
    code, out, _ = command("canary", "--version", version, "--percent", "5", "--json")
    assert (code, json.loads(out)["percent"]) == (0, 5)
    code, out, _ = command("canary", "--percent", "7", "--json")
    assert (code, json.loads(out)["percent"], json.loads(out)["version"]) == (0, 7, version)
    code, out, _ = command("canary", "--promote", "--json")
    assert json.loads(out) == {
        "classifier": "intent", "version": version, "previous": 1, "served": True, "warnings": []
    }  # fmt: skip
