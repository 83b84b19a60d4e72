"""Large linear layers by oneDNN: the same numbers and derivatives, and only where they fit."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers.steps import samples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from drophot import fit
from drophot._core.onednn_linear import fast_linear
from drophot.training.step import fast_forward, onednn_linear

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this PyTorch has no oneDNN",
)


@pytest.fixture(autouse=True, scope="module")
def avx512() -> Any:
    """It computes the same, slower, where the processor has no AVX-512."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
        yield


class Products(TorchDispatchMode):
    """Counts the products that oneDNN computes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "mkldnn::_linear_pointwise" in func.name()
        return func(*args, **(kwargs or {}))


def products(compute: Callable[[], object]) -> int:
    with Products() as seen:
        compute()
    return seen.count


def assert_near(found: Tensor, exact: Tensor) -> None:
    """In float32 for hundreds of numbers added up: one in 10⁵ of the whole."""
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    assert (found.double() - exact.double()).norm() <= 1e-5 * exact.double().norm()


def large(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(512, 256, bias=bias)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("shape", [(64, 512), (8, 8, 512), (2, 4, 8, 512)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_linear(
    shape: tuple[int, ...], layout: str, bias: bool
) -> None:
    layer = large(bias)
    leaf = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], 256)
    wanted = [leaf, *layer.parameters()]
    with Products() as seen:
        found = fast_linear(layer, CPU)(LAYOUTS[layout](leaf))
        gradients = torch.autograd.grad(found, wanted, grad)
    assert seen.count == 3, "the product and both its derivatives"
    exact = deepcopy(layer).double()
    double = leaf.detach().double().requires_grad_()
    expected = exact(LAYOUTS[layout](double))
    assert_near(found, expected)
    doubles = torch.autograd.grad(expected, [double, *exact.parameters()], grad.double())
    for one, other in zip(gradients, doubles, strict=True):
        assert_near(one, other)


def test_what_needs_no_gradient_gets_none() -> None:
    layer = large()
    layer.weight.requires_grad_(False)
    forward = fast_linear(layer, CPU)
    inputs = torch.randn(64, 512)
    out = forward(inputs)
    assert products(lambda: out.sum().backward()) == 0
    assert layer.weight.grad is None
    assert (layer.bias.grad == 64).all()
    with torch.no_grad():
        assert not forward(inputs).requires_grad
    with torch.inference_mode():
        assert_near(forward(inputs), layer(inputs))


def test_derivatives_of_derivatives_are_those_of_linear() -> None:
    """A penalty on the gradient, as of a WGAN, compared with the same in double precision."""

    def penalty(forward: Any, layer: nn.Linear, inputs: Tensor) -> tuple[Tensor, ...]:
        wanted = [inputs.clone().requires_grad_(), *layer.parameters()]
        slopes = torch.autograd.grad(forward(wanted[0]).pow(2).sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(slope.pow(2).sum() for slope in slopes), wanted)

    layer, inputs = large(), torch.randn(64, 512)
    exact = deepcopy(layer).double()
    found = penalty(fast_linear(layer, CPU), layer, inputs)
    for one, other in zip(found, penalty(exact, exact, inputs.double()), strict=True):
        assert_near(one, other)


# --- where it does not fit ---------------------------------------------------------------------


@given(st.integers(1, 200))
def test_small_products_are_left_alone(rows: int) -> None:
    layer = large()
    inputs = torch.ones(rows, 512)
    count = products(lambda: fast_linear(layer, CPU)(inputs))
    assert count == (rows * 512 * 256 >= 1 << 22)


def test_one_input_is_left_alone() -> None:
    layer = nn.Linear(4096, 1024)
    assert products(lambda: fast_linear(layer, CPU)(torch.ones(4096))) == 0
    assert products(lambda: fast_linear(layer, CPU)(torch.ones(1, 4096))) == 1


def test_models_without_large_layers_and_other_devices_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, layer = nn.Linear(255, 256), large()
    assert fast_linear(small, CPU) is small
    assert fast_linear(layer, torch.device("cuda")) is layer
    assert fast_linear(layer, CPU) is not layer
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert fast_linear(layer, CPU) is layer


def test_doubles_are_left_alone() -> None:
    layer, inputs = large().double(), torch.randn(64, 512, dtype=torch.float64)
    assert torch.equal(fast_linear(layer, CPU)(inputs), layer(inputs))


def test_mixed_precision_is_left_alone() -> None:
    layer, inputs = large(), torch.randn(64, 512)
    with onednn_linear(), torch.autocast("cpu", torch.bfloat16):
        found = fast_forward(layer, CPU)(inputs)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, layer(inputs))


def test_other_kinds_of_tensors_are_left_alone() -> None:
    class Named(Tensor):
        pass

    layer, inputs = large(), torch.randn(64, 512)
    found = fast_linear(layer, CPU)(inputs.as_subclass(Named))
    assert type(found) is Named
    assert torch.equal(found.as_subclass(Tensor), layer(inputs))
    assert_near(fast_linear(layer, CPU)(inputs.to_sparse()), layer(inputs))


class Within(nn.Module):
    """A large layer within something that has rules of its own."""

    def __init__(self, around: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large, self.last, self.around = nn.Linear(512, 256), nn.Linear(256, 4), around

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.around(self.large, inputs).relu())


def named(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Arguments by name."""
    return F.linear(input=inputs, weight=layer.weight, bias=layer.bias)


def folded(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return torch.vmap(layer)(inputs.view(2, -1, 512)).flatten(0, 1)


def slopes(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Forward-mode derivatives."""
    return torch.func.jvp(layer, (inputs,), (inputs,))[1]


def recomputed(layer: nn.Linear, inputs: Tensor) -> Tensor:
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this version of torch does not say that it will compute again")
    return checkpoint(layer, inputs, use_reentrant=False)


def compiled(layer: nn.Linear, inputs: Tensor) -> Tensor:
    torch.compiler.reset()
    return torch.compile(layer, fullgraph=True, backend="eager")(inputs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch warns of itself
@pytest.mark.parametrize("around", [named, folded, slopes, recomputed, compiled])
def test_a_layer_within_something_else_trains_as_it_does_without(around: Any) -> None:
    inputs, targets = samples(128, 512).tensors
    gradients = []
    for forward_of in (lambda model: model, lambda model: fast_linear(model, CPU)):
        model = Within(around)
        F.cross_entropy(forward_of(model)(inputs), targets).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) >= 3, "of both weights and a bias"
    for one, other in zip(*gradients, strict=True):
        assert_near(one, other)


def test_a_compiled_model_has_no_graph_break() -> None:
    torch.compiler.reset()
    layer, inputs = large(), torch.randn(64, 512)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    forward = fast_linear(compiled, CPU)
    assert forward is not compiled
    assert_near(forward(inputs), layer(inputs))


def test_the_model_itself_stays_as_it_is() -> None:
    layer, data = large(), samples(64, 512)
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, outputs: seen.append(outputs))
    names = set(vars(layer)), [*layer.state_dict()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    assert products(lambda: fit(layer, data, 1, optimizer=optimizer)) == 0, "it is an option"
    seen.clear()
    with onednn_linear():
        assert products(lambda: fit(layer, data, 1, optimizer=optimizer)) > 0
    assert len(seen) == 1, "one call of one batch of 64"
    assert seen[0].shape == (64, 256)
    handle.remove()
    assert (set(vars(layer)), [*layer.state_dict()]) == names
    copy = deepcopy(layer)
    assert products(lambda: copy(data.tensors[0])) == 0, "outside of `fit` it is plain PyTorch"
    assert torch.equal(copy(data.tensors[0]), layer(data.tensors[0]))
