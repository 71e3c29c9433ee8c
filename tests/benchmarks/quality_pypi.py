"""Runs third-party libraries unmodified, in an environment of their own.

The environment sees the packages of the running one, so it uses the same build of torch. What the libraries need beyond
those is installed with ``--no-deps``, so that nothing can pull in another torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.benchmarks.quality_data import draws_of, note, sequence_of

if TYPE_CHECKING:
    from tests.benchmarks.quality_data import Setting

__all__ = ["LIBRARIES", "run_library"]

LIBRARIES = {"adaptive-classifier": "0.3.1", "setfit": "1.2.0"}
# With numpy 1 (nvidia-pytriton requires it), the last pandas that still supports it.
_PANDAS = "pandas" if int(np.__version__.split(".")[0]) > 1 else "pandas<3"
_BESIDES: tuple[str, ...] = (
    "charset-normalizer",
    "cloudpickle",
    "datasets",
    "dill",
    "evaluate",
    "faiss-cpu",
    "joblib",
    "multiprocess",
    "narwhals",
    _PANDAS,
    "pyarrow",
    "python-dateutil",
    "pytz",
    "requests",
    "scikit-learn",
    "scipy",
    "sentence-transformers",
    "six",
    "threadpoolctl",
    "tqdm",
    "tzdata",
    "urllib3",
    "xxhash",
)
_PATIENCE_SECONDS = 3600


def run_library(
    library: str,
    checkpoint: Path,
    setting: Setting,
    cache: Path,
    *,
    examples: int,
    draws: int,
    labels: int | None,
    sequences: int,
) -> dict[str, Any]:
    """Run one library on a job; ``quality_worker.py`` describes the job.

    Returns the worker's document, or ``{"failed": reason}`` with the last line that it wrote to stderr.
    """
    try:
        python = _environment(cache / "libraries")
        folder = cache / f"job-{library}"
        _write_job(folder, library, checkpoint, setting, examples, draws, labels, sequences)
        worker = Path(__file__).with_name("quality_worker.py")
        return _run([str(python), str(worker), str(folder)], folder / "answers.json")
    except subprocess.CalledProcessError as error:
        said = [line for line in str(error.stderr or "").strip().splitlines() if line.strip()]
        return {"failed": said[-1] if said else f"ended with {error.returncode}"}
    except subprocess.TimeoutExpired:
        return {"failed": f"did not finish in {_PATIENCE_SECONDS} s"}


def _environment(folder: Path) -> Path:
    """The environment's Python; the first call creates the environment."""
    python = folder / "bin" / "python"
    wanted = [*(f"{name}=={version}" for name, version in LIBRARIES.items()), *_BESIDES]
    stamp = folder / "installed.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return python
    note(f"installing {', '.join(LIBRARIES)} into {folder}")
    venv.create(folder, with_pip=True, clear=True)
    purelib = sysconfig.get_path("purelib")
    inside = next(folder.glob("lib/python*/site-packages"))
    (inside / "running-environment.pth").write_text(f"{purelib}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", *wanted]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    stamp.write_text(json.dumps(wanted))
    return python


def _write_job(
    folder: Path,
    library: str,
    checkpoint: Path,
    setting: Setting,
    examples: int,
    draws: int,
    labels: int | None,
    sequences: int,
) -> None:
    """Write everything that the worker needs to one JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.json").unlink(missing_ok=True)
    texts = [*setting.train_texts, *setting.test_texts]
    for label in setting.new.values():
        texts += [*label.train_texts, *label.test_texts]
    adds = [
        {"label": label, "draw": draw, "texts": [setting.new[label].train_texts[i] for i in picked]}
        for label in list(setting.new)[:labels]
        for draw, picked in enumerate(draws_of(setting, label, examples, draws))
    ]
    job = {
        "library": library,
        "checkpoint": str(checkpoint.resolve()),
        "labels": list(setting.head.labels),
        "embedded": texts,
        "train": {"texts": setting.train_texts, "ids": setting.train_ids.tolist()},
        "test": {"texts": setting.test_texts},
        "new_test": {label: new.test_texts for label, new in setting.new.items()},
        "adds": adds,
        "sequences": [each for draw in range(sequences) if (each := _sequence(setting, examples, draw))],
    }
    (folder / "job.json").write_text(json.dumps(job))


def _sequence(setting: Setting, examples: int, draw: int) -> list[dict[str, Any]]:
    return [
        {"label": label, "texts": [setting.new[label].train_texts[i] for i in picked]}
        for label, picked in sequence_of(setting, examples, draw)
    ]


def _run(command: list[str], answers: Path) -> dict[str, Any]:
    """Run the worker; pass its progress on to stderr, and keep its own stderr to report a failure."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = answers.with_name("worker.log")
    with log.open("w") as said:
        done = subprocess.run(
            command,
            env={**os.environ, **offline},
            stdout=sys.stderr,
            stderr=said,
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, stderr=log.read_text(errors="replace"))
    document: dict[str, Any] = json.loads(answers.read_text())
    return document
