"""Attention, recurrent networks and graphs are pruned right, or their layers are named."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers.channels import distinct, normal, pruned_by_law, tensors_of
from torch import Tensor, nn
from torch.nn import functional as F

from drophot.structured import prune_channels


@pytest.fixture(autouse=True)
def operator_by_operator() -> Iterator[None]:
    """The oracle replaces norms, which torch's fused encoder layer does not call."""
    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


class Around(nn.Module):
    """A module between two layers, for one sequence or two."""

    def __init__(self, inner: nn.Module, two: bool = False) -> None:
        super().__init__()
        self.a, self.inner, self.head = nn.Linear(6, 32), inner, nn.Linear(32, 3)
        self.other = nn.Linear(6, 32) if two else None

    def forward(self, x: Tensor) -> Tensor:
        own = self.a(x)
        y = self.inner(own) if self.other is None else self.inner(own, self.other(x))
        return self.head(y)


class Cross(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.mixes = nn.MultiheadAttention(32, 4, batch_first=True, **settings)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.mixes(x, y, y)[0]


def layer(kind: Any) -> nn.Module:
    return kind(32, 4, 64, batch_first=True, dropout=0.0)


TWO: dict[str, Callable[[], nn.Module]] = {
    "cross attention": Cross,
    "without biases": lambda: Cross(bias=False),
    "bias_kv": lambda: Cross(add_bias_kv=True),
    "zero_attn": lambda: Cross(add_zero_attn=True),
    "kdim and vdim": lambda: Cross(kdim=32, vdim=32),
    "decoder": lambda: nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 2),
    "transformer": lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True, dropout=0.0),
}


@pytest.mark.parametrize("name", TWO)
def test_attention_to_another_sequence(name: str) -> None:
    model = Around(TWO[name](), two=True)
    pruned = pruned_by_law(model, normal(2, 5, 6), normal(3, 7, 6, seed=1))
    assert list(pruned.unpruned_layers) == ["head.weight"]
    assert pruned.parameters.removed > 0.7


class Attention(nn.Module):
    """Attention with a function of queries and keys."""

    def __init__(self, kind: str, heads: int = 2) -> None:
        super().__init__()
        self.kind, self.heads, self.width = kind, heads, 32 // heads
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.part = {"partial rotary": 8}.get(kind, self.width)
        rates = 1 / 100 ** (torch.arange(0, self.part, 2).double() / self.part)
        self.rates: Tensor
        self.register_buffer("rates", rates)
        self.table = nn.Parameter(torch.randn(31, heads if kind == "bias" else self.width))
        self.mix = nn.Linear(heads, heads)
        self.scale = 1 / math.sqrt(self.width)

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * self.rates
        if self.kind == "complex rotary":
            turn = torch.polar(torch.ones_like(angles), angles)
            pairs = x.reshape(*x.shape[:-1], -1, 2).contiguous()
            return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(3)
        angles = torch.cat([angles, angles], -1)
        turned, rest = x[..., : self.part], x[..., self.part :]
        a, b = turned.chunk(2, -1)
        turned = turned * angles.cos() + torch.cat([-b, a], -1) * angles.sin()
        return torch.cat([turned, rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        n, m, _ = x.shape
        q, k, v = self.qkv(x).view(n, m, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        if "rotary" in self.kind:
            q, k = self.rotated(q), self.rotated(k)
        if self.kind == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.kind == "linear":
            q, k, v = q.relu(), k.relu(), F.pad(v, (0, 1), value=1.0)
            y = q @ (k.mT @ v)
            y = y[..., :-1] / (y[..., -1:] + 1)
        else:
            scores = q @ k.mT * self.scale
            far = (torch.arange(m)[:, None] - torch.arange(m)) + 15
            if self.kind == "bias":
                scores = scores + self.table[far].permute(2, 0, 1)
            if self.kind == "relative keys":
                scores = scores + torch.einsum("bhnd,nmd->bhnm", q, self.table[far])
            if self.kind == "mixed heads":
                scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y = scores.softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(n, m, self.heads * self.width))


KINDS = ["plain", "rotary", "partial rotary", "complex rotary", "cosine", "linear", "bias"]


@pytest.mark.parametrize("kind", [*KINDS, "relative keys", "mixed heads"])
def test_positions_and_norms_of_queries_and_keys(kind: str) -> None:
    model = Around(Attention(kind))
    pruned = pruned_by_law(model, normal(2, 5, 6), normal(3, 7, 6, seed=1))
    fixed = {"inner.mix.weight", "inner.table"}  # the number of heads, or not used
    assert set(pruned.unpruned_layers) <= {"head.weight", *fixed}
    assert pruned.layers["inner.qkv.weight"] == (96, 48)
    assert pruned.layers["a.weight"] == (32, 16)


class OverChannels(nn.Module):
    """Channels that attend to channels, as in XCiT and DaViT."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(32, 96), nn.Linear(32, 32), heads
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, m, c = x.shape
        qkv = self.qkv(x).reshape(n, m, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 4, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.scale
        return x + self.out((scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(n, m, c))


def test_attention_over_channels_is_that_of_a_smaller_network() -> None:
    model = distinct(Around(OverChannels()))
    pruned = prune_channels(model, 0.5, normal(2, 5, 6))
    assert list(pruned.unpruned_layers) == ["head.weight"]
    smaller = OverChannels().double()
    smaller.qkv, smaller.out = nn.Linear(16, 48).double(), nn.Linear(16, 16).double()
    smaller.load_state_dict(model.inner.state_dict())
    x = normal(3, 7, 16)
    assert torch.equal(smaller(x), model.inner(x))


class Cells(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.a, self.cell, self.head = nn.Linear(6, 12), kind(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for one in x.unbind(1):
            state = self.cell(self.a(one), state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class ByHand(nn.Module):
    """An LSTM made of two linear layers, with its first state made in a given way."""

    def __init__(self, state: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 64), nn.Linear(16, 64), nn.Linear(16, 3)
        self.state, self.size = state, 16

    def forward(self, x: Tensor) -> Tensor:
        h = c = self.state(self, x)
        for one in x.unbind(1):
            i, f, g, o = (self.a(one) + self.b(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


class Packed(nn.Module):
    def __init__(self, first: Callable[[Any, int], Any], **settings: Any) -> None:
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.mixes = nn.LSTM(12, 16, batch_first=True, **settings)
        self.head = nn.Linear(settings.get("proj_size", 16), 3)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        long = torch.tensor([x.shape[1]] * len(x))
        packed = nn.utils.rnn.pack_padded_sequence(self.a(x), long, batch_first=True)
        y, _ = self.mixes(packed, self.first(self, len(x)))
        return self.head(nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0][:, -1])


def zeros(s: Any, n: int) -> tuple[Tensor, Tensor]:
    h = torch.zeros(1, n, s.mixes.hidden_size, dtype=torch.float64)
    return h, h


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "LSTMCell": lambda: Cells(nn.LSTMCell),
    "GRUCell": lambda: Cells(nn.GRUCell),
    "RNNCell": lambda: Cells(nn.RNNCell),
    "by hand, new_zeros": lambda: ByHand(lambda s, x: x.new_zeros(len(x), s.size)),
    "by hand, zeros_like": lambda: ByHand(
        lambda s, x: torch.zeros_like(s.a(x[:, 0]).chunk(4, 1)[0])
    ),
    "packed": lambda: Packed(lambda s, n: None),
    "a first state": lambda: Packed(zeros),
    "projections": lambda: Packed(lambda s, n: None, proj_size=8),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_networks_in_the_ways_in_which_they_are_written(name: str) -> None:
    pruned = pruned_by_law(RECURRENT[name](), normal(2, 4, 6), normal(3, 6, 6, seed=1))
    assert list(pruned.unpruned_layers) == ["head.weight"]
    assert pruned.parameters.removed > 0.6


def test_a_recurrent_layer_that_cannot_get_narrower_is_named() -> None:
    def sixteen(s: Any, n: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, n, 16).double(), torch.zeros(1, n, 16).double()

    pruned = pruned_by_law(Packed(sixteen), normal(2, 4, 6), normal(3, 6, 6, seed=1))
    assert pruned.layers["a.weight"] == (12, 6)
    for name in ("mixes.weight_ih_l0", "mixes.weight_hh_l0"):
        assert pruned.layers[name] == (64, 64)
        assert "a new tensor" in pruned.unpruned_layers[name]


EDGES = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])


def by_index(x: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(0, EDGES[1], x[EDGES[0]])


def by_scatter(x: Tensor) -> Tensor:
    sent = x[EDGES[0]]
    out = x.new_zeros(x.shape).scatter_add_(0, EDGES[1][:, None].expand_as(sent), sent)
    return out / (1 + torch.bincount(EDGES[1], minlength=len(x))[:, None])


def by_matrix(x: Tensor) -> Tensor:
    ones = torch.ones(EDGES.shape[1], dtype=x.dtype)
    matrix = torch.sparse_coo_tensor(EDGES, ones, (len(x), len(x)), check_invariants=True)
    return torch.sparse.mm(matrix, x)


class Graph(nn.Module):
    def __init__(self, sends: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.sends = sends

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.sends(self.b(self.sends(self.a(x)).relu())).relu())


@pytest.mark.parametrize("sends", [by_index, by_scatter, by_matrix])
def test_graphs(sends: Callable[[Tensor], Tensor]) -> None:
    pruned = pruned_by_law(Graph(sends), normal(5, 6), normal(7, 6, seed=1))
    assert list(pruned.unpruned_layers) == ["head.weight"]


class Codes(nn.Module):
    """A lookup of the nearest vector, and a memory that is read by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.codes, self.head = nn.Linear(6, 16), nn.Embedding(20, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        nearest = self.codes(torch.cdist(x, self.codes.weight).argmin(-1))
        return self.head(x + nearest)


def test_the_nearest_code_is_found_with_the_channels_that_are_kept() -> None:
    model = distinct(Codes())
    pruned = prune_channels(model, 0.5, normal(4, 6))
    assert pruned.layers["a.weight"] == (16, 8)
    assert model.codes.weight.shape == (20, 8)
    x = normal(9, 6, seed=1)
    found = model.a(x)
    nearest = torch.stack([(model.codes.weight - one).norm(dim=1).argmin() for one in found])
    expected = model.head(found + model.codes.weight[nearest])
    torch.testing.assert_close(model(x), expected)


def test_a_fused_encoder_layer_gives_what_its_operators_give() -> None:
    inner = nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 2, enable_nested_tensor=False)
    model = Around(inner)
    pruned = pruned_by_law(model, normal(2, 5, 6), normal(3, 7, 6, seed=1))
    assert list(pruned.unpruned_layers) == ["head.weight"]
    fused = deepcopy(model).double().eval()
    prune_channels(fused, 0.5, normal(2, 5, 6))
    with torch.no_grad():
        slow = tensors_of(fused(normal(3, 7, 6)))[0]
        torch.backends.mha.set_fastpath_enabled(True)
        torch.testing.assert_close(fused(normal(3, 7, 6)), slow)
