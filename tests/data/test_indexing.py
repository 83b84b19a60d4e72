import copy
import pickle
from collections import OrderedDict, UserDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from drophot import ForgettingTracker, IndexedDataset


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
    with pytest.raises(IndexError, match=rf"`index`.*\[0, 5\).*{index}"):
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

    with pytest.raises(TypeError, match="`dataset`.*Stream without `__len__`"):
        IndexedDataset(Stream())

    class Counted(Stream):  # as WebDataset's `with_length`
        def __len__(self) -> int:
            return 1

    class Both(Counted):  # as mosaicml's, whose order is its own
        def __getitem__(self, i: int) -> int:
            return i

    for kind in (Counted, Both):
        with pytest.raises(TypeError, match=f"`dataset`.*{kind.__name__} which is iterable"):
            IndexedDataset(kind())
    with pytest.raises(TypeError, match="`dataset`.*int without `__len__` and `__getitem__`"):
        IndexedDataset(3)


def test_a_key_named_index_is_not_overwritten() -> None:
    with pytest.raises(ValueError, match=r'`dataset`.*"index".*99 at position 0'):
        IndexedDataset([{"index": 99}])[0]
    with pytest.raises(ValueError, match=r"99 at position 0"):
        IndexedDataset([Wrapped(1, 99)])[0]


def test_a_key_named_index_that_is_the_index_stays() -> None:
    samples = [{"x": i, "index": i} for i in range(3)]
    assert list(IndexedDataset(samples)) == samples
    assert IndexedDataset([{"index": torch.tensor(0)}])[0]["index"] == 0
    assert IndexedDataset([Wrapped(1, 0)])[0] == (1, 0)


class Wrapped(NamedTuple):
    image: Any
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Pair(NamedTuple):
    image: torch.Tensor
    label: int

    def twice(self) -> torch.Tensor:
        return 2 * self.image


class Kept(UserDict):  # as Hugging Face's BatchEncoding
    pass


class Of(Dataset):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: Any) -> Any:
        return self.make(i)


def image(i: int) -> torch.Tensor:
    return torch.tensor([float(i)])


@pytest.mark.parametrize("workers", [0, 1])
def test_named_tuples_keep_their_names(workers: int) -> None:
    """Through collating, workers and `watch`; the class and its methods too."""
    data = IndexedDataset([Pair(image(i), i % 3) for i in range(12)])
    assert isinstance(data[1], Pair)
    assert pickle.loads(pickle.dumps(data[1])).twice() == 2
    assert copy.deepcopy(data[1])._fields == ("image", "label", "index")
    for batch in DataLoader(data, batch_size=4, shuffle=True, num_workers=workers):
        assert torch.equal(batch.image[:, 0], batch.index.float())
        assert torch.equal(batch.label, batch.index % 3)
    tracker, model = ForgettingTracker(12), torch.nn.Linear(1, 3)
    with tracker.attach(model):
        for batch in tracker.watch(DataLoader(data, batch_size=4)):
            assert type(batch) is Pair
            assert torch.equal(batch.twice(), 2 * batch.image)
            model(batch.image)
    assert tracker.scores().shape == (12,)


def test_mappings_of_any_kind_stay_mappings() -> None:
    for kind in (Kept, OrderedDict, dict):
        sample = kind(x=1)
        found = IndexedDataset([sample])[0]
        assert type(found) is kind
        assert dict(found) == {"x": 1, "index": 0}
        assert "index" not in sample, "what is in the data set is left as it was"
    frozen = IndexedDataset([MappingProxyType({"x": 1})])[0]
    assert dict(frozen) == {"x": 1, "index": 0}


def test_samples_that_are_none_can_be_dropped() -> None:
    data = IndexedDataset(Of(lambda i: None if i == 3 else (image(i), i % 3)))
    loader = DataLoader(
        data, batch_size=4, collate_fn=lambda batch: default_collate([s for s in batch if s])
    )
    assert [index.tolist() for *_, index in loader] == [[0, 1, 2], [4, 5, 6, 7], [8, 9, 10, 11]]


WHOLE = torch.arange(12.0)


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(WHOLE, WHOLE.long() % 3),
        Of(lambda i: (WHOLE[i], WHOLE[i].long() % 3)),
        Subset(Of(lambda i: (WHOLE[i], WHOLE[i].long() % 3)), list(range(12))),
    ],
)
def test_batches_are_read_at_once(data: Dataset) -> None:
    data = IndexedDataset(data)
    wanted: list[Any] = [[3, 1, -1], (3, 1, 11), np.array([3, 1, 11]), torch.tensor([3, 1, -1])]
    for which in wanted:
        x, y, index = data[which]
        assert index.tolist() == [3, 1, 11]
        assert x.tolist() == [3, 1, 11]
        assert y.tolist() == [0, 1, 2]
    mask = WHOLE > 9
    for which in (mask, mask.numpy(), mask.tolist()):
        assert data[which][2].tolist() == [10, 11]
    if not isinstance(data.dataset, Subset):  # which takes no slices
        assert data[2:9:3][2].tolist() == [2, 5, 8]
    batches = BatchSampler(RandomSampler(range(12)), 5, drop_last=False)
    loader = DataLoader(data, sampler=batches, batch_size=None)
    assert sorted(torch.cat([index for *_, index in loader]).tolist()) == list(range(12))
    assert all(torch.equal(x.long(), index) for x, _, index in loader)
    with pytest.raises(IndexError, match="`index`.*12"):
        data[[0, 12]]


def test_parts_of_a_list_are_samples() -> None:
    letters = IndexedDataset([("a", 0), ("b", 1), ("c", 0)])
    assert letters[1:] == [("b", 1, 1), ("c", 0, 2)]
    assert letters[[2, 0]] == [("c", 0, 2), ("a", 0, 0)]


def test_attributes_set_through_it_reach_the_data_set() -> None:
    data = IndexedDataset(Named(4))
    data.targets = [9, 9, 9, 9]
    assert data[2][1:] == (9, 2)
    data.note = "of its own"
    assert not hasattr(data.dataset, "note")
    data.dataset = Named(3)
    assert len(data) == 3


class Doubled(IndexedDataset):
    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        self.classes = "its own"

    def __getitem__(self, i: int) -> Any:
        x, y, index = super().__getitem__(i)
        return 2 * x, y, index


class Shifted(Batched):
    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        return x + 100, y

    def __getitems__(self, indices: list[int]) -> Any:
        return super().__getitems__(indices)


class Shown(Batched):
    def __getitems__(self, indices: list[int]) -> Any:
        raise AssertionError("this is the inherited read")


class Augmented(Shown):
    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        return x + 100, y


def test_a_getitem_of_ones_own_is_read_through() -> None:
    """Also where the class inherits a batched read, which knows nothing of it."""
    outside = DataLoader(Doubled(Batched(6)), batch_size=3)
    assert [x.tolist() for x, *_ in outside] == [[0, 2, 4], [6, 8, 10]]
    assert outside.dataset.classes == "its own"
    assert outside.dataset.dataset.classes == ["a", "b", "c"]
    for kind in (Shifted, Augmented):
        inside = DataLoader(IndexedDataset(kind(4)), batch_size=2)
        assert [x.tolist() for x, *_ in inside] == [[100, 101], [102, 103]]


def test_data_sets_of_hugging_face() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": [1.0, 2.0, 3.0], "label": [0, 1, 0]})
    indexed = IndexedDataset(data)
    assert indexed[1] == {"x": 2.0, "label": 1, "index": 1}
    assert indexed["label"][:] == [0, 1, 0]
    batch = indexed[1:]
    assert batch["x"] == [2.0, 3.0]
    assert batch["index"].tolist() == [1, 2]
    loader = DataLoader(IndexedDataset(data.with_format("torch")), batch_size=3)
    assert next(iter(loader))["index"].tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match="IterableDataset"):
        IndexedDataset(data.to_iterable_dataset())
