"""Steps that are not captured as a CUDA graph, and what a failed capture leaves behind."""

# ruff: noqa: F811 (the argument `graphs` is the imported fixture)

import logging
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.graphs import graphs  # noqa: F401 (a fixture)
from helpers.references import plain_fit
from helpers.stand_in import Graph
from helpers.steps import assert_equal, mlp, samples, train
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.optim import ASGD, SGD, Adam, NAdam, Optimizer

from drophot import fit
from drophot.prune import Schedule, magnitude_prune
from drophot.training.mixed_precision import uncached_autocast

fused_sgd = partial(SGD, lr=0.1, momentum=0.9, fused=True)


def replays(graphs: list[Graph]) -> list[int]:
    return [graph.replays for graph in graphs]


# --- hooks -------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Keeps the gradients of its activations, as visualisations do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = 2 * inputs
        if outputs.requires_grad:
            outputs.register_hook(lambda _: self.calls.append("tensor"))
        return outputs


def hook(kind: str, model: nn.Module, call: Callable[..., Any]) -> Any:
    if kind == "parameter":
        return model[0].weight.register_hook(call)
    if kind == "accumulated":
        return model[0].weight.register_post_accumulate_grad_hook(call)
    if kind == "global":
        return module_hooks.register_module_forward_hook(call)
    return model[0].register_forward_hook(call)


@pytest.mark.parametrize("kind", ["module", "global", "parameter", "accumulated"])
def test_a_hook_is_called_in_each_step(
    kind: str, graphs: list[Graph], caplog: pytest.LogCaptureFixture
) -> None:
    model, calls = mlp(), list[str]()
    handle = hook(kind, model, lambda *_: calls.append(kind))
    with caplog.at_level(logging.INFO, logger="drophot"):
        fit(model, samples(64, 6), 2, optimizer=SGD(model.parameters(), lr=0.1), batch_size=8)
    handle.remove()
    assert graphs == []
    assert len(calls) == 16 * (4 if kind == "global" else 1)
    assert caplog.text.count("not captured as a CUDA graph") == 1
    assert {"parameter": "0.weight", "accumulated": "0.weight", "module": "`0`"}.get(
        kind, "modules"
    ) in caplog.text


def test_a_hook_on_a_tensor_in_the_forward_pass_is_called_in_each_step(graphs: list[Graph]) -> None:
    model = mlp(Remembers())
    fit(model, samples(64, 6), 2, optimizer=SGD(model.parameters(), lr=0.1), batch_size=8)
    assert graphs == []
    assert len(model[1].calls) == 16


@pytest.mark.parametrize("kind", ["module", "global", "parameter", "accumulated"])
def test_a_hook_that_comes_after_the_capture_is_called_until_it_is_removed(
    kind: str, graphs: list[Graph]
) -> None:
    """Eight steps in each of three epochs, of which the second has a hook."""
    model, calls, handles = mlp(), list[str](), []

    def on_epoch(epoch: int) -> None:
        if epoch == 0:
            handles.append(hook(kind, model, lambda *_: calls.append(kind)))
        else:
            handles.pop().remove()
            handles.append(model[0].weight.register_hook(lambda gradient: None))
            handles.pop().remove()

    def loop(way: Any, model_: nn.Module, data: Any, _: int, **options: Any) -> None:
        nonlocal model
        model = model_
        way(model, data, 3, on_epoch=lambda e: on_epoch(e) if e < 2 else None, **options)

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(), data, fused_sgd)
    assert replays(graphs) == [5, 5]
    assert len(calls) == 8 * (4 if kind == "global" else 1)
    assert_equal(found, train(partial(loop, plain_fit), mlp(), data, fused_sgd))


@pytest.mark.parametrize("before", ["pre", "post"])
def test_hooks_of_the_optimizer_are_called_after_each_launch(
    before: str, graphs: list[Graph]
) -> None:
    calls: list[Tensor] = []

    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        note = lambda *_: calls.append(model[0].weight.detach().clone())  # noqa: E731
        with_hook: Optimizer = options["optimizer"]
        getattr(with_hook, f"register_step_{before}_hook")(note)
        way(model, *rest, **options)

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(), data, fused_sgd)
    assert replays(graphs) == [13]
    seen, calls = calls, []
    assert_equal(found, train(partial(loop, plain_fit), mlp(), data, fused_sgd))
    assert len(seen) == 16
    assert_equal(seen, calls)


def test_a_schedule_prunes_between_launches(graphs: list[Graph]) -> None:
    """The masks are replaced after steps 4 and 8, which a new graph follows."""

    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        schedule = Schedule(model, [0.2, 0.5, 0.8], every=4)
        with schedule.hold(options["optimizer"]):
            way(model, *rest, **options)
        assert (schedule.steps, schedule.ratio) == (16, 0.8)

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(), data, fused_sgd)
    assert replays(graphs) == [1, 1, 5]
    assert_equal(found, train(partial(loop, plain_fit), mlp(), data, fused_sgd))


def test_masks_that_are_loaded_are_held_by_a_new_graph(graphs: list[Graph]) -> None:
    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        masks = magnitude_prune(model, 0.5)
        others = {name: torch.ones_like(mask) for name, mask in masks.items()}
        for other in others.values():
            other[:2] = False
        load = lambda epoch: epoch or masks.load_state_dict(others)  # noqa: E731
        with masks.hold(options["optimizer"]):
            way(model, *rest, on_epoch=load, **options)
            assert (model[0].weight[:2] == 0).all()

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(), data, fused_sgd)
    assert replays(graphs) == [5, 5]
    assert_equal(found, train(partial(loop, plain_fit), mlp(), data, fused_sgd))


# --- models ------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Multiplies by a number that somebody changes."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.calls, self.counts = 1.0, 0, False
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.counts:
            self.calls += 1
        return inputs * self.scale + self.shift + self.calls


def other_scale(layer: Scaled) -> None:
    layer.scale = 0.5


def other_buffer(layer: Scaled) -> None:
    layer.shift = torch.ones(())


def other_mode(layer: Scaled) -> None:
    layer.counts = not layer.counts


@pytest.mark.parametrize("change", [other_scale, other_buffer])
def test_a_model_that_is_changed_between_steps_is_captured_again(
    change: Callable[[Scaled], None], graphs: list[Graph]
) -> None:
    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        way(model, *rest, on_epoch=lambda epoch: epoch or change(model[1]), **options)

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(Scaled()), data, fused_sgd)
    assert replays(graphs) == [5, 5]
    assert_equal(found, train(partial(loop, plain_fit), mlp(Scaled()), data, fused_sgd))


@pytest.mark.parametrize("later", [False, True])
def test_a_model_that_counts_its_calls_is_not_captured(later: bool, graphs: list[Graph]) -> None:
    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        model[1].counts = not later
        way(
            model,
            *rest,
            on_epoch=lambda epoch: epoch or (later and other_mode(model[1])),
            **options,
        )
        assert model[1].calls == (8 if later else 16)

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(Scaled()), data, fused_sgd)
    assert replays(graphs) == ([5] if later else [])
    assert_equal(found, train(partial(loop, plain_fit), mlp(Scaled()), data, fused_sgd))


class Holds(nn.Module):
    """Holds a tensor that the forward pass does not use."""

    def __init__(self, unused: Tensor) -> None:
        super().__init__()
        self.register_buffer("unused", unused)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def test_a_model_on_two_devices_is_not_captured(
    graphs: list[Graph], caplog: pytest.LogCaptureFixture
) -> None:
    model = mlp(Holds(torch.empty(1, device="meta")))
    with caplog.at_level(logging.INFO, logger="drophot"):
        fit(model, samples(64, 6), 1, optimizer=SGD(model.parameters(), lr=0.1), batch_size=8)
    assert graphs == []
    assert "several devices: cpu, meta" in caplog.text


def test_a_model_that_holds_a_sparse_tensor_is_captured(graphs: list[Graph]) -> None:
    model = mlp(Holds(torch.eye(3).to_sparse()))
    fit(model, samples(64, 6), 1, optimizer=SGD(model.parameters(), lr=0.1), batch_size=8)
    assert replays(graphs) == [5]


@pytest.fixture
def group() -> Iterator[None]:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_a_model_that_is_parallel_is_not_captured(
    wrap: Any, graphs: list[Graph], caplog: pytest.LogCaptureFixture
) -> None:
    model = wrap(mlp())
    with caplog.at_level(logging.INFO, logger="drophot"):
        fit(model, samples(64, 6), 1, optimizer=SGD(model.parameters(), lr=0.1), batch_size=8)
    assert graphs == []
    assert wrap.__name__ in caplog.text


def test_capture_can_be_switched_off(graphs: list[Graph]) -> None:
    data = samples(64, 6)
    found = train(fit, mlp(), data, fused_sgd, cuda_graph=False)
    assert graphs == []
    assert_equal(found, train(plain_fit, mlp(), data, fused_sgd))


def test_a_switch_is_true_or_false() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="`cuda_graph`.*'never'"):
        fit(
            model,
            samples(8, 6),
            1,
            optimizer=SGD(model.parameters(), lr=0.1),
            cuda_graph="never",  # type: ignore[arg-type]
        )


# --- captures that fail ------------------------------------------------------------------------


def test_an_empty_graph_is_refused(graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch records it when another device is the current one."""
    wrong = torch.cuda.graph
    monkeypatch.setattr(
        "torch.cuda.graph",
        lambda graph, stream, capture_error_mode: wrong(graph, capture_error_mode),
    )
    data = samples(64, 6)
    with pytest.warns(UserWarning, match="Graph is empty"):
        found = train(fit, mlp(), data, Adam)
    assert replays(graphs) == [0]
    assert len({str(tensor) for tensor in found[4:]}) == 16, "each step has learned something"


class Fails(nn.Module):
    """Is interrupted while it is captured, after it has drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.capturing = False

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = nn.functional.dropout(inputs)
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("interrupted")
        return outputs


class Generator:
    """A GPU's random generator, whose state an interrupted capture leaves unusable."""

    def __init__(self) -> None:
        self.state = "usable"

    def clone_state(self) -> str:
        return self.state

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


@pytest.mark.parametrize("optimizer", [fused_sgd, partial(Adam, lr=0.01, fused=True)])
def test_a_failed_capture_leaves_everything_as_it_was(
    optimizer: Any, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    generators = (Generator(), Generator())
    monkeypatch.setattr("torch.cuda.default_generators", generators)
    data = samples(64, 6)
    capture = torch.cuda.graph

    def interrupted(graph: Any, **options: Any) -> Any:
        generators[1].state = "capturing"
        return capture(graph, **options)

    monkeypatch.setattr("torch.cuda.graph", interrupted)
    with pytest.warns(UserWarning, match="interrupted"):
        found = train(fit, mlp(Fails()), data, optimizer)
    assert replays(graphs) == [0]
    assert [generator.state for generator in generators] == ["usable", "usable"]
    assert_equal(found, train(plain_fit, mlp(Fails()), data, optimizer))


def test_a_capture_that_fails_in_the_optimizer_leaves_its_state(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = mlp(), samples(64, 6)
    expected = deepcopy(model)
    optimizer = fused_sgd(model.parameters())
    step = torch.optim.SGD.step

    def failing(self: torch.optim.SGD) -> None:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            optimizer.state[model[0].weight].clear()
            raise RuntimeError("interrupted")
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", failing)
    with pytest.warns(UserWarning, match="interrupted"):
        fit(model, data, 1, optimizer=optimizer, batch_size=8)
    plain_fit(expected, data, 1, optimizer=fused_sgd(expected.parameters()), batch_size=8)
    assert_equal([*model.state_dict().values()], [*expected.state_dict().values()])


# --- autograd graphs that are still in use -----------------------------------------------------


def test_an_autograd_graph_of_before_is_refused_with_its_cause(graphs: list[Graph]) -> None:
    """Its nodes belong to the default stream, which a capture must not touch."""
    model, data = mlp(), samples(64, 6)
    loss = model(data.tensors[0]).sum()
    with pytest.warns(UserWarning, match="in use.*detach"):
        fit(model, data, 1, optimizer=fused_sgd(model.parameters()), batch_size=8)
    assert graphs == []
    del loss
    fit(model, data, 1, optimizer=fused_sgd(model.parameters()), batch_size=8)
    assert replays(graphs) == [5]


class Keeps(nn.Module):
    """Keeps its outputs, and with them the autograd graph of the last step."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.outputs = 2 * inputs
        return self.outputs


def test_a_model_may_keep_the_autograd_graph_of_a_step(graphs: list[Graph]) -> None:
    def loop(way: Any, *rest: Any, **options: Any) -> None:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(options["optimizer"], 0.5)
        way(*rest, scheduler=scheduler, **options)

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(Keeps()), data, fused_sgd)
    assert replays(graphs) == [5, 5]
    assert_equal(found, train(partial(loop, plain_fit), mlp(Keeps()), data, fused_sgd))


def test_steps_under_autocast_are_captured(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where autocast has cached the weights of earlier forward passes, and their nodes."""
    data = samples(64, 6)
    on_cpu = lambda _: uncached_autocast("cpu")  # noqa: E731
    monkeypatch.setattr("drophot.training.step.uncached_autocast", on_cpu)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        model(data.tensors[0])
        scheduler = torch.optim.lr_scheduler.ExponentialLR(options["optimizer"], 0.5)
        way(model, *rest, scheduler=scheduler, on_epoch=lambda _: model(data.tensors[0]), **options)

    mixed = partial(loop, partial(plain_fit, within=autocast))
    expected = train(mixed, mlp(), data, fused_sgd)
    with autocast():
        found = train(partial(loop, fit), mlp(), data, fused_sgd)
    assert replays(graphs) == [5, 5]
    assert_equal(found, expected)


def test_a_model_that_was_trained_under_autocast_computes_with_its_new_weights() -> None:
    torch.manual_seed(0)
    model, data = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 4)),
        samples(64, 1, 6, 6),
    )
    inputs = data.tensors[0]
    with torch.autocast("cpu", torch.bfloat16):
        before = model(inputs)
        fit(model, data, 1, optimizer=SGD(model.parameters(), lr=1.0))
        found = model(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal([found], [model(inputs)])
    assert not torch.equal(found, before)


# --- the optimizer afterwards ------------------------------------------------------------------


def test_a_counter_that_is_a_number_stays_one(graphs: list[Graph]) -> None:
    """As in optimizers that were saved by old versions of torch."""
    model = mlp()
    optimizer = Adam(model.parameters())
    for expected in (8, 16):
        fit(model, samples(64, 6), 1, optimizer=optimizer, batch_size=8)
        for state in optimizer.state.values():
            assert state["step"] == expected
            assert isinstance(state["step"], Tensor) == (expected == 8)
            state["step"] = 8.0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", [Adam, partial(Adam, fused=True), partial(Adam, capturable=True), NAdam, ASGD]
)
@pytest.mark.parametrize("trained", [False, True])
def test_the_state_of_an_optimizer_is_that_of_a_plain_loop_on_a_gpu(
    kind: Any, trained: bool
) -> None:
    """In its types, dtypes and devices."""
    states = []
    for way in (fit, plain_fit):
        model = mlp().cuda()
        optimizer = kind(model.parameters(), lr=0.01)
        for loop in ([plain_fit] if trained else []) + [way]:
            loop(model, samples(64, 6), 1, optimizer=optimizer, batch_size=8)
        states.append([*optimizer.state.values()])
    for found, expected in zip(*states, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert type(found[name]) is type(value)
            assert (found[name].device, found[name].dtype) == (value.device, value.dtype)
        torch.testing.assert_close(found["step"], expected["step"])
