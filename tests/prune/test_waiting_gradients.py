"""Gradients on a GPU, which `hold` masks together at the end of the backward pass."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.graphs import graphs as graphs
from helpers.stand_in import Graph
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from drophot import fit, magnitude_prune
from drophot.prune import masked_products, waiting_gradients

# Operations that launch nothing on a device.
FREE = ("aten.detach", "aten.view", "aten.alias", "aten._unsafe_view", "aten.empty", "aten.t.")


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_gradients, "_is_gpu", lambda _: True)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith(FREE):
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def network(num_layers: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers)))


def operations(num_layers: int, *, held: bool, clip: bool) -> Counter[str]:
    """The operations of the second step."""
    model = network(num_layers)
    masks = magnitude_prune(model, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    if held:
        masks.hold(optimizer)
    seen = Operations()
    for _ in range(2):
        optimizer.zero_grad()
        seen.names.clear()
        with seen:
            model(torch.ones(2, 4)).sum().backward()
            if clip:
                clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    return seen.names


@pytest.mark.parametrize("clip", [False, True])
def test_a_step_has_two_more_operations_whatever_the_number_of_layers(clip: bool) -> None:
    for num_layers in (2, 9):
        held = operations(num_layers, held=True, clip=clip)
        more = held - operations(num_layers, held=False, clip=clip)
        assert more == {"aten._foreach_mul.List": 1, "aten._foreach_mul_.List": 1}


def test_gradients_that_were_set_by_hand_take_one_operation() -> None:
    counts = []
    for num_layers in (2, 9):
        model = network(num_layers)
        masks = magnitude_prune(model, 0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        masks.hold(optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with Operations() as seen:
            optimizer.step()
        counts.append(seen.names["aten._foreach_mul_.List"])
        assert all((model.get_parameter(n).grad[~m] == 0).all() for n, m in masks.items())
    assert counts == [2, 2]


def test_a_captured_step_has_as_few(graphs: list[Graph]) -> None:
    found = []
    for num_layers in (2, 9):
        counts = []
        for held in (False, True):
            model = network(num_layers)
            optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
            masks = magnitude_prune(model, 0.5)
            if held:
                masks.hold(optimizer)
            data = TensorDataset(torch.ones(10, 4), torch.zeros(10, dtype=torch.int64))
            fit(model, data, 1, optimizer=optimizer, batch_size=2)
            counts.append(Counter(str(call[0]) for call in graphs[-1].calls))
            assert graphs[-1].replays
            if held:
                assert all((model.get_parameter(n)[~m] == 0).all() for n, m in masks.items())
        found.append({n: k for n, k in (counts[1] - counts[0]).items() if not n.startswith(FREE)})
    assert found[0] == found[1] == {"aten._foreach_mul.List": 1, "aten._foreach_mul_.List": 1}


def trained(step: Callable[[nn.Module, torch.optim.Optimizer], Any]) -> list[Tensor]:
    model = network()
    masks = magnitude_prune(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with masks.hold(optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            step(model, optimizer)
    return [parameter.detach() for parameter in model.parameters()]


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.arange(8.0).view(2, 4)).square().sum()


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):  # gradients add up
        loss_of(model).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def by_autograd_grad(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = [*model.parameters()]
    for p, gradient in zip(
        parameters, torch.autograd.grad(loss_of(model), parameters), strict=True
    ):
        p.grad = gradient.clone()
    clip_grad_norm_(parameters, 0.1)
    optimizer.step()


def differentiated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model).backward(create_graph=True)
    sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def some_inputs(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model).backward(inputs=[*model.parameters()][:3])
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def after_a_failed_pass(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def fail(_: Tensor) -> None:
        raise KeyError

    inputs = torch.ones(2, 4, requires_grad=True)
    inputs.register_hook(fail)
    with pytest.raises(KeyError):
        model(inputs).sum().backward()
    loss_of(model).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def shared(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Two gradients, of which one is masked in another way, are views of the same memory."""
    one, other, *_ = (p for p in model.parameters() if p.dim() == 2)
    ((one.view(-1) + other.view(-1)) * torch.arange(16.0)).sum().backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


STEPS = [clipped, by_autograd_grad, differentiated, some_inputs, after_a_failed_pass, shared]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("step", STEPS)
def test_training_is_that_with_a_hook_for_each_gradient(
    step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained(step)
    monkeypatch.setattr(waiting_gradients, "_is_gpu", lambda _: False)
    if step is shared:  # clipping changes shared gradients twice
        step = not_shared
    assert all(map(torch.equal, found, trained(step)))


def not_shared(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    one, other, *_ = (p for p in model.parameters() if p.dim() == 2)
    for weight in (one, other):
        (weight.view(-1) * torch.arange(16.0)).sum().backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradients_that_a_hook_reads_do_not_wait(kind: str) -> None:
    model = network()
    masks = magnitude_prune(model, 0.5)
    seen: dict[str, bool] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with masks.hold(optimizer):
        for name, mask in masks.items():

            def read(tensor: Tensor, name: str = name, mask: Tensor = mask) -> None:
                gradient = tensor.grad if tensor.is_leaf and tensor.grad is not None else tensor
                seen[name] = bool((gradient[~mask] == 0).all())

            getattr(model.get_parameter(name), kind)(read)
        loss_of(model).backward()
    assert seen == dict.fromkeys(masks, True)


def test_in_a_process_group_no_gradient_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    held = operations(3, held=True, clip=False)
    assert held["aten._foreach_mul.List"] == 0
    assert held["aten.mul.Tensor"] >= 3


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_products, "_MOST_COPIED", 128)  # two weights
    expected = copy.deepcopy(trained(clipped))
    held = operations(5, held=True, clip=False)
    assert held["aten._foreach_mul.List"] == 3
    assert all(map(torch.equal, expected, trained(clipped)))


def test_a_gradient_that_torch_negates_later() -> None:
    model = nn.Linear(4, 4)
    masks = magnitude_prune(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters())
    with masks.hold(optimizer):
        (model.weight + 0).backward(torch.complex(torch.ones(4, 4), torch.ones(4, 4)).conj().imag)
    assert torch.equal(model.weight.grad, -masks["weight"].float())
