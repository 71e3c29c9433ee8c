"""Measures very many classifiers on one backbone in one server: memory per head, time to add one, throughput.

    python tests/benchmarks/many.py [--heads 1000] [--rounds 5] [--repo DIR --backbone NAME]

Puts heads of 150 labels into a backbone's head store through a live server; each is published, loaded and verified as
``patcher new-classifier --in-store`` does it. Then, in one run, it measures:

- memory: the proportional set size of tritonserver and its stubs, before the heads and after each has answered;
- adding: a second server holds nine heads; heads are added to both alternately, the 10th and 1,000th and those after;
- throughput by perf_analyzer in alternating rounds: one stored head, all stored heads in rotation, and one head with
  an ensemble and a process of its own;
- for comparison, memory and adding time of a few classifiers with an ensemble and a process each.

Without ``--repo`` the backbone is a generated one of 384 features that costs next to nothing, so that the ratios show
the cost of the store alone. With ``--repo`` it is a copy of a real one, and the heads are as wide as its features.
Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

from patcher import ModelRepository
from patcher.fit.scope import fit_scope
from patcher.fit.whole_head import fit_head
from patcher.founding import publish_new
from patcher.head import Head
from patcher.loadtest import load_test
from patcher.measurement import Load, compare
from patcher.memory import Memory
from patcher.remembering import STORED_CLUSTERS
from patcher.triton.server import EmbeddedTriton

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from patcher.backbone import Backbone
    from patcher.triton.client import TritonServer

LABELS = 150
PER_LABEL = 60
"""Enough for ten clusters, if a head may have that many."""
LEVELS = (1, 4, 16)
FEW = 9


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def held_mb(pid: int) -> float:
    """Proportional set size of a server and its stubs, in MiB."""
    root, total = psutil.Process(pid), 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total / 2**20


def small_backbone(root: Path) -> Backbone:
    """A repository whose backbone gives 384 features and consists of an embedding and one small matrix product."""
    tiny.WIDTH, tiny.SPLIT = 384, 192
    root.parent.mkdir(parents=True, exist_ok=True)
    repository = ModelRepository.create(root)
    with repository.lock():
        repository.add_backbone("small", tiny.backbone_files(root.parent))
    return repository.backbone("small")


def heads(base: Backbone, seed: int = 0) -> Iterator[tuple[Head, Memory]]:
    """An endless series of different heads of 150 labels, with memory and scope like a fitted head's."""
    rng = np.random.default_rng(seed)
    width, labels = base.width(), [f"label_{number:03d}" for number in range(LABELS)]
    centers = rng.standard_normal((LABELS, width))
    rows = (centers.repeat(PER_LABEL, axis=0) + rng.standard_normal((LABELS * PER_LABEL, width))).astype(np.float32)
    ids = np.arange(LABELS).repeat(PER_LABEL)
    memory = Memory.build(rows, ids, labels, width, per_label=5, most_clusters=STORED_CLUSTERS)
    first = Head.from_linear(
        labels, centers.astype(np.float32), np.zeros(LABELS, np.float32), width, base.fingerprint()
    )
    first = dataclasses.replace(first, scope=fit_scope(memory, first))
    while True:
        order = rng.permutation(LABELS)
        yield dataclasses.replace(first, base_weight=first.base_weight[order]), memory


def fit_seconds(width: int) -> float:
    """Seconds to fit 150 labels on ten inputs each, which `patcher new-classifier` does before it adds a head."""
    rng = np.random.default_rng(1)
    ids = np.arange(LABELS).repeat(10)
    rows = rng.standard_normal((LABELS, width))[ids] + rng.standard_normal((len(ids), width))
    start = time.perf_counter()
    fit_head(rows.astype(np.float32), ids, LABELS)
    return time.perf_counter() - start


class Filled:
    """A server with a head store, to add heads to and ask them."""

    def __init__(self, base: Backbone, triton: EmbeddedTriton, server: TritonServer) -> None:
        self.base, self.triton, self.server = base, triton, server
        self.made = heads(base)
        self.names: list[str] = []

    def add(self, *, in_store: bool = True) -> float:
        """Add one more head; return the seconds until its answer is verified."""
        head, memory = next(self.made)
        name = f"head-{len(self.names):04d}" if in_store else f"own-{time.monotonic_ns()}"
        start = time.perf_counter()
        publish_new(self.base, name, head, memory, self.server, in_store=in_store)
        seconds = time.perf_counter() - start
        if in_store:
            self.names.append(name)
        else:
            self.own = name
        return seconds

    def held(self) -> float:
        """Memory held now, in MiB."""
        return held_mb(self.triton.pid or 0)

    def ask(self, names: Sequence[str]) -> list[float]:
        """Ask each head once; return the seconds each answer took."""
        found = []
        for name in names:
            start = time.perf_counter()
            self.server.classify(f"{self.base.any_model}/{name}", ["is my card there?"])
            found.append(time.perf_counter() - start)
        return found


@contextlib.contextmanager
def serving(base: Backbone, log: Path) -> Iterator[Filled]:
    """Serve the repository, with a store in which one head has already answered."""
    with EmbeddedTriton(base.root, [base.features_model], log_file=log) as triton, triton.client() as server:
        filled = Filled(base, triton, server)
        filled.add()
        yield filled


def throughput(filled: Filled, rounds: int, window: float) -> list[dict[str, Any]]:
    """Measure one stored head, all stored heads, and a head with its own process, in alternating rounds."""
    ensemble, names = filled.base.any_model, filled.names
    texts = [text for label in (*tiny.OLD, *tiny.NEW) for text in tiny.sentences(label, 40, seed=5)]
    order = np.random.default_rng(0).permutation(len(names)).tolist()
    one, spread, own = f"{ensemble}/{names[0]}", f"{ensemble}/*", filled.own
    rows = [
        {"text": [texts[turn % len(texts)]], "classifier": [names[order[turn % len(names)]]]}
        for turn in range(max(2 * len(names), len(texts)))
    ]
    loads = [Load(concurrency=level) for level in LEVELS]
    found = load_test(
        filled.server,
        [one, spread, own],
        texts,
        loads,
        window=window,
        rounds=rounds,
        inputs={spread: rows},
        progress=tell,
    )
    words = {one: "one stored head", spread: f"{len(names)} stored heads", own: "one head with its own process"}
    ratios = {
        (against, each.load): each for against in (one, own) for each in compare(found, against) if each.model == spread
    }
    table = []
    for load in loads:
        for model, what in words.items():
            mine = [each for each in found if (each.model, each.load) == (model, load)]
            row = {"what": what, "concurrency": load.concurrency}
            row["texts_per_s"] = round(statistics.median(each.throughput for each in mine), 1)
            row["p50_ms"] = round(statistics.median(each.p50_us for each in mine) / 1000, 2)
            row["failures"] = sum(each.failures for each in mine)
            if model == spread:
                for name, against in (("of_one", one), ("of_own", own)):
                    ratio = ratios[against, load]
                    row[name] = [round(value, 3) for value in (ratio.ratio, ratio.low, ratio.high)]
            table.append(row)
    return table


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all measurements."""
    bases = []
    for name in ("many", "few"):
        root = folder / name / "model_repository"
        if options.repo:
            root.parent.mkdir()
            shutil.copytree(options.repo, root)
            bases.append(ModelRepository(root).backbone(options.backbone))
        else:
            bases.append(small_backbone(root))
    found: dict[str, Any] = {"heads": options.heads, "labels": LABELS, "features": bases[0].width()}
    found["fit_s"] = fit_seconds(bases[0].width())
    with serving(bases[0], folder / "many.log") as many:
        empty = many.held()
        while len(many.names) < options.heads - 1:
            many.add()
            if len(many.names) % 100 == 0:
                tell(f"{len(many.names)} heads")
        many.ask(many.names)
        full = many.held()
        found["memory"] = {"one_head_mb": empty, "all_mb": full, "a_head_mb": (full - empty) / (len(many.names) - 1)}
        with serving(bases[1], folder / "few.log") as few:
            while len(few.names) < FEW:
                few.add()
            pairs = []
            for turn in range(options.adds):  # alternate which goes first, because of disk caches
                order = (few, many) if turn % 2 else (many, few)
                seconds = {id(filled): filled.add() for filled in order}
                pairs.append((seconds[id(few)], seconds[id(many)]))
        found["adding"] = {
            "the_10th_s": statistics.median(pair[0] for pair in pairs),
            f"number_{options.heads}_s": statistics.median(pair[1] for pair in pairs),
            "ratio": statistics.median(pair[1] / pair[0] for pair in pairs),
            "pairs": pairs,
        }
        before = many.held()
        adds = [many.add(in_store=False) for _ in range(options.own)]
        found["own"] = {
            "number": options.own,
            "add_s": statistics.median(adds),
            "a_head_mb": (many.held() - before) / options.own,
        }
        found["throughput"] = throughput(many, options.rounds, options.window)
        names = list(many.names)
    start = time.perf_counter()
    models = [bases[0].features_model, bases[0].any_model]
    with EmbeddedTriton(bases[0].root, models, log_file=folder / "again.log") as triton, triton.client() as server:
        ready = time.perf_counter() - start
        again = Filled(bases[0], triton, server)
        first, second = again.ask(names), again.ask(names)
        found["restart"] = {
            "ready_s": ready,
            "first_answer_ms": 1000 * statistics.median(first),
            "next_answer_ms": 1000 * statistics.median(second),
        }
    return found


def render(found: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    memory, adding, own, restart = (found[name] for name in ("memory", "adding", "own", "restart"))
    last = next(value for name, value in adding.items() if name.startswith("number_"))
    lines = [
        f"{found['heads']} heads of {found['labels']} labels on {found['features']} features in one store",
        "",
        "| | store | an ensemble and a process each |",
        "| --- | --- | --- |",
        f"| server memory a head | {memory['a_head_mb']:.2f} MiB | {own['a_head_mb']:.0f} MiB |",
        f"| adding the 10th | {adding['the_10th_s']:.3f} s | {own['add_s']:.2f} s |",
        f"| adding the {found['heads']:,}th (ratio pair by pair {adding['ratio']:.2f}) | {last:.3f} s | |",
        f"| the fit before that, ten texts a label | {found['fit_s']:.1f} s | the same |",
        f"| server's start to ready with all | {restart['ready_s']:.1f} s | |",
        f"| first answer of a head after that, ms | {restart['first_answer_ms']:.1f} | |",
        f"| each further one, ms | {restart['next_answer_ms']:.1f} | |",
        "",
        "| traffic | concurrency | texts/s | p50 ms | of one stored head's (lowest, highest) | of an own process's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["throughput"]:
        ratios = ["{:.2f} ({:.2f}, {:.2f})".format(*row[name]) if name in row else "" for name in ("of_one", "of_own")]
        figures = (row["what"], row["concurrency"], row["texts_per_s"], row["p50_ms"], *ratios)
        lines.append("| " + " | ".join(map(str, figures)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=1000)
    parser.add_argument("--adds", type=int, default=30, help="heads added to the two servers alternately")
    parser.add_argument("--own", type=int, default=5, help="classifiers that each have an ensemble and a process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=1.5)
    parser.add_argument("--repo", type=Path, help="repository whose backbone to use")
    parser.add_argument("--backbone", help="which backbone, if it has several")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "many.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="patcher-many-") as name:
        found = run(options, Path(name))
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(render(found))


if __name__ == "__main__":
    main()
