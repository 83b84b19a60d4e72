"""What the library reads is what the data set gives: no class is read past its own methods."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from drophot import CrestLoader, DropHot, IndexedDataset, evaluate, features, fit
from drophot.data.batching import batches
from drophot.data.samples import targets_of
from drophot.training import in_memory

CPU = torch.device("cpu")
SIZE = 24


def base() -> TensorDataset:
    return TensorDataset(torch.ones(SIZE, 2), torch.arange(SIZE) % 2)


def altered(sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return sample[0] * 100, 1 - sample[1]


class Tensors(TensorDataset):
    def __getitem__(self, place: Any) -> Any:
        return altered(super().__getitem__(place))


class Part(Subset):
    def __getitem__(self, place: Any) -> Any:
        return altered(super().__getitem__(place))

    def __getitems__(self, places: list[int]) -> list[Any]:
        return [self[place] for place in places]


class InBatches(Dataset[Any]):
    """What `DataLoader` prefers to indexing, which gives something else here."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, place: int) -> Any:
        return base()[place]

    def __getitems__(self, places: list[int]) -> list[Any]:
        return [altered(base()[place]) for place in places]


class Indexed(IndexedDataset):
    def __getitem__(self, place: int) -> Any:
        inputs, target, index = super().__getitem__(place)
        return (*altered((inputs, target)), index)

    def __getitems__(self, places: Any) -> list[Any]:
        return [self[place] for place in places]


def with_own_method() -> TensorDataset:
    data = base()
    vars(data)["__getitems__"] = lambda places: [altered(data[place]) for place in places]
    return data


OWN: dict[str, Callable[[], Any]] = {
    "TensorDataset": lambda: Tensors(*base().tensors),
    "Subset": lambda: Part(base(), range(SIZE)),
    "Subset of a subclass": lambda: Subset(Tensors(*base().tensors), range(SIZE)),
    "a list": lambda: [altered(sample) for sample in base()],
    "ConcatDataset": lambda: ConcatDataset([Tensors(*base().tensors)]),
    "__getitems__": InBatches,
    "__getitems__ of the object": with_own_method,
    "IndexedDataset": lambda: Indexed(base()),
}


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.given = nn.Linear(2, 2), set()

    def forward(self, inputs: Tensor) -> Tensor:
        self.given.update(inputs.flatten().tolist())
        return self.layer(inputs / 100)


class SaysOne(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([inputs[:, 0] * 0, inputs[:, 0] * 0 + 1], 1)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("cache", ["auto", True, False])
def test_every_door_reads_what_the_data_set_gives(name: str, cache: Any) -> None:
    data = OWN[name]()
    expected = [altered(sample)[1].item() for sample in base()]
    model = Seen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, data, 2, optimizer=optimizer, cache=cache)
    assert evaluate(SaysOne(), data, cache=cache) == sum(expected) / SIZE
    features(model, data, cache=cache)
    next(iter(CrestLoader(data, model, batch_size=4, cache=cache)))
    assert model.given == {100.0}
    assert targets_of(data).tolist() == expected
    kept: Any = in_memory(data, "cpu", cache=cache)
    found = torch.cat([targets for _, targets, *_ in batches(kept, 7, CPU)])
    assert found.tolist() == expected


@pytest.mark.parametrize("name", [name for name in OWN if name != "IndexedDataset"])
def test_a_pipeline_reads_what_the_data_set_gives(name: str) -> None:
    settings: Any = {"mode": "high", "data_ratio": 0.5, "prune_ratio": 0.5, "device": "cpu"}
    models: list[Seen] = []

    def factory() -> Seen:
        models.append(Seen())
        return models[-1]

    run = DropHot(factory, OWN[name](), OWN[name](), **settings, score_epochs=1, train_epochs=1)
    run.run()
    assert {value for model in models for value in model.given} == {100.0}


INDICES: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "NumPy's integers": lambda places: [np.int32(place) for place in places],
    "tensors": lambda places: [torch.tensor(place) for place in places],
    "truth values": lambda places: [place > 3 for place in places],
    **{
        f"NumPy's {name}": lambda places, name=name: np.array(places).astype(name)
        for name in ("int64", "uint8", "int16", "uint64")
    },
    **{
        f"torch's {dtype}": lambda places, dtype=dtype: torch.tensor(places, dtype=dtype)
        for dtype in (torch.int64, torch.int32, torch.int8, torch.uint8)
    },
}


@given(st.sampled_from(sorted(INDICES)), st.lists(st.integers(0, SIZE - 1), min_size=1), st.data())
def test_a_subset_is_read_as_torch_reads_it(kind: str, places: list[int], data: Any) -> None:
    inner = data.draw(st.sampled_from([base(), IndexedDataset(base())]))
    subset = Subset(inner, INDICES[kind](places))
    try:
        expected = next(iter(DataLoader(subset, batch_size=len(places))))
    except Exception:  # what torch does not read, nobody else has to
        return
    (found,) = batches(in_memory(subset, "cpu"), len(places), CPU)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@given(st.integers(-SIZE, SIZE), st.integers(-SIZE, SIZE), st.integers(1, 3))
def test_a_range_counts_as_its_numbers(start: int, stop: int, step: int) -> None:
    places = [p for p in range(start, stop, step) if -SIZE <= p < SIZE]
    if len(places) == len(range(start, stop, step)) > 0:
        found: Any = in_memory(Subset(base(), range(start, stop, step)), "cpu")
        assert found.tensors[1].tolist() == [p % 2 for p in places]


def test_tensors_of_another_length_are_read_as_indexing_reads_them() -> None:
    data = base()
    data.tensors = (data.tensors[0][:5], data.tensors[1])
    found: Any = in_memory(data, "cpu")
    assert [len(tensor) for tensor in found.tensors] == [5, 5]


# --- samples that do not go into one batch -----------------------------------------------------


class Sizes(Dataset[Any]):
    def __init__(self, odd: int) -> None:
        self.odd = odd

    def __len__(self) -> int:
        return 1100

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.zeros(1, 2 + (place == self.odd), 2), place % 3


@pytest.mark.parametrize("odd", [1, 700, 1024, 1099])
def test_a_sample_of_another_shape_is_named(odd: int) -> None:
    data = Sizes(odd)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    doors: list[Callable[[], object]] = [
        lambda: fit(model, data, 2, optimizer=optimizer),
        lambda: evaluate(model, data),
        lambda: features(model, data),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=rf"`dataset`.*\(?\[?1, 3, 2\]?\)? at position {odd}"):
            door()
    even = Sizes(-1)
    for name, sets in (("train_set", (data, even)), ("test_set", (even, data))):
        settings: Any = {"mode": "high", "data_ratio": 0.5, "prune_ratio": 0.5, "device": "cpu"}
        with pytest.raises(ValueError, match=rf"`{name}`.*position {odd}"):
            DropHot(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), *sets, **settings)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (DataLoader(base(), 4), "DataLoader"),
        (nn.Linear(2, 2), "Linear"),
        (nn.Sequential(nn.Linear(2, 2)), "Sequential"),
        ({"train": base()}, "dict"),
        (3, "int"),
    ],
)
def test_what_is_no_data_set_is_named(data: Any, found: str) -> None:
    model = nn.Linear(2, 2)
    settings: Any = {"mode": "high", "data_ratio": 0.5, "prune_ratio": 0.5, "device": "cpu"}
    doors: dict[str, Callable[[], object]] = {
        "dataset": lambda: evaluate(model, data),
        "dataset ": lambda: features(model, data),
        "dataset  ": lambda: CrestLoader(data, model),
        "train_set": lambda: DropHot(lambda: model, data, base(), **settings),
        "test_set": lambda: DropHot(lambda: model, base(), data, **settings),
    }
    for name, door in doors.items():
        with pytest.raises(TypeError, match=f"`{name.strip()}`.*{found}"):
            door()
