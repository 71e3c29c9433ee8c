"""Measures patcher's own fit, gate and scope: one label, many one after another, the bound on flips, scope, speed."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.errors import InputError
from patcher.fit import METHODS, Fit, fit
from patcher.fit.inputs import Labelled
from patcher.fit.scope import FINE_TUNED, fit_scope
from patcher.gate import judge
from patcher.head import Head
from patcher.memory import Memory
from tests.benchmarks.quality_baselines import logistic_regression
from tests.benchmarks.quality_data import draws_of, note, sequence_of
from tests.benchmarks.quality_measure import Outcome, auroc, outcome, recall_at_flips, spread, summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tests.benchmarks.quality_data import Setting

    Floats = NDArray[np.float32]

__all__ = ["BUDGETS", "COUNTS", "RATES", "bound", "methods", "one_label", "scope", "sequential", "speed"]

COUNTS = (1, 2, 5, 10, 20, 50)
RATES = tuple(float(rate) for rate in np.geomspace(2.5e-4, 0.1, 27))
"""Flip rates at which the recall curve is evaluated."""
NAMED_RATES = (5e-4, 2e-3, 5e-3)
BUDGETS = (0.001, 0.005, 0.02)
SPEED_REPEATS, SPEED_SECONDS = 5, 20.0
IN_SCOPE = 0.5
"""Below this score a text counts as out of scope."""
MANY = 100
"""Maximum number of examples of each new label for the reference head that is trained from scratch."""


@dataclass(frozen=True)
class _Patch:
    """One fit and its measured effect."""

    outcome: Outcome
    curve: list[float]
    seconds: float
    fitted: Fit


def patch(
    setting: Setting,
    label: str,
    examples: Floats,
    memory: Memory | None,
    method: str = "auto",
    replay: Labelled | None = None,
    **settings: float,
) -> _Patch:
    """Fit one new label and measure it on the old test set and the label's own."""
    start = time.perf_counter()
    names = names_of(setting, label)
    fitted = fit({label: examples}, setting.head, memory, names=names, method=method, replay=replay, **settings)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    head = fitted.apply(setting.head)
    old, new = head.logits(setting.test), head.logits(setting.new[label].test)
    place = head.index(label)
    found = outcome(setting.test_ids, setting.before, old.argmax(axis=1), new.argmax(axis=1), place)
    lead_old = np.delete(old, place, axis=1).max(axis=1) - old[:, place]
    lead_new = new[:, place] - np.delete(new, place, axis=1).max(axis=1)
    curve = recall_at_flips(lead_old, setting.before == setting.test_ids, lead_new, (*RATES, *NAMED_RATES))
    return _Patch(found, curve, seconds, fitted)


def names_of(setting: Setting, label: str) -> dict[str, Floats]:
    """Features of a new label's name, if it consists of words."""
    name = setting.new[label].name
    return {} if name is None else {label: name}


def one_label(setting: Setting, draws: int, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    """Measure the default method with the memory alone, per number of examples: figures, curve, gate, seconds."""
    found: dict[str, Any] = {}
    for n in counts:
        patches, passed, warned, estimates, held, per_label = [], [], [], [], [], {}
        for label in setting.new:
            mine = []
            for picked in draws_of(setting, label, n, draws):
                examples = setting.new[label].train[picked]
                made = patch(setting, label, examples, setting.memory)
                verdict = judge(setting.head, made.fitted, {label: examples}, setting.memory)
                passed.append(verdict.passed)
                warned.append(bool(verdict.too_few))
                estimate = verdict.estimated_recall[label]
                if estimate is not None:
                    estimates.append(abs(estimate - made.outcome.recall))
                    held.append(made.outcome.recall >= (verdict.recall_lower_bound[label] or 0.0))
                mine.append(made)
            patches += mine
            if mine:
                per_label[label] = summary([made.outcome for made in mine])
        if not patches:
            continue
        curves = np.array([made.curve for made in patches]).mean(axis=0)
        found[str(n)] = {
            "patches": len(patches),
            "figures": summary([made.outcome for made in patches]),
            "recall at flips of": dict(zip(map(str, NAMED_RATES), curves[len(RATES) :].tolist(), strict=True)),
            "curve": {"flips": RATES, "recall": curves[: len(RATES)].tolist()},
            "gate passed": float(np.mean(passed)),
            "gate says too few": float(np.mean(warned)),
            "recall estimated off by": float(np.mean(estimates)) if estimates else None,
            "recall's lower bound held": float(np.mean(held)) if held else None,
            "seconds": float(np.median([made.seconds for made in patches])),
            "method": patches[0].fitted.method,
            "why": patches[0].fitted.why,
            "old rows unchanged": all(_unchanged(setting.head, made.fitted) for made in patches),
            "labels": per_label,
        }
        note(f"  {n} examples: {_short(found[str(n)]['figures'])}")
    return found


def methods(setting: Setting, n: int, draws: int) -> dict[str, Any]:
    """Measure every other method and memory with one number of examples."""
    default = fit(_first(setting, n), setting.head, setting.memory).method
    every: list[tuple[str, str, Memory | None, Labelled | None]] = [
        ("auto, statistics only in the memory", "auto", setting.statistics, None),
        ("auto, no memory", "auto", None, None),
        ("auto, old data as replay", "auto", setting.memory, Labelled(setting.train, setting.train_ids)),
    ]
    for method in METHODS:
        if method not in ("auto", default):
            replay = Labelled(setting.train, setting.train_ids) if method == "anchored" else None
            every.append((method, method, setting.memory, replay))
    found: dict[str, Any] = {}
    for name, method, memory, replay in every:
        try:
            patches = [
                patch(setting, label, setting.new[label].train[picked], memory, method, replay)
                for label in setting.new
                for picked in draws_of(setting, label, n, 1 if method == "anchored" else draws)  # anchored is slow
            ]
        except InputError as error:
            found[name] = {"failed": str(error)}
            continue
        seconds = float(np.median([made.seconds for made in patches]))
        figures = summary([made.outcome for made in patches])
        found[name] = {"patches": len(patches), "figures": figures, "seconds": seconds}
        note(f"  {name}: {_short(figures)}")
    return found


def _first(setting: Setting, n: int) -> dict[str, Floats]:
    label = next(iter(setting.new))
    return {label: setting.new[label].train[:n]}


def _unchanged(head: Head, fitted: Fit) -> bool:
    """Whether the old rows of a patched head are bit-identical to those before."""
    before, after = head.rows_hash(), fitted.apply(head).rows_hash()
    return all(after[label] == row for label, row in before.items())


def _short(figures: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {100 * value['mean']:.2f}" for name, value in figures.items())


WAYS = {
    "lda": ("lda",),
    "ridge": ("ridge",),
    "ridge for the first one, the default after it": ("ridge", "auto"),
}
"""Other ways to add labels one after another: the method of the first patch, then that of the rest."""


def sequential(setting: Setting, n: int, draws: int) -> dict[str, Any]:
    """Add all new labels one after another in random orders; compare with heads trained on many examples of each."""
    found = _sequences(setting, n, draws, "the default", ("auto",))
    found["labels"] = len(setting.head.labels) + len(setting.new)
    found["other methods"] = {name: _sequences(setting, n, draws, name, way) for name, way in WAYS.items()}
    return {**found, f"trained on {MANY} of each": trained_on_many(setting)}


def _sequences(setting: Setting, n: int, draws: int, name: str, way: Sequence[str]) -> dict[str, Any]:
    runs = [run for draw in range(draws) if (run := _one_after_another(setting, n, draw, way))]
    found: dict[str, Any] = {
        "runs": len(runs),
        "accuracy": {name: spread([run["accuracy"][name] for run in runs]) for name in ("all", "old", "new")},
        "seconds": {part: spread([s for run in runs for s in run["seconds"][part]]) for part in ("fit", "whole add")},
        "old rows unchanged": all(run["old rows unchanged"] for run in runs),
    }
    note(f"  one after another, {name}: {100 * found['accuracy']['all']['mean']:.2f} on all")
    return found


def trained_on_many(setting: Setting) -> dict[str, Any]:
    """Accuracy of softmax layers trained from scratch on all old data and ``MANY`` examples of each new label."""
    labels = len(setting.head.labels) + len(setting.new)
    reference = {}
    for name, width in (("classifier features", setting.head.split), ("all features", setting.head.width)):
        start = time.perf_counter()
        scorer = logistic_regression(*_many(setting, width), labels)
        answers = scorer(setting.everything[:, :width]).argmax(axis=1)
        reference[name] = {**_accuracy(setting, answers), "seconds": time.perf_counter() - start}
        note(f"  trained on {MANY} examples of each, {name}: {100 * reference[name]['all']:.2f} on all")
    return reference


def _one_after_another(setting: Setting, n: int, draw: int, way: Sequence[str]) -> dict[str, Any]:
    head, memory = setting.head, setting.memory
    before = head.rows_hash()
    seconds: dict[str, list[float]] = {"fit": [], "whole add": []}
    sequence = sequence_of(setting, n, draw)
    if not sequence:
        return {}
    for number, (label, picked) in enumerate(sequence):
        examples = setting.new[label].train[picked]
        start = time.perf_counter()
        method = way[0] if not number else way[-1]
        fitted = fit({label: examples}, head, memory, names=names_of(setting, label), method=method)
        seconds["fit"].append(time.perf_counter() - start)
        judge(head, fitted, {label: examples}, memory)
        memory = memory.add([label], examples, np.zeros(len(examples), np.int64))
        patched = fitted.apply(head)
        head = dataclasses.replace(patched, scope=fit_scope(memory, patched, white=fitted.old.whitening))
        seconds["whole add"].append(time.perf_counter() - start)
    after = head.rows_hash()
    order = [head.index(label) for label in (*setting.head.labels, *setting.new)]
    answers = head.logits(setting.everything)[:, order].argmax(axis=1)
    kept = all(after[label] == row for label, row in before.items())
    return {"accuracy": _accuracy(setting, answers), "seconds": seconds, "old rows unchanged": kept}


def _accuracy(setting: Setting, answers: NDArray[np.int64]) -> dict[str, float]:
    right, split = answers == setting.everything_ids, len(setting.test)
    return {"all": float(right.mean()), "old": float(right[:split].mean()), "new": float(right[split:].mean())}


def _many(setting: Setting, width: int) -> Labelled:
    """All old data, and at most ``MANY`` examples of each new label."""
    new = [label.train[:MANY] for label in setting.new.values()]
    ids = np.repeat(np.arange(len(new)) + len(setting.head.labels), [len(rows) for rows in new])
    return Labelled(np.concatenate([setting.train, *new])[:, :width], np.concatenate([setting.train_ids, ids]))


def bound(setting: Setting, n: int, draws: int) -> dict[str, Any]:
    """Measure how often the flips on the test set stay within the gate's upper bound, for several budgets."""
    found: dict[str, Any] = {}
    everywhere: list[bool] = []
    for budget in BUDGETS:
        within: list[bool] = []
        seen, stated = [], []
        for label in setting.new:
            for picked in draws_of(setting, label, n, draws):
                examples = setting.new[label].train[picked]
                made = patch(setting, label, examples, setting.memory, max_flips=budget)
                verdict = judge(setting.head, made.fitted, {label: examples}, setting.memory, max_flips=budget)
                if verdict.flips_upper_bound is not None:
                    within.append(made.outcome.flips <= verdict.flips_upper_bound)
                    stated.append(verdict.flips_upper_bound)
                seen.append(made.outcome.flips)
        found[str(budget)] = {
            "patches": len(seen),
            "without a bound": len(seen) - len(within),
            "within": float(np.mean(within)) if within else None,
            "flips": spread(seen),
            "stated bound": spread(stated) if stated else None,
        }
        note(f"  budget {budget:.1%}: {found[str(budget)]['within']} of {len(within)} within the stated bound")
        everywhere += within
    share = float(np.mean(everywhere)) if everywhere else None
    return {"budgets": found, "patches": len(everywhere), "within": share}


def scope(setting: Setting, n: int) -> dict[str, Any]:
    """Measure how well the score separates texts of no label from old test texts, before and after adding labels."""
    head, memory = setting.head, setting.memory
    stretch = fit_scope(memory, head, fresh=setting.fresh).stretch
    limits = {"": FINE_TUNED} | ({", limit set on fresh texts": stretch} if len(setting.fresh) else {})
    found = {f"before{words}": _scope_figures(setting, head, memory, wide) for words, wide in limits.items()}
    for label, new in setting.new.items():
        examples = new.train[draws_of(setting, label, n, 1)[0]]
        head = fit({label: examples}, head, memory, names=names_of(setting, label)).apply(head)
        memory = memory.add([label], examples, np.zeros(len(examples), np.int64))
    for words, wide in limits.items():
        found[f"after {len(setting.new)} patches{words}"] = _scope_figures(setting, head, memory, wide)
    for name, each in found.items():
        note(f"  {name}: AUROC {each['auroc']:.4f}")
    return found


def _scope_figures(setting: Setting, head: Head, memory: Memory, stretch: float) -> dict[str, Any]:
    start = time.perf_counter()
    scorer = fit_scope(memory, head, stretch=stretch)
    seconds = time.perf_counter() - start

    def score(rows: Floats) -> Floats:
        return scorer.score(rows, head.logits(rows))

    inside, outside = score(setting.test), score(setting.outside)
    added = [score(new.test) for label, new in setting.new.items() if label in head.labels]
    threshold = getattr(scorer, "threshold", IN_SCOPE)
    return {
        "auroc": auroc(inside, outside),
        "false alarms stated": scorer.false_alarms,
        "false alarms on test": float((inside < threshold).mean()),
        "new labels' texts below": float((np.concatenate(added) < threshold).mean()) if added else None,
        "found outside": float((outside < threshold).mean()),
        "seconds": seconds,
    }


def speed() -> dict[str, Any]:
    """Median seconds of fit, gate, memory update and scope, on synthetic features."""
    found = {}
    for labels, split, width in ((150, 384, 384), (150, 384, 768), (5000, 384, 768)):
        head, memory, examples = made_up(labels, split, width)
        laps: list[dict[str, float]] = []
        until = time.perf_counter() + SPEED_SECONDS
        while len(laps) < SPEED_REPEATS and (not laps or time.perf_counter() < until):
            laps.append(_lap(head, memory, examples))
        name = f"{labels} labels x {width} features"
        found[name] = {part: float(np.median([lap[part] for lap in laps])) for part in laps[0]}
        found[name]["memory MB"] = memory.size / 1e6
        note(f"  {name}: {', '.join(f'{part} {value:.3f}' for part, value in found[name].items())}")
    return found


def _lap(head: Head, memory: Memory, examples: Floats) -> dict[str, float]:
    """Seconds of each step of one patch."""
    ticks = [time.perf_counter()]
    fitted = fit({"new": examples}, head, memory)
    ticks.append(time.perf_counter())
    judge(head, fitted, {"new": examples}, memory)
    ticks.append(time.perf_counter())
    grown = memory.add(["new"], examples, np.zeros(len(examples), np.int64))
    ticks.append(time.perf_counter())
    fit_scope(grown, fitted.apply(head), white=fitted.old.whitening)
    ticks.append(time.perf_counter())
    return dict(zip(("fit", "gate", "memory", "scope"), np.diff(ticks).tolist(), strict=True))


def made_up(labels: int, split: int, width: int, per_label: int = 20) -> tuple[Head, Memory, Floats]:
    """A synthetic head, memory and ten examples, like a fine-tuned model's: distant labels, with spread within each."""
    rng = np.random.default_rng(5)
    means = rng.standard_normal((labels + 1, width)).astype(np.float32)
    mixing = rng.standard_normal((width, width)).astype(np.float32) / np.sqrt(width)

    def drawn(ids: NDArray[np.int64]) -> Floats:
        rows: Floats = means[ids] + 0.5 * rng.standard_normal((len(ids), width), dtype=np.float32) @ mixing
        return rows

    ids = np.repeat(np.arange(labels), per_label)
    names = [f"label {i}" for i in range(labels)]
    weight = means[:labels, :split] * np.float32(12 / split)
    bias = -0.5 * (weight * means[:labels, :split]).sum(axis=1)
    head = Head.from_linear(names, weight, bias, width, "made up")
    return head, Memory.build(drawn(ids), ids, names, split), drawn(np.full(10, labels))
