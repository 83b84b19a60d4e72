"""Layers whose forward is their own: those that keep zeros are pruned, the others stay dense."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.said import warned
from torch import Tensor, nn
from torch.nn import functional as F

from drophot import Masks, magnitude_prune


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(input, (self.weight - mean) / self.weight.std(), self.bias)


class StandardisedInPlace(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        self.weight.data -= self.weight.data.mean((1, 2, 3), keepdim=True)
        return super().forward(input)


class Squashed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.sigmoid(), self.bias)


class Merged(nn.Linear):
    """Low-rank adaptation, added to the kernel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a = nn.Linear(inputs, 1, bias=False)
        self.b = nn.Linear(1, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight + self.b.weight @ self.a.weight, self.bias)


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight + torch.randn_like(self.weight), self.bias)


class ByHand(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return (input[..., None, :] * self.weight).sum(-1)


class WithScale(nn.Linear):
    def forward(self, input: Tensor, scale: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.linear(input, self.weight) * scale


class Centred(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


LEAVE = [
    Standardised(4, 8, 3),
    Standardised(8, 8, 3, groups=8),
    StandardisedInPlace(4, 8, 3),
    Centred(4, 8, 1),
    Squashed(8, 6),
    Merged(8, 6),
    Noisy(8, 6),
    ByHand(8, 6),  # not seen
    WithScale(8, 6),  # cannot be called
]


@pytest.mark.parametrize("layer", LEAVE, ids=lambda layer: type(layer).__name__)
def test_layers_that_compute_another_kernel_stay_dense(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.Linear(4, 4))
    dense, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    masks: list[Masks] = []
    (message,) = warned(lambda: masks.append(magnitude_prune(model, 0.5)))
    assert f"`0.weight` ({type(layer).__name__}, whose forward" in message
    assert "0.weight" not in masks[0]
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(torch.get_rng_state(), random)
    assert "0.weight" in magnitude_prune(model, 0.5, include=("0.weight",))
    magnitude_prune(dense, 0.5, skip=("0",))


class LowRank(Merged):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) + self.b(self.a(input))


class Cast(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.bfloat16(), self.weight.bfloat16()).to(input.dtype)


class Cosine(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input), F.normalize(self.weight))


class Transposed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ (self.weight * 2).T


class Einsum(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", input, self.weight)


class Same(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 1, 1, 1)))


class WithNorm(nn.Conv2d):
    """A convolution that counts its calls and has its norm and activation in it."""

    calls = 0

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(super().forward(input)).relu()


class Masked(nn.Conv2d):
    """As in PixelCNN: it changes its weight as it is called."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data[:, :, 1] *= 0
        return super().forward(input)


class Last(nn.Conv1d):
    """Channels last."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class Attention(nn.MultiheadAttention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(query, key, value, need_weights=False)


class Recurrent(nn.GRU):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(input, hx)


class Scale(nn.Bilinear):
    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return super().forward(input1, input2) * 2


class Up(nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input, output_size) * 2


TAKE = [
    LowRank(8, 6),
    Cast(8, 6),
    Cosine(8, 6),
    Transposed(8, 6),
    Einsum(8, 6),
    Cast(8, 6).half(),
    Same(4, 8, 3, stride=2),
    Same(8, 8, 3, groups=8),
    WithNorm(4, 8, 3),
    Masked(4, 8, 3),
    Last(4, 8, 1),
    Attention(8, 2),
    Attention(8, 2, kdim=6, vdim=4),
    Attention(8, 2, kdim=8, vdim=4),  # weights of one size
    Recurrent(8, 6, num_layers=2, bidirectional=True),
    Scale(4, 5, 6),
    Up(4, 8, 3),
    Up(4, 8, 3, groups=2),
]


@pytest.mark.parametrize("layer", TAKE, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_layers_that_multiply_by_their_weight_are_pruned(layer: nn.Module, training: bool) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).train(training)
    before = copy.deepcopy(model.state_dict())
    masks = Masks.from_zeros(model)  # says nothing, and changes nothing
    matrices = [n for n, p in model.named_parameters() if p.dim() > 1]
    assert list(masks) == matrices
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert getattr(model[0], "calls", 0) == 0
    assert model[0].training == training


def test_a_model_of_nothing_else_is_refused_by_name() -> None:
    model = nn.Sequential(*(Standardised(4, 4, 3) for _ in range(5)))
    with pytest.raises(ValueError, match=r"`0.weight` \(Standardised\), .*, …\. If they do"):
        magnitude_prune(model, 0.5)
    every = tuple(str(number) for number in range(5))
    assert magnitude_prune(model, 0.5, include=every).sparsity == 0.5


class Through(nn.Linear):
    """Multiplies by what a function makes of its weight."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(6, 6)
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.function(self.weight), self.bias)


def test_each_layer_is_judged_by_what_it_does() -> None:
    functions = (torch.sigmoid, torch.relu, torch.cos, torch.tanh)
    model = nn.Sequential(*(Through(function) for function in functions))
    (message,) = warned(lambda: magnitude_prune(model, 0.5))
    assert re.findall("`(.*?)`", message)[:2] == ["0.weight", "2.weight"]
    assert list(Masks.from_zeros(model, skip=("0", "2"))) == ["1.weight", "3.weight"]


def test_a_forward_that_was_put_on_a_layer_is_not_trusted() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(4, 4))
    layer = model[0]
    layer.forward = lambda x: F.linear(x, layer.weight.exp())
    assert "`0.weight` (Linear, whose forward" in warned(lambda: magnitude_prune(model, 0.5))[0]


def test_accelerates_hooks_are_no_forward_of_their_own() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(4, 4))
    hooks.add_hook_to_module(model[0], hooks.ModelHook())
    assert list(magnitude_prune(model, 0.5)) == ["0.weight", "1.weight"]
