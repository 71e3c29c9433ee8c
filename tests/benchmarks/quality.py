"""Compares the accuracy of patched classifiers with the usual ways to add one label from a few examples.

    python tests/benchmarks/quality.py --checkpoint DIR --data DIR
    python tests/benchmarks/quality.py --checkpoint DIR --train FILE --test FILE [--outside FILE]

``--checkpoint`` is a fine-tuned ``*ForSequenceClassification`` folder. Labels in the data that it does not know are the
new ones. ``--data`` holds ``base_train.csv``, ``base_test.csv``, ``new_train.csv``, ``new_test.csv`` and, optionally,
texts of no label in ``oos_test.csv``. Without arguments the demo's data is used, with a checkpoint made by
``tests/demo/finetune.py``; its two new labels are too few for conclusions, but every figure is computed.

Features are computed once, with patcher's own export and encoder, and cached below ``--cache``. Writes NAME.json,
NAME.md and NAME.png to ``--out``; parts that are not run again keep their previous results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks import quality_data as data
from tests.benchmarks import quality_life as life
from tests.benchmarks import quality_others as others
from tests.benchmarks import quality_ours as ours
from tests.benchmarks.quality_data import note
from tests.benchmarks.quality_plot import plot
from tests.benchmarks.quality_report import markdown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.benchmarks.quality_data import Setting

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tests" / "demo"
PARTS = (
    "baselines", "ours", "sequential", "many", "multi_label", "merges", "bound", "scope", "speed", "finetune",
    "libraries",
)  # fmt: skip
EXAMPLES = 10
DRAWS = 5
BOUND_PATCHES = 200
SEQUENCES = 5
FINETUNED_LABELS = 5
LIBRARY_BUDGETS = {"adaptive-classifier": (10, 1), "setfit": (10, 1)}
"""Numbers of labels and draws per library, limited because a patch takes from seconds to minutes."""


def parts(
    setting: Setting, checkpoint: Path, cache: Path, draws: int, libraries: Sequence[str]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """The parts that can be run, cheapest first."""
    bound_draws = -(-BOUND_PATCHES // (len(ours.BUDGETS) * len(setting.new))) if draws >= DRAWS else draws
    budgets = {
        name: (labels, min(most, draws)) for name, (labels, most) in LIBRARY_BUDGETS.items() if name in libraries
    }
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "speed": ours.speed,
        "ours": lambda: {
            "counts": ours.one_label(setting, draws),
            "methods": ours.methods(setting, EXAMPLES, draws),
        },
        "sequential": lambda: ours.sequential(setting, EXAMPLES, min(SEQUENCES, draws)),
        "many": lambda: life.many_labels(setting, EXAMPLES),
        "multi_label": lambda: life.sigmoids(setting, EXAMPLES, draws),
        "merges": lambda: life.merges(setting),
        "bound": lambda: ours.bound(setting, EXAMPLES, bound_draws),
        "scope": lambda: ours.scope(setting, EXAMPLES),
        "baselines": lambda: others.baselines(setting, EXAMPLES, draws),
        "finetune": lambda: others.finetune(setting, checkpoint, EXAMPLES, FINETUNED_LABELS),
        "libraries": lambda: others.libraries(setting, checkpoint, cache, EXAMPLES, budgets, min(SEQUENCES, draws)),
    }
    if not len(setting.outside):
        del work["scope"]
    return work


def about(setting: Setting, checkpoint: Path, plot_name: str) -> dict[str, Any]:
    """Describe the data, the settings and the machine of the measurement."""
    return {
        "data": setting.name,
        "checkpoint": checkpoint.name,
        "old labels": len(setting.head.labels),
        "new labels": len(setting.new),
        "old test texts": len(setting.test),
        "old accuracy": float((setting.before == setting.test_ids).mean()),
        "examples": EXAMPLES,
        "python": platform.python_version(),
        "processor": _processor(),
        "load": round(os.getloadavg()[0], 1),
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "date": date.today().isoformat(),  # noqa: DTZ011  the local date is meant
        "plot": plot_name,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].split(":", 1)[1].strip() if names else platform.machine()


def demo_checkpoint(folder: Path) -> Path:
    """The demo's checkpoint; the first call fine-tunes it, which takes some minutes."""
    if not (folder / "config.json").is_file():
        note(f"fine-tuning the demo's checkpoint into {folder}")
        subprocess.run([sys.executable, DEMO / "finetune.py", folder], check=True, stdout=sys.stderr)
    return folder


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a fine-tuned classifier; by default the demo's")
    parser.add_argument("--data", type=Path, help="a folder of CSV files; by default the demo's")
    parser.add_argument("--train", type=Path, help="instead of --data: texts labelled with old and new labels")
    parser.add_argument("--test", type=Path, help="the same kind of texts, to measure on")
    parser.add_argument("--outside", type=Path, help="texts that belong to no label")
    parser.add_argument("--only", default=",".join(PARTS), help=f"comma-separated parts to run, of {','.join(PARTS)}")
    parser.add_argument("--libraries", default=",".join(LIBRARY_BUDGETS), help="which libraries from PyPI to run")
    parser.add_argument("--draws", type=int, default=DRAWS, help="how often to draw examples for each new label")
    parser.add_argument("--labels", type=int, help="maximum number of new labels")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "benchmarks" / "results")
    parser.add_argument(
        "--name", help="name for the results; by default `quality`, or `quality-demo` for the demo's data"
    )
    given = parser.parse_args()
    unknown = set(given.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--only {','.join(sorted(unknown))}: expected some of {','.join(PARTS)}")
    if bool(given.train) != bool(given.test) or (given.train and given.data):
        parser.error("expected --data DIR, or --train FILE and --test FILE together")
    if (given.data or given.train) and not given.checkpoint:
        parser.error("--checkpoint: expected the classifier that was fine-tuned on the old labels of this data")
    return given


def main() -> None:
    """Run the requested parts and write the results."""
    given = arguments()
    own = given.data or given.train
    name = given.name or ("quality" if own else "quality-demo")
    checkpoint = given.checkpoint or demo_checkpoint(given.cache / "demo-checkpoint")
    if given.train:
        corpus = data.read_pair(given.train, given.test, given.outside)
    else:
        corpus = data.read_folder(given.data or DEMO / "data")
    setting = data.load(checkpoint, corpus, given.cache).limited(EXAMPLES, given.labels)
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"about": about(setting, checkpoint, f"{name}.png")}
    results |= _kept(given.out / f"{name}.json", results["about"])
    work = parts(setting, checkpoint, given.cache, given.draws, given.libraries.split(","))
    for part in PARTS:
        if part in work and part in given.only.split(","):
            start = time.perf_counter()
            note(f"{part} …")
            earlier = results.get(part, {}) if part == "libraries" else {}  # keep results of libraries not run again
            results[part] = earlier | work[part]()
            note(f"{part}: {time.perf_counter() - start:.0f} s")
            (given.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    (given.out / f"{name}.md").write_text(text)
    if "ours" in results:
        plot(results, given.out / f"{name}.png")
    print(text)


def _kept(path: Path, about_now: dict[str, Any]) -> dict[str, Any]:
    """Results of an earlier run on the same data, checkpoint and labels."""
    if not path.is_file():
        return {}
    earlier: dict[str, Any] = json.loads(path.read_text())
    same = ("data", "checkpoint", "old labels", "new labels", "old test texts", "examples", "old accuracy")
    if any(earlier["about"].get(key) != about_now[key] for key in same):
        return {}
    return {part: found for part, found in earlier.items() if part != "about"}


if __name__ == "__main__":
    main()
