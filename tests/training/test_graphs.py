"""Steps as CUDA graphs: on a GPU where there is one, and everywhere on a stand-in."""

# ruff: noqa: F811 (the argument `graphs` is the imported fixture)

import logging
import random
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.graphs import graphs  # noqa: F401 (a fixture)
from helpers.references import plain_fit
from helpers.stand_in import Graph
from helpers.steps import OwnAdam, assert_equal, mlp, samples, train
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from drophot import IndexedDataset, fit
from drophot.models import LeNet
from drophot.prune import magnitude_prune
from drophot.training import step

fused_sgd = partial(SGD, lr=0.1, momentum=0.9, fused=True)


def test_the_stand_in_computes_when_it_is_replayed_and_not_before() -> None:
    weight, inputs = torch.ones(3, requires_grad=True), torch.ones(3)
    graph = Graph()
    with graph:
        (weight * inputs).sum().backward()
        with torch.no_grad():
            weight.sub_(weight.grad)
    graph.finish()
    assert weight.tolist() == [1, 1, 1]
    assert weight.grad.isnan().all()
    for value in (2.0, 3.0):
        inputs.fill_(value)
        graph.replay()
        assert weight.grad.tolist() == [value] * 3
    assert weight.tolist() == [-4] * 3
    with pytest.raises(RuntimeError, match="not permitted"), Graph():
        weight.sum().item()


# --- the same as plain steps -------------------------------------------------------------------

OPTIMIZERS = [
    partial(SGD, lr=0.1),
    fused_sgd,
    partial(SGD, lr=0.1, momentum=0.9, foreach=True),
    partial(Adam, lr=0.01, fused=True),
    partial(AdamW, lr=0.01, fused=True),
]


def counted(graphs: list[Graph]) -> list[int]:
    """How often each graph was replayed."""
    return [graph.replays for graph in graphs]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("between", [(), (nn.BatchNorm1d(16),)], ids=["plain", "batchnorm"])
def test_captured_steps_are_the_plain_ones(
    optimizer: Any, between: tuple[nn.Module, ...], graphs: list[Graph]
) -> None:
    """Seven batches of 8 and one of 6, twice: three plain ones to warm up, and the odd ones out."""
    model, data = mlp(*between), samples(62, 6)
    found = train(fit, model, data, optimizer)
    assert counted(graphs) == [2 * 7 - 3]
    if optimizer is OPTIMIZERS[0]:
        optimizer = partial(optimizer, fused=True)
    assert_equal(found, train(plain_fit, model, data, optimizer))


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_a_model_with_hooks_is_not_captured(kind: str, graphs: list[Graph]) -> None:
    """A hook is Python, which a graph would call once."""
    model, calls = mlp(), list[str]()
    getattr(model[-1], f"register_{kind}_hook")(lambda *_: calls.append(kind))
    fit(model, samples(64, 6), 1, optimizer=SGD(model.parameters(), lr=0.1), batch_size=8)
    assert graphs == []
    assert calls == [kind] * 8


def test_a_captured_conv_net_is_the_plain_one(graphs: list[Graph]) -> None:
    torch.manual_seed(0)
    model, data = LeNet(), samples(36, 1, 28, 28)
    found = train(fit, model, data, fused_sgd)
    assert counted(graphs) == [5]
    torch.testing.assert_close(
        found, train(plain_fit, model, data, fused_sgd), rtol=1e-4, atol=1e-5
    )


def test_what_a_step_gives_is_not_overwritten_by_the_next(graphs: list[Graph]) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    model = mlp()
    fit(
        model,
        IndexedDataset(samples(64, 6)),
        1,
        optimizer=fused_sgd(model.parameters()),
        batch_size=8,
        on_batch=lambda *batch: seen.extend((part, part.clone()) for part in batch),
    )
    assert counted(graphs) == [5]
    assert all(torch.equal(*pair) for pair in seen)
    assert len({str(part) for part, _ in seen}) == 3 * 8


def test_a_smaller_first_batch_is_all_there_is(graphs: list[Graph]) -> None:
    data = samples(5, 6)
    assert_equal(train(fit, mlp(), data, fused_sgd), train(plain_fit, mlp(), data, fused_sgd))
    assert graphs == []


# --- what changes on the way -------------------------------------------------------------------


def changing(change: Callable[[nn.Module, Optimizer, int], object]) -> Callable[..., None]:
    """A loop that changes something after each epoch."""

    def loop(way: Any, model: nn.Module, data: Any, _: int, **options: Any) -> None:
        optimizer = options["optimizer"]
        way(model, data, 3, on_epoch=lambda epoch: change(model, optimizer, epoch), **options)

    return loop


def slower(model: nn.Module, optimizer: Optimizer, epoch: int) -> None:
    optimizer.param_groups[0]["lr"] /= 2


def slower_in_place(model: nn.Module, optimizer: Optimizer, epoch: int) -> None:
    """As schedulers do where the learning rate is a tensor."""
    rate = optimizer.param_groups[0]["lr"]
    if not isinstance(rate, Tensor):
        rate = optimizer.param_groups[0]["lr"] = torch.tensor(rate)
    rate.div_(2)


def freeze(model: nn.Module, optimizer: Optimizer, epoch: int) -> None:
    model[0].requires_grad_(epoch % 2 == 1)


def forget(model: nn.Module, optimizer: Optimizer, epoch: int) -> None:
    """Momentum from nothing, as after a rewind."""
    optimizer.state.clear()


def prune(model: nn.Module, optimizer: Optimizer, epoch: int) -> None:
    """Gradually, with masks that hold from here on."""
    magnitude_prune(model, 0.2 * (epoch + 1)).hold(optimizer)


def grow(model: nn.Module, optimizer: Optimizer, epoch: int) -> None:
    """Weights in another place in memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.01


@pytest.mark.parametrize("change", [slower, slower_in_place, freeze, forget, prune, grow])
def test_what_changes_between_epochs_is_honoured_by_a_new_graph(
    change: Any, graphs: list[Graph]
) -> None:
    model, data = mlp(), samples(64, 6)
    found = train(partial(changing(change), fit), model, data, fused_sgd)
    assert counted(graphs) == [5, 5, 5]
    assert_equal(found, train(partial(changing(change), plain_fit), model, data, fused_sgd))


def test_a_scheduler_that_steps_with_each_batch_is_honoured(graphs: list[Graph]) -> None:
    def loop(way: Any, model: nn.Module, data: Any, epochs: int, **options: Any) -> None:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(options["optimizer"], 0.9)
        way(model, data, epochs, **options | {"on_batch": lambda *_: scheduler.step()})

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(), data, fused_sgd)
    assert graphs == []
    assert_equal(found, train(partial(loop, plain_fit), mlp(), data, fused_sgd))


def test_masks_hold_in_captured_steps(graphs: list[Graph]) -> None:
    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        with magnitude_prune(model, 0.5).hold(options["optimizer"]):
            way(model, *rest, **options)

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(), data, fused_sgd)
    assert counted(graphs) == [13]
    weights = found[0].numel() + found[2].numel()
    assert int((found[0] == 0).sum() + (found[2] == 0).sum()) == weights / 2
    assert_equal(found, train(partial(loop, plain_fit), mlp(), data, fused_sgd))


# --- what cannot be captured -------------------------------------------------------------------


class Asks(nn.Module):
    """Looks at a value, for which a GPU is waited for."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * (1 if inputs.sum().item() > 0 else 2)


class Draws(nn.Module):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * (1 + self.draw())


@pytest.mark.parametrize(
    "inner",
    [
        Asks(),
        Draws(random.random),
        Draws(lambda: np.random.rand()),  # noqa: NPY002
        nn.Dropout(0.5),  # here it draws from the CPU's generator
    ],
    ids=["asks", "python", "numpy", "torch"],
)
def test_models_that_a_graph_would_not_repeat_stay_plain(
    inner: nn.Module, graphs: list[Graph], caplog: pytest.LogCaptureFixture
) -> None:
    def seeded(way: Any, *rest: Any, **options: Any) -> None:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        way(*rest, **options)

    data = samples(64, 6)
    with caplog.at_level(logging.INFO, logger="drophot"):
        found = train(partial(seeded, fit), mlp(inner), data, fused_sgd)
    assert sum(counted(graphs)) == 0
    assert len(graphs) == 1, "one attempt is enough"
    if isinstance(inner, Asks):
        assert "not captured as a CUDA graph: operation not permitted" in caplog.text
    assert_equal(found, train(partial(seeded, plain_fit), mlp(inner), data, fused_sgd))


class Momentum(SGD):
    """A user's, which may do as it likes."""


@pytest.mark.parametrize("kind", [OwnAdam, partial(Momentum, lr=0.1), torch.optim.Adagrad])
def test_optimisers_that_a_graph_may_not_repeat_are_not_captured(
    kind: Any, graphs: list[Graph]
) -> None:
    data = samples(64, 6)
    found = train(fit, mlp(), data, kind)
    assert graphs == []
    torch.testing.assert_close(found, train(plain_fit, mlp(), data, kind), rtol=1e-5, atol=1e-6)


def test_adagrad_is_not_fused_on_a_gpu(graphs: list[Graph]) -> None:
    model = mlp()
    optimizer = torch.optim.Adagrad(model.parameters())
    with step.fast_step(model, optimizer, torch.device("cuda")):
        assert optimizer.param_groups[0]["fused"] is None


def test_capturable_is_put_back(graphs: list[Graph]) -> None:
    model = mlp()
    optimizer, inside = Adam(model.parameters()), []
    before = deepcopy(optimizer.state_dict()["param_groups"])
    note = lambda _: inside.append(optimizer.param_groups[0]["capturable"])  # noqa: E731
    fit(model, samples(64, 6), 1, optimizer=optimizer, on_epoch=note)
    assert inside == [True]
    assert optimizer.state_dict()["param_groups"] == before


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "optimizer", [*OPTIMIZERS, Adam, torch.optim.Adagrad, torch.optim.NAdam, OwnAdam]
)
@pytest.mark.parametrize("conv", [False, True])
def test_fit_on_a_gpu_is_nearly_the_plain_loop(optimizer: Any, conv: bool) -> None:
    torch.manual_seed(0)
    model = (LeNet() if conv else mlp(nn.BatchNorm1d(16))).cuda()
    data = samples(62, *((1, 28, 28) if conv else (6,)))
    found = train(fit, model, data, optimizer)
    expected = train(plain_fit, model, data, optimizer)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [SGD, Adam, torch.optim.NAdam])
def test_an_optimiser_that_trained_elsewhere_goes_on_on_a_gpu(optimizer: Any) -> None:
    results = []
    for way in (fit, plain_fit):
        model = mlp().cuda()
        chosen = optimizer(model.parameters(), lr=0.01)
        for loop in (plain_fit, way, plain_fit):
            loop(model, samples(64, 6), 1, optimizer=chosen, batch_size=8)
        results.append([*model.state_dict().values()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [nn.ReLU(), nn.Dropout(0.5)])
def test_no_step_of_an_epoch_waits_for_the_gpu(inner: nn.Module) -> None:
    model = mlp(inner).cuda()
    steps: list[int] = []

    def on_batch(*_: Any) -> None:
        steps.append(1)  # the fourth step is captured; the last is followed by a new order
        torch.cuda.set_sync_debug_mode("error" if 4 <= len(steps) < 16 else "default")

    optimizer = Adam(model.parameters())
    try:
        data = IndexedDataset(samples(128, 6))
        fit(model, data, 1, optimizer=optimizer, batch_size=8, on_batch=on_batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 16


@pytest.mark.gpu
def test_dropout_draws_anew_in_each_replay() -> None:
    logits: list[Tensor] = []
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5)).cuda()
    data = IndexedDataset(torch.utils.data.TensorDataset(torch.ones(64, 6), torch.zeros(64).long()))
    optimizer = SGD(model.parameters(), lr=0.0)
    note = lambda _, z, __: logits.append(z)  # noqa: E731
    fit(model, data, 1, optimizer=optimizer, batch_size=8, on_batch=note)
    assert not torch.equal(logits[-1] == 0, logits[-2] == 0)
