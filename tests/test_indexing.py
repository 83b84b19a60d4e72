import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from drophot import IndexedDataset


class Named(Dataset):
    """As torchvision's data sets: `targets` and `classes` beside the samples."""

    def __init__(self, size: int) -> None:
        self.targets = [i % 3 for i in range(size)]
        self.classes = ["a", "b", "c"]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.tensor(float(i)), self.targets[i]


class Batched(Named):
    """A data set that reads in batches, as Hugging Face's do."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.calls = 0

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        self.calls += 1
        return [self[i] for i in indices]


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (("x", 1), ("x", 1, 0)),
        (["x", 1], ("x", 1, 0)),
        ({"x": 1}, {"x": 1, "index": 0}),
        ("x", ("x", 0)),
        ((), (0,)),
    ],
)
def test_a_sample_of_any_kind_gains_its_index(sample: Any, expected: Any) -> None:
    assert IndexedDataset([sample])[0] == expected


def test_the_index_stays_with_its_sample_through_shuffling_and_workers() -> None:
    loader = DataLoader(IndexedDataset(Named(50)), batch_size=7, shuffle=True, num_workers=2)
    seen = []
    for inputs, targets, index in loader:
        assert index.dtype == torch.int64
        assert torch.equal(inputs, index.float())
        assert torch.equal(targets, index % 3)
        seen += index.tolist()
    assert sorted(seen) == list(range(50))


def test_dict_samples_collate_to_an_index_tensor() -> None:
    data = IndexedDataset([{"x": torch.tensor(i)} for i in range(4)])
    batch = next(iter(DataLoader(data, batch_size=4)))
    assert torch.equal(batch["index"], batch["x"])


@given(st.lists(st.integers(0, 19), min_size=1, max_size=20, unique=True))
def test_subset_of_indexed_gives_original_indices_and_the_other_way_round_positions(
    indices: list[int],
) -> None:
    data = Named(20)
    inside, outside = Subset(IndexedDataset(data), indices), IndexedDataset(Subset(data, indices))
    assert [sample[2] for sample in inside] == indices
    assert [sample[2] for sample in outside] == list(range(len(indices)))
    assert [sample[0] for sample in inside] == [sample[0] for sample in outside]


def test_batched_reading_is_used_where_it_is_there() -> None:
    data = Batched(10)
    batch = next(iter(DataLoader(Subset(IndexedDataset(data), [7, 3]), batch_size=2)))
    assert batch[2].tolist() == [7, 3]
    assert data.calls == 1


def test_negative_and_foreign_integers_become_plain_positions() -> None:
    data = IndexedDataset(Named(5))
    assert data[-1][2] == 4
    assert type(data[np.int64(3)][2]) is int  # type: ignore[index]
    assert data[torch.tensor(3)][2] == 3  # type: ignore[index]
    assert data.__getitems__([-1])[0][2] == 4


@pytest.mark.parametrize("index", [5, -6])
def test_an_index_out_of_range_is_named(index: int) -> None:
    with pytest.raises(IndexError, match=rf"\[0, 5\)\. Found {index}"):
        IndexedDataset(Named(5))[index]


def test_iteration_ends() -> None:
    assert [sample[2] for sample in IndexedDataset(Named(3))] == [0, 1, 2]


def test_attributes_of_the_dataset_stay_reachable_also_after_a_copy() -> None:
    data = IndexedDataset(Named(4))
    for one in (data, copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert one.targets == [0, 1, 2, 0]
        assert one.classes == ["a", "b", "c"]
        assert len(one) == 4
    with pytest.raises(AttributeError, match="no_such"):
        _ = data.no_such
    assert "TensorDataset" in repr(IndexedDataset(TensorDataset(torch.zeros(1))))


def test_a_stream_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            yield 1

    with pytest.raises(TypeError, match="Found Stream without `__len__`"):
        IndexedDataset(Stream())
    with pytest.raises(TypeError, match="Found int without `__len__` and `__getitem__`"):
        IndexedDataset(3)


def test_a_key_named_index_is_not_overwritten() -> None:
    with pytest.raises(ValueError, match=r'no key "index" of its own\. Found 99 at position 0'):
        IndexedDataset([{"index": 99}])[0]
