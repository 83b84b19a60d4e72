"""Importances from papers, against their formulas on small layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drophot.prune import Importance, magnitude_prune
from drophot.prune.importances import (
    BatchNormScale,
    Fisher,
    Random,
    Taylor,
    Wanda,
    l1,
    l2,
    layer_normalized,
)
from drophot.structured import Budget, prune_channels

INPUTS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])
BATCHES = [(INPUTS[:2], TARGETS[:2]), (INPUTS[2:4], TARGETS[2:4]), (INPUTS[4:], TARGETS[4:])]
SAMPLES = [(x[None], y[None]) for x, y in zip(INPUTS, TARGETS, strict=True)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.ReLU(), nn.Linear(4, 3)).double()


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients of one batch, by the ordinary backward pass of a copy in evaluation mode."""
    copy = network().eval()
    copy.load_state_dict(model.state_dict())
    F.cross_entropy(copy(x), y).backward()
    return {name: p.grad.clone() for name, p in copy.named_parameters() if p.grad is not None}


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    return dict(model.named_parameters())[name]


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5, 5)])
def test_magnitudes(shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    values = weight.detach()
    assert torch.equal(l1("", weight), values.abs())
    assert torch.equal(l2("", weight), values**2)
    torch.testing.assert_close(
        layer_normalized("", weight), values.abs() / (values**2).sum().sqrt()
    )
    assert layer_normalized("", nn.Parameter(torch.zeros(shape))).eq(0).all()


def test_layer_normalized_ignores_the_scale_of_a_layer() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    large = nn.Parameter(1024 * weight.detach())
    torch.testing.assert_close(layer_normalized("", weight), layer_normalized("", large))
    half = nn.Parameter(torch.full((300, 300), 100.0, dtype=torch.float16))
    assert layer_normalized("", half).isfinite().all()  # the sum of squares exceeds float16


@pytest.mark.parametrize("name", ["0.weight", "3.weight"])
def test_taylor(name: str) -> None:
    model = network()
    found = [gradients(model, *batch)[name] for batch in BATCHES]
    weight = weight_of(model, name)
    values = weight.detach()
    single = sum((g * values) ** 2 for g in found) / 3
    torch.testing.assert_close(Taylor(model, BATCHES)(name, weight), single)
    whole = sum((g * values).sum(1) ** 2 for g in found) / 3
    torch.testing.assert_close(Taylor(model, iter(BATCHES), channels=True)(name, weight), whole)


def test_taylor_of_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.ConvTranspose2d(3, 4, 2), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    taylor = Taylor(model, [(x, torch.tensor([0, 2]))], channels=True)
    F.cross_entropy(model(x), torch.tensor([0, 2])).backward()
    for name, dims in {"0.weight": (1, 2, 3), "2.weight": (0, 2, 3)}.items():
        weight = weight_of(model, name)
        assert weight.grad is not None
        expected = (weight.grad * weight.detach()).sum(dims) ** 2
        torch.testing.assert_close(taylor(name, weight), expected)
    pruned = prune_channels(model, 0.5, x, importance=taylor)
    assert pruned.layers["2.weight"].after == 2


@pytest.mark.parametrize("name", ["0.weight", "3.weight"])
def test_fisher(name: str) -> None:
    model = network()
    weight = weight_of(model, name)
    # Theis et al. 2018: the sum over samples of the squared gradient, divided by 2 N.
    fisher = sum(gradients(model, *sample)[name] ** 2 for sample in SAMPLES) / 6
    expected = weight.detach() ** 2 * fisher / 2
    torch.testing.assert_close(Fisher(model, SAMPLES)(name, weight), expected)


def test_wanda() -> None:
    model = network()
    wanda = Wanda(model, (x for x, _ in BATCHES))
    first, last = weight_of(model, "0.weight"), weight_of(model, "3.weight")
    norms = (INPUTS**2).sum(0).sqrt()
    expected = first.detach().abs() * norms[None]
    torch.testing.assert_close(wanda("0.weight", first).double(), expected, rtol=1e-5, atol=0)
    hidden = model[0](INPUTS).relu().detach()  # in evaluation mode: no dropout
    expected = last.detach().abs() * hidden.norm(dim=0)
    torch.testing.assert_close(wanda("3.weight", last).double(), expected, rtol=1e-5, atol=0)


def test_wanda_counts_every_token() -> None:
    model = nn.Linear(3, 2)
    tokens = torch.randn(4, 7, 3)
    wanda = Wanda(model, [(tokens[:1],), [tokens[1:]]])
    expected = model.weight.detach().abs() * tokens.reshape(-1, 3).norm(dim=0)
    torch.testing.assert_close(wanda("weight", model.weight), expected)


class Slim(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, bias=False)
        self.plain = nn.Conv2d(6, 6, 1)
        self.bn = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plain(self.bn(self.conv(x)).relu()).relu().mean((2, 3)))


def test_the_scale_of_batch_norm() -> None:
    model, images = Slim(), torch.randn(2, 1, 5, 5)
    nn.init.normal_(model.bn.weight)
    scale = BatchNormScale(model, images)
    assert torch.equal(scale("conv.weight", model.conv.weight), model.bn.weight.detach().abs())
    squares = model.plain.weight.detach().square().sum((1, 2, 3))
    torch.testing.assert_close(scale("plain.weight", model.plain.weight), squares)
    best = model.bn.weight.detach().abs().topk(3).indices.sort().values
    pruned = prune_channels(model, 0.5, images, importance=scale)
    assert torch.equal(pruned.kept_channels["conv.weight"], best)
    assert torch.equal(pruned.kept_channels["plain.weight"], squares.topk(3).indices.sort().values)


def test_random() -> None:
    weight = nn.Parameter(torch.ones(40, 50))
    values = Random(3)("a.weight", weight)
    assert torch.equal(values, Random(3)("a.weight", weight))
    assert not torch.equal(values, Random(4)("a.weight", weight))
    assert not torch.equal(values, Random(3)("b.weight", weight))
    assert values.shape == weight.shape
    assert 0.48 < float(values.mean()) < 0.52
    assert 0 <= float(values.min()) < 0.01 < 0.99 < float(values.max()) < 1
    with pytest.raises(TypeError, match=r"`seed`.*0\.5"):
        Random(0.5)  # pyright: ignore[reportArgumentType]


IMPORTANCES: dict[str, Callable[[nn.Module], Importance]] = {
    "l1": lambda model: l1,
    "l2": lambda model: l2,
    "layer_normalized": lambda model: layer_normalized,
    "Random": lambda model: Random(1),
    "Wanda": lambda model: Wanda(model, BATCHES),
    "Taylor": lambda model: Taylor(model, BATCHES),
    "Fisher": lambda model: Fisher(model, BATCHES),
}


@pytest.mark.parametrize("name", IMPORTANCES)
def test_each_ranks_weights_and_channels(name: str) -> None:
    importance = IMPORTANCES[name](network())
    for scope in ("global", "layer", "lamp"):
        masks = magnitude_prune(network(), 0.5, scope=scope, importance=importance)
        assert masks.sparsity == 0.5
    pruned = prune_channels(network(), 0.5, INPUTS, importance=importance)
    assert pruned.layers["0.weight"].after == 2
    fitted = prune_channels(
        network(), example_inputs=INPUTS, to=Budget(parameters=30), importance=importance
    )
    assert fitted.layers["0.weight"].after == 3  # (5 + 1 + 3) * 3 + 3


def test_the_model_is_unchanged() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    model(INPUTS).sum().backward()
    before = [p.grad for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    taylor = Taylor(model, BATCHES)
    Fisher(model, BATCHES)
    Wanda(model, BATCHES)
    assert all(module.training for module in model.modules())
    assert not model[0].weight.requires_grad
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert parameter.grad is gradient
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert taylor("0.weight", model[0].weight).any()  # although it is frozen


@pytest.mark.parametrize("kind", [Taylor, Fisher])
def test_batches_are_checked(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"`batches`"):
        kind(network(), [])
    with pytest.raises(TypeError, match=r"`batches`.*Tensor"):
        kind(network(), [INPUTS])
    with pytest.raises(TypeError, match=r"`batches`.*length 1"):
        kind(network(), [(INPUTS,)])
    with pytest.raises(TypeError, match=r"`batches`.*str"):
        kind(network(), [(INPUTS, "targets")])


def test_errors_of_wanda_and_batch_norm() -> None:
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 2))
    images = torch.randn(1, 1, 5, 5)
    with pytest.raises(ValueError, match=r"`0\.weight`.*`skip`"):
        magnitude_prune(conv, 0.5, importance=Wanda(conv, [images]))
    magnitude_prune(conv, 0.5, skip=["0"], importance=Wanda(conv, [images]))
    with pytest.raises(ValueError, match=r"`batches`"):
        Wanda(conv, [])
    with pytest.raises(TypeError, match=r"`batches`.*dict"):
        Wanda(conv, [{"x": images}])
    with pytest.raises(ValueError, match=r"`model`.*Conv2d"):
        Wanda(nn.Conv2d(1, 2, 3), [images])
    with pytest.raises(ValueError, match=r"`model`.*Sequential"):
        BatchNormScale(conv, images)


@pytest.mark.parametrize("other", [nn.Linear(5, 6), nn.Sequential(nn.Linear(5, 4))])
def test_an_importance_of_another_model(other: nn.Module) -> None:
    importance = Taylor(nn.Linear(5, 3), [(torch.randn(2, 5), torch.tensor([0, 1]))])
    with pytest.raises(ValueError, match=r"`importance`.*weight"):
        magnitude_prune(other, 0.5, importance=importance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_16_bits(dtype: torch.dtype) -> None:
    """They are zero below 1e-4 in float16, and a sum of bfloat16 stops growing."""
    model = nn.Linear(4, 2, bias=False).to(dtype)
    model.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2) / 2**13)
    batches = [(torch.full((1, 4), 2.0**-6, dtype=dtype), torch.zeros(1))] * 300

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum()

    weight, gradient = model.weight.detach().double(), 2.0**-6
    for values, expected in [
        (l2("weight", model.weight), weight**2),
        (Taylor(model, batches, loss)("weight", model.weight), (gradient * weight) ** 2),
        (Fisher(model, batches, loss)("weight", model.weight), weight**2 * gradient**2 / 2),
    ]:
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"),
         ValueError, r"`loss`.*\(2,\)"),
        (lambda outputs, targets: 1.0, TypeError, r"`loss`.*float"),
        (lambda outputs, targets: outputs.detach().sum(), ValueError, r"`loss`.*gradient"),
    ],
)  # fmt: skip
def test_losses_are_checked(loss: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Taylor(network(), BATCHES, loss)


def test_models_are_checked() -> None:
    with pytest.raises(ValueError, match=r"`model`.*BatchNorm1d"):
        Fisher(nn.BatchNorm1d(5), BATCHES)
    model: Any = network
    for create in (
        lambda: Taylor(model, BATCHES),
        lambda: Fisher(model, BATCHES),
        lambda: Wanda(model, BATCHES),
        lambda: BatchNormScale(model, INPUTS),
    ):
        with pytest.raises(TypeError, match=r"`model`.*function"):
            create()


class FromTheRight(nn.Module):
    """A square weight whose outputs are its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.middle = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) @ self.middle).relu())


def test_taylor_of_channels_that_are_columns() -> None:
    model = FromTheRight().double()
    taylor = Taylor(model, BATCHES, channels=True)
    assert taylor("middle", model.middle).shape == (4, 4)
    assert taylor("first.weight", model.first.weight).shape == (4,)
    attention = nn.MultiheadAttention(4, 2).double()

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0][:, 0]

    tokens = torch.randn(3, 1, 4, dtype=torch.float64)
    taylor = Taylor(Call(), [(tokens, torch.tensor([0, 1, 2]))], channels=True)
    assert taylor("attention.in_proj_weight", attention.in_proj_weight).shape == (12,)


class Tied(nn.Module):
    """One weight in two layers, which are called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=10 * self.first(input=x))


def test_wanda_of_tied_layers() -> None:
    model, x = Tied(), torch.randn(4, 3)
    norms = torch.cat([x, 10 * model.first(x)]).detach().norm(dim=0)
    weight = model.first.weight
    expected = weight.detach().abs() * norms
    torch.testing.assert_close(Wanda(model, [x])("first.weight", weight), expected)


def test_random_numbers_do_not_depend_on_defaults() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    expected = Random(3)("weight", weight)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(Random(3)("weight", weight), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(Random(3)("weight", weight), expected)
