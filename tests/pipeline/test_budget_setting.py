"""A budget as `structured`, in a run and in a grid, against the function called by hand."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drophot import DropHot, Grid
from drophot.records import from_line, to_line
from drophot.records.pairs import pairs
from drophot.report import html, table
from drophot.structured import Budget, prune_channels

torch.manual_seed(0)
DATA = TensorDataset(torch.randn(48, 6), torch.randint(3, (48,)))
SMALL = {"score_epochs": 1, "train_epochs": 1, "finetune_epochs": 0, "batch_size": 48}
SIZE = 6 * 20 + 20 + 20 * 10 + 10 + 10 * 3 + 3


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 3)
    )


def run(**settings) -> DropHot:
    settings = {"mode": "random", "data_ratio": 0.5, "prune_ratio": 0.9, **SMALL, **settings}
    return DropHot(network, DATA, DATA, **settings)


def test_a_run_prunes_to_the_budget() -> None:
    budget = Budget(parameters=200, round_to=2)
    one = run(structured=budget)
    record = one.run()
    assert one.structured == budget
    assert 170 < record.parameters <= 200
    assert record.structured is True
    assert from_line(to_line(record)) == record
    step_by_step = run(structured=budget)
    step_by_step.select()
    by_hand = deepcopy(step_by_step.train())
    prune_channels(by_hand, example_inputs=DATA[0][0][None], to=budget)
    for name, tensor in by_hand.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], tensor)


def test_the_ratio_limits_each_layer() -> None:
    one = run(structured=Budget(parameters=230), prune_ratio=0.3)
    record = one.run()
    assert record.parameters <= 230
    assert one.model[0].out_features >= 14
    assert one.model[2].out_features >= 7


@pytest.mark.parametrize(
    ("budget", "ratio", "words"),
    [
        (Budget(parameters=150), 0.3, ["parameters=150)", "`prune_ratio=0.3`", "`prune_ratio`."]),
        (Budget(parameters=50, min_kept=0.5), 0.9, ["min_kept=0.5)", "`min_kept`."]),
        (Budget(parameters=50, min_kept=0.5), 0.5, ["min_kept=0.5)", "`min_kept`."]),
    ],
)
def test_an_unreachable_budget_is_named_by_the_settings(
    budget: Budget, ratio: float, words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"^`structured`") as error:
        run(structured=budget, prune_ratio=ratio)
    for word in words:
        assert word in str(error.value)
    assert "`to`" not in str(error.value)


def test_a_ratio_that_removes_no_channel_is_named_by_the_settings() -> None:
    with pytest.raises(ValueError, match=r"(?s)`ratio`.*0\.01.*`prune_ratio`"):
        run(structured=True, prune_ratio=0.01)


def test_the_budget_identifies_the_record() -> None:
    budgets = [Budget(parameters=250), Budget(parameters=250, round_to=2), Budget(flops=400)]
    records = [run(structured=one).run() for one in (True, *budgets)]
    assert len({record.cell for record in records}) == 4
    assert records[1].settings["structured"] == {
        "parameters": 250, "min_kept": 0.1, "round_to": 1, "whole_heads": False
    }  # fmt: skip
    assert run(structured=replace(budgets[0])).run() == records[1]
    text = table(records[1:3])
    assert "round_to=1" in text


def test_a_grid_resumes_and_refuses_another_budget(tmp_path: Path) -> None:
    grid = {"data_ratios": [0.5], "modes": ["random"], "prune_ratios": [0, 0.9], "seeds": [0]}
    pipeline = run(structured=Budget(parameters=200))
    records = Grid(pipeline, **grid).run(tmp_path)
    sizes = [record.parameters for record in records]
    assert sizes[::2] == [SIZE, SIZE]
    assert max(sizes[1::2]) <= 200
    assert records[-1] == pipeline.run()
    computed: list[object] = []
    assert Grid(pipeline, **grid).run(tmp_path, on_record=computed.append) == records
    assert not computed
    with pytest.raises(ValueError, match="structured"):
        Grid(run(structured=Budget(parameters=190)), **grid).run(tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"structured": 0.5}, TypeError, r"`structured`.*Budget.*0\.5"),
        ({"structured": Budget(latency=2)}, ValueError, r"`structured`.*latency=2"),
        ({"schedule": "gradual"}, ValueError, r"`structured=Budget\(parameters=200\)`.*gradual"),
        ({"rewind": True}, ValueError, r"`structured=Budget\(parameters=200\)`.*rewind"),
    ],
)
def test_budgets_and_combinations_that_are_refused(settings, error, message: str) -> None:
    with pytest.raises(error, match=message):
        run(**({"structured": Budget(parameters=200)} | settings))


def test_runs_of_two_budgets_are_compared_and_reported_together(tmp_path: Path) -> None:
    records = [
        run(structured=Budget(parameters=parameters), mode=mode, seed=seed).run()
        for parameters in (200, 300)
        for mode in ("random", "fresh_subset")
        for seed in (0, 1)
    ]
    html(records, tmp_path / "page.html")
    found = pairs(records, "random")
    assert len(found) == 2
    for pair in (pair for cell in found for pair in cell):
        assert pair[0].settings["structured"] == pair[1].settings["structured"]
