import io
import logging
import os
import random
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers.loops import Augmented, Listed, model_of
from helpers.other_device import DEVICE, other_device
from helpers.processes import run_script
from helpers.transforms import Added, Broken, Drawn, Marked, Named
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from drophot import IndexedDataset, fit
from drophot._core import random_state
from drophot.data import workers
from drophot.data.batching import at, batches
from drophot.data.cache import in_memory
from drophot.data.samples import targets_of
from drophot.data.workers import Workers

CPU = torch.device("cpu")
GLOBAL = ["torch", "numpy", "python"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(size: int, channels: int = 3) -> TensorDataset:
    return TensorDataset(torch.rand(size, channels, 6, 5), torch.arange(size))


def read(data: Dataset[Any], seed: int = 0, epochs: int = 1) -> list[list[Tensor]]:
    """Each epoch's batches of two samples, inputs only, of a dataset as it is."""
    order, workers = generator(seed), Workers(min_seconds=0)
    return [
        [inputs for inputs, *_ in batches(data, 2, CPU, shuffle=order, workers=workers)]
        for _ in range(epochs)
    ]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drophot._core.memory.available", lambda device: 0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


# --- in memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 10, 1024, 2500])
def test_decoding_gives_the_samples(size: int) -> None:
    data = Listed(size)
    tensors = in_memory(data, "cpu")
    assert isinstance(tensors, TensorDataset)
    assert torch.equal(tensors.tensors[0], data.inputs)
    assert torch.equal(tensors.tensors[1], (data.inputs.sum(1) > 0).long())
    assert tensors.tensors[1].dtype == torch.int64


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_images_are_kept_with_their_channels_last_and_are_the_same(
    size: int, channels: int, width: int, indexed: bool
) -> None:
    base = TensorDataset(torch.rand(size, channels, 3, width), torch.arange(size))
    one_by_one = Subset(list(base), range(size))
    for data in (base, one_by_one):
        found = in_memory(IndexedDataset(data) if indexed else data, "cpu")
        assert isinstance(found, TensorDataset)
        assert found.tensors[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found.tensors[0], base.tensors[0])
        assert all(part.tolist() == list(range(size)) for part in found.tensors[1:])
        assert len(found.tensors) == 2 + indexed


@pytest.mark.parametrize("source", [*GLOBAL, "its own"])
def test_random_augmentation_is_never_frozen(source: str, caplog: pytest.LogCaptureFixture) -> None:
    data = Augmented(source, 50)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with caplog.at_level(logging.INFO, logger="drophot"):
        assert in_memory(data, "cpu") is data
    assert "not kept in memory" in caplog.text
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    seen = []
    model = model_of()
    fit(
        model,
        IndexedDataset(data),
        2,
        optimizer=torch.optim.SGD(model.parameters(), lr=0),
        on_batch=lambda index, logits, _: seen.append(logits[index.argsort()]),
    )
    assert not torch.equal(seen[0], seen[1])


def test_augmentation_that_starts_late_is_found_too() -> None:
    class Late(Listed):
        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            inputs, target = super().__getitem__(i)
            return (inputs + torch.rand(()) if i == 1500 else inputs), target

    assert not isinstance(in_memory(Late(2000), "cpu"), TensorDataset)


@pytest.mark.parametrize("seed", range(10))
def test_a_flip_that_leaves_half_the_samples_alone_is_found(seed: int) -> None:
    class Flipped(Listed):
        own = np.random.default_rng(seed)  # no global generator tells of it

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            inputs, target = super().__getitem__(i)
            return (inputs.flip(0) if self.own.random() < 0.5 else inputs), target

    data = Flipped(100)
    assert in_memory(data, "cpu") is data


def test_data_too_large_for_the_memory_is_not_decoded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = Listed(10)
    needed = 10 * (3 * 4 + 8)
    monkeypatch.setattr("drophot._core.memory.available", lambda device: 2 * needed - 1)
    with caplog.at_level(logging.INFO, logger="drophot"):
        assert in_memory(data, "cpu") is data
    assert "do not fit in memory" in caplog.text
    monkeypatch.setattr("drophot._core.memory.available", lambda device: 2 * needed)
    assert isinstance(in_memory(data, "cpu"), TensorDataset)


def test_a_warning_says_how_much_did_not_fit(
    no_memory: None, caplog: pytest.LogCaptureFixture
) -> None:
    class Large(Listed):
        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return torch.zeros(1).expand(250_000), 0  # 1 MB and 8 bytes

    with caplog.at_level(logging.WARNING, logger="drophot"):
        in_memory(Large(3400), "cpu")
    assert "3400 samples of 3.4 GB in total do not fit in memory (cpu)" in caplog.text


def test_tensors_are_not_read_sample_by_sample_nor_copied(no_memory: None) -> None:
    """However much memory there is: they are in it already."""
    base = TensorDataset(torch.randn(10, 3), torch.arange(10) % 2)
    found = in_memory(base, "cpu")
    assert isinstance(found, TensorDataset)
    assert found.tensors[0].data_ptr() == base.tensors[0].data_ptr()
    wrapped = in_memory(Subset(IndexedDataset(base), [7, 2, 2]), "cpu")
    assert isinstance(wrapped, TensorDataset)
    assert wrapped.tensors[2].tolist() == [7, 2, 2]
    assert torch.equal(wrapped.tensors[0], base.tensors[0][[7, 2, 2]])
    positions = in_memory(IndexedDataset(Subset(base, [7, 2])), "cpu")
    assert isinstance(positions, TensorDataset)
    assert positions.tensors[2].tolist() == [0, 1]


class Elsewhere(Tensor):
    """Says that it is on another device than it is."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")


def test_tensors_too_large_for_the_device_stay_where_they_are_and_are_read_in_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = torch.rand(10, 3)
    far = TensorDataset(inputs.as_subclass(Elsewhere), torch.arange(10))
    monkeypatch.setattr("drophot._core.memory.available", lambda device: 2 * 10 * (3 * 4 + 8) - 1)
    assert in_memory(far, "cpu") is far
    reads = []
    plain = workers.read
    monkeypatch.setattr(workers, "read", lambda data, at: reads.append(len(at)) or plain(data, at))
    near = TensorDataset(inputs, torch.arange(10))
    with monkeypatch.context() as patch:
        patch.setattr(TensorDataset, "__getitem__", lambda *_: pytest.fail("one by one"))
        for one, other in zip(batches(far, 4, CPU), batches(near, 4, CPU), strict=True):
            assert equal(list(one), list(other))
    assert reads[-3:] == [4, 4, 2]
    monkeypatch.setattr("drophot._core.memory.available", lambda device: 2 * 10 * (3 * 4 + 8))
    assert in_memory(far, "cpu") is not far, "what fits goes to the device"


def test_tensors_go_to_the_device() -> None:
    found = in_memory(TensorDataset(torch.rand(10, 3), torch.arange(10)), "meta")
    assert isinstance(found, TensorDataset)
    assert [tensor.device.type for tensor in found.tensors] == ["meta", "meta"]
    for batch in batches(Listed(10), 4, torch.device("meta")):
        assert [tensor.device.type for tensor in batch] == ["meta", "meta"]


def test_batched_reading_is_used() -> None:
    class Batched(Listed):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            self.batched = True
            return [self[i] for i in indices]

    data = Batched(5)
    in_memory(data, "cpu")
    assert data.batched


# --- batches -----------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 50))
def test_batches_cover_everything_in_order_or_in_the_same_disorder(
    size: int, batch_size: int
) -> None:
    base = TensorDataset(torch.arange(size).float(), torch.arange(size))
    unlike = Subset(list(base), range(size))  # the same samples, read one by one
    plain = [batch[1] for batch in batches(base, batch_size, CPU)]
    assert torch.cat(plain).tolist() == list(range(size))
    assert all(len(batch) == batch_size for batch in plain[:-1])
    for one, other in zip(
        batches(base, batch_size, CPU, shuffle=generator()),
        batches(unlike, batch_size, CPU, shuffle=generator()),
        strict=True,
    ):
        assert torch.equal(one[1], other[1])


def test_the_order_is_what_the_generator_draws() -> None:
    """So that a user's own loop can take the same one."""
    base, order, plain = TensorDataset(torch.arange(20), torch.arange(20)), generator(), generator()
    for _ in range(3):
        found = torch.cat([inputs for inputs, _ in batches(base, 6, CPU, shuffle=order)])
        assert torch.equal(found, torch.randperm(20, generator=plain))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("decoded", [True, False])
def test_images_come_with_their_channels_where_they_are_wanted(
    channels: int, last: bool, decoded: bool
) -> None:
    """Strides of one channel say nothing; what a convolution makes of them does."""
    base = images(10, channels)
    data: Dataset[Any] = IndexedDataset(base)
    data = in_memory(data, "cpu") if decoded else Subset(list(data), range(10))
    wanted = torch.channels_last if last else torch.contiguous_format
    weight = torch.rand(4, channels, 3, 3)
    sizes = []
    for inputs, targets, index in batches(data, 4, CPU, shuffle=generator(), channels_last=last):
        assert torch.equal(inputs, base.tensors[0][index])
        assert torch.equal(targets, index)
        assert inputs.is_contiguous(memory_format=wanted)
        if torch.backends.mkldnn.is_available():
            assert torch.nn.functional.conv2d(inputs, weight).is_contiguous(memory_format=wanted)
        sizes.append(len(index))
    assert sizes == [4, 4, 2]


def torchvisions(size: int, transform: Any = None, target_transform: Any = None) -> Any:
    """One of torchvision's own data sets, which workers may read."""
    datasets = pytest.importorskip("torchvision.datasets")
    transforms = pytest.importorskip("torchvision.transforms")
    data = datasets.MNIST.__new__(datasets.MNIST)
    data.data = torch.randint(0, 255, (size, 3, 3), dtype=torch.uint8, generator=generator())
    data.targets = torch.arange(size)
    steps = [transforms.ToTensor(), *([transform] if transform else [])]
    data.transform, data.target_transform = transforms.Compose(steps), target_transform
    return data


def readers_of(data: Any, marked: Marked, **options: Any) -> set[int]:
    """The processes that read a dataset, this one always among them: it compares some samples."""
    for _ in batches(data, 2, CPU, workers=Workers(**{"min_seconds": 0, **options})):
        pass
    return marked.readers()


def test_what_does_not_fit_is_read_by_workers_in_the_same_order(
    two_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = Marked(tmp_path)
    data = torchvisions(63, target_transform=marked)
    with monkeypatch.context() as patch:
        patch.setattr("drophot._core.memory.available", lambda device: 0)
        assert in_memory(data, "cpu") is data
    inputs = torch.stack([data[place][0] for place in range(63)])
    near = TensorDataset(inputs, torch.arange(63))
    shared, indexed = Workers(min_seconds=0), IndexedDataset(data)
    for seed in (0, 1):
        for one, other in zip(
            batches(indexed, 2, CPU, shuffle=generator(seed), workers=shared),
            batches(near, 2, CPU, shuffle=generator(seed)),
            strict=True,
        ):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
            assert torch.equal(one[0], inputs[one[2]])
        assert len(marked.readers() - {os.getpid()}) == 2, "a second epoch has the same workers"


@pytest.mark.slow
def test_workers_are_no_forks_of_this_process(two_threads: None, tmp_path: Path) -> None:
    """A fork would have its modules, and the user's script, which is not run again either."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "readers").mkdir()
    found = run_script(script, str(ROOT / "src"), str(ROOT / "tests"), folder=tmp_path, filters=[])
    assert found.split() == ["run", "once", "2", "0"]


SCRIPT = """
import multiprocessing, os, sys
from pathlib import Path
import torch
from torchvision import datasets, transforms
sys.path[:0] = sys.argv[1:]
from drophot.data.batching import at, batches
from drophot.data.workers import Workers
from helpers.transforms import Marked

print("run once")  # without `if __name__ == "__main__":`
multiprocessing.set_forkserver_preload(["__main__", "torchvision"])  # the first is the default
torch.set_num_threads(2)
torch.mm(torch.rand(500, 500), torch.rand(500, 500))  # starts threads
marked = Marked(Path("readers"))
data = datasets.MNIST.__new__(datasets.MNIST)
data.data = torch.randint(0, 255, (64, 3, 3), dtype=torch.uint8)
data.targets = torch.arange(64)
data.transform, data.target_transform = transforms.ToTensor(), marked
workers = Workers(min_seconds=0)
for _ in batches(data, 2, torch.device("cpu"), workers=workers):
    pass
others = marked.readers() - {os.getpid()}
parents = {Path(f"/proc/{one}/stat").read_text().split()[3] for one in others}
print(len(others), int(str(os.getpid()) in parents))
"""


def test_workers_read_a_dataset_as_it_is_now(two_threads: None) -> None:
    added = Added()
    data, shared = torchvisions(64, added), Workers(min_seconds=0)

    def smallest() -> float:
        found = [x for x, *_ in batches(data, 2, CPU, workers=shared)]
        return float(torch.cat(found).min())

    before = smallest()
    added.number = 5
    assert smallest() == pytest.approx(before + 5)


def test_workers_end_with_their_owner(two_threads: None, tmp_path: Path) -> None:
    marked = Marked(tmp_path)
    readers = readers_of(torchvisions(64, target_transform=marked), marked) - {os.getpid()}
    assert len(readers) == 2
    for _ in range(600):
        if not any(Path(f"/proc/{one}").exists() for one in readers):
            return
        time.sleep(0.1)
    pytest.fail("a worker is still running")


def test_what_workers_would_read_otherwise_is_read_here(two_threads: None, tmp_path: Path) -> None:
    marked = Named(tmp_path)
    data = torchvisions(64, target_transform=marked)
    found = [y for _, y in batches(data, 2, CPU, workers=Workers(min_seconds=0))]
    assert set(torch.cat(found).tolist()) == {os.getpid()}


def test_what_cannot_be_pickled_is_read_here(two_threads: None, tmp_path: Path) -> None:
    marked = Marked(tmp_path)
    data = torchvisions(64, lambda inputs: inputs, marked)
    assert readers_of(data, marked) == {os.getpid()}


def test_a_quick_pass_is_read_here(two_threads: None, tmp_path: Path) -> None:
    marked = Marked(tmp_path)
    data = torchvisions(64, target_transform=marked)
    assert readers_of(data, marked, min_seconds=10.0) == {os.getpid()}


def test_few_batches_are_read_here(two_threads: None, tmp_path: Path) -> None:
    marked = Marked(tmp_path)
    assert readers_of(torchvisions(14, target_transform=marked), marked) == {os.getpid()}


def test_a_daemon_has_no_workers(
    two_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "current_process", lambda: SimpleNamespace(daemon=True))
    marked = Marked(tmp_path)
    assert readers_of(torchvisions(64, target_transform=marked), marked) == {os.getpid()}


def test_a_thread_other_than_the_main_one_starts_no_workers(
    two_threads: None, tmp_path: Path
) -> None:
    marked = Marked(tmp_path)
    data = torchvisions(64, target_transform=marked)
    thread = threading.Thread(target=lambda: readers_of(data, marked))
    thread.start()
    thread.join()
    assert marked.readers() == {os.getpid()}


class Filed(Dataset[Any]):
    """Samples in one file that is opened once."""

    def __init__(self, kind: str, folder: Path, size: int = 256) -> None:
        self.size, self.kind = size, kind
        rows = [np.full(4096, place, dtype=np.float32).tobytes() for place in range(size)]
        path = folder / "rows"
        if kind == "plain":
            path.write_bytes(b"".join(rows))
            self.file: Any = path.open("rb")
        elif kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for place, row in enumerate(rows):
                    archive.writestr(str(place), row)
            self.file = zipfile.ZipFile(path)
        else:
            with tarfile.open(path, "w") as archive:
                for place, row in enumerate(rows):
                    info = tarfile.TarInfo(str(place))
                    info.size = len(row)
                    archive.addfile(info, io.BytesIO(row))
            self.file = tarfile.open(path)  # noqa: SIM115

    def __len__(self) -> int:
        return self.size

    def row(self, place: int) -> Tensor:
        if self.kind == "plain":
            self.file.seek(4 * 4096 * place)
            row = self.file.read(4 * 4096)
        elif self.kind == "zip":
            row = self.file.read(str(place))
        else:
            row = self.file.extractfile(str(place)).read()
        return torch.frombuffer(bytearray(row), dtype=torch.float32)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.row(place), os.getpid()


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(200))])
@pytest.mark.parametrize("kind", ["plain", "zip", "tar"])
def test_open_files_are_read_in_this_process(
    kind: str, wrap: Any, tmp_path: Path, two_threads: None
) -> None:
    """Copies of a process share where it is in a file: each would read the other's rows."""
    data = Filed(kind, tmp_path)
    for inputs, readers, index in batches(IndexedDataset(wrap(data)), 2, CPU, shuffle=generator()):
        assert (inputs == index[:, None]).all()
        assert (readers == os.getpid()).all()
    data.file.close()


class Opened:
    """A transform that holds an open file."""

    def __init__(self) -> None:
        self.deep = [{"file": io.BytesIO(b"rows")}]

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs


class Counts:
    """A transform that gives other samples from its thousandth call on."""

    calls = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return inputs + self.calls // 1000


class CountsInTensor(Counts):
    def __init__(self) -> None:
        self.count = torch.zeros(1)

    def __call__(self, inputs: Tensor) -> Tensor:
        self.count += 1
        return inputs


class CountsForAll(Counts):
    def __call__(self, inputs: Tensor) -> Tensor:
        CountsForAll.calls += 1
        return inputs


@pytest.mark.parametrize("kind", [Opened, Counts, CountsInTensor, CountsForAll])
def test_what_a_copy_would_share_or_lose_is_read_in_this_process(
    kind: Any, two_threads: None, tmp_path: Path
) -> None:
    marked = Marked(tmp_path)
    assert readers_of(torchvisions(64, kind(), marked), marked) == {os.getpid()}


def test_a_data_set_of_ones_own_is_read_in_this_process(two_threads: None) -> None:
    class Counting(Listed):
        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return super().__getitem__(i)[0], os.getpid()

    data = Counting(64)
    found = [y for _, y in batches(data, 2, CPU, workers=Workers(min_seconds=0))]
    assert set(torch.cat(found).tolist()) == {os.getpid()}
    assert data.readings >= 64


@pytest.mark.parametrize("source", GLOBAL)
def test_augmentation_is_the_same_whoever_reads(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for threads in (0, 1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(read(torchvisions(64, Drawn(source)), epochs=2))
    for epoch in (0, 1):
        assert equal(found[0][epoch], found[1][epoch])
        assert equal(found[0][epoch], found[2][epoch])


class Noise(Augmented):
    """What was drawn, and nothing else."""

    def __init__(self, source: str, size: int = 64) -> None:
        super().__init__(source, size)
        self.inputs = torch.zeros(size, 1, dtype=torch.float64)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("source", [*GLOBAL, "its own"])
def test_augmentation_differs_between_samples_batches_and_epochs(
    source: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    drawn = torch.cat([batch for epoch in read(Noise(source), epochs=3) for batch in epoch])
    assert len(drawn) == 3 * 64
    assert len(drawn.unique()) == len(drawn)


@pytest.mark.parametrize("source", GLOBAL)
def test_one_seed_gives_one_augmentation_and_another_another(source: str) -> None:
    assert equal(read(Noise(source), 5)[0], read(Noise(source), 5)[0])
    assert not equal(read(Noise(source), 5)[0], read(Noise(source), 6)[0])


def test_a_dataset_with_its_own_generator_is_read_in_this_process(two_threads: None) -> None:
    class Own(Noise):
        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return super().__getitem__(i)[0], os.getpid()

    found = batches(Own("its own"), 2, CPU, workers=Workers(min_seconds=0))
    assert {int(pid) for _, pids in found for pid in pids} == {os.getpid()}


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("source", GLOBAL)
def test_reading_leaves_the_callers_random_state_alone(
    source: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    before = random_state.state()
    shared = Workers(min_seconds=0)
    data = torchvisions(64, Drawn(source))
    for _ in batches(data, 2, CPU, shuffle=generator(), workers=shared):
        assert random_state.state() == before
    assert random_state.state() == before


def test_what_a_worker_raises_reaches_the_caller(two_threads: None) -> None:
    data, shared = torchvisions(64, None, Broken(13)), Workers(min_seconds=0)
    with pytest.raises(ValueError, match=r"worker process[\s\S]*sample 13 is broken"):
        list(batches(data, 2, CPU, workers=shared))


class Relabelled(Dataset[Any]):
    """Hands on the targets of what it wraps, and gives others for some samples."""

    def __init__(self, inner: Dataset[Any], others: dict[int, int]) -> None:
        self.inner, self.others = inner, others

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __getitem__(self, place: int) -> Any:
        inputs, target = self.inner[place]
        return inputs, self.others.get(place, target)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class WithTargets(TensorDataset):
    @property
    def targets(self) -> Tensor:
        return self.tensors[1]


@pytest.mark.slow
@settings(max_examples=30)
@given(st.dictionaries(st.integers(0, 19), st.integers(0, 3), max_size=5))
def test_targets_are_those_of_the_samples_whatever_an_attribute_says(
    others: dict[int, int],
) -> None:
    data = Relabelled(WithTargets(torch.rand(20, 2), torch.arange(20) % 3), others)
    given = [data[place][1] for place in range(20)]
    assert targets_of(data).tolist() == given
    assert targets_of(IndexedDataset(data)).tolist() == given
    assert targets_of(Subset(data, [3, 19, 4])).tolist() == [given[i] for i in (3, 19, 4)]


def test_targets_of_torchvisions_own_sets_are_not_read_unless_somebody_transforms_them() -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    data = datasets.CIFAR10.__new__(datasets.CIFAR10)
    data.targets, data.target_transform = [3, 1, 2], None
    assert targets_of(Subset(data, [2, 0])).tolist() == [2, 3]
    data.target_transform, data.transform = (lambda target: target - 1), None
    data.data = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    assert targets_of(data).tolist() == [2, 0, 1]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32])
def test_classes_of_any_integer_type_are_those_that_losses_take(dtype: torch.dtype) -> None:
    base = TensorDataset(torch.rand(9, 2), (torch.arange(9) % 2).to(dtype))
    for data in (base, Subset(list(base), range(9))):
        assert targets_of(data).dtype == torch.int64
        for _, targets in batches(data, 4, CPU):
            assert targets.dtype == torch.int64


# --- batches that are written where they are wanted --------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inputs_are_written_to_a_given_place(layout: torch.memory_format) -> None:
    inputs = torch.randn(20, 3, 4, 4).contiguous(memory_format=layout).requires_grad_()
    data, last = TensorDataset(inputs, torch.arange(20)), layout == torch.channels_last
    place = torch.zeros(8, 3, 4, 4).contiguous(memory_format=layout)
    into = {8: place}.get
    pairs = zip(
        batches(data, 8, CPU, shuffle=generator(), channels_last=last, inputs_for=into),
        batches(data, 8, CPU, shuffle=generator(), channels_last=last),
        strict=True,
    )
    for (found, targets), (expected, same) in pairs:
        assert (found is place) == (len(targets) == 8)
        assert found.stride() == expected.stride()
        assert not found.requires_grad
        assert torch.equal(found, expected)
        assert torch.equal(targets, same)


@pytest.mark.parametrize(
    "place",
    [
        torch.zeros(8, 3, 4, 4, dtype=torch.float64),
        torch.zeros(8, 3, 2, 8),
        torch.zeros(8, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.zeros(8, 3, 4, 4, device="meta"),
    ],
    ids=["dtype", "shape", "layout", "device"],
)
def test_a_place_that_does_not_fit_is_not_used(place: Tensor) -> None:
    data = TensorDataset(torch.randn(16, 3, 4, 4), torch.arange(16))
    for inputs, targets in batches(data, 8, CPU, inputs_for=lambda _: place):
        assert inputs is not place
        assert torch.equal(inputs, data.tensors[0][targets])


@pytest.mark.parametrize("device", [DEVICE, CPU])
def test_samples_on_another_device_are_gathered_there(device: torch.device) -> None:
    with other_device():
        data = TensorDataset(torch.randn(20, 3, device=DEVICE), torch.arange(20, device=DEVICE))
        found = list(batches(data, 8, device, shuffle=generator()))
        assert {part.device for batch in found for part in batch} == {device}
        inputs, targets = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        assert torch.equal(targets, torch.randperm(20, generator=generator()))
        assert torch.equal(inputs, data.tensors[0].cpu()[targets])
        inputs, targets = at(data, torch.tensor([3, 1]), device)
        assert (inputs.device, targets.tolist()) == (device, [3, 1])
