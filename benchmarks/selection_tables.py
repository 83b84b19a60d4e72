"""Tables and a figure of selection methods, and a table of the recipe.

The records come from selection.py, little_data.py and recipe.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from common import RESULTS, read_grid
from faults import signed

from drophot import Record, stats

SHARES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.01)
ONCE = ("once", "scores", "dynamic")
NOISY = ("once_noisy", "scores_noisy", "dynamic_noisy")

# The control of each part of little_data.py, and the schedule of its pruning.
LITTLE_DATA = {
    "once": ("random",),
    "dynamic": ("fresh_subset",),
    "joint": ("fresh_subset", "joint"),
}

# Okabe and Ito's colors, with markers and line styles that also work without color.
DRAWN = {
    "random": ("random", "#009E73", "^", ":"),
    "fresh_subset": ("random, new each epoch", "#56B4E9", "v", "-"),
    "crest": ("CREST", "#CC79A7", "X", "-"),
    "adaptive10-high": ("most forgotten, every 10 epochs", "#CC79A7", "*", "-"),
    "high": ("most forgotten", "#D55E00", "s", "--"),
    "el2n-high": ("highest EL2N", "#E69F00", "P", "--"),
    "dual-beta": ("DUAL, Beta", "#999999", "d", "--"),
    "aum-stratified-low-balanced": ("AUM, stratified, by class", "#0072B2", "o", "-"),
    "aum-stratified-cutoff0.2-low": ("AUM, stratified, a fifth cut", "#000000", "D", "-"),
}


def selected() -> dict[str, str]:
    """All tables, by the names of their markers."""
    once = [r for r in records_of(ONCE) if not r.equal_steps]
    return {
        "selection": by_share(once),
        "selection_differences": less_random(once),
        "selection_equal": by_share(equal_runs()),
        "selection_noisy": by_share(records_of(NOISY)),
        "ablation": ablation(),
        "adaptive": less_fresh(read_grid("fcnet_adaptive"), "one-shot"),
        "joint": less_fresh(read_grid("fcnet_joint"), "joint"),
        "recipe": recipe(),
        **{
            f"little_data_{data}_{part}": little_data(read_grid(f"{data}_{part}"), *how)
            for data in ("cifar10", "tiny100")
            for part, how in LITTLE_DATA.items()
            if (RESULTS / f"grid_{data}_{part}.jsonl").exists()
        },
    }


def records_of(parts: Iterable[str]) -> list[Record]:
    return [r for part in parts for r in read_grid(f"fcnet_{part}")]


def equal_runs() -> list[Record]:
    """Coresets that are selected once and again, for as many steps as the baseline takes."""
    once, again = read_grid("fcnet_once"), read_grid("fcnet_adaptive")
    known = {r.mode for r in once if r.equal_steps}
    runs = [*once, *(r for r in again if r.mode not in known)]
    return [r for r in runs if r.equal_steps or r.mode == "baseline"]


def by_share(runs: Sequence[Record]) -> str:
    """Mean and half of the 95 % interval, with a row for each mode and a column for each share."""
    lines = header("kept", SHARES)
    for mode in modes_of(runs):
        found = [accuracies(runs, mode, share) for share in SHARES]
        if any(found):
            lines.append(row(mode, [centred(values) if values else "" for values in found]))
    full = centred(accuracies(runs, "baseline", 1.0))
    return "\n".join([*lines, row("everything", [full, *[""] * (len(SHARES) - 1)])])


def less_random(runs: Sequence[Record]) -> str:
    """Each mode minus a random subset of the same size, paired by seed."""
    lines = header("kept", SHARES)
    for mode in modes_of(runs):
        if mode != "random":
            control = [accuracies(runs, "random", share) for share in SHARES]
            lines.append(row(mode, differences(runs, mode, control, SHARES)))
    return "\n".join(lines)


def less_fresh(records: Sequence[Record], schedule: str) -> str:
    """Each mode minus a random subset in each epoch, at equal steps, paired by seed."""
    runs = [r for r in records if r.equal_steps and r.schedule == schedule]
    shares = sorted({r.keep_ratio for r in runs} - {1.0}, reverse=True)
    control = [accuracies(runs, "fresh_subset", share) for share in shares]
    lines = header("kept", shares)
    lines.append(row("fresh_subset, %", [centred(values) for values in control]))
    for mode in modes_of(runs):
        if mode != "fresh_subset":
            lines.append(row(mode, differences(runs, mode, control, shares)))
    return "\n".join(lines)


def ablation() -> str:
    """Most forgotten minus random, by scoring epochs, class balance, and equal epochs or steps."""
    lines = header("scored for | by class | trained for", SHARES)
    once = read_grid("fcnet_once")
    for part, epochs in (("length3", 3), ("once", 10), ("length40", 40)):
        found = read_grid(f"fcnet_{part}")
        for mode, balanced in (("high", "no"), ("forgetting-high-balanced", "yes")):
            for equal_steps, words in ((False, "10 epochs"), (True, "equal steps")):
                runs, others = (
                    [r for r in records if r.equal_steps == equal_steps]
                    for records in (found, once)
                )
                control = [accuracies(others, "random", share) for share in SHARES]
                cells = differences(runs, mode, control, SHARES)
                lines.append(row(f"{epochs} epochs | {balanced} | {words}", cells))
    return "\n".join(lines)


def little_data(records: Sequence[Record], control: str, schedule: str = "one-shot") -> str:
    """Each mode of a part of little_data.py minus a control, for equal epochs and equal steps.

    A share without records of both has an empty cell.
    """
    trained = [r for r in records if r.schedule == schedule]
    shares = sorted({r.keep_ratio for r in trained} - {1.0}, reverse=True)
    lines = header("mode | trained for", shares)
    for equal_steps, words in ((False, "equal epochs"), (True, "equal steps")):
        runs = [r for r in trained if r.equal_steps == equal_steps]
        base = [accuracies(runs, control, share) for share in shares]
        cells = [centred(values) if values else "" for values in base]
        lines.append(row(f"{control}, % | {words}", cells))
        for mode in modes_of(runs):
            if mode != control:
                found = [accuracies(runs, mode, share) for share in shares]
                pairs = list(zip(found, base, strict=True))
                cells = [difference(a, b) if a.keys() & b.keys() else "" for a, b in pairs]
                lines.append(row(f"{mode} | {words}", cells))
    full = centred(accuracies(trained, "baseline", 1.0))
    return "\n".join([*lines, row("everything, % | ", [full, *[""] * (len(shares) - 1)])])


def recipe() -> str:
    """Test and training accuracy with plain training and with the recipe, paired by seed."""
    figures = json.loads((RESULTS / "recipe.json").read_text())["figures"]
    lines = header("accuracy, %", ["plain", "recipe", "recipe − plain"])
    for part in ("test", "train"):
        plain, ours = (
            {r["seed"]: 100 * r[f"{part}_accuracy"] for r in figures if r["training"] == training}
            for training in ("plain", "recipe")
        )
        lines.append(row(part, [centred(plain), centred(ours), difference(ours, plain)]))
    return "\n".join(lines)


def modes_of(runs: Sequence[Record]) -> list[str]:
    return [mode for mode in dict.fromkeys(r.mode for r in runs) if mode != "baseline"]


def accuracies(runs: Sequence[Record], mode: str, share: float) -> dict[int, float]:
    """In %, by seed; of a baseline that several parts have, the last part's."""
    cell = [r for r in runs if (r.mode, r.keep_ratio) == (mode, share)]
    return {r.seed: 100 * r.trained_accuracy for r in cell}


def centred(values: Mapping[int, float]) -> str:
    low, high = stats.estimate(list(values.values())).interval
    half = f" ± {(high - low) / 2:.2f}" if len(values) > 1 else ""
    return f"{mean(values.values()):.2f}{half}"


def differences(
    runs: Sequence[Record],
    mode: str,
    control: Sequence[Mapping[int, float]],
    shares: Sequence[float],
) -> list[str]:
    """The accuracy of a mode minus that of the control at each share, with its interval."""
    pairs = zip(shares, control, strict=True)
    return [difference(accuracies(runs, mode, share), other) for share, other in pairs]


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> str:
    """One accuracy minus another, paired by seed, with its interval."""
    seeds = sorted(one.keys() & other.keys())
    found = stats.paired([one[s] for s in seeds], [other[s] for s in seeds])
    low, high = found.interval
    interval = f" ({signed(low)} to {signed(high)})" if found.n > 1 else ""
    return signed(found.difference) + interval


def header(first: str, columns: Sequence[float | str]) -> list[str]:
    """The first two lines of a table; names are aligned to the left, and numbers to the right."""
    numbers = [one if isinstance(one, str) else f"{one:.0%}" for one in columns]
    names = first.split(" | ")
    rule = " --- |" * len(names) + " ---: |" * len(numbers)
    return [f"| {' | '.join([*names, *numbers])} |", f"|{rule}"]


def row(first: str, cells: Sequence[str]) -> str:
    return f"| {first} |" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def draw(path: Path) -> None:
    """Draw test error against the share kept, with correct and with wrong labels."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "drophot"
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = {
        "right labels, 10 epochs": [r for r in records_of(ONCE) if not r.equal_steps],
        "right labels, equal steps": equal_runs(),
        "a fifth of the labels wrong, 10 epochs": records_of(NOISY),
    }
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (title, runs) in zip(axes, panels.items(), strict=True):
        full = 100 - mean(accuracies(runs, "baseline", 1.0).values())
        ax.axhline(full, color="black", linestyle="-.", linewidth=1, label="everything")
        for mode, (name, color, marker, style) in DRAWN.items():
            points = {share: accuracies(runs, mode, share) for share in SHARES}
            points = {share: list(values.values()) for share, values in points.items() if values}
            if not points:
                continue
            found = [stats.estimate(values).interval for values in points.values()]
            error = [(high - low) / 2 for low, high in found]
            middle = [100 - mean(values) for values in points.values()]
            looks: dict[str, Any] = {"color": color, "marker": marker, "linestyle": style}
            ax.errorbar([100 * s for s in points], middle, error, label=name, capsize=2, **looks)
        ax.set(xscale="log", yscale="log", ylim=(2, 110), xlabel="training samples kept, %")
        ax.set_title(title, fontsize=10)
        for axis, ticks in (
            (ax.xaxis, (1, 5, 10, 20, 30, 50)),
            (ax.yaxis, (2, 5, 10, 20, 50, 100)),
        ):
            axis.set_ticks(ticks, [str(tick) for tick in ticks])
            axis.set_ticks([], minor=True)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("test error, % (lower is better)")
    handles = {  # each once, from whichever panel has it
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    legend = {"loc": "outside right upper", "frameon": False, "fontsize": 9}
    figure.legend(handles.values(), handles.keys(), **legend)
    figure.savefig(path, metadata={"Date": None})
