"""Captured steps on a GPU: in mixed precision, on another device, after a failure, with hooks."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.references import plain_fit
from helpers.steps import mlp, samples, train
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import TensorDataset

from drophot import DropHot, IndexedDataset, evaluate, fit
from drophot.models import LeNet, fcnet

pytestmark = pytest.mark.gpu
sgd = partial(SGD, lr=0.1, momentum=0.9, fused=True)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """The graph of each launch."""
    found: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        found.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return found


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_steps_under_autocast_are_captured_whatever_was_cached(replays: list[Any]) -> None:
    """The forward pass before `fit` caches casts of the weights, on the default stream."""
    torch.manual_seed(0)
    model, data = LeNet().cuda(), samples(64, 1, 28, 28)

    def autocast() -> torch.autocast:
        return torch.autocast("cuda", torch.bfloat16)

    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        model(data.tensors[0].cuda())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(options["optimizer"], 0.5)
        way(model, *rest, scheduler=scheduler, **options)

    optimizer = partial(SGD, lr=0.01, fused=True)
    expected = train(partial(loop, partial(plain_fit, within=autocast)), model, data, optimizer)
    with autocast():
        found = train(partial(loop, fit), model, data, optimizer)
    assert len(replays) == 2 * 5
    assert found[-1].dtype == torch.bfloat16
    assert_near(found, expected, 2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("optimizer", [sgd, partial(Adam, lr=0.01)])
def test_a_step_is_captured_on_the_device_of_the_model(optimizer: Any, replays: list[Any]) -> None:
    """The current device is another one."""
    assert torch.cuda.current_device() == 0
    model, data = mlp(nn.Dropout(0.5)).to("cuda:1"), samples(64, 6)
    with torch.random.fork_rng([1]):
        found = train(fit, model, data, optimizer)
    assert len(replays) == 13
    with torch.random.fork_rng([1]):
        assert_near(found, train(partial(fit, cuda_graph=False), model, data, optimizer))
    assert torch.cuda.current_device() == 0


class Waits(nn.Module):
    """Draws on the GPU, and then waits for it."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = nn.functional.dropout(inputs)
        return outputs * (1 if outputs.sum().item() > 0 else 2)


@pytest.mark.parametrize("optimizer", [sgd, partial(Adam, lr=0.01)])
def test_plain_steps_go_on_after_a_failed_capture(optimizer: Any, replays: list[Any]) -> None:
    model, data = mlp(Waits()).cuda(), samples(64, 6)
    torch.cuda.manual_seed(1)
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="cuda_graph=False"):
        found = train(fit, model, data, optimizer)
    assert torch.cuda.current_stream() == stream
    torch.cuda.manual_seed(1)
    assert_near(found, train(partial(fit, cuda_graph=False), model, data, optimizer))
    assert replays == []


def test_a_loss_that_is_still_in_use_is_named(replays: list[Any]) -> None:
    model, data = mlp().cuda(), samples(64, 6)
    loss = model(data.tensors[0].cuda()).sum()
    with pytest.warns(UserWarning, match="in use"):
        fit(model, data, 1, optimizer=sgd(model.parameters()), batch_size=8)
    assert replays == []
    del loss
    fit(model, data, 1, optimizer=sgd(model.parameters()), batch_size=8)
    assert len(replays) == 5


def on_module(model: nn.Module, call: Callable[..., Any]) -> Any:
    return model[0].register_forward_hook(call)


def on_parameter(model: nn.Module, call: Callable[..., Any]) -> Any:
    return model[0].weight.register_hook(call)


@pytest.mark.parametrize("hook", [on_module, on_parameter])
def test_a_hook_on_the_gpu_is_called_until_it_is_removed(
    hook: Any, replays: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, calls, handles = mlp().cuda(), [], []

    def on_epoch(epoch: int) -> None:
        if epoch == 0:
            handles.append(hook(model, lambda *_: calls.append(1)))
        elif epoch == 1:
            handles.pop().remove()

    optimizer = sgd(model.parameters())
    with caplog.at_level(logging.INFO, logger="drophot"):
        fit(model, samples(64, 6), 3, optimizer=optimizer, batch_size=8, on_epoch=on_epoch)
    assert (len(replays), len(calls)) == (10, 8)
    assert caplog.text.count("not captured") == 1


def test_inputs_are_gathered_into_the_graph(replays: list[Any]) -> None:
    """Of images, whose channels are last in memory."""
    torch.manual_seed(0)
    inputs, targets = samples(62, 1, 28, 28).tensors
    here = TensorDataset(inputs.cuda().double(), targets.cuda())
    model = LeNet().cuda().double()
    found = train(fit, model, here, sgd)
    assert len(replays) == 11
    assert_near(found, train(partial(fit, cuda_graph=False), model, here, sgd), 1e-6)


@pytest.mark.parametrize("factory", ["cpu", "cuda"])
def test_data_that_is_on_the_gpu_is_taken(factory: str) -> None:
    inputs, targets = samples(64, 6).tensors
    data = TensorDataset(inputs.cuda(), targets.cuda())
    run = DropHot(
        lambda: fcnet(in_features=6, hidden=16, num_classes=4).to(factory),
        data,
        data,
        data_ratio=0.5,
        mode="high",
        prune_ratio=0.5,
        score_epochs=2,
        train_epochs=2,
        finetune_epochs=2,
    )
    record = run.run()
    assert record.sparsity == 0.5
    assert evaluate(run.model, IndexedDataset(data)) == record.finetuned_accuracy
