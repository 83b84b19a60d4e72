"""BatchNorm statistics anew, against means and variances by hand."""

from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from drophot.prune import magnitude_prune, recalibrate_bn


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
        ([], ValueError, "`loader` should give at least one batch. Found none"),
        ([{"x": 3}], TypeError, "`loader` should give batches .*Found int in a dict"),
        ([()], TypeError, "`loader` should give batches .*Found NoneType in a tuple"),
        (stops(), OSError, "the disk is gone"),
        ([torch.randn(8, 4), torch.randn(8, 5)], RuntimeError, "shapes|size"),
        ([torch.randn(1, 4)], ValueError, "more than one value a channel"),
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
    with pytest.raises(ValueError, match="BatchNorm layers with running statistics. Found none"):
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
