"""What is kept in memory is what reading would give; what may change is read anew."""

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.loops import Listed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from drophot import CrestLoader, DropHot, IndexedDataset, evaluate, features, fit
from drophot.training import in_memory

RARE = 0.002


class Samples(Dataset[Any]):
    """Sixty samples, whose inputs are what `alter` makes of a number."""

    def __init__(self, alter: Callable[[float], Any] = float, size: int = 60) -> None:
        self.alter, self.size = alter, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.full((2,), float(self.alter(place))), place % 3


class Seen(nn.Module):
    """Notes what it is given, epoch by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.given = nn.Linear(2, 3), []

    def forward(self, inputs: Tensor) -> Tensor:
        self.given.append(inputs[:, 0].detach().clone())
        return self.layer(inputs)


def seen(data: Any, epochs: int = 3, **options: Any) -> list[list[float]]:
    """What each epoch's samples are, sorted."""
    model = Seen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    fit(model, data, epochs, optimizer=optimizer, batch_size=16, **options)
    return [sorted(part.tolist()) for part in torch.cat(model.given).chunk(epochs)]


# --- randomness that a few samples do not show -------------------------------------------------


class Rarely:
    """A transform with a generator of its own, as albumentations has."""

    __slots__ = ("draw", "generator")

    def __init__(self, generator: Any, draw: str) -> None:
        self.generator, self.draw = generator, draw

    def __call__(self, value: float) -> float:
        drawn = float(getattr(self.generator, self.draw)())
        return -1.0 if drawn < RARE else value


class Torch:
    def __init__(self) -> None:
        self.own = torch.Generator().manual_seed(0)

    def __call__(self, value: float) -> float:
        return -1.0 if torch.rand((), generator=self.own) < RARE else value


class Method:
    def __init__(self) -> None:
        self.held = [{"generators": (np.random.default_rng(0),)}]

    def alter(self, value: float) -> float:
        return -1.0 if self.held[0]["generators"][0].random() < RARE else value


of_module = np.random.default_rng(0)


def by_module(value: float) -> float:
    return -1.0 if of_module.random() < RARE else value


def by_fresh_one(value: float) -> float:
    return -1.0 if np.random.default_rng().random() < RARE else value


def by_argument(generator: Any, value: float) -> float:
    return -1.0 if generator.random() < RARE else value


def by_default(value: float, own: Any = Torch()) -> float:  # noqa: B008
    return own(value)


def by_closure() -> Callable[[float], float]:
    own = random.Random(0)
    return lambda value: -1.0 if own.random() < RARE else value


class Called(Samples):
    """Draws in a method that `__getitem__` calls."""

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.full((2,), self.drawn(place)), place % 3

    def drawn(self, value: float) -> float:
        return by_module(value)


class OfClass(Samples):
    own = random.Random(0)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.full((2,), -1.0 if self.own.random() < RARE else float(place)), place % 3


class Restarts(Samples):
    """Starts its numbers anew with the first sample, so that two passes in one order are equal."""

    state = 1

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        self.state = 1 if place == 0 else self.state * 48271 % 2147483647
        return torch.full((2,), float(self.state % 7)), place % 3


RANDOM: dict[str, Callable[[], Any]] = {
    "NumPy's generator": lambda: Samples(Rarely(np.random.default_rng(0), "random")),
    "NumPy's older generator": lambda: Samples(Rarely(np.random.RandomState(0), "random_sample")),
    "Python's generator": lambda: Samples(Rarely(random.Random(0), "random")),
    "the system's": lambda: Samples(Rarely(random.SystemRandom(), "random")),
    "torch's generator": lambda: Samples(Torch()),
    "a bound method, in containers": lambda: Samples(Method().alter),
    "a closure": lambda: Samples(by_closure()),
    "a default": lambda: Samples(by_default),
    "a partial": lambda: Samples(partial(by_argument, np.random.default_rng(0))),
    "a global": lambda: Samples(by_module),
    "a new one each time": lambda: Samples(by_fresh_one),
    "a method that the data set calls": Called,
    "the class": OfClass,
    "one that starts anew": Restarts,
    "the global one, rarely": lambda: Samples(lambda v: v if random.random() > RARE else -1),
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("wrap", [lambda d: d, IndexedDataset, lambda d: Subset(d, range(50))])
def test_what_draws_is_never_kept_however_rarely_it_shows(name: str, wrap: Any) -> None:
    data = wrap(RANDOM[name]())
    assert in_memory(data, "cpu") is data
    assert isinstance(in_memory(data, "cpu", cache=True), TensorDataset)


@given(st.integers(0, 99), st.floats(0.001, 0.5))
def test_a_generator_of_its_own_is_found_whatever_the_chance(seed: int, chance: float) -> None:
    own = np.random.default_rng(seed)
    data = Samples(lambda value: value if own.random() > chance else -1.0)
    assert in_memory(data, "cpu") is data


def test_what_only_holds_a_generator_is_kept() -> None:
    class Shuffled(Samples):
        def __init__(self) -> None:
            super().__init__()
            self.generator = np.random.default_rng(0)
            self.order = self.generator.permutation(60)

        def __getitem__(self, place: int) -> tuple[Tensor, int]:
            return super().__getitem__(int(self.order[place]))

    data = Shuffled()
    found = in_memory(data, "cpu")
    assert isinstance(found, TensorDataset)
    assert found.tensors[0][:, 0].tolist() == data.order.tolist()


def test_missing_values_are_the_same_when_read_again() -> None:
    data = Samples(lambda value: float("nan") if value == 7 else value)
    assert isinstance(in_memory(data, "cpu"), TensorDataset)


# --- samples that change between epochs --------------------------------------------------------


class Curriculum(Samples):
    epoch = 0

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.full((2,), float(self.epoch)), place % 3


class Announced(Curriculum):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("kind", [Curriculum, Announced])
@pytest.mark.parametrize("wrap", [lambda d: d, IndexedDataset, lambda d: Subset(d, range(50))])
def test_an_epoch_is_trained_on_as_it_is(kind: Any, wrap: Any) -> None:
    data = kind()
    found = seen(wrap(data), on_epoch=lambda epoch: setattr(data, "epoch", epoch + 1))
    assert [set(epoch) for epoch in found] == [{0.0}, {1.0}, {2.0}]


@pytest.mark.parametrize("shape", [(2,), (1, 2, 1), (3, 2, 2)])
@pytest.mark.parametrize("how", ["replaced", "in place", "subset replaced"])
def test_tensors_that_change_between_epochs_are_seen(how: str, shape: tuple[int, ...]) -> None:
    base = TensorDataset(torch.zeros(20, *shape), torch.arange(20) % 3)
    data = Subset(base, range(18)) if how == "subset replaced" else base
    look = Seen()
    look.layer = nn.Linear(base.tensors[0][0].numel(), 3)
    model = nn.Sequential(nn.Flatten(), look)

    def change(epoch: int) -> None:
        if how == "in place":
            base.tensors[0].add_(1)
        else:
            base.tensors = (base.tensors[0] + 1, base.tensors[1])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    fit(model, data, 3, optimizer=optimizer, on_epoch=change, batch_size=64)
    assert [part.unique().tolist() for part in look.given] == [[0.0], [1.0], [2.0]]


class Labelled(Dataset[Any]):
    """Labels of every kind that somebody may correct."""

    def __init__(self, labels: Any, size: int = 1500) -> None:
        self.labels, self.size = labels, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.full((2,), float(place)), int(self.labels[place])


def torchvisions(labels: Tensor) -> Any:
    datasets = pytest.importorskip("torchvision.datasets")
    transforms = pytest.importorskip("torchvision.transforms")
    data = datasets.MNIST.__new__(datasets.MNIST)
    data.data = torch.zeros(len(labels), 1, 2, dtype=torch.uint8)
    data.targets, data.target_transform = labels, None
    data.transform = transforms.Compose([transforms.ToTensor(), torch.nn.Flatten(0)])
    return data


def corrected(data: Any, at: int) -> None:
    """Make a label another, in place, by the way that this kind of data has."""
    if isinstance(data, list):
        data[at] = (data[at][0], 2)
    elif isinstance(data, TensorDataset):
        data.tensors[1].numpy()[at] = 2  # no version tells of it
    else:
        (data.targets if hasattr(data, "targets") else data.labels)[at] = 2


HELD: dict[str, Callable[[], Any]] = {
    "a list": lambda: [(torch.zeros(2), 0) for _ in range(1500)],
    "tensors": lambda: TensorDataset(torch.zeros(1500, 2), torch.zeros(1500).long()),
    "pictures": lambda: TensorDataset(torch.zeros(1500, 2, 1, 1), torch.zeros(1500).long()),
    "torchvision's": lambda: torchvisions(torch.zeros(1500).long()),
    "a list of its own": lambda: Labelled([0] * 1500),
    "a dictionary": lambda: Labelled(dict.fromkeys(range(1500), 0)),
    "an array": lambda: Labelled(np.zeros(1500, dtype=np.int64)),
    "a tensor": lambda: Labelled(torch.zeros(1500).long()),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(1400))])
@pytest.mark.parametrize("at", [0, 1234])
@pytest.mark.parametrize("name", HELD)
def test_a_single_label_that_is_corrected_between_epochs_is_seen(
    name: str, at: int, wrap: Any
) -> None:
    data, model = HELD[name](), nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
    wrapped, found = wrap(data), [0, 0, 0]
    epoch = 0

    def count(index: Tensor, _: Tensor, targets: Tensor) -> None:
        found[epoch] += int((targets == 2).sum())
        assert (targets[index != at] == 0).all()

    def change(number: int) -> None:
        nonlocal epoch
        epoch = number + 1
        if number == 0:
            corrected(data, at)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options: Any = {"batch_size": 512, "on_batch": count, "on_epoch": change}
    fit(model, IndexedDataset(wrapped), 3, optimizer=optimizer, **options)
    assert found == [0, 1, 1]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_indices_that_change_in_place_are_seen(kind: Any) -> None:
    base = TensorDataset(torch.arange(40.0)[:, None].expand(40, 2).clone(), torch.arange(40) % 3)
    data = Subset(base, kind(range(20)))

    def change(epoch: int) -> None:
        data.indices[3] = 30 + epoch  # type: ignore[index]

    found = seen(data, on_epoch=change)
    rest = [float(place) for place in range(20) if place != 3]
    assert found == [sorted([*rest, value]) for value in (3.0, 30.0, 31.0)]


@pytest.mark.parametrize("how", ["data", "numpy"])
def test_memory_that_changes_without_a_version_is_seen(how: str) -> None:
    memory = np.zeros((20, 2), dtype=np.float32)
    base = TensorDataset(torch.from_numpy(memory), torch.arange(20) % 3)
    data = Subset(base, range(18))

    def change(epoch: int) -> None:
        if how == "numpy":
            memory[:] = epoch + 1
        else:
            base.tensors[0].data[...] = epoch + 1

    assert [set(epoch) for epoch in seen(data, on_epoch=change)] == [{0.0}, {1.0}, {2.0}]


def test_tensors_that_are_replaced_are_not_written_to() -> None:
    base = TensorDataset(torch.zeros(20, 2), torch.arange(20) % 3)
    first = base.tensors[0]

    def change(epoch: int) -> None:
        base.tensors = (torch.full((20, 2), epoch + 1.0), base.tensors[1])

    assert [set(epoch) for epoch in seen(base, on_epoch=change)] == [{0.0}, {1.0}, {2.0}]
    assert (first == 0).all()


def test_true_keeps_what_was_read_first_and_false_reads_anew() -> None:
    def epochs(cache: bool) -> list[set[float]]:
        data = Curriculum()
        found = seen(data, cache=cache, on_epoch=lambda e: setattr(data, "epoch", e + 1))
        return [set(epoch) for epoch in found]

    assert epochs(True) == [{0.0}, {0.0}, {0.0}]
    assert epochs(False) == [{0.0}, {1.0}, {2.0}]


def test_a_pass_is_one_pass() -> None:
    """What is read once is not decoded before, nor read again to see whether it changes."""
    model = nn.Linear(3, 3)
    for look in (evaluate, features):
        data = Listed(300)
        look(model, data)
        assert data.readings < 310
    data = Listed(300)
    fit(model, data, 1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert data.readings < 310


def test_all_three_settings_train_the_same_network_on_samples_that_do_not_change() -> None:
    weights = []
    for cache in ("auto", True, False):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fit(model, Listed(50), 3, optimizer=optimizer, batch_size=8, cache=cache)
        weights.append(model.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


# --- every door, and what is said --------------------------------------------------------------


def network() -> nn.Module:
    return nn.Linear(2, 3)


def pipeline(data: Any, mode: Any = "random", **options: Any) -> DropHot:
    settings = {"data_ratio": 0.5, "mode": mode, "prune_ratio": 0.5, "device": "cpu"}
    epochs = {"score_epochs": 1, "train_epochs": 2, "finetune_epochs": 2}
    return DropHot(network, data, data, **settings, **epochs, **options)


@pytest.mark.parametrize("cache", ["never", None, 1, 0, "Auto"])
def test_another_setting_is_refused_at_every_door(cache: Any) -> None:
    model, data = network(), Samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    doors: list[Callable[[], object]] = [
        lambda: in_memory(data, "cpu", cache=cache),
        lambda: fit(model, data, 0, optimizer=optimizer, cache=cache),
        lambda: evaluate(model, data, cache=cache),
        lambda: features(model, data, cache=cache),
        lambda: CrestLoader(data, model, cache=cache),
        lambda: pipeline(data, cache=cache),
    ]
    for door in doors:
        with pytest.raises(TypeError, match="`cache`"):
            door()


@pytest.mark.parametrize("mode", ["high", "k_center", "crest", "fresh_subset"])
def test_a_pipeline_reads_anew_what_it_is_told_not_to_keep(mode: str) -> None:
    class Counted(Samples):
        readings = 0

        def __getitem__(self, place: int) -> tuple[Tensor, int]:
            Counted.readings += 1
            return super().__getitem__(place)

    records = {}
    for cache in (True, "auto", False):
        Counted.readings = 0
        run = pipeline(Counted(), mode, cache=cache)
        assert isinstance(run.train_set, TensorDataset) == (cache is not False)
        before = Counted.readings
        records[cache] = replace(run.run(), fingerprint="")  # the setting is a part of that
        assert (Counted.readings > before) == (cache is False)
    assert records[True] == records["auto"] == records[False]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([(torch.zeros(2), 0)] * 3, "known to stay the same"),
        (Samples(), "two readings gave the same"),
        (Samples(Torch()), "random numbers"),
        (Samples(by_fresh_one), "default_rng"),
        (Announced(), "set_epoch"),
        (Restarts(), "a second reading gave other samples"),
    ],
)
def test_what_was_chosen_and_why_is_said(
    data: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="drophot"):
        in_memory(data, "cpu")
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert caplog.records[0].levelno == logging.INFO


def test_a_data_set_is_warned_about_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("drophot._core.memory.available", lambda device: 0)
    data = Samples()
    for _ in range(3):
        in_memory(IndexedDataset(data), "cpu")
        seen(Subset(IndexedDataset(data), range(30)))
    assert [r.levelno for r in caplog.records].count(logging.WARNING) == 1


def test_torchvisions_own_sets_are_kept_after_one_reading_unless_a_transform_draws() -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    transforms = pytest.importorskip("torchvision.transforms")
    pure = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]

    def mnist(*steps: Any) -> Any:
        data = datasets.MNIST.__new__(datasets.MNIST)
        data.data = torch.randint(0, 255, (10, 8, 8), dtype=torch.uint8)
        data.targets, data.target_transform = torch.arange(10), None
        data.transform = transforms.Compose([Same(), *steps])
        return data

    class Same(transforms.ToTensor):
        """A subclass may do anything, so it is looked at."""

        calls = 0

        def __call__(self, picture: Any) -> Any:
            Same.calls += 1
            return picture

    plain = mnist()
    plain.transform = transforms.Compose(pure)
    assert isinstance(in_memory(plain, "cpu"), TensorDataset)
    own = mnist(*pure)
    assert isinstance(in_memory(own, "cpu"), TensorDataset)
    assert Same.calls >= 20
    drawn = mnist(transforms.RandomCrop(8, padding=1), *pure)
    assert in_memory(drawn, "cpu") is drawn


# --- threads -----------------------------------------------------------------------------------


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def test_runs_in_threads_are_those_of_one_thread() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(60, 2), torch.arange(60) % 3)

    def run() -> Any:
        settings: Any = {"data_ratio": 0.5, "mode": "high", "prune_ratio": 0.5, "device": "cpu"}
        epochs: Any = {"score_epochs": 2, "train_epochs": 4, "finetune_epochs": 2}
        return DropHot(Dropped, data, data, **settings, **epochs).run()

    alone = run()
    state = torch.get_rng_state()
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(run())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 3
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluating_in_another_thread_does_not_touch_a_training() -> None:
    data = TensorDataset(torch.randn(60, 2), torch.arange(60) % 3)

    def weights(other: threading.Thread | None = None) -> Tensor:
        torch.manual_seed(0)
        model = Dropped()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        start = other.start if other else lambda: None
        options = {"batch_size": 4, "on_epoch": lambda epoch: start() if epoch == 0 else None}
        fit(model, data, 6, optimizer=optimizer, **options)
        if other:
            other.join()
        return model.layers[0].weight.detach().clone()

    judge = Dropped()
    looking = threading.Thread(target=lambda: [evaluate(judge, data) for _ in range(20)])
    assert torch.equal(weights(), weights(looking))
