"""What a network is worth: compressed bytes, effective operations, measured time."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from drophot import magnitude_prune, summary
from drophot.models import lenet
from drophot.prune import latency
from drophot.structured import prune_channels


class Clock:
    """Time that passes where a layer says so."""

    now = 0.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "takes" in request.node.name or "time" in request.node.name:
        monkeypatch.setattr(latency, "perf_counter", lambda: Clock.now)


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

    assert latency.latency(Warms(1), torch.ones(1, 3), seconds=0.3) == pytest.approx(500)
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
    found = latency.of_batch(inputs, 3)
    assert found["a"].tolist() == [[0, 1, 2]] * 3
    assert found["b"][0].shape == (3,)
    assert found["b"][1] == "word"
    assert found["b"][2] == 5


@pytest.mark.parametrize(
    "inputs", [torch.tensor(1.0), (torch.ones(2, 3), torch.ones(4, 3)), torch.ones(0, 3)]
)
def test_inputs_without_a_batch_are_refused(inputs) -> None:
    with pytest.raises(ValueError, match="`example_inputs`"):
        summary(nn.Linear(3, 3), inputs)


def test_a_shape_instead_of_inputs_is_told_apart() -> None:
    with pytest.raises(ValueError, match=r"`example_inputs` .*\(1, 3\).*torch.randn\(1, 3\)"):
        summary(nn.Linear(3, 3), (1, 3))


def test_inputs_of_one_sample_fail_with_the_batch_size_that_was_tried() -> None:
    with pytest.raises(RuntimeError) as error:
        summary(nn.Linear(3, 3), torch.ones(3), batch_sizes=(2,))
    assert "batch size of 2" in error.value.__notes__[0]
    assert summary(nn.Linear(3, 3), torch.ones(3), batch_sizes=()).flops == 18


class Stateful(nn.Module):
    """Counts its calls in a buffer and in an attribute, and keeps what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.kept: list[Tensor] = []
        self.number = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.number += 1
        self.kept.append(self.layer(x))
        return self.kept[-1]


def test_what_a_model_remembers_of_its_calls_is_as_it_was() -> None:
    model = Stateful()
    kept = model.kept
    summary(model, torch.ones(1, 3), batch_sizes=(1, 2))
    assert model.calls == 0
    assert model.number == 0
    assert model.kept is kept
    assert not kept


def test_named_inputs() -> None:
    class Named(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.layer = nn.Linear(inputs, outputs)

        def forward(self, *, this: Tensor) -> Tensor:
            return self.layer(this)

    assert summary(Named(3, 2), {"this": torch.ones(1, 3)}).flops == 12


# --- operations, by the module that calls them ---------------------------------------------------


class Product(nn.Module):
    """Of activations, and so without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).tanh()


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class Both(nn.Module):
    """One more name for each of its children, and a product of its own."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other
        self.parts = nn.Sequential(one, other)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x) + (self.one(x) @ self.other(x)).tanh()


def leaves() -> list[nn.Module]:
    """Modules that keep the shape `(2, 4, 4)`."""
    return [
        nn.Linear(4, 4),
        nn.Linear(4, 4, bias=False),
        nn.Conv1d(4, 4, 3, padding=1, groups=2),
        nn.ConvTranspose1d(4, 4, 3, padding=1),
        Product(),
        nn.Tanh(),
    ]


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Any nesting in which any module may be in several places."""
    pool = leaves()
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["sequence", "twice", "both"]))
        parts = [pool[draw(st.integers(0, len(pool) - 1))] for _ in range(3)]
        pool.append(
            nn.Sequential(*parts)
            if kind == "sequence"
            else Twice(parts[0])
            if kind == "twice"
            else Both(parts[0], parts[1])
        )
    return pool[-1]


def by_hand(model: nn.Module, inputs: Tensor) -> dict[nn.Module, tuple[int, int]]:
    """Operations and effective ones of each module, by its own count of calls."""
    calls: dict[nn.Module, int] = {}
    hooks = [
        module.register_forward_hook(lambda m, *_: calls.update({m: calls.get(m, 0) + 1}))
        for module in model.modules()
    ]
    model(inputs)
    for hook in hooks:
        hook.remove()
    found = {}
    for module, count in calls.items():
        weight = getattr(module, "weight", None)
        if weight is not None:  # each weight meets 2 × 4 positions
            found[module] = 16 * count * weight.numel(), 16 * count * int((weight != 0).sum())
        elif isinstance(module, Product | Both):
            found[module] = (2 * 2 * 4**3 * count,) * 2
    return found


@given(networks(), st.sampled_from([0.0, 0.3, 0.8]))
def test_operations_add_up_to_what_torch_counts(model: nn.Module, ratio: float) -> None:
    inputs = torch.randn(2, 4, 4)
    for parameter in model.parameters():
        parameter.data[torch.rand(parameter.shape) < ratio] = 0
    found = summary(model, inputs, batch_sizes=())
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(inputs)
    assert found.flops == sum(layer.flops for layer in found.layers) == counter.get_total_flops()
    names = {module: name for name, module in model.named_modules()}
    expected = {
        names[module] or "(model)": count for module, count in by_hand(model, inputs).items()
    }
    rows = {layer.name: (layer.flops, layer.effective_flops) for layer in found.layers}
    assert {name: count for name, count in rows.items() if count[0]} == expected
    assert found.effective_flops == sum(effective for _, effective in expected.values())


def test_a_backbone_that_is_taken_apart() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
            self.features = nn.Sequential(*list(self.backbone.children())[:-1])
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x))

    found = summary(Net(), torch.ones(1, 8), batch_sizes=())
    rows = {layer.name: layer.flops for layer in found.layers}
    assert rows == {"backbone.0": 128, "backbone.2": 0, "head": 32}


def test_a_module_that_fails_and_is_caught_leaves_the_others_theirs() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrong, self.right = nn.Linear(3, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.wrong(x)
            except RuntimeError:
                return self.right(x) @ x.mT

    found = summary(Tries(), torch.ones(2, 4), batch_sizes=(1,))
    rows = {layer.name: layer.flops for layer in found.layers}
    assert rows == {"(model)": 32, "wrong": 0, "right": 64}


def test_a_hook_that_fails_and_is_caught_does_not_close_the_module_around_it() -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("not now")

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrong = nn.Linear(4, 4)
            self.wrong.register_forward_pre_hook(fails)

        def forward(self, x: Tensor) -> Tensor:
            with suppress(RuntimeError):
                self.wrong(x)
            return x @ x.mT

    found = summary(nn.Sequential(Tries()), torch.ones(2, 4), batch_sizes=(1,))
    assert {layer.name: layer.flops for layer in found.layers} == {"0": 32, "0.wrong": 0}


class Does(nn.Module):
    """A function of its parts and the input."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def sparse(*shape: int, zeros: float = 0.75) -> nn.Parameter:
    """Ones, and zeros in the last rows."""
    weight = torch.ones(shape)
    weight.view(-1)[round((1 - zeros) * weight.numel()) :] = 0
    return nn.Parameter(weight)


def linear(kept: int = 4) -> nn.Linear:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data.copy_(torch.arange(16).view(4, 4) < kept)
    return layer


def torch_pruned() -> nn.Module:
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.75)
    return layer


class Standardised(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean()


def standardised() -> nn.Module:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Standardised())
    return layer


x = torch.ones(2, 4)
# All of them 64 operations or a multiple; the second number is what the zeros leave.
WEIGHTS: dict[str, tuple[Callable[[], nn.Module], Tensor, int, int]] = {
    "plain": (linear, x, 64, 16),
    "one sample": (linear, x[0], 32, 8),
    "torch.nn.utils.prune": (torch_pruned, x, 64, 16),
    "no zeros in what is multiplied": (standardised, x, 64, 64),
    "zeros of activations": (lambda: nn.Sequential(nn.Threshold(9, 0), linear(16)), x, 64, 64),
    "of another module": (
        lambda: Does(lambda m, x: F.linear(x, m.other.weight), other=linear()),
        x,
        64,
        16,
    ),
    "weight first": (lambda: Does(lambda m, x: m.w @ x.T, w=sparse(4, 4)), x, 64, 16),
    "einsum": (
        lambda: Does(lambda m, x: torch.einsum("ni,oi->no", x, m.w), w=sparse(4, 4)),
        x,
        64,
        16,
    ),
    "expanded": (
        lambda: Does(lambda m, x: x.expand(3, 2, 4) @ m.w.expand(3, 4, 4), w=sparse(4, 4)),
        x,
        192,
        48,
    ),
    "half of it": (lambda: Does(lambda m, x: F.linear(x, m.w[:4]), w=sparse(8, 4)), x, 64, 32),
    "put together": (
        lambda: Does(
            lambda m, x: F.linear(x, torch.cat([m.v, m.w])), v=sparse(4, 4), w=sparse(4, 4)
        ),
        x,
        128,
        32,
    ),
    "masked by a buffer": (
        lambda: Does(
            lambda m, x: F.linear(x, m.w * m.mask),
            w=sparse(4, 4, zeros=0),
            mask=torch.eye(4),
        ),
        x,
        64,
        16,
    ),
    "in bfloat16": (
        lambda: Does(lambda m, x: F.linear(x.bfloat16(), m.w.bfloat16()), w=sparse(4, 4)),
        x,
        64,
        16,
    ),
    "learned inputs": (
        lambda: Does(lambda m, x: m.other(m.q).relu() @ x.T, q=sparse(2, 4), other=linear(8)),
        x,
        64 + 32,
        32 + 32,
    ),
    "learned inputs and biases": (
        lambda: Does(
            lambda m, x: (F.linear(m.q, m.w, m.bias) + m.bias).relu() @ x.T,
            q=sparse(2, 4),
            w=sparse(4, 4, zeros=0.5),
            bias=nn.Parameter(-torch.ones(4)),
        ),
        x,
        64 + 32,
        32 + 32,
    ),
    "mixed by the inputs": (
        lambda: Does(lambda m, x: F.linear(x, m.w * x.mean()), w=sparse(4, 4)),
        x,
        64,
        64,
    ),
    "twice": (lambda: Twice(linear()), x, 128, 32),
    "not in a list of modules": (
        lambda: Does(lambda m, x: m.hidden[0](x), hidden=[linear()]),
        x,
        64,
        16,
    ),
    "divided by a norm of it": (
        lambda: Does(lambda m, x: F.linear(x, m.w / torch.dot(m.w[0], m.w[0])), w=sparse(4, 4)),
        x,
        8 + 64,
        8 + 16,
    ),
    "grouped": (
        lambda: Does(
            lambda m, x: F.conv2d(x.view(1, 4, 1, 2), m.w, groups=2), w=sparse(4, 2, 1, 1)
        ),
        x,
        32,
        8,
    ),
    "transposed": (
        lambda: Does(
            lambda m, x: F.conv_transpose1d(x.view(1, 4, 2), m.w, stride=2), w=sparse(4, 4, 1)
        ),
        x,
        64,
        16,
    ),
    "bilinear": (
        lambda: Does(lambda m, x: F.bilinear(x, x, m.w), w=sparse(3, 4, 4)),
        x,
        2 * 2 * 48,
        2 * 2 * 12,
    ),
    "dot": (lambda: Does(lambda m, x: x[0] @ m.w, w=sparse(4)), x, 8, 2),
    "matrix and vector": (lambda: Does(lambda m, x: x @ m.w, w=sparse(4)), x, 16, 4),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_effective_operations_are_those_of_the_weight_that_is_used(name: str) -> None:
    make, inputs, flops, effective = WEIGHTS[name]
    found = summary(make(), inputs, batch_sizes=())
    assert (found.flops, found.effective_flops, found.uncounted) == (flops, effective, ())


def test_weights_that_autocast_has_kept_are_not_those_that_are_used() -> None:
    model = linear(16)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        model.weight.data.copy_(linear().weight.data)
        assert summary(model, x, batch_sizes=()).effective_flops == 16


class Written(nn.Module):
    """Attention as Hugging Face and timm write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))


def test_attention_of_one_module_is_that_of_four_layers() -> None:
    torch.manual_seed(0)
    size, length = 8, 32
    model = nn.MultiheadAttention(size, 1, bias=False, batch_first=True)
    magnitude_prune(model, 0.9)
    written, inputs = Written(size), torch.randn(1, length, size)
    written.load_state_dict(
        dict(zip(["q.weight", "k.weight", "v.weight"], model.in_proj_weight.chunk(3), strict=True))
        | {"o.weight": model.out_proj.weight}
    )
    one = summary(model, (inputs, inputs, inputs), batch_sizes=())
    four = summary(written, inputs, batch_sizes=())
    products = 2 * 2 * length * length * size
    left = sum(int(p.count_nonzero()) for p in model.parameters())
    assert one.flops == four.flops == 2 * length * 4 * size * size + products
    assert one.effective_flops == four.effective_flops == 2 * length * left + products


@pytest.mark.parametrize("apart", [{}, {"kdim": 6, "vdim": 5}])
def test_attention_over_something_else_uses_parts_of_its_weight(apart: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, bias=False, batch_first=True, **apart)
    magnitude_prune(model, 0.5)
    query = torch.randn(1, 3, 8)
    key, value = torch.randn(1, 7, apart.get("kdim", 8)), torch.randn(1, 7, apart.get("vdim", 8))
    parts = (
        [model.q_proj_weight, model.k_proj_weight, model.v_proj_weight]
        if apart
        else model.in_proj_weight.chunk(3)
    )
    uses = zip([3, 7, 7, 3], [*parts, model.out_proj.weight], strict=True)
    expected = sum(2 * n * int(w.count_nonzero()) for n, w in uses) + 2 * 2 * 3 * 7 * 8
    found = summary(model, (query, key, value), batch_sizes=())
    assert found.effective_flops == expected


def test_a_vision_transformer_by_hand() -> None:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    width, tokens, depth = 32, 17, 2
    model = models.VisionTransformer(32, 8, depth, 2, width, 64, num_classes=10)
    nn.init.normal_(model.heads.head.weight)
    magnitude_prune(model, 0.9)
    uses = {"conv_proj": 16, "heads": 1}
    products = depth * 2 * 2 * tokens * tokens * width
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n}
    for count, wanted in (
        (lambda p: p.numel(), "flops"),
        (lambda p: int(p.count_nonzero()), "effective_flops"),
    ):
        by_weight = sum(
            2 * uses.get(name.partition(".")[0], tokens) * count(p)
            for name, p in weights.items()
            if "class_token" not in name
        )
        found = summary(model, torch.randn(1, 3, 32, 32), batch_sizes=())
        assert getattr(found, wanted) == by_weight + products


@pytest.mark.parametrize(
    ("name", "multiply_adds"), [("resnet18", 1_814_073_344), ("mobilenet_v2", 300_774_272)]
)
def test_published_multiply_adds(name: str, multiply_adds: int) -> None:
    models = pytest.importorskip("torchvision").models
    model = getattr(models, name)(weights=None)
    found = summary(model, torch.randn(1, 3, 224, 224), batch_sizes=())
    assert found.flops == 2 * multiply_adds


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_is_its_two_products(heads: int, causal: bool) -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, heads, 7, 8)
    model = Does(
        lambda m, q, k: F.scaled_dot_product_attention(
            q, k, k, is_causal=causal, enable_gqa=heads < 4
        )
    )
    assert summary(model, (q, k), batch_sizes=()).flops == 2 * 2 * 2 * 4 * 5 * 7 * 8


RECURRENT = [
    (kind, options)
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
    for options in ({}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True})
]
RECURRENT += [(nn.LSTM, {"proj_size": 3}), (nn.LSTM, {"bias": False}), (nn.GRU, {"bias": False})]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("kind", "options"), RECURRENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_recurrent_weight_meets_each_step(kind, options, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = kind(4, 6, **options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.5)
    weights = [p for p in model.parameters() if p.dim() == 2]
    found = summary(model, torch.randn(5, 3, 4, dtype=dtype), batch_sizes=())
    assert found.flops == sum(2 * 15 * p.numel() for p in weights)
    assert found.effective_flops == sum(2 * 15 * int(p.count_nonzero()) for p in weights)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences_have_the_steps_that_they_have(kind) -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    model = kind(4, 6)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert summary(model, (packed,), batch_sizes=()).flops == 2 * 5 * weights


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind) -> None:
    model = kind(4, 6)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert summary(model, torch.randn(3, 4), batch_sizes=()).flops == 2 * 3 * weights


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="a newer torch has it")
def test_each_expert_meets_its_own_tokens() -> None:
    rows = [4, 0, 8]
    experts = torch.ones(3, 16, 32, dtype=torch.bfloat16)
    experts[0, :, 8:] = 0
    experts[2, :4] = 0
    ends = torch.tensor(rows).cumsum(0).to(torch.int32)
    model = Does(
        lambda m, x: torch.ops.aten._grouped_mm(x, m.w, offs=m.ends), w=nn.Parameter(experts)
    )
    model.register_buffer("ends", ends)
    found = summary(model, torch.ones(12, 16, dtype=torch.bfloat16), batch_sizes=())
    assert found.flops == 2 * 12 * 16 * 32
    assert found.effective_flops == 2 * (4 * 16 * 8 + 8 * 12 * 32)


def test_a_mixture_of_experts_by_hand() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(
        vocab_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        **sizes,
    )
    model = transformers.MixtralForCausalLM(config)
    tokens = torch.randint(0, 64, (2, 6))
    attention = 2 * 12 * (32 * 32 * 2 + 32 * 16 * 2) + 2 * 2 * 2 * 6 * 6 * 32
    experts = 12 * 2 * 2 * 3 * 32 * 48
    whole = 2 * (attention + experts + 2 * 12 * 32 * 4) + 2 * 12 * 32 * 64
    found = summary(model, {"input_ids": tokens}, batch_sizes=())
    if not found.uncounted:
        assert found.flops == pytest.approx(whole, rel=0.01)  # and the rotary angles' product
    else:
        assert found.flops is None


# --- what cannot be counted ----------------------------------------------------------------------


@torch.library.custom_op("drophot_tests::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x @ x


@torch.library.custom_op("drophot_tests::registered", mutates_args=())
def registered(x: Tensor) -> Tensor:
    return x @ x


register_flop_formula(torch.ops.drophot_tests.registered)(lambda shape, **_: 2 * shape[0] ** 3)

UNKNOWN = {
    "drophot_tests.square": square,
    "aten._fft_r2c": lambda x: torch.fft.fft(x).real,
    "aten.linalg_inv_ex": lambda x: torch.linalg.inv(x + 9 * torch.eye(4)),
    "aten._cdist_forward": lambda x: torch.cdist(x, x),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_torch_cannot_count_is_unknown_and_so_is_the_total(name: str) -> None:
    model = nn.Sequential(linear(), Does(lambda _, x: UNKNOWN[name](x)), linear())
    found = summary(model, torch.randn(4, 4), batch_sizes=())
    assert (found.flops, found.effective_flops) == (None, None)
    assert (found.counted_flops, found.uncounted) == (256, (name,))
    rows = {layer.name: (layer.flops, layer.uncounted) for layer in found.layers}
    assert rows == {"0": (128, ()), "1": (None, (name,)), "2": (128, ())}
    table = str(found).splitlines()
    assert table[3].split()[-2:] == ["?", "?"]
    assert table[-2].split()[-3:] == ["≥", "256", "?"]
    assert table[-1] == f"? not counted: {name}"


def test_a_part_that_is_known_is_a_lower_bound() -> None:
    model = Does(lambda m, x: square(m.w @ x), w=sparse(4, 4))
    (row,) = summary(model, torch.randn(4, 4), batch_sizes=()).layers
    assert (row.flops, row.counted_flops) == (None, 128)


def test_a_formula_of_ones_own_makes_it_known() -> None:
    found = summary(Does(lambda _, x: registered(x)), torch.randn(4, 4), batch_sizes=())
    assert (found.flops, found.effective_flops, found.uncounted) == (128, 128, ())


@pytest.mark.parametrize(
    "function",
    [
        F.normalize,
        lambda x: F.interpolate(x[None], scale_factor=2, mode="linear"),
        lambda x: x.sort().values,
        lambda x: F.layer_norm(x, (4,)),
        lambda x: torch.nn.functional.one_hot(x.argmax(-1)),
    ],
)
def test_what_has_no_products_is_known_to_have_none(function) -> None:
    found = summary(Does(lambda _, x: function(x)), torch.randn(4, 4), batch_sizes=())
    assert (found.flops, found.uncounted) == (0, ())


def test_channels_can_be_pruned_of_a_network_with_unknown_operators() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv(self.two(self.one(x).relu()) + 9 * torch.eye(4))

    pruned = prune_channels(Net(), 0.5, torch.randn(4, 4))
    assert pruned.flops == (2 * 4 * (32 + 32), 2 * 4 * (16 + 16))


# --- models of other kinds -----------------------------------------------------------------------


def test_a_learned_token_that_is_handed_on() -> None:
    """torch's own counter fails here: "Expected gradient function to be set"."""
    model = Does(
        lambda m, x: m.layer(m.token.expand(2, -1)) + x,
        token=nn.Parameter(torch.ones(1, 4)),
        layer=linear(),
    )
    assert summary(model, x, batch_sizes=()).flops == 64


def test_code_that_runs_without_a_call_is_its_callers() -> None:
    model = Does(lambda m, x: m.layer.forward(x), layer=linear())
    rows = {row.name: row.flops for row in summary(model, x, batch_sizes=()).layers}
    assert rows == {"(model)": 64, "layer": 0}


def test_a_branch_that_is_taken() -> None:
    model = Does(
        lambda m, x: torch.cond(
            x.sum() > 0, lambda x: torch.mm(x, x.T), lambda x: torch.mm(x, x.T) * 2, (x,)
        )
    )
    assert summary(model, x, batch_sizes=()).flops == 32


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("model", [nn.LazyLinear(4), nn.Linear(4, 4, device="meta")])
@pytest.mark.parametrize("inputs", [None, x])
def test_a_model_without_data_is_told_so(model: nn.Module, inputs: Tensor | None) -> None:
    with pytest.raises(ValueError, match="`model`.*`weight`"):
        summary(model, inputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_torchscript_is_told_so_where_operations_are_asked_for() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4))))
    assert summary(model).parameters == 20
    with pytest.raises(ValueError, match="`model`.*`0`.*TorchScript"):
        summary(model, x)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="`model`.* OrderedDict"):
        summary(nn.Linear(2, 2).state_dict())


def test_a_compiled_model_is_counted_as_it_is_written() -> None:
    def kernels(graph: Any, _: object) -> Callable[..., Any]:
        """A compiler whose code calls nothing that could be counted."""

        def run(*args: Any) -> Any:
            with torch.utils._python_dispatch._disable_current_modes():
                return graph(*args)

        return run

    model = torch.compile(nn.Sequential(linear(), nn.ReLU(), linear()), backend=kernels)
    model(x)
    found = summary(model, x, batch_sizes=(1,))  # without the warnings of what cannot be compiled
    assert (found.flops, found.effective_flops) == (128, 32)
    assert [sorted(layer.latency or ()) for layer in found.layers] == [[1], [1]]


def test_weights_of_eight_bits_are_counted() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]).to(torch.float8_e4m3fn), False)
    assert summary(model).nonzeros == 2


class StandInEvent:
    """An event of a GPU whose clock advances by as much as modules ask for."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.finished = False

    def record(self, stream: Any) -> None:
        self.time = StandInEvent.now

    def synchronize(self) -> None:
        self.finished = True

    def elapsed_time(self, end: "StandInEvent") -> float:
        assert end.finished
        return end.time - self.time


def test_on_a_gpu_the_time_is_that_of_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    class Takes(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            StandInEvent.now += 200.0 * self.in_features
            return super().forward(input)

    monkeypatch.setattr(torch.cuda, "Event", StandInEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = latency._clock(torch.device("cuda"))
    monkeypatch.setattr(latency, "_clock", lambda device: clock)
    model = nn.Sequential(Takes(1, 2), nn.Sequential(Takes(2, 1)))
    assert latency.latency(model, torch.ones(1, 1)) == pytest.approx(600)
    own = latency.layer_latencies(model, torch.ones(1, 1))
    assert own == pytest.approx({"": 0, "0": 200, "1": 0, "1.0": 400})
