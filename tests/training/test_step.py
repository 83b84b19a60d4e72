"""`fit` against a naive loop, and what a step leaves as it was."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from helpers.references import plain_fit
from helpers.steps import OptimizerOf, OwnAdam, assert_equal, mlp, samples, train
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import TensorDataset

from drophot import evaluate, fit
from drophot._core import random_state
from drophot.models import LeNet, fcnet
from drophot.training.memory_format import takes_channels_last
from drophot.training.step import fast_step

CPU = torch.device("cpu")


# --- the same as a plain loop ------------------------------------------------------------------

# Momentum and AMSGrad: what is kept from step to step counts too.
FUSED = [
    partial(SGD, lr=0.1, fused=True),
    partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
    partial(Adam, lr=0.01, amsgrad=True, fused=True),
    partial(AdamW, lr=0.01, fused=True),
]


@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize(
    ("between", "size"),
    [((), 25), ((nn.Dropout(0.4),), 25), ((nn.BatchNorm1d(16),), 26)],
    ids=["plain, last batch of one", "dropout", "batchnorm"],
)
def test_fit_is_the_plain_loop_bit_for_bit(
    optimizer: OptimizerOf, between: tuple[nn.Module, ...], size: int
) -> None:
    model, data = mlp(*between), samples(size, 6)
    expected = train(plain_fit, model, data, optimizer)
    chosen = partial(optimizer.func, **{**optimizer.keywords, "fused": None})  # type: ignore[attr-defined]
    found = train(fit, model, data, chosen)
    assert_equal(found, expected)
    assert not any(tensor.requires_grad for tensor in found), "logits neither"
    assert not torch.equal(expected[0], model.state_dict()["0.weight"]), "it learned something"


@pytest.mark.parametrize(
    "optimizer",
    [partial(SGD, lr=0.05, momentum=0.9), partial(Adam, lr=1e-3), partial(AdamW, lr=1e-3)],
)
@pytest.mark.parametrize("large", [False, True], ids=["lenet", "fcnet"])
def test_fit_is_nearly_the_plain_loop_where_other_kernels_compute(
    optimizer: OptimizerOf, large: bool
) -> None:
    """Channels last, oneDNN and fused optimisers add up in another order: 6 steps, one in 10⁴."""
    torch.manual_seed(0)
    model = fcnet() if large else LeNet()
    data = samples(40 if large else 20, 1, 28, 28)
    options = {"batch_size": 16 if large else 8}
    found = train(fit, model, data, optimizer, **options)
    expected = train(plain_fit, model, data, optimizer, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = deepcopy(model).state_dict().values()
    for old, new in zip(weights, found[: len(weights)], strict=True):
        assert new.stride() == old.stride(), "channels last are the inputs' affair"
        assert not torch.equal(new, old)


def test_a_conv_net_with_batchnorm_is_nearly_the_plain_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    data = samples(20, 3, 6, 6)
    optimizer = partial(SGD, lr=0.05, momentum=0.9)
    found = train(fit, model, data, optimizer)
    expected = train(plain_fit, model, data, optimizer)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_steps_under_autocast_are_in_mixed_precision_and_see_the_newest_weights() -> None:
    """Bit for bit a loop whose autocast ends with each forward pass, as PyTorch's manual says."""
    data, optimizer = samples(24, 6), partial(SGD, lr=0.5, fused=True)
    model = mlp()
    mixed = partial(plain_fit, within=lambda: torch.autocast("cpu", torch.bfloat16))
    expected = train(mixed, model, data, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        found = train(fit, model, data, optimizer)
    assert [t.dtype for t in found] == [torch.float32] * 4 + [torch.bfloat16] * 6
    assert_equal(found, expected)


def test_a_model_that_was_evaluated_under_autocast_computes_with_its_new_weights() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Conv2d(1, 4, 6), nn.Flatten()), samples(8, 1, 6, 6)
    inputs = data.tensors[0]
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(model, data)
        model[0].weight.data.neg_()
        found = model(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal([found], [model(inputs)])


def test_sparse_gradients_are_trained_with() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten())
    data = TensorDataset(torch.arange(20).view(20, 1) % 5, torch.arange(20) % 4)
    optimizer = partial(SGD, lr=0.1)
    assert_equal(train(fit, model, data, optimizer), train(plain_fit, model, data, optimizer))


def test_complex_weights_are_trained() -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 4, dtype=torch.complex64))

        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs.to(torch.complex64) @ self.weight).abs()

    optimizer = partial(Adam, lr=0.1)
    data = samples(16, 6)
    assert_equal(train(fit, Wave(), data, optimizer), train(plain_fit, Wave(), data, optimizer))


# --- the optimiser's settings ------------------------------------------------------------------


def inside(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The first group's settings while `fit` trains."""
    found: dict[str, Any] = {}
    before = deepcopy(optimizer.state_dict()["param_groups"])
    fit(
        model,
        samples(8, 6),
        1,
        optimizer=optimizer,
        on_epoch=lambda _: found.update(optimizer.param_groups[0]),
    )
    assert optimizer.state_dict()["param_groups"] == before
    return found


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
@pytest.mark.parametrize("choice", [{}, {"foreach": True}, {"fused": False}, {"foreach": False}])
def test_torchs_optimisers_are_fused_where_nobody_chose(kind: Any, choice: dict[str, bool]) -> None:
    model = mlp()
    settings = inside(kind(model.parameters(), lr=0.1, **choice), model)
    assert settings["fused"] == (choice.get("fused") if choice else True)
    assert settings["foreach"] == choice.get("foreach")
    assert not settings.get("capturable")


def test_an_optimiser_that_differentiates_through_its_steps_is_not_fused() -> None:
    model = mlp()
    before = {"fused": None, "differentiable": True}
    optimizer = SGD(model.parameters(), lr=0.1, differentiable=True)
    with fast_step(model, optimizer, CPU):
        assert {name: optimizer.param_groups[0][name] for name in before} == before


def test_optimisers_are_not_fused_on_devices_that_nobody_tried() -> None:
    optimizer = SGD(mlp().parameters(), lr=0.1)
    with fast_step(mlp(), optimizer, torch.device("mps")):
        assert optimizer.param_groups[0]["fused"] is None


def test_groups_are_fused_one_by_one() -> None:
    model = mlp()
    first, last = ({"params": [*layer.parameters()]} for layer in (model[0], model[2]))
    optimizer = Adam([{**first, "foreach": True}, last])
    settings = [(None, True), (True, None)]
    with fast_step(model, optimizer, CPU):
        assert [(g["fused"], g["foreach"]) for g in optimizer.param_groups] == settings
    assert [g["fused"] for g in optimizer.param_groups] == [None, None]


class SignSGD(Optimizer):
    """A user's, with a state of an unusual kind."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad.sign())
                self.state[parameter] = torch.zeros(())


@pytest.mark.parametrize("kind", [OwnAdam, SignSGD])
def test_a_users_own_optimiser_is_left_alone(kind: OptimizerOf) -> None:
    model, data = mlp(), samples(25, 6)
    optimizer = kind(model.parameters())
    for _ in range(2):  # the second time there is a state already
        assert not inside(optimizer, model).get("fused")
    assert_equal(train(fit, model, data, kind), train(plain_fit, model, data, kind))


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_settings_come_back_when_a_step_raises(kind: Any) -> None:
    model = mlp()
    optimizer = kind(model.parameters(), lr=0.1)
    before = deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match="`dataset`.* 9"):
        fit(model, TensorDataset(torch.zeros(8, 6), torch.full((8,), 9)), 1, optimizer=optimizer)
    assert optimizer.state_dict()["param_groups"] == before


def test_parameters_may_join_the_optimiser_while_it_trains() -> None:
    """Gradual unfreezing."""

    def loop(fit: Any, model: Any, *rest: Any, optimizer: Optimizer, **options: Any) -> None:
        optimizer = SGD(model[2].parameters(), lr=0.1)

        def join(epoch: int) -> None:
            if epoch == 0:
                optimizer.add_param_group({"params": [*model[0].parameters()], "lr": 0.01})

        fit(model, *rest, optimizer=optimizer, on_epoch=join, **options)
        assert [group["fused"] for group in optimizer.param_groups] == [None, None]

    found, expected = (
        train(partial(loop, way), mlp(), samples(16, 6), partial(SGD, lr=0))
        for way in (fit, plain_fit)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- channels last -----------------------------------------------------------------------------


class Viewed(nn.Module):
    """Asks for its activations to lie as they do in plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(64, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        activation = self.conv(inputs).relu()
        return self.last(activation.view(len(activation), -1))


def test_which_models_take_channels_last() -> None:
    assert takes_channels_last(LeNet(), torch.rand(2, 1, 28, 28))
    assert takes_channels_last(LeNet().requires_grad_(False), torch.rand(2, 1, 28, 28))
    assert not takes_channels_last(Viewed(), torch.rand(2, 3, 6, 6))
    # On a CPU torch would write beyond the memory of its gradient, and end the process.
    narrow, wide = (nn.Conv2d(n, 13, 1, stride=2, bias=False) for n in (6, 8))
    assert not takes_channels_last(nn.Sequential(narrow), torch.rand(2, 6, 8, 8))
    assert takes_channels_last(nn.Sequential(wide), torch.rand(2, 8, 8, 8))
    assert not takes_channels_last(fcnet(), torch.rand(2, 1, 28, 28)), "nothing to gain"
    assert not takes_channels_last(nn.Conv1d(3, 4, 3), torch.rand(2, 3, 6))
    assert not takes_channels_last(nn.Conv3d(3, 4, 3), torch.rand(2, 3, 6, 6, 6))


def test_what_only_the_backward_pass_refuses_is_found() -> None:
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: Tensor) -> Tensor:
            return inputs.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0].view(-1).view(grads[0].shape)

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.two(Refuses.apply(self.one(inputs))).flatten(1)

    assert not takes_channels_last(Late(), torch.rand(2, 3, 6, 6))


def test_a_model_that_refuses_channels_last_trains_as_in_the_plain_loop() -> None:
    data, model = samples(20, 3, 6, 6), Viewed()
    fused = partial(SGD, lr=0.1, fused=True)
    assert_equal(train(fit, model, data, fused), train(plain_fit, model, data, fused))


@pytest.mark.parametrize("channels", [3, 5], ids=["fits", "raises"])
def test_the_look_at_a_model_leaves_no_trace(channels: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
    model[1].eval()  # a frozen BatchNorm stays frozen
    model[0].weight.grad = torch.ones_like(model[0].weight)
    inputs = torch.rand(2, channels, 6, 6)
    before, random = deepcopy(model.state_dict()), random_state.state()
    assert takes_channels_last(model, inputs) == (channels == 3)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert (model[0].weight.grad == 1).all()
    assert model[0].bias.grad is None
    assert random_state.state() == random
    assert torch.is_grad_enabled()
