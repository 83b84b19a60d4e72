"""Activations of a repaired model against those of the dense one, layer by layer."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from drophot.prune import Masks, magnitude_prune, repair
from drophot.structured import prune_channels


def trained_norms(model: nn.Module, *shape: int) -> nn.Module:
    """Gives BatchNorm statistics and scales that are not those of a new layer."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    model.train()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(64, *shape))
    return model.eval()


def plain(groups: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, groups=groups), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12 * 49, 10), nn.ReLU(), nn.Linear(10, 4)),
    ).eval()


def normed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()),
        nn.Linear(12 * 16, 4),
    )
    return trained_norms(model, 3, 8, 8)


def outputs(model: nn.Sequential, inputs: Tensor) -> dict[int, Tensor]:
    """The outputs of each layer with its channels last, `(N, C)`."""
    found = {}
    with torch.no_grad():
        for number, layer in enumerate(model):
            inputs = layer(inputs)
            found[number] = inputs.movedim(1, -1).reshape(-1, inputs.shape[1])
    return found


def naive(model: nn.Sequential, dense: nn.Sequential, inputs: Tensor) -> None:
    """Repair one layer after the other, each on what the layers before it now compute."""
    for number, layer in enumerate(model):
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.BatchNorm2d):
            continue
        if layer.bias is None:
            continue  # BatchNorm follows
        now, goal = outputs(model, inputs)[number], outputs(dense, inputs)[number]
        for channel in range(now.shape[1]):
            scale = float(goal[:, channel].std() / now[:, channel].std())
            if now[:, channel].std() < 1e-5:  # all weights were removed
                scale = 1.0
            shift = float(goal[:, channel].mean()) - scale * float(now[:, channel].mean())
            with torch.no_grad():
                if isinstance(layer, nn.ConvTranspose2d):
                    size = layer.weight.shape[1]
                    group, rest = divmod(channel, size)
                    rows = len(layer.weight) // layer.groups
                    layer.weight[group * rows : (group + 1) * rows, rest] *= scale
                else:
                    layer.weight[channel] *= scale
                layer.bias[channel] = layer.bias[channel] * scale + shift


@pytest.mark.parametrize("network", [plain, normed])
@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_masks_against_layer_after_layer(
    network: Callable[[], nn.Sequential], ratio: float
) -> None:
    dense, model, inputs = network(), network(), torch.randn(64, 3, 8, 8)
    masks = magnitude_prune(model, ratio)
    expected = deepcopy(model)
    naive(expected, dense, inputs)
    repair(model, dense, [inputs])
    for (name, found), other in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, other, rtol=2e-3, atol=1e-4, msg=name)
    assert Masks.from_zeros(model).sparsity == masks.sparsity


@pytest.mark.parametrize("network", [partial(plain, 1), normed])
def test_one_batch_gets_the_dense_statistics(network: Callable[[], nn.Sequential]) -> None:
    dense, inputs = network(), torch.randn(64, 3, 8, 8)
    model = deepcopy(dense)
    pruned = prune_channels(model, 0.5, inputs[:2])
    before = model[-1].weight.shape
    repair(model, dense, [inputs], pruned=pruned)
    assert model[-1].weight.shape == before
    last = dict(enumerate(dense))
    found, goal = outputs(model, inputs), outputs(dense, inputs)
    for number, layer in last.items():
        if isinstance(layer, nn.ReLU | nn.Flatten) or layer.bias is None:
            continue
        kept = {**pruned.kept_channels, **pruned.kept_norm_channels}[f"{number}.weight"]
        torch.testing.assert_close(found[number].mean(0), goal[number][:, kept].mean(0))
        torch.testing.assert_close(found[number].std(0), goal[number][:, kept].std(0))


def test_norms_that_do_not_follow_a_layer_keep_their_own_channels() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(6, 8)
            self.norm, self.last = nn.BatchNorm1d(16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(torch.cat([self.one(x), self.two(x)], 1)).relu())

    torch.manual_seed(0)
    dense = trained_norms(Joined(), 6)
    model, inputs = deepcopy(dense), torch.randn(100, 6)
    pruned = prune_channels(model, 0.5, inputs[:2])
    kept = pruned.kept_norm_channels["norm.weight"]
    parts = pruned.kept_channels["one.weight"], pruned.kept_channels["two.weight"] + 8
    assert torch.equal(kept, torch.cat(parts))
    seen: list[Tensor] = []
    repair(model, dense, [inputs], pruned=pruned)
    for one in (model, dense):
        one.norm.register_forward_hook(lambda _, args, output: seen.append(output.detach()))
        one(inputs)
    torch.testing.assert_close(seen[0].mean(0), seen[1][:, kept].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0].std(0), seen[1][:, kept].std(0), rtol=1e-4, atol=1e-5)


def test_batches_count_by_their_values() -> None:
    dense, model = nn.Linear(1, 1), nn.Linear(1, 1)
    for layer, scale, shift in ((dense, 3.0, 0.0), (model, 1.0, 1.0)):
        nn.init.constant_(layer.weight, scale)
        nn.init.constant_(layer.bias, shift)
    repair(model, dense, [torch.randn(5, 1), torch.randn(50, 1) + 4])
    assert model.weight.item() == pytest.approx(3, rel=1e-5)
    assert model.bias.item() == pytest.approx(0, abs=1e-5)


def test_a_model_that_equals_the_dense_one_stays_as_it_is() -> None:
    dense, model = normed(), normed()
    repair(model, dense, DataLoader(TensorDataset(torch.randn(90, 3, 8, 8)), batch_size=40))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, dense.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_nothing_else_changes() -> None:
    dense, model = normed(), normed()
    magnitude_prune(model, 0.5)
    model.train()
    model[1].eval()
    states = deepcopy((model.state_dict(), dense.state_dict()))
    modes = [module.training for module in (*model.modules(), *dense.modules())]
    data = TensorDataset(torch.randn(40, 3, 8, 8), torch.zeros(40))
    random = torch.get_rng_state()
    repair(DataParallel(model), dense, DataLoader(data, batch_size=20, shuffle=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in (*model.modules(), *dense.modules())] == modes
    changed = {
        n for n, tensor in model.state_dict().items() if not torch.equal(tensor, states[0][n])
    }
    expected = {f"{n}.{p}" for n in (1, 3, 4, 7) for p in ("weight", "bias")}
    assert expected - {"4.weight", "4.bias"} <= changed <= expected  # 4 follows 3, which has a bias
    assert all(torch.equal(tensor, states[1][n]) for n, tensor in dense.state_dict().items())
    assert not any(module._forward_hooks for module in (*model.modules(), *dense.modules()))


def test_constant_channels_are_only_shifted() -> None:
    dense, model = nn.Linear(4, 3), nn.Linear(4, 3)
    with torch.no_grad():
        model.weight[0] = 0
        dense.weight[1] = 0
    weight = model.weight[1].tolist()
    inputs = torch.randn(50, 4)
    repair(model, dense, [inputs])
    assert model.weight[0].tolist() == [0, 0, 0, 0]
    assert model.weight[1].tolist() == weight
    torch.testing.assert_close(model(inputs).mean(0), dense(inputs).mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(32, 8).to(dtype)
    model, inputs = deepcopy(dense), torch.randn(200, 32).to(dtype)
    magnitude_prune(model, 0.7)
    repair(model, dense, [inputs])
    assert model.weight.dtype == dtype
    found, goal = (one(inputs).detach().double().std(0) for one in (model, dense))
    torch.testing.assert_close(found, goal, rtol=max(1e-9, 4 * torch.finfo(dtype).eps), atol=0)


class Unusual(nn.Module):
    """One layer of each kind that cannot be repaired."""

    def __init__(self) -> None:
        super().__init__()
        self.no_bias = nn.Linear(4, 4, bias=False)
        self.normal = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.tied, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.tied.weight
        self.functional = nn.Linear(4, 4)
        self.recurrent = nn.GRU(4, 4)
        self.scaled = Scaled(4, 4)
        self.bare = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.tied(self.normal(self.no_bias(x))))
        x = nn.functional.linear(x, self.functional.weight, self.functional.bias)
        return self.bare(self.scaled(self.recurrent(x)[0]))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


def test_layers_that_cannot_be_repaired_are_named() -> None:
    torch.manual_seed(0)
    dense = Unusual().eval()
    model = deepcopy(dense)
    with torch.no_grad():
        model.no_bias.weight *= 0.5
    state = deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="`no_bias`") as caught:
        repair(model, dense, [torch.randn(20, 4)])
    message = str(caught[0].message)
    for name, why in {
        "no_bias": "no bias",
        "normal": "computed",
        "tied": "shares",
        "other": "shares",
        "functional": "no batch",
        "recurrent": "not a Conv",
        "scaled": "overrides",
        "bare": "no weight",
    }.items():
        assert f"`{name}` (it" in message or f"`{name}` (no" in message
        assert why in message
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) == (name != "no_bias.weight"), name
    torch.testing.assert_close(model.no_bias.weight, dense.no_bias.weight)


def test_channels_in_groups_of_a_transposed_convolution_are_named() -> None:
    dense = plain()
    model, inputs = deepcopy(dense), torch.randn(8, 3, 8, 8)
    pruned = prune_channels(model, 0.5, inputs[:2])
    weight = model[2].weight.clone()
    with pytest.warns(UserWarning, match="`2` .*groups"):
        repair(model, dense, [inputs], pruned=pruned)
    assert torch.equal(model[2].weight, weight)


def stops() -> Iterator[Tensor]:
    yield torch.randn(8, 3, 8, 8)
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "`loader` .*empty"),
        ([{"labels": torch.ones(8)}], TypeError, "`loader`.*NoneType"),
        ([torch.full((8, 3, 8, 8), torch.nan)], ValueError, "`model` .*finite.*`weight`.*`1`"),
        (stops(), OSError, "the disk is gone"),
        ([torch.randn(1, 3, 8, 8)], ValueError, r"`loader` .*\(1, 4\).*`7`"),
    ],
)
def test_an_error_leaves_the_weights(loader, error: type, message: str) -> None:
    dense, model = normed(), normed()
    magnitude_prune(model, 0.5)
    state = deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        repair(model, dense, loader)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_another_dense_model_is_refused() -> None:
    model, inputs = normed(), torch.randn(8, 3, 8, 8)
    dense = deepcopy(model)
    with pytest.raises(ValueError, match="`dense` .*copy"):
        repair(model, model, [inputs])
    with pytest.raises(ValueError, match="`dense` .*`0`.*missing"):
        repair(model, nn.Sequential(), [inputs])
    prune_channels(model, 0.5, inputs)
    with pytest.raises(ValueError, match="`dense` .*4 channels of `0`.* 8 .*`pruned`"):
        repair(model, dense, [inputs])
    with pytest.raises(ValueError, match="`model` .*ReLU has none"):
        repair(nn.ReLU(), nn.ReLU(), [inputs])


def test_a_dense_model_that_calls_its_layers_otherwise_is_refused() -> None:
    class Repeated(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.layer, self.times = nn.Linear(3, 3), times

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.layer(x)
            return x

    for mine, other, more in ((1, 2, "more"), (2, 1, "less")):
        with pytest.raises(ValueError, match=f"`dense` .*`layer` {more} often"):
            repair(Repeated(mine), Repeated(other), [torch.randn(4, 3)])


@pytest.mark.parametrize("dense_too", [True, False])
@pytest.mark.parametrize("name", ["compiled", "parallel", "averaged"])
def test_a_wrapped_model_without_channels(name: str, dense_too: bool) -> None:
    def wrap(model: nn.Module) -> Any:
        if name == "compiled":
            return torch.compile(model, backend="eager")
        return DataParallel(model) if name == "parallel" else AveragedModel(model)

    inputs, dense, expected = torch.randn(32, 3, 8, 8), normed(), normed()
    pruned = prune_channels(expected, 0.5, inputs[:2])
    repair(expected, dense, [inputs], pruned=pruned)
    model = wrap(normed())
    pruned = prune_channels(model, 0.5, inputs[:2])
    repair(model, wrap(dense) if dense_too else dense, [inputs], pruned=pruned)
    assert torch.equal(model(inputs), expected(inputs))
