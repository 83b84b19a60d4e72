"""A number that a user gives is checked once, and then used as it was checked."""

from collections.abc import Callable
from copy import deepcopy
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import drophot
from drophot import DropHot, ForgettingTracker, Grid, Stratified, magnitude_prune, select, stats
from drophot.coreset import facility_location, k_center
from drophot.prune import Schedule, cubic, geometric, summary
from drophot.sampling import CrestLoader, FreshSubset, LossSampling
from drophot.structured import prune_channels
from drophot.tracking import DynamicsTracker
from drophot.training import batches

SCORES = torch.arange(40.0)
FEATURES = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(FEATURES, torch.arange(40) % 2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2))


def pruned(ratio: Any, **settings: Any) -> list[list[Any]]:
    masks = magnitude_prune(network(), ratio, **settings)
    return [mask.tolist() for mask in masks.values()]


def run(**settings: Any) -> DropHot:
    needed = {"data_ratio": 0.5, "mode": "high", "prune_ratio": 0.5}
    return DropHot(network, DATA, DATA, **needed | settings, device="cpu")


def settings(name: str) -> Callable[[Any], Any]:
    return lambda value: run(**{name: value}).configuration[name]


def grid(**given: Any) -> Grid:
    return Grid(run(), **{"data_ratios": [0.5], "prune_ratios": [0.5], "seeds": [0]} | given)


def trained(**given: Any) -> list[Any]:
    model = network()
    needed = {"epochs": 2, "batch_size": 8, "seed": 1} | given
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drophot.fit(model, DATA, needed.pop("epochs"), optimizer=optimizer, **needed)
    return [parameter.tolist() for parameter in model.parameters()]


def shapes(ratio: Any) -> list[Any]:
    prune_channels(model := network(), ratio, FEATURES[:2])
    return [tuple(parameter.shape) for parameter in model.parameters()]


def crest(**given: Any) -> list[Any]:
    loader = CrestLoader(DATA, network(), **{"batch_size": 4, "subset": 0.5} | given)
    return [len(loader), next(iter(loader))[2].tolist(), loader.threshold, loader.interval]


def schedule(**given: Any) -> dict[str, Any]:
    made = Schedule(network(), **{"ratios": [0.2, 0.5], "every": 3} | given)
    state = made.state_dict()
    assert all(type(ratio) is float for ratio in state["ratios"])
    return {name: value for name, value in state.items() if name != "masks"}


RATIOS: dict[str, Callable[[Any], Any]] = {
    "select": lambda value: select(SCORES, value).tolist(),
    "k_center": lambda value: k_center(FEATURES, value).indices.tolist(),
    "facility_location": lambda value: facility_location(FEATURES, value).indices.tolist(),
    "Stratified": lambda value: Stratified(cutoff=value),
    "CrestLoader, ratio": lambda value: crest(ratio=value),
    "CrestLoader, subset": lambda value: crest(subset=value),
    "CrestLoader, threshold": lambda value: crest(threshold=value),
    "CrestLoader, interval": lambda value: crest(interval=value),
    "FreshSubset": lambda value: (len(FreshSubset(40, value)), FreshSubset(40, value).ratio),
    "LossSampling": lambda value: LossSampling(40, value).begin().tolist(),
    "magnitude_prune": pruned,
    "magnitude_prune, layer": lambda value: pruned(value, scope="layer"),
    "magnitude_prune, pattern": lambda value: pruned(value, pattern="1:2", skip=["0"]),
    "magnitude_prune, min_kept": lambda value: pruned(0.4, min_kept=value),
    "cubic": lambda value: cubic(value, 3),
    "geometric": lambda value: geometric(value, 3),
    "Schedule, ratios": lambda value: schedule(ratios=[0.1, value]),
    "Schedule, min_kept": lambda value: schedule(min_kept=value),
    "prune_channels": shapes,
    "DropHot, data_ratio": settings("data_ratio"),
    "DropHot, prune_ratio": settings("prune_ratio"),
    "DropHot.replace": lambda value: run().replace(data_ratio=value).data_ratio,
    "Grid, data_ratios": lambda value: grid(data_ratios=(r for r in [value])).data_ratios,
    "Grid, prune_ratios": lambda value: grid(prune_ratios=np.array([value])).prune_ratios,
    "estimate": lambda value: stats.estimate([0.1, 0.2, value], 0.9),
    "estimate, confidence": lambda value: stats.estimate([0.1, 0.2], value),
    "paired": lambda value: stats.paired([0.1, 0.2], [value, 0.3], 0.9),
    "paired, confidence": lambda value: stats.paired([0.1, 0.2], [0.3, 0.1], value),
    "holm": lambda value: stats.holm([0.1, value]),
    "seeds_needed": lambda value: stats.seeds_needed(value, 1.0),
    "seeds_needed, std": lambda value: stats.seeds_needed(0.5, value),
    "seeds_needed, power": lambda value: stats.seeds_needed(0.5, 1.0, power=value),
}
COUNTS: dict[str, Callable[[Any], Any]] = {
    "ForgettingTracker": lambda value: ForgettingTracker(value).num_samples,
    "DynamicsTracker": lambda value: DynamicsTracker(value).num_samples,
    "FreshSubset": lambda value: len(FreshSubset(value, 1.0)),
    "LossSampling": lambda value: LossSampling(value, 1.0).begin().tolist(),
    "Stratified": lambda value: Stratified(bins=value),
    "select, seed": lambda value: select(SCORES, 0.5, "random", seed=value).tolist(),
    "k_center, seed": lambda value: k_center(FEATURES, 0.5, seed=value).indices.tolist(),
    "CrestLoader, batch_size": lambda value: crest(batch_size=value),
    "CrestLoader, seed": lambda value: crest(seed=value),
    "cubic": lambda value: cubic(0.5, value),
    "geometric": lambda value: geometric(0.5, value),
    "Schedule": lambda value: schedule(every=value),
    "summary": lambda v: list(summary(network(), FEATURES[:1], batch_sizes=[v]).latency or ()),
    "fit, epochs": lambda value: trained(epochs=value),
    "fit, batch_size": lambda value: trained(batch_size=value),
    "fit, seed": lambda value: trained(seed=value),
    "batches": lambda v: [len(x) for x, _ in batches(DATA, v, torch.device("cpu"))],
    **{
        f"DropHot, {name}": settings(name)
        for name in ("score_epochs", "train_epochs", "finetune_epochs", "batch_size", "prunings")
    },
    "DropHot, seed": lambda value: run(seed=value).seed,
    "Grid, seeds": lambda value: grid(seeds=iter([value])).seeds,
    "Grid, threads": lambda value: grid(threads=value).threads,
}
KINDS = [np.float16, np.float32, np.float64, np.array, torch.tensor, Fraction, Decimal]


@pytest.mark.parametrize("door", RATIOS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_number_is_its_value(door: str, kind: Callable[[float], Any]) -> None:
    if door.startswith(("estimate", "paired", "seeds_needed")):
        pytest.importorskip("scipy", reason="the extra `stats` is not installed")
    value = kind(0.5)
    if door == "Grid, prune_ratios" and kind in (torch.tensor,):
        pytest.skip("NumPy makes no array of it")
    assert RATIOS[door](value) == RATIOS[door](0.5)


def test_the_value_of_a_short_float_is_what_counts() -> None:
    for ratio in (np.float16(0.8), np.float32(0.9)):
        model = nn.Linear(500, 500)
        assert magnitude_prune(model, ratio).sparsity == int(float(ratio) * 250_000 + 0.5) / 250_000


@pytest.mark.parametrize("door", RATIOS)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("0.5", TypeError),
        (b"0.5", TypeError),
        (True, TypeError),
        (np.bool_(True), TypeError),
        (torch.tensor(True), TypeError),
        (None, TypeError),
        ([0.5], TypeError),
        (np.array([0.5]), TypeError),
        (torch.tensor([0.5]), TypeError),
        (0.5 + 0j, TypeError),
        (float("nan"), ValueError),
        (np.float32("nan"), ValueError),
        (10**400, ValueError),
    ],
    ids=repr,
)
def test_what_is_no_number_is_refused(door: str, value: Any, error: type[Exception]) -> None:
    if door == "Grid, prune_ratios" and not isinstance(value, float | int):
        pytest.skip("NumPy makes a number, or another array, of it")
    if door == "holm" and isinstance(value, float | np.floating):
        pytest.skip("a p-value may be NaN")
    with pytest.raises(error, match=r"^`\w+"):
        RATIOS[door](value)


@pytest.mark.parametrize("door", COUNTS)
@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor])
def test_every_kind_of_integer_is_its_value(door: str, kind: Callable[[int], Any]) -> None:
    assert COUNTS[door](kind(3)) == COUNTS[door](3)


@pytest.mark.parametrize("door", COUNTS)
@pytest.mark.parametrize(
    "value",
    [3.0, 31 / 2, np.float64(3), torch.tensor(3.0), "3", True, np.bool_(True), None, Fraction(3)],
    ids=repr,
)
def test_what_is_no_integer_is_refused(door: str, value: Any) -> None:
    with pytest.raises(TypeError, match=r"^`\w+.* integer"):
        COUNTS[door](value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", "`ratio` .*'0.5'.* 0.5"),
        ("half", "`ratio` .*'half'"),
        (torch.tensor([0.5, 0.6]), r"`ratio` .*Tensor of shape \(2,\)"),
    ],
)
def test_the_error_names_the_value_and_the_fix(value: Any, message: str) -> None:
    model = network()
    before = deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=message):
        magnitude_prune(model, value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
