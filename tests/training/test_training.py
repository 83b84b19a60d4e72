from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.loops import Augmented, Listed, model_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from drophot import IndexedDataset, evaluate, fit


def trained(dataset: Any, **options: Any) -> list[Tensor]:
    model = model_of()
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    fit(model, dataset, 3, optimizer=optimizer, batch_size=4, **options)
    return [value.clone() for value in model.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- fit and evaluate --------------------------------------------------------------------------


def plain_loop(optimizer_of: Callable[[Any], torch.optim.Optimizer]) -> list[Tensor]:
    data = Listed(10)
    model = model_of()
    torch.manual_seed(1)
    optimizer = optimizer_of(model.parameters())
    order = torch.Generator().manual_seed(7)
    for _ in range(3):
        permutation = torch.randperm(10, generator=order).tolist()
        for start in range(0, 10, 4):
            samples = [data[i] for i in permutation[start : start + 4]]
            inputs = torch.stack([x for x, _ in samples])
            targets = torch.tensor([y for _, y in samples])
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return list(model.state_dict().values())


def test_fit_is_the_plain_loop() -> None:
    """Bit for bit where the optimiser's arithmetic is the same; else in all but the last digits."""
    found = trained(Listed(10), seed=7)
    assert same(found, plain_loop(partial(torch.optim.Adam, lr=0.01, fused=True)))
    plain = plain_loop(partial(torch.optim.Adam, lr=0.01))
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def test_one_seed_gives_one_result_and_another_another() -> None:
    assert same(trained(Listed(), seed=3), trained(Listed(), seed=3))
    assert not same(trained(Listed(), seed=3), trained(Listed(), seed=4))


def test_data_in_memory_and_data_read_anew_give_the_same_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick = trained(Listed(), seed=3)
    monkeypatch.setattr("drophot._core.memory.available", lambda device: 0)
    data = Listed()
    assert same(trained(data, seed=3), quick)
    assert data.readings > 30, "it was indeed read in every epoch"


def test_every_sample_is_seen_once_an_epoch_with_its_index() -> None:
    data = IndexedDataset(Listed(10))
    seen: list[tuple[int, ...]] = []
    epochs: list[int] = []

    def on_batch(index: Tensor, logits: Tensor, targets: Tensor) -> None:
        assert logits.shape == (len(index), 2)
        assert not logits.requires_grad
        assert targets.tolist() == [data[i][1] for i in index.tolist()]
        seen.append(tuple(index.tolist()))

    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(
        model,
        Subset(data, [9, 1, 4, 5, 7]),
        2,
        optimizer=optimizer,
        batch_size=3,
        on_batch=on_batch,
        on_epoch=epochs.append,
    )
    assert [len(batch) for batch in seen] == [3, 2, 3, 2], "the last batch holds what is left"
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert sorted(first) == sorted(second) == [1, 4, 5, 7, 9]
    assert first != second
    assert epochs == [0, 1]
    assert model.training


def test_fit_leaves_a_model_that_on_epoch_evaluates_in_training_mode() -> None:
    model = model_of()
    modes = []

    def on_batch(*_: Any) -> None:
        modes.append(model.training)

    def on_epoch(_: int) -> None:
        model.eval()  # a user who does not put it back

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = IndexedDataset(Listed())
    fit(model, data, 2, optimizer=optimizer, on_batch=on_batch, on_epoch=on_epoch)
    assert modes == [True, True]


def test_no_epochs_change_nothing() -> None:
    model = model_of()
    before = [p.clone() for p in model.parameters()]
    fit(model, Listed(), 0, optimizer=torch.optim.SGD(model.parameters(), lr=1))
    assert same(list(model.parameters()), before)


@given(st.integers(1, 3000), st.integers(0, 10))
def test_evaluate_counts_what_is_right(size: int, shift: int) -> None:
    inputs = torch.eye(11)[torch.arange(size) % 11]
    targets = (torch.arange(size) % 11 != shift).long() * (torch.arange(size) % 11)
    right = int((inputs.argmax(1) == targets).sum())
    assert evaluate(nn.Identity(), TensorDataset(inputs, targets)) == right / size


def test_evaluate_leaves_no_trace() -> None:
    model = model_of().train()
    state = torch.get_rng_state()
    assert 0 <= evaluate(model, Augmented("torch")) <= 1
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    inputs = Listed(2000)
    by_hand = model.eval()(inputs.inputs).argmax(1) == (inputs.inputs.sum(1) > 0)
    assert evaluate(model, inputs) == int(by_hand.sum()) / 2000


# --- wrong use ---------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        yield torch.zeros(3), 0


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (
            Subset(TensorDataset(torch.zeros(2, 3), torch.zeros(2)), []),
            ValueError,
            "`dataset`.*empty",
        ),
        (TensorDataset(torch.zeros(0, 3), torch.zeros(0)), ValueError, "`dataset`.*empty"),
        ([], ValueError, "`dataset`.*empty"),
        (Stream(), TypeError, "`dataset`.*Stream"),
        ([("image", 0)], TypeError, r"`dataset`.*\(str, int\).*ToTensor"),
        ([torch.zeros(3)], TypeError, "`dataset`.*Tensor"),
        ([{"x": torch.zeros(3)}], TypeError, "`dataset`.*dict"),
        ([(torch.zeros(3), "cat")], TypeError, r"`dataset`.*\(Tensor, str\)"),
        ([(torch.zeros(3), 0, 0, 0)], TypeError, r"`dataset`.*\(Tensor, int, int, int\)"),
    ],
)
def test_data_that_cannot_be_trained_on_is_named(
    dataset: Any, error: type[Exception], message: str
) -> None:
    model = model_of()
    with pytest.raises(error, match=message):
        fit(model, dataset, 1, optimizer=torch.optim.SGD(model.parameters(), lr=1))
    with pytest.raises(error, match=message):
        evaluate(model, dataset)


def test_wrong_numbers_are_named() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="`epochs`.*-1"):
        fit(model, Listed(), -1, optimizer=optimizer)
    with pytest.raises(ValueError, match="`batch_size`.*0"):
        fit(model, Listed(), 1, optimizer=optimizer, batch_size=0)
    with pytest.raises(ValueError, match="`dataset`.*on_batch.*2"):
        fit(model, Listed(), 1, optimizer=optimizer, on_batch=lambda *_: None)
    assert same(list(model.parameters()), before)


# --- what would be a number and nothing more ---------------------------------------------------


@pytest.mark.parametrize("cache", ["auto", True, False])
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("target", [-1, -100, 3, 7])
def test_targets_that_no_prediction_can_be_are_refused(
    target: int, listed: bool, cache: Any
) -> None:
    targets = torch.arange(1100) % 3
    targets[700] = target
    base = TensorDataset(torch.rand(1100, 3), targets)
    data = Subset(list(base), range(1100)) if listed else base
    with pytest.raises(ValueError, match=rf"`dataset`.*{target}"):
        evaluate(nn.Identity(), data, cache=cache)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ((torch.arange(4), torch.ones(4, 1)), r"\(4, 1\)"),
        ((torch.arange(4), torch.ones(1)), r"\(1,\)"),
        ((torch.arange(4), torch.ones(())), r"\(\)"),
        ((torch.arange(4), torch.ones(4, dtype=torch.int64)), "int64"),
        ((torch.arange(4), torch.tensor([1, 1, float("nan"), 1])), "NaN"),
        ((torch.arange(4), torch.tensor([1, 1, float("inf"), 1])), "infinity"),
        ((torch.ones(4),), "third"),
        ((torch.ones(4), torch.arange(4)), "third"),
    ],
)
def test_weights_that_would_be_other_weights_are_refused(
    more: tuple[Tensor, ...], found: str
) -> None:
    class Loader:
        def __iter__(self) -> Any:
            yield (torch.rand(4, 3), torch.arange(4) % 2, *more)

    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=found):
        fit(model, Loader(), 1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.weight, before)


def test_a_training_that_diverged_says_so() -> None:
    data = TensorDataset(torch.full((8, 3), 1e20), torch.arange(8) % 2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    with pytest.warns(UserWarning, match=r"`0\.weight`"):
        fit(model, data, 4, optimizer=optimizer)
