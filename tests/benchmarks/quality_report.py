"""The quality benchmark's results as Markdown: the tables of the README and docs/results.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.benchmarks.quality_measure import figures_row, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["markdown"]

_FIGURES = ["flips %", "old accuracy, points", "recall %", "precision %", "F1 %"]
_NEEDS_MORE = {"lda": "all rows change", "ridge": "all rows change", "anchored": "needs old data, all rows change"}


def markdown(results: Mapping[str, Any]) -> str:
    """All results as tables; parts that were not run are left out."""
    lines = ["# How right a patched classifier is", "", *_about(results)]
    sections = {
        "baselines ours finetune libraries": _methods,
        "ours": _counts,
        "sequential": _sequential,
        "many": _many,
        "multi_label": _multi_label,
        "merges": _merges,
        "bound": _bound,
        "scope": _scope,
        "speed": _speed,
    }
    for needs, section in sections.items():
        if any(part in results for part in needs.split()):
            lines += ["", *section(results)]
    return "\n".join(lines) + "\n"


def _about(results: Mapping[str, Any]) -> list[str]:
    about = results["about"]
    setting = (
        f"`{about['data']}` with the checkpoint `{about['checkpoint']}`: {about['old labels']} old labels, "
        f"{about['old test texts']} old test texts ({100 * about['old accuracy']:.2f} % right before any patch), "
        f"{about['new labels']} labels that the backbone never saw. Python {about['python']}, {about['processor']}, "
        f"{about['threads']} threads (load average {about['load']} at the start), {about['date']}."
    )
    cells = (
        "Cells are mean ± standard deviation (worst) over labels and draws of the examples. *Flips*: old test texts "
        "that were right before and are wrong after. Precision and F1 count the new label's test texts and all old "
        "ones. Seconds are of the fit alone, features given."
    )
    return [setting, "", cells]


def _methods(results: Mapping[str, Any]) -> list[str]:
    n = results["about"]["examples"]
    rows = [[name, *cells] for name, cells in _method_rows(results, str(n))]
    lines = [f"## One new label from {n} examples", "", *table(["method", "patches", *_FIGURES, "seconds"], rows)]
    notes = {
        "baselines": (
            "The random row is the forums' `torch.cat([weight, torch.randn(1, hidden)])`; fine-tuned, it and the rest "
            "of the layer (or of the model) see the new label's examples alone."
        ),
        "libraries": (
            "adaptive-classifier learns all old data by itself and is compared with what it answered before the "
            "addition; setfit gets ten examples of every label, old ones too."
        ),
    }
    chosen = [notes[part] for part in notes if part in results]
    return [*lines, "", " ".join(chosen)] if chosen else lines


def _method_rows(results: Mapping[str, Any], n: str) -> Iterator[tuple[str, list[str]]]:
    def cells(row: Mapping[str, Any]) -> list[str]:
        if "failed" in row:
            return ["0", f"failed: {row['failed']}", *[""] * len(_FIGURES)]
        return [str(row["patches"]), *figures_row(row["figures"]), f"{row['seconds']:.3f}"]

    for part in ("baselines", "finetune", "libraries"):
        for name, row in results.get(part, {}).items():
            yield name, cells(row)
    ours = results.get("ours")
    if ours:
        for name, row in ours["methods"].items():
            more = _NEEDS_MORE.get(name)
            yield f"patcher, {name}" + (f" ({more})" if more else ""), cells(row)
        if n in ours["counts"]:
            yield "**patcher, default** (memory only)", cells(ours["counts"][n])


def _counts(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for n, row in results["ours"]["counts"].items():
        at = [f"{100 * value:.1f}" for value in row["recall at flips of"].values()]
        gate = f"{100 * row['gate passed']:.0f} %"
        held = row.get("recall's lower bound held")  # results of before 0.16 have none, nor has a single example
        bound = "" if held is None else f"{100 * held:.0f} %"
        rows.append([n, row["patches"], *figures_row(row["figures"]), *at, gate, bound, f"{row['seconds']:.3f}"])
    first = next(iter(results["ours"]["counts"].values()))
    rates = [f"recall at {100 * float(rate):g} % flips" for rate in first["recall at flips of"]]
    kept = all(row["old rows unchanged"] for row in results["ours"]["counts"].values())
    return [
        "## The default method by number of examples",
        "",
        *table(["examples", "patches", *_FIGURES, *rates, "gate passed", "recall's lower bound held", "seconds"], rows),
        "",
        f"Old rows hold the same bits after every patch: {'yes' if kept else 'NO'}. "
        "![recall against flips](quality.png)".replace("quality.png", results["about"]["plot"]),
    ]


def _sequential(results: Mapping[str, Any]) -> list[str]:
    found, n = results["sequential"], results["about"]["examples"]
    added = results["about"]["new labels"]

    def cells(accuracy: Mapping[str, Mapping[str, float]]) -> list[str]:
        return [
            f"{100 * each['mean']:.2f} ± {100 * each['sd']:.2f} ({100 * each['min']:.2f})" for each in accuracy.values()
        ]

    rows: list[list[str]] = []
    for name, ours in {"**patcher**": found, **_named(found.get("other methods", {}))}.items():
        spent = " and ".join(f"{ours['seconds'][part]['mean']:.3f}" for part in ("fit", "whole add"))
        rows.append([f"{name}, {n} examples each, {ours['runs']} orders", *cells(ours["accuracy"]), spent])
    for name, row in results.get("libraries", {}).items():
        if "sequential" in row:
            theirs = row["sequential"]
            title = f"{name}, {n} examples each, {theirs['runs']} orders"
            rows.append([title, *cells(theirs["accuracy"]), f"{theirs['seconds']['mean']:.3f}"])
    for key, reference in found.items():
        if key.startswith("trained on"):
            for name, row in reference.items():
                shares = [f"{100 * row[part]:.2f}" for part in ("all", "old", "new")]
                rows.append([f"head {key}, all old data, {name}", *shares, f"{row['seconds']:.1f} (once)"])
    heads = [
        "how",
        f"accuracy on all {found['labels']}",
        "old labels",
        "new labels",
        "seconds an add (ours: fit, and all)",
    ]
    return [f"## {added} labels one after another", "", *table(heads, rows)]


def _named(methods: Mapping[str, Any]) -> dict[str, Any]:
    return {f"patcher, {name} (all rows change)": found for name, found in methods.items()}


def _many(results: Mapping[str, Any]) -> list[str]:
    found = results["many"]
    accuracy, kept = found["accuracy"], found["kept labels"]
    row = [
        f"{found['from']} + {found['added']}",
        f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['sd']:.2f}",
        f"{100 * kept['before']:.2f} -> {100 * kept['after']:.2f}",
        f"{100 * found['orders agree']:.2f}",
        f"{found['seconds of the first tenth']:.3f}",
        f"{found['seconds of the last tenth']:.3f}",
    ]
    heads = [
        "labels", "accuracy on all", "labels that were there", "answers alike in any two orders %",
        "seconds an add, first tenth", "last tenth",
    ]  # fmt: skip
    about = (
        f"{found['orders']} orders; most of the added labels were taken out of the head first, and the backbone knows "
        "them: what this shows is whether cost and order matter, not how hard new labels are. Labels that come late "
        "take texts of those that were there, which were easier to tell apart while there were few."
    )
    return [f"## {found['added']} labels one after another", "", about, "", *table(heads, [row])]


def _multi_label(results: Mapping[str, Any]) -> list[str]:
    found = results["multi_label"]
    shares = [f"{100 * found[name]['mean']:.1f} ({100 * found[name]['min']:.1f})" for name in ("recall", "precision")]
    wrong = found["old texts that get the new label"]
    taken = f"{100 * wrong['mean']:.3f} ({100 * wrong['max']:.3f})"
    row = [str(found["patches"]), *shares, taken, f"{100 * found['gate passed']:.0f} %"]
    heads = ["patches", "recall %", "precision %", "old texts that get the new label %", "gate passed"]
    about = "A sigmoid for each label on the same features; a label is given above 0.5. Mean (worst)."
    return ["## A multi-label classifier", "", about, "", *table(heads, [row])]


def _merges(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for kind, found in results["merges"].items():
        shares = [f"{100 * found[name]['mean']:.1f} ({100 * found[name]['min']:.1f})" for name in _MERGED]
        flips = f"{100 * found['flips']['mean']:.3f} ({100 * found['flips']['max']:.3f})"
        rows.append([kind, found["merges"], *shares, flips, f"{100 * found['gate passed']['mean']:.0f} %"])
    heads = ["classifier", "merges", "texts of the two that got either, %", "that get the merged label, %"]
    heads += ["other texts that flip, %", "gate passed"]
    about = "Half of the pairs are a label and its nearest, half are random; only the memory is used. Mean (worst)."
    return ["## Two labels merged into one", "", about, "", *table(heads, rows)]


_MERGED = ("recall before", "recall")


def _bound(results: Mapping[str, Any]) -> list[str]:
    found = results["bound"]
    rows = []
    for budget, row in found["budgets"].items():
        stated = row["stated bound"]
        within = "no bound stated" if row["within"] is None else f"{100 * row['within']:.1f} %"
        flips = f"{100 * row['flips']['mean']:.3f} ({100 * row['flips']['max']:.3f})"
        bound = f"{100 * stated['mean']:.3f}" if stated else ""
        rows.append([f"{100 * float(budget):g} %", row["patches"], flips, bound, within])
    total = "none" if found["within"] is None else f"{100 * found['within']:.1f} %"
    heads = ["--max-flips", "patches", "flips on test % (worst)", "stated upper bound %", "within it"]
    return ["## The bound on flips", "", *table(heads, rows), "", f"Of {found['patches']} patches: {total} within."]


def _scope(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, row in results["scope"].items():
        stated = row["false alarms stated"]
        promised = "none" if stated is None else f"{100 * stated:.1f} %"
        alarms = f"{100 * row['false alarms on test']:.1f} % (stated {promised})"
        new = row.get("new labels' texts below")
        added = "" if new is None else f"{100 * new:.1f} %"
        found = f"{100 * row['found outside']:.1f} %"
        rows.append([name, f"{row['auroc']:.4f}", alarms, added, found, f"{row['seconds']:.3f}"])
    called = "test texts called out of scope"
    heads = ["when", "AUROC", f"old {called}", f"new labels' {called}", "texts of no label found", "seconds to fit"]
    return ["## Out of scope", "", *table(heads, rows)]


def _speed(results: Mapping[str, Any]) -> list[str]:
    parts = ("fit", "gate", "memory", "scope")
    rows = [
        [name, *(f"{1000 * row[part]:.0f}" for part in parts), f"{row['memory MB']:.1f}"]
        for name, row in results["speed"].items()
    ]
    heads = ["size", "fit, ms", "gate, ms", "growing the memory, ms", "scope, ms", "memory, MB"]
    return ["## Seconds", "", "Median on made-up features, ten examples.", "", *table(heads, rows)]
