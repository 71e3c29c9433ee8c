"""Find the serving settings that are fastest on this machine, by trying them.

A server runs on a copy of the parts of the repository that it needs. Settings are varied one after the other. Each
candidate is measured alternately with the best so far and has to win clearly, since on a busy machine a single figure
says little. Only the final result is written to the repository.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patcher.configs import PADDING_SLACK, asked_by
from patcher.errors import InputError, ServerError
from patcher.loadtest import load_test
from patcher.measurement import Load
from patcher.model_config import MAX_BATCH_SIZE, parse
from patcher.names import MODEL
from patcher.repository import ModelRepository
from patcher.scratch import scratch
from patcher.serve import require_gpu
from patcher.serving import Serving, serving_of, with_response_cache, with_serving
from patcher.storage.disk import storage_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from patcher.classifier import Classifier
    from patcher.triton.client import TritonServer

__all__ = ["Trial", "Tuning", "candidates", "tune"]

_WIN = 1.03
"""The ratio to the best throughput that a candidate must reach: less is noise, and not worth a change."""
_TURNS = 2
_WINDOW = 0.5


@dataclass(frozen=True)
class Trial:
    """A candidate and the ratio of its throughput to the best before it; None if the server would not load it."""

    serving: Serving
    ratio: float | None
    chosen: bool


@dataclass(frozen=True)
class Tuning:
    """What was tried, and what won.

    ``gain`` is the ratio of the winner's throughput to that of the previous settings. ``written`` says whether any
    configuration was changed, even if only its response cache.
    """

    before: Serving
    best: Serving
    gain: float
    throughput: float
    concurrency: int
    seconds: float
    trials: tuple[Trial, ...]
    written: bool

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)


def candidates(best: Serving, cores: int) -> Generator[tuple[str, list[Serving]], Serving, None]:
    """Groups of candidates by what they vary: sessions and threads first, which matter most, then delay, slack, batch.

    This is a generator: each group is based on the ``best`` sent in after the previous one.
    """
    counts = [count for count in (1, 2, 4, 8) if count <= cores]
    layouts = [(1, 0), *((count, cores // count) for count in counts if count > 1), (1, max(cores - 1, 1))]
    groups: tuple[tuple[str, list[dict[str, int]]], ...] = (
        ("instances and threads", [{"instances": count, "threads": threads} for count, threads in layouts]),
        ("delay_us", [{"delay_us": value} for value in (0, 500, 2000)]),
        ("slack", [{"slack": factor * (best.slack or PADDING_SLACK)} for factor in (0, 1, 4)]),
        ("batch", [{"batch": value} for value in (8, 16, MAX_BATCH_SIZE)]),
    )
    for name, changes in groups:
        found = [dataclasses.replace(best, **change) for change in changes]
        best = yield name, [each for each in dict.fromkeys(found) if each != best]


def tune(
    classifier: Classifier,
    texts: Sequence[str],
    *,
    seconds: float = 120.0,
    concurrency: int = 16,
    write: bool = True,
    response_cache: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> Tuning:
    """Find the best settings, and write them to the repository if they beat the previous ones and ``write`` is set.

    No trial begins after ``seconds`` of trying. ``response_cache`` switches Triton's cache for the features on or off;
    None leaves it as it is. During the trials it is off, since repeated texts would be answered from it.

    Raises
    ------
    InputError
        For a budget or a concurrency that is not positive, and without texts.
    ToolError, ServerError
        If no server or perf_analyzer is installed, or the server cannot serve the classifier as it is.
    """
    if seconds <= 0 or concurrency < 1 or not texts:
        raise InputError(f"{seconds:g} s at concurrency {concurrency} with {len(texts)} texts; expected more than none")
    from patcher.triton.server import EmbeddedTriton

    require_gpu(classifier.repository, [classifier.backbone_model])
    started = time.monotonic()
    if write:
        with classifier.repository.lock():  # if the repository is not writable, fail before all the work
            pass
    with scratch("patcher-tune-") as folder:
        root = folder / "model_repository"
        with storage_errors(root):
            copy = _copied(classifier, root)
        for model, text in _configs(copy, None, response_cache=False).items():
            (root / model / "config.pbtxt").write_text(text, encoding="utf-8")
        with (
            _log() as log,
            EmbeddedTriton(
                root,
                [copy.ensemble, copy.backbone_model],
                admin_key=secrets.token_hex(32),  # a key that no other process can look up
                log_file=log,
            ) as triton,
            triton.client() as server,
        ):
            search = _Search(copy, server, texts, concurrency, progress or (lambda _: None))
            before, best, trials = search.run(seconds)
            gain, throughput = search.versus(best, before) if best != before else (1.0, search.measure(before))
    if gain < 1.0:
        search.tell(f"the best gives {gain:.2f} of what there was before in a last comparison: it had won by chance")
        best, gain, throughput = before, 1.0, throughput / gain
    changed: dict[str, str] = {}
    if write:
        with classifier.repository.lock():
            changed = _configs(classifier, None if best == before else best, response_cache)
            classifier.repository.write_configs(changed)
    took = round(time.monotonic() - started, 1)
    return Tuning(before, best, gain, throughput, concurrency, took, tuple(trials), bool(changed))


@contextlib.contextmanager
def _log() -> Iterator[Path]:
    """A place for the server's log, which remains only after a ServerError: its message names the log."""
    folder, failed = Path(tempfile.mkdtemp(prefix="patcher-log-")), False
    try:
        yield folder / "triton.log"
    except ServerError:
        failed = True
        raise
    finally:
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)


def _copied(classifier: Classifier, root: Path) -> Classifier:
    """The classifier in a copy of its repository that holds only its serving head version, and no memories."""
    classifier.storage.copy_to(root, without=["*_head/[0-9]*"])
    copy = ModelRepository(root).classifier(classifier.name)
    # The version that the copy pins: the original's pin may have changed in the meantime.
    version = copy.serving()
    folder = root / copy.head_model / str(version)
    folder.mkdir()
    (folder / MODEL).write_bytes(classifier.head_bytes(version))
    return copy


def _configs(classifier: Classifier, serving: Serving | None, response_cache: bool | None = None) -> dict[str, str]:
    """The configurations of encoder and backbone that change, as text by model; None leaves a setting as it is."""
    models = (classifier.text_model, classifier.backbone_model)
    encoder, backbone = before = tuple(map(classifier.repository.config_text, models))
    if serving is not None:
        encoder, backbone = with_serving(encoder, backbone, serving)
    after = [encoder, backbone]
    cached = 0 if asked_by(parse(encoder)) else 1
    if response_cache is not None and parse(after[cached]).response_cache.enable != response_cache:
        after[cached] = with_response_cache(after[cached], enable=response_cache)
    pairs = zip(models, before, after, strict=True)
    return {model: new for model, old, new in pairs if old != new}


@dataclass
class _Search:
    """The search: applies settings to the server of the copy, and measures them."""

    classifier: Classifier
    server: TritonServer
    texts: Sequence[str]
    concurrency: int
    tell: Callable[[str], None]
    loaded: Serving | None = None

    def run(self, seconds: float) -> tuple[Serving, Serving, list[Trial]]:
        """The repository's settings, the best found within ``seconds``, and all trials."""
        repository = self.classifier.repository
        models = (self.classifier.text_model, self.classifier.backbone_model)
        before = best = self.loaded = serving_of(*(repository.config(model) for model in models))
        trials: list[Trial] = []
        self.tell(f"now: {before}")
        self.measure(before)  # warm
        deadline = time.monotonic() + seconds
        search = candidates(best, len(os.sched_getaffinity(0)))
        name, group = next(search)
        while True:
            for candidate in group:
                if time.monotonic() > deadline:
                    self.tell("the time is up")
                    return before, best, trials
                ratio = self._ratio(candidate, best)
                chosen = ratio is not None and ratio >= _WIN
                trials.append(Trial(candidate, ratio, chosen))
                said = "would not load" if ratio is None else f"{ratio:.2f} of the best so far"
                self.tell(f"{name}: {candidate} {said}{', the best now' if chosen else ''}")
                best = candidate if chosen else best
            try:
                name, group = search.send(best)
            except StopIteration:
                return before, best, trials

    def _ratio(self, candidate: Serving, best: Serving) -> float | None:
        try:
            return self.versus(candidate, best)[0]
        except ServerError as error:
            self.tell(str(error))
            return None

    def versus(self, candidate: Serving, best: Serving) -> tuple[float, float]:
        """Medians over alternating turns: the ratio of the candidate's throughput to the best's, and its throughput."""
        ratios, rates = [], []
        for turn in range(_TURNS):
            pair = (candidate, best) if turn % 2 else (best, candidate)  # the loaded one goes first, to save a reload
            found = {serving: self.measure(serving) for serving in pair}
            ratios.append(found[candidate] / found[best])
            rates.append(found[candidate])
        return statistics.median(ratios), statistics.median(rates)

    def measure(self, serving: Serving) -> float:
        """Throughput in texts per second under these settings."""
        if serving != self.loaded:
            self.loaded = None  # until everything is loaded: settings that fail to load leave the encoder unloaded
            changed = _configs(self.classifier, serving)
            for model, text in changed.items():
                (self.classifier.root / model / "config.pbtxt").write_text(text, encoding="utf-8")
            # An encoder may run its backbone itself, with the backbone's settings. So it has to be restarted even if
            # its own configuration did not change.
            self.server.unload(self.classifier.text_model)
            for model in changed:
                self.server.load(model)
            self.server.load(self.classifier.ensemble)
            self.loaded = serving
            self.server.classify(self.classifier.address, self.texts[:32])
        (found,) = load_test(
            self.server, [self.classifier.address], self.texts, [Load(concurrency=self.concurrency)], window=_WINDOW
        )
        return found.throughput
