"""Examples said a little differently, and what a fit makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from test_fit import world

from patcher import PatchSettings, add_labels, labelling
from patcher.errors import ExamplesError
from patcher.fit import fit, logistic
from patcher.fit.shown import Shown, Variants
from patcher.variants import variants, variants_of

DRY = PatchSettings(dry_run=True, force=True)


def reworded(rows, each=3, seed=5):
    """Variants near to the examples they were made from, as a fit is given them."""
    places = np.repeat(np.arange(len(rows)), each)
    noise = np.random.default_rng(seed).standard_normal((len(places), rows.shape[1])) * 0.3
    return Variants((rows[places] + noise).astype(np.float32), places)


def test_a_word_is_left_out_or_two_are_swapped():
    assert variants("where is my card") == [
        "is my card",
        "where my card",
        "where is card",
        "where is my",
        "is where my card",
        "where is card my",
    ]
    assert variants("lost card") == ["card", "lost"]
    assert variants("no no no") == ["no no"]


@pytest.mark.parametrize("text", ["hello", "", "我的卡丢了", "word " * 65])
def test_nothing_is_made_of_one_word_or_very_many(text):
    assert variants(text) == []


@given(st.text())
def test_variants_are_few_none_twice_and_none_of_them_the_text(text):
    made = variants(text)
    assert len(made) == len(set(made)) <= 8
    assert " ".join(text.split()) not in made
    assert all(set(variant.split()) <= set(text.split()) for variant in made)


def test_very_few_examples_and_many_have_none():
    texts = [f"text number {number}" for number in range(21)]
    assert variants_of(texts[:2]) == variants_of(texts) == ([], [])
    made, places = variants_of(texts[:3])
    assert places == [0] * 5 + [1] * 5 + [2] * 5
    assert made[:5] == variants(texts[0])


def test_an_example_shares_its_weight_with_its_variants():
    rows = np.zeros((3, 2), np.float32)
    shown = Shown(rows, Variants(np.ones((4, 2), np.float32), np.array([0, 0, 0, 2])))
    assert shown.places.tolist() == [0, 1, 2, 0, 0, 0, 2]
    assert shown.weights(0.6) == pytest.approx([0.4, 1.0, 0.4, 0.2, 0.2, 0.2, 0.6])
    assert Shown(rows).weights(0.6).tolist() == [1.0, 1.0, 1.0]


def test_an_example_is_left_out_with_its_variants(monkeypatch):
    head, memory, _, _, new = world()
    rows = new(6)
    losses, plain = [], logistic.RowLoss

    def watched(inside, *rest):
        losses.append(inside)
        return plain(inside, *rest)

    monkeypatch.setattr(logistic, "RowLoss", watched)
    made = fit({"new": rows}, head, memory, variants={"new": reworded(rows)})
    left = [inside for inside in losses if len(inside.weight) == 5 * 4]
    assert len(left) == 6  # each with its three variants
    assert all(inside.weight.sum() == pytest.approx(1.0) for inside in left)
    assert len(made.held_out["new"].margins) == 6
    assert "18 variants of the examples" in made.why


def test_variants_move_a_row_and_old_rows_keep_their_bits():
    head, memory, features, _, new = world()
    rows = new(6)
    alone, both = (fit({"new": rows}, head, memory, variants=some) for some in (None, {"new": reworded(rows)}))
    assert alone.weight.tobytes() != both.weight.tobytes()
    assert both.apply(head).logits(features)[:, :8].tobytes() == head.logits(features).tobytes()
    assert (both.apply(head).logits(new(200, seed=9)).argmax(axis=1) == 8).mean() > 0.9
    assert "variants" not in alone.why


@pytest.mark.parametrize("method", ["ridge", "lda"])
def test_other_methods_see_them_too(method):
    head, memory, _, _, new = world()
    rows = new(6)
    made = fit({"new": rows}, head, memory, method=method, variants={"new": reworded(rows)})
    assert "18 variants" in made.why
    assert (made.apply(head).logits(new(200, seed=9)).argmax(axis=1) == 8).mean() > 0.9


@pytest.mark.parametrize(
    "features, places, error",
    [
        (np.zeros((2, 20)), [0, 6], r"variants \(2, 20\) of examples \[0, 6\]; expected \[2, 20\], of examples 0 to 5"),
        (np.zeros((2, 19)), [0, 1], r"expected \[2, 20\]"),
        (np.full((1, 20), np.nan), [0], "not finite"),
    ],
)
def test_variants_that_do_not_fit_the_examples_are_refused(features, places, error):
    head, memory, _, _, new = world()
    with pytest.raises(ExamplesError, match=error):
        fit({"new": new(6)}, head, memory, variants={"new": Variants(features, np.array(places))})


def test_variants_are_encoded_with_the_examples_unless_they_are_not_wanted(classifier, monkeypatch):
    asked, plain = [], labelling.extract_features

    def watched(backbone, texts, server=None):
        asked.append(list(texts))
        return plain(backbone, texts, server)

    monkeypatch.setattr(labelling, "extract_features", watched)
    new = {"payday": tiny.sentences("payday", 6), "greeting": tiny.sentences("greeting", 2)}
    report = add_labels(classifier.repository, new, settings=DRY)
    made = variants_of(new["payday"])[0]
    assert asked == [[*new["payday"], *new["greeting"], "payday", "greeting", *made]]
    assert f"{len(made)} variants of the examples" in report.fit.why
    assert report.examples == 8
    without = add_labels(
        classifier.repository, new, settings=PatchSettings(dry_run=True, force=True, use_variants=False)
    )
    assert len(asked[1]) == 10
    assert "variants" not in without.fit.why
