"""Measure how fast a classifier answers under load, with NVIDIA's perf_analyzer over gRPC and real texts.

perf_analyzer measures throughput and latencies as a client sees them. How the time is spent within the ensemble comes
from the server's own counters, read before and after each level of load.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import resource
import time
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from patcher.configs import asked_by
from patcher.errors import InputError, ServerError, ServerRefused, ServerUnreachable, ToolError
from patcher.measurement import Load, Measurement, StepTime
from patcher.model_config import steps_of
from patcher.scratch import scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from patcher.triton.client import ModelStatistics, TritonServer
    from patcher.triton.perf_analyzer import PerfAnalyzer

__all__ = ["load_test", "parse_loads"]

_WINDOWS = 3
"""Windows that perf_analyzer measures at each level; it reports their mean."""
_WIDENED = 1.2
"""perf_analyzer's windows are longer than requested by this factor."""
_TRIES = 3
_MOST_TEXTS = 20_000
_MOST_LEVELS = 100
_MOST_INTERVALS = 100_000
_MOST_UNDER_WAY = 64
"""Threads that send at a request rate; each waits for its answer.

With perf_analyzer's four, requests would wait for answers instead of being sent, and their latencies would leave out
the server's queue. (Its asynchronous client does not end with some servers.)
"""


def parse_loads(concurrency: str | None = None, request_rate: str | None = None) -> list[Load]:
    """The levels of load for ``START``, ``START:END`` or ``START:END:STEP``, interpreted as by perf_analyzer.

    END is included if a step reaches it: ``1:16:4`` is 1, 5, 9, 13. Raises InputError for anything else, for numbers
    that are not positive, for a concurrency that is not whole, and for more than 100 levels.
    """
    loads = []
    if concurrency is not None:
        levels = _range(concurrency, "--concurrency", "1:16:4")
        if any(level != int(level) for level in levels):
            raise InputError(f"--concurrency {concurrency!r}; expected whole numbers, as in 1:16:4")
        loads += [Load(concurrency=int(level)) for level in levels]
    if request_rate is not None:
        loads += [Load(request_rate=level) for level in _range(request_rate, "--request-rate", "50:200:50")]
    return loads


def _range(text: str, option: str, example: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or not all(0 < number < float("inf") for number in numbers):  # noqa: PLR2004
        raise InputError(f"{option} {text!r}; expected START:END:STEP with positive numbers, as in {example}")
    start, end, step = (*numbers, *(numbers[0], 1.0)[len(numbers) - 1 :])
    if end < start:
        raise InputError(f"{option} {text!r} ends before it starts; expected START:END:STEP, as in {example}")
    levels = int((end - start) / step + 1e-9) + 1
    if levels > _MOST_LEVELS:
        raise InputError(f"{option} {text!r} asks for {levels} levels; expected at most {_MOST_LEVELS}: a larger STEP")
    return [start + step * index for index in range(levels)]


def load_test(
    server: TritonServer,
    models: Sequence[str],
    texts: Sequence[str],
    loads: Sequence[Load],
    *,
    window: float = 2.0,
    rounds: int = 1,
    progress: Callable[[str], None] | None = None,
    inputs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> list[Measurement]:
    """Measure every model under every load with one text per request; the models take turns.

    ``texts`` are sent in order, over and over. ``window`` is the length in seconds of each of the three windows of a
    measurement. ``rounds`` is how often each load is measured. ``progress`` is called with what is measured next.

    A model given as ``NAME@HOST:PORT`` (gRPC) is measured on that server instead; ``ENSEMBLE/NAME`` is a classifier in
    a head store. ``inputs`` holds, by model, rows of perf_analyzer's input file for models that do not take texts.

    Raises
    ------
    InputError
        Without texts, with a text that is not valid Unicode, or if a model is named twice.
    ToolError
        If perf_analyzer is missing or does not work.
    ServerUnreachable, ServerRefused, ServerError
        If no server answers, a model is not served, or a request failed.
    """
    from patcher.triton.client import TritonServer
    from patcher.triton.perf_analyzer import find_perf_analyzer

    analyzer = find_perf_analyzer()
    if not server.is_live():
        raise ServerUnreachable(f"no Triton server answers at {server.url} (gRPC); `patcher serve` starts one")
    found = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch("patcher-load-"))
        benches = {}
        for model in models:
            if models.count(model) > 1:
                raise InputError(f"got {model} against itself; expected another model, or one at another address")
        for number, model in enumerate(models):
            address, _, url = model.partition("@")
            name, _, classifier = address.partition("/")
            asked = stack.enter_context(TritonServer(url, tls=server.tls)) if url else server
            bench = _Bench(asked, analyzer, folder / str(number), window, model)
            bench.write_rows((inputs or {}).get(model) or _text_rows(texts, classifier))
            benches[model] = (bench, name, _steps(asked, name))
        for load in loads:
            for turn in range(rounds):
                for model, (bench, name, steps) in benches.items():
                    if progress:
                        progress(f"{model}, {load}" + (f", round {turn + 1} of {rounds}" if rounds > 1 else ""))
                    found.append(bench.measure(name, load, steps))
    return found


@dataclass(frozen=True)
class _Bench:
    """Successive runs of perf_analyzer against one server, with the files that it reads and writes."""

    server: TritonServer
    analyzer: PerfAnalyzer
    folder: Path
    window: float
    label: str

    @property
    def _csv(self) -> Path:
        return self.folder / "report.csv"

    def write_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.folder.mkdir()
        try:
            document = json.dumps({"data": list(rows)}, ensure_ascii=False)
            (self.folder / "texts.json").write_text(document, encoding="utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"a text contains an unpaired surrogate: {error.reason}") from None

    def measure(self, model: str, load: Load, steps: Sequence[str]) -> Measurement:
        window = self.window
        for attempt in range(_TRIES):
            before = self._count(model, steps)
            started, used = time.monotonic(), _children_seconds()
            outcome = self.analyzer.run(self._arguments(model, load, window), timeout=60 + 10 * _WINDOWS * window)
            share = (_children_seconds() - used) / (time.monotonic() - started) / len(os.sched_getaffinity(0))
            after = self._count(model, steps)
            if outcome.returncode == 0 and self._csv.exists():
                change = {name: _change(before[name], after[name]) for name in after}
                # A step without requests is left out: an encoder may run its backbone in its own process.
                asked = [step for step in steps if change[step]["successes"] or change[step]["failures"]]
                times = tuple(_step_time(step, change[step]) for step in asked)
                return Measurement(
                    self.label,
                    load.concurrency,
                    load.request_rate,
                    *self._report(),
                    failures=change[model]["failures"],
                    steps=times,
                    client_share=round(share, 3),
                    delayed=re.search(r"not able to keep up", outcome.stdout + outcome.stderr) is not None,
                    planned=_planned(load.request_rate, window) if load.request_rate else 0,
                )
            said = outcome.stdout + outcome.stderr
            # The window had no answers, or too few to measure (then there may be no error, but no report either): try
            # again with a longer one.
            short = outcome.returncode == 0 or re.search(
                r"larger time window|increase the --measurement-interval", said
            )
            if not short or attempt == _TRIES - 1:
                break
            window *= 4
        raise self._failed(model, load, said)

    def _count(self, model: str, steps: Sequence[str]) -> dict[str, list[ModelStatistics]]:
        return {name: self.server.statistics(name) for name in (model, *steps)}

    def _arguments(self, model: str, load: Load, window: float) -> list[str]:
        from patcher.triton.perf_analyzer import tls_arguments

        self._csv.unlink(missing_ok=True)
        return [
            f"-m{model}",
            f"-u{self.server.url}",
            "-igrpc",
            f"--input-data={self.folder / 'texts.json'}",
            f"--measurement-interval={round(window * 1000)}",
            f"--max-trials={_WINDOWS}",
            # Accept the mean of three windows, however they differ: else a noisy machine yields no report at all.
            "--stability-percentage=999",
            f"-f{self._csv}",
            *tls_arguments(self.server.tls),
            *self._load_arguments(load, window),
        ]

    def _load_arguments(self, load: Load, window: float) -> list[str]:
        if not load.request_rate:
            return [f"--concurrency-range={load.concurrency}"]
        # perf_analyzer's own Poisson distribution starts from the same seed each time, with a stretch of few requests:
        # of 5 a second it would send 3.
        gaps = _intervals(load.request_rate, min(max(_planned(load.request_rate, window), 1), _MOST_INTERVALS))
        (self.folder / "intervals.txt").write_text("".join(f"{gap}\n" for gap in gaps))
        return [f"--request-intervals={self.folder / 'intervals.txt'}", f"--max-threads={_MOST_UNDER_WAY}"]

    def _report(self) -> tuple[float, float, float, float]:
        try:
            with self._csv.open(newline="") as file:
                (row,) = csv.DictReader(file)
            p50, p95, p99 = (float(row[f"p{percent} latency"]) for percent in (50, 95, 99))
            return float(row["Inferences/Second"]), p50, p95, p99
        except (OSError, ValueError, KeyError) as error:
            raise ToolError(
                f"perf_analyzer's report cannot be read ({error}); expected that of version 2.50"
            ) from error

    def _failed(self, model: str, load: Load, said: str) -> ServerError | ToolError:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        reasons = [line.partition("had error:")[2].strip() for line in lines if "had error:" in line]
        if not self.server.is_live():
            return ServerUnreachable(f"the server at {self.server.url} is gone; under {load} it answered no longer")
        if reasons:
            return ServerError(f"{model} failed a request under {load}: {reasons[0]}")
        return ToolError(f"perf_analyzer ended without a result for {model} under {load}: {' '.join(lines[-3:])}")


def _planned(rate: float, window: float) -> int:
    return round(rate * _WINDOWS * _WIDENED * window)


def _intervals(rate: float, count: int) -> list[int]:
    """Microseconds between requests of a Poisson process that has exactly ``count`` of them in ``count / rate``."""
    drawn = random.Random(0)  # noqa: S311  the same for every model, so that they can be compared
    moments = list(accumulate((drawn.expovariate(1.0) for _ in range(count)), initial=0.0))
    scale = count / rate * 1e6 / moments[-1]
    return [late - early for early, late in pairwise(round(moment * scale) for moment in moments)]


def _text_rows(texts: Sequence[str], classifier: str = "") -> list[dict[str, Any]]:
    if not texts:
        raise InputError("no texts to send; expected at least one")
    named = {"classifier": [classifier]} if classifier else {}
    return [{"text": [text], **named} for text in texts[:_MOST_TEXTS]]


def _children_seconds() -> float:
    # Counts only children that ended and were waited for: perf_analyzer, but not a server that still runs.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _steps(server: TritonServer, model: str) -> tuple[str, ...]:
    if not server.is_ready(model):
        raise ServerRefused(f"{server.url} does not serve {model}; `patcher doctor` says what it serves")
    found: dict[str, None] = {}
    for step in steps_of(server.model_config(model)):
        # An encoder that calls the backbone: the backbone is listed too, though its time is part of the encoder's.
        asked = asked_by(server.model_config(step.model))
        found |= dict.fromkeys([step.model, asked] if asked and server.is_ready(asked) else [step.model])
    return tuple(found)


def _change(before: Sequence[ModelStatistics], after: Sequence[ModelStatistics]) -> dict[str, int]:
    # Sums over all versions, since a head may be swapped in between; the counters of a reloaded model restart at 0.
    fields = ("inferences", "executions", "successes", "failures", "queue_ns", "compute_ns")
    earlier = {each.version: each for each in before}
    total = dict.fromkeys(fields, 0)
    for each in after:
        old = earlier.get(each.version)
        again = old is not None and old.inferences > each.inferences
        for field in fields:
            total[field] += getattr(each, field) - (0 if old is None or again else getattr(old, field))
    return total


def _step_time(model: str, change: Mapping[str, int]) -> StepTime:
    requests = max(change["successes"], 1)
    return StepTime(
        model,
        change["successes"],
        round(change["queue_ns"] / requests / 1000, 1),
        round(change["compute_ns"] / requests / 1000, 1),
        round(change["inferences"] / max(change["executions"], 1), 2),
    )
