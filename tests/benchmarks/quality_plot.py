"""The quality benchmark's plot: recall of the new label against flips of the old ones, as the bias varies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["plot"]

_LEAST = 0.01
"""Flip rate in per cent; smaller ones are drawn here, because a logarithmic axis has no zero."""


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw the default method's curve per number of examples, its chosen bias, and other methods as points."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axes = plt.subplots(figsize=(8.0, 5.0), layout="constrained")
    counts = results["ours"]["counts"]
    colours = plt.get_cmap("viridis")
    for position, (n, row) in enumerate(counts.items()):
        colour = colours(0.92 - 0.92 * position / max(1, len(counts) - 1))
        flips = [max(100 * rate, _LEAST) for rate in row["curve"]["flips"]]
        plural = "example" if n == "1" else "examples"
        axes.plot(flips, [100 * value for value in row["curve"]["recall"]], color=colour, label=f"{n} {plural}")
        axes.plot(*_point(row), "o", color=colour, markersize=7, markeredgecolor="black")
    markers = iter("sD^vPX*<>hpd")
    others = {**results.get("baselines", {}), **results.get("finetune", {}), **results.get("libraries", {})}
    for name, row in others.items():
        if "figures" in row:
            axes.plot(*_point(row), next(markers), color="tab:red", markersize=7, linestyle="none", label=name)
    axes.set_xscale("log")
    axes.set_xlim(_LEAST * 0.9, 100)
    axes.set_ylim(0, 101)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel(f"flips: old test texts that a patch turns from right to wrong ({_LEAST} % stands for less, too)")
    axes.set_ylabel("recall of the new label, %")
    axes.set_title(f"{results['about']['data']}: lines as the bias moves, circles the bias that patcher chooses")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, loc="lower right", ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _point(row: Mapping[str, Any]) -> tuple[float, float]:
    flips, recall = row["figures"]["flips"]["mean"], row["figures"]["recall"]["mean"]
    return max(100 * flips, _LEAST), 100 * recall
