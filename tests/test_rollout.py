"""What a failing server, a full disk or Ctrl-C leaves behind, with a stand-in that fails as no real server would.

Tests with a real server are in ``test_road.py``.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

from patcher import NotServed, PatchSettings, add_label, prune, rollback
from patcher.classifier import Classifier
from patcher.errors import RepositoryError, ServerError, ServerUnreachable, StorageError
from patcher.head_file import write_head
from patcher.journal import Journal
from patcher.lineage import next_lineage
from patcher.recovery import changing
from patcher.rollout import probe, roll_back, roll_out, set_aside, validate
from patcher.runtime import Encoder
from patcher.signals import interruptible as signals_interrupt
from patcher.storage import disk
from patcher.triton.tensors import Answer


class Server:
    """Answers from the files, like a server that loads the pinned version; ``faults`` make its next calls fail."""

    url = "stand-in:1"

    def __init__(self, classifier, **faults):
        self.classifier, self.faults, self.serving = classifier, faults, classifier.serving()
        self.encoder = Encoder(classifier.backbone_path, classifier.tokenizer_path, threads=1)

    def check_control(self):
        pass

    def _maybe_fail(self, call):
        fault = self.faults.get(call)
        if fault:
            error = fault.pop(0)
            if error is not None:
                raise error

    def is_live(self):
        return "dead" not in self.faults

    def is_ready(self, _):
        return True

    def model_config(self, model):
        return self.classifier.repository.config(model)

    def instances(self, _):
        return 1

    def load(self, _):
        self._maybe_fail("load")
        self.serving = self.classifier.serving()

    def _features(self, texts):
        return self.encoder.encode(texts)

    def features(self, _, texts):
        self._maybe_fail("features")
        return self._features(texts)

    def head_logits(self, _, features):
        return self.classifier.head(self.serving).logits(features), self.serving

    def classify(self, _, texts):
        self._maybe_fail("classify")
        head = self.classifier.head(self.serving)
        logits = head.logits(self._features(texts))
        best = [head.labels[row.argmax()] for row in logits]
        return [
            Answer(text, (label,), (1.0,), row, head.lineage.version, None)
            for text, label, row in zip(texts, best, logits, strict=True)
        ]


def next_head(classifier):
    head = classifier.head()
    rows = np.ones((1, head.width), np.float32)
    return dataclasses.replace(
        head.with_rows(["new"], rows, np.zeros(1, np.float32)), lineage=next_lineage(classifier, head)
    )


def test_a_good_rollout(classifier):
    server = Server(classifier)
    with classifier.repository.lock():
        switch = roll_out(classifier, next_head(classifier), classifier.memory(), server)
    assert (switch.version, switch.previous, switch.served) == (2, 1, True)
    assert (classifier.serving(), server.serving) == (2, 2)


def test_a_probe_loads_nothing(classifier, monkeypatch):
    server = Server(classifier, load=[AssertionError("a probe asks")])
    monkeypatch.setattr(server, "is_ready", lambda _: False)
    with pytest.raises(ServerError, match="intent is not ready; is --repo the repository that this server serves"):
        probe(classifier, classifier.head(), server)


FAULTS = {
    "the load is refused": ({"load": [ServerError("no")]}, NotServed),
    "the probe fails": ({"classify": [ServerError("gone")]}, NotServed),
    "the features do not fit": ({"features": [ValueError("shapes (1,7) and (48,) not aligned")]}, NotServed),
    "Ctrl-C during the load": ({"load": [KeyboardInterrupt()]}, KeyboardInterrupt),
    "Ctrl-C during the probe": ({"classify": [KeyboardInterrupt()]}, KeyboardInterrupt),
}


@pytest.mark.parametrize("case", FAULTS)
def test_whatever_fails_the_previous_version_is_back(classifier, case):
    faults, expected = FAULTS[case]
    server = Server(classifier, **{call: list(errors) for call, errors in faults.items()})
    config = (classifier.root / "intent_head" / "config.pbtxt").read_bytes()
    with classifier.repository.lock(), pytest.raises(expected):
        roll_out(classifier, next_head(classifier), None, server)
    assert (classifier.serving(), server.serving) == (1, 1)
    assert (classifier.root / "intent_head" / "config.pbtxt").read_bytes() == config
    assert not list(classifier.root.rglob(".patcher-staging-*"))


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_stop_the_way_back(classifier, second, interruptible):
    signals = [signal.SIGINT, second]

    class Signalled(Server):
        def load(self, model):
            if signals:
                os.kill(os.getpid(), signals.pop(0))
            super().load(model)

    server = Signalled(classifier)
    with signals_interrupt(), classifier.repository.lock(), pytest.raises(KeyboardInterrupt):
        roll_out(classifier, next_head(classifier), None, server)
    assert (classifier.serving(), server.serving, classifier.journal.pending()) == (1, 1, None)
    assert not signals
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_after_success_changes_nothing(classifier, monkeypatch, interruptible):
    append = Journal.append

    def signalled(self, event, **values):
        if event == "done":
            os.kill(os.getpid(), signal.SIGINT)
        append(self, event, **values)

    monkeypatch.setattr(Journal, "append", signalled)
    server = Server(classifier)
    with classifier.repository.lock():
        assert roll_out(classifier, next_head(classifier), None, server).version == 2
    assert (classifier.serving(), server.serving, classifier.journal.pending()) == (2, 2, None)


def test_a_handler_that_raises_gets_its_signal_when_the_change_is_done(classifier, monkeypatch):
    append = Journal.append

    def signalled(self, event, **values):
        if event == "done":
            os.kill(os.getpid(), signal.SIGTERM)
        append(self, event, **values)

    def handler(*_):
        found.append((classifier.serving(), server.serving, classifier.journal.pending()))
        raise SystemExit

    monkeypatch.setattr(Journal, "append", signalled)
    server, found = Server(classifier), []
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit), classifier.repository.lock():
            roll_out(classifier, next_head(classifier), None, server)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == [(2, 2, None)]
    with classifier.repository.lock():
        assert classifier.serving() == 2


def test_an_interruption_that_leaves_something_says_so(classifier):
    def interrupted():
        with changing(classifier):
            classifier.journal.append("switch", **{"from": 2, "to": 1})
            raise KeyboardInterrupt

    with pytest.raises(NotServed, match="interrupted, and not undone: version 1 was about to serve"):
        interrupted()
    with pytest.raises(KeyboardInterrupt), changing(classifier):
        raise KeyboardInterrupt


@pytest.mark.parametrize("publish", [roll_out, set_aside])
def test_a_folder_that_cannot_be_flushed_is_not_published(classifier, tree, monkeypatch, publish):
    before = tree(classifier.root)
    flush, failures = disk.flush_folder, [OSError(28, "No space left on device")]

    def once(folder, **options):
        if folder == classifier.root / "intent_head" and failures and (folder / "2").is_dir():
            raise failures.pop()
        flush(folder, **options)

    monkeypatch.setattr(disk, "flush_folder", once)
    with classifier.repository.lock(), pytest.raises(StorageError, match="nothing was changed"):
        publish(classifier, next_head(classifier), None, *([None] if publish is roll_out else []))
    assert tree(classifier.root) == before
    assert classifier.journal.pending() is None


def test_a_version_set_aside_whose_entry_is_lost_is_withdrawn(classifier, tree, monkeypatch):
    before = tree(classifier.root)
    append, errors = Journal.append, [StorageError("full")]

    def lost(self, event, **values):
        if event == "done" and errors:
            raise errors.pop()
        append(self, event, **values)

    monkeypatch.setattr(Journal, "append", lost)
    with classifier.repository.lock(), pytest.raises(StorageError, match="full"):
        set_aside(classifier, next_head(classifier), None)
    assert tree(classifier.root) == before
    assert classifier.journal.pending() is None


def test_a_trial_that_cannot_be_noted_leaves_nothing(classifier, tree, monkeypatch):
    before = tree(classifier.root)

    def full(*_):
        raise StorageError("full")

    monkeypatch.setattr(Classifier, "adopt", lambda self: full() if self.name.endswith("_canary") else ())
    with pytest.raises(StorageError, match="full"):
        add_label(classifier.repository, "payday", tiny.sentences("payday", 10), settings=PatchSettings(canary=10.0))
    assert tree(classifier.root) == before


def test_when_the_way_back_fails_too_the_message_says_so(classifier):
    server = Server(classifier, load=[ServerError("no"), ServerUnreachable("dead now")])
    with classifier.repository.lock(), pytest.raises(NotServed, match="could not be brought back to it") as caught:
        roll_out(classifier, next_head(classifier), None, server)
    assert caught.value.report == {"version": 2, "parent_version": 1, "published": True, "served": False}
    assert str(caught.value).count("to retry: ") == 1
    assert "`patcher doctor` calls the change interrupted until `patcher sync`" in str(caught.value)
    assert classifier.journal.pending()
    assert classifier.serving() == 1
    server = Server(classifier, load=[KeyboardInterrupt(), ServerUnreachable("dead now")])
    with classifier.repository.lock(), pytest.raises(NotServed, match="KeyboardInterrupt"):
        roll_out(classifier, next_head(classifier), None, server)


def test_a_server_that_hangs_is_not_asked_again_on_the_way_back(classifier):
    class Hanging(Server):
        def load(self, model):
            self.faults["dead"] = []
            super().load(model)

    server = Hanging(classifier, load=[ServerUnreachable("within 60 s"), AssertionError("waited for again")])
    with classifier.repository.lock(), pytest.raises(NotServed, match=r"does not answer; run `patcher sync` again"):
        roll_out(classifier, next_head(classifier), None, server)
    assert classifier.serving() == 1


def test_a_dead_server_costs_nothing(classifier, tree):
    before = tree(classifier.root)
    with classifier.repository.lock(), pytest.raises(ServerUnreachable, match="nothing was changed"):
        roll_out(classifier, next_head(classifier), None, Server(classifier, dead=[]))
    assert tree(classifier.root) == before


def test_a_disk_that_fills_up_between_publishing_and_pinning(classifier, tree, monkeypatch):
    before = tree(classifier.root)
    publish = Classifier.publish

    def then_full(self, head, *rest):
        publish(self, head, *rest)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)

    monkeypatch.setattr(Classifier, "publish", then_full)
    with classifier.repository.lock(), pytest.raises(StorageError, match="nothing was changed"):
        roll_out(classifier, next_head(classifier), None, None)
    monkeypatch.undo()
    assert tree(classifier.root) == before


def test_a_full_disk_does_not_stop_the_way_back(classifier, monkeypatch):
    class Filling(Server):
        def load(self, model):
            def full(*_):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr("os.fsync", full)
            super().load(model)

    server = Filling(classifier, load=[ServerError("no")])
    with classifier.repository.lock(), pytest.raises(NotServed, match="Version 1 serves again"):
        roll_out(classifier, next_head(classifier), None, server)
    assert classifier.serving() == 1


def test_going_back_to_a_damaged_file_is_refused(classifier, tree):
    import onnx

    with classifier.repository.lock():
        roll_out(classifier, next_head(classifier), None, None)
    path = classifier.root / "intent_head" / "1" / "model.onnx"
    model = onnx.load(path)
    model.graph.node[0].input[0] = "nothing"  # the weights are unchanged, but the graph does not run
    path.write_bytes(model.SerializeToString())
    before = tree(classifier.root)
    with classifier.repository.lock(), pytest.raises(RepositoryError, match="was changed after it was published"):
        roll_back(classifier, 1)
    classifier.journal.path.unlink()  # as if from a patcher that wrote none
    with classifier.repository.lock(), pytest.raises(RepositoryError, match="ONNX Runtime cannot load"):
        roll_back(classifier, 1)
    assert tree(classifier.root) == before


def test_a_damaged_head_in_the_middle_of_a_change_can_be_left(classifier):
    with classifier.repository.lock():
        roll_out(classifier, next_head(classifier), None, None)
    classifier.journal.append("switch", **{"from": 2, "to": 1})
    classifier.journal.append("back", to=2)  # killed during the undo
    (classifier.version_path(2) / "model.onnx").write_bytes(b"damaged")
    for change in (lambda: rollback(classifier), lambda: prune(classifier, 1)):
        with pytest.raises(RepositoryError, match="`patcher rollback --to N` needs none but version N"):
            change()
    assert rollback(classifier, 1).version == 1
    assert classifier.journal.pending() is None
    classifier.journal.path.write_text("nonsense\n")
    with pytest.raises(RepositoryError, match="line 1, is not an entry"):
        rollback(classifier, 1)


def test_a_head_that_is_not_what_it_says_is_not_published(classifier):
    head = next_head(classifier)
    other = dataclasses.replace(head, base_bias=head.base_bias + 1)
    with pytest.raises(RepositoryError, match="logits differ"):
        validate(write_head(other), head)


@pytest.mark.slow
def test_kill_9_at_random_moments(classifier, tmp_path):
    """Afterwards the repository can be opened, and serves the version before the change or the one after it."""
    file = tiny.write_csv(tmp_path / "a.csv", {"payday": tiny.sentences("payday", 10)})
    command = [sys.executable, "-m", "patcher", "add-label", "--no-load", "--repo", str(classifier.root)]
    start = time.perf_counter()
    subprocess.run([*command, "--examples", str(file)], check=True, capture_output=True)
    whole = time.perf_counter() - start
    with classifier.repository.lock():
        roll_back(classifier, 1)
    rng = np.random.default_rng(0)
    outcomes = set()
    for share in rng.uniform(0.2, 1.05, 12):
        expected, start = classifier.next_version(), time.perf_counter()
        process = subprocess.Popen([*command, "--examples", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            process.wait(share * whole)
            whole = min(whole, time.perf_counter() - start)  # the first may have been slow by chance
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        serving = classifier.serving()
        assert serving in (1, expected)
        assert len(classifier.head().labels) == len(tiny.OLD) + (serving != 1)
        outcomes.add(serving == 1)
        with classifier.repository.lock():
            assert not list(classifier.root.rglob(".patcher-staging-*"))
            if serving != 1:
                roll_back(classifier, 1)
    assert True in outcomes
