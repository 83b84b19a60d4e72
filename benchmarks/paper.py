"""Generate the tables of docs/results.md and docs/result_tables.md from the records.

    python benchmarks/paper.py            prints the tables
    python benchmarks/paper.py --write    writes them to the pages, between their markers, and draws
                                          the figures of docs/results.md

The records are in benchmarks/results. They come from examples/paper_grid.py and from selection.py,
importances.py, forgotten.py, recipe.py and table1.py in benchmarks; docs/results.md has the
commands.
"""

import json
import re
from argparse import ArgumentParser
from pathlib import Path
from statistics import mean, stdev

import faults
from common import read_grid as read
from faults import Differences, Faults, signed
from forgotten_tables import forgotten
from importance_tables import importances
from selection_tables import draw, selected

from drophot import Record, records, report, stats

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "docs" / name for name in ("results.md", "result_tables.md")]
FIGURES = ROOT / "docs" / "_static"

MODES = ("baseline", "low", "high", "random")

# An accuracy, and the prune ratios that it is averaged over.
STEPS: list[tuple[str, stats.Measure, list[float]]] = [
    ("before pruning", "trained_accuracy", [0]),
    ("after pruning by 20 to 60 %", "pruned_accuracy", [0.2, 0.4, 0.6]),
    ("after pruning by 80 %", "pruned_accuracy", [0.8]),
    ("after fine-tuning, 20 to 80 % removed", "finetuned_accuracy", [0.2, 0.4, 0.6, 0.8]),
]

# Accuracies of LeNet on MNIST that the authors published with their code, one run each, in %, after
# pruning and after fine-tuning, by share kept and share removed.
PUBLISHED = {
    ("baseline", 1.0, 0.6): (93.18, 98.83),
    ("baseline", 1.0, 0.8): (43.24, 99.06),
    ("low", 0.1, 0.6): (86.30, 99.09),
    ("high", 0.1, 0.6): (96.52, 99.02),
    ("low", 0.1, 0.8): (38.29, 99.00),
    ("high", 0.1, 0.8): (59.00, 99.04),
    ("low", 0.5, 0.6): (97.97, 98.99),
    ("high", 0.5, 0.6): (96.70, 98.91),
    ("low", 0.5, 0.8): (72.63, 98.63),
    ("high", 0.5, 0.8): (42.10, 99.04),
}


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the tables to the pages")
    options = parser.parse_args()
    found = tables()
    if options.write:
        for page in PAGES:
            page.write_text(filled(page.read_text(), found))
        draw(FIGURES / "little_data.svg")
        draw_resnets()
    else:
        for name, table in found.items():
            print(f"{name}\n\n{table}\n")


def tables() -> dict[str, str]:
    """All tables, by the names of their markers."""
    fcnet, lenet = read("fcnet"), read("lenet")
    slow = {"fcnet": read("fcnet_plain"), "lenet": read("lenet_plain")}
    released, more = read("lenet_released"), read("lenet_released_pruned")
    wide = [r for r in fcnet if uncontrolled(r)]
    once = [r for r in wide if r.prune_ratio == 0]  # one training serves every prune ratio
    controls = [r for r in fcnet if r.prune_ratio == 0.8 and r.keep_ratio in (0.1, 1)]
    resnets = Differences(records.read(RESULTS / "table1_resnet18_cifar10.jsonl"))
    return {
        "summary": summary({"FCNet": wide, "LeNet": lenet}),
        "side_by_side": faults.side_by_side(),
        "combinations": faults.combinations(resnets),
        "effects": faults.effects(resnets),
        "trained": report.differences(once, measure="trained_accuracy"),
        "pruned": report.differences(wide, measure="pruned_accuracy"),
        "finetuned": report.differences(wide, measure="finetuned_accuracy"),
        "findings": findings(wide, STEPS),
        "findings_lenet": findings(lenet, STEPS),
        "trained_lenet": report.differences(
            [r for r in lenet if r.prune_ratio == 0], measure="trained_accuracy"
        ),
        "pruned_lenet": report.differences(lenet, measure="pruned_accuracy"),
        "finetuned_lenet": report.differences(lenet, measure="finetuned_accuracy"),
        "agreement": agreement(slow, {"fcnet": fcnet, "lenet": lenet}),
        "controls": report.table(controls),
        "controls_pruned": report.differences(
            [r for r in controls if not r.reinitialized], measure="pruned_accuracy"
        ),
        "published": published(released + more, lenet),
        "fcnet": report.table(wide),
        "lenet": report.table(lenet),
        "lenet_released": report.table(released),
        "schedules": report.table([
            r
            for name in ("schedules", "global", "erk", "lamp")
            for r in read(f"fcnet_{name}")
            if r.prune_ratio or name == "schedules"
        ]),
        "recovery": recovery([
            *wide,
            *(r for r in read("fcnet_schedules") if r.prune_ratio),
            *lenet,
        ]),
        "channels": report.table(read("lenet_channels")),
        **selected(),
        **importances(),
        **forgotten(),
        "latency": latency(),
        "recalibrated": recalibrated(),
    }


def summary(grids: dict[str, list[Record]]) -> str:
    """Coreset minus baseline, averaged over the data ratios of a grid and paired by seed."""
    lines = [
        "| network | accuracy | n | baseline, % | low − base | high − base | random − base |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for network, runs in grids.items():
        for step, measure, prune_ratios in STEPS:
            cells = [r for r in runs if r.prune_ratio in prune_ratios]
            seeds = sorted({r.seed for r in cells})
            means = {
                mode: [
                    100 * mean(getattr(r, measure) for r in cells if (r.mode, r.seed) == (mode, s))
                    for s in seeds
                ]
                for mode in MODES
            }
            base = means["baseline"]
            gains = [
                faults.interval([a - b for a, b in zip(means[mode], base, strict=True)])
                for mode in MODES[1:]
            ]
            lines.append(
                f"| {network} | {step} | {len(seeds)} | {mean(base):.2f} | {' | '.join(gains)} |"
            )
    return "\n".join(lines)


def draw_resnets() -> None:
    """Draw docs/_static/answer.svg and docs/_static/table1_curves.svg."""
    from fault_figures import draw_answer, draw_curves, faults_row, published_row, text_row

    hundred = records.read(RESULTS / "grid_resnet18_tiny100.jsonl")
    found = Differences(records.read(RESULTS / "table1_resnet18_cifar10.jsonl"))
    grids = {name: [r for r in read(name) if uncontrolled(r)] for name in ("fcnet", "lenet")}
    draw_answer(
        FIGURES / "answer.svg",
        [
            published_row(),
            text_row("the text: ResNet-18, 100 classes", hundred, 0.3, 0.8),
            text_row("the text: FCNet, MNIST", grids["fcnet"], 0.3, 0.8),
            text_row("the text: LeNet, MNIST", grids["lenet"], 0.3, 0.8),
            faults_row("the text: ResNet-18, 800 images", found, Faults(False, False, False)),
            faults_row("scores are noise", found, Faults(True, False, False)),
            faults_row("masks are dropped", found, Faults(False, True, False)),
            faults_row("baseline in evaluation mode", found, Faults(False, False, True)),
            faults_row("all three faults", found, Faults(True, True, True)),
        ],
    )
    draw_curves(FIGURES / "table1_curves.svg", hundred, found)


def recovery(runs: list[Record]) -> str:
    """Accuracy of the pruned baseline by epoch of fine-tuning (one shot, layer by layer)."""
    epochs = (1, 2, 3, 5, 10)
    lines = [
        f"| model | removed | n | after pruning | {' | '.join(f'epoch {e}' for e in epochs)} |",
        f"| --- | ---: | ---: | ---: |{' ---: |' * len(epochs)}",
    ]
    cells: dict[tuple[str, float], list[Record]] = {}
    for r in runs:
        plain = r.schedule == "one-shot" and not r.rewound and uncontrolled(r)
        if r.mode == "baseline" and plain:
            cells.setdefault((r.model, r.prune_ratio), []).append(r)
    for (model, removed), group in sorted(cells.items()):
        curves = [(r.pruned_accuracy, *r.finetune_curve) for r in group]
        means = [f"{100 * mean(curve[epoch] for curve in curves):.2f}" for epoch in (0, *epochs)]
        lines.append(f"| {model} | {removed:.0%} | {len(group)} | {' | '.join(means)} |")
    return "\n".join(lines)


def recalibrated() -> str:
    """Accuracy right after pruning, before and after recalibrating BatchNorm."""
    figures = json.loads((RESULTS / "recalibrate.json").read_text())["figures"]
    lines = [
        "| removed | trained on | after pruning | BatchNorm recalibrated |",
        "| ---: | --- | ---: | ---: |",
    ]
    for row in sorted(figures, key=lambda row: row["prune_ratio"]):
        lines.append(
            f"| {row['prune_ratio']:.0%} | {row['trained on']} | {100 * row['pruned']:.2f} | "
            f"{100 * row['recalibrated']:.2f} |"
        )
    return "\n".join(lines)


def latency() -> str:
    """Time of a forward pass of the paper's networks, dense and with channels removed."""
    figures = json.loads((RESULTS / "prune_structured.json").read_text())["figures"]
    lines = [
        "| network | channels removed | parameters | input | batch | dense, ms | pruned, ms "
        "| faster |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in figures:
        counts = f"{row['dense']['parameters']:,} to {row['drophot']['parameters']:,}"
        for name, times in row["latency_ms"].items():
            size, batch = name.split(", batch ")
            lines.append(
                f"| {row['model']} | {row['ratio']:.0%} | {counts} | {size} | {batch} | "
                f"{times['dense']:.3g} | {times['drophot']:.3g} | "
                f"{times['dense'] / times['drophot']:.2f}× |"
            )
    return "\n".join(lines)


def findings(runs: list[Record], steps: list[tuple[str, stats.Measure, list[float]]]) -> str:
    """Differences over the grid: the mean of each seed over its cells, paired by seed."""
    rows: list[tuple[str, str, stats.Paired]] = []
    for step, measure, prune_ratios in steps:
        cells = [r for r in runs if r.prune_ratio in prune_ratios]
        seeds = sorted({r.seed for r in cells})
        means = {
            mode: [
                mean(getattr(r, measure) for r in cells if (r.mode, r.seed) == (mode, seed))
                for seed in seeds
            ]
            for mode in MODES
        }
        for one, other in (
            ("low", "baseline"),
            ("high", "baseline"),
            ("random", "baseline"),
            ("low", "random"),
            ("high", "random"),
            ("high", "low"),
        ):
            rows.append((step, f"{one} − {other}", stats.paired(means[one], means[other])))
    return compared_table(rows)


def compared_table(rows: list[tuple[str, str, stats.Paired]]) -> str:
    """Differences with their intervals, and Holm's p over all of them."""
    adjusted = stats.holm(found.p_value for _, _, found in rows)
    lines = [
        "| accuracy | compared | n | difference | 95 % interval | p | p, Holm | d_z |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (step, compared, found), p_holm in zip(rows, adjusted, strict=True):
        low, high = found.interval
        lines.append(
            f"| {step} | {compared} | {found.n} | {signed(100 * found.difference)} | "
            f"{signed(100 * low)} to {signed(100 * high)} | {chance(found.p_value)} | "
            f"{chance(p_holm)} | {signed(found.effect_size)} |"
        )
    return "\n".join(lines)


def published(released: list[Record], paper: list[Record]) -> str:
    """Accuracies of LeNet: published, with the released protocol, and with the paper's text."""
    lines = [
        "| kept | share | removed | step | published | released protocol | lowest | highest | n "
        "| sd away | paper's text | n |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    words = ("after pruning", "after fine-tuning")
    for number, step in enumerate(("pruned", "finetuned")):
        for (mode, keep, prune), accuracies in PUBLISHED.items():
            row = [mode, f"{keep:.0%}", f"{prune:.0%}", words[number]]
            row.append(f"{accuracies[number]:.2f}")
            for runs, ends in ((released, True), (paper, False)):
                values = [
                    100 * getattr(r, f"{step}_accuracy")
                    for r in runs
                    if (r.mode, r.keep_ratio, r.prune_ratio) == (mode, keep, prune)
                    and (step == "pruned" or r.finetune_curve)
                ]
                row.append(f"{mean(values):.2f} ± {stdev(values):.2f}" if values else "")
                if ends:
                    row += [f"{min(values):.2f}", f"{max(values):.2f}"]
                row.append(f"{len(values)}" if values else "")
                if ends:
                    row.append(signed((accuracies[number] - mean(values)) / stdev(values)))
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def agreement(slow: dict[str, list[Record]], fast: dict[str, list[Record]]) -> str:
    """The same cells with the plain loop and with `fit`: the mean of each seed, paired by seed."""
    lines = [
        "| model | accuracy | cells | n | plain loop | fast − plain | 95 % interval | p "
        "| sd of seeds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    measures: list[tuple[str, stats.Measure]] = [
        ("before pruning", "trained_accuracy"),
        ("after pruning", "pruned_accuracy"),
        ("after fine-tuning", "finetuned_accuracy"),
    ]
    for model in slow:
        both = [
            {cell(r): r for r in runs if uncontrolled(r)} for runs in (slow[model], fast[model])
        ]
        cells = both[0].keys() & both[1].keys()
        seeds = sorted({seed for *_, seed in cells})
        for step, measure in measures:
            means = [
                [mean(getattr(runs[c], measure) for c in cells if c[-1] == seed) for seed in seeds]
                for runs in both
            ]
            spread = mean(
                stdev(getattr(both[0][*c, seed], measure) for seed in seeds)
                for c in {c[:-1] for c in cells}
            )
            found = stats.paired(means[1], means[0])
            low, high = found.interval
            lines.append(
                f"| {model} | {step} | {len(cells) // len(seeds)} | {found.n} | "
                f"{100 * mean(means[0]):.2f} | {signed(100 * found.difference)} | "
                f"{signed(100 * low)} to {signed(100 * high)} | {chance(found.p_value)} | "
                f"{100 * spread:.2f} |"
            )
    return "\n".join(lines)


def cell(record: Record) -> tuple[str, float, float, int]:
    return record.mode, record.keep_ratio, record.prune_ratio, record.seed


def uncontrolled(record: Record) -> bool:
    return not record.equal_steps and not record.reinitialized


def chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def filled(text: str, found: dict[str, str]) -> str:
    """A page with each of its tables between its markers."""
    names = re.findall(r"<!-- (\w+) -->", text)
    for name in names:
        if name == "end":
            continue
        if name not in found:
            raise ValueError(f"The marker <!-- {name} --> has no table.")
        marks = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(marks, lambda m, t=found[name]: f"{m[1]}\n{t}\n\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    main()
