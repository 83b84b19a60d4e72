"""The tables of `benchmarks/little_data.py`, on records of the kind that `--quick` writes."""

import runpy
from collections.abc import Callable
from typing import Any

import pytest
from conftest import ROOT
from helpers.record import one

from drophot import Record

pytest.importorskip("scipy", reason="the extra `stats` is not installed")


@pytest.fixture(scope="module")
def table() -> Callable[..., str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return runpy.run_path(str(ROOT / "benchmarks" / "selection_tables.py"))["little_data"]


def runs(schedule: str = "one-shot", seeds: int = 1) -> list[Record]:
    """Two modes at 30 %, for equal epochs and for equal steps, and the baseline."""
    found = []
    for seed in range(seeds):
        settings: dict[str, Any] = {"seed": seed, "schedule": schedule, "model": "resnet"}
        found.append(one(**settings, mode="baseline", keep_ratio=1.0, trained_accuracy=0.8))
        for equal_steps, gain in ((False, 0.1), (True, 0.2)):
            for mode, accuracy in (("random", 0.4), ("high", 0.3 + 0.01 * seed)):
                own = {"mode": mode, "equal_steps": equal_steps, "keep_ratio": 0.3}
                found.append(one(**settings, **own, trained_accuracy=accuracy + gain))
    return found


def cells(text: str) -> list[list[str]]:
    lines = text.splitlines()
    assert len({line.count("|") for line in lines}) == 1, "as many cells in each line"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_records_of_one_seed_have_no_intervals(table: Callable[..., str]) -> None:
    assert cells(table(runs(), "random")) == [
        ["mode", "trained for", "30%"],
        ["---", "---", "---:"],
        ["random, %", "equal epochs", "50.00"],
        ["high", "equal epochs", "−10.00"],
        ["random, %", "equal steps", "60.00"],
        ["high", "equal steps", "−10.00"],
        ["everything, %", "", "80.00"],
    ]


def test_modes_are_paired_with_their_control_by_seed(table: Callable[..., str]) -> None:
    found = cells(table(runs(seeds=2), "random"))
    assert found[2][2] == "50.00 ± 0.00"
    assert found[3][2] == "−9.50 (−15.85 to −3.15)"
    lacking = [r for r in runs(seeds=2) if (r.seed, r.mode, r.equal_steps) != (0, "random", False)]
    assert cells(table(lacking, "random"))[3][2] == "−9.00", "one pair is left"


def test_other_schedules_and_shares_without_a_control_are_left_out(
    table: Callable[..., str],
) -> None:
    mixed = [*runs("joint"), *(r for r in runs() if r.mode != "baseline")]
    assert table(mixed, "random", "joint") == table(runs(), "random")
    rare = one(mode="high", keep_ratio=0.05, trained_accuracy=0.1, model="resnet")
    found = cells(table([*runs(), rare], "random"))
    assert found[0][2:] == ["30%", "5%"]
    assert found[2][2:] == ["50.00", ""]
    assert found[3][2:] == ["−10.00", ""]
