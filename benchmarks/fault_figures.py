"""The two figures of docs/results.md that compare the paper's Table 1 with what drophot finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib as mpl
from faults import CORESETS, Differences, Faults, finetuned, published, published_curves
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drophot import Record, stats

# Okabe and Ito's colors, with markers that also work without color.
LOOKS: Mapping[str, Mapping[str, Any]] = {
    "baseline": {"color": "#000000", "marker": "o", "linestyle": "-."},
    "low": {"color": "#0072B2", "marker": "v", "linestyle": "-"},
    "high": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "random": {"color": "#009E73", "marker": "^", "linestyle": ":"},
}


class Row(NamedTuple):
    """A row of the first figure: differences from the baseline in points, by mode and seed."""

    label: str
    differences: Mapping[str, Sequence[float]]


def save(figure: Figure, path: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "drophot"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def draw_answer(path: Path, rows: Sequence[Row]) -> None:
    """Coreset minus baseline after pruning and fine-tuning, a row for each experiment."""
    figure = Figure(figsize=(8, 0.5 + 0.62 * len(rows)), layout="constrained")
    ax: Axes = figure.subplots()
    for position, row in enumerate(reversed(rows)):
        for number, (mode, values) in enumerate(row.differences.items()):
            height = position + 0.22 * (1 - number)
            found = stats.estimate(values)
            half = (found.interval[1] - found.interval[0]) / 2 if len(values) > 1 else None
            look: dict[str, Any] = {**LOOKS[mode], "linestyle": "none"}
            # A single run has no interval, and is hollow.
            look |= {} if half is not None else {"markerfacecolor": "white"}
            ax.errorbar(found.mean, height, xerr=half, capsize=2, markersize=5, **look)
    for mode in (*CORESETS, "random"):
        ax.plot([], [], label=f"{mode} − baseline", **{**LOOKS[mode], "linestyle": "none"})
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
    ax.set_xlabel("accuracy after pruning and fine-tuning: coreset minus baseline, points")
    ax.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    save(figure, path)


def published_row() -> Row:
    """The published Table 1: the mean of its cells with 80 % removed, one run each."""
    cells = [row for row in published() if row["prune_ratio"] == 0.8]
    gains = {
        mode: [mean(row[f"finetuned_{mode}"] - row["finetuned_baseline"] for row in cells)]
        for mode in CORESETS
    }
    return Row("published: ResNet-18, CIFAR-100", gains)


def text_row(label: str, runs: Sequence[Record], keep_ratio: float, prune_ratio: float) -> Row:
    """An experiment that follows the paper's text."""
    base = finetuned(runs, "baseline", 1.0, prune_ratio)
    found: dict[str, list[float]] = {}
    for mode in (*CORESETS, "random"):
        one = finetuned(runs, mode, keep_ratio, prune_ratio)
        found[mode] = [one[seed] - base[seed] for seed in sorted(one.keys() & base.keys())]
    return Row(label, found)


def faults_row(label: str, found: Differences, faults: Faults) -> Row:
    """A combination of faults."""
    return Row(label, {mode: found.of(faults, mode) for mode in (*CORESETS, "random")})


def draw_curves(path: Path, text: Sequence[Record], found: Differences) -> None:
    """Accuracy before pruning, after pruning and in each epoch of fine-tuning."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 3)
    panels = {
        "published\nResNet-18, CIFAR-100, 10 % kept": with_start(0.1, 0.8),
        "the paper's text\nResNet-18, 100 classes, 10 % kept": curves(text, 0.1, 0.8),
        "released protocol\nResNet-18, 800 images, 30 % kept": curves(
            released_runs(found), found.keep_ratio, found.prune_ratio
        ),
    }
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for mode, line in lines.items():
            ax.plot([-2, *range(len(line) - 1)], line, label=mode, markersize=3.5, **LOOKS[mode])
        ax.set_title(title, fontsize=9)
        ax.set_xticks([-2, 0, 5, 10], ["before\npruning", "after", "5", "10"], fontsize=8)
        ax.set_xlabel("epoch of fine-tuning", fontsize=9)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    axes[1].legend(frameon=False, fontsize=8)
    save(figure, path)


def with_start(keep_ratio: float, prune_ratio: float) -> dict[str, list[float]]:
    """The published curves, with the accuracy before pruning in front."""
    (row,) = [
        row
        for row in published()
        if (row["data_ratio"], row["prune_ratio"]) == (keep_ratio, prune_ratio)
    ]
    found = published_curves(keep_ratio, prune_ratio)
    return {mode: [row[mode], *line] for mode, line in found.items()}


def curves(runs: Iterable[Record], keep_ratio: float, prune_ratio: float) -> dict[str, list[float]]:
    """The mean over seeds, in %, by mode."""
    lines: dict[str, list[list[float]]] = {}
    for r in runs:
        kept = 1.0 if r.mode == "baseline" else keep_ratio
        if (r.keep_ratio, r.prune_ratio) == (kept, prune_ratio):
            line = [r.trained_accuracy, r.pruned_accuracy, *r.finetune_curve]
            lines.setdefault(r.mode, []).append([100 * value for value in line])
    return {
        mode: [mean(values) for values in zip(*lines[mode], strict=True)]
        for mode in LOOKS
        if mode in lines
    }


def released_runs(found: Differences) -> list[Record]:
    """The records of the released protocol with all of its faults, and its random control."""
    names = {
        "baseline": Faults(scores=False, masks=True, baseline=True).name,
        "random": Faults(scores=False, masks=True, baseline=False).name,
    }
    return [
        r
        for r in found.runs
        if r.protocol == names.get(r.mode, "released") and r.seed in found.complete
    ]
