import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drophot._core.order_statistics import (
    Layers,
    count_removed,
    kth_value,
    magnitude_thresholds,
    prune_below,
)
from drophot._core.sampled_select import Group, values_at_ranks


@given(st.data(), st.sampled_from([32, 64]))
def test_kth_value_of_floats_is_that_of_a_sort(data: st.DataObject, width: int) -> None:
    values = data.draw(st.lists(st.floats(allow_nan=False, width=width), min_size=1, max_size=30))
    rank = data.draw(st.integers(0, len(values) - 1))
    tensor = torch.tensor(values, dtype=torch.float32 if width == 32 else torch.float64)
    found = kth_value(tensor, rank)
    assert found.dtype == tensor.dtype
    assert found == np.sort(np.array(values))[rank]


@given(st.data(), st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
def test_kth_value_of_integers_is_that_of_a_sort(data: st.DataObject, dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    values = data.draw(st.lists(st.integers(limits.min, limits.max), min_size=1, max_size=30))
    rank = data.draw(st.integers(0, len(values) - 1))
    found = kth_value(torch.tensor(values, dtype=dtype), rank)
    assert found.dtype == dtype
    assert int(found) == sorted(values)[rank]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_more_than_a_block(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn((1 << 21) + 5, generator=generator, dtype=torch.float64) * 1e6).to(dtype)
    ordered = values.sort().values
    for rank in (0, 1, 1 << 20, 1 << 21, len(values) - 1):
        assert kth_value(values, rank) == ordered[rank]


@given(
    st.integers(0, 2**32),
    st.integers(1, 1 << 21),
    st.integers(0, (1 << 20) + 99),
    st.sampled_from([torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64]),
)
@settings(max_examples=15, deadline=None)
def test_many_values_with_ties(seed: int, distinct: int, rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-distinct, distinct, ((1 << 20) + 100,), generator=generator)
    values = (whole.abs() // 16).to(dtype) if dtype == torch.uint8 else whole.to(dtype)
    before = values.clone()
    assert kth_value(values, rank) == values.sort().values[rank]
    assert values.equal(before)


@given(
    st.lists(st.integers(0, 100_000), min_size=1, max_size=4),
    st.integers(0, 99_999),
    st.sampled_from([0, 0.1, 6]),
    st.integers(1, 1 << 20),
    st.integers(0, 2**32),
)
@settings(max_examples=15, deadline=None)
def test_ranks_of_several_groups_despite_bounds_that_miss_them(
    sizes: list[int], rank: int, deviations: float, distinct: int, seed: int
) -> None:
    draws = np.random.default_rng(seed)
    several = [draws.integers(distinct, size=size) for size in [*sizes, 100_000]]
    single = draws.standard_normal((1 << 18) + 100)
    groups = [Group(several, rank), Group([single], rank), Group([several[-1]], rank)]
    found = values_at_ranks(groups, num_deviations=deviations)
    for group, (value, below, ties) in zip(groups, found, strict=True):
        ordered = np.sort(np.concatenate(group.arrays))
        assert value == ordered[rank]
        assert below == np.searchsorted(ordered, value)
        assert below + ties == np.searchsorted(ordered, value, "right")


def test_a_view_of_many_values_that_is_not_contiguous() -> None:
    values = torch.randn(2, 1 << 20, generator=torch.Generator().manual_seed(0)).T[:, 1]
    assert kth_value(values, 77_777) == values.sort().values[77_777]


def test_both_zeros_are_one() -> None:
    assert kth_value(torch.tensor([0.0, -0.0, 1.0]), 0) == 0
    assert not np.signbit(kth_value(torch.tensor([-0.0, -0.0]), 1).numpy())
    assert not np.signbit(kth_value(torch.full((1 << 20,), -0.0), 1).numpy())


@given(
    st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, 3e-45, 3e38]), min_size=1, max_size=20),
    st.data(),
)
def test_cutting_removes_as_many_as_asked_spread_over_the_pieces(
    values: list[float], data: st.DataObject
) -> None:
    remove = data.draw(st.integers(0, len(values)))
    split = data.draw(st.integers(0, len(values)))
    pieces = [torch.tensor(values[:split]), torch.tensor(values[split:])]
    layers = Layers(pieces, remove)
    (threshold,) = magnitude_thresholds([layers])
    expected = count_removed(threshold, layers)
    (found,) = prune_below([layers], [threshold])
    assert [int((~mask).sum()) for mask in found] == expected
    masks = torch.cat(found)
    magnitudes = torch.tensor(values).abs()
    assert int((~masks).sum()) == remove
    assert torch.equal(torch.cat(pieces), torch.tensor(values) * masks)
    if masks.any() and not masks.all():
        assert magnitudes[masks].min() >= magnitudes[~masks].max()


@given(
    st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0]), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.data(),
)
def test_what_an_older_mask_removed_goes_first(
    values: list[float], dtype: torch.dtype, data: st.DataObject
) -> None:
    kept = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    )
    remove = data.draw(st.integers(0, len(values)))
    weight = torch.tensor(values, dtype=dtype)
    older = kept | (weight != 0)
    gone = int((~older).sum())
    layers = Layers([weight], remove, [kept])
    (threshold,) = magnitude_thresholds([layers])
    assert count_removed(threshold, layers) == [max(remove, gone)]
    ((mask,),) = prune_below([layers], [threshold])
    assert int((~mask).sum()) == max(remove, gone)
    assert not (mask & ~older).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_ties_over_many_blocks_and_layouts_are_those_of_a_direct_computation(
    dtype: torch.dtype,
) -> None:
    draws = torch.Generator().manual_seed(0)
    shapes = [(3, 7), (600, 500), (2, 3, 300, 100), (1, 2, 150_001)]
    pieces = [(torch.randn(s, generator=draws) * 2).round().to(dtype) for s in shapes]
    pieces[1] = pieces[1].t().contiguous().t()
    pieces[2] = pieces[2].to(memory_format=torch.channels_last)
    pieces[3] = pieces[3].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    values = torch.cat([piece.reshape(-1) for piece in pieces])
    remove = len(values) // 2
    limit = values.abs().sort().values[remove]
    ties = (values.abs() == limit).nonzero()[:, 0]
    number = torch.arange(len(ties))
    num_removed = remove - int((values.abs() < limit).sum())
    assert 0 < num_removed < len(ties)
    expected = values.abs() > limit
    expected[ties] = (number + 1) * num_removed // len(ties) == number * num_removed // len(ties)

    layers = Layers(pieces, remove)
    (found,) = prune_below([layers], magnitude_thresholds([layers]))
    assert torch.cat([mask.view(-1) for mask in found]).equal(expected)
    pruned = torch.cat([piece.reshape(-1) for piece in pieces])
    assert pruned.equal(values * expected)
    assert not pruned[~expected].signbit().any()


def test_autograd_notices_that_a_weight_was_pruned() -> None:
    weight, inputs = torch.nn.Parameter(torch.arange(4.0)), torch.ones(4, requires_grad=True)
    output = (weight * inputs).sum()
    layers = Layers([weight], 2)
    prune_below([layers], magnitude_thresholds([layers]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()
