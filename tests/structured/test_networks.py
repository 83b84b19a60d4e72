"""The benchmark of real networks: its oracle tells right from wrong, and no run loses rows."""

import sys
from argparse import Namespace
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
budgets, networks, oracle, zoo = map(import_module, ("budgets", "networks", "oracle", "zoo"))
sys.path.pop(0)


class Block(nn.Module):
    """A stream with a norm, attention whose scale is the default, and a softmax over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(5, 16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(self.a(x)).softmax(-1)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


def cut(model: Any, layer: str, rows: list[int] | None, columns: list[int] | None) -> None:
    module = model.get_submodule(layer)
    for name, tensor in list(module.named_parameters()):
        data = tensor.detach()
        if rows is not None:
            data = data[rows]
        if columns is not None and data.dim() > 1:
            data = data[:, columns]
        setattr(module, name, nn.Parameter(data.clone()))


def block(heads: bool = False, shift: int = 0) -> tuple[Any, Any, Tensor]:
    dense = oracle.distinct(Block().double())
    pruned, keep = deepcopy(dense), [0, 3, 4, 9, 12, 15]
    cut(pruned, "a", keep, None)
    cut(pruned, "norm", [n + shift for n in keep[:-1]] + keep[-1:], None)
    pruned.norm.normalized_shape = (6,)
    cut(pruned, "qkv", [0, 2, 5, 7, 8, 10, 13, 15, *range(16, 24)] if heads else None, keep)
    random = torch.Generator().manual_seed(0)
    return dense, pruned, torch.randn(4, 7, 5, generator=random, dtype=torch.float64)


def test_the_oracle_takes_norms_and_softmax_over_what_is_left() -> None:
    dense, pruned, x = block()
    assert oracle.compare(dense, pruned, [x], scale=True) < 1e-12


def test_the_oracle_sees_channels_that_do_not_belong_together() -> None:
    dense, pruned, x = block(shift=1)
    with pytest.raises(oracle.Wrong):
        oracle.compare(dense, pruned, [x], scale=True)


def test_the_oracle_sees_values_that_were_changed() -> None:
    dense, pruned, x = block()
    pruned.out.weight.data[0, 0] *= 2
    with pytest.raises(oracle.Wrong, match="values"):
        oracle.compare(dense, pruned, [x], scale=True)
    dense, pruned, x = block()
    pruned.norm.eps = 1.0
    with pytest.raises(oracle.Wrong, match="1.0"):
        oracle.compare(dense, pruned, [x], scale=True)


class HeadNorm(nn.Module):
    """An RMS norm of each of two heads, without a weight."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.a(x).unflatten(-1, (2, -1))
        return self.out(
            (heads * heads.square().mean(-1, keepdim=True).rsqrt() * self.scale).flatten(-2)
        )


@pytest.mark.parametrize("kept", [[0, 2, 5, 7], [1, 3, 4, 5]])
def test_the_oracle_follows_heads_that_lost_different_channels(kept: list[int]) -> None:
    dense = oracle.distinct(HeadNorm().double())
    pruned, x = deepcopy(dense), torch.randn(4, 7, 5, dtype=torch.float64)
    cut(pruned, "a", kept, None)
    cut(pruned, "out", None, kept)
    assert oracle.compare(dense, pruned, [x], scale=True) < 1e-12
    pruned.scale = 0.5
    assert oracle.compare(dense, pruned, [x], scale=True) > 1e-4


def test_the_oracle_tells_the_scale_of_attention_from_other_faults() -> None:
    class Heads(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                self.norm(self.a(x)),
                self.norm(self.a(x)).tanh(),
                self.qkv(self.norm(self.a(x))),
            )
            return self.out(F.scaled_dot_product_attention(q, k, v[..., :8]))

    dense, pruned, x = block()
    dense.__class__ = pruned.__class__ = Heads
    assert oracle.compare(dense, pruned, [x], scale=True) > 1e-4
    assert oracle.compare(dense, pruned, [x], scale=False) < 1e-12


def options(path: Path, **other: Any) -> Namespace:
    return Namespace(**{"seconds": 60, "wall": 600, "gib": 20, "out": path} | other)


def images(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 5, generator=torch.Generator().manual_seed(seed))


def network(forward: Any = None) -> Any:
    class Small(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            if forward is not None:
                forward(self)
            return super().forward(input)

    return Small(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)), images, None


def endless(model: Any) -> None:
    if model[0].weight.shape[0] < 16:
        while True:
            pass


def gone(model: Any) -> None:
    if model[0].weight.shape[0] < 16:
        raise SystemExit(9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("forward", "seconds", "outcome"),
    [(None, 60, "right"), (endless, 5, "timed out"), (gone, 60, "crashed")],
)
def test_each_network_has_a_row_whatever_becomes_of_it(
    forward: Any, seconds: int, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "make", lambda _: network(forward))
    row = networks.in_a_process("small", "drophot", options(tmp_path / "t.csv", seconds=seconds))
    assert row["outcome"] == outcome
    networks.write(tmp_path / "t.csv", row)
    networks.write(tmp_path / "t.csv", row | {"outcome": "wrong"})
    (last,) = networks.read(tmp_path / "t.csv")
    assert (last["network"], last["outcome"], last["parameters"]) == ("small", "wrong", "147")


def test_a_budget_is_reached_within_one_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "make", lambda _: network())
    run = options(tmp_path / "t.csv")
    row = networks.in_a_process("small", "drophot", run, budgets.measure)
    cells = {field: row.get(field, "") for field in budgets.FIELDS}
    networks.write(tmp_path / "t.csv", cells, budgets.FIELDS)
    (row,) = budgets.read(tmp_path / "t.csv")
    assert (row["outcome"], row["trains"], row["limit"]) == ("right", "True", "73")
    # 9 parameters for each of the 16 channels, and 3 biases.
    assert (row["parameters_after"], row["with_one_more"]) == ("66", "75")
    assert "1 of 1 above it with one more channel" in budgets.counted([row])


def test_all_networks_are_named_once() -> None:
    assert len(zoo.NAMES) == len(set(zoo.NAMES)) == 217


def test_values_of_32_bits_are_all_different() -> None:
    model = oracle.distinct(nn.Linear(2000, 500))
    assert len(model.weight.unique()) == 1_000_000
    assert model.weight.std().item() == pytest.approx((1 / 6000 + 0.02**2) ** 0.5, rel=0.02)


def test_equal_values_cannot_be_checked() -> None:
    with pytest.raises(oracle.NotChecked, match="equal values"):
        oracle.kept_by_value(torch.ones(4), torch.ones(2))
