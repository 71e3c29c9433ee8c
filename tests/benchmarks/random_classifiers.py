"""Takes random synthetic classifiers through additions and removals of labels, and checks invariants after each step.

    python tests/benchmarks/random_classifiers.py [--count 2000] [--seed 0]

Their labels, widths, scales and spreads vary, and include cases that are rare in practice: features that never vary, a
mean far from zero, a label with a single sentence, sentences that are all alike. Labels are added, with each method,
and removed. After each step:

* nothing is raised but patcher's own errors, and numpy emits no warnings;
* a patch with the default method leaves all old rows bit-identical;
* a new row gives a sentence about the same logit from exact features and from features rounded to FP16 as in a memory;
* no more old inputs flip than the gate says, counted again here in plain numpy;
* onnxruntime's answer from the head's ONNX file equals what numpy computes from its rows, score included.

Prints the results as JSON. Exits with 1 if a rule was broken, and names the seed that reproduces it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.errors import PatcherError
from patcher.fit import fit
from patcher.fit.scope import fit_scope
from patcher.gate import judge
from patcher.head import Head
from patcher.head_file import write_head
from patcher.limits import MAX_FLIPS
from patcher.memory import Memory
from patcher.runtime import check_head_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_CLOSE = 1e-9
_MOVED = 2.0
"""How far rounded features may move a new label's logits, plus a hundredth of the largest logit."""
RESULTS = Path(__file__).parent / "results" / "random_classifiers.json"


class BrokenRule(Exception):
    """An invariant does not hold."""


@dataclass(frozen=True)
class World:
    """The distribution of the features of synthetic labels' sentences."""

    rng: np.random.Generator
    split: int
    centres: Floats
    away: float
    spread: float
    dead: NDArray[np.bool_]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> World:
        """Draw four to nine labels; the classifier does not know the last two yet."""
        split = int(rng.choice([4, 16, 32]))
        width = split * int(rng.choice([1, 2, 2]))
        scale = 10.0 ** rng.integers(-3, 2)
        centres = scale * rng.standard_normal((int(rng.integers(4, 10)), width))
        away = scale * float(rng.choice([0, 0, 1, 30]))
        spread = scale * 10.0 ** rng.integers(-5, 1)
        return cls(rng, split, centres.astype(np.float32), away, spread, rng.random(width) < rng.choice([0, 0, 0.3]))

    def sentences(self, label: int, count: int) -> Floats:
        """Draw ``count`` sentences of a label; features float32 ``[count, width]``."""
        rows = self.away + self.centres[label] + self.spread * self.rng.standard_normal((count, len(self.dead)))
        rows[:, self.dead] = self.away
        if self.rng.random() < 0.1:
            rows[:] = rows[0]
        return rows.astype(np.float32)


@dataclass(frozen=True)
class Classifier:
    """A head with its score, its memory, and all sentences that these were made from."""

    head: Head
    memory: Memory
    sentences: Floats

    @classmethod
    def draw(cls, world: World) -> Classifier:
        """Draw a classifier whose rows point at its labels' means, as those of trained ones do."""
        rng, known = world.rng, len(world.centres) - 2
        labels = [f"label {i}" for i in range(known)]
        each = int(rng.choice([1, 2, 3, 10, 40]))
        features = np.concatenate([world.sentences(i, each) for i in range(known)])
        ids = np.repeat(np.arange(known), each)
        memory = Memory.build(features, ids, labels, world.split, per_label=int(rng.choice([0, 2, 20])))
        means = memory.means()[:, : world.split]
        weight = (10.0 * means / max(float((means**2).sum(axis=1).mean()), 1e-9)).astype(np.float32)
        problem = str(rng.choice(["single_label", "single_label", "multi_label"]))
        bias = np.zeros(known, np.float32)
        head = Head.from_linear(labels, weight, bias, features.shape[1], "f" * 64, problem=problem)
        return cls(head, memory, features).scored()

    def scored(self) -> Classifier:
        """The classifier with its out-of-scope score fitted anew."""
        return dataclasses.replace(self, head=dataclasses.replace(self.head, scope=fit_scope(self.memory, self.head)))

    def without(self, label: str) -> Classifier:
        """The classifier with a label removed."""
        return dataclasses.replace(self, head=self.head.without(label), memory=self.memory.remove(label)).scored()

    def patched(self, examples: Mapping[str, Floats], method: str) -> Classifier:
        """The classifier with new labels added; checks the invariants of a patch."""
        made = fit(examples, self.head, self.memory, method=method)
        verdict = judge(self.head, made, examples, self.memory)
        head = made.apply(self.head)
        if method == "auto":
            changed = [old for old, bits in self.head.rows_hash().items() if head.rows_hash()[old] != bits]
            if changed:
                raise BrokenRule(f"the old rows of {changed} changed")
        if verdict.flips is not None:
            least = _flips(self, head, np.concatenate(list(examples.values())))
            if verdict.flips < least - _CLOSE:
                raise BrokenRule(f"the gate counts flips of {verdict.flips}, and there are {least}")
            if method == "auto" and verdict.flips > MAX_FLIPS + _CLOSE:
                raise BrokenRule(f"{verdict.flips} of the inputs flip, and {MAX_FLIPS} were to")
        true, rounded = (
            head.logits(rows)[:, -len(examples) :]
            for rows in (self.sentences, self.sentences.astype(np.float16).astype(np.float32))
        )
        if (moved := float(np.abs(rounded - true).max())) > _MOVED + 0.01 * float(np.abs(true).max()):
            raise BrokenRule(f"FP16 moves the new logits by {moved}, and the largest is {np.abs(true).max()}")
        ids = np.repeat(np.arange(len(examples)), [len(rows) for rows in examples.values()])
        memory = self.memory.add(tuple(examples), np.concatenate(list(examples.values())), ids)
        return dataclasses.replace(self, head=head, memory=memory).scored()

    def check(self, rows: Floats) -> None:
        """Check that the head's file answers as the head does."""
        check_head_file(write_head(self.head), self.head, rows)


def _flips(before: Classifier, after: Head, examples: Floats) -> float:
    """The weighted share of remembered sentences that flip, as a lower bound.

    It leaves out sentences whose logits tie up to rounding. With sigmoids, a sentence flips if it gets a new label,
    unless it is one of that patch's examples.
    """
    memory = before.memory
    rows = memory.sample.astype(np.float32)
    weights = (memory.counts / np.bincount(memory.sample_labels, minlength=len(memory.labels)))[memory.sample_labels]
    if before.head.problem == "multi_label":
        theirs = {row.tobytes() for row in examples.astype(np.float16)}
        rows = np.unique(np.stack([row for row in memory.sample if row.tobytes() not in theirs] or [rows[0]]), axis=0)
        rows = rows.astype(np.float32)
        margin = -after.logits(rows)[:, len(before.head.labels) :].max(axis=1)
        sure, weights = np.ones(len(rows), np.bool_), np.ones(len(rows))
    else:
        place = [before.head.labels.index(label) for label in memory.labels]
        ids = np.array(place)[memory.sample_labels]
        margin = _lead(after.logits(rows), ids)
        sure = _lead(before.head.logits(rows), ids) > before.head.rounding(rows).max(axis=1)
    lost = sure & (margin < -after.rounding(rows).max(axis=1))
    return float(weights[lost].sum() / weights.sum())


def _lead(logits: Floats, ids: NDArray[np.int64]) -> Floats:
    """Margin of each row's own label over the best other one."""
    others = logits.copy()
    others[np.arange(len(ids)), ids] = -np.inf
    lead: Floats = logits[np.arange(len(ids)), ids] - others.max(axis=1)
    return lead


def live(seed: int) -> list[str]:
    """Take one classifier through a few steps; return what was done or refused.

    Raises BrokenRule, or any unexpected exception of the code under test.
    """
    rng = np.random.default_rng(seed)
    world = World.draw(rng)
    classifier = Classifier.draw(world)
    unlike = rng.standard_normal((3, classifier.head.width)).astype(np.float32)
    done = []
    for step in range(int(rng.integers(1, 4))):
        try:
            if len(classifier.head.labels) > 2 and rng.random() < 0.4:
                classifier = classifier.without(str(rng.choice(classifier.head.labels)))
                done.append("removed")
            else:
                single = classifier.head.problem == "single_label"
                method = str(rng.choice(["auto", "ridge", "lda"])) if single else "auto"
                examples = {
                    f"new {step}.{place}": world.sentences(-1 - place, int(rng.choice([1, 2, 5, 10])))
                    for place in range(int(rng.choice([1, 1, 2])))
                }
                classifier = classifier.patched(examples, method)
                done.append(f"{len(examples)} added by {method}")
        except PatcherError as error:
            done.append(f"{type(error).__name__}: {str(error)[:60]}")
        classifier.check(np.concatenate([classifier.sentences[:3], unlike]))
    return done


def run(seeds: Sequence[int]) -> dict[str, Any]:
    """Run many seeds; count what was done, and list what broke."""
    done: collections.Counter[str] = collections.Counter()
    broken: dict[int, str] = {}
    started = time.perf_counter()
    for seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                done.update(live(seed))
            except Exception as error:  # noqa: BLE001  any exception is a finding
                broken[seed] = f"{type(error).__name__}: {error}"
    return {"classifiers": len(seeds), "steps": dict(done), "broken": broken, "seconds": time.perf_counter() - started}


def main() -> int:
    """Run the requested number of seeds and print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first classifier; each further one has the next"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    found = run(range(asked.seed, asked.seed + asked.count))
    found["seconds"] = round(found["seconds"])
    asked.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return int(bool(found["broken"]))


if __name__ == "__main__":
    sys.exit(main())
