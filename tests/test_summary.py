"""What a network is worth: compressed bytes, effective operations, measured time."""

import pytest
import torch
from torch import Tensor, nn

from drophot import _latency, magnitude_prune, summary
from drophot.models import lenet


class Clock:
    """Time that passes where a layer says so."""

    now = 0.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "takes" in request.node.name or "time" in request.node.name:
        monkeypatch.setattr(_latency, "perf_counter", lambda: Clock.now)


class Slow(nn.Module):
    """Takes so many milliseconds for each sample."""

    def __init__(self, milliseconds: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.seconds = milliseconds / 1e3
        self.weight = nn.Parameter(torch.ones(3))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        Clock.now += self.seconds * len(x)
        return x if self.inner is None else self.inner(x)


def test_time_is_each_layers_own_and_that_of_the_whole() -> None:
    model = nn.Sequential(Slow(2, inner=Slow(6)), Slow(4))
    found = summary(model, torch.ones(1, 3), batch_sizes=(1, 3))
    own = {layer.name: layer.latency for layer in found.layers}
    assert own == {
        "0": {1: pytest.approx(2), 3: pytest.approx(6)},
        "0.inner": {1: pytest.approx(6), 3: pytest.approx(18)},
        "1": {1: pytest.approx(4), 3: pytest.approx(12)},
    }
    assert found.latency == {1: pytest.approx(12), 3: pytest.approx(36)}


def test_a_layer_that_runs_twice_takes_twice() -> None:
    layer = Slow(3)
    found = summary(nn.Sequential(layer, layer), torch.ones(1, 3), batch_sizes=(1,))
    assert [one.latency for one in found.layers] == [{1: pytest.approx(6)}]


def test_the_time_that_is_shown_is_the_median_after_a_warm_up() -> None:
    class Warms(Slow):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Warms.calls += 1
            self.seconds = {1: 5.0, 2: 3.0, 3: 0.5, 4: 0.01}[Warms.calls]
            return super().forward(x)

    assert _latency.latency(Warms(1), torch.ones(1, 3), seconds=0.3) == pytest.approx(500)
    assert Warms.calls == 4


def test_effective_operations_and_compressed_bytes_follow_the_zeros() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
    dense = summary(model, torch.ones(1, 3, 3, 3), batch_sizes=())
    assert dense.effective_flops == dense.flops == 2 * (8 * 27 + 80)
    assert dense.compressed_bytes == dense.bytes
    magnitude_prune(model, 0.75, scope="layer")
    found = summary(model, torch.ones(1, 3, 3, 3), batch_sizes=())
    assert found.flops == dense.flops
    assert [layer.effective_flops for layer in found.layers] == [2 * 54, 2 * 20]
    assert found.effective_flops == 2 * 74
    assert found.bytes == dense.bytes
    # A bit for each weight and four bytes for each that is left; the bias whole.
    assert [layer.compressed_bytes for layer in found.layers] == [27 + 54 * 4, 10 + 20 * 4 + 40]
    assert found.compressed_bytes == sum(layer.compressed_bytes for layer in found.layers)


def test_layers_without_weights_are_not_sparse() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.T

    model = nn.Sequential(Product(), nn.Linear(2, 2))
    nn.init.zeros_(model[1].weight)
    found = summary(model, torch.ones(2, 2), batch_sizes=())
    assert [layer.effective_flops for layer in found.layers] == [16, 0]


def test_it_is_off_where_it_is_not_asked_for() -> None:
    model = lenet()
    assert summary(model).latency is None
    assert summary(model, torch.ones(1, 1, 28, 28), batch_sizes=()).latency is None
    found = summary(model, torch.ones(3, 1, 28, 28))
    assert sorted(found.latency) == [1, 32]
    assert all(took > 0 for took in found.latency.values())
    assert all(sorted(layer.latency) == [1, 32] for layer in found.layers)
    heads = str(found).splitlines()[0]
    assert heads.endswith("FLOPs  effective  ms at 1  ms at 32")
    assert len(str(found).splitlines()) == 3 + 5 + 1 - 1 + 1


def test_it_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4)).train()
    model[2].eval()
    random, state = torch.get_rng_state(), model[2].running_mean.clone()
    summary(model, torch.randn(2, 4, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[2].running_mean, state)
    assert [m.training for m in model] == [True, True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 32:
            raise RuntimeError("too many")
        return x


def test_hooks_come_off_where_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Fails())
    with pytest.raises(RuntimeError, match="too many"):
        summary(model, torch.ones(1, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_inputs_of_any_structure_get_another_batch_size() -> None:
    inputs = {"a": torch.arange(6).view(2, 3), "b": [torch.zeros(2), "word", torch.tensor(5.0)]}
    found = _latency.of_batch(inputs, 3)
    assert found["a"].tolist() == [[0, 1, 2]] * 3
    assert found["b"][0].shape == (3,)
    assert found["b"][1] == "word"
    assert found["b"][2] == 5


@pytest.mark.parametrize(
    "inputs", [torch.tensor(1.0), (torch.ones(2, 3), torch.ones(4, 3)), torch.ones(0, 3)]
)
def test_inputs_without_a_batch_are_refused(inputs) -> None:
    with pytest.raises(ValueError, match="the batch as their first dimension. Found"):
        summary(nn.Linear(3, 3), inputs)


def test_named_inputs() -> None:
    class Named(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.layer = nn.Linear(inputs, outputs)

        def forward(self, *, this: Tensor) -> Tensor:
            return self.layer(this)

    assert summary(Named(3, 2), {"this": torch.ones(1, 3)}).flops == 12
