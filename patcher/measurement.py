"""The results of a load test: figures for each level of load, their comparison, as CSV and as a plot."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patcher.errors import InputError, ToolError
from patcher.storage.disk import storage_errors
from patcher.wording import install_hint, percent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Load", "Measurement", "Ratio", "StepTime", "check_targets", "compare", "plot", "warnings", "write_csv"]

_BUSY_CLIENT = 0.5
"""If perf_analyzer uses more than this share of this machine's cores, it may itself be the bottleneck."""
_KEPT_UP = 0.9
_INCOMPLETE = "it does not hold all figures"

_DRAWN = (".png", ".svg", ".pdf", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Load:
    """A level of load: a number of concurrent requests, or a rate of requests per second with Poisson arrivals."""

    concurrency: int | None = None
    request_rate: float | None = None

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}" if self.concurrency else f"{self.request_rate:g} requests/s"


@dataclass(frozen=True)
class StepTime:
    """Queue and compute time of a request in one step of the ensemble: means in microseconds over ``requests``.

    ``batch`` is the mean number of texts that the step computed at once.
    """

    model: str
    requests: int
    queue_us: float
    compute_us: float
    batch: float


@dataclass(frozen=True)
class Measurement:
    """One model under one level of load; ``throughput`` in texts per second, latencies in microseconds."""

    model: str
    concurrency: int | None
    request_rate: float | None
    throughput: float
    p50_us: float
    p95_us: float
    p99_us: float
    failures: int
    steps: tuple[StepTime, ...]
    """The steps that received requests; a backbone that runs within its encoder's process receives none."""
    client_share: float = 0.0
    """The share of this machine's CPU time that perf_analyzer itself used."""
    delayed: bool = False
    """Whether perf_analyzer could not send requests at the requested rate."""
    planned: int = 0
    """Under a request rate, the number of requests that were to be sent during the measurement."""

    @property
    def load(self) -> Load:
        """The level of load that it was measured under."""
        return Load(self.concurrency, self.request_rate)

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Ratio:
    """Ratio of two models' throughputs under one load: median, lowest and highest over the rounds."""

    model: str
    against: str
    load: Load
    ratio: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """All fields, with the load as ``concurrency`` and ``request_rate``."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("load"), **fields}


def compare(measurements: Sequence[Measurement], against: str) -> list[Ratio]:
    """Each model's throughput relative to ``against``, paired by round: its n-th measurement with the n-th of that."""
    groups: dict[tuple[str, Load], list[float]] = {}
    for each in measurements:
        groups.setdefault((each.model, each.load), []).append(each.throughput)
    found = []
    for (model, load), rates in groups.items():
        others = groups.get((against, load), [])
        ratios = [rate / other for rate, other in zip(rates, others, strict=False) if other]
        if model != against and ratios:
            found.append(Ratio(model, against, load, statistics.median(ratios), min(ratios), max(ratios)))
    return found


def warnings(measurements: Sequence[Measurement]) -> list[str]:
    """Reasons to doubt some figures: a client that is the bottleneck, a load not kept up with, failed requests."""
    said = []
    for each in measurements:
        where = f"{each.model} under {each.load}"
        if each.client_share > _BUSY_CLIENT:
            said.append(
                f"{where}: perf_analyzer took {percent(each.client_share, 0)} of this machine's cores; the client may "
                "be the bottleneck: measure from another machine"
            )
        if _fell_short(each):
            said.append(
                f"{where}: only {each.throughput:.1f} texts/s came through; either the server or the client could not "
                "keep up, and latencies grow with the length of the test"
            )
        elif each.delayed:
            said.append(
                f"{where}: more than 1 % of the requests were sent late, because answers to earlier ones were still "
                "awaited; either the server or the client can hardly keep up, and latencies may grow with the length "
                "of the test"
            )
        if each.failures:
            said.append(f"{where}: {each.failures} requests failed")
    return list(dict.fromkeys(said))


def _fell_short(each: Measurement) -> bool:
    if not each.request_rate:
        return False
    # Requests still in flight when the measurement ends are not a shortfall; in a short one they are a large share.
    under_way = 1 + each.request_rate * each.p50_us / 1e6
    allowed = max(1 - _KEPT_UP, under_way / each.planned if each.planned else 0.0)
    return 1 - each.throughput / each.request_rate > allowed


def check_targets(csv_file: Path | None, plot_file: Path | None) -> None:
    """Check the output files before minutes of measuring: InputError, or ToolError for a plot without matplotlib."""
    for path in (csv_file, plot_file):
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    if plot_file is not None and plot_file.suffix.lower() not in _DRAWN:
        raise InputError(f"cannot draw {plot_file}: expected a name that ends in {', '.join(_DRAWN)}")
    if plot_file is not None:
        _figure_type()


def _figure_type() -> Any:
    """Matplotlib's Figure class; ToolError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ToolError(f"a plot needs matplotlib, which is not installed: {install_hint('plot')}") from None
    return Figure


def write_csv(measurements: Sequence[Measurement], path: Path) -> None:
    """Write one line per measurement, with a pair of columns (queue and compute time) for each step.

    Raises StorageError if the file cannot be written.
    """
    rows = []
    for each in measurements:
        row = each.to_json()
        for step in row.pop("steps"):
            role = str(step["model"]).rpartition("_")[2]
            row |= {f"{role}_queue_us": step["queue_us"], f"{role}_compute_us": step["compute_us"]}
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with storage_errors(path, _INCOMPLETE), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """Plot latency (p50, p95, p99) over throughput: three lines per model, the points labelled with the load.

    Raises ToolError if matplotlib is not installed, InputError if there is nothing to draw, and StorageError if the
    file cannot be written.
    """
    if not measurements:
        raise InputError("no measurement to plot")
    figure = _figure_type()(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for color, model in enumerate(dict.fromkeys(each.model for each in measurements)):
        points = [each for each in measurements if each.model == model]
        throughput = [each.throughput for each in points]
        for style, rank in (("-o", 50), ("--s", 95), (":^", 99)):
            latency = [getattr(each, f"p{rank}_us") / 1000 for each in points]
            axes.plot(throughput, latency, style, color=f"C{color}", markersize=4, label=f"{model} p{rank}")
        for each in points:
            mark = f"c{each.concurrency}" if each.concurrency else f"{each.request_rate:g}/s"
            axes.annotate(
                mark, (each.throughput, each.p50_us / 1000), xytext=(4, -11), textcoords="offset points", fontsize=8
            )
    axes.set(xlabel="throughput (texts/s)", ylabel="latency (ms)", title="Latency over throughput")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with storage_errors(path, _INCOMPLETE):
        figure.savefig(path)
