"""Other approaches on the same setting: textbook methods, fine-tuning the whole model, libraries from PyPI."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.benchmarks.quality_baselines import FROZEN, fine_tune_everything
from tests.benchmarks.quality_data import draws_of, note
from tests.benchmarks.quality_measure import Outcome, outcome, spread, summary
from tests.benchmarks.quality_pypi import LIBRARIES, run_library

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.benchmarks.quality_data import Setting

__all__ = ["baselines", "finetune", "libraries"]


def baselines(setting: Setting, n: int, draws: int) -> dict[str, Any]:
    """Measure the methods on the frozen classifier features."""
    found = {}
    for name, method in FROZEN.items():
        outcomes, seconds = [], []
        for place, (label, new) in enumerate(setting.new.items()):
            for draw, picked in enumerate(draws_of(setting, label, n, draws)):
                start = time.perf_counter()
                score = method(setting.head, setting.memory, new.train[picked], np.random.default_rng([3, place, draw]))
                seconds.append(time.perf_counter() - start)
                old, mine = score(setting.test).argmax(axis=1), score(new.test).argmax(axis=1)
                outcomes.append(outcome(setting.test_ids, setting.before, old, mine, len(setting.head.labels)))
        found[name] = _row(outcomes, seconds)
        note(f"  {name}: recall {100 * found[name]['figures']['recall']['mean']:.1f}")
    return found


def finetune(setting: Setting, checkpoint: Path, n: int, labels: int) -> dict[str, Any]:
    """Fine-tune the whole model on the examples, for a few labels only because it is slow."""
    outcomes, seconds = [], []
    for label in list(setting.new)[:labels]:
        new = setting.new[label]
        examples = tuple(new.train_texts[i] for i in draws_of(setting, label, n, 1)[0])
        answers, spent = fine_tune_everything(checkpoint, examples, setting.test_texts + new.test_texts, seed=0)
        old, mine = np.split(answers, [len(setting.test)])
        outcomes.append(outcome(setting.test_ids, setting.before, old, mine, len(setting.head.labels)))
        seconds.append(spent)
        note(f"  whole model, {label}: {spent:.0f} s, old accuracy {100 * outcomes[-1].change:+.1f}")
    return {"random row, everything fine-tuned": _row(outcomes, seconds)}


def libraries(
    setting: Setting, checkpoint: Path, cache: Path, n: int, budgets: dict[str, tuple[int, int]], sequences: int
) -> dict[str, Any]:
    """Measure libraries from PyPI, each on the numbers of labels and draws in ``budgets``, because they are slow.

    ``sequences`` is the number of orders in which all labels are added one after another.
    """
    found = {}
    for library, (labels, draws) in budgets.items():
        note(f"  {library} {LIBRARIES[library]}")
        answers = run_library(
            library, checkpoint, setting, cache, examples=n, draws=draws, labels=labels, sequences=sequences
        )
        found[f"{library} {LIBRARIES[library]}"] = answers if "failed" in answers else _library_row(setting, answers)
    return found


def _library_row(setting: Setting, answers: dict[str, Any]) -> dict[str, Any]:
    place = {label: i for i, label in enumerate((*setting.head.labels, *setting.new))}

    def ids(labels: list[str]) -> NDArray[np.int64]:
        return np.array([place[label] for label in labels], np.int64)

    # A library with a classifier of its own is compared with its own answers before the addition, others with ours.
    before = ids(answers["before"]) if "before" in answers else setting.before
    outcomes = [
        outcome(setting.test_ids, before, ids(add["old"]), ids(add["new"]), place[add["label"]])
        for add in answers["adds"]
    ]
    row = _row(outcomes, [add["seconds"] for add in answers["adds"]])
    row["old accuracy before"] = float((before == setting.test_ids).mean())
    if answers.get("sequences"):
        split, runs = len(setting.test), answers["sequences"]
        right = np.array([ids(run["answers"]) == setting.everything_ids for run in runs])
        parts = {"all": right, "old": right[:, :split], "new": right[:, split:]}
        row["sequential"] = {
            "runs": len(runs),
            "accuracy": {name: spread(part.mean(axis=1).tolist()) for name, part in parts.items()},
            "seconds": spread([seconds for run in runs for seconds in run["seconds"]]),
        }
    row["details"] = {name: value for name, value in answers.items() if isinstance(value, (int, float))}
    return row


def _row(outcomes: list[Outcome], seconds: list[float]) -> dict[str, Any]:
    return {"patches": len(outcomes), "figures": summary(outcomes), "seconds": float(np.median(seconds))}
