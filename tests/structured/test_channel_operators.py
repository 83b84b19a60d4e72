"""Operators on images between two layers: these are pruned right, or kept and named."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from helpers.channels import distinct, kept_by_value, normal, pruned_by_law, with_zeros
from torch import Tensor, nn
from torch.nn import functional as F

from drophot.structured import prune_channels


class Between(nn.Module):
    """A module between two layers."""

    def __init__(self, op: Any, channels: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(channels, 12, 3, padding=1)
        self.head, self.op = nn.Linear(12, 4), deepcopy(op)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.op(self.a(x)).relu()).relu().mean((2, 3)))


class With(nn.Module):
    """A function of a module and its input, with the attributes of the module."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **own: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def swapped(x: Tensor, sizes: Any) -> Tensor:
    a, b = x.split(sizes, 1)
    return torch.cat([b, a * 2], 1)


def shuffled(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)


def pool_and_back(x: Tensor) -> Tensor:
    return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)


def sampled(x: Tensor) -> Tensor:
    grid = F.affine_grid(
        torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3), [len(x), 1, 6, 6], False
    )
    return F.grid_sample(x, grid, align_corners=False)


def first(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.long)


def halves(s: Any, x: Tensor) -> Tensor:
    return x[:, : s.half] * x[:, s.half :]


def partly(s: Any, x: Tensor) -> Tensor:
    return torch.cat([x[:, : s.part].relu(), x[:, s.part :]], 1)


def decoder(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 192), *layers)


def decode(s: Any, x: Tensor) -> Tensor:
    return s.conv(s.norm(s.make(x.mean((2, 3))).view(-1, s.width, 4, 4)))


def turned_in_place(x: Tensor) -> Tensor:
    return x.sin().unsqueeze_(1).transpose_(1, -1).transpose_(-1, 2).squeeze_(2).swapaxes_(1, 3)


PRUNED: dict[str, Any] = {
    "views in place": turned_in_place,
    "vmap": lambda x: torch.vmap(lambda y: F.linear(y, torch.eye(y.shape[-1], dtype=y.dtype)))(
        x.mT
    ),
    "GroupNorm(C, C)": nn.GroupNorm(16, 16),
    "GroupNorm(C, C) without weights": nn.GroupNorm(16, 16, affine=False),
    "GroupNorm of whole groups": nn.GroupNorm(8, 16),
    "GroupNorm of wide groups": nn.GroupNorm(4, 16),
    "unequal split, a list": With(lambda s, x: swapped(x, s.sizes), sizes=[4, 12]),
    "unequal split, a tuple": With(lambda s, x: swapped(x, s.sizes), sizes=(4, 12)),
    "unequal split, numbers": With(lambda s, x: swapped(x, [s.p, s.q]), p=4, q=12),
    "unequal split, the rest": With(lambda s, x: swapped(x, [s.p, s.all - s.p]), p=4, all=16),
    "halves": (With(halves, half=8), 8),
    "unequal slices": With(partly, part=4),
    "ChannelShuffle": nn.ChannelShuffle(4),
    "a shuffle by view": shuffled,
    "PixelShuffle": (nn.PixelShuffle(2), 4),
    "PixelUnshuffle": (nn.PixelUnshuffle(2), 64),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 32),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), 32),
    "ConvTranspose, depthwise": nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16),
    "ConvTranspose, wide groups": nn.ConvTranspose2d(16, 16, 2, stride=2, groups=2),
    "ConvTranspose, narrow groups": (nn.ConvTranspose2d(16, 8, 2, stride=2, groups=8), 8),
    "padded channels": (lambda x: F.pad(x, (0, 0, 0, 0, 3, 5), value=0.5), 24),
    "max over space": lambda x: x.max(2, keepdim=True)[0],
    "logsumexp over space": lambda x: x.logsumexp(2, keepdim=True),
    "std_mean over space": lambda x: torch.std_mean(x, (2, 3), keepdim=True)[1],
    "sort over space": lambda x: x.gather(2, x.argsort(2)),
    "topk over space": lambda x: x.topk(4, 2)[0],
    "quantile over space": lambda x: x.flatten(2).quantile(0.5, dim=2)[..., None, None],
    "cumprod over space": lambda x: x.cumprod(2),
    "flip and roll": lambda x: x.flip(2).roll(1, 3),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "fft2": lambda x: torch.fft.ifft2(torch.fft.fft2(x) * 0.5).real,
    "rfft2": lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:]),
    "fold": lambda x: F.fold(F.unfold(x, 2, stride=2) * 2, x.shape[-2:], 2, stride=2),
    "Tensor.unfold": lambda x: x.unfold(2, 4, 2).mean(-1),
    "grid_sample": sampled,
    "max_unpool": pool_and_back,
    "interpolate": lambda x: F.interpolate(x, (5, 5), mode="bicubic"),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(2, first(x), x),
    "scatter_reduce": lambda x: x.scatter_reduce(2, first(x), x, "amax"),
    "index_add": lambda x: x.index_add(2, torch.arange(x.shape[2]).flip(0), x),
    "index_put": lambda x: x.index_put((torch.tensor([0]),), torch.tensor(1.0, dtype=x.dtype)),
    "index": lambda x: x[:, :, torch.arange(4)[:, None], torch.arange(4)],
    "cdist": lambda x: (
        x * torch.cdist(x.flatten(2).mT, x.flatten(2).mT).mean((1, 2), True)[..., None]
    ),
    "complex numbers": lambda x: (torch.complex(x, x) * 1j).abs(),
    "Unflatten": decoder(nn.Unflatten(1, (12, 4, 4)), nn.ReLU(), nn.ConvTranspose2d(12, 16, 3)),
    "view into channels": With(
        decode,
        width=12,
        make=nn.Linear(16, 192),
        norm=nn.Sequential(nn.BatchNorm2d(12), nn.Upsample(scale_factor=2)),
        conv=nn.Conv2d(12, 16, 3),
    ),
}


@pytest.mark.parametrize("name", PRUNED)
def test_what_keeps_channels_apart_is_pruned(name: str) -> None:
    op = PRUNED[name] if isinstance(PRUNED[name], tuple) else (PRUNED[name], 16)
    pruned = pruned_by_law(
        Between(*op), normal(2, 3, 8, 8), normal(3, 3, 8, 8), normal(3, 3, 12, 12, seed=1)
    )
    assert set(pruned.unpruned_layers) <= {"head.weight", "op.weight"}
    assert pruned.layers["a.weight"] == (16, 8)
    assert pruned.layers["b.weight"] == (12, 6)


def embedded(s: Any, x: Tensor) -> Tensor:
    return x + s.table(x.argmax(1)).permute(0, 3, 1, 2)


def channel_attention(s: Any, x: Tensor) -> Tensor:
    return x * s.conv(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]


class Standardised(nn.Conv2d):
    """Weights that are computed from the parameter, as in NF-RegNet."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(weight, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, groups=self.groups)


@pytest.mark.parametrize("groups", [2, 8])
def test_standardised_weights_in_groups_are_those_of_a_smaller_layer(groups: int) -> None:
    model = Between(Standardised(16, 16, 3, padding=1, groups=groups)).double().eval()
    pruned = prune_channels(model, 0.5, normal(2, 3, 8, 8))
    assert list(pruned.unpruned_layers) == ["head.weight"]
    left = 2 if groups == 2 else 4
    alone = Standardised(8, 8, 3, padding=1, groups=left).double()
    alone.load_state_dict(model.op.state_dict())
    assert model.op.groups == left
    assert torch.equal(alone(normal(2, 8, 5, 5)), model.op(normal(2, 8, 5, 5)))


LEFT: dict[str, tuple[str, Any]] = {
    "split by constants": ("a split", lambda x: swapped(x, [4, 12])),
    "halves by constants": ("indexing", (lambda x: x[:, :8] * x[:, 8:], 8)),
    "view by constants": (
        "a reshape",
        decoder(With(lambda s, x: x.view(-1, 12, 4, 4)), nn.Conv2d(12, 16, 3)),
    ),
    "cumsum": ("cumsum", lambda x: x.cumsum(1)),
    "flip": ("flip", lambda x: x.flip(1)),
    "roll": ("roll", lambda x: x.roll(1, 1)),
    "fft": ("a Fourier transform", lambda x: torch.fft.fft(x, dim=1).real),
    "an index": ("indexing", (lambda x: x[:, torch.tensor([0, 2, 1, 1])], 4)),
    "argmax as an index": ("argmax", With(embedded, table=nn.Embedding(16, 16))),
    "max as an index": (
        "max",
        With(lambda s, x: x + x.max(1, keepdim=True)[1]),
    ),
    "a convolution over channels": (
        "a convolution",
        With(channel_attention, conv=nn.Conv1d(1, 1, 3, padding=1, bias=False)),
    ),
    "a vector of numbers": (
        "a product",
        lambda x: x * torch.linspace(0, 1, 16, dtype=x.dtype)[:, None, None],
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_mixes_channels_or_counts_them_keeps_them_and_is_named(name: str) -> None:
    word, op = LEFT[name]
    op = op if isinstance(op, tuple) else (op, 16)
    pruned = pruned_by_law(Between(*op), normal(2, 3, 8, 8), normal(3, 3, 12, 12, seed=1))
    assert pruned.layers["b.weight"] == (12, 6)
    left = [key for key in pruned.unpruned_layers if key != "head.weight"]
    assert left
    assert any(word in pruned.unpruned_layers[key] for key in left)
    layers = [key for key in left if not key.endswith("table.weight")]  # an embedding is none
    assert all(pruned.layers[key].removed == 0 for key in layers)


OVER: dict[str, Any] = {
    "softmax": partial(torch.softmax, dim=1),
    "log_softmax": partial(torch.log_softmax, dim=1),
    "max": lambda x: x * x.max(1, keepdim=True)[0].sigmoid(),
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "mean": lambda x: x * x.mean(1, keepdim=True),
    "std_mean": lambda x: x - torch.std_mean(x, 1, keepdim=True)[0],
    "aminmax": lambda x: x + x.aminmax(dim=1, keepdim=True)[0],
}


@pytest.mark.parametrize("name", OVER)
def test_what_is_taken_over_channels_is_taken_over_those_that_are_kept(name: str) -> None:
    model = distinct(Between(OVER[name]))
    dense = deepcopy(model)
    pruned = prune_channels(model, 0.5, normal(2, 3, 8, 8))
    assert list(pruned.unpruned_layers) == ["head.weight"]
    zeros: Any = with_zeros(dense, model)
    kept = kept_by_value(dense.a.bias.detach(), model.a.bias.detach())

    def over(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, kept] = OVER[name](x[:, kept])
        return out

    zeros.op = over
    x = normal(3, 3, 12, 12, seed=1)
    torch.testing.assert_close(model(x), zeros(x), rtol=1e-8, atol=1e-10)


class Noisy(nn.Module):
    """A custom operator."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.drophot_tests.reversed_sum(x, self.dim)


@torch.library.custom_op("drophot_tests::reversed_sum", mutates_args=())
def reversed_sum(x: Tensor, dim: int) -> Tensor:
    return x.flip(dim).cumsum(dim)


@pytest.mark.parametrize(("dim", "left"), [(2, 8), (3, 8), (1, 16)])
def test_an_operator_that_nobody_knows_is_tried(dim: int, left: int) -> None:
    pruned = pruned_by_law(Between(Noisy(dim)), normal(2, 3, 8, 8), normal(3, 3, 9, 7, seed=1))
    assert pruned.layers["a.weight"] == (16, left)
    assert ("a.weight" in pruned.unpruned_layers) == (left == 16)
    if left == 16:
        assert "`reversed_sum` in `op`" in pruned.unpruned_layers["a.weight"]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_it_is_tried_with_values_of_its_own(value: float) -> None:
    """If all inputs are equal, an operator that mixes channels looks like one that does not."""
    model = Between(Noisy(1))
    nn.init.constant_(model.a.weight, 0)
    nn.init.constant_(model.a.bias, value)
    pruned = prune_channels(model, 0.5, torch.zeros(2, 3, 8, 8))
    assert "reversed_sum" in pruned.unpruned_layers["a.weight"]
