"""`loss`, `scheduler` and `before_step` of `fit`, against a plain PyTorch loop."""

# ruff: noqa: F811 (the argument `graphs` is the imported fixture)

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from helpers.graphs import graphs  # noqa: F401 (a fixture)
from helpers.references import plain_fit
from helpers.stand_in import Graph
from helpers.steps import OwnAdam, assert_equal, mlp, samples, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import TensorDataset

from drophot import ForgettingTracker, IndexedDataset, fit
from drophot.prune import magnitude_prune

fused_sgd = partial(SGD, lr=0.5, momentum=0.9, fused=True)
fused_adam = partial(Adam, lr=0.01, fused=True)


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (1 - torch.exp(-losses)) ** 2 * losses


def clip(model: nn.Module) -> object:
    return nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def warm_up_then_cosine(optimizer: Optimizer) -> SequentialLR:
    parts = [LinearLR(optimizer, 0.1, total_iters=4), CosineAnnealingLR(optimizer, 12)]
    return SequentialLR(optimizer, parts, milestones=[4])


def with_scheduler(way: Callable[..., None], make: Any) -> Callable[..., None]:
    """A loop that schedules the optimizer it is given."""

    def loop(model: nn.Module, data: Any, epochs: int, *, optimizer: Any, **options: Any) -> None:
        scheduler = None if make is None else make(optimizer)
        way(model, data, epochs, optimizer=optimizer, scheduler=scheduler, **options)

    return loop


LOSSES = {
    "default": {},
    "module": {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "function": {"loss": partial(F.cross_entropy, reduction="sum")},
    "one per sample": {"loss": focal},
}
SCHEDULERS: dict[str, tuple[Any, str]] = {
    "none": (None, "epoch"),
    "each epoch": (partial(ExponentialLR, gamma=0.5), "epoch"),
    "each step": (partial(OneCycleLR, max_lr=0.5, total_steps=16), "step"),
    "warm-up": (warm_up_then_cosine, "step"),
    "chained": (lambda o: ChainedScheduler([ExponentialLR(o, 0.9), StepLR(o, 3)]), "step"),
}
HOOKS = {"no hook": {}, "clipped": {"before_step": clip}}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_options_give_the_weights_of_a_plain_loop(loss: str, schedule: str, hook: str) -> None:
    model, data = mlp(nn.Dropout(0.3)), samples(62, 6)
    make, interval = SCHEDULERS[schedule]
    options = {**LOSSES[loss], **HOOKS[hook], "scheduler_interval": interval}
    optimizer = fused_sgd if schedule == "each step" else fused_adam
    found = train(with_scheduler(fit, make), model, data, optimizer, **options)
    assert_equal(found, train(with_scheduler(plain_fit, make), model, data, optimizer, **options))
    if loss != "default" or schedule != "none" or hook != "no hook":
        plain = train(fit, model, data, optimizer)
        assert not torch.equal(found[0], plain[0]), "the options have an effect"


# Eight steps in each of two epochs; the first three are eager. A graph of the whole step fixes the
# learning rate, so that one which changes between epochs needs a second graph.
REPLAYS = {"none": [13], "each epoch": [5, 5], "each step": [13], "warm-up": [13], "chained": [13]}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_options_give_the_weights_of_a_plain_loop_in_captured_steps(
    loss: str, schedule: str, hook: str, graphs: list[Graph]
) -> None:
    model, data = mlp(), samples(64, 6)
    make, interval = SCHEDULERS[schedule]
    options = {**LOSSES[loss], **HOOKS[hook], "scheduler_interval": interval}
    optimizer = fused_sgd if schedule == "each step" else fused_adam
    found = train(with_scheduler(fit, make), model, data, optimizer, **options)
    expected = [13] if hook == "clipped" else REPLAYS[schedule]
    assert [graph.replays for graph in graphs] == expected
    assert_equal(found, train(with_scheduler(plain_fit, make), model, data, optimizer, **options))


def test_options_give_the_weights_of_a_plain_loop_in_mixed_precision() -> None:
    data = samples(64, 6)
    make = partial(CosineAnnealingLR, T_max=16)
    options: Any = {"loss": focal, "before_step": clip, "scheduler_interval": "step"}

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    plain = with_scheduler(partial(plain_fit, within=autocast), make)
    expected = train(plain, mlp(), data, fused_adam, **options)
    with autocast():
        found = train(with_scheduler(fit, make), mlp(), data, fused_adam, **options)
    assert_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", [fused_sgd, fused_adam, OwnAdam])
def test_options_give_nearly_the_weights_of_a_plain_loop_on_a_gpu(
    loss: str, schedule: str, hook: str, optimizer: Any
) -> None:
    model, data = mlp().cuda(), samples(62, 6)
    make, interval = SCHEDULERS[schedule]
    options = {**LOSSES[loss], **HOOKS[hook], "scheduler_interval": interval}
    found = train(with_scheduler(fit, make), model, data, optimizer, **options)
    expected = train(with_scheduler(plain_fit, make), model, data, optimizer, **options)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_masks_hold_with_a_hook_in_captured_steps(graphs: list[Graph]) -> None:
    def loop(way: Any, model: nn.Module, *rest: Any, **options: Any) -> None:
        with magnitude_prune(model, 0.5).hold(options["optimizer"]):
            way(model, *rest, before_step=clip, **options)

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(), data, fused_sgd)
    assert [graph.replays for graph in graphs] == [13]
    assert int((found[0] == 0).sum() + (found[2] == 0).sum()) == 160 / 2
    assert_equal(found, train(partial(loop, plain_fit), mlp(), data, fused_sgd))


# --- the hook ----------------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True])
def test_the_hook_sees_each_steps_gradients(captured: bool, request: pytest.FixtureRequest) -> None:
    if captured:
        request.getfixturevalue("graphs")

    def seen(way: Callable[..., None]) -> list[Tensor]:
        grads: list[Tensor] = []
        note = lambda model: grads.append(model[0].weight.grad.clone())  # noqa: E731
        train(way, mlp(), samples(62, 6), fused_sgd, before_step=note)
        return grads

    found = seen(fit)
    assert len(found) == 16
    assert_equal(found, seen(plain_fit))


def replace(model: nn.Module) -> None:
    """A new tensor in place of the gradient that the backward pass wrote."""
    for parameter in model.parameters():
        parameter.grad = parameter.grad.sign()


def freeze_bias(model: nn.Module) -> None:
    model[0].bias.grad = None


@pytest.mark.parametrize("hook", [replace, freeze_bias])
def test_a_hook_may_replace_gradients_in_captured_steps(hook: Any, graphs: list[Graph]) -> None:
    data = samples(62, 6)  # the last batch of an epoch is smaller and takes an eager step
    found = train(fit, mlp(), data, fused_sgd, before_step=hook)
    assert [graph.replays for graph in graphs] == [11]
    assert_equal(found, train(plain_fit, mlp(), data, fused_sgd, before_step=hook))


# --- the loss ----------------------------------------------------------------------------------


class Annealed(nn.Module):
    """Its smoothing is an attribute that somebody changes."""

    def __init__(self) -> None:
        super().__init__()
        self.smoothing = 0.5

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)


class Counting(Annealed):
    """Changes in each call."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.smoothing *= 0.9
        return super().forward(logits, targets)


def test_a_loss_that_changes_between_epochs_has_a_new_graph(graphs: list[Graph]) -> None:
    def loop(way: Any, *rest: Any, **options: Any) -> None:
        loss = Annealed()
        change = lambda _: setattr(loss, "smoothing", 0.0)  # noqa: E731
        way(*rest, loss=loss, on_epoch=change, **options)

    data = samples(64, 6)
    found = train(partial(loop, fit), mlp(), data, fused_sgd)
    assert [graph.replays for graph in graphs] == [5, 5]
    assert_equal(found, train(partial(loop, plain_fit), mlp(), data, fused_sgd))


def test_a_loss_that_changes_in_each_step_is_not_captured(graphs: list[Graph]) -> None:
    data = samples(64, 6)
    found = train(fit, mlp(), data, fused_sgd, loss=Counting())
    assert graphs == []
    assert_equal(found, train(plain_fit, mlp(), data, fused_sgd, loss=Counting()))


def test_a_loss_that_waits_for_the_device_is_not_captured(graphs: list[Graph]) -> None:
    values: list[float] = []

    def logged(logits: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, targets)
        values.append(loss.item())
        return loss

    data = samples(64, 6)
    found = train(fit, mlp(), data, fused_sgd, loss=logged)
    assert graphs == []
    assert_equal(found, train(plain_fit, mlp(), data, fused_sgd))
    assert len(values) == 16


def test_targets_are_the_losss_affair() -> None:
    """Several labels per sample, and regression."""
    inputs = torch.randn(24, 6)
    for targets in (inputs[:, :4].gt(0).float(), inputs[:, :4]):
        for loss in (nn.BCEWithLogitsLoss(), nn.MSELoss()):
            data, options = TensorDataset(inputs, targets), {"loss": loss}
            found = train(fit, mlp(), data, fused_sgd, **options)
            assert_equal(found, train(plain_fit, mlp(), data, fused_sgd, **options))


class Weighted:
    """A loader of weighted batches."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        inputs, targets = self.data.tensors
        index = torch.arange(len(inputs))
        weights = 0.5 + (index % 3).float()
        yield from zip(*(t.split(8) for t in (inputs, targets, index, weights)), strict=True)


@pytest.mark.parametrize("captured", [False, True])
def test_weights_multiply_the_losses_of_the_samples(
    captured: bool, request: pytest.FixtureRequest
) -> None:
    if captured:
        request.getfixturevalue("graphs")
    loader = Weighted(samples(62, 6))
    model = mlp()
    expected = deepcopy(model)
    fit(
        model,
        loader,
        2,
        optimizer=fused_sgd(model.parameters()),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none"),
        before_step=clip,
    )
    optimizer = fused_sgd(expected.parameters())
    for _ in range(2):
        for inputs, targets, _index, weights in loader:
            losses = F.cross_entropy(
                expected(inputs), targets, label_smoothing=0.1, reduction="none"
            )
            optimizer.zero_grad()
            (losses * weights).mean().backward()
            clip(expected)
            optimizer.step()
    assert_equal([*model.state_dict().values()], [*expected.state_dict().values()])


# --- the scheduler -----------------------------------------------------------------------------


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_callbacks_see_the_learning_rate_of_what_comes_next(interval: Any) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=1.0)
    rates: list[float] = []
    note = lambda *_: rates.append(optimizer.param_groups[0]["lr"])  # noqa: E731
    fit(
        model,
        IndexedDataset(samples(16, 6)),
        2,
        optimizer=optimizer,
        batch_size=8,
        scheduler=ExponentialLR(optimizer, 0.5),
        scheduler_interval=interval,
        on_batch=note,
        on_epoch=note,
    )
    expected = {
        "step": [0.5, 0.25, 0.25, 0.125, 0.0625, 0.0625],
        "epoch": [1, 1, 0.5, 0.5, 0.5, 0.25],
    }
    assert rates == expected[interval]


def test_a_users_own_optimizer_is_scheduled_and_clipped(graphs: list[Graph]) -> None:
    data, make = samples(64, 6), partial(ExponentialLR, gamma=0.9)
    options: Any = {"before_step": clip, "scheduler_interval": "step"}
    found = train(with_scheduler(fit, make), mlp(), data, OwnAdam, **options)
    assert graphs == []
    expected = train(with_scheduler(plain_fit, make), mlp(), data, OwnAdam, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- what is refused before a weight changes ---------------------------------------------------


def scheduler_of(kind: Any, *, other: bool = False) -> Callable[[Optimizer], Any]:
    def make(optimizer: Optimizer) -> Any:
        return kind(SGD(mlp().parameters(), lr=0.1) if other else optimizer)

    return make


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a name": ({"loss": "cross_entropy"}, TypeError, "`loss`.*str"),
    "a class": ({"loss": nn.CrossEntropyLoss}, TypeError, r"`loss`.*CrossEntropyLoss\(\)"),
    "a number": ({"loss": lambda z, y: 1.0}, TypeError, "`loss`.*float"),
    "detached": ({"loss": lambda z, y: F.cross_entropy(z.detach(), y)}, ValueError, "`loss`"),
    "too many": ({"loss": lambda z, y: z}, ValueError, r"`loss`.*\(8,\).*\(8, 4\)"),
    "another size": ({"loss": lambda z, y: z[:3, 0]}, ValueError, r"`loss`.*\(8,\).*\(3,\)"),
    "clip": ({"before_step": 1.0}, TypeError, "`before_step`.*float"),
    "interval": ({"scheduler_interval": "batch"}, ValueError, "`scheduler_interval`.*'batch'"),
    "no scheduler": ({"scheduler": 0.1}, TypeError, "`scheduler`.*float"),
    "a scheduler's class": ({"scheduler": StepLR}, TypeError, "`scheduler`.*StepLR"),
    "a metric": (
        {"make": scheduler_of(ReduceLROnPlateau)},
        TypeError,
        "`scheduler`.*ReduceLROnPlateau",
    ),
    "another optimizer's": (
        {"make": scheduler_of(partial(StepLR, step_size=1), other=True)},
        ValueError,
        "`scheduler`.*StepLR",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_options_are_refused_before_a_weight_changes(name: str) -> None:
    options, error, words = REFUSED[name]
    model = mlp()
    before = deepcopy(model.state_dict())
    optimizer = SGD(model.parameters(), lr=0.1)
    if make := options.get("make"):
        options = {"scheduler": make(optimizer)}
    with pytest.raises(error, match=words):
        fit(model, samples(16, 6), 1, optimizer=optimizer, batch_size=8, **options)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_mean_cannot_be_weighted() -> None:
    model = mlp()
    before = deepcopy(model.state_dict())
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r'`loss`.*\(8,\).*reduction="none"'):
        fit(model, Weighted(samples(16, 6)), 1, optimizer=optimizer, loss=nn.CrossEntropyLoss())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_weights_of_samples_with_a_class_per_pixel_weight_samples() -> None:
    """Of as many pixels as samples, which would broadcast along the wrong dimension."""
    torch.manual_seed(0)
    model = nn.Conv2d(1, 3, 1)
    expected = deepcopy(model)
    inputs, targets = torch.randn(4, 1, 2, 4), torch.randint(3, (4, 2, 4))
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0])
    fit(
        model,
        Batch(inputs, targets, torch.arange(4), weights),
        1,
        optimizer=SGD(model.parameters(), lr=0.1, fused=True),
    )
    optimizer = SGD(expected.parameters(), lr=0.1, fused=True)
    losses = F.cross_entropy(expected(inputs), targets, reduction="none")
    (losses.flatten(1).mean(1) * weights).mean().backward()
    optimizer.step()
    assert_equal([*model.state_dict().values()], [*expected.state_dict().values()])


class Batch:
    """A loader of one batch."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        yield self.parts


def test_a_tracker_goes_with_all_options() -> None:
    model, tracker = mlp(), ForgettingTracker(64)
    optimizer = SGD(model.parameters(), lr=0.1)
    fit(
        model,
        IndexedDataset(samples(64, 6)),
        2,
        optimizer=optimizer,
        loss=focal,
        scheduler=StepLR(optimizer, 1),
        before_step=clip,
        on_batch=tracker.update,
    )
    assert (tracker.presentations == 2).all()
