"""Pruning by the kernels for GPUs, run by Triton's interpreter, against pruning on a CPU.

`test_interpreted.py` runs these tests in a process of their own, because Triton chooses its
interpreter when it is imported. To run them alone:

    TRITON_INTERPRET=1 python -m pytest tests/prune/interpreted_pruning.py
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from drophot import magnitude_prune
from drophot._core import order_statistics, radix_select
from drophot.prune import device_pruning, removal

few = settings(max_examples=6)
# NumPy, which the interpreter uses, warns of operations that overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WEIGHTS = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 1.5, -3.0, 6e-8, 6e4])  # one is denormal
Result = tuple[dict[str, Tensor], list[str], dict[str, Tensor]]


class Net(nn.Module):
    """Layers of odd sizes, one of which is not contiguous, and one empty."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 1)
        self.odd = nn.Linear(4, 7)
        self.conv = nn.Conv2d(4, 3, 2)
        self.cube = nn.Conv3d(4, 2, 2)
        self.transposed = nn.Linear(8, 5)
        self.empty = nn.Linear(2, 1)
        self.empty.weight = nn.Parameter(torch.empty(0, 4))

    def scattered(self) -> "Net":
        """The same values in another order in memory."""
        self.conv.to(memory_format=torch.channels_last)
        cube = self.cube.weight.detach().permute(4, 2, 0, 1, 3).contiguous()
        self.cube.weight = nn.Parameter(cube.permute(2, 3, 1, 4, 0))
        self.transposed.weight = nn.Parameter(self.transposed.weight.detach().t().clone().t())
        return self


@st.composite
def networks(draw: Any) -> nn.Module:
    net = Net()
    for parameter in net.parameters():
        if draw(st.booleans()):
            values = draw(st.lists(WEIGHTS, min_size=parameter.numel(), max_size=parameter.numel()))
            parameter.data.copy_(torch.tensor(values).view(parameter.shape))
    if draw(st.booleans()):
        net.odd.weight.data.zero_()
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=2))
    for module in net.children():  # each dtype takes a launch, which takes long here
        module.to(draw(st.sampled_from(dtypes)))
    return net.scattered() if draw(st.booleans()) else net


def importance(name: str, weight: nn.Parameter) -> Tensor:
    return (weight * torch.arange(weight.numel()).view(weight.shape)).round(decimals=1)


def magnitudes(name: str, weight: nn.Parameter) -> Tensor:
    return importance(name, weight).abs()


METHODS: list[dict[str, Any]] = [
    {},
    {"scope": "layer"},
    {"scope": "erk"},
    {"scope": "lamp"},
    {"min_kept": 0.3},
    {"importance": importance},
    {"importance": importance, "scope": "layer"},
    {"importance": magnitudes, "scope": "lamp"},
    {"pattern": "2:4", "skip": ("one",)},
    {"pattern": "2:4", "skip": ("one",), "importance": importance},
]


def pruned(model: nn.Module, calls: list[tuple[float, dict[str, Any]]]) -> list[Result | str]:
    """What each of several prunings of one model gives."""
    results: list[Result | str] = []
    for ratio, options in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                masks = magnitude_prune(model, ratio, **options)
            except ValueError as error:
                results.append(str(error))
                continue
        words = [str(one.message) for one in caught if one.category is not RuntimeWarning]
        results.append((masks.state_dict(), words, copy.deepcopy(model.state_dict())))
    return results


def on_a_cpu(function: Callable[..., Any], *arguments: Any) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "0")
        return function(*arguments)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@few
@given(networks(), st.sampled_from(METHODS), st.sampled_from([0, 0.1, 0.5, 0.8, 0.99]), st.data())
def test_kernels_prune_the_same_weights(
    net: nn.Module, method: dict[str, Any], ratio: float, data: st.DataObject
) -> None:
    calls = [(0.5 if "pattern" in method else ratio, method)]
    for again in data.draw(st.lists(st.sampled_from(METHODS), max_size=1)):
        calls.append((0.5 if "pattern" in again else min(ratio + 0.2, 0.99), again))
    twin = copy.deepcopy(net)
    for found, expected in zip(pruned(net, calls), on_a_cpu(pruned, twin, calls), strict=True):
        if isinstance(found, str):
            assert found == expected
            continue
        masks, words, state = found
        assert words == expected[1]
        assert list(masks) == list(expected[0])
        for name, mask in masks.items():
            assert torch.equal(mask, expected[0][name]), name
            assert mask.is_contiguous()
        for name, tensor in state.items():
            assert torch.equal(bits(tensor), bits(expected[2][name])), name


@pytest.mark.parametrize("levels", [1, 3, 1 << 20])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_several_chunks(scope: str, levels: int) -> None:
    net = nn.Sequential(nn.Linear(150, 120), nn.Linear(5, 4))
    for parameter in net.parameters():
        parameter.data.copy_(torch.randint(1, levels + 1, parameter.shape))
    twin, calls = copy.deepcopy(net), [(0.3, {"scope": scope})]
    (found,), (expected,) = pruned(net, calls), on_a_cpu(pruned, twin, calls)
    assert all(torch.equal(mask, expected[0][name]) for name, mask in found[0].items())


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    radix_select._works_on.cache_clear()
    monkeypatch.setattr(radix_select, "choose_digit", lambda *_, **__: None)
    assert not radix_select.has_kernels([torch.zeros(3)])
    radix_select._works_on.cache_clear()
    monkeypatch.undo()
    assert radix_select.has_kernels([torch.zeros(3)])


def test_old_gpus_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix_select, "_finds_a_threshold", lambda _: True)
    for capability, expected in [((6, 1), False), ((7, 0), True), ((9, 0), True)]:
        radix_select._works_on.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert radix_select._works_on(torch.device("cuda", 0)) == expected
    radix_select._works_on.cache_clear()


@pytest.mark.parametrize("scattered", [False, True])
def test_autograd_sees_the_change(scattered: bool) -> None:
    net = Net().scattered() if scattered else Net()
    before = [parameter._version for parameter in net.parameters()]
    magnitude_prune(net, 0.5)
    changed = [p._version > v for p, v in zip(net.parameters(), before, strict=True)]
    assert changed == [p.dim() > 1 and p.numel() > 0 for p in net.parameters()]


def test_values_in_another_order_in_memory() -> None:
    weights = [nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    values = [torch.randn(4, 6).t(), torch.randn(6, 4)]
    expected = [value.flatten() > value.flatten().sort().values[8] for value in values]
    masks = device_pruning.prune_smallest(
        weights, [0, 1], [9, 9], earlier=[None, None], values=values
    ).masks
    for mask, kept, weight in zip(masks, expected, weights, strict=True):
        assert torch.equal(mask.flatten(), kept)
        assert torch.equal(weight.detach() != 0, mask)


def sharing(memory: Tensor) -> nn.Module:
    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    for number, (layer, begin) in enumerate(zip(net, (0, 32, 64), strict=True)):
        values = memory[begin : begin + 64].view(8, 8)
        layer.weight = nn.Parameter(values.t() if number == 2 else values)
    return net


@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}])
def test_weights_that_share_memory_are_pruned_one_after_the_other(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = torch.randn(8 * 16)
    net, twin = (sharing(memory.clone()) for _ in range(2))
    for name in ("prune_smallest", "prune_groups"):
        monkeypatch.setattr(device_pruning, name, None)  # is not called
    (found,) = pruned(net, [(0.5, options)])
    (expected,) = on_a_cpu(pruned, twin, [(0.5, options)])
    assert not isinstance(found, str)
    assert not isinstance(expected, str)
    assert all(torch.equal(mask, expected[0][name]) for name, mask in found[0].items())


def test_weights_that_share_memory_without_overlapping_are_pruned_together() -> None:
    memory = torch.arange(1.0, 33.0)
    weights = {"a": memory[:16].view(4, 4), "b": memory[16:].view(4, 4).t()}
    assert removal._are_pruned_together(weights, {})
    assert not removal._are_pruned_together(weights | {"c": memory[15:17]}, {})


def test_weights_that_are_not_finite_are_refused() -> None:
    net = Net()
    net.odd.weight.data[0, :2] = torch.tensor([torch.nan, torch.inf])
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"2 are NaN or infinite.*`odd.weight`"):
        magnitude_prune(net, 0.5)
    assert all(torch.equal(bits(v), bits(state[k])) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("value", "options", "words"),
    [
        (torch.nan, {}, "`one.weight`"),
        (-1.0, {"scope": "lamp"}, "-1 for `one.weight`"),
    ],
)
def test_importances_are_checked(value: float, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        magnitude_prune(Net(), 0.5, importance=lambda _, w: torch.full_like(w, value), **options)


@given(
    st.lists(st.lists(WEIGHTS, max_size=9), min_size=1, max_size=4),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.data(),
)
@few
def test_thresholds_and_counts(
    layers: list[list[float]], dtype: torch.dtype, signed: bool, data: st.DataObject
) -> None:
    tensors = [torch.tensor(layer, dtype=dtype) for layer in [*layers, [1.0]]]
    masks: list[Tensor | None] = [
        torch.rand(len(tensor)) < 0.5 if data.draw(st.booleans()) else None for tensor in tensors
    ]
    remove = data.draw(st.integers(0, sum(map(len, tensors))))

    def found() -> Any:
        layers = order_statistics.Layers(tensors, remove, masks)
        threshold = order_statistics.magnitude_threshold(layers, signed=signed)
        return threshold, order_statistics.count_removed(threshold, layers)

    assert found() == on_a_cpu(found)


class Operations(TorchDispatchMode):
    """Counts operations and the bytes of all memory that they allocate, even if it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        result = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in storages([*args, *(kwargs or {}).values()])}
        self.bytes += sum(s.nbytes() for s in storages([result]) if s.data_ptr() not in given)
        return result


def storages(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    for value in values:
        if isinstance(value, Tensor):
            yield value.untyped_storage()
        elif isinstance(value, tuple | list):
            yield from storages(value)


# Operations that launch nothing on a device.
FREE = ("aten.detach", "aten.view", "aten.split", "aten.empty", "aten.promote_types")


def operations(num_layers: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Counter[str]:
    """The launches of kernels and other operations of one pruning."""
    launches: Counter[str] = Counter()

    def counted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launches[kernel.__name__] += 1
        launch(kernel, *arguments, **constants)

    assert radix_select.has_kernels([torch.zeros(3)])  # which launches kernels the first time
    launch = radix_select.launch
    with monkeypatch.context() as patched:
        patched.setattr(radix_select, "launch", counted)
        model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(num_layers)))
        for weight in model.parameters():
            weight.data.copy_(torch.arange(1.0, 17).view(4, 4))  # no layer loses more than others
        with Operations() as seen:
            magnitude_prune(model, 0.5, **options)
    names = {name: n for name, n in seen.names.items() if not name.startswith(FREE)}
    return launches + Counter(names)


@pytest.mark.parametrize(
    "options", [{}, {"scope": "layer"}, {"scope": "erk"}, {"min_kept": 0.4}, {"pattern": "2:4"}]
)
def test_there_is_no_loop_over_layers(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (operations(number, monkeypatch, **options) for number in (2, 5))
    assert many == few
    assert few["count_values"] == 1
    if "pattern" not in options and "min_kept" not in options:
        assert few["count_digits"] == 4  # of 8 bits, for float32


def test_memory() -> None:
    model = nn.Sequential(nn.Linear(300, 200, bias=False), nn.Linear(200, 100, bias=False))
    size = sum(parameter.nbytes for parameter in model.parameters())
    with Operations() as seen:
        magnitude_prune(model, 0.8)
    assert size / 4 < seen.bytes < 0.4 * size  # the masks take a quarter
