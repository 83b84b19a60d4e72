"""The library's own arithmetic gives the same under every mode that a user may have switched on."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drophot import (
    CrestLoader,
    FreshSubset,
    LossSampling,
    Masks,
    Stratified,
    facility_location,
    k_center,
    magnitude_prune,
    select,
)
from drophot._core.exact_arithmetic import exact


@contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def default_device() -> torch.device | None:
    """`None` if it is the CPU: to set it to the CPU would leave a function mode behind."""
    device = torch.get_default_device()
    return None if device.type == "cpu" else device


def precision(value: str) -> Any:
    return setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value)


MODES: dict[str, Callable[[], Any]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "float64 by default": lambda: setting(
        torch.get_default_dtype, torch.set_default_dtype, torch.float64
    ),
    "float16 by default": lambda: setting(
        torch.get_default_dtype, torch.set_default_dtype, torch.float16
    ),
    "another default device": lambda: setting(default_device, torch.set_default_device, "meta"),
    "a surrounding device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "medium precision": lambda: precision("medium"),
}

DRAWS = torch.Generator().manual_seed(0)
ROWS = torch.randn(300, 40, generator=DRAWS)
SCORES = torch.randint(0, 9, (300,), generator=DRAWS)
CLASSES = torch.arange(300) % 3
STARTS = [torch.randn(shape, generator=DRAWS) / 6 for shape in ((9, 40), (9,), (3, 9), (3,))]
WEIGHTS = torch.randn(2, 40, 40, generator=DRAWS)


def coreset(selector: Any, **arguments: Any) -> Callable[[], list[Tensor]]:
    def choose() -> list[Tensor]:
        found = selector(ROWS, 0.1, **arguments)
        weights = [] if found.weights is None else [found.weights]
        return [found.indices, found.ranking, found.gains, *weights]

    return choose


def losses() -> list[Tensor]:
    sampling = LossSampling(300, 0.5, device="cpu")
    sampling.update(CLASSES[:30], SCORES[:30])
    sampling.update(torch.arange(300, device="cpu"), SCORES)
    return [sampling.losses, sampling.begin(), sampling.weights(CLASSES)]


def pruned(scope: Any, **arguments: Any) -> Callable[[], list[Tensor]]:
    def prune() -> list[Tensor]:
        kind = {"device": "cpu", "dtype": torch.float32}
        model = nn.Sequential(nn.Linear(40, 40, **kind), nn.Linear(40, 40, **kind))
        for layer, weight in zip(model, WEIGHTS, strict=True):
            layer.weight.data.copy_(weight)
        masks = magnitude_prune(model, 0.5, scope=scope, **arguments)
        found = Masks.from_zeros(model)
        found.load_state_dict(masks.state_dict())
        found.zero()
        return [
            *masks.values(),
            *found.values(),
            model[0].weight.detach(),
            model[1].weight.detach(),
        ]

    return prune


OWN: dict[str, Callable[[], list[Tensor]]] = {
    "high": lambda: [select(SCORES, 0.3, targets=CLASSES)],
    "lists": lambda: [select(SCORES.tolist(), 0.3, "low", among=range(100))],
    "random": lambda: [select(SCORES, 0.3, "random")],
    "stratified": lambda: [select(SCORES, 0.3, Stratified(bins=5, cutoff=0.1), targets=CLASSES)],
    "k-center": coreset(k_center, seed=1),
    "k-center by class": coreset(k_center, targets=CLASSES, start=[4]),
    "facility location": coreset(facility_location),
    "facility location by class": coreset(facility_location, targets=CLASSES, start=[4]),
    "losses": losses,
    "fresh": lambda: [torch.tensor(list(FreshSubset(300, 0.1)), device="cpu")],
    "pruned": pruned("global"),
    "by layer": pruned("layer"),
    "at least": pruned("global", min_kept=0.1),
    "erk": pruned("erk"),
    "lamp": pruned("lamp"),
    "2:4": pruned("global", pattern="2:4"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", OWN)
def test_the_same_comes_out_under_any_mode(what: str, mode: str) -> None:
    expected = OWN[what]()
    with MODES[mode]():
        found = OWN[what]()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_what_is_chosen_in_inference_mode_can_be_used_in_training() -> None:
    with torch.inference_mode():
        found = [select(SCORES, 0.3), k_center(ROWS, 0.1).indices, *pruned("global")()[:2]]
        sampling = LossSampling(300, 0.5)
    assert not any(tensor.is_inference() for tensor in found)
    rows = ROWS.clone().requires_grad_()
    rows[found[0]].sum().backward()  # indices are saved for the way back
    sampling.update(CLASSES, SCORES)


def test_features_of_low_precision_and_of_inference_mode_are_taken_as_they_are() -> None:
    low = ROWS.bfloat16()
    with torch.inference_mode():
        made = low * 1
    for selector in (k_center, facility_location):
        expected = selector(low.float(), 0.1)
        assert torch.equal(selector(made, 0.1).ranking, expected.ranking)


def crest(dtype: torch.dtype, around: Callable[[], Any] = ExitStack) -> list[Tensor]:
    """Two epochs of CREST on a network of its own, with checks and new choices on the way."""
    torch.manual_seed(0)
    data = TensorDataset(ROWS.to(dtype), CLASSES)
    model = nn.Sequential(nn.Linear(40, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    for parameter, start in zip(model.parameters(), STARTS, strict=True):
        parameter.data.copy_(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = CrestLoader(data, model, batch_size=16, subset=0.3, threshold=0.0)
    found: list[Tensor] = []
    for _ in range(2):
        batches = iter(loader)
        while True:
            with around():
                batch = next(batches, None)
            if batch is None:
                break
            inputs, targets, index, weights = batch
            each = nn.functional.cross_entropy(model(inputs), targets, reduction="none")
            assert weights.dtype == torch.float32
            optimizer.zero_grad()
            (each * weights).mean().backward()
            optimizer.step()
            found += [index, weights]
    assert loader.selections > 1
    assert loader.checks > 1
    return [*found, loader._gradient, loader._curvature]


@pytest.fixture(scope="module")
def chosen() -> list[Tensor]:
    return crest(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    ["autocast to bfloat16", "float64 by default", "medium precision", "a surrounding device"],
)
def test_crest_chooses_the_same_under_any_mode(mode: str, chosen: list[Tensor]) -> None:
    found = crest(torch.float32, MODES[mode])
    assert all(torch.equal(one, other) for one, other in zip(found, chosen, strict=True))


@pytest.mark.slow
def test_crest_in_float64() -> None:
    with MODES["float64 by default"]():
        found = crest(torch.float64)
    assert found[-1].dtype == torch.float64
    for one, other in zip(found, crest(torch.float64), strict=True):
        assert torch.equal(one, other)


def test_all_modes_are_as_they_were_afterwards() -> None:
    def fails() -> None:
        with exact(products=True):
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
            assert torch.empty(0).device.type == "cpu"
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError

    with precision("medium"), exact():
        assert torch.get_float32_matmul_precision() == "medium", "other threads may be at work"
    with precision("medium"), torch.autocast("cpu", torch.float16), torch.device("meta"):
        assert torch.is_grad_enabled()
        with torch.inference_mode():
            with pytest.raises(KeyError):
                fails()
            assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
        assert torch.empty(0).device.type == "meta"
        assert torch.get_float32_matmul_precision() == "medium"


def test_the_precision_of_a_process_comes_back_after_the_last_of_several_threads() -> None:
    both_in, one_out = Barrier(2), Barrier(2)
    seen: list[str] = []

    def first() -> None:
        with exact(products=True):
            both_in.wait()
        one_out.wait()

    def second() -> None:
        with exact(products=True):
            both_in.wait()
            one_out.wait()
            seen.append(torch.get_float32_matmul_precision())

    with precision("medium"):
        threads = [Thread(target=first), Thread(target=second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == ["highest"]
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "fp32_precision"), reason="torch's newer interface"
)
def test_a_precision_set_by_the_newer_interface_comes_back() -> None:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    with ExitStack() as stack:
        for part, value in ((cuda, "tf32"), (cpu, "bf16")):
            stack.callback(setattr, part, "fp32_precision", "none")
            part.fp32_precision = value  # type: ignore[attr-defined]
        with exact(products=True):
            assert (cuda.fp32_precision, cpu.fp32_precision) == ("ieee", "ieee")  # type: ignore[attr-defined]
        assert (cuda.fp32_precision, cpu.fp32_precision) == ("tf32", "bf16")  # type: ignore[attr-defined]
