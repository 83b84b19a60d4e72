"""What `fit` and `evaluate` refuse before they change anything, and when a model is right."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from drophot import DropHot, ForgettingTracker, IndexedDataset, evaluate, features, fit

INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(12) % 3


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


class Gives(nn.Module):
    """A network whose outputs come in something."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.wrap = network(), wrap

    def forward(self, inputs: Tensor) -> Any:
        return self.wrap(self.layer(inputs))


def training(
    *,
    model: Any = None,
    data: Any = None,
    optimizer: Callable[[Any], Any] = lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    epochs: Any = 2,
    **options: Any,
) -> Callable[[], object]:
    """A call of `fit`, which the weights have to survive."""
    model = network() if model is None else model
    data = TensorDataset(INPUTS, TARGETS) if data is None else data

    def call() -> None:
        made = optimizer(model)
        before = deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
        try:
            fit(model, data, epochs, optimizer=made, batch_size=4, **options)
        finally:
            for name, value in before.items():
                assert torch.equal(model.state_dict()[name], value)

    return call


def of(targets: Tensor, inputs: Tensor = INPUTS) -> TensorDataset:
    return TensorDataset(inputs, targets)


def frozen() -> nn.Module:
    return network().requires_grad_(requires_grad=False)


LOADER = DataLoader(TensorDataset(INPUTS, TARGETS), 4)
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "swapped": (
        training(model=of(TARGETS), data=network(), optimizer=lambda _: None),
        TypeError,
        "model.*TensorDataset",
    ),
    "no model": (training(model=3, optimizer=lambda _: None), TypeError, "model.*int"),
    "a model as data": (training(data=network()), TypeError, "dataset.*Linear"),
    "no parameters": (
        training(model=nn.Flatten(), optimizer=lambda _: None),
        ValueError,
        "model.*Flatten",
    ),
    "all frozen": (training(model=frozen()), ValueError, "model.*Linear"),
    "no optimiser": (training(optimizer=lambda _: None), TypeError, "optimizer.*NoneType"),
    "an optimiser's class": (
        training(optimizer=lambda _: torch.optim.Adam),
        TypeError,
        "optimizer.*Adam",
    ),
    "another model's": (
        training(optimizer=lambda _: torch.optim.SGD(network().parameters(), lr=1)),
        ValueError,
        "optimizer.*2",
    ),
    "a closure": (
        training(optimizer=lambda model: torch.optim.LBFGS(model.parameters())),
        TypeError,
        "optimizer.*LBFGS",
    ),
    "an iterator": (training(data=iter(LOADER)), TypeError, "dataset.*2 epochs.*Iter"),
    "a generator": (training(data=(batch for batch in LOADER)), TypeError, "dataset.*generator"),
    "a map": (training(data=map(tuple, LOADER)), TypeError, "dataset.*map"),
    "a zip": (
        training(data=zip(INPUTS.split(4), TARGETS.split(4), strict=True)),
        TypeError,
        "dataset.*zip",
    ),
    "no batch": (
        training(data=DataLoader(of(TARGETS), 40, drop_last=True)),
        ValueError,
        "dataset.*epoch 0",
    ),
    "no batch in one epoch": (training(data=iter([]), epochs=1), ValueError, "dataset.*epoch 0"),
    "a dictionary of sets": (training(data={"train": of(TARGETS)}), TypeError, "dataset.*dict"),
    "a column": (training(data=of(TARGETS[:, None])), ValueError, r"dataset.*\(4, 1\)"),
    "one-hot integers": (
        training(data=of(torch.eye(3).long()[TARGETS])),
        ValueError,
        r"dataset.*\(4, 3\)",
    ),
    "numbers": (training(data=of(TARGETS.float())), ValueError, "dataset.*float32"),
    "too large a class": (
        training(data=of(torch.where(torch.arange(12) == 11, 3, TARGETS))),
        ValueError,
        r"dataset.*\[0, 3\).*3",
    ),
    "too small a class": (
        training(data=of(torch.where(torch.arange(12) == 11, -1, TARGETS))),
        ValueError,
        "dataset.*-1",
    ),
    "uint8": (training(data=of(TARGETS, INPUTS.byte())), TypeError, "dataset.*uint8"),
    "float64": (training(data=of(TARGETS, INPUTS.double())), TypeError, "dataset.*float64"),
    "a tuple": (training(model=Gives(lambda z: (z, z))), TypeError, "model.*tuple"),
    "a dictionary": (training(model=Gives(lambda z: {"logits": z})), TypeError, "model.*dict"),
    "a single output": (training(model=Gives(lambda z: z[:, :1])), ValueError, r"model.*\(4, 1\)"),
    "a flat output": (training(model=Gives(lambda z: z[:, 0])), ValueError, r"model.*\(4,\)"),
    "half an epoch": (training(epochs=1.5), TypeError, ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fit_refuses_before_a_weight_changes(name: str) -> None:
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=f"`{words}" if words else None):
        call()


def test_a_loader_that_is_empty_from_the_second_epoch_on_is_an_error() -> None:
    class Once:
        batches = iter(LOADER)

        def __iter__(self) -> Any:
            return self.batches

    model, epochs = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`dataset`.*epoch 1"):
        fit(model, Once(), 3, optimizer=optimizer, on_epoch=epochs.append)
    assert epochs == [0]


def test_what_is_unusual_but_right_is_trained_on() -> None:
    def weights(data: Any, **options: Any) -> Tensor:
        model = network()
        parameters = options.pop("parameters", lambda model: model.parameters())(model)
        options = {"optimizer": torch.optim.SGD(parameters, lr=0.1), "batch_size": 4, **options}
        fit(model, data, 2, **options)
        return model.weight.detach()

    expected = weights(of(TARGETS))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(weights(of(TARGETS.to(dtype))), expected)
    two = TARGETS.clamp(max=1)
    assert torch.equal(weights(of(two.bool())), weights(of(two)))
    wanting = INPUTS.clone().requires_grad_()
    assert torch.equal(weights(of(TARGETS, wanting)), expected)
    assert wanting.grad is None
    torch.testing.assert_close(weights(of(torch.eye(3)[TARGETS])), expected)
    assert not torch.equal(weights(of(TARGETS.where(TARGETS > 0, -100))), expected)
    assert not torch.equal(weights(of(TARGETS), parameters=lambda m: [m.weight]), network().weight)


# --- evaluate ----------------------------------------------------------------------------------


@given(
    st.integers(1, 6),
    st.lists(st.integers(1, 6), max_size=3),
    st.sampled_from([torch.int64, torch.int32, torch.float32, torch.bool]),
)
def test_an_accuracy_is_a_share_or_the_targets_are_refused(
    size: int, more: list[int], dtype: torch.dtype
) -> None:
    targets = torch.zeros(size, *more).to(dtype)
    data = TensorDataset(torch.eye(6)[:size], targets)
    if more or dtype.is_floating_point:
        with pytest.raises(ValueError, match="`dataset`"):
            evaluate(nn.Identity(), data)
    else:
        assert evaluate(nn.Identity(), data) == 1 / size


def test_a_class_for_each_pixel_is_refused() -> None:
    data = TensorDataset(torch.randn(5, 1, 3, 3), torch.zeros(5, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="`dataset`"):
        evaluate(nn.Conv2d(1, 3, 1), data)


@given(
    st.lists(
        st.lists(
            st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf")]), min_size=3, max_size=3
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 2),
)
def test_accuracy_is_what_the_tracker_says(rows: list[list[float]], target: int) -> None:
    logits, targets = torch.tensor(rows), torch.full((len(rows),), target)
    tracker = ForgettingTracker(len(rows))
    tracker.update(torch.arange(len(rows)), logits, targets)
    found = evaluate(nn.Identity(), TensorDataset(logits, targets))
    assert found == int(tracker.learned.sum()) / len(rows)
    assert found <= int((~logits.isnan().any(1)).sum()) / len(rows)


def test_a_network_that_diverged_is_never_right() -> None:
    data = TensorDataset(torch.full((6, 3), float("nan")), torch.zeros(6, dtype=torch.int64))
    assert evaluate(nn.Identity(), data) == 0


@pytest.mark.parametrize("look", [evaluate, features])
@pytest.mark.parametrize(
    ("model", "data", "found"),
    [
        (TensorDataset(INPUTS, TARGETS), network(), "`model`.*TensorDataset"),
        (Gives(lambda z: (z,)), of(TARGETS), "`model`.*tuple"),
        (Gives(lambda z: {"logits": z}), of(TARGETS), "`model`.*dict"),
        (network(), of(TARGETS, INPUTS.byte()), "`dataset`.*uint8"),
    ],
)
def test_looking_at_a_model_refuses_what_it_cannot_read(
    look: Any, model: Any, data: Any, found: str
) -> None:
    with pytest.raises(TypeError, match=found):
        look(model, data)


# --- the pipeline ------------------------------------------------------------------------------


def pipeline(
    inputs: Tensor = INPUTS, targets: Tensor = TARGETS, model: Any = network, **options: Any
) -> DropHot:
    data = TensorDataset(inputs, targets)
    settings: Any = {"data_ratio": 0.5, "mode": "high", "prune_ratio": 0.5, "device": "cpu"}
    epochs: Any = {"score_epochs": 1, "train_epochs": 1, "finetune_epochs": 1}
    return DropHot(model, data, data, **settings, **epochs, **options)


@pytest.mark.parametrize("place", [0, 7])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_no_network_learns_from_are_refused_at_once(place: int, value: float) -> None:
    inputs = INPUTS.clone()
    inputs[place, 1] = value
    with pytest.raises(ValueError, match=f"`train_set`.*position {place}"):
        pipeline(inputs)


class Drawn(torch.utils.data.Dataset[Any]):
    """Data that is not kept, so that only the first target is looked at."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __len__(self) -> int:
        return 12

    def __getitem__(self, place: int) -> Any:
        return torch.randn(4), self.target


@pytest.mark.parametrize(
    "target",
    [3, -1, torch.tensor([1]), torch.tensor(1.0), torch.eye(3)[0], torch.zeros(2, 2).long()],
)
@pytest.mark.parametrize("name", ["train_set", "test_set"])
def test_a_first_target_that_is_no_class_is_refused_at_once(target: Any, name: str) -> None:
    settings: Any = {"data_ratio": 0.5, "mode": "high", "prune_ratio": 0.5, "device": "cpu"}
    sets = {"train_set": Drawn(1), "test_set": Drawn(1), name: Drawn(target)}
    with pytest.raises(ValueError, match=f"`{name}`"):
        DropHot(network, *sets.values(), **settings)


def test_an_optimiser_that_cannot_train_is_refused_at_once_unless_the_loop_is_the_users() -> None:
    with pytest.raises(TypeError, match="`optimizer`.*LBFGS"):
        pipeline(optimizer=torch.optim.LBFGS)
    pipeline(optimizer=torch.optim.LBFGS, fit=lambda *_, **__: None)
    other = network()
    with pytest.raises(ValueError, match="`optimizer`"):
        pipeline(optimizer=lambda _: torch.optim.SGD(other.parameters(), lr=0.1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("mode", ["high", "k_center"])
def test_targets_of_any_integer_type_give_the_same_record(dtype: torch.dtype, mode: str) -> None:
    # The type is a part of the data, and so of the fingerprint.
    one, other = (pipeline(targets=targets).run() for targets in (TARGETS.to(dtype), TARGETS))
    assert replace(one, fingerprint="") == replace(other, fingerprint="")


def test_inputs_that_want_a_gradient_are_data() -> None:
    assert pipeline(INPUTS.clone().requires_grad_()).run() == pipeline().run()


def test_a_tracker_takes_what_fit_gives_of_any_integer_targets() -> None:
    model, tracker = network(), ForgettingTracker(12)
    data = IndexedDataset(of(TARGETS > 0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, data, 2, optimizer=optimizer, on_batch=tracker.update)
    assert (tracker.presentations == 2).all()
