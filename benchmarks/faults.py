"""What the faults of the released code do to the paper's Table 1: tables and figures.

`python benchmarks/table1.py` computes the records, and `python benchmarks/paper.py --write` writes
the results to docs/results.md.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from drophot import Record, records, stats

RESULTS = Path(__file__).parent / "results"
CORESETS = ("low", "high")


class Faults(NamedTuple):
    """Which faults of the released code a protocol has."""

    scores: bool
    """Forgetting scores are noise."""
    masks: bool
    """Pruned weights grow back."""
    baseline: bool
    """The baseline is trained in evaluation mode, so without BatchNorm."""

    @property
    def name(self) -> str:
        """The name of the protocol in records."""
        if all(self):
            return "released"
        found = [name for name, present in zip(self._fields, self, strict=True) if present]
        return "-".join(["released", *found]) if found else "paper"


COMBINATIONS = [Faults(*each) for each in product((False, True), repeat=3)]


class Differences:
    """Fine-tuned accuracies of a coreset minus those of the baseline, in points, by seed."""

    def __init__(self, runs: Iterable[Record]) -> None:
        self.runs = list(runs)
        cells = {(r.keep_ratio, r.prune_ratio) for r in self.runs if r.mode != "baseline"}
        if len(cells) != 1:
            raise ValueError(f"`runs` must have one pair of ratios, got {sorted(cells)}.")
        self.keep_ratio, self.prune_ratio = cells.pop()
        self.complete = [seed for seed in sorted({r.seed for r in self.runs}) if self._has(seed)]

    def accuracies(self, faults: Faults, mode: str) -> dict[int, float]:
        """By seed, in %. A baseline does not depend on the scores, nor a random subset on it."""
        shared = {"baseline": faults._replace(scores=False)}
        shared["random"] = faults._replace(scores=False, baseline=False)
        name = shared.get(mode, faults).name
        return {
            r.seed: 100 * r.finetuned_accuracy
            for r in self.runs
            if (r.protocol, r.mode, r.prune_ratio) == (name, mode, self.prune_ratio)
        }

    def of(self, faults: Faults, mode: str) -> list[float]:
        """The difference of each complete seed."""
        one, base = self.accuracies(faults, mode), self.accuracies(faults, "baseline")
        return [one[seed] - base[seed] for seed in self.complete]

    def coresets(self, faults: Faults) -> list[float]:
        """The difference of each complete seed, averaged over low and high."""
        return [mean(pair) for pair in zip(*(self.of(faults, m) for m in CORESETS), strict=True)]

    def _has(self, seed: int) -> bool:
        modes = ("baseline", *CORESETS, "random")
        return all(
            seed in self.accuracies(faults, mode) for faults in COMBINATIONS for mode in modes
        )


def combinations(found: Differences) -> str:
    """A row for each combination of faults: the baseline, and the differences from it."""
    lines = [
        "| scores | masks | baseline trained in | n | baseline, % | low − base | high − base "
        "| random − base |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for faults in COMBINATIONS:
        base = [found.accuracies(faults, "baseline")[seed] for seed in found.complete]
        cells = [interval(found.of(faults, mode)) for mode in (*CORESETS, "random")]
        lines.append(
            f"| {'noise' if faults.scores else 'right'} "
            f"| {'dropped' if faults.masks else 'held'} "
            f"| {'evaluation mode' if faults.baseline else 'training mode'} "
            f"| {len(base)} | {mean(base):.2f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def effects(found: Differences) -> str:
    """What each fault adds to "coreset − base", averaged over the other two, paired by seed."""
    lines = [
        "| fault | n | adds to coreset − base | 95 % interval | p | p, Holm |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    pairs = [(name, main_effect(found, position)) for position, name in enumerate(Faults._fields)]
    adjusted = stats.holm(pair.p_value for _, pair in pairs)
    for (name, pair), p_holm in zip(pairs, adjusted, strict=True):
        low, high = pair.interval
        lines.append(
            f"| {name} | {pair.n} | {signed(pair.difference)} | {signed(low)} to {signed(high)} | "
            f"{pair.p_value:.3f} | {p_holm:.3f} |"
        )
    return "\n".join(lines)


def main_effect(found: Differences, position: int) -> stats.Paired:
    """Coreset − base with a fault less that without it, over the other two faults."""
    means: list[list[float]] = []
    for present in (True, False):
        chosen = [found.coresets(one) for one in COMBINATIONS if one[position] == present]
        means.append([mean(values) for values in zip(*chosen, strict=True)])
    return stats.paired(means[0], means[1])


def published() -> list[dict[str, Any]]:
    """The rows of the authors' accuracies for ResNet-18 on CIFAR-100, in %, one run each."""
    with (RESULTS / "published_accuracies.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == "CIFAR100"]
    numbers = [
        {k: float(v) for k, v in row.items() if k not in ("model", "dataset")} for row in rows
    ]
    return [row for row in numbers if row["prune_ratio"] >= 0.4 and row["data_ratio"] <= 0.3]


def side_by_side() -> str:
    """The paper's Table 1, and the same cells by the paper's text."""
    runs = records.read(RESULTS / "grid_resnet18_tiny100.jsonl")
    lines = [
        "| kept | removed | low − base, published | high − base, published "
        "| low − base | high − base | random − base | n |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in published():
        keep, prune = row["data_ratio"], row["prune_ratio"]
        cells = [signed(row[f"finetuned_{mode}"] - row["finetuned_baseline"]) for mode in CORESETS]
        base = finetuned(runs, "baseline", 1.0, prune)
        for mode in (*CORESETS, "random"):
            one = finetuned(runs, mode, keep, prune)
            cells.append(interval([one[s] - base[s] for s in sorted(one)]) if one else "")
        count = len(finetuned(runs, "low", keep, prune)) or ""
        lines.append(f"| {keep:.0%} | {prune:.0%} | {' | '.join(cells)} | {count} |")
    return "\n".join(lines)


def finetuned(
    runs: Iterable[Record], mode: str, keep_ratio: float, prune_ratio: float
) -> dict[int, float]:
    """Accuracies after fine-tuning by seed, in %."""
    return {
        r.seed: 100 * r.finetuned_accuracy
        for r in runs
        if (r.mode, r.keep_ratio, r.prune_ratio) == (mode, keep_ratio, prune_ratio)
    }


def published_curves(keep_ratio: float, prune_ratio: float) -> dict[str, list[float]]:
    """The authors' test accuracy in % before and after each epoch of fine-tuning, by mode."""
    found: dict[str, list[float]] = {}
    with (RESULTS / "published_curves.csv").open() as file:
        for row in csv.DictReader(file):
            if (float(row["data_ratio"]), float(row["prune_ratio"])) == (keep_ratio, prune_ratio):
                found.setdefault(row["mode"], []).append(float(row["test_accuracy"]))
    return found


def interval(values: list[float]) -> str:
    """The mean of some differences with its 95 % interval."""
    found = stats.estimate(values)
    low, high = found.interval
    return f"{signed(found.mean)} [{signed(low)}, {signed(high)}]"


def signed(value: float) -> str:
    return f"{value:+z.2f}".replace("-", "−")
