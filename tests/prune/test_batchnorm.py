"""BatchNorm statistics anew, against means and variances by hand."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import batchnorm_ranks as worker
from helpers import processes, references
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from drophot.prune import magnitude_prune, recalibrate_bn, repair


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)
    )
    model.append(nn.BatchNorm1d(3, momentum=0.3))
    return model


@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.integers(0, 100))
def test_they_are_the_means_over_batches_by_their_samples(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.BatchNorm1d(3)
    layer.running_mean.normal_()
    batches = [torch.randn(size, 3) * 5 + 2 for size in sizes]
    recalibrate_bn(layer, batches)
    mean, variance = references.batchnorm_statistics([batch.double().numpy() for batch in batches])
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.running_var, variance, rtol=1e-4, atol=1e-5)
    assert layer.num_batches_tracked == len(sizes)


def test_each_layer_sees_what_those_before_it_now_give() -> None:
    model = network()
    inputs = torch.randn(200, 4)
    recalibrate_bn(model, [inputs])
    with torch.no_grad():
        hidden = model[0](inputs)
        torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
        normal = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
        after = model[4](torch.relu(model[1].weight * normal + model[1].bias))  # no dropout
    torch.testing.assert_close(model[5].running_mean, after.mean(0), rtol=1e-4, atol=1e-5)


def test_nothing_else_changes() -> None:
    model = network().train()
    model[1].eval()
    state = deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    data = TensorDataset(torch.randn(40, 4), torch.zeros(40))
    torch.set_rng_state(random)
    recalibrate_bn(model, DataLoader(data, batch_size=8, shuffle=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, model[5].momentum) == (0.1, 0.3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) == ("running" not in name and "num_" not in name)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_mends_what_pruning_broke() -> None:
    """A layer that loses most of its weights gives less; its BatchNorm has to know."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 50), nn.BatchNorm1d(50)).train()
    inputs = torch.randn(500, 50)
    for _ in range(100):
        model(inputs)
    magnitude_prune(model, 0.9)
    model.eval()
    assert float(model(inputs).detach().var()) < 0.6
    recalibrate_bn(model, [inputs])
    assert float(model(inputs).detach().var()) == pytest.approx(1, abs=0.02)


def stops() -> Iterator[Tensor]:
    yield torch.randn(8, 4)
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "`loader` must yield at least one batch"),
        (
            [{"x": 3}],
            TypeError,
            "`loader` .*int in a batch of type dict with x",
        ),
        (
            [{"labels": torch.ones(8, 4)}],
            TypeError,
            "NoneType in a batch of type dict with lab",
        ),
        ([torch.full((8, 4), torch.nan)], ValueError, "`model` .* finite .*torch.float32.* `1`"),
        ([()], TypeError, "`loader` .*NoneType in a batch of type tuple"),
        (stops(), OSError, "the disk is gone"),
        ([torch.randn(8, 4), torch.randn(8, 5)], RuntimeError, "shapes|size"),
        ([torch.randn(1, 4)], ValueError, "more than one value per channel"),
    ],
)
def test_an_error_leaves_the_old_statistics(loader, error: type, message: str) -> None:
    model = network().train()
    model(torch.randn(30, 4))
    state = deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        recalibrate_bn(model, loader)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert model[1].momentum == 0.1


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)])
def test_a_model_without_statistics_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="BatchNorm layers with running statistics"):
        recalibrate_bn(model, [torch.randn(4, 2)])


def test_a_layer_that_is_called_twice_weighs_both_calls_alike() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(x + 4)

    model = Twice()
    recalibrate_bn(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
    assert float(model.norm.running_mean) == pytest.approx((2 + 6 + 6 + 10) / 4)


def test_a_layer_that_no_batch_reaches_keeps_what_it_has() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm1d(2), "other": nn.BatchNorm1d(2)})
    model["other"].running_mean.fill_(7.0)
    model.forward = lambda x: model["used"](x)
    recalibrate_bn(model, [{"inputs": torch.randn(8, 2)}])
    assert model["other"].running_mean.tolist() == [7.0, 7.0]


def test_weights_that_autocast_kept_are_not_those_after_pruning() -> None:
    model = network()
    inputs = torch.randn(64, 4)
    plain = deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs)
        for one in (model, plain):
            magnitude_prune(one, 0.9)
        recalibrate_bn(model, [inputs])
    with torch.autocast("cpu", torch.bfloat16):
        recalibrate_bn(plain, [inputs])
    torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)


# --- in every dtype ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("count", [3, 400])
def test_batches_are_averaged_in_any_dtype(dtype: torch.dtype, kind, count: int) -> None:
    torch.manual_seed(0)
    layer = kind(64).to(dtype)
    batches = [(torch.randn(8, 64) * 2 + 0.5).to(dtype) for _ in range(count)]
    recalibrate_bn(layer, batches)
    mean, variance = references.batchnorm_statistics([b.double().numpy() for b in batches])
    last = torch.finfo(dtype).eps / 2 if dtype.itemsize < 4 else 0  # one rounding, at the end
    np.testing.assert_allclose(layer.running_mean.double(), mean, rtol=last, atol=1e-6)
    np.testing.assert_allclose(layer.running_var.double(), variance, rtol=last, atol=2e-6)
    assert layer.running_mean.dtype == dtype


def test_statistics_beyond_the_dtype_are_refused() -> None:
    layer = nn.BatchNorm1d(2).half()
    with pytest.raises(ValueError, match="`model`.*torch.float16.*`the model`"):
        recalibrate_bn(layer, [torch.tensor([[0.0, 1], [600, 2]]).half()])
    assert layer.running_var.tolist() == [1, 1]


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_momentum_has_no_part_in_it(momentum: float | None) -> None:
    layer = nn.BatchNorm1d(1, momentum=momentum)
    recalibrate_bn(layer, [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [8.0]])])
    assert (layer.running_mean.item(), layer.running_var.item()) == (4, 5)
    assert layer.momentum == momentum


def test_instances_that_are_tracked_count_each() -> None:
    torch.manual_seed(0)
    layer = nn.InstanceNorm1d(2, track_running_stats=True)
    first, second = torch.randn(3, 2, 5), torch.randn(1, 2, 7)
    recalibrate_bn(layer, [first, second])
    of = [(15, first), (7, second)]
    mean = sum(n * batch.mean(2).mean(0) for n, batch in of) / 22
    variance = sum(n * batch.var(2).mean(0) for n, batch in of) / 22
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, variance)


class OfItsOwn(nn.BatchNorm1d):
    """Computes its statistics itself, as synchronised layers of other libraries do."""

    def forward(self, input: Tensor) -> Tensor:
        mean, variance = input.mean(0), input.var(0)
        if self.training and self.momentum is not None:
            for name, new in (("running_mean", mean), ("running_var", variance)):
                self.get_buffer(name).lerp_(new.detach(), self.momentum)
        return (input - mean) / (variance + self.eps).sqrt()


class Rescales(nn.BatchNorm1d):
    """Normalises something else than its input."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(3 * input)


class Functional(nn.Module):
    """Normalises without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, training=norm.training
        )


@pytest.mark.parametrize(("kind", "scale"), [(OfItsOwn, 1), (Rescales, 3)])
def test_layers_with_code_of_their_own(kind, scale: int) -> None:
    layer = kind(1)
    recalibrate_bn(layer, [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [8.0]])])
    assert layer.running_mean.item() == pytest.approx(4 * scale)
    assert layer.running_var.item() == pytest.approx(5 * scale**2)


def test_layers_that_are_used_by_another_module() -> None:
    model = Functional()
    recalibrate_bn(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [8.0]])])
    assert (model.norm.running_mean.item(), model.norm.running_var.item()) == (4, 5)


@pytest.mark.parametrize(
    "batch",
    [
        {"labels": torch.zeros(8, dtype=torch.int64), "pixel_values": torch.ones(8, 4)},
        {"label_ids": torch.zeros(8), "x": torch.ones(8, 4), "index": torch.arange(8)},
        {"other": torch.zeros(8, 3), "main": torch.ones(8, 4)},
    ],
)
def test_the_inputs_of_a_batch_with_names(batch: dict[str, Tensor]) -> None:
    layer = nn.BatchNorm1d(4)
    if "main" in batch:
        layer.main_input_name = "main"
    recalibrate_bn(layer, [batch])
    assert layer.running_mean.tolist() == [1] * 4


def test_inference_mode_and_its_tensors() -> None:
    with torch.inference_mode():
        layer = nn.BatchNorm1d(1)
        recalibrate_bn(layer, [torch.tensor([[1.0], [3.0]])])
        assert (layer.running_mean.item(), layer.running_var.item()) == (2, 2)


def test_a_wrapped_model() -> None:
    layer = nn.BatchNorm1d(1)
    recalibrate_bn(nn.DataParallel(layer), [torch.tensor([[1.0], [3.0]])])
    assert layer.running_mean.item() == 2


# --- over several processes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes.ranks(2, worker.main, folder, folder=folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", worker.MODELS)
@pytest.mark.parametrize("batches", worker.BATCHES)
def test_ranks_equal_one_process_that_saw_everything(
    ranks: list[dict[str, Any]], name: str, batches: str
) -> None:
    alone = worker.network(name)
    recalibrate_bn(alone, [batch for rank in range(2) for batch in worker.BATCHES[batches](rank)])
    for rank in ranks:
        found = rank[f"{name}, {batches}"]
        assert found.keys() == alone.state_dict().keys()
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)


def test_ranks_have_equal_bits(ranks: list[dict[str, Any]]) -> None:
    for name, state in ranks[0].items():
        if "," in name:
            assert all(torch.equal(v, ranks[1][name][key]) for key, v in state.items()), name


def test_an_error_on_one_rank_is_one_on_all(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["one fails"] == "OSError: the disk is gone"
    assert ranks[0]["one fails"].startswith("ValueError: `recalibrate_bn` failed on ranks")
    assert "failed on ranks [1]" in ranks[0]["one fails"]
    for rank in ranks:
        assert "`loader` must yield at least one batch" in rank["none"]
        assert "the same BatchNorm layers on every rank" in rank["other models"]
        assert rank["left"] == [0.0] * 3


def test_a_group_of_one_rank_keeps_to_itself(ranks: list[dict[str, Any]]) -> None:
    assert [rank["alone"] for rank in ranks] == [[0.5], [1.5]]
    assert "`group` must contain this rank" in ranks[0]["not a member"]


@pytest.mark.parametrize("batches", ["uneven", "none on one"])
def test_ranks_repair_as_one_process_that_saw_everything(
    ranks: list[dict[str, Any]], batches: str
) -> None:
    dense, alone = worker.dense_and_pruned()
    repair(alone, dense, [batch for rank in range(2) for batch in worker.BATCHES[batches](rank)])
    for rank in ranks:
        for key, value in alone.state_dict().items():
            found = rank[f"repaired, {batches}"][key]
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def test_repair_fails_on_all_ranks_or_keeps_to_its_group(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["repair fails"] == "OSError: the disk is gone"
    assert ranks[0]["repair fails"].startswith("ValueError: `repair` failed on ranks [1]")
    for number, rank in enumerate(ranks):
        assert "`group` must contain this rank" in rank["repair by no member"]
        dense, alone = worker.dense_and_pruned()  # the failure before has left the model unchanged
        repair(alone, dense, worker.BATCHES["even"](number))
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(rank["repaired alone"][key], value, rtol=1e-5, atol=1e-6)
