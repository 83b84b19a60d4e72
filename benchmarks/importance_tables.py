"""Tables of importances compared with magnitude on MNIST, from the records of importances.py."""

from __future__ import annotations

from collections.abc import Sequence

from common import read_grid
from selection_tables import centred, difference, header, row

from drophot import Record
from drophot.stats import Measure

WORDS = {
    "l1": "L1 norm",
    "layer_normalized": "magnitude, layer-normalized",
    "taylor_of_channels": "Taylor",
    "fisher": "Fisher",
    "bn_scale": "BatchNorm scale",
    "Random": "random",
}
MEASURES: dict[Measure, str] = {"pruned_accuracy": "pruned", "finetuned_accuracy": "fine-tuned"}


def importances() -> dict[str, str]:
    """All tables, by the names of their markers."""
    weights = [r for part in ("global", "lamp") for r in read_grid(f"importances_{part}")]
    channels = read_grid("importances_channels")
    return {
        "importances": compared(weights, "baseline"),
        "importances_coreset": compared(weights, "high"),
        "importances_channels": compared(channels, "baseline"),
        "importances_channels_coreset": compared(channels, "high"),
    }


def compared(records: Sequence[Record], mode: str) -> str:
    """The accuracies by magnitude, and the others minus these, paired by seed."""
    runs = [r for r in records if r.mode == mode]
    dense = {r.seed: 100 * r.finetuned_accuracy for r in runs if r.prune_ratio == 0}
    ratios = sorted({r.prune_ratio for r in runs} - {0})
    cells: list[tuple[Measure, float]] = [(m, ratio) for m in MEASURES for ratio in ratios]
    lines = header("ranked by", [f"{ratio:.0%}, {MEASURES[m]}" for m, ratio in cells])
    control = [accuracies(runs, "magnitude", *cell) for cell in cells]
    lines.append(row("magnitude, %", [centred(values) for values in control]))
    for name in dict.fromkeys(map(ranked_by, runs)):
        if name != "magnitude":
            pairs = zip(cells, control, strict=True)
            found = [difference(accuracies(runs, name, *cell), other) for cell, other in pairs]
            lines.append(row(name, found))
    blank = [""] * (len(cells) - 1)
    return "\n".join([*lines, row("dense, fine-tuned as well, %", [*blank, centred(dense)])])


def ranked_by(record: Record) -> str:
    return "LAMP" if record.scope == "lamp" else WORDS.get(record.importance, record.importance)


def accuracies(
    runs: Sequence[Record], name: str, measure: Measure, ratio: float
) -> dict[int, float]:
    """In %, by seed."""
    cell = [r for r in runs if ranked_by(r) == name and r.prune_ratio == ratio]
    return {r.seed: 100 * getattr(r, measure) for r in cell}
