from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset, WeightedRandomSampler

from drophot import FreshSubset, IndexedDataset, LossSampling, fit
from drophot._core.ratios import num_kept


@given(st.integers(1, 60), st.floats(0.01, 1), st.integers(0, 9))
def test_a_fresh_subset_is_exact_and_each_sample_is_in_it_once(
    total: int, ratio: float, seed: int
) -> None:
    sampler = FreshSubset(total, ratio, seed=seed)
    for _ in range(3):
        found = list(sampler)
        assert len(found) == len(set(found)) == len(sampler) == num_kept(total, ratio)
        assert all(0 <= sample < total for sample in found)


def test_each_epoch_has_another_subset_in_another_order_and_can_be_had_again() -> None:
    sampler = FreshSubset(1000, 0.1)
    epochs = [list(sampler) for _ in range(3)]
    assert len({frozenset(epoch) for epoch in epochs}) == 3
    assert all(epoch != sorted(epoch) for epoch in epochs)
    again = FreshSubset(1000, 0.1)
    again.epoch = 2
    assert list(again) == epochs[2]
    assert list(FreshSubset(1000, 0.1, seed=1)) != epochs[0]


def test_all_samples_come_equally_often() -> None:
    sampler, epochs = FreshSubset(50, 0.3), 3000
    counts = Counter(sample for _ in range(epochs) for sample in sampler)
    spread = (epochs * 0.3 * 0.7) ** 0.5
    assert all(abs(counts[sample] - 0.3 * epochs) < 4.5 * spread for sample in range(50))


def test_a_fresh_subset_goes_into_any_loader() -> None:
    data = TensorDataset(torch.arange(20), torch.arange(20))
    loader = DataLoader(data, batch_size=4, sampler=FreshSubset(20, 0.5))
    assert len(loader) == 3
    assert sum(len(x) for x, _ in loader) == 10


losses = st.lists(st.floats(0, 10, width=32), min_size=1, max_size=40)


@given(losses, st.floats(0.01, 1), st.integers(0, 9))
def test_loss_sampling_keeps_an_exact_share_and_its_weights_sum_to_everything(
    values: list[float], ratio: float, seed: int
) -> None:
    total = len(values)
    sampling = LossSampling(total, ratio, seed=seed)
    sampling.update(torch.arange(total), torch.tensor(values))
    awake = sampling.begin()
    size = num_kept(total, ratio)
    assert len(awake) == size
    assert (awake.diff() > 0).all()
    weights = sampling.weights(torch.arange(total))
    assert (weights > 0).nonzero()[:, 0].tolist() == awake.tolist()
    assert weights.sum() == pytest.approx(total, rel=1e-5)
    seen, mean = torch.tensor(values), torch.tensor(values).mean()
    hard = (seen > mean).sum()
    if 2 * hard <= size < total:
        assert (weights[seen > mean] == 1).all(), "all hard ones stay"
    elif size < total:
        always = weights == 1
        if always.sum() == size // 2 and always.any():
            assert seen[always].min() >= seen[~always].max() or (weights == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.8, 1.0])
def test_the_weighted_sum_is_unbiased(ratio: float) -> None:
    """Over seeds the mean of the weights is 1, whatever the loss."""
    seen = torch.rand(40, generator=torch.Generator().manual_seed(0)).sort().values ** 3
    everything, drawn = torch.arange(40), []
    for seed in range(1000):
        sampling = LossSampling(40, ratio, seed=seed)
        sampling.update(everything, seen)
        sampling.begin()
        drawn.append(sampling.weights(everything))
    for together in (1, 4):  # each sample, and samples of similar losses
        weights = torch.stack(drawn).unflatten(1, (-1, together)).mean(2)
        spread = weights.std(0) / len(weights) ** 0.5
        assert ((weights.mean(0) - 1).abs() <= 4.5 * spread + 1e-5).all()
        assert ratio == 1 or spread.max() > 0


def test_unknown_losses_are_drawn_like_easy_ones() -> None:
    sampling = LossSampling(10, 0.5)
    assert len(sampling.begin()) == 5
    assert sampling.weights(torch.arange(10)).unique().tolist() == [0, 2]
    sampling.update(torch.tensor([0, 1, 2]), torch.tensor([9.0, 1.0, 1.0]))
    assert 0 in sampling.begin().tolist()
    assert sampling.weights(torch.tensor([0])).item() == 1
    assert len(sampling.weights(torch.arange(10)).unique()) == 3


def test_the_users_sampler_is_left_alone() -> None:
    sampling = LossSampling(8, 0.5)
    awake = list(sampling.sampler(SequentialSampler(range(8))))
    assert awake == sorted(awake), "the order is the sampler's"
    assert len(awake) == 4
    assert sampling.epoch == 1
    often = WeightedRandomSampler([1.0] * 8, 1000)
    found = list(sampling.sampler(often))
    assert 350 < len(found) < 650
    assert set(found) == set((sampling.weights(torch.arange(8)) > 0).nonzero()[:, 0].tolist())
    assert len(sampling.sampler(often)) == 4


def test_three_lines_in_a_loop_learn_as_everything_does() -> None:
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 5, generator=draws)
    data = IndexedDataset(TensorDataset(inputs, (inputs[:, 0] > 0).long()))
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    sampling = LossSampling(len(data), 0.4)
    loader = DataLoader(data, batch_size=20, sampler=sampling.sampler(range(400)))
    for _ in range(20):
        for x, y, index in loader:
            each = F.cross_entropy(model(x), y, reduction="none")
            loss = sampling.loss(index, each)
            expected = (each * sampling.weights(index)).mean()
            assert loss.item() == expected.item()
            assert torch.equal(sampling.losses[index], each.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (model(inputs).argmax(1) == data.dataset.tensors[1]).float().mean() > 0.95


def test_fit_takes_the_weights_of_a_loader() -> None:
    """Batches with weights give the step of the weighted mean."""
    torch.manual_seed(0)
    x, y, w = torch.randn(6, 3), torch.tensor([0, 1, 1, 0, 1, 0]), torch.rand(6)
    model, plain = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    batch = (x, y, torch.arange(6), w)

    class Loader:
        def __iter__(self) -> Any:
            return iter([batch, batch])

    seen: list[Any] = []
    fit(
        model,
        Loader(),
        2,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        on_batch=lambda *parts: seen.append(parts),
        on_epoch=seen.append,
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (F.cross_entropy(plain(x), y, reduction="none") * w).mean().backward()
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    assert [part if isinstance(part, int) else len(part) for part in seen] == [3, 3, 0, 3, 3, 1]


@pytest.mark.parametrize(
    ("batch", "found"),
    [(torch.zeros(2), "Tensor"), ((torch.zeros(2),), "tuple of 1"), ([1, 2, 3, 4, 5], "list of 5")],
)
def test_a_loader_of_other_things_is_named(batch: Any, found: str) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=f"`dataset`, .*{found}"):
        fit(model, iter([batch]), 1, optimizer=optimizer)
    pair = (torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TypeError, match="`on_batch`.*tuple of 2"):
        fit(model, iter([pair]), 1, optimizer=optimizer, on_batch=print)


@pytest.mark.parametrize("kind", [FreshSubset, LossSampling])
def test_wrong_input_is_named(kind: Any) -> None:
    with pytest.raises(ValueError, match="`ratio` .* 0"):
        kind(10, 0)
    with pytest.raises(ValueError, match="`num_samples` .*0"):
        kind(0, 0.5)
    with pytest.raises(TypeError):
        kind(2.5, 0.5)
    with pytest.raises(TypeError):
        kind(2, 0.5, seed="a")


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"`losses`.*\(2,\).* \(\)"):
        LossSampling(4, 0.5).loss(torch.tensor([0, 1]), torch.tensor(1.0))


def test_losses_without_the_sampler_are_refused_since_all_weights_would_be_0() -> None:
    sampling = LossSampling(4, 0.5)
    with pytest.raises(RuntimeError, match="`loss` .*sampler"):
        sampling.loss(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))


def test_one_infinite_loss_makes_the_others_no_easier() -> None:
    sampling = LossSampling(10, 0.6)
    sampling.update(torch.arange(10), torch.tensor([1.0] * 7 + [5.0, 6.0, torch.inf]))
    for _ in range(5):
        assert {7, 8, 9} <= set(sampling.begin().tolist())


@pytest.mark.parametrize("index", [[-1], [10], [0, 3, 12], [2**40]])
def test_a_position_out_of_range_is_named_and_changes_nothing(index: list[int]) -> None:
    sampling = LossSampling(10, 0.5)
    sampling.update(torch.arange(10), torch.ones(10))
    found = index[-1]
    for do in (
        lambda: sampling.update(torch.tensor(index), torch.full((len(index),), 7.0)),
        lambda: sampling.loss(torch.tensor(index), torch.full((len(index),), 7.0)),
        lambda: sampling.weights(torch.tensor(index)),
    ):
        with pytest.raises(ValueError, match=rf"`index` .*\[0, 10\).* {found}"):
            do()
    assert (sampling.losses == 1).all()


@pytest.mark.parametrize("use", ["update", "weights"])
def test_where_looking_means_waiting_the_next_epoch_names_it(
    use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the first of them is kept there until somebody reads."""
    sampling = LossSampling(10, 0.5)
    sampling.begin()
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        if use == "update":
            sampling.update(torch.tensor([1, 12, 3]), torch.ones(3))
            sampling.update(torch.tensor([], dtype=torch.int64), torch.ones(0))
            assert sampling.losses[[1, 3]].tolist() == [1, 1]
        else:
            assert sampling.weights(torch.tensor([-4, 0])).isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match=f"`index` .* {12 if use == 'update' else -4}"):
        sampling.begin()


@pytest.mark.parametrize(
    ("index", "found"),
    [
        (torch.tensor([0.0, 1.0]), "torch.float32"),
        (torch.tensor([True, False]), "torch.bool"),
        ([0, 1], "list"),
    ],
)
def test_positions_that_are_none_are_named(index: Any, found: str) -> None:
    sampling = LossSampling(2, 0.5)
    with pytest.raises(TypeError, match=f"`index` .*{found}"):
        sampling.update(index, torch.ones(2))
    with pytest.raises(TypeError, match=f"`index` .*{found}"):
        sampling.weights(index)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_positions_of_any_integers_and_twice(dtype: torch.dtype) -> None:
    sampling = LossSampling(4, 0.5)
    sampling.update(torch.tensor([1, 1, 0], dtype=dtype), torch.tensor([2.0, 2.0, 3.0]))
    assert sampling.losses[:2].tolist() == [3, 2]
    assert sampling.losses[2:].isnan().all()
    assert sampling.weights(torch.tensor([1, 1, 0], dtype=dtype)).shape == (3,)


@pytest.mark.parametrize("inner", [[0, -1], range(5), [[0, 1]], [0.0]])
def test_a_sampler_of_something_else_is_named(inner: Any) -> None:
    sampling = LossSampling(4, 1.0)
    with pytest.raises(ValueError, match=r"`sampler` .*\[0, 4\)"):
        list(sampling.sampler(inner))


def test_the_loss_of_low_precision_is_averaged_in_float32() -> None:
    sampling = LossSampling(300, 0.5)
    sampling.begin()
    losses = torch.rand(300, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = sampling.loss(torch.arange(300), losses)
    expected = (losses.float() * sampling.weights(torch.arange(300))).mean()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
