import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import references
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer, RMSprop
from torch.optim.sgd import SGD
from torch.utils.data import TensorDataset

from drophot import Masks, evaluate, magnitude_prune, summary
from drophot.models import lenet

SCOPES = ["global", "layer"]
ratios = st.floats(0, 1, exclude_max=True)


def linears(*weights: Any, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A module whose Linear weights are these vectors."""
    layers = [nn.Linear(len(w), 1, dtype=dtype) for w in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data.copy_(torch.as_tensor(weight)[None])
    return nn.Sequential(*layers)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def zeros(model: nn.Module, names: Any) -> int:
    parameters = dict(model.named_parameters())
    return sum(int((parameters[name] == 0).sum()) for name in names)


# --- which weights go --------------------------------------------------------------------------

few = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -2.0])
vectors = st.lists(
    st.one_of(
        st.lists(few, min_size=1, max_size=12),
        st.lists(st.floats(-3, 3, width=16), min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=4,
)


ZEROS = pytest.mark.filterwarnings("ignore:.*Masks.from_zeros")  # there are more than asked for


@ZEROS
@given(vectors, ratios, st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_global_pruning_equals_sorting_all_magnitudes(
    weights: list[list[float]], ratio: float, dtype: torch.dtype
) -> None:
    model = linears(*weights, dtype=dtype)
    before = [layer.weight.detach().clone() for layer in model]
    total = sum(w.numel() for w in before)
    remove = int(ratio * total + 0.5)
    # A layer of zeros has nothing to rank, unless all are.
    ranked = [w.any() or not any(map(torch.any, before)) for w in before]
    arrays = [w.numpy() for w, of in zip(before, ranked, strict=True) if of]
    size = sum(a.size for a in arrays)
    if remove > size:
        with pytest.raises(ValueError, match=f"`ratio`.*{remove} .*{size} "):
            magnitude_prune(model, ratio)
        assert all(torch.equal(a.weight, b) for a, b in zip(model, before, strict=True))
        return
    masks = magnitude_prune(model, ratio)
    edge, below, tied = references.pruned(arrays, remove / size)
    assert sum(int((~m).sum()) for m in masks.values()) == remove
    assert below <= remove <= below + tied
    for layer, old, mask, of in zip(model, before, masks.values(), ranked, strict=True):
        assert torch.equal(layer.weight, torch.where(mask, old, 0))
        assert mask[old.abs() > edge].all()
        assert not of or not mask[old.abs() < edge].any()
        assert of or mask.all()


@ZEROS
@given(vectors, ratios)
def test_layer_pruning_is_global_pruning_of_each_layer(
    weights: list[list[float]], ratio: float
) -> None:
    model = linears(*weights)
    alone = [magnitude_prune(linears(w), ratio)["0.weight"] for w in weights]
    masks = magnitude_prune(model, ratio, scope="layer")
    assert list(masks) == [f"{i}.weight" for i in range(len(weights))]
    for mask, other in zip(masks.values(), alone, strict=True):
        assert torch.equal(mask, other)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100, 4097])
def test_exact_to_the_weight_for_every_ratio_and_size(size: int, scope: Any) -> None:
    generator = torch.Generator().manual_seed(size)
    for ratio in (0, 0.01, 0.145, 0.2, 0.29, 0.35, 0.5, 0.8, 0.999):
        model = linears(torch.randn(size, generator=generator))
        masks = magnitude_prune(model, ratio, scope=scope)
        expected = int(ratio * size + 0.5)
        assert zeros(model, masks) == expected
        assert masks.sparsity == expected / size


def test_halves_are_rounded_up_not_to_even() -> None:
    for size, removed in ((3, 2), (5, 3), (1, 1), (7, 4)):
        assert zeros(model := linears(torch.arange(1.0, size + 1)), ["0.weight"]) == 0
        magnitude_prune(model, 0.5)
        assert zeros(model, ["0.weight"]) == removed


@ZEROS
@given(vectors, ratios, ratios, st.sampled_from(["global", "layer", "erk", "lamp"]))
def test_a_higher_ratio_removes_more_and_brings_nothing_back(
    weights: list[list[float]], one: float, other: float, scope: Any
) -> None:
    small, large = sorted((one, other))
    weights = [w for w in weights if any(w)] or [[1.0]]
    model = linears(*weights)
    first = magnitude_prune(model, small, scope=scope)
    values = [layer.weight.detach().clone() for layer in model]
    second = magnitude_prune(model, large, scope=scope)
    for name in first:
        assert not (second[name] & ~first[name]).any()
    for layer, value, mask in zip(model, values, second.values(), strict=True):
        assert torch.equal(layer.weight, torch.where(mask, value, 0))
    again = magnitude_prune(model, large, scope=scope)
    assert all(torch.equal(again[name], second[name]) for name in second), "twice is once"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that less was asked for
        less = magnitude_prune(model, small, scope=scope)
    assert all(torch.equal(less[name], second[name]) for name in second), "nothing comes back"


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_thousands_of_ties_is_exact(dtype: torch.dtype, scope: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 100)).to(dtype)
    for layer in model:
        layer.weight.data.mul_(256).round_().div_(256)
    before = [layer.weight.detach().clone() for layer in model]
    flat = torch.cat([w.flatten() for w in before]).abs()
    edge = flat.float().kthvalue(int(0.8 * len(flat) + 0.5)).values
    assert (flat == edge).sum() > 2000, "the case should have ties at the edge"
    masks = magnitude_prune(model, 0.8, scope=scope)
    assert sum(int((~m).sum()) for m in masks.values()) == 0.8 * len(flat)
    if scope == "layer":
        assert [int((~m).sum()) for m in masks.values()] == [72_000, 24_000]


def test_ties_at_the_edge_go_evenly_from_all_layers() -> None:
    """Peers prune all-equal weights from the first layer on, or all of them."""
    model = linears(torch.ones(1000), torch.ones(3_000_000), -torch.ones(10))
    masks = magnitude_prune(model, 0.3)
    removed = [int((~m).sum()) for m in masks.values()]
    assert sum(removed) == int(0.3 * 3_001_010 + 0.5)
    assert removed[0] == 300
    assert removed[2] == 3
    assert abs(int((~masks["1.weight"][0, :1_000_000]).sum()) - 300_000) <= 1


def test_mixed_dtypes_are_ranked_together() -> None:
    values = torch.tensor([0.1, 0.2, 0.3, 0.4])
    model = linears(values + 0.01)
    model.append(nn.Linear(4, 1).to(torch.bfloat16))
    model[1].weight.data.copy_(values[None])
    model.append(nn.Linear(2, 1).double())
    model[2].weight.data.copy_(torch.tensor([[0.05, 9.0]]))
    masks = magnitude_prune(model, 0.5)
    assert [m[0].tolist() for m in masks.values()] == [
        [False, False, True, True],
        [False, False, True, True],
        [False, True],
    ]


def test_the_widest_dtype_decides_wherever_it_stands() -> None:
    """0.5 and the double just above it are one number in bfloat16, and in float32."""
    model = linears([0.5, 2.0]).to(torch.bfloat16)
    model.append(nn.Linear(2, 1).double())
    model[1].weight.data.copy_(torch.tensor([[0.5 + 1e-12, 0.5 - 1e-12]], dtype=torch.float64))
    masks = magnitude_prune(model, 0.5)
    assert [m[0].tolist() for m in masks.values()] == [[False, True], [True, False]]


def test_shared_weights_count_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(10, 10), "b": nn.Linear(10, 10), "c": nn.Linear(10, 10)})
    model["b"].weight = model["a"].weight
    model["again"] = model["c"]
    masks = magnitude_prune(model, 0.5)
    assert list(masks) == ["a.weight", "c.weight"]
    assert zeros(model, masks) == 100


def test_linear_conv_attention_and_recurrent_layers_are_prunable_and_nothing_else() -> None:
    model = nn.ModuleDict({
        "linear": nn.Linear(4, 4),
        "conv1": nn.Conv1d(2, 2, 3),
        "conv3": nn.Conv3d(2, 2, 3),
        "up": nn.ConvTranspose2d(2, 2, 3),
        "attention": nn.MultiheadAttention(4, 2),
        "mixed": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        "norm": nn.BatchNorm1d(4),
        "layer_norm": nn.LayerNorm(4),
        "embedding": nn.Embedding(4, 4),
        "gru": nn.GRU(4, 4),
    })
    before = copy.deepcopy(model.state_dict())
    masks = magnitude_prune(model, 0.5)
    assert list(masks) == [
        "linear.weight",
        "conv1.weight",
        "conv3.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "mixed.q_proj_weight",
        "mixed.k_proj_weight",
        "mixed.v_proj_weight",
        "mixed.out_proj.weight",
        "gru.weight_ih_l0",
        "gru.weight_hh_l0",
    ]
    for name, value in model.state_dict().items():
        if name not in masks:
            assert torch.equal(value, before[name]), name


def test_skip_takes_modules_parameters_and_other_names_of_a_shared_weight() -> None:
    def named() -> nn.Sequential:
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
        model[1].weight = model[0][1].weight
        return model

    assert list(magnitude_prune(named(), 0.5, skip=["0.0"])) == ["0.1.weight"]
    assert list(magnitude_prune(named(), 0.5, skip=("1",))) == ["0.0.weight"]
    assert list(magnitude_prune(named(), 0.5, skip={"0.0.weight"})) == ["0.1.weight"]
    masks = magnitude_prune(model := named(), 0.5, skip=["0.0"])
    assert zeros(model, ["0.0.weight"]) == 0
    assert masks.sparsity == 0.5
    with pytest.raises(ValueError, match=r"`model`.*Sequential.*`skip`"):
        magnitude_prune(named(), 0.5, skip=["0"])


def test_memory_format_and_strides_do_not_matter() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 8, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    odd = copy.deepcopy(plain)
    odd.weight = nn.Parameter(torch.zeros(8, 16, 3, 3)[:, ::2].copy_(plain.weight.detach()))
    assert not odd.weight.is_contiguous()
    masks = magnitude_prune(plain, 0.7)
    for other in (last, odd):
        strides = other.weight.stride()
        assert torch.equal(magnitude_prune(other, 0.7)["weight"], masks["weight"])
        assert torch.equal(other.weight, plain.weight)
        assert other.weight.stride() == strides


def test_blocks_do_not_show() -> None:
    """A weight larger than the block that is looked at in one go."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((1 << 21) + 77, generator=generator)
    weight[::5] = 0.25
    model = linears(weight)
    masks = magnitude_prune(model, 0.3)
    edge, below, _ = references.pruned([weight.numpy()], 0.3)
    removed = int(0.3 * len(weight) + 0.5)
    assert int((~masks["0.weight"]).sum()) == removed
    assert below < removed
    assert edge == 0.25
    assert torch.equal(model[0].weight, torch.where(masks["0.weight"], weight, 0))


def test_zeros_are_plain_zeros() -> None:
    masks = magnitude_prune(model := linears([-1.0, -2.0, 3.0, 4.0]), 0.5)
    assert np.signbit(model[0].weight.detach().numpy()).sum() == 0
    model[0].weight.data.fill_(-1)
    masks.apply()
    assert np.signbit(model[0].weight.detach().numpy()).sum() == 2


@pytest.mark.slow
def test_the_published_lenet_pruned_layer_by_layer_scores_what_its_authors_published(
    mnist_root: Any, published_lenet: Any
) -> None:
    torchvision = pytest.importorskip("torchvision")
    images = torchvision.datasets.MNIST(mnist_root, False)
    pixels = images.data[:, None] / 255  # as ToTensor and Normalize(0.5, 0.5), but all at once
    test_set = TensorDataset((pixels - 0.5) / 0.5, images.targets)
    weights = {name: torch.from_numpy(array) for name, array in np.load(published_lenet).items()}
    found = []
    for ratio in (0, 0.2, 0.4, 0.6, 0.8):
        model = lenet()
        model.load_state_dict(weights)
        magnitude_prune(model, ratio, scope="layer")
        found.append(round(100 * evaluate(model, test_set), 2))
    assert found == [98.92, 98.91, 98.46, 93.18, 43.24]


# --- masks that hold ---------------------------------------------------------------------------

OPTIMIZERS: list[Callable[[Any], Optimizer]] = [
    partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    partial(AdamW, lr=0.01, weight_decay=0.1),
    partial(RMSprop, lr=0.01, momentum=0.9, weight_decay=0.01),
    partial(Adam, lr=0.01, amsgrad=True),
]


def steps(model: nn.Module, optimizer: Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        inputs = torch.randn(8, 1, 6, 6, generator=generator)
        targets = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_zeros_hold_through_steps_with_state_from_dense_training(
    make: Callable[[Any], Optimizer],
) -> None:
    model = network()
    optimizer = make(model.parameters())
    steps(model, optimizer, 5)
    masks = magnitude_prune(model, 0.8)
    expected = zeros(model, masks)
    with masks.hold(optimizer):
        for _ in range(5):
            steps(model, optimizer, 1)
            assert zeros(model, masks) == expected
            for name, weight in model.named_parameters():
                if name in masks:
                    assert (weight[masks[name]] != 0).all(), "what is kept is trained"
    steps(model, optimizer, 1)
    assert zeros(model, masks) < expected, "lifted, the weights come back"


def test_held_training_equals_masking_after_each_step() -> None:
    def trained(hold: bool) -> nn.Module:
        model = network()
        optimizer = AdamW(model.parameters(), lr=0.01)
        masks = magnitude_prune(model, 0.6)
        if hold:
            masks.hold(optimizer)
            steps(model, optimizer, 6)
        else:
            generator = torch.Generator().manual_seed(5)
            for _ in range(6):
                inputs = torch.randn(8, 1, 6, 6, generator=generator)
                targets = torch.randint(3, (8,), generator=generator)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                with torch.no_grad():
                    for name, weight in model.named_parameters():
                        if name in masks:
                            weight[~masks[name]] = 0
        return model

    one, other = trained(True), trained(False)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_holding_zeroes_at_once_and_only_what_the_optimizer_trains() -> None:
    model = network()
    masks = magnitude_prune(model, 0.5)
    model[4].weight.data.fill_(1)
    optimizer = SGD([model[4].weight], lr=0.1)
    handle = masks.hold(optimizer)
    assert zeros(model, ["4.weight"]) == int((~masks["4.weight"]).sum())
    with pytest.warns(UserWarning, match="13 of 1,194"):
        steps(model, optimizer, 1)
    assert zeros(model, ["4.weight"]) == int((~masks["4.weight"]).sum())
    handle.remove()
    steps(model, optimizer, 1)
    assert zeros(model, ["4.weight"]) < 50, "lifted, they are trained again"


def test_masks_loaded_while_held_are_the_ones_held() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    first = magnitude_prune(copy.deepcopy(model), 0.8).state_dict()
    masks = magnitude_prune(model, 0.5)
    masks.hold(optimizer)
    steps(model, optimizer, 1)
    masks.load_state_dict(first)
    steps(model, optimizer, 1)
    assert masks.sparsity == pytest.approx(0.8, abs=1e-3)
    assert zeros(model, masks) == sum(int((~m).sum()) for m in first.values())


def test_a_stranger_to_the_masks_is_refused() -> None:
    model = network()
    masks = magnitude_prune(model, 0.5)
    with pytest.raises(ValueError, match="`optimizer`.*pruned"):
        masks.hold(SGD(copy.deepcopy(model).parameters(), lr=0.1))
    with pytest.raises(TypeError, match="`optimizer`.*Sequential"):
        masks.hold(model)  # type: ignore[arg-type]


# --- masks as a mapping, saved and loaded ------------------------------------------------------


def test_masks_are_a_mapping_of_bool_tensors() -> None:
    model = network()
    masks = magnitude_prune(model, 0.5)
    assert list(masks) == ["0.weight", "4.weight", "6.weight"]
    assert len(masks) == 3
    assert "4.bias" not in masks
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert mask.shape == parameters[name].shape
    assert repr(masks) == "Masks(3 tensors, 1,194 of 2,388 weights removed, sparsity 0.5000)"


@given(vectors, ratios)
def test_from_zeros_finds_the_masks_again(weights: list[list[float]], ratio: float) -> None:
    model = linears(*([w or 1.0 for w in vector] for vector in weights))
    masks = magnitude_prune(model, ratio)
    found = Masks.from_zeros(model)
    assert list(found) == list(masks)
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    assert found.sparsity == masks.sparsity


def test_masks_survive_saving_and_are_refused_elsewhere() -> None:
    model = network()
    masks = magnitude_prune(model, 0.5)
    file = io.BytesIO()
    torch.save(masks.state_dict(), file)
    file.seek(0)
    other = network()
    taken = Masks.from_zeros(other)
    assert taken.sparsity == 0
    taken.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(taken[name], masks[name]) for name in masks)
    assert torch.equal(other[4].weight, model[4].weight)

    wrong = {("weight" if n == "4.weight" else n): m for n, m in masks.items()}
    with pytest.raises(ValueError, match=r"`state_dict`.*\['4.weight', 'weight'\]"):
        taken.load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"`state_dict.*\(3, 16\).*torch.bool.*\(16, 3\)"):
        taken.load_state_dict({**masks, "6.weight": masks["6.weight"].t()})
    with pytest.raises(ValueError, match=r"torch.float32"):
        taken.load_state_dict({**masks, "0.weight": masks["0.weight"].float()})
    assert all(torch.equal(taken[name], masks[name]) for name in masks), "nothing has changed"


def test_state_dicts_are_copies() -> None:
    model = network()
    masks = magnitude_prune(model, 0.5)
    state = masks.state_dict()
    state["0.weight"].fill_(False)
    assert masks["0.weight"].any()
    masks.load_state_dict(given := masks.state_dict())
    given["0.weight"].fill_(False)
    assert masks["0.weight"].any()


# --- the model stays the model -----------------------------------------------------------------


def test_a_pruned_model_is_a_plain_model() -> None:
    model = network()
    keys = list(model.state_dict())
    optimizer = SGD(model.parameters(), lr=0.1)
    magnitude_prune(model, 0.5).hold(optimizer)
    assert list(model.state_dict()) == keys
    assert not model._forward_hooks
    assert [name for name, _ in model.named_buffers()] == [
        name for name, _ in network().named_buffers()
    ]
    inputs = torch.randn(2, 1, 6, 6)
    expected = model.eval()(inputs)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = network()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded.eval()):
        assert torch.equal(other(inputs), expected)
        assert Masks.from_zeros(other).sparsity == 0.5
    copied = copy.deepcopy(optimizer)
    assert type(copied) is SGD


def test_masks_and_model_are_copied_together() -> None:
    model = network()
    twin, masks = copy.deepcopy((model, magnitude_prune(model, 0.5)))
    optimizer = SGD(twin.parameters(), lr=0.1)
    with masks.hold(optimizer):
        steps(twin, optimizer, 2)
    assert Masks.from_zeros(twin).sparsity == 0.5
    pickle.loads(pickle.dumps(masks)).apply()


def test_export_and_compile_work_as_before() -> None:
    model = network().eval()
    magnitude_prune(model, 0.5)
    inputs = torch.randn(2, 1, 6, 6)
    expected = model(inputs)
    exported = torch.export.export(model, (inputs,)).module()
    assert torch.allclose(exported(inputs), expected, atol=1e-6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(inputs), expected, atol=1e-6)


def test_a_compiled_model_trains_with_held_masks() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    masks = magnitude_prune(model, 0.5)
    with masks.hold(optimizer):
        steps(compiled, optimizer, 3)  # type: ignore[arg-type]
    assert Masks.from_zeros(model).sparsity == 0.5
    assert list(magnitude_prune(compiled, 0.6)) == [  # type: ignore[arg-type]
        f"_orig_mod.{name}" for name in masks
    ]


def test_masks_hold_under_ddp(tmp_path: Any) -> None:
    meeting = f"file://{tmp_path}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        model = network()
        masks = magnitude_prune(model, 0.5)
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = AdamW(wrapped.parameters(), weight_decay=0.1)
        with masks.hold(optimizer):
            steps(wrapped, optimizer, 3)
        assert Masks.from_zeros(model).sparsity == 0.5
        assert list(Masks.from_zeros(wrapped)) == [f"module.{name}" for name in masks]
    finally:
        torch.distributed.destroy_process_group()


# --- wrong use ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1, -0.1, 10, 80, float("nan"), float("inf")])
def test_a_ratio_out_of_range_is_named(ratio: float) -> None:
    hint = r"0\.1" if ratio == 10 else r"0\.8"
    with pytest.raises(ValueError, match=rf"`ratio` .*\[0, 1\).* {ratio}\. .*{hint}"):
        magnitude_prune(network(), ratio)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio": None}, TypeError, "`ratio` .*NoneType"),
        ({"ratio": "0.8"}, TypeError, "`ratio` .* str"),
        ({"ratio": b"0.8"}, TypeError, "`ratio` .* bytes"),
        ({"ratio": True}, TypeError, "`ratio` .* bool"),
        ({"scope": "all"}, ValueError, "`scope`.*'all'"),
        ({"skip": "4"}, TypeError, r"`skip`.*'4'.*\('4',\)"),
        ({"skip": ["4.weigth"]}, ValueError, "`skip`.*'4.weigth'.*'4.weight'"),
        ({"skip": ["Q"]}, ValueError, "`skip`.*'Q'.*model.named_modules"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        magnitude_prune(network(), **({"ratio": 0.5} | arguments))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(
    value: float, dtype: torch.dtype, scope: Any
) -> None:
    model = network().to(dtype)
    model[6].weight.data[1, 2] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"`model`.* 1 .*`6.weight`"):
        magnitude_prune(model, 0.5, scope=scope)
    for name, old in before.items():
        assert torch.equal(model.state_dict()[name].nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.BatchNorm1d(3), ValueError, "BatchNorm1d has none"),
        (nn.Sequential(), ValueError, "Sequential has none"),
        (nn.LazyLinear(3), ValueError, "`weight`.*no data"),
        (nn.Linear(3, 3, device="meta"), ValueError, "`weight`.*no data"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), ValueError, "parametrization"),
        (nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))), ValueError, "0"),
    ],
)
def test_a_model_that_cannot_be_pruned_says_why(
    model: nn.Module, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        magnitude_prune(model, 0.5)


@pytest.mark.parametrize(
    ("model", "found"),
    [(network().state_dict(), "OrderedDict"), ("model.pt", "'model.pt'"), (0.8, "0.8")],
)
def test_what_is_no_module_is_named(model: Any, found: str) -> None:
    for do in (Masks.from_zeros, lambda model: magnitude_prune(model, 0.5)):
        with pytest.raises(TypeError, match=f"`model`.*{found}"):
            do(model)


def test_weights_that_are_not_plain_floats_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="`1.weight`.*torch.int8"):
        magnitude_prune(model, 0.5)
    model[1].weight = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    with pytest.raises(ValueError, match="`1.weight`.*torch.sparse_coo"):
        magnitude_prune(model, 0.5)


def test_a_parametrized_layer_can_be_skipped() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(normed, nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"`0.weight`.*skip=\('0',\)"):
        magnitude_prune(model, 0.5)
    assert list(magnitude_prune(model, 0.5, skip=("0",))) == ["1.weight"]


# --- summary -----------------------------------------------------------------------------------


def test_summary_counts_by_hand() -> None:
    model = network().to(torch.float64)
    magnitude_prune(model, 0.5, scope="layer")
    model.train()
    result = summary(model, torch.randn(2, 1, 6, 6, dtype=torch.float64))
    assert [layer.name for layer in result.layers] == ["0", "1", "4", "6"]
    assert [layer.kind for layer in result.layers] == ["Conv2d", "BatchNorm2d", "Linear", "Linear"]
    assert [layer.parameters for layer in result.layers] == [40, 8, 2320, 51]
    assert result.layers[0].nonzeros == 4 * 9 // 2 + 4
    assert result.layers[3].nonzeros == 24 + 3
    # Two operations for each multiply-add, batch of 2.
    assert [layer.flops for layer in result.layers] == [
        2 * 2 * 36 * 4 * 9,
        0,
        2 * 2 * 144 * 16,
        2 * 2 * 16 * 3,
    ]
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.nonzeros == sum(int((p != 0).sum()) for p in model.parameters())
    assert result.bytes == 8 * result.parameters
    assert result.flops == sum(layer.flops or 0 for layer in result.layers)
    assert result.sparsity == 1 - result.nonzeros / result.parameters
    assert model.training


def test_summary_without_inputs_and_of_shared_weights() -> None:
    model = nn.ModuleDict({"a": nn.Linear(10, 10), "b": nn.Linear(10, 10)})
    model["b"].weight = model["a"].weight
    result = summary(model)
    assert [layer.parameters for layer in result.layers] == [110, 10]
    assert result.flops is None
    assert all(layer.flops is None for layer in result.layers)
    table = str(result).splitlines()
    assert table[0].split() == [
        "layer",
        "kind",
        "parameters",
        "non-zero",
        "sparsity",
        "bytes",
        "compressed",
    ]
    assert table[-1].split() == ["total", "120", "120", "0.0000", "480", "480"]


def test_summary_puts_operations_where_they_are_made() -> None:
    """Attention's own products at the attention, its Linear's elsewhere; a sum that is all."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.ModuleList([layer])[0], nn.Linear(8, 2))
    model.eval()
    result = summary(model, torch.randn(1, 5, 8))
    flops = {layer.name: layer.flops for layer in result.layers}
    assert flops["0.linear1"] == 2 * 5 * 8 * 16
    assert flops["1"] == 2 * 5 * 8 * 2
    projections, products = 2 * 5 * 8 * 32, 2 * 2 * 5 * 5 * 8
    assert flops["0.self_attn"] == projections + products
    assert sum(count or 0 for count in flops.values()) == result.flops
    assert torch.backends.mha.get_fastpath_enabled()


def test_summary_takes_several_inputs_and_wrong_ones_leave_no_trace() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a + b)

    model = Two()
    assert summary(model, (torch.zeros(1, 3), torch.zeros(1, 3))).flops == 12
    with pytest.raises(RuntimeError):
        summary(model, (torch.zeros(1, 4), torch.zeros(1, 4)))
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()
