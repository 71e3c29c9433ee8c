"""``patcher report``: the page says what the version's own files and a labelled file say, and is safe to open."""

from __future__ import annotations

import html
import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny

from patcher import add_label, history, merge_labels, read_examples, rename_label
from patcher.cli import main
from patcher.errors import ToolError
from patcher.feature_map import feature_map
from patcher.lifecycle import prune
from patcher.memory import Memory
from patcher.patch import PatchSettings
from patcher.report import make_report, render

NASTY = "<script>alert('x')</script> & \"quotes\""


class _Reader(HTMLParser):
    """What a browser would see: tags, their attributes, and text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def patched(classifier):
    add_label(classifier.repository, "payday", tiny.sentences("payday", 10), settings=PatchSettings(force=True))
    return classifier


@pytest.fixture
def held_out(tmp_path):
    return tiny.write_csv(
        tmp_path / "held-out.csv", {label: tiny.sentences(label, 12, seed=9) for label in (*tiny.OLD, "payday")}
    )


def run(patched, *arguments):
    return main(["report", "--repo", str(patched.root), *map(str, arguments)])


def test_the_page_says_what_the_files_say(patched, held_out, tmp_path, capsys):
    page = tmp_path / "patch.html"
    assert run(patched, "--eval", held_out, "--html", page) == 0
    assert "version 2 of intent" in capsys.readouterr().out
    read = _Reader(page.read_text())
    words = " ".join(" ".join(read.text).split())
    head = patched.head(2)
    assert f"{len(head.labels)} labels" in words
    assert head.lineage.details["verdict"] in words
    assert head.lineage.details["bound"] in words
    assert f"{len(tiny.OLD)} identical, 0 changed" in words
    found = make_report(patched, 2, read_examples(held_out))
    for evaluation in (found.before, found.after):
        assert f"{100 * evaluation.accuracy:.2f} %" in words
    assert found.after.accuracy > found.before.accuracy
    assert read.tags.count("circle") == len(found.map.points)
    assert "Wrong before, right now: 12" in words


def test_a_page_asks_for_nothing_and_runs_nothing(patched, tmp_path):
    rename_label(patched, "payday", NASTY)
    texts = tiny.write_csv(tmp_path / "nasty.csv", {tiny.OLD[0]: [NASTY], NASTY: ["when is payday " + NASTY]})
    page = render(make_report(patched, 3, read_examples(texts)))
    read = _Reader(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name in ("src", "href", "onload", "onclick")]
    assert "http://" not in page
    assert "https://" not in page
    assert NASTY in "".join(read.text)


def test_the_same_as_one_document(patched, held_out, capsys):
    assert run(patched, "--eval", held_out, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["version"]["added"] == ["payday"]
    assert document["parent"] == 1
    assert document["after"]["accuracy"] > document["before"]["accuracy"]
    assert document["map"]["labels"][0] == "payday"
    assert len(document["map"]["points"]) == len(document["map"]["ids"])
    assert document["difference"]["added"] == ["payday"]


def test_texts_of_the_new_label_alone_have_no_before(patched, tmp_path):
    texts = tiny.write_csv(tmp_path / "new.csv", {"payday": tiny.sentences("payday", 5, seed=4)})
    found = make_report(patched, None, read_examples(texts))
    assert found.before is None
    assert "version 1</th>" not in render(found)


def test_a_label_that_was_only_renamed_is_the_same_before_and_after(patched, held_out):
    rename_label(patched, "payday", "wages")
    found = make_report(patched, 3, read_examples(held_out))  # the file still has the old name
    assert found.before.accuracy == found.after.accuracy
    assert "wages" in found.after.per_label
    assert (found.after.unknown, found.before.unknown) == ((), ())
    assert found.before.per_label == found.after.per_label


def test_a_merged_label_is_the_same_before_and_after(patched, tmp_path):
    texts = {label: tiny.sentences(label, 20, seed=9) for label in tiny.OLD}
    held_out = read_examples(tiny.write_csv(tmp_path / "old.csv", texts))
    verdict = merge_labels(patched, ["balance", "transfer"], "money", force=True).verdict
    found = make_report(patched, 3, held_out)  # the file has the old names
    details = found.entry.lineage.details
    assert (details["verdict"], details["examples"]) == (verdict.sentence, 40)
    for said in (verdict.sentence, verdict.bound, "money: "):
        assert said in html.unescape(render(found))
    assert found.difference.flips == ()
    assert (found.after.unknown, found.before.unknown) == ((), ())
    assert found.before.per_label["money"].support == found.after.per_label["money"].support == 40
    assert found.after.accuracy >= found.before.accuracy
    assert "Texts labelled transfer count as money, into which it was merged." in render(found)


@pytest.mark.parametrize("into, said", [("balance", "transfer"), ("money", "balance, transfer")])
def test_a_merge_is_shown_as_one(patched, capsys, into, said):
    merge_labels(patched, ["balance", "transfer"], into, force=True)
    entry = history(patched)[-1]
    assert entry.what() == f"{said} merged into {into}"
    document = entry.to_json()
    assert document["merged"] == tuple((label, into) for label in said.split(", "))
    assert (document["added"], document["removed"]) == ((into,), tuple(said.split(", ")))
    assert f"{said} merged into {into} ·" in render(make_report(patched))
    assert main(["history", "--repo", str(patched.root)]) == 0
    assert f"  {said} merged into {into}  merge  " in capsys.readouterr().out


def test_versions_without_a_parent_a_gate_or_a_map(patched):
    assert make_report(patched, 1).parent is None
    assert "With <code>--eval FILE</code>" in render(make_report(patched, 1))
    for word in ("rent", "salary"):
        add_label(patched.repository, word, tiny.sentences("payday", 10, seed=5), settings=PatchSettings(force=True))
    prune(patched, 1)
    serving = patched.serving()
    left = min(patched.versions())
    assert left == serving - 1
    found = make_report(patched, left)
    assert (found.parent, found.difference) == (None, None)
    assert "not on disk any more" in render(found)


def test_mistakes_are_told(patched, held_out, tmp_path, capsys, monkeypatch):
    assert run(patched) == 2
    assert "--html FILE" in capsys.readouterr().err
    assert run(patched, "--html", tmp_path / "no" / "such" / "page.html") == 2
    assert "expected a path in an existing folder" in capsys.readouterr().err
    assert run(patched, "--version", "9", "--html", tmp_path / "page.html") == 2
    assert "9" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
    before = held_out.read_bytes()
    assert run(patched, "--eval", held_out, "--html", held_out) == 2
    assert run(patched, "--html", held_out) == 2
    assert "expected a name that ends in .html" in capsys.readouterr().err
    assert held_out.read_bytes() == before
    (tmp_path / "a folder").mkdir()
    assert run(patched, "--html", tmp_path / "a folder") == 2
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ToolError, match=r"pip install '\.\[report\]'"):
        render(make_report(patched))
    assert run(patched, "--eval", held_out, "--json") == 0  # JSON needs no jinja2


def test_a_full_disk_leaves_the_page_that_was_there(patched, tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("the one before")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patcher.storage.disk.os.fsync", full)
    assert run(patched, "--html", page) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert page.read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.iterdir() if "page" in path.name) == ["page.html"]


def test_a_map_is_of_the_plane_in_which_the_labels_differ():
    rng = np.random.default_rng(0)
    centres = np.zeros((4, 8))
    centres[1, 0], centres[2, 1], centres[3, 2] = 9.0, 9.0, 90.0
    ids = np.repeat(np.arange(4), 50)
    features = (centres[ids] + rng.normal(size=(200, 8))).astype(np.float32)
    memory = Memory.build(features, ids, ["here", "right", "up", "far"], 8, per_label=50)
    found = feature_map(memory, ["here"], neighbours=2)
    assert (found.labels[0], found.asked) == ("here", 1)
    assert set(found.labels) == {"here", "right", "up"}
    means = np.stack([found.points[found.ids == i].mean(axis=0) for i in range(3)])
    gaps = np.linalg.norm(means[:, None] - means[None], axis=2)[np.triu_indices(3, 1)]
    spread = np.concatenate([found.points[found.ids == i] - means[i] for i in range(3)]).std()
    assert gaps.min() > 4 * spread
    assert feature_map(memory, ["nobody"]) is None
    assert feature_map(Memory.build(features, ids, ["a", "b", "c", "d"], 8, per_label=0), ["a"]) is None
    alone = Memory.build(features[:50], ids[:50], ["here"], 8, per_label=5)
    assert feature_map(alone, ["here"]).points.shape == (5, 2)
