"""Masks belong to a model, not to the parameters that it had when they were made."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import processes
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from drophot import Masks, magnitude_prune
from drophot.prune import Schedule, rewind
from drophot.structured import prune_channels


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))


def backward(model: nn.Module) -> None:
    chance = torch.Generator().manual_seed(1)
    model.zero_grad()
    model(torch.randn(32, 16, generator=chance)).square().mean().backward()


def assert_masked(model: nn.Module, masks: Masks, dense: dict[str, Tensor]) -> None:
    """The model is the dense one with what the masks remove at zero."""
    for name, tensor in model.state_dict().items():
        expected = dense[name] * masks[name] if name in masks else dense[name]
        assert torch.equal(tensor, expected), name


def copied(model: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(model.state_dict())


OTHERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "new": lambda _: network(5),
    "copy": copy.deepcopy,
    "averaged": lambda model: AveragedModel(model).module,
    "itself": lambda model: model,
    "float64": lambda _: network(5).double(),
}


@pytest.mark.parametrize("other", OTHERS)
def test_masks_act_on_the_model_that_they_are_given(other: str) -> None:
    model, start = network(), copied(network(7))
    masks = magnitude_prune(model, 0.7)
    kept = copied(model)
    given = OTHERS[other](model)
    dense = copied(given)
    masks.apply(given)
    assert_masked(given, masks, dense)
    rewind(given, masks, start)
    own = {name: tensor.to(given.state_dict()[name].dtype) for name, tensor in start.items()}
    assert_masked(given, masks, own)
    if given is not model:
        assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())
        optimizer = AdamW(given.parameters())
        with pytest.raises(ValueError, match=r"masks\.hold\(optimizer, model=copy\)"):
            masks.hold(optimizer)
        if other != "float64":
            with masks.hold(optimizer, model=given):
                for _ in range(3):
                    backward(given)
                    optimizer.step()
            assert all(torch.equal(given.get_parameter(n) != 0, mask) for n, mask in masks.items())


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled DataParallel": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models_and_masks_of_wrapped_models(name: str) -> None:
    wrap, model = WRAPPERS[name], network()
    masks = magnitude_prune(model, 0.7)
    inner = network(5)
    dense = copied(inner)
    wrapped = wrap(inner)
    masks.apply(wrapped)
    inner = wrapped.module if name == "AveragedModel" else inner  # which copies
    assert_masked(inner, masks, dense)
    outer = magnitude_prune(wrap(network()), 0.7)
    assert list(outer) != list(masks)
    plain = network(5)
    outer.apply(plain)
    assert_masked(plain, masks, dense)
    rewind(plain, outer, dense)
    assert_masked(plain, masks, dense)


def swapped(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


REPLACED: dict[str, Callable[[nn.Module], Any]] = {
    "assign": lambda m: m.load_state_dict(network(7).state_dict(), assign=True),
    "new layer": lambda m: setattr(m, "0", nn.Linear(16, 32)),
    "new parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(32, 16))),
    "swapped": swapped,
    "data": lambda m: setattr(m[0].weight, "data", torch.ones(32, 16)),
}


@pytest.mark.parametrize("replace", REPLACED)
@pytest.mark.parametrize("how", ["apply", "zero", "load_state_dict", "rewind", "schedule"])
def test_parameters_that_were_replaced(replace: str, how: str) -> None:
    model = network()
    schedule = Schedule(model, [0.7], every=1)
    masks = schedule.masks
    REPLACED[replace](model)
    dense = copied(model)
    if how == "rewind":
        rewind(model, masks, dense)
    else:
        acts: dict[str, Callable[[], Any]] = {
            "apply": masks.apply,
            "zero": masks.zero,
            "load_state_dict": lambda: masks.load_state_dict(masks.state_dict()),
            "schedule": schedule.step,
        }
        acts[how]()
    assert_masked(model, masks, dense)
    optimizer = SGD(model.parameters(), lr=0.1)
    with masks.hold(optimizer):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all((model.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())


def with_fewer_channels() -> nn.Module:
    model = network().eval()
    prune_channels(model, 0.5, torch.randn(4, 16))
    return model


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another": (lambda: nn.Linear(4, 4), r"Linear.*`0\.weight`"),
    "other shapes": (with_fewer_channels, r"`0\.weight`.*\(16, 16\)"),
    "pruned by torch": (
        lambda: nn.Sequential(prune.identity(nn.Linear(16, 32), "weight"), *list(network())[1:]),
        r"no parameter `0\.weight`",
    ),
    "ambiguous": (
        lambda: nn.ModuleDict({"module": nn.DataParallel(network()), "_orig_mod": network()}),
        "no parameter",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_model_that_the_masks_do_not_belong_to_is_refused_and_untouched(name: str) -> None:
    make, message = WRONG[name]
    model = make()
    masks, before = magnitude_prune(network(), 0.7), copied(model)
    for act in (
        masks.apply,
        lambda m: masks.hold(SGD(m.parameters(), lr=0.1), model=m),
        lambda m: rewind(m, masks, {n: t + 1 for n, t in before.items()}),
    ):
        with pytest.raises(ValueError, match=f"`model` .*{message}"):
            act(model)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(TypeError, match="`model`"):
        masks.apply(before)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_masks_are_applied_to_a_scripted_model() -> None:
    masks, other = magnitude_prune(network(), 0.5), network(1)
    dense = copied(other)
    scripted = torch.jit.script(other)
    masks.apply(scripted)
    assert_masked(scripted, masks, dense)


def test_channels_that_are_gone_are_no_sparsity_of_zero() -> None:
    model = network().eval()
    masks = magnitude_prune(model, 0.3)
    prune_channels(model, 0.5, torch.randn(4, 16))
    before, kept = copied(model), masks.state_dict()
    for act in (masks.apply, masks.zero, lambda: masks.load_state_dict(masks.state_dict())):
        with pytest.raises(ValueError, match="channels were pruned after"):
            act()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(mask, kept[name]) for name, mask in masks.items())


def test_an_average_that_was_begun_before_pruning() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    backward(model)
    optimizer.step()
    average.update_parameters(model)
    masks = magnitude_prune(model, 0.7)
    masks.apply(average)
    with masks.hold(optimizer):
        for _ in range(3):
            backward(model)
            optimizer.step()
            average.update_parameters(model)
    for name, mask in masks.items():
        assert torch.equal(average.module.get_parameter(name) != 0, mask)


class Extra(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.layer, self.extra = nn.Linear(4, 4), extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize(
    ("before", "after"),
    [({"a": 1}, {"b": 2}), (None, "x"), (torch.ones(3), torch.ones(5)), ({"a": 1}, torch.ones(2))],
)
def test_a_model_with_extra_state_is_rewound(before: Any, after: Any) -> None:
    model = Extra(before)
    start = copied(model)
    model.extra = after
    model.layer.weight.data += 1
    masks = magnitude_prune(model, 0.5)
    rewind(model, masks, start)
    assert str(model.extra) == str(before)
    assert torch.equal(model.layer.weight, start["layer.weight"] * masks["layer.weight"])


# --- several processes ---------------------------------------------------------------------------


def clipped_steps(model: nn.Module, optimizer: Any, inputs: Tensor) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def main(folder: Path) -> None:
    """What a rank does."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    chance = torch.Generator().manual_seed(rank)
    inputs = torch.randn(16, 8, generator=chance)
    found: dict[str, Any] = {}
    makes: dict[str, Callable[[Any], Any]] = {
        "AdamW": lambda ps: AdamW(ps, lr=0.05),
        "ZeRO": lambda ps: ZeroRedundancyOptimizer(list(ps), AdamW, lr=0.05),
    }
    for view in (False, True):
        for name, make in makes.items():
            model = small()
            masks = magnitude_prune(model, 0.7)
            wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)
            optimizer = make(wrapped.parameters())
            with masks.hold(optimizer):
                with wrapped.no_sync():
                    wrapped(inputs).square().mean().backward()
                clipped_steps(wrapped, optimizer, inputs)
            found[f"{name}, {view}"] = list(model.parameters())
            found["masks"] = masks.state_dict()
    for name in ("FSDP1", "FSDP2"):
        model = small()
        masks = magnitude_prune(model, 0.5)
        if name == "FSDP1":
            device = torch.device("cpu")
            model = FullyShardedDataParallel(model, use_orig_params=True, device_id=device)
        else:
            fully_shard(model)
        optimizer = AdamW(model.parameters())
        for how, act in (
            ("hold", lambda m=masks, o=optimizer: m.hold(o)),
            ("apply", lambda m=masks, model=model: m.apply(model)),
            ("load", lambda m=masks: m.load_state_dict(m.state_dict())),
        ):
            try:
                act()
                found[f"{name}, {how}"] = "nothing"
            except ValueError as error:
                found[f"{name}, {how}"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    processes.ranks(2, main, tmp_path, folder=tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    masks = ranks[0]["masks"]
    inputs = torch.cat([
        torch.randn(16, 8, generator=torch.Generator().manual_seed(r)) for r in (0, 1)
    ])
    model = small()  # torch's way, in one process
    for layer, name in ((model[0], "0.weight"), (model[2], "2.weight")):
        prune.custom_from_mask(layer, "weight", masks[name])
    optimizer = AdamW(model.parameters(), lr=0.05)
    clipped_steps(model, optimizer, inputs)
    model(inputs)
    expected = [t for i in (0, 2) for t in (model[i].weight, model[i].bias)]
    for rank in ranks:
        for key in ("AdamW, False", "AdamW, True", "ZeRO, False", "ZeRO, True"):
            for one, other in zip(rank[key], expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            assert torch.equal(rank[key][0] != 0, masks["0.weight"])
            assert torch.equal(rank[key][0], ranks[0][key][0])
        for name in ("FSDP1", "FSDP2"):
            for how in ("hold", "apply", "load"):
                assert "sharded over processes" in rank[f"{name}, {how}"], (name, how)


@pytest.mark.parametrize("wrapped", ["saved", "loaded"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_saved_masks_fit_a_model_that_is_wrapped_or_not(
    wrap: Callable[[nn.Module], nn.Module], wrapped: str
) -> None:
    saved, loaded = network(), network(5)
    nn.init.zeros_(saved[3].weight)
    old, new = wrap(saved), loaded
    if wrapped == "loaded":
        old, new = saved, wrap(loaded)
    with pytest.warns(UserWarning, match="all weights of"):  # so that it joins late
        schedule = Schedule(old, [0.25, 0.5], every=1)
    again = Schedule(new, [0.25, 0.5], every=1)
    again.load_state_dict(schedule.state_dict())
    assert again.masks.keys() == Masks.from_zeros(new).keys()
    assert again.state_dict()["formerly_zero"] == [
        name for name in again.masks if "3.weight" in name
    ]
    for layer, mask in zip((loaded[0], loaded[3]), schedule.masks.values(), strict=True):
        assert not layer.weight[~mask].any()
