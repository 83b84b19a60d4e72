"""Many kinds of networks give the values of zeroed channels, or name the layers that are kept."""

import json
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.channels import assert_same_numbers, distinct, tensors_of
from torch import Tensor, nn
from torch.nn import functional as F

from drophot.structured import Pruned, prune_channels, rebuild


def numbers(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def pruned_as_zeros(model: nn.Module, x: Tensor, *others: Tensor, ratio: float = 0.5) -> Pruned:
    """Prune a network and compare it with zeroed channels, also for other inputs and rebuilt."""
    new = deepcopy(model)
    model = distinct(model)
    dense = deepcopy(model)
    pruned = prune_channels(model, ratio, x)
    assert_same_numbers(dense, model, x, *others)
    again = rebuild(new.double().eval(), json.loads(json.dumps(pruned.description)))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        for one, other in zip(tensors_of(again(x)), tensors_of(model(x)), strict=True):
            assert torch.equal(one, other)
    return pruned


class Numbered(nn.Module):
    """A width, and numbers that happen to be equal to it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.table = nn.Embedding(16, 4)
        self.width, self.number = 16, 16

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()).view(-1, self.width)
        if self.kind == "temperature":
            return self.head(h) / self.number
        if self.kind == "buckets":
            return self.head(h) + self.table(torch.arange(len(h)) * 5 % self.number)
        if self.kind == "crop":
            return self.head(h)[-self.number :]
        if self.kind == "power":
            return self.head(h).abs() ** (1 / self.number)
        return self.head(h) + torch.linspace(0, 1, self.number)[: len(h), None]


@pytest.mark.parametrize("kind", ["temperature", "buckets", "crop", "power", "steps"])
def test_a_number_that_equals_a_width_by_chance_stays(kind: str) -> None:
    model = Numbered(kind)
    pruned = pruned_as_zeros(model, numbers(3, 8), numbers(16, 8, seed=1))
    assert (model.width, model.number) == (8, 16)
    assert pruned.attributes["width"] == (16, 8)
    assert "number" not in pruned.attributes
    assert "width from 16 to 8" in str(pruned)


class Doubly(nn.Module):
    """One number for a width and for a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)
        self.width = 16

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).view(-1, self.width) / self.width).relu())


def test_a_width_that_is_a_scale_too_keeps_its_channels() -> None:
    model = Doubly()
    pruned = pruned_as_zeros(model, numbers(2, 8), numbers(5, 8))
    assert pruned.layers["a.weight"] == (16, 16)
    assert pruned.layers["b.weight"] == (12, 6)
    assert "reshape" in pruned.unpruned_layers["a.weight"]


class Kept(nn.Module):
    """A module that keeps its width in a given container."""

    def __init__(self, keep: Any, read: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16 * 16, 4)
        self.kept, self.read = keep, read

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        return self.head(x.view(len(x), int(self.read(self.kept)) * 16))


@pytest.mark.parametrize(
    ("keep", "read"),
    [
        (lambda: 16, lambda w: w),
        (lambda: (16, "x"), lambda w: w[0]),
        (lambda: [2, 16], lambda w: w[1]),
        (lambda: {"widths": [16]}, lambda w: w["widths"][0]),
        (lambda: SimpleNamespace(width=16), lambda w: w.width),
        (lambda: SimpleNamespace(inner={"width": 16}), lambda w: w.inner["width"]),
        (lambda: torch.Size([16]), lambda w: w[0]),
        (lambda: np.int64(16), lambda w: w),
    ],
)
def test_a_width_is_found_wherever_it_is_kept(keep: Any, read: Any) -> None:
    pruned = pruned_as_zeros(Kept(keep(), read), numbers(2, 3, 4, 4), numbers(3, 3, 4, 4))
    assert list(pruned.unpruned_layers) == ["head.weight"]
    assert any(change == (16, 8) for name, change in pruned.attributes.items() if "kept" in name)


class Attention(nn.Module):
    """Attention, written in several ways."""

    def __init__(self, scale: str = "default", heads: int = 4, cached: bool = False) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 32), nn.LayerNorm(32)
        self.qkv, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 3)
        self.scale, self.heads, self.inner = scale, heads, 32

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, self.inner // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.scale == "default":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.scale == "of the shape":
            y = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        else:
            y = (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v
        return self.head(x + self.out(y.transpose(1, 2).reshape(b, n, self.inner)))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("scale", ["default", "of the shape", "its own"])
def test_the_scale_of_attention_is_that_of_the_dense_network(scale: str, batch: int) -> None:
    model = Attention(scale)
    pruned = pruned_as_zeros(model, numbers(batch, 5, 6), numbers(2, 9, 6))
    assert pruned.layers["embed.weight"] == (32, 16)
    assert pruned.layers["qkv.weight"] == (96, 48) or "qkv.weight" in pruned.unpruned_layers


def test_heads_that_cannot_go_stay_as_wide_as_they_are() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 32, bias=False), nn.Linear(8, 32, bias=False)
            self.v, self.o = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            y = F.scaled_dot_product_attention(q, k, v)
            return self.o(y.transpose(1, 2).flatten(2))

    pruned = pruned_as_zeros(Fixed(), numbers(2, 9, 8), numbers(3, 7, 8))
    assert pruned.layers["v.weight"] == (32, 16)
    assert pruned.layers["q.weight"] == (32, 32)
    assert "0.5" in pruned.unpruned_layers["q.weight"]


@dataclass
class Output:
    logits: Tensor
    more: Any


class Returns(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        a = self.a(x).relu()
        return self.kind(logits=self.head(self.b(a).relu()), more=[{"a": a}])


@pytest.mark.parametrize("kind", [dict, Output, SimpleNamespace])
def test_outputs_keep_their_shape_in_whatever_object_they_are(kind: Any) -> None:
    model = Returns(kind)
    pruned = pruned_as_zeros(model, numbers(2, 8), numbers(5, 8))
    assert pruned.layers["a.weight"] == (16, 16)
    assert pruned.layers["b.weight"] == (12, 6)
    assert pruned.unpruned_layers["a.weight"] == "an output of the network"


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(weight, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(input, weight, self.bias, padding=self.padding)


class Op(nn.Module):
    """A module between two layers of an image network."""

    def __init__(self, op: Any, channels: int = 16, conv: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16, 3, padding=1), conv(channels, 12, 3, padding=1)
        self.head, self.op = nn.Linear(12, 4), op

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.op(self.a(x)).relu()).relu().mean((2, 3)))


def blur(x: Tensor) -> Tensor:
    kernel = torch.full((x.shape[1], 1, 3, 3), 1 / 9, dtype=x.dtype)
    return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


def shifted(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, 1:] = x[:, :, :-1]
    return out


def decided(x: Tensor) -> Tensor:
    mask = x.mean((1, 2, 3)) > 0
    return torch.cat([x[mask], x[~mask]])


OPS = {
    "instance norm": (nn.InstanceNorm2d(16), 16),
    "affine instance norm": (nn.InstanceNorm2d(16, affine=True), 16),
    "batch statistics": (nn.BatchNorm2d(16, track_running_stats=False), 16),
    "prelu": (nn.PReLU(16), 16),
    "normalize": (partial(F.normalize, dim=1), 16),
    "blur": (blur, 16),
    "shifted": (shifted, 16),
    "where": (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), 16),
    "decided": (decided, 16),
    "glu": (partial(F.glu, dim=1), 8),
    "pixel shuffle": (nn.PixelShuffle(2), 4),
    "depthwise upsampling": (nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16), 16),
    "cumsum": (lambda x: x.cumsum(2), 16),
    "every other": (lambda x: x[:, ::2] * x[:, 1::2], 8),
    "repeat": (lambda x: x.repeat(1, 1, 2, 1), 16),
    "unfold": (
        lambda x: (
            F.unfold(x, 2).view(len(x), x.shape[1], 4, -1).sum(2, keepdim=True).mean(3)[..., None]
        ),
        16,
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_operators_of_images_are_pruned(name: str) -> None:
    op, channels = OPS[name]
    pruned = pruned_as_zeros(Op(op, channels), numbers(2, 3, 8, 8), numbers(3, 3, 12, 12))
    assert list(pruned.unpruned_layers) == ["head.weight"]
    assert pruned.parameters.removed > 0.5


def test_standardised_weights_are_those_of_the_inputs_that_are_kept() -> None:
    model = Op(nn.Identity(), conv=Standardised).double().eval()
    prune_channels(model, 0.5, numbers(2, 3, 8, 8))
    assert model.b.weight.shape == (6, 8, 3, 3)
    alone = Standardised(8, 6, 3, padding=1).double()
    alone.load_state_dict(model.b.state_dict())
    x = numbers(2, 8, 5, 5)
    assert torch.equal(alone(x), model.b(x))


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **settings: Any) -> None:
        super().__init__()
        self.embed, self.mixes = nn.Linear(6, 16), kind(16, 12, batch_first=True, **settings)
        self.head = nn.Linear(12 * (1 + settings.get("bidirectional", False)), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixes(self.embed(x).relu())[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2}, {"bidirectional": True}])
def test_recurrent_layers_are_pruned(kind: Any, settings: dict) -> None:
    model = Recurrent(kind, **settings)
    pruned = pruned_as_zeros(model, numbers(2, 5, 6), numbers(3, 7, 6))
    assert list(pruned.unpruned_layers) == ["head.weight"]
    assert (model.mixes.input_size, model.mixes.hidden_size) == (8, 6)
    model(numbers(2, 5, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Table(nn.Module):
    """A buffer that is not saved, and a cache that the first call fills."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("rates", torch.linspace(0.1, 2, 16), persistent=False)
        self.cache = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = self.b.bias * 2
        return self.head((self.b(self.a(x).relu()) + self.cache) * self.rates)


def test_buffers_and_caches_are_those_of_a_fresh_process() -> None:
    model, x = Table(), numbers(3, 8)
    pruned = prune_channels(model.double(), 0.5, x)
    assert list(pruned.unpruned_layers) == ["head.weight"]
    assert model.cache is None
    again = rebuild(Table().double(), json.loads(json.dumps(pruned.description)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


class Constant(nn.Module):
    def __init__(self, mean: Any) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 16, 4)
        self.width, self.mean = 16 * 16, mean
        self.query, self.norm = nn.Parameter(torch.randn(1, 4)), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.as_tensor(self.mean, dtype=x.dtype).view(1, 3, 1, 1)
        x = self.head(self.a(x - mean).relu().view(-1, self.width))
        return x + self.norm(self.query.expand(len(x), -1))


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_tensors_as_attributes_and_parameters_as_inputs(kind: Any) -> None:
    model = Constant(kind([0.4, 0.5, 0.6]))
    pruned = pruned_as_zeros(model, numbers(2, 3, 4, 4), numbers(3, 3, 4, 4))
    assert pruned.layers["a.weight"] == (16, 8)


class InTraining(nn.Module):
    """A network of which a part runs in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aux, self.head = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.head(x) + self.aux(x) if self.training else self.head(x)


def test_what_runs_in_training_only_is_pruned_with_the_rest() -> None:
    model = InTraining()
    pruned = prune_channels(model, 0.5, torch.ones(2, 8))
    assert pruned.layers["a.weight"] == (16, 8)
    assert model.aux.weight.shape == (4, 8)
    model.train()(torch.ones(2, 8)).sum().backward()


class Raw(nn.Module):
    """Weights that belong to no known layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.w = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 16))
        self.mix, self.head = nn.Bilinear(16, 16, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu() @ self.w
        return self.head(self.mix(x, x))


def test_weights_of_no_known_layer_are_pruned_or_named() -> None:
    pruned = pruned_as_zeros(Raw(), numbers(2, 6), numbers(3, 6))
    assert pruned.layers["first.weight"] == (8, 4)
    assert "w" in pruned.layers
    assert pruned.layers["w"].after < 16 or "w" in pruned.unpruned_layers


class Fails(nn.Module):
    def __init__(self, error: BaseException, after: int) -> None:
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(4, 8), nn.Linear(8, 2), [0]
        self.error, self.after = error, after
        self.a.register_forward_hook(self._hook)

    def _hook(self, *_: Any) -> None:
        Fails.number += 1
        if Fails.number > self.after:
            raise self.error

    number = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), MemoryError("none"), RuntimeError("own")]
)
def test_errors_that_have_nothing_to_do_with_channels_are_raised(error: BaseException) -> None:
    model, Fails.number = Fails(error, 4), 0
    weight = model.a.weight
    with pytest.raises(type(error)) as raised:
        prune_channels(model, 0.5, torch.ones(2, 4))
    assert raised.value is error or isinstance(error, MemoryError)
    assert model.a.weight is weight
