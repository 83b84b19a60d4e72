"""Channels removed to a budget, in one ranking of all layers."""

import pickle
import re
from collections.abc import Sequence
from copy import deepcopy
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from helpers.channels import assert_same_numbers, distinct, normal
from torch import Tensor, nn
from torch.nn import functional as F

from drophot.prune import summary
from drophot.structured import Budget, Pruned, plan_channels, prune_channels
from drophot.structured.budget_selection import BudgetSelection
from drophot.structured.network_cost import NetworkCost


class Residual(nn.Module):
    """Two convolutions that add to a stream, then a classifier."""

    def __init__(self, stream: int = 16, inner: int = 24, grouped: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, stream, 3, padding=1), nn.BatchNorm2d(stream), nn.ReLU()
        )
        self.block = nn.Sequential(
            nn.Conv2d(stream, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, stream, 1)
        )
        self.grouped = nn.Conv2d(stream, grouped, 3, groups=2)
        self.head = nn.Linear(grouped, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.grouped(x + self.block(x)).relu().mean((2, 3)))


class Attention(nn.Module):
    """Four heads of eight channels, and a residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.out = nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.35)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(x + self.mlp(x))


IMAGES, TOKENS = normal(2, 3, 6, 6), normal(2, 5, 6)


def pruned_to(model: nn.Module, inputs: Any, **budget: Any) -> tuple[nn.Module, Pruned]:
    """A copy of a network, pruned to a budget and checked, and the result."""
    dense, model = deepcopy(model), deepcopy(model)
    pruned = prune_channels(model, example_inputs=inputs, to=Budget(**budget))
    assert_same_numbers(dense, model, inputs)
    return model, pruned


def cost(pruned: Pruned, what: str) -> int:
    return getattr(pruned, what).after


@pytest.mark.parametrize("what", ["parameters", "flops", "bytes"])
@pytest.mark.parametrize("share", [0.7, 0.3])
def test_within_one_channel_of_the_limit(what: str, share: float) -> None:
    dense = distinct(Residual())
    limit = int(share * getattr(summary(dense, IMAGES, batch_sizes=()), what))
    model, pruned = pruned_to(dense, IMAGES, **{what: limit})
    found = summary(model, IMAGES, batch_sizes=())
    assert getattr(found, what) == cost(pruned, what) <= limit
    # No layer could keep one more channel; the two groups of a convolution keep equally many.
    stream, inner, grouped = (
        pruned.layers[f"{name}.weight"].after for name in ("stem.0", "block.0", "grouped")
    )
    larger = [(stream + 2, inner, grouped), (stream, inner + 1, grouped)]
    larger += [(stream, inner, grouped + 2)]
    for widths in larger:
        if max(widths[0], widths[2]) > 16 or widths[1] > 24:
            continue  # this layer has all of its channels
        more = summary(Residual(*widths).double(), IMAGES, batch_sizes=())
        assert getattr(more, what) > limit


class Encoder(nn.Module):
    """Attention whose scale and stream follow from the number of heads."""

    def __init__(self, width: int = 32, heads: int = 4, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.mlp(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("whole_heads", [False, True])
def test_a_stream_and_its_heads_lose_equal_shares(whole_heads: bool) -> None:
    model, pruned = pruned_to(distinct(Encoder()), TOKENS, parameters=3000, whole_heads=whole_heads)
    assert 2900 < pruned.parameters.after <= 3000  # the MLP takes what a head leaves
    attention = model.get_submodule("attention")
    assert isinstance(attention, nn.MultiheadAttention)
    assert attention.embed_dim == 8 * attention.num_heads < 32


def test_layers_of_equal_size_are_not_tied() -> None:
    """Only the stream is tied to the heads, not the hidden layer, which is as wide."""
    dense = distinct(Encoder(32, 4, 32))
    limit = 3000
    _, pruned = pruned_to(dense, TOKENS, parameters=limit)
    width, hidden = (pruned.layers[f"{name}.weight"].after for name in ("embed", "mlp.0"))
    assert width < 32
    assert hidden < 32
    assert pruned.parameters.after == size(Encoder(width, 4, hidden)) <= limit
    assert size(Encoder(width, 4, hidden + 1)) > limit


class StoredHeads(nn.Module):
    """Attention whose heads have a stored width, and a stream of the same size as all heads."""

    def __init__(self, stream: int = 32, heads: int = 32, last: int = 32) -> None:
        super().__init__()
        self.each = heads // 4
        self.embed = nn.Linear(6, stream)
        self.q, self.k, self.v = (nn.Linear(stream, heads) for _ in range(3))
        self.out = nn.Linear(heads, stream)
        self.head = nn.Sequential(nn.Linear(stream, last), nn.ReLU(), nn.Linear(last, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, self.each).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.35)
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("limit", [1500, 3000])
def test_heads_with_one_stored_width_are_tied_to_each_other_alone(limit: int) -> None:
    model, pruned = pruned_to(distinct(StoredHeads()), TOKENS, parameters=limit)
    stream, queries, values, last = (
        pruned.layers[f"{name}.weight"].after for name in ("embed", "q", "v", "head.0")
    )
    assert 4 * getattr(model, "each") == queries == values < 32  # noqa: B009 (its type is unknown)
    assert size(StoredHeads(stream, queries, last)) == pruned.parameters.after <= limit
    larger = [(stream + 1, queries, last), (stream, queries + 4, last), (stream, queries, last + 1)]
    for widths in larger:
        assert max(widths) > 32 or size(StoredHeads(*widths)) > limit


class Concatenated(nn.Module):
    """A convolution with two groups, each of which reads two of four parts."""

    def __init__(self, widths: Sequence[int] = (8, 8, 8, 8)) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(3, width, 1) for width in widths)
        self.grouped = nn.Conv2d(sum(widths), 8, 1, groups=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(torch.cat([part(x) for part in self.parts], 1)).relu())


def test_parts_of_one_group_are_not_tied() -> None:
    dense = distinct(Concatenated())
    grouped = dense.get_submodule("grouped")
    assert isinstance(grouped, nn.Conv2d)
    grouped.weight.data[:, 8:] *= 30  # the second part of each group
    limit = 150
    _, pruned = pruned_to(dense, IMAGES, parameters=limit)
    first, second, third, fourth = (
        pruned.layers[f"parts.{part}.weight"].after for part in range(4)
    )
    assert first + second == third + fourth
    assert len({first, second}) == 2
    kept = pruned.layers["grouped.weight"].after
    for more in ((1, 0), (0, 1)):
        widths = [first + more[0], second + more[1], third + more[0], fourth + more[1]]
        model = Concatenated(widths)
        model.grouped = nn.Conv2d(sum(widths), kept, 1, groups=2)
        model.head = nn.Conv2d(kept, 2, 1)
        assert max(widths) > 8 or size(model) > limit


@pytest.mark.parametrize("share", [0.6, 0.45])
def test_heads_of_every_layer_and_nothing_else_are_removed_with_the_stream(share: float) -> None:
    """Neither is the hidden layer tied, which is as wide as a batch of two streams."""
    models = pytest.importorskip("torchvision.models")
    dense = distinct(models.VisionTransformer(16, 8, 2, 4, 32, 64, num_classes=5))
    limit = int(share * size(dense))
    _, pruned = pruned_to(dense, normal(2, 3, 16, 16), parameters=limit)
    layers = "encoder.layers.encoder_layer_"
    stream, *hidden = (
        pruned.layers[f"{name}.weight"].after
        for name in ("conv_proj", f"{layers}0.mlp.0", f"{layers}1.mlp.0")
    )
    assert stream % 8 == 0
    assert stream < 32

    def parameters(stream: int, *hidden: int) -> int:
        outside = size(models.VisionTransformer(16, 8, 0, 1, stream, 1, num_classes=5))
        attention = 4 * stream * (stream + 1) + 4 * stream  # with two norms
        return outside + sum(attention + n * (2 * stream + 1) + stream for n in hidden)

    assert parameters(stream, *hidden) == pruned.parameters.after <= limit
    for larger in ((stream + 8, *hidden), (stream, hidden[0] + 1, hidden[1])):
        assert max(larger) > 64 or parameters(*larger) > limit


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_sensitivity_is_measured_again_if_a_set_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is ranked alone at first, and then together with the heads."""
    torch.manual_seed(6)  # with which it makes a difference
    dense = distinct(Encoder(24, 12, 32))
    _, found = pruned_to(dense, TOKENS, parameters=2000)
    usual = BudgetSelection._change

    def without_memory(self: Any, *arguments: Any) -> float:
        self._changes.clear()
        return usual(self, *arguments)

    monkeypatch.setattr(BudgetSelection, "_change", without_memory)
    _, expected = pruned_to(dense, TOKENS, parameters=2000)
    assert found.layers == expected.layers


def test_all_limits_hold() -> None:
    dense = distinct(Residual())
    _, pruned = pruned_to(dense, IMAGES, parameters=4000, flops=300_000, bytes=25_000)
    assert pruned.parameters.after <= 4000
    assert pruned.flops.after <= 300_000
    assert pruned.bytes.after <= 25_000


def test_a_network_that_fits_is_unchanged() -> None:
    model, pruned = pruned_to(distinct(Residual()), IMAGES, parameters=10**6)
    assert pruned.channels.removed == 0
    assert model.stem[0].out_channels == 16


@pytest.mark.parametrize("min_kept", [0.0, 0.5])
def test_each_layer_keeps_a_minimum(min_kept: float) -> None:
    dense = distinct(Residual())
    with pytest.raises(ValueError, match=r"`to`.*parameters=1\b.*output of the network") as error:
        prune_channels(dense, example_inputs=IMAGES, to=Budget(parameters=1, min_kept=min_kept))
    found = re.search(r"([\d,]+) parameters", str(error.value))
    assert found is not None
    least = int(found[1].replace(",", ""))
    _, pruned = pruned_to(dense, IMAGES, parameters=least, min_kept=min_kept)
    for name, change in pruned.layers.items():
        if name != "head.weight":
            rows = 1 if "block.0" in name else 2  # the groups of the convolution split the stream
            assert change.after == rows * max(1, ceil(min_kept * change.before / rows))


def test_multiples() -> None:
    _, pruned = pruned_to(distinct(Attention()), TOKENS, parameters=4000, round_to=8)
    assert pruned.parameters.after <= 4000
    assert pruned.channels.removed > 0.2
    for name, change in pruned.layers.items():
        assert change.after % 8 == 0 or name == "head.weight"


def test_whole_heads() -> None:
    dense = distinct(Attention())
    _, pruned = pruned_to(dense, TOKENS, parameters=4000)
    assert pruned.layers["q.weight"].after % 4 == 0  # as many channels in each head
    _, pruned = pruned_to(dense, TOKENS, parameters=4000, whole_heads=True)
    assert pruned.layers["q.weight"].after < 32
    for name in ("q", "k", "v"):
        heads = torch.zeros(32).index_fill_(0, pruned.kept_channels[f"{name}.weight"], 1)
        assert heads.view(4, 8).std(1).eq(0).all()
    assert torch.equal(pruned.kept_channels["q.weight"], pruned.kept_channels["v.weight"])


def chain(scale: float) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 20, bias=False), nn.ReLU(), nn.Linear(20, 12, bias=False), nn.ReLU(),
        nn.Linear(12, 3, bias=False),
    ).double()  # fmt: skip
    model[2].weight.data.mul_(scale)
    return model


def test_ranking_does_not_depend_on_the_scale_of_a_layer() -> None:
    inputs = normal(4, 6)
    _, one = pruned_to(chain(1), inputs, parameters=200)
    _, other = pruned_to(chain(64), inputs, parameters=200)
    assert one.layers["0.weight"].after < 20 > one.layers["2.weight"].after
    for name, kept in one.kept_channels.items():
        assert torch.equal(kept, other.kept_channels[name])


class Branches(nn.Module):
    """Two equal branches, of which the first may hardly change the output."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        torch.manual_seed(0)
        self.faint = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 3))
        self.strong = deepcopy(self.faint)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.faint(x) + self.strong(x)


def test_insensitive_layers_lose_more() -> None:
    model = Branches(0.1).double()
    pruned = prune_channels(model, example_inputs=normal(4, 6), to=Budget(parameters=400))
    assert pruned.layers["faint.0.weight"].after <= 12
    assert pruned.layers["strong.0.weight"].after >= 27


def test_an_output_of_another_shape_has_changed() -> None:
    class Filtered(Branches):
        def forward(self, x: Tensor) -> Any:
            found = self.strong(x)
            return found[found[:, 0] > found[:, 1]], self.faint(x) * self.factor

    model = Filtered(0.01).double()
    pruned = prune_channels(model, example_inputs=normal(40, 6), to=Budget(parameters=400))
    assert pruned.layers["faint.0.weight"].after <= 12
    assert pruned.layers["strong.0.weight"].after >= 27


def test_equal_channels_are_removed_from_all_layers() -> None:
    def equal(name: str, weight: Tensor) -> Tensor:
        return torch.ones(len(weight))

    model = Branches(1.0).double()
    pruned = prune_channels(
        model, example_inputs=normal(4, 6), to=Budget(parameters=400), importance=equal
    )
    assert sorted(pruned.layers[f"{name}.0.weight"].after for name in ("faint", "strong")) == [
        19,
        20,
    ]


def test_own_importance_orders_each_layer() -> None:
    model = chain(1)

    def by_index(name: str, weight: Tensor) -> Tensor:
        return torch.arange(1.0, len(weight) + 1)

    pruned = prune_channels(
        model, example_inputs=normal(4, 6), to=Budget(parameters=150), importance=by_index
    )
    for name in ("0.weight", "2.weight"):
        before, after = pruned.layers[name]
        assert pruned.kept_channels[name].tolist() == list(range(before - after, before))


def milliseconds(model: nn.Module, inputs: Any) -> float:
    return 1 + sum(p.numel() for p in model.parameters()) / 1000


def test_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drophot.structured.pruning_run.latency", milliseconds)
    dense = distinct(Residual())
    size = sum(p.numel() for p in dense.parameters())
    model, pruned = pruned_to(dense, IMAGES, latency=3.0)
    assert pruned.latency == (1 + size / 1000, milliseconds(model, IMAGES))
    assert 2.6 < pruned.latency[1] <= 3.0
    assert "at most 3 ms" in str(pruned)
    with pytest.raises(ValueError, match=r"`to`.*latency=0.5.* ms"):
        prune_channels(dense, example_inputs=IMAGES, to=Budget(latency=0.5))
    assert sum(p.numel() for p in dense.parameters()) == size
    # It is met already once another limit holds.
    _, both = pruned_to(dense, IMAGES, latency=3.0, parameters=1500)
    _, alone = pruned_to(dense, IMAGES, parameters=1500)
    assert both.layers == alone.layers


def test_latency_is_measured_once_more_for_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []

    def lucky(model: nn.Module, inputs: Any) -> float:
        size = milliseconds(model, inputs)
        measured.append(size if size not in measured else size + 0.25)  # the first time is lucky
        return measured[-1]

    monkeypatch.setattr("drophot.structured.pruning_run.latency", lucky)
    model, pruned = pruned_to(distinct(Residual()), IMAGES, latency=3.0)
    assert pruned.latency is not None
    assert pruned.latency[1] == measured[-1] <= 3.0
    assert milliseconds(model, IMAGES) <= measured[-1]
    assert "at most 3 ms" in str(pruned)

    def slower(model: nn.Module, inputs: Any) -> float:
        measured.append(1.0)
        return 5.0 if len(measured) < 3 or len(measured) > 9 else 1.0  # the first ones are lucky

    measured.clear()
    monkeypatch.setattr("drophot.structured.pruning_run.latency", slower)
    with pytest.raises(ValueError, match=r"`to`.*latency=3.*5 ms"):
        prune_channels(chain(1), example_inputs=normal(1, 6), to=Budget(latency=3))


def test_measured_latency() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    pruned = prune_channels(model, example_inputs=torch.ones(2, 8), to=Budget(latency=1e6))
    assert pruned.latency is not None
    assert min(pruned.latency) > 0
    assert pruned.channels.removed == 0


def test_flops_of_an_unknown_operator() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.linalg.inv(torch.eye(4, dtype=x.dtype) + x.mean())

    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), Inverse())
    with pytest.raises(ValueError, match=r"`to`.*linalg.*flops=50"):
        prune_channels(model, example_inputs=torch.ones(1, 3), to=Budget(flops=50))
    assert model[0].out_features == 8


def test_flops_that_cost_more_than_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted = NetworkCost.flops
    monkeypatch.setattr(NetworkCost, "flops", lambda self, removed: predicted(self, removed) // 2)
    _, pruned = pruned_to(distinct(Residual()), IMAGES, flops=300_000)
    assert 200_000 < pruned.flops.after <= 300_000


def test_latency_is_that_of_the_result_if_flops_need_another_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("drophot.structured.pruning_run.latency", milliseconds)
    predicted = NetworkCost.flops
    monkeypatch.setattr(NetworkCost, "flops", lambda self, removed: predicted(self, removed) // 2)
    dense = distinct(Residual())
    model, pruned = pruned_to(dense, IMAGES, flops=300_000, latency=6.0)
    assert pruned.flops.after <= 300_000
    assert pruned.latency == (milliseconds(dense, IMAGES), milliseconds(model, IMAGES))


def test_the_result_shows_each_layer() -> None:
    pruned = prune_channels(chain(1), example_inputs=normal(1, 6), to=Budget(parameters=200))
    text = str(pruned)
    assert "at most 200 parameters" in text
    assert pruned.ratio is None
    assert pruned.budget == Budget(parameters=200)
    for name, (before, after) in pruned.layers.items():
        assert any(
            line.startswith(name) and f"{before} to" in line and f"{after}" in line
            for line in text.splitlines()
        )
    assert pruned.unpruned_layers == {"4.weight": "an output of the network"}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, TypeError, r"`ratio`.*`to`"),
        ({"ratio": 0.5, "to": Budget(parameters=9)}, TypeError, r"`to`.*0\.5.*parameters=9"),
        ({"to": 5000}, TypeError, r"`to`.*5000"),
    ],
)
def test_ratio_or_budget(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        prune_channels(chain(1), example_inputs=normal(1, 6), **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, r"`Budget`.*none"),
        ({"parameters": 0}, ValueError, r"`Budget\.parameters`.*0"),
        ({"flops": "1e6"}, TypeError, r"`Budget\.flops`.*1e6"),
        ({"bytes": 5, "min_kept": 1.0}, ValueError, r"`Budget\.min_kept`.*1\.0"),
        ({"bytes": 5, "round_to": 0}, ValueError, r"`Budget\.round_to`.*0"),
        ({"bytes": 5, "round_to": 2.5}, TypeError, r"`Budget\.round_to`.*2\.5"),
        ({"bytes": 5, "whole_heads": 2}, TypeError, r"`Budget\.whole_heads`.*2"),
    ],
)
def test_a_budget_is_checked(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Budget(**arguments)


def test_a_budget_holds_plain_numbers() -> None:
    odd: Any = {"parameters": Fraction(201, 2), "min_kept": torch.tensor(0.25)}
    budget = Budget(**odd, round_to=np.int64(8))
    assert [type(v) for v in (budget.parameters, budget.min_kept, budget.round_to)] == [
        float,
        float,
        int,
    ]
    assert str(budget) == "100.5 parameters"
    assert Budget(flops=np.float32(1000)) == Budget(flops=1000)


class Text(nn.Module):
    """An embedding that alone is read by a layer, so that it keeps its width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, 16)
        self.hidden, self.head = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(ids).mean(1)).relu())


def test_an_embedding_that_keeps_its_width_is_named() -> None:
    ids = torch.arange(10).view(2, 5)
    for what, size in (("parameters", 3200), ("bytes", 12800)):
        with pytest.raises(ValueError, match=rf"`to`.*{size:,} in `embed\.weight` \(9.*%: no Conv"):
            prune_channels(Text(), example_inputs=ids, to=Budget(**{what: 1000}))
    with pytest.raises(ValueError, match="an output of the network") as error:
        prune_channels(Text(), example_inputs=ids, to=Budget(flops=10))
    assert "embed" not in str(error.value)
    pruned = prune_channels(Text(), 0.5, ids)
    why = pruned.unpruned_layers["embed.weight"]
    assert "no Conv or Linear layer" in why
    assert list(pruned.unpruned_parameters) == ["embed.weight"]
    assert why in str(pruned)
    assert "embed.weight" not in pruned.layers
    assert plan_channels(Text(), 0.5, ids).reasons["embed.weight"] == why


def test_a_budget_in_the_place_of_the_ratio() -> None:
    budget = Budget(parameters=100)
    for function in (prune_channels, plan_channels):
        with pytest.raises(TypeError, match=r"`ratio`.*Budget\(parameters=100\).*to="):
            function(chain(1), budget, normal(1, 6))  # pyright: ignore[reportArgumentType]


def test_the_limit_is_printed_in_full() -> None:
    assert str(Budget(parameters=0.5 * 1_234_567)) == "617,283.5 parameters"
    assert str(Budget(flops=10**7, latency=4.837880500417668)) == "10,000,000 FLOPs and 4.838 ms"
    assert str(Budget(latency=5)) == "5 ms"


def test_the_error_of_an_unreachable_budget_survives_another_process() -> None:
    with pytest.raises(ValueError, match="`to` must be reachable") as caught:
        prune_channels(
            Residual().double(), example_inputs=normal(1, 3, 8, 8), to=Budget(parameters=1)
        )
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is type(caught.value)
    assert str(again) == str(caught.value)


class WithAnEmptyCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.b(self.a(x).relu()).view(*x.shape[:2], 4, 4)
        cached = heads.transpose(1, 2)[:, :, :0]
        return self.c(heads.flatten(2)) + cached.sum()


class WithAnEmptySlice(WithAnEmptyCache):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        heads = x.view(*x.shape[:2], 4, 4)
        rotated, rest = heads[..., :4], heads[..., 4:]
        none, all_of_it = x.split([0, 16], -1)
        return self.c(
            torch.cat([rotated * 2, rest], -1).flatten(2) + torch.cat([all_of_it, none], -1)
        )


@pytest.mark.parametrize("how", [{"ratio": 0.5}, {"to": Budget(parameters=300)}])
@pytest.mark.parametrize("kind", [WithAnEmptyCache, WithAnEmptySlice])
def test_a_tensor_without_elements(kind: type[nn.Module], how: dict[str, Any]) -> None:
    model, tokens = distinct(kind()), normal(2, 5, 6)
    pruned = prune_channels(model, example_inputs=tokens, **how)
    assert pruned.layers["a.weight"].removed > 0
    assert model(normal(3, 4, 6)).shape == (3, 4, 3)


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.embed = nn.Embedding(20, 1), nn.Embedding(20, 8)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, index: Tensor) -> Tensor:
        return self.body(self.embed(index)) + self.bias(index)


def test_an_embedding_of_one_channel_has_no_reason() -> None:
    pruned = prune_channels(Recommender(), 0.5, torch.arange(5))
    assert "bias.weight" not in pruned.unpruned_layers
