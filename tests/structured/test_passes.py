"""The number of passes that pruning takes does not grow with the depth of the network."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drophot.structured import Pruned, prune_channels


class Residual(nn.Module):
    """A residual block whose code reads its inner width."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, inner), nn.Linear(inner, width)
        self.inner, self.parts, self.size = inner, 4, inner // 4
        self.sizes = [inner // 4] * 4

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.mix(self.a(x).relu()))

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Reshaped(Residual):
    def mix(self, x: Tensor) -> Tensor:
        return x.view(-1, self.inner)


class Unflattened(Residual):
    """torch raises an error for other sizes before an operator is called."""

    def mix(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.parts, self.size)).relu().flatten(1)


class Parts(Residual):
    def mix(self, x: Tensor) -> Tensor:
        return torch.cat(x.split(self.sizes, -1)[::-1], -1)


class Asserted(Residual):
    """The block's code raises an error for other widths."""

    def mix(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.inner:
            raise ValueError(f"{self.inner} channels are wanted")
        return x


class Literal(Residual):
    """A block that has to keep its channels."""

    def mix(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 8:
            raise ValueError("a multiple of eight is wanted")
        return x


class Otherwise(Residual):
    """A block that takes another branch for other widths."""

    def mix(self, x: Tensor) -> Tensor:
        return x if x.shape[-1] % 8 == 0 else x.sigmoid()


class Attention(Residual):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__(width, inner)
        self.qkv, self.heads, self.each = nn.Linear(width, 3 * width), 4, width // 4

    def forward(self, x: Tensor) -> Tensor:
        n, width = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.each)).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return super().forward(x + mixed.transpose(0, 1).reshape(n, width))

    def mix(self, x: Tensor) -> Tensor:
        return x.view(-1, self.inner)


def passes(block: Callable[[int, int], nn.Module], depth: int) -> tuple[int, Pruned]:
    """The number of passes for a stack of blocks."""
    torch.manual_seed(0)
    inner = [8 * (3 + 2 * (i % 4)) for i in range(depth)]
    model = nn.Sequential(nn.Linear(6, 16), *(block(16, n) for n in inner), nn.Linear(16, 3))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_pre_hook(count)
    pruned = prune_channels(model, 0.5, torch.randn(3, 6))
    return calls, pruned


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [Reshaped, Unflattened, Parts, Asserted, Literal, Otherwise, Attention]
)
def test_a_deeper_network_is_not_run_more_often(block: type[Residual]) -> None:
    shallow, _ = passes(block, 4)
    deep, pruned = passes(block, 12)
    assert deep <= shallow
    mended = {name for name, change in pruned.layers.items() if change.removed}
    if block not in (Literal, Otherwise):
        assert {f"{i}.{part}.weight" for i in range(1, 13) for part in "ab"} <= mended
    else:
        assert set(pruned.unpruned_layers) > {"1.a.weight", "12.a.weight"}
        assert "12.b.weight" in mended
