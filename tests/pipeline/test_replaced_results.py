"""Results that a user replaced between the steps, and objects that must not be mistaken."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import drop_hot
from torch import Tensor, nn

from drophot import Grid, Scored, evaluate, fit
from drophot.coreset import Evidence
from drophot.pipeline import RunProtocol
from drophot.tracking import Spread


class First:
    """The first of the samples, in the order of the scores."""

    name = "first"
    needs = ("scores", "model")

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        assert evidence.scores is not None
        return evidence.scores.argsort(stable=True)[: round(ratio * evidence.num_samples)]


class Logit:
    hard_end = "high"

    def __init__(self, name: str, column: int = 0) -> None:
        self.name, self.column = name, column

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits[:, self.column]


def test_run_keeps_what_the_user_set_and_computes_what_is_missing() -> None:
    run = drop_hot(mode=First())
    mine = torch.arange(120.0).flip(0)
    run.scores = mine
    run.run()
    assert run.scores is mine
    assert run.scorer is not None
    assert run.indices.max() == 119
    other = drop_hot(mode=First())
    other.scorer = run.scorer
    other.run()
    assert other.scorer is run.scorer


@pytest.mark.parametrize(
    ("indices", "error", "words"),
    [
        (torch.zeros(60, dtype=torch.int64), ValueError, "`indices`.*59"),
        (torch.arange(-60, 0), ValueError, "`indices`.*-60"),
        (torch.arange(100, 160), ValueError, "`indices`.*120"),
        (torch.rand(60), TypeError, "`indices`"),
        (torch.ones(120, dtype=torch.bool), TypeError, "`indices`.*nonzero"),
        (torch.arange(0), (TypeError, ValueError), "`indices`"),
    ],
)
def test_replaced_indices_are_checked(indices: Tensor, error: Any, words: str) -> None:
    run = drop_hot(mode="random", data_ratio=0.5)
    run.indices = indices
    with pytest.raises(error, match=words):
        run.train()


def test_a_mode_that_selects_while_it_trains_takes_no_indices() -> None:
    run = drop_hot(mode="fresh_subset", data_ratio=0.5)
    run.indices = torch.arange(60)
    with pytest.raises(ValueError, match="`indices`.*120.*fresh_subset.*60"):
        run.train()


def test_equal_steps_counts_the_indices_that_there_are() -> None:
    steps: list[int] = []

    def counting(*args: Any, on_batch: Any = None, **rest: Any) -> None:
        fit(*args, on_batch=lambda *_: steps.append(1), **rest)

    run = drop_hot(mode="random", data_ratio=0.5, equal_steps=True, fit=counting)
    run.indices = torch.arange(20)
    run.train()
    size, epochs = run.batch_size, run.train_epochs
    assert len(steps) == epochs * -(-120 // size)


def test_an_importance_finds_no_gradients_as_in_a_grid() -> None:
    seen: list[bool] = []

    def importance(name: str, weight: Tensor) -> Tensor:
        seen.append(weight.grad is None)
        return weight.detach().abs()

    run = drop_hot(mode="random", importance=importance)
    run.run()
    assert seen
    assert all(seen)


def test_channels_of_a_network_that_is_pruned_twice_are_counted_from_the_dense_one() -> None:
    class Wide(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))

    run = drop_hot(model=Wide, mode="random", structured=True, prune_ratio=0.5)
    run.select()
    before = sum(p.numel() for p in run.train().parameters() if p.dim() > 1)
    run.prune()
    run.prune()
    record = run.finetune()
    after = sum(p.numel() for p in run.model.parameters() if p.dim() > 1)
    assert record.sparsity == 1 - after / before


def test_a_spread_is_no_built_in_score_whatever_its_name() -> None:
    with pytest.raises(ValueError, match="name.*'loss'"):
        drop_hot(mode=Scored(Spread(score=Logit("mine"), name="loss"))).score()
    one, other = (
        drop_hot(mode=Scored(Spread(score=Logit("mine", column), name="spread")))
        for column in (0, 1)
    )
    assert one.configuration["mode"] != other.configuration["mode"]


def grid(mode: Any) -> Grid:
    run = drop_hot(score_epochs=1, train_epochs=1, finetune_epochs=1)
    return Grid(run, data_ratios=[0.5], modes=[mode], prune_ratios=[0.5], seeds=[0])


class SameName(First):
    name = "el2n-high"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Scored("el2n"), SameName()),
        (SameName(), Scored("el2n")),
        (Scored(Logit("m", 0), "high", True), Scored(Logit("m", 1), "low", True)),
    ],
    ids=["built-in first", "own first", "another score"],
)
def test_a_store_tells_objects_of_one_name_apart(first: Any, second: Any, tmp_path: Path) -> None:
    grid(first).run(tmp_path)
    with pytest.raises(ValueError, match="`store`.*`modes`"):
        grid(second).run(tmp_path)
    grid(first).run(tmp_path)


@pytest.mark.parametrize("name", ["seed", "batch_size", "on_epoch", "on_batch", "optimizer"])
def test_a_partial_of_fit_leaves_to_the_run_what_the_run_sets(name: str) -> None:
    with pytest.raises(ValueError, match=f"`fit`.*'{name}'"):
        drop_hot(fit=partial(partial(fit, **{name: 3}), cache=False))


def test_a_protocol_has_a_name_and_a_counter() -> None:
    with pytest.raises(ValueError, match="`protocol`.*'paper'"):
        drop_hot(protocol=RunProtocol(name="paper", holds_masks=False))
    with pytest.raises(TypeError, match="`counter`.*'mine'.*None"):
        drop_hot(protocol=RunProtocol(name="mine", counter=lambda *_: None)).score()


def test_logits_of_minus_infinity_are_never_right() -> None:
    class Nothing(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.full((len(inputs), 3), -torch.inf)

    data = torch.utils.data.TensorDataset(torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64))
    assert evaluate(Nothing(), data) == 0.0
