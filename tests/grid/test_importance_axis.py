"""A grid over importances, and importances that a run computes from the network that it prunes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.own_objects import Confident
from helpers.runs import TRAIN, Normed, drop_hot
from torch import Tensor, nn

from drophot import Grid, Record, magnitude_prune
from drophot.prune.importances import (
    BatchNormScale,
    Fisher,
    FromBatches,
    Random,
    Taylor,
    Wanda,
    l1,
    layer_normalized,
)
from drophot.records import from_line, to_line
from drophot.report import table
from drophot.structured import prune_channels

SHORT: dict[str, Any] = {"score_epochs": 1, "train_epochs": 1, "finetune_epochs": 1}
LISTS: dict[str, Any] = {"data_ratios": [0.5], "modes": ["random"], "seeds": [0]}
TAYLOR, FISHER = FromBatches(Taylor), FromBatches(Fisher)
OTHERS = [None, TAYLOR, Random()]


def magnitude(name: str, weight: nn.Parameter) -> Tensor:
    return weight.abs()


def größe(name: str, weight: nn.Parameter) -> Tensor:
    return weight.abs()


def gräe(name: str, weight: nn.Parameter) -> Tensor:
    return weight.square()


def powered(name: str, weight: nn.Parameter, power: int) -> Tensor:
    return weight.abs() ** power


def grid(importances: list[Any], **changes: Any) -> Grid:
    return Grid(
        drop_hot(**(SHORT | changes)), **LISTS, prune_ratios=[0, 0.8], importances=importances
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return grid(OTHERS).run(tmp_path_factory.mktemp("store"))


def test_every_network_is_pruned_by_each_importance(found: list[Record]) -> None:
    cells = [(r.mode, r.prune_ratio, r.importance) for r in found]
    names = ["magnitude", "Taylor", "Random"]
    assert cells == [
        cell
        for mode in ("baseline", "random")
        for cell in [(mode, 0.0, "magnitude"), *((mode, 0.8, name) for name in names)]
    ], "a ratio of 0 removes nothing by any importance"
    assert len({r.cell for r in found}) == len(found)
    assert len({r.trained_accuracy for r in found if r.mode == "random"}) == 1, "trained once"
    assert all(r.sparsity == pytest.approx(r.prune_ratio, abs=0.01) for r in found)


def test_a_record_equals_that_of_the_run_alone(found: list[Record]) -> None:
    for importance, name in zip(OTHERS, ("magnitude", "Taylor", "Random"), strict=True):
        run = drop_hot(**SHORT).replace(mode="random", prune_ratio=0.8, importance=importance)
        (mine,) = (
            r for r in found if (r.mode, r.importance, r.prune_ratio) == ("random", name, 0.8)
        )
        assert run.run() == mine == from_line(to_line(mine))


def test_tables_name_the_importances(found: list[Record]) -> None:
    head, _, *rows = table(found, "text").splitlines()
    assert "importance" in head
    assert [sum(name in row for row in rows) for name in ("magnitude", "Taylor", "Random")] == [
        4,
        2,
        2,
    ]


def test_a_store_takes_more_importances_but_none_that_changed(tmp_path: Path) -> None:
    first = grid([None]).run(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()}
    more = grid([None, Random(1)]).run(tmp_path)
    assert [r for r in more if r.importance == "magnitude"] == first
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "nothing twice"
    with pytest.raises(ValueError, match="`store` .*another `importance` .*1 there, 2 here"):
        grid([Random(2)]).run(tmp_path)
    assert grid([None, Random(1)]).run(tmp_path) == more


def test_the_dense_runs_of_a_store_serve_every_importance(tmp_path: Path) -> None:
    grid([None]).run(tmp_path)
    other = grid([Random()])
    assert other.plan(tmp_path).finetunings == 2, "the baseline and the coreset, each pruned"
    more = other.run(tmp_path)
    assert [r.importance for r in more] == ["magnitude", "Random"] * 2
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len({from_line(line).cell for line in lines}) == len(lines) == 2 * (1 + 2)


@pytest.mark.parametrize(
    ("importances", "error", "words"),
    [
        ([], ValueError, "`importances`.*none"),
        (l1, TypeError, "`importances`.*l1"),
        ([None, l1, l1], ValueError, "`importances`.*l1.*twice"),
        ([Random(0), Random(1)], ValueError, "`importances`.*names.*two of 'Random'"),
        ([None, magnitude], ValueError, "`importances`.*names.*two of 'magnitude'"),
        ([größe, gräe], ValueError, "`importances`.*names.*'größe' and 'gräe'"),
        ([None, 3], TypeError, "`importance`.*3"),
        ([Taylor], TypeError, "`importance`.*Taylor"),
    ],
)
def test_importances_that_a_grid_cannot_tell_apart_or_use(
    importances: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        grid(importances)


def test_an_importance_that_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    from helpers.executors import quick_pool

    with quick_pool(1) as pool, pytest.raises(TypeError, match="`importance`"):
        grid([FromBatches(lambda model, batches: Taylor(model, batches))]).run(tmp_path, pool)
    own = [FromBatches(lambda model, batches: Taylor(model, batches))]
    with ThreadPoolExecutor(1) as threads:
        assert len(grid(own).run(tmp_path / "here", threads)) == 4


def test_what_the_grid_replaces_need_not_be_sent(tmp_path: Path) -> None:
    from helpers.executors import quick_pool

    class Local(Confident):
        """Cannot be pickled."""

    run = drop_hot(**SHORT, importance=lambda name, weight: weight.abs(), mode=Local())
    only_dense: dict[str, Any] = {"prune_ratios": [0], "importances": [None]}
    with quick_pool(1) as pool:
        assert len(Grid(run, **LISTS, **only_dense).run(tmp_path, pool)) == 2


def test_a_network_that_is_pruned_in_training_is_trained_for_each_importance() -> None:
    run = drop_hot(**SHORT | {"score_epochs": 3, "train_epochs": 3})
    both = {"importances": [None, Random()], "controls": ["joint"]}
    plan = Grid(run, **LISTS, prune_ratios=[0.8], **both).plan()
    assert plan.trainings == 1 + 2 * 2, "the coreset alone; it and all samples, by each importance"


# --- importances of the network of a run --------------------------------------------------------


def as_one(model: nn.Module, batches: Iterator[tuple[Tensor, ...]]) -> Taylor:
    """All samples as one batch, in the order of their indices."""
    inputs, targets, index = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if len(index) > 16:  # more than the batch of the trial before the run
        assert index.tolist() != sorted(index.tolist()), "shuffled"
        assert sorted(index.tolist()) == list(range(120)), "each sample once"
    order = index.argsort()
    return Taylor(model, [(inputs[order], targets[order])])


def test_it_gets_the_trained_network_and_every_sample_once() -> None:
    run = drop_hot(**SHORT, mode="random", importance=FromBatches(as_one))
    run.select()
    run.train()
    twin = run.factory()
    twin.load_state_dict(run.model.state_dict())
    masks = run.prune()
    taylor = Taylor(twin, [TRAIN.tensors])
    expected = magnitude_prune(twin, 0.6, scope="layer", importance=taylor)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())
    plain = drop_hot(**SHORT, mode="random")
    plain.select()
    plain.train()
    assert any(not torch.equal(mask, masks[name]) for name, mask in plain.prune().items())


def random(model: nn.Module, batches: Iterator[tuple[Tensor, ...]]) -> Random:
    return Random(int(torch.randint(2**31, ())))


def test_random_numbers_are_others_with_another_seed_of_the_run() -> None:
    masks = []
    for seed in (0, 0, 1):
        run = drop_hot(**SHORT, mode="random", importance=FromBatches(random), seed=seed)
        run.select()
        run.train()
        masks.append(torch.cat([mask.flatten() for mask in run.prune().values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def first_batch(model: nn.Module, batches: Iterator[tuple[Tensor, ...]]) -> BatchNormScale:
    return BatchNormScale(model, next(batches)[0])


def test_channels_too() -> None:
    settings = {"model": Normed, "structured": True, "prune_ratio": 0.5, "mode": "random"}
    run = drop_hot(**SHORT, **settings, importance=FromBatches(first_batch))
    run.select()
    run.train()
    with torch.no_grad():
        run.model.layers[1].weight.copy_(torch.tensor([1.0, 8, 2, 7, 3, 6, 4, 5]))
    before = run.model.layers[0].weight.clone()
    twin = Normed()
    twin.load_state_dict(run.model.state_dict())
    run.prune()
    assert torch.equal(run.model.layers[0].weight, before[[1, 3, 5, 7]])
    prune_channels(
        twin, 0.5, TRAIN.tensors[0][:1], importance=BatchNormScale(twin, TRAIN.tensors[0])
    )
    assert torch.equal(run.model.layers[0].weight, twin.layers[0].weight)


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv1d(1, 4, 1), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": convolutional, "importance": FromBatches(Wanda)}, "1.weight"),
        ({"importance": FromBatches(first_batch)}, "BatchNorm"),
        ({"importance": TAYLOR, "schedule": "gradual"}, "`importance=.*`schedule='gradual'`"),
        ({"importance": TAYLOR, "schedule": "joint"}, "`importance=.*`schedule='joint'`"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        drop_hot(**changes)


def one_argument(model: nn.Module) -> None:
    """Takes no batches."""


def test_the_result_must_be_an_importance() -> None:
    with pytest.raises(TypeError, match="`importance` .*3"):
        drop_hot(importance=FromBatches(lambda model, batches: 3))
    with pytest.raises(TypeError, match="`make` .*one_argument"):
        FromBatches(one_argument)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`importance` .*FromBatches\(Taylor\).*DropHot"):
        magnitude_prune(Normed(), 0.5, importance=TAYLOR)  # type: ignore[arg-type]


def test_names_in_records_are_those_of_the_functions() -> None:
    assert FromBatches(partial(Taylor, channels=True)).name == "Taylor"
    assert FISHER.name == "Fisher"
    bound = partial(powered, power=2)
    assert len(grid([bound, partial(l1)]).importances) == 2
    assert drop_hot(**SHORT, importance=bound, mode="random").run().importance == "powered"
    for importance in (None, layer_normalized):
        run = drop_hot(**SHORT, importance=importance, mode="random")
        assert run.run().importance == getattr(importance, "__name__", "magnitude")


def test_nothing_is_ranked_for_a_ratio_of_0() -> None:
    def ranked(*arguments: object) -> Taylor:
        raise AssertionError("computed")

    for importance in (FromBatches(ranked), ranked):
        run = drop_hot(**SHORT, importance=importance, mode="random", prune_ratio=0)
        assert run.run().sparsity == 0
