"""Repositories written by earlier versions of this project, which are kept unchanged in ``data``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import tiny

from patcher import add_label, checks, doctor, history, model_config, rollback, serving
from patcher.configs import with_program
from patcher.errors import RepositoryError, ServerRefused, StorageError
from patcher.storage.disk import Disk
from patcher.triton.server import EmbeddedTriton
from patcher.upgrade import upgrade

EARLIER = (Path(__file__).parent / "data" / "repository-0.1.0" / "intent_tokenizer" / "1" / "model.py").read_bytes()
"""The program of a model, as an earlier version wrote it."""


def test_it_opens_as_it_was(older, tree):
    before = tree(older.root)
    assert (older.versions(), older.serving(), older.next_version()) == ((1, 2, 3), 2, 4)
    assert [entry.what() for entry in history(older)] == ["exported", "+payday", "music -> songs"]
    assert older.head().labels == (*tiny.OLD, "payday")
    assert older.memory() is not None
    found = list(doctor.diagnose(older.root, None, "nobody"))
    assert [check.finding for check in found if check.state == "fault"] == []
    assert tree(older.root) == before


@pytest.mark.server
def test_it_is_served_patched_and_rolled_back(older, tmp_path):
    log = tmp_path / "log"
    with EmbeddedTriton(older.root, ["intent", "intent_features"], log_file=log) as triton, triton.client() as server:
        text = tiny.sentences("pizza", 1, seed=7)
        assert server.classify("intent", text)[0].head_version == 2
        assert add_label(older.repository, "pizza", tiny.sentences("pizza", 10), server=server).version == 4
        assert server.classify("intent", text)[0].labels[0] == "pizza"
        rollback(older, 1, server)
        assert server.classify("intent", text)[0].head_version == 1
    assert json.loads((older.root / "patcher.json").read_text()) == {"format": 1}
    assert set(older.journal.published()) == {1, 2, 3, 4}
    assert [check for check in doctor.diagnose(older.root, None, "nobody") if check.state == "fault"] == []


@pytest.mark.server
def test_a_new_backbone_comes_beside_it(older, tmp_path):
    repository = older.repository
    files, head = tiny.backbone_files(tmp_path), older.head(1)
    with repository.lock():
        # A classifier on the old backbone uses the ensemble steps of that backbone.
        repository.add_classifier("second", head, backbone=older.backbone_name)
        repository.add_backbone("fresh", files)
        fresh = repository.add_classifier("fresh", head, backbone="fresh")
    assert json.loads((older.root / "patcher.json").read_text()) == {"format": 2}
    steps = [model_config.steps_of(repository.config(name)) for name in ("second", "fresh")]
    assert [step.model for step in steps[0]] == ["intent_tokenizer", "intent_backbone", "second_head"]
    assert [step.model for step in steps[1]] == ["fresh_encoder", "fresh_head"]
    assert (older.text_model, fresh.text_model) == ("intent_tokenizer", "fresh_encoder")
    names = ["intent", "second", "fresh"]
    with EmbeddedTriton(older.root, names, log_file=tmp_path / "log") as triton, triton.client() as server:
        answers = [server.classify(name, tiny.sentences(tiny.OLD[0], 1))[0] for name in names]
    assert [answer.labels[0] for answer in answers] == [tiny.OLD[0]] * 3


def test_what_could_not_be_added_leaves_it_to_older_patchers(older, tree, tmp_path, monkeypatch):
    repository, files = older.repository, tiny.backbone_files(tmp_path)
    before = tree(older.root)

    def full(*_):
        raise StorageError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Disk, "add", full)
        with pytest.raises(StorageError, match="no space left"):
            repository.add_backbone("fresh", files)
        assert (tree(older.root), repository.format) == (before, 1)

    def interrupted():
        with repository.added_backbone("fresh", files) as backbone:
            assert (repository.backbones(), repository.format) == (("fresh", "intent"), 2)
            assert backbone.width() == older.width()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tree(older.root), repository.format) == (before, 1)
    repository.add_backbone("fresh", files)
    assert json.loads((older.root / "patcher.json").read_text()) == {"format": 2}


def test_an_export_that_is_killed_before_the_last_folder_leaves_the_format(older, tmp_path, monkeypatch):
    add, seen = Disk.add, []

    def recorded(storage, folders):
        seen.append((json.loads(storage.read("patcher.json"))["format"], *folders))
        add(storage, folders)

    monkeypatch.setattr(Disk, "add", recorded)
    with older.repository.lock():
        older.repository.add_backbone("new", tiny.backbone_files(tmp_path))
    assert seen == [(1, "new_tokenizer", "new_backbone", "new_encoder"), (2, "new_features")]


def test_an_upgrade_that_adds_no_encoder_leaves_it_to_older_patchers(older, monkeypatch):
    def full(*_):
        raise StorageError("no space left on device")

    monkeypatch.setattr(Disk, "add", full)
    with pytest.raises(StorageError, match="no space left"):
        upgrade(older)
    assert json.loads((older.root / "patcher.json").read_text()) == {"format": 1}


@pytest.mark.server
def test_upgraded_it_has_an_encoder_and_all_else_stays(older, tree, tmp_path):
    repository = older.repository
    texts = [text for label in tiny.OLD for text in tiny.sentences(label, 2, seed=5)]
    tuned = serving.Serving(instances=2, threads=1, delay_us=300, slack=5, batch=16)
    models = (older.tokenizer_model, older.backbone_model)
    with repository.lock():
        repository.add_classifier("second", older.head(1), backbone=older.backbone_name)
        before = serving.with_serving(*map(repository.config_text, models), tuned)
        repository.write_configs(dict(zip(models, before, strict=True)))
    models = ["intent", "second", "intent_features"]
    with EmbeddedTriton(older.root, models, log_file=tmp_path / "log") as triton, triton.client() as server:
        expected = [server.classify(name, texts) for name in models[:2]]
    kept = tree(older.root)
    changed = upgrade(older)
    assert changed == (
        "intent_tokenizer", "intent_encoder", "intent_backbone", "intent", "second", "intent_features"
    )  # fmt: skip
    assert upgrade(older) == ()
    now = tree(older.root)
    new = {"intent_encoder", "intent_encoder/1", "patcher.json"}
    new |= {f"intent_encoder/{name}" for name in ("config.pbtxt", "1/model.py", "1/tokenizer.json")}
    touched = {name for name in now if now[name] != kept.get(name)} - new
    assert touched <= {"intent_tokenizer/1/model.py", *(f"{name}/config.pbtxt" for name in changed)}
    encoder, backbone = (repository.config(model) for model in (older.text_model, older.backbone_model))
    assert (encoder.name, serving.serving_of(encoder, backbone)) == ("intent_encoder", tuned)
    with EmbeddedTriton(older.root, models, log_file=tmp_path / "log") as triton, triton.client() as server:
        for name, answers in zip(models, expected, strict=False):
            for one, other in zip(server.classify(name, texts), answers, strict=True):
                assert (one.labels, one.head_version) == (other.labels, other.head_version)
        assert (
            add_label(repository, "pizza", tiny.sentences("pizza", 10), server=server, classifier="intent").version == 4
        )
    assert [check for check in doctor.diagnose(older.root, None, "nobody") if check.state == "fault"] == []


def test_programs_of_an_earlier_version_are_renewed(classifier, tree, monkeypatch):
    repository, models = classifier.repository, ("intent_encoder", "intent_backbone")
    with repository.lock():
        configs = map(repository.config_text, models)
        tuned = serving.with_serving(*configs, serving.Serving(instances=2, threads=1))
        repository.write_configs(dict(zip(models, tuned, strict=True)))
    before = tree(classifier.root)
    with repository.lock():  # 0.5 kept one encoder for any number of sessions
        repository.write_configs({"intent_encoder": tuned[0].replace("count: 2", "count: 1")})
    assert tree(classifier.root) != before
    for model in ("intent_encoder", "intent_tokenizer"):
        (classifier.root / model / "1" / "model.py").write_bytes(EARLIER)

    def cut(programs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(classifier, "renew", cut)
        with pytest.raises(KeyboardInterrupt):
            upgrade(classifier)
    assert upgrade(classifier) == ("intent_tokenizer", "intent_encoder")
    assert tree(classifier.root) == before
    assert upgrade(classifier) == ()


def test_a_program_that_may_be_a_newer_patchers_is_replaced_only_by_force(older, tree, command):
    assert upgrade(older)
    programs = [older.root / f"intent_{role}" / "1" / "model.py" for role in ("encoder", "tokenizer")]
    expected = tree(older.root)
    programs[0].write_bytes(programs[0].read_bytes() + b"# as 0.99 will have it\n")
    programs[1].write_bytes(EARLIER)
    before = tree(older.root)
    with pytest.raises(RepositoryError, match=r"intent_encoder/1/model.py: no program of this .* update this one"):
        upgrade(older)
    repository = ["--repo", older.root]
    assert command("upgrade", *repository)[0] == 2
    assert tree(older.root) == before
    (fault,) = (each for each in doctor.diagnose(older.root, None, "nobody") if each.state == "fault")
    assert fault.what == "intent_encoder, programs"
    for said in ("no program of this or an earlier patcher", "if a newer patcher wrote it, update this one; otherwise"):
        assert said in fault.finding
    assert "`patcher upgrade --force` replaces it" in fault.finding
    code, out, _ = command("upgrade", "--force", *repository)
    assert (code, "updated intent_tokenizer, intent_encoder;" in out) == (0, True)
    assert tree(older.root) == expected


def test_it_says_that_older_patchers_no_longer_read_it_and_beforehand_that_they_would_not(older, command, tree):
    before, repository = tree(older.root), ["--repo", older.root]
    code, out, _ = command("upgrade", "--dry-run", *repository)
    models = "intent_tokenizer, intent_encoder, intent_backbone, intent, intent_features"
    would = f"would update {models}\nwould raise the repository's format to 2: patchers before 0.4 would not read it\n"
    assert (code, out) == (0, would)
    planned = json.loads(command("upgrade", "--dry-run", "--json", *repository)[1])
    assert (planned["format_before"], planned["format"], planned["dry_run"]) == (1, 2, True)
    assert tree(older.root) == before
    code, out, _ = command("upgrade", *repository)
    assert (code, out.splitlines()) == (
        0,
        [
            f"updated {models}; restart the server to use them",
            "the repository has format 2 now: patchers before 0.4 no longer read it",
        ],
    )
    (older.root / "intent_encoder" / "1" / "model.py").write_bytes(EARLIER)
    assert "format" not in command("upgrade", *repository)[1]


def test_it_says_that_answers_may_change_where_a_quantized_backbone_gets_an_encoder(older, command):
    repository, said = ["--repo", older.root], "intent_backbone: in INT8 a text's scores shift slightly"
    assert said not in command("upgrade", "--dry-run", *repository)[1]
    model = onnx.load(older.backbone_path)
    model.graph.node.append(onnx.helper.make_node("MatMulInteger", ["a", "b"], ["c"]))
    onnx.save(model, older.backbone_path)
    assert said in command("upgrade", "--dry-run", *repository)[1]
    assert json.loads(command("upgrade", "--dry-run", "--json", *repository)[1])["quantized"] == ["intent_backbone"]
    assert said in command("upgrade", *repository)[1]
    (older.root / "intent_encoder" / "1" / "model.py").write_bytes(EARLIER)
    assert said not in command("upgrade", *repository)[1]


@pytest.fixture
def outdated(classifier, tmp_path):
    """A repository with two backbones, the second without a classifier, both with programs of an earlier version."""
    repository = classifier.repository
    with repository.lock():
        repository.add_backbone("second", tiny.backbone_files(tmp_path))
        repository.add_classifier("other", classifier.head(), backbone="intent")
    for model in ("intent_encoder", "second_encoder"):
        (repository.root / model / "1" / "model.py").write_bytes(EARLIER)
    return repository


def test_what_doctor_advises_works_as_it_stands(outdated, command):
    repository = ["--repo", outdated.root]
    code, out, _ = command("doctor", "--url", "127.0.0.1:1", *repository)
    assert (code, "intent_encoder, second_encoder: of an older patcher; `patcher upgrade` renews" in out) == (1, True)
    code, out, _ = command("upgrade", *repository)
    assert (code, "updated intent_encoder, second_encoder;" in out) == (0, True)
    assert "of an older patcher" not in command("doctor", "--url", "127.0.0.1:1", *repository)[1]
    code, out, _ = command("upgrade", *repository)
    assert (code, out) == (0, "intent, second: up to date, nothing to do\n")


@pytest.mark.parametrize(
    "given, backbone",
    [(["--backbone", "intent"], "intent"), (["--backbone", "second"], "second"), (["--classifier", "other"], "intent")],
)
def test_one_of_several_backbones_is_upgraded(outdated, command, given, backbone):
    code, out, _ = command("upgrade", "--json", "--repo", outdated.root, *given)
    assert code == 0
    expected = {"backbone": backbone, "backbones": [backbone], "changed": [f"{backbone}_encoder"]}
    assert {key: json.loads(out)[key] for key in expected} == expected


def test_what_one_backbone_refuses_leaves_the_others_as_they_are(outdated, command, tree):
    (outdated.root / "second_encoder" / "1" / "model.py").write_text("# as 0.99 will have it\n")
    before = tree(outdated.root)
    code, _, err = command("upgrade", "--repo", outdated.root)
    assert (code, "second_encoder/1/model.py: no program of this" in err) == (2, True)
    assert tree(outdated.root) == before
    code, _, err = command("upgrade", "--repo", outdated.root, "--backbone", "third")
    assert (code, "no backbone 'third'" in err) == (2, True)


def test_a_backbone_without_a_classifier_is_upgraded(older, command):
    repository = ["--repo", older.root]
    assert command("drop-classifier", "intent", "--yes", "--no-load", *repository)[0] == 0
    assert command("upgrade", *repository)[0] == 0
    assert older.repository.backbone("intent").text_model == "intent_encoder"


def test_an_upgrade_moves_the_response_cache(older):
    repository, model = older.repository, older.backbone_model
    with repository.lock():
        cached = serving.with_response_cache(repository.config_text(model), enable=True)
        repository.write_configs({model: cached})
    upgrade(older)
    on = [name for name in (older.encoder_model, model) if repository.config(name).response_cache.enable]
    assert on == [older.encoder_model]


def upgrades(root):
    """What doctor says about upgrades, and everything that it calls a fault."""
    found = doctor.diagnose(root, None, "nobody")
    return [(each.what, each.state, each.finding) for each in found if "upgrade" in each.what or each.state == "fault"]


CUT_OFF = [("intent, upgrade", "fault", "interrupted; `patcher upgrade` finishes it")]


def test_doctor_tells_of_an_export_that_lacks_its_encoder(older):
    lacking = "no encoder, as in exports before 0.4; `patcher upgrade` adds it"
    assert upgrades(older.root) == [("intent, upgrade", "note", lacking)]
    upgrade(older)
    assert upgrades(older.root) == []


@pytest.mark.parametrize(
    "at, older_program",
    [("patcher.storage.moves._date", True), ("patcher.storage.disk.flush_tree", False)],
    ids=["while a program is replaced", "while the encoder is added"],
)
def test_an_upgrade_that_was_killed_is_no_foreign_code(older, at, older_program):
    model, _, name = at.rpartition(".")
    script = f"""
import os, signal, sys
import {model} as module
from patcher import ModelRepository
from patcher.upgrade import upgrade
before = module.{name}
def at(path, *others):
    if path.name in (".model.py.new", "intent_encoder"):
        os.kill(os.getpid(), signal.SIGKILL)
    return before(path, *others)
module.{name} = at
upgrade(ModelRepository(sys.argv[1]).backbone())
"""
    if not older_program:
        older.renew(older.outdated())
    command = [sys.executable, "-c", script, str(older.root)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert list(older.root.rglob(".patcher-staging-*"))
    assert upgrades(older.root) == CUT_OFF
    upgrade(older)
    assert upgrades(older.root) == []
    assert not list(older.root.rglob(".patcher-staging-*"))


def test_an_upgrade_that_was_cut_off_goes_on(older, monkeypatch):
    write = older.repository.write_configs

    def cut(configs):
        if older.features_model not in configs:
            return write(configs)
        assert list(configs)[-1] == older.features_model
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(older.repository, "write_configs", cut)
        with pytest.raises(KeyboardInterrupt):
            upgrade(older)
    assert older.text_model == older.tokenizer_model
    assert upgrades(older.root) == CUT_OFF
    with older.repository.lock():
        assert upgrades(older.root) == [("intent, upgrade", "note", "in progress; another patcher is running")]
    assert upgrade(older)
    assert older.text_model == older.encoder_model


def test_a_model_that_a_server_lacks_hides_no_setting_of_another(classifier):
    repository, models = classifier.repository, (classifier.encoder_model, classifier.backbone_model)
    loaded = {classifier.backbone_model: repository.config(classifier.backbone_model)}

    class Server:
        url = "here"

        def model_config(self, model):
            if model not in loaded:
                raise ServerRefused(f"{model} is not loaded")
            return loaded[model]

    tuned = serving.with_serving(*map(repository.config_text, models), serving.Serving(instances=2, threads=1))
    with repository.lock():
        repository.write_configs(dict(zip(models, tuned, strict=True)))
    assert [check.what for check in checks.of_settings(repository, Server())] == [
        f"{classifier.backbone_model}, served"
    ]


@pytest.mark.server
def test_doctor_tells_of_a_server_that_runs_what_was_there_before(classifier):
    repository, models = classifier.repository, (classifier.encoder_model, classifier.backbone_model)
    encoder, backbone = models
    earlier = with_program(repository.config_text(encoder), b"as of an earlier version")
    with repository.lock():
        repository.write_configs({encoder: earlier})
    with EmbeddedTriton(classifier.root, [classifier.ensemble, *models]) as triton, triton.client() as server:

        def said():
            notes = [each for each in doctor.diagnose(classifier.root, server, triton.url) if each.state != "ok"]
            return {each.what: each.finding for each in notes if "runs it with" in each.finding}

        assert said() == {}
        (classifier.root / encoder / "1" / "model.py").write_bytes(EARLIER)
        assert upgrade(classifier) == (encoder,)
        found = f"{triton.url} runs it with the program of before an `upgrade`; start that server again"
        assert said() == {f"{encoder}, served": found}
        tuned = serving.with_serving(*map(repository.config_text, models), serving.Serving(instances=2, threads=1))
        with repository.lock():
            repository.write_configs(dict(zip(models, tuned, strict=True)))
        found = "instances 1 (its file: 2), intra_op_thread_count unset (its file: 1); start that server again"
        assert said()[f"{backbone}, served"] == f"{triton.url} runs it with {found}"
    with EmbeddedTriton(classifier.root, [classifier.ensemble, *models]) as triton, triton.client() as server:
        assert said() == {}
