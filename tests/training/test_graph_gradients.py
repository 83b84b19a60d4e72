"""Gradients, settings and states that are replaced while a CUDA graph refers to the old ones."""

# ruff: noqa: F811 (the argument `graphs` is the imported fixture)

from functools import partial
from typing import Any

import pytest
import torch
from helpers.graphs import graphs  # noqa: F401 (a fixture)
from helpers.references import plain_fit
from helpers.stand_in import Graph, Stream
from helpers.steps import assert_equal, mlp, samples, train
from torch import Tensor, nn
from torch.optim import SGD

from drophot import fit
from drophot.training.capture_conditions import Conditions

fused_sgd = partial(SGD, lr=0.1, momentum=0.9, fused=True)


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


@pytest.mark.parametrize("cleared", [False, True])
def test_the_gradients_are_those_of_the_last_step(cleared: bool, graphs: list[Graph]) -> None:
    """Seven captured steps and a plain one of 6 samples, whose gradients are other tensors."""

    def loop(way: Any, seen: list[Tensor], model: nn.Module, *rest: Any, **options: Any) -> None:
        def on_batch(*_: Any) -> None:
            seen.extend(parameter.grad.clone() for parameter in model.parameters())
            if cleared:
                model.zero_grad()

        way(model, *rest, **options | {"on_batch": on_batch})

    data, results = samples(62, 6), []
    for way in (fit, plain_fit):
        gradients: list[Tensor] = []
        learned = train(partial(loop, way, gradients), mlp(), data, fused_sgd)
        results.append(learned + gradients)
    assert [graph.replays for graph in graphs] == [11]
    assert_equal(*results)


def test_gradients_that_the_optimizer_does_not_clear_start_again_from_none(
    graphs: list[Graph],
) -> None:
    """The norm, by which `before_step` clips, includes the gradients of untrained layers."""

    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        options["optimizer"] = fused_sgd(model[2].parameters())
        clear = lambda epoch: model.zero_grad()  # noqa: E731
        way(model, *rest, before_step=clip, on_epoch=clear, **options)

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(), data, fused_sgd)
    assert [graph.replays for graph in graphs] == [5, 5]
    assert_equal(found, train(partial(loop, plain_fit), mlp(), data, fused_sgd))


class Hides(nn.Module):
    """Keeps a layer in a list, where `parameters()` does not find it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.hidden = nn.Linear(6, 4), [nn.Linear(6, 4)]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.seen(inputs) + self.hidden[0](inputs)


def test_parameters_that_only_the_optimizer_knows_are_trained(graphs: list[Graph]) -> None:
    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        hidden = [*model.hidden[0].parameters()]
        options["optimizer"] = fused_sgd([*model.parameters(), *hidden])
        way(model, *rest, before_step=clip, **options)
        results.extend(hidden)

    torch.manual_seed(0)
    model, data = Hides(), samples(62, 6)
    results: list[Tensor] = []
    found = train(partial(loop, fit), model, data, fused_sgd)
    found, results = found + results, []
    assert [graph.replays for graph in graphs] == [11]
    assert_equal(found, train(partial(loop, plain_fit), model, data, fused_sgd) + results)


def test_a_state_that_takes_the_place_of_a_deleted_one_is_used(graphs: list[Graph]) -> None:
    """A new object often has the id of one that was just deleted."""

    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        def rewind(_: int) -> None:
            state = options["optimizer"].state[model[0].weight]
            place = id(state.pop("momentum_buffer"))
            several = [torch.zeros_like(model[0].weight) for _ in range(1000)]
            state["momentum_buffer"] = min(several, key=lambda tensor: id(tensor) != place)

        way(model, *rest, on_epoch=rewind, **options)

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(), data, fused_sgd)
    assert [graph.replays for graph in graphs] == [5, 5]
    assert_equal(found, train(partial(loop, plain_fit), mlp(), data, fused_sgd))


class Fails(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        raise KeyError("in the middle of a step")


def test_an_error_in_a_step_leaves_no_work_on_another_stream(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[Stream, Stream]] = []
    monkeypatch.setattr(Stream, "wait_stream", lambda *pair: waits.append(pair))
    model = mlp(Fails())
    with pytest.raises(KeyError, match="in the middle"):
        fit(model, samples(8, 6), 1, optimizer=fused_sgd(model.parameters()))
    there, back = waits
    assert back == there[::-1]


class Scaled(nn.Module):
    scale = 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


def test_an_attribute_that_hides_that_of_the_class_is_honoured(graphs: list[Graph]) -> None:
    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        change = lambda epoch: setattr(model[1], "scale", 0.5)  # noqa: E731
        way(model, *rest, on_epoch=change, **options)

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(Scaled()), data, fused_sgd)
    assert [graph.replays for graph in graphs] == [5, 5]
    assert_equal(found, train(partial(loop, plain_fit), mlp(Scaled()), data, fused_sgd))


@pytest.mark.parametrize("name", ["lr", "betas"])
def test_a_setting_on_the_device_is_compared_by_its_place_and_not_read(name: str) -> None:
    """A graph reads the tensor that it was captured with, whatever the value of the new one."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    group = optimizer.param_groups[0]

    def replace() -> None:
        number = torch.empty((), device="meta")  # reading it would be an error
        group[name] = number if name == "lr" else (number, 0.999)

    replace()
    conditions = Conditions(model, optimizer, None, whole_step=True)
    before = conditions.current()
    assert conditions.current() == before
    replace()
    assert conditions.current() != before
