"""Tables of the training samples that pruned networks forget, from the figures of forgotten.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from common import RESULTS
from selection_tables import centred, header, row

FIFTHS = ["easiest fifth", "second", "third", "fourth", "hardest fifth"]
RENAMED = {"dense, trained on": "dense, trained for 2 more epochs"}  # in stored figures
Rows = Sequence[dict[str, Any]]


def forgotten() -> dict[str, str]:
    """All tables, by the names of their markers."""
    figures = json.loads((RESULTS / "forgotten.json").read_text())["figures"]
    return {"forgotten": by_network(figures), "forgotten_fifths": by_fifth(figures)}


def by_network(figures: Rows) -> str:
    """Accuracies, and the shares of samples that each network forgets, in % of those correct."""
    columns: dict[str, Callable[[dict[str, Any]], float]] = {
        "test accuracy": lambda r: r["test_accuracy"][1],
        "forgotten": lambda r: r["forgotten"] / r["correct"][0],
        "of those never forgotten in training": lambda r: shares(r, "forgotten in training")[0],
        "of those forgotten in training": lambda r: shares(r, "forgotten in training")[1],
        "gained": lambda r: r["gained"] / r["correct"][0],
    }
    lines = header("network", list(columns))
    first = [r for r in figures if r["network"] == figures[0]["network"]]
    dense = {r["seed"]: 100 * r["test_accuracy"][0] for r in first}
    lines.append(row("dense", [centred(dense), *[""] * (len(columns) - 1)]))
    for network, rows in networks(figures).items():
        cells = [centred({r["seed"]: 100 * of(r) for r in rows}) for of in columns.values()]
        lines.append(row(network, cells))
    return "\n".join(lines)


def by_fifth(figures: Rows) -> str:
    """The share forgotten, in %, of each fifth of the samples that were correct before."""
    lines = header("network | score", FIFTHS)
    for network, rows in networks(figures).items():
        for score in ("EL2N", "AUM"):
            found = [{r["seed"]: 100 * shares(r, score)[fifth] for r in rows} for fifth in range(5)]
            lines.append(row(f"{network} | {score}", [centred(values) for values in found]))
    return "\n".join(lines)


def networks(figures: Rows) -> dict[str, Rows]:
    names: dict[str, None] = dict.fromkeys(r["network"] for r in figures)
    return {RENAMED.get(name, name): [r for r in figures if r["network"] == name] for name in names}


def shares(found: dict[str, Any], score: str) -> list[float]:
    """The share forgotten of each group, the easiest first."""
    return [lost / total for lost, total in zip(*found[score], strict=True)]
