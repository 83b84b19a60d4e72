"""Arguments that are collections are read once: a generator gives what a list does."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drophot import DropHot, Grid, Masks, Record, magnitude_prune, stats, summary
from drophot.prune import Schedule
from drophot.report import table
from drophot.structured import prune_channels

Many = Callable[[list[Any]], Iterable[Any]]

DATA = TensorDataset(torch.zeros(8, 6), torch.arange(8) % 2)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2), nn.Module())
    model[3].register_parameter("matrix", nn.Parameter(torch.randn(2, 2)))
    model[3].forward = lambda x: x @ model[3].matrix
    return model


def pruned(many: Many) -> list[str]:
    skip, include = many(["0", "2"]), many(["3", "1.bias"])
    return list(magnitude_prune(network(), 0.5, skip=skip, include=include))


def from_zeros(many: Many) -> list[str]:
    return list(Masks.from_zeros(network(), skip=many(["0"]), include=many(["3.matrix"])))


def schedule(many: Many) -> list[Any]:
    found = Schedule(
        network(), many([0.2, 0.4]), every=1, skip=many(["0", "2"]), include=many(["3"])
    )
    found.step()  # which prunes again
    return [found.ratios, *found.masks, found.masks.sparsity]


def channels(many: Many) -> list[Any]:
    model = network()
    prune_channels(model, 0.5, torch.ones(2, 6), skip=many(["0", "3"]))
    return [tuple(parameter.shape) for parameter in model.parameters()]


def sizes(many: Many) -> list[int]:
    found = summary(network(), torch.ones(2, 6), batch_sizes=many([1, 2])).latency  # pyright: ignore[reportArgumentType]
    return sorted(found or ())


def grid(many: Many) -> list[Any]:
    run = DropHot(
        lambda: nn.Linear(6, 2), DATA, DATA, data_ratio=0.5, mode="random", prune_ratio=0.5
    )
    found = Grid(
        run,
        data_ratios=many([0.25, 0.5]),
        modes=many(["high", "random"]),
        prune_ratios=many([0.5, 0.6]),
        seeds=many([0, 1]),
        controls=many(["rewind"]),
    )
    return [found.data_ratios, found.modes, found.prune_ratios, found.seeds, found.controls]


def records() -> list[Record]:
    same: dict[str, Any] = {"model": "lenet", "prune_ratio": 0.8, "sparsity": 0.8}
    same |= {"finetune_curve": (), "trained_accuracy": 0.97, "pruned_accuracy": 0.6}
    same |= {"fingerprint": "", "seconds": {}, "device": "cpu", "versions": {}, "num_kept": 6}
    return [
        Record(**same, mode=mode, keep_ratio=share, seed=seed, finetuned_accuracy=accuracy)
        for mode, share, accuracies in (
            ("baseline", 1.0, (0.98, 0.99)),
            ("high", 0.1, (0.96, 0.98)),
        )
        for seed, accuracy in enumerate(accuracies)
    ]


def reported(many: Many) -> list[Any]:
    return [table(many(records())), stats.compare(many(records()))]


def numbers(many: Many) -> list[Any]:
    pytest.importorskip("scipy")
    left, right = [0.5, 0.7, 0.9], [0.4, 0.7, 0.6]
    return [
        stats.estimate(many(left)),
        stats.paired(many(left), many(right)),
        stats.holm(many([0.01, 0.2, 0.03])),
    ]


DOORS = [pruned, from_zeros, schedule, channels, sizes, grid, reported, numbers]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize(
    "many",
    [lambda items: (item for item in items), lambda items: filter(lambda _: True, items), iter],
    ids=["generator", "filter", "iterator"],
)
def test_what_can_be_read_once_gives_what_a_list_gives(
    door: Callable[[Many], list[Any]], many: Many
) -> None:
    assert door(many) == door(list)
