"""Quality over many patches: a hundred labels added one after another, multi-label classifiers, and merges."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.fit import fit
from patcher.fit.minimise import minimise
from patcher.fit.scope import fit_scope
from patcher.gate import judge
from patcher.head import MULTI_LABEL, Head
from patcher.memory import Memory
from patcher.patch import PatchSettings
from patcher.relabelling import merged
from tests.benchmarks.quality_data import draws_of, note
from tests.benchmarks.quality_ours import names_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.benchmarks.quality_data import Setting

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

__all__ = ["many_labels", "merges", "sigmoids"]

MANY = 100
ORDERS = 3


def many_labels(setting: Setting, n: int, orders: int = ORDERS) -> dict[str, Any]:
    """Add a hundred labels one after another, from ``n`` examples each, in several orders.

    The data has fewer labels that the backbone never saw, so old labels are removed from the head and the memory first
    and added again among the new ones. (They are easier than new ones, because the backbone was fine-tuned on them.)
    """
    known = len(setting.head.labels)
    fewer = max(2, known - max(0, MANY - len(setting.new)))
    kept, gone = setting.head.labels[:fewer], setting.head.labels[fewer:]
    pool = {label: new.train for label, new in setting.new.items()}
    pool |= {label: setting.train[setting.train_ids == setting.head.index(label)] for label in gone}
    runs = [_one_by_one(setting, kept, pool, n, order) for order in range(orders)]
    seconds = np.array([run["seconds"] for run in runs])
    tenth = max(1, seconds.shape[1] // 10)
    accuracies = [run["accuracy"] for run in runs]
    agreement = [float((runs[i]["answers"] == runs[j]["answers"]).mean()) for i in range(orders) for j in range(i)] or [
        1.0
    ]
    found = {
        "from": len(kept),
        "added": len(pool),
        "orders": orders,
        "accuracy": {
            "mean": float(np.mean(accuracies)),
            "sd": float(np.std(accuracies, ddof=1)) if orders > 1 else 0.0,
        },
        "orders agree": float(np.mean(agreement)),
        "seconds of the first tenth": float(np.median(seconds[:, :tenth])),
        "seconds of the last tenth": float(np.median(seconds[:, -tenth:])),
        "kept labels": {"before": runs[0]["before"], "after": float(np.mean([run["after"] for run in runs]))},
    }
    note(f"  {found['added']} labels: {100 * found['accuracy']['mean']:.2f} on all")
    return found


def _one_by_one(setting: Setting, kept: tuple[str, ...], pool: dict[str, Floats], n: int, order: int) -> dict[str, Any]:
    rng = np.random.default_rng([29, order])
    head = setting.head
    for label in head.labels[len(kept) :]:
        head = head.without(label)
    mine = setting.train_ids < len(kept)
    memory = Memory.build(setting.train[mine], setting.train_ids[mine], kept, head.split)
    old = setting.test_ids < len(kept)
    before = head.logits(setting.test[old]).argmax(axis=1) == setting.test_ids[old]
    seconds = []
    for position in rng.permutation(len(pool)).tolist():
        label = list(pool)[position]
        examples = pool[label][np.random.default_rng([31, position]).permutation(len(pool[label]))[:n]]
        start = time.perf_counter()
        names = names_of(setting, label) if label in setting.new else {}
        made = fit({label: examples}, head, memory, names=names)
        judge(head, made, {label: examples}, memory)
        memory = memory.add([label], examples, np.zeros(len(examples), np.int64))
        patched = made.apply(head)
        head = dataclasses.replace(patched, scope=fit_scope(memory, patched, white=made.old.whitening))
        seconds.append(time.perf_counter() - start)
    places = np.array([head.index(label) for label in (*setting.head.labels, *setting.new)])
    answers = head.logits(setting.everything)[:, places].argmax(axis=1)
    right = answers == setting.everything_ids
    return {
        "accuracy": float(right.mean()),
        "answers": answers,
        "seconds": seconds,
        "before": float(before.mean()),
        "after": float(right[: len(setting.test)][old].mean()),
    }


def sigmoids(setting: Setting, n: int, draws: int) -> dict[str, Any]:
    """Add one label to a multi-label classifier: a sigmoid per label, with the common threshold of 0.5.

    The head is fitted on the frozen classifier features, with one logistic regression per label. Each text has one
    label.
    """
    head = _sigmoid_head(setting)
    memory = Memory.build(setting.train, setting.train_ids, head.labels, head.split)
    recall, precision, wrong, passed = [], [], [], []
    for label, new in setting.new.items():
        for picked in draws_of(setting, label, n, draws):
            examples = {label: new.train[picked]}
            made = fit(examples, head, memory, names=names_of(setting, label))
            verdict = judge(head, made, examples, memory)
            patched = made.apply(head)
            found = patched.logits(new.test)[:, -1] > 0
            false = patched.logits(setting.test)[:, -1] > 0
            recall.append(float(found.mean()))
            wrong.append(float(false.mean()))
            precision.append(float(found.sum() / max(1, found.sum() + false.sum())))
            passed.append(verdict.passed)
    right = (head.logits(setting.test).argmax(axis=1) == setting.test_ids).mean()
    found_in: dict[str, Any] = {
        "patches": len(recall),
        "old labels' accuracy by the largest sigmoid": float(right),
        "recall": _mean(recall),
        "precision": _mean(precision),
        "old texts that get the new label": _mean(wrong),
        "gate passed": float(np.mean(passed)),
    }
    shares = ", ".join(f"{name} {100 * found_in[name]['mean']:.1f}" for name in ("recall", "precision"))
    note(f"  sigmoids: {shares}")
    return found_in


MERGES = 30
"""Pairs of labels that are merged: half with the label whose mean is nearest, half at random."""


def merges(setting: Setting) -> dict[str, Any]:
    """Merge two labels into one, in a single-label and a multi-label classifier: its recall, and harm to the others.

    ``recall`` is the share of the two labels' test texts that get the merged one, ``recall before`` of those that got
    either. ``flips`` are other texts that were answered right (multi-label: did not get either) and no longer are.
    """
    found = {}
    for kind, head in (("single-label", setting.head), ("multi-label", _sigmoid_head(setting))):
        memory = Memory.build(setting.train, setting.train_ids, head.labels, head.split)
        rows = [_merge(setting, head, memory, *pair) for pair in _pairs(memory)]
        found[kind] = {name: _mean([row[name] for row in rows]) for name in rows[0]} | {"merges": len(rows)}
        note(f"  merges, {kind}: recall {100 * found[kind]['recall']['mean']:.1f}")
    return found


def _pairs(memory: Memory) -> list[tuple[int, int]]:
    rng, means = np.random.default_rng(37), memory.means()
    gaps = ((means[:, None] - means[None]) ** 2).sum(axis=2) + np.diag(np.full(len(means), np.inf))
    firsts = rng.permutation(len(means))[: MERGES // 2].tolist()
    near = [(label, int(gaps[label].argmin())) for label in firsts]
    return near + [tuple(rng.permutation(len(means))[:2].tolist()) for _ in firsts]


def _merge(setting: Setting, head: Head, memory: Memory, first: int, second: int) -> dict[str, float]:
    labels = [head.labels[first], head.labels[second]]
    patch = merged(head, memory, labels, "both", PatchSettings(force=True))
    mine = np.isin(setting.test_ids, (first, second))
    before, after = head.logits(setting.test), patch.head.logits(setting.test)
    place = patch.head.index("both")
    if head.exclusive:
        names, answers = np.array(patch.head.labels)[after.argmax(axis=1)], before.argmax(axis=1)
        had, has = np.isin(answers, (first, second)), names == "both"
        right = np.array(head.labels)[setting.test_ids]
        flips = (answers == setting.test_ids) & (names != right)
    else:
        had, has = (before[:, [first, second]] > 0).any(axis=1), after[:, place] > 0
        flips = has & ~had
    return {
        "recall before": float(had[mine].mean()),
        "recall": float(has[mine].mean()),
        "flips": float(flips[~mine].mean()),
        "gate passed": float(patch.gate == "passed"),
    }


def _mean(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": float(np.min(values)), "max": float(np.max(values))}


def _sigmoid_head(setting: Setting) -> Head:
    labels, split = setting.head.labels, setting.head.split
    points = np.column_stack([setting.train[:, :split], np.ones(len(setting.train))]).astype(np.float32)
    wanted = (setting.train_ids[:, None] == np.arange(len(labels))).astype(np.float32)
    shape = (len(labels), split + 1)

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        rows = values.reshape(shape)
        logits = points @ rows.T.astype(np.float32)
        cost = np.maximum(logits, 0) - logits * wanted + np.log1p(np.exp(-np.abs(logits)))
        chance = np.exp(np.minimum(logits, 0)) / (1.0 + np.exp(-np.abs(logits)))
        slope = ((chance - wanted).T @ points).astype(np.float64) / len(points) + 1e-5 * rows
        return float(cost.sum(dtype=np.float64)) / len(points) + 0.5e-5 * float((rows * rows).sum()), slope.ravel()

    rows = minimise(loss, np.zeros(shape[0] * shape[1]), tolerance=1e-5, steps=100).reshape(shape).astype(np.float32)
    return Head.from_linear(labels, rows[:, :-1], rows[:, -1], setting.head.width, "sigmoids", problem=MULTI_LABEL)
