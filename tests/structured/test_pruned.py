"""The result of structured pruning, its errors, and the attributes that parameters keep."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from drophot.structured import prune_channels, rebuild
from drophot.structured.rewriter import Rewriter


def net(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), middle, nn.Linear(16, 12), nn.Linear(12, 3))


X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values


class Literal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 16)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-1] == 16 else x.sigmoid()


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.shape[-1]


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 16:
            raise KeyError("16")
        return x


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (Sorted(), "`sort` in `1`"),
        (Literal(), "a reshape in `1` has a fixed size"),
        (Scaled(), "a quotient in `1`.*16"),
        (Raises(), "the code of .*KeyError"),
        (Halved(), "the code of .*`sigmoid`"),
    ],
)
def test_a_reason_names_a_module_and_what_is_done_there(middle: nn.Module, reason: str) -> None:
    pruned = prune_channels(net(middle), 0.5, X)
    assert pruned.layers["0.weight"] == (16, 16)
    assert pruned.layers["2.weight"] == (12, 6)
    assert re.search(reason, pruned.unpruned_layers["0.weight"]), pruned.unpruned_layers
    assert pruned.not_removed[pruned.unpruned_layers["0.weight"]] == 8
    assert re.search(f"not removed: 10 of 16 requested channels:\n *8  {reason}", str(pruned))


def test_what_was_kept_back_adds_up() -> None:
    pruned = prune_channels(net(Literal()), 0.5, X)
    assert pruned.num_requested == 8 + 6 + 2
    removed = pruned.channels.before - pruned.channels.after
    assert sum(pruned.not_removed.values()) == pruned.num_requested - removed


def test_the_result_is_short_however_deep_the_network_is() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.a(x).view(-1, 16))

    model = nn.Sequential(nn.Linear(6, 16), *(Block() for _ in range(30)), nn.Linear(16, 3))
    pruned = prune_channels(model, 0.5, X)
    assert len(pruned.unpruned_layers) == 31
    lines = str(pruned).splitlines()
    assert "       240  a reshape in `1`, `2` and 28 more has a fixed size" in lines
    assert len(lines) < 12


def test_an_output_is_said_to_be_one_also_where_its_weight_is_an_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a = nn.Embedding(20, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(self.embed(x)).relu())

    pruned = prune_channels(Tied(), 0.5, torch.arange(6)[None])
    assert pruned.unpruned_layers == {"head.weight": "an output of the network"}


def test_parameters_of_an_unknown_kind_are_named_with_their_share() -> None:
    class Filter(nn.Module):
        """Weights that belong to no layer of torch, used in an unknown way."""

        def __init__(self) -> None:
            super().__init__()
            self.taps = nn.Parameter(torch.randn(40, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.linalg.qr(self.taps)[1].abs().sum()

    model = net(Filter())
    total = sum(parameter.numel() for parameter in model.parameters())
    pruned = prune_channels(model, 0.5, X)
    assert pruned.unpruned_parameters == {"1.taps": 640 / total}
    assert f"not pruned: 1.taps ({640 / total:.1%} of the parameters)" in str(pruned)


class Grows(nn.Module):
    def __init__(self, error: Exception, at: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        self.error, self.at = error, at

    def forward(self, x: Tensor) -> Tensor:
        if self.a.out_features <= self.at:
            raise self.error
        return self.b(self.a(x))


class OwnError(RuntimeError):
    pass


@pytest.mark.parametrize("at", [8, 16])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError("none left"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: 1"),
    ],
)
def test_memory_that_runs_out_is_raised_as_it_is(error: Exception, at: int) -> None:
    model = Grows(error, at)
    weight = model.a.weight
    with pytest.raises(type(error)) as found:
        prune_channels(model, 0.5, X)
    assert found.value is error
    assert model.a.weight is weight


@pytest.mark.parametrize("error", [OwnError("mine"), KeyError("mine"), NotImplementedError("no")])
def test_an_error_of_the_networks_own_is_raised_as_it_is(error: Exception) -> None:
    model = Grows(error, 16)
    with pytest.raises(type(error)) as found:
        prune_channels(model, 0.5, X)
    assert found.value is error


def test_an_error_of_drophots_own_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(nn.ReLU())
    weight = model[0].weight

    def breaks(*_: object, **__: object) -> None:
        raise KeyError("inside")

    monkeypatch.setattr(Rewriter, "kept_channels", breaks)
    with pytest.raises(RuntimeError, match="bug in drophot.*`skip="):
        prune_channels(model, 0.5, X)
    assert model[0].weight is weight


def test_hooks_and_attributes_of_parameters_stay() -> None:
    model = net(nn.ReLU())
    kept, calls = model[0].weight, []
    kept.no_decay = True
    kept.register_hook(lambda grad: grad * 0)
    model[2].weight.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.shape)))
    model[2].bias.requires_grad_(False)
    pruned = prune_channels(model, 0.5, X)
    other = net(nn.ReLU())
    other[0].weight.no_decay = True
    for one in (model, rebuild(other, pruned.description)):
        assert one[0].weight.no_decay
    model(X).sum().backward()
    assert model[0].weight is not kept
    assert not model[0].weight.grad.any()
    assert model[0].bias.grad.any()
    assert calls == [(6, 8)]
    assert model[2].bias.grad is None


def test_memory_formats_of_volumes_stay() -> None:
    model = nn.Sequential(nn.Conv3d(3, 8, 3), nn.Conv3d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 8, 2))
    model = model.to(memory_format=torch.channels_last_3d)
    prune_channels(model, 0.5, torch.randn(1, 3, 6, 6, 6))
    assert model[1].weight.shape[:2] == (4, 4)
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 16, affine=False), nn.InstanceNorm2d(16)])
def test_norms_without_weights_say_how_many_channels_they_have(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.ReLU(), nn.Conv2d(16, 4, 3))
    prune_channels(model, 0.5, torch.randn(2, 3, 9, 9))
    assert getattr(norm, "num_channels", getattr(norm, "num_features", None)) == 8


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("width", "heads"), [(24, 3), (32, 4), (36, 6)])
def test_what_goes_does_not_depend_on_the_batch(batch: int, width: int, heads: int) -> None:
    vit = pytest.importorskip("timm").models.VisionTransformer
    torch.manual_seed(0)
    model = vit(img_size=16, patch_size=8, embed_dim=width, depth=2, num_heads=heads, reg_tokens=4)
    pruned = prune_channels(model, 0.5, torch.randn(batch, 3, 16, 16))
    assert list(pruned.unpruned_layers) == ["head.weight"]
    left = heads - int(heads / 2 + 0.5)
    assert model.blocks[0].attn.qkv.out_features == 3 * left * (width // heads)
    assert model.embed_dim == width


class Scales(nn.Module):
    """A module with a width and a buffer that is read but not called, as for positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("scales", torch.linspace(1, 2, width), persistent=False)

    def get(self) -> Tensor:
        assert len(self.scales) == self.width
        return self.scales.mul(2)


class Fixed(Scales):
    def get(self) -> Tensor:
        assert len(self.scales) == 16
        return self.scales.mul(2)


class Stream(nn.Module):
    def __init__(self, kind: type[Scales]) -> None:
        super().__init__()
        self.first, self.stream = nn.Linear(4, 24), nn.Linear(24, 24)
        self.into, self.scales, self.out = nn.Linear(24, 16), kind(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x + self.stream(x)
        scales = self.scales.get()
        return self.out(self.into(x) * scales)


def test_a_width_in_a_module_that_is_used_without_being_called() -> None:
    torch.manual_seed(0)
    model = Stream(Scales)
    pruned = prune_channels(model, 0.5, torch.randn(2, 4))
    assert model.scales.width == 8
    assert pruned.unpruned_layers.keys() == {"out.weight"}


def test_code_that_fails_keeps_what_it_was_about_to_use_and_no_more() -> None:
    torch.manual_seed(0)
    model = Stream(Fixed)
    pruned = prune_channels(model, 0.5, torch.randn(2, 4))
    assert "AssertionError" in pruned.unpruned_layers["into.weight"]
    assert pruned.unpruned_layers.keys() == {"into.weight", "out.weight"}


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.orthogonal(layer),
        lambda layer: l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "orthogonal", "mask"],
)
def test_weights_that_something_else_computes_can_be_skipped(
    change: Callable[[nn.Module], object],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(4))).eval()
    change(model[1])
    x = torch.randn(2, 12)
    with pytest.raises(ValueError, match=r"skip=\('1',\)"):
        prune_channels(model, 0.5, x)
    model(x)
    pruned = prune_channels(model, 0.5, x, skip=["1"])
    assert model[1].weight.shape == (12, 12)
    assert (pruned.layers["2.weight"].after, pruned.layers["0.weight"].after) == (6, 12)
