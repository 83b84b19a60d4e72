"""Schedules, the lottery ticket, BatchNorm recalibration and channels in steps 4 and 5 of a run."""

import json
import warnings
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

import pytest
import torch
from helpers.controls import assert_same_weights
from helpers.graphs import graphs  # noqa: F401 (a fixture)
from helpers.runs import TRAIN, Normed, drop_hot, points
from helpers.stand_in import Graph
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import DataLoader

from drophot import Grid, Masks, evaluate, fit
from drophot.prune import cubic, geometric, magnitude_prune, recalibrate_bn
from drophot.records import Record, from_line, to_line
from drophot.report import differences, table
from drophot.stats import compare
from drophot.structured import Pruned, prune_channels


class Watched(torch.optim.Adam):
    """Keeps how many weights are zero after each step, its hooks included."""

    made: list["Watched"]

    def __init__(self, parameters) -> None:
        super().__init__(parameters, lr=1e-2)
        self.zeros: list[int] = []
        Watched.made.append(self)

    def note(self) -> None:
        weights = [p for group in self.param_groups for p in group["params"] if p.dim() > 1]
        self.zeros.append(sum(int((weight == 0).sum()) for weight in weights))


def watched_fit(model, dataset, epochs, *, optimizer, batch_size, seed, on_batch, on_epoch) -> None:
    """A user's own loop."""
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        for x, y, *index in DataLoader(dataset, batch_size, shuffle=True, generator=order):
            optimizer.zero_grad()
            logits = model(x)
            nn.functional.cross_entropy(logits, y).backward()
            optimizer.step()
            optimizer.note()
            if on_batch is not None:
                on_batch(index[0], logits, y)
        if on_epoch is not None:
            on_epoch(epoch)


@pytest.mark.parametrize("schedule", ["gradual", "iterative"])
@pytest.mark.parametrize("scope", ["layer", "global", "erk", "lamp"])
def test_a_schedule_prunes_when_it_says_and_ends_exactly(schedule: str, scope: str) -> None:
    Watched.made = []
    run = drop_hot(
        schedule=schedule,
        scope=scope,
        prunings=4,
        prune_ratio=0.75,
        finetune_epochs=4,
        optimizer=Watched,
        fit=watched_fit,
    )
    record = run.run()
    zeros = Watched.made[-1].zeros
    steps = 4 * ceil(len(TRAIN) / run.batch_size)
    assert len(zeros) == steps
    sizes = [mask.numel() for mask in run.masks.values()]
    ratios = (cubic if schedule == "gradual" else geometric)(0.75, 4)
    every = steps // 2 // 3 if schedule == "gradual" else steps // 4
    for step, found in enumerate(zeros, start=1):
        ratio = ratios[min(step // every, 3)]
        shares = sizes if scope == "layer" else [sum(sizes)]
        assert found == sum(int(ratio * size + 0.5) for size in shares)
    assert record.sparsity == pytest.approx(0.75, abs=0.01)
    assert record.sparsity == run.masks.sparsity == Masks.from_zeros(run.model).sparsity
    assert (record.schedule, record.scope) == (schedule, scope)


@pytest.mark.parametrize("schedule", ["gradual", "iterative"])
def test_a_schedule_of_one_is_one_shot(schedule: str) -> None:
    one, same = drop_hot(), drop_hot(schedule=schedule, prunings=1)
    first, second = one.run(), same.run()
    assert_same_weights(one.model, same.model)
    fields = {"schedule": schedule, "fingerprint": second.fingerprint}
    assert second == replace(first, **fields)
    assert first.fingerprint != second.fingerprint


def test_masks_of_the_users_own_hold_also_with_a_schedule() -> None:
    run = drop_hot(schedule="iterative", prune_ratio=0.5)
    run.score()
    run.select()
    run.train()
    run.prune()
    mine = magnitude_prune(run.model, 0.9)
    run.masks = mine
    assert run.finetune().sparsity == mine.sparsity


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("schedule", ["gradual", "iterative"])
def test_a_schedule_is_not_captured_in_a_graph(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph would repeat the zeroing, and not the counting."""
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr(
        "torch.cuda.is_current_stream_capturing",
        lambda: isinstance(_get_current_dispatch_mode(), Graph),
    )
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    run = drop_hot(optimizer=optimizer, schedule=schedule, prunings=5, finetune_epochs=4)
    assert run.run().sparsity == pytest.approx(0.6, abs=0.02)
    assert run.pruner.finished


def test_a_loop_that_takes_too_few_steps_is_told() -> None:
    def idle(model, dataset, epochs, **how) -> None:
        for epoch in range(epochs):
            how["on_epoch"](epoch)

    run = drop_hot(schedule="iterative", mode="random", fit=idle)
    run.select()
    run.train()
    run.prune()
    with pytest.raises(RuntimeError, match="`fit` .*step.* 0 steps"):
        run.finetune()


def test_replaced_masks_stay_on_the_run() -> None:
    run = drop_hot(schedule="iterative", mode="random")
    run.select()
    run.train()
    run.prune()
    run.masks = mine = magnitude_prune(run.model, 0.3)
    assert run.finetune().sparsity == pytest.approx(mine.sparsity)
    assert run.masks is mine


def test_the_ticket_starts_where_training_started() -> None:
    started: list[dict[str, Tensor]] = []

    def fit(model, dataset, epochs, **rest) -> None:
        started.append(deepcopy(model.state_dict()))
        watched_fit(model, dataset, epochs, **rest)

    Watched.made = []
    run = drop_hot(rewind=True, mode="random", optimizer=Watched, fit=fit, finetune_epochs=2)
    record = run.run()
    training, finetuning = started
    assert run.masks is not None
    for name, tensor in finetuning.items():
        expected = training[name] * run.masks[name] if name in run.masks else training[name]
        assert torch.equal(tensor, expected)
    assert record.rewound
    assert record.sparsity == run.masks.sparsity


def normed(**settings):
    return drop_hot(**{"model": Normed, "mode": "random", "finetune_epochs": 0, **settings})


def test_batchnorm_anew_is_that_of_the_pruned_network_on_the_training_set() -> None:
    plain, anew = normed(prune_ratio=0.6), normed(prune_ratio=0.6, recalibrate_bn=True)
    first, second = plain.run(), anew.run()
    assert second.recalibrated
    assert not first.recalibrated
    state, other = plain.model.state_dict(), anew.model.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]) == ("running" not in name and "num_" not in name)
    assert second.pruned_accuracy == evaluate(anew.model, anew.test_set)
    # By hand, on all samples at once: the same but for the batches.
    by_hand = deepcopy(plain.model)
    recalibrate_bn(by_hand, [torch.stack([x for x, *_ in TRAIN])])
    for name, tensor in by_hand.state_dict().items():
        if "running_mean" in name:
            torch.testing.assert_close(tensor, other[name], rtol=0.2, atol=0.1)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.flatten(1)))


def test_structured_is_a_smaller_network_that_is_trained_on() -> None:
    run = drop_hot(structured=True, prune_ratio=0.5)
    record = run.run()
    before = sum(p.numel() for p in run.factory().parameters())
    assert isinstance(run.channels, Pruned)
    assert record.parameters == sum(p.numel() for p in run.model.parameters())
    assert record.parameters == run.channels.parameters.after < before
    assert record.structured
    weights = [p.numel() for p in run.factory().parameters() if p.dim() > 1]
    left = [p.numel() for p in run.model.parameters() if p.dim() > 1]
    assert record.sparsity == pytest.approx(1 - sum(left) / sum(weights))
    assert len(record.finetune_curve) == run.finetune_epochs
    assert evaluate(run.model, run.test_set) == record.finetuned_accuracy
    # The same as by hand: the network of step 3, cut and trained on.
    other = drop_hot(structured=True, prune_ratio=0.5)
    other.score()
    other.select()
    model = deepcopy(other.train())
    prune_channels(model, 0.5, TRAIN[0][0][None])
    other.prune()
    assert_same_weights(model, other.model)
    assert evaluate(model, other.test_set) == other.pruned_accuracy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "slow"}, "`schedule` .*one-shot.*gradual.*iterative.*'slow'"),
        ({"rewind": True, "reinitialize": True}, "`rewind.*reinitialize"),
        ({"rewind": True, "schedule": "gradual"}, "`rewind.*schedule='gradual'"),
        ({"reinitialize": True, "schedule": "gradual"}, "`reinitialize.*schedule='gradual'"),
        ({"structured": True, "schedule": "iterative"}, "`structured.*schedule='iterative'"),
        ({"structured": True, "rewind": True}, "`structured.*rewind"),
        ({"structured": True, "scope": "global"}, "`structured.*scope='global'"),
        (
            {"protocol": "released", "schedule": "gradual"},
            "`protocol=.released.`.*schedule='gradual'",
        ),
        ({"protocol": "released", "structured": True}, "`protocol=.released.`.*structured=True"),
        ({"schedule": "iterative", "finetune_epochs": 0}, "`prunings` .* 0, got 5"),
        ({"schedule": "iterative", "prunings": 0}, "`prunings` .*0"),
        ({"recalibrate_bn": True}, "`recalibrate_bn` .*BatchNorm.*Sequential"),
        ({"scope": "all"}, "`scope` .*'all'"),
        ({"structured": True, "prune_ratio": 0.01}, "`ratio` .*0.01"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(settings: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        drop_hot(**settings)
    if settings.keys() <= {"schedule", "rewind", "recalibrate_bn", "reinitialize"}:
        with pytest.raises(ValueError, match=message):
            drop_hot().replace(**settings)


@pytest.mark.parametrize("schedule", ["gradual", "iterative"])
def test_a_loop_too_slow_for_the_schedule_is_found_out_after_an_epoch(schedule: Any) -> None:
    """One step for every eight batches: the gradual schedule takes half of the steps."""
    epochs: list[int] = []

    def accumulating(model: nn.Module, data: Any, count: int, **how: Any) -> None:
        how["batch_size"] *= 8
        after = how["on_epoch"]
        how["on_epoch"] = lambda epoch: (epochs.append(epoch), after(epoch))
        fit(model, data, count, **how)

    run = drop_hot(mode="random", schedule=schedule, finetune_epochs=4, fit=accumulating)
    run.select()
    run.train()
    run.prune()
    epochs.clear()
    with pytest.raises(RuntimeError, match=r"`fit` .* 1 steps in 1 of 4 epochs"):
        run.finetune()
    assert epochs == [0]


@pytest.mark.parametrize("name", ["rewind", "recalibrate_bn", "structured"])
def test_flags_are_flags(name: str) -> None:
    with pytest.raises(TypeError, match=f"`{name}` .*True.*False.* 1"):
        drop_hot(**{name: 1})


CONTROLS = ["rewind", "gradual", "iterative", "reinitialize"]


@pytest.mark.slow
def test_a_grid_of_controls_is_its_runs_one_by_one(tmp_path) -> None:
    pipeline = drop_hot(finetune_epochs=2, prunings=2)
    settings = {"data_ratios": [0.5], "modes": ["random"], "prune_ratios": [0, 0.5], "seeds": [0]}
    grid = Grid(pipeline, **settings, controls=CONTROLS)
    records = grid.run(tmp_path / "store")
    # Of the baseline and of the coreset: dense, one-shot, and each control by itself.
    assert len(records) == 2 * (1 + 1 + len(CONTROLS))
    kinds = {(r.rewound, r.schedule, r.reinitialized) for r in records if r.prune_ratio}
    assert kinds == {
        (False, "one-shot", False),
        (True, "one-shot", False),
        (False, "gradual", False),
        (False, "iterative", False),
        (False, "one-shot", True),
    }
    for record in records:
        run = pipeline.replace(
            mode="random",
            data_ratio=record.keep_ratio,
            prune_ratio=record.prune_ratio,
            rewind=record.rewound,
            schedule=record.schedule,
            reinitialize=record.reinitialized,
        )
        assert run.run() == record
    assert Grid(pipeline, **settings, controls=CONTROLS).run(tmp_path / "store") == records
    # A store of fewer controls is extended, not begun anew.
    names = {path.name for path in (tmp_path / "store").rglob("finetune*")}
    fewer = Grid(pipeline, **settings).run(tmp_path / "fewer")
    assert [r for r in records if r in fewer] == fewer
    more = Grid(pipeline, **settings, controls=CONTROLS)
    assert more.plan(tmp_path / "fewer").finetunings == len(records) - len(fewer)
    assert more.run(tmp_path / "fewer") == records
    assert {path.name for path in (tmp_path / "fewer").rglob("finetune*")} == names
    # One table for all of them, in which each is a row of its own.
    lines = table(records).splitlines()
    assert len(lines) == 2 + len(records)
    assert {"schedule", "start", "weights"} <= {cell.strip() for cell in lines[0].split("|")}
    assert sum("iterative" in line for line in lines) == 2
    pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    assert len(differences(records).splitlines()) == 2 + 1 + 1 + len(CONTROLS)
    found = compare(records)
    assert {(row.schedule, row.rewound) for row in found if row.prune_ratio} == {
        (r.schedule, r.rewound) for r in records if r.prune_ratio
    }


def test_batchnorm_is_a_control_too(tmp_path) -> None:
    pipeline = normed()
    settings = {"data_ratios": [0.5], "modes": ["random"], "prune_ratios": [0.5], "seeds": [0]}
    records = Grid(pipeline, **settings, controls=["recalibrate_bn"]).run(tmp_path / "store")
    assert [r.recalibrated for r in records] == [False, False, True, False, True]
    one, other = (r for r in records if r.mode == "random")
    assert one.trained_accuracy == other.trained_accuracy
    with pytest.raises(ValueError, match="`recalibrate_bn` needs a model with"):
        Grid(drop_hot(), **settings, controls=["recalibrate_bn"])
    with pytest.raises(ValueError, match="`pipeline` .*recalibrate_bn"):
        Grid(normed(recalibrate_bn=True), **settings)
    with pytest.raises(ValueError, match="`pipeline` .*schedule='gradual'"):
        Grid(drop_hot(schedule="gradual"), **settings)
    with pytest.raises(ValueError, match="`controls` .*'rewound'"):
        Grid(pipeline, **settings, controls=["rewound"])


def test_a_structured_grid(tmp_path) -> None:
    pipeline = drop_hot(
        structured=True, model=Wide, train_set=points(40, 0), test_set=points(20, 1)
    )
    settings = {"data_ratios": [0.5], "modes": ["high"], "prune_ratios": [0, 0.5], "seeds": [0]}
    records = Grid(pipeline, **settings).run(tmp_path)
    dense, pruned = (r for r in records if r.mode == "high")
    assert dense.parameters == sum(p.numel() for p in Wide().parameters()) > pruned.parameters
    assert pruned == pipeline.replace(mode="high", data_ratio=0.5, prune_ratio=0.5).run()
    assert pruned.structured


def test_old_lines_are_read() -> None:
    record = drop_hot(finetune_epochs=0).run()
    line = json.loads(to_line(record))
    new = ("rewound", "recalibrated", "schedule", "scope", "structured", "parameters")
    old = from_line(json.dumps({name: value for name, value in line.items() if name not in new}))
    assert isinstance(old, Record)
    assert (old.schedule, old.scope, old.parameters) == ("one-shot", "layer", 0)
    assert replace(old, parameters=record.parameters, scope=record.scope) == record


def test_models_that_cannot_be_changed_are_refused() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4))
    assert Masks.from_zeros(model).sparsity == 0
    with pytest.raises(ValueError, match=r"`0\.weight`.*inference_mode"):
        magnitude_prune(model, 0.5)
    with pytest.raises(ValueError, match=r"`0\.weight`.*inference_mode"):
        Masks.from_zeros(model).apply()
    with torch.inference_mode():
        assert magnitude_prune(model, 0.5).sparsity == 0.5


def test_a_scripted_model_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        model = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="TorchScript"):
        magnitude_prune(model, 0.5)


def test_the_cure_for_a_parametrized_layer_names_it_only_if_it_has_a_name() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="`weight`.* computed") as caught:
        magnitude_prune(layer, 0.5)
    assert "skip" not in str(caught.value)
    with pytest.raises(ValueError, match=r"skip=\('1',\)"):
        magnitude_prune(nn.Sequential(nn.Linear(4, 4), layer), 0.5)
