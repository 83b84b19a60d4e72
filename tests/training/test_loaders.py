"""`batches` of datasets and of loaders, and the loader that a `fit` is given."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from drophot import IndexedDataset
from drophot.training import BatchLoader, batches

CPU = torch.device("cpu")
INPUTS, TARGETS = torch.randn(10, 3), torch.arange(10) % 2
INDEX, WEIGHTS = torch.arange(10), torch.arange(10) / 10
PARTS = (INPUTS, TARGETS, INDEX, WEIGHTS)


class Loader:
    """Yields batches of four, and counts its epochs."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts, self.epochs = parts, 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        self.epochs += 1
        yield from zip(*(part.split(4) for part in self.parts), strict=True)


def assert_parts(found: list[tuple[Tensor, ...]], expected: tuple[Tensor, ...]) -> None:
    assert [len(batch[0]) for batch in found] == [4, 4, 2]
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    torch.testing.assert_close(columns, list(expected), rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_batches_of_a_loader_have_all_of_its_parts_in_each_epoch(size: int) -> None:
    loader = Loader(*PARTS[:size])
    for source in (loader, BatchLoader(loader, 3)):
        for _ in range(2):
            assert_parts(list(batches(source, 64, CPU)), PARTS[:size])
    assert loader.epochs == 4


def test_batches_of_a_dataset_are_in_the_order_that_is_drawn() -> None:
    data = IndexedDataset(TensorDataset(INPUTS, TARGETS))
    drawn = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    shuffle = torch.Generator().manual_seed(3)
    expected = (INPUTS[drawn], TARGETS[drawn], INDEX[drawn])
    assert_parts(list(batches(data, 4, CPU, shuffle=shuffle)), expected)
    assert_parts(list(batches(data, 4, CPU)), PARTS[:3])


def test_a_batch_loader_ends_after_its_number_of_batches() -> None:
    loader = BatchLoader(Loader(*PARTS), 2)
    assert len(loader) == 2
    assert len(list(loader)) == len(list(batches(loader, 4, CPU))) == 2


def test_targets_of_any_integer_type_are_int64() -> None:
    for dtype in (torch.int32, torch.uint8, torch.bool):
        found = list(batches(Loader(INPUTS, TARGETS.to(dtype)), 4, CPU))
        assert {batch[1].dtype for batch in found} == {torch.int64}


@pytest.mark.parametrize(
    ("loader", "error", "words"),
    [
        (Loader(INPUTS), TypeError, "tuple of 1"),
        (Loader(*PARTS, WEIGHTS), TypeError, "tuple of 5"),
        (DataLoader([{"x": 0.0}], 1), TypeError, "dict"),
        (Loader(INPUTS, TARGETS, WEIGHTS), ValueError, "float32"),
        (Loader(INPUTS, TARGETS, INDEX, INDEX), ValueError, r"\(4,\).*int64"),
        (Loader(INPUTS, TARGETS, INDEX, WEIGHTS[:, None]), ValueError, r"\(4,\).*\(4, 1\)"),
        (Loader(INPUTS, TARGETS, INDEX, WEIGHTS / 0), ValueError, "NaN"),
        (BatchLoader([], 3), ValueError, "at least one batch"),
    ],
)
def test_loaders_that_cannot_be_trained_on_are_refused(
    loader: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"`dataset`.*{words}"):
        list(batches(loader, 4, CPU))


@pytest.mark.parametrize(
    "read", [lambda loader: loader[0], lambda loader: next(iter(DataLoader(loader)))]
)
def test_samples_of_a_batch_loader_cannot_be_read_by_position(read: Any) -> None:
    with pytest.raises(TypeError, match=r"`dataset`.*loader.*0.*drophot\.training\.batches"):
        read(BatchLoader(Loader(*PARTS), 3))
