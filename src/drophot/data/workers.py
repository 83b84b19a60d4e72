"""Worker processes that read the batches of a dataset, started once and kept between epochs."""

from __future__ import annotations

import logging
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import current_process
from threading import current_thread, main_thread
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from drophot._core import memory, random_state
from drophot.data.determinism import OwnRandomness
from drophot.data.process_state import can_be_copied, values_of
from drophot.data.samples import read, tensors_of

logger = logging.getLogger("drophot")

Key = tuple[int, list[int]]  # the seed of a batch, and the positions of its samples
_NUM_PROBES = 16  # samples that a worker has to read as this process does
_BATCHES_PER_WORKER = 8  # at least


class Workers:
    """Reads the epochs of a dataset, in worker processes where this is faster and changes nothing.

    The workers are started by multiprocessing's fork server. They are not forks of this process,
    which may have threads and CUDA contexts, and they do not run the user's script. They are
    started again when the dataset changes, and end with this object.

    Args:
        readings: How many epochs will be read.
        min_seconds: Read in this process if it takes less time than this, because starting the
            workers takes a few seconds.
    """

    def __init__(self, *, readings: float = 1, min_seconds: float = 10.0) -> None:
        self._readings, self._min_seconds = readings, min_seconds
        self._dataset: Any = None
        self._values: list[Any] = []
        self._epoch = _Epoch()
        self._loader: DataLoader[Any] | None = None  # with workers

    def read(
        self, dataset: Dataset[Any], parts: Sequence[Tensor], seed: int, *, pin_memory: bool
    ) -> Iterator[tuple[Tensor, ...]]:
        """One epoch: the samples of each part. Batch `i` draws random numbers from `seed + i`."""
        count = min(torch.get_num_threads(), len(parts) // _BATCHES_PER_WORKER)
        loader = self._with_workers(dataset, parts, count, pin_memory) if count else None
        if loader is not None:
            self._epoch.parts, self._epoch.seed = parts, seed
            return iter(loader)
        return iter(_loader(_Reader(dataset), _Epoch(parts, seed), pin_memory))

    def _with_workers(
        self, dataset: Any, parts: Sequence[Tensor], count: int, pin_memory: bool
    ) -> DataLoader[Any] | None:
        """A loader with workers that read the dataset as it is now, if it should have any."""
        if not _may_have_workers(dataset):
            return None
        before = values_of(dataset)
        if self._dataset is dataset and self._values == before:
            return self._loader
        self._loader = None  # ends the workers of another dataset, or of this one as it was
        began = time.perf_counter()
        probes = _probes(dataset)
        expected = _read_here(dataset, probes)
        seconds = (time.perf_counter() - began) / len(probes) * sum(map(len, parts))
        self._dataset, self._values = dataset, values_of(dataset)
        on_cpu = all(part.device.type == "cpu" for batch in expected for part in batch)
        if not on_cpu or self._values != before or seconds * self._readings < self._min_seconds:
            return None
        self._loader = self._started(dataset, count, probes, expected, pin_memory)
        return self._loader

    def _started(
        self,
        dataset: Any,
        count: int,
        probes: list[Key],
        expected: list[tuple[Tensor, ...]],
        pin_memory: bool,
    ) -> DataLoader[Any] | None:
        """A loader whose workers are running, if they read the probes as expected."""
        try:
            with _without_main():
                pickled = pickle.dumps(dataset)
            count = min(count, int(memory.available("cpu") / 4 / len(pickled)))
            if not count:
                return None
            self._epoch.parts = [torch.tensor(positions) for _, positions in probes]
            self._epoch.seed = probes[0][0]
            loader = _loader(_Reader(pickled=pickled), self._epoch, pin_memory, count)
            with _without_main():
                found = iter(loader)
            same = all(_equal(*pair) for pair in zip(found, expected, strict=True))
        except Exception as error:
            logger.info("samples are read without worker processes: %s", error)
            return None
        return loader if same else None


class _Epoch(Sampler[Key]):
    """The batches of an epoch."""

    def __init__(self, parts: Sequence[Tensor] = (), seed: int = 0) -> None:
        self.parts, self.seed = parts, seed

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Key]:
        for number, part in enumerate(self.parts):
            yield self.seed + number, part.tolist()


class _Reader(Dataset[tuple[Tensor, ...]]):
    """Reads a batch with its own random numbers, which are the same in any process.

    The dataset reaches a worker as bytes. As an object, its tensors would move to shared memory,
    which containers often limit to 64 MB.
    """

    def __init__(self, dataset: Any = None, *, pickled: bytes = b"") -> None:
        self.dataset, self.pickled = dataset, pickled

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        if self.dataset is None:
            self.dataset, self.pickled = pickle.loads(self.pickled), b""
        seed, positions = key
        with random_state.preserved_rng(seed=seed):
            return read(self.dataset, positions)


def _loader(reader: _Reader, epoch: _Epoch, pin_memory: bool, workers: int = 0) -> DataLoader[Any]:
    return DataLoader(
        reader,
        batch_size=None,
        sampler=epoch,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # a loader draws a number even without workers
    )


def _may_have_workers(dataset: Any) -> bool:
    """Whether other processes may read a dataset."""
    # Not all systems have a fork server. A daemon cannot have child processes. In another thread,
    # hiding the script would disturb the main thread.
    if sys.platform != "linux" or current_process().daemon or current_thread() != main_thread():
        return False
    # Tensors may be on a GPU. A generator in the dataset would start from the same numbers in
    # every worker. Counters in a copy of the dataset would be lost.
    return (
        tensors_of(dataset) is None
        and can_be_copied(dataset)
        and not OwnRandomness(dataset).generators
    )


def _probes(dataset: Any) -> list[Key]:
    """Single samples, spread over the dataset."""
    last, steps = len(dataset) - 1, _NUM_PROBES - 1
    positions = sorted({i * last // steps for i in range(_NUM_PROBES)})
    return [(seed, [position]) for seed, position in enumerate(positions)]


def _read_here(dataset: Any, keys: list[Key]) -> list[tuple[Tensor, ...]]:
    reader = _Reader(dataset)
    return [reader[key] for key in keys]


def _equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the user's script.

    Multiprocessing would run it again in each process that it starts, even if it has no
    `if __name__ == "__main__":`. A dataset that needs the script cannot be pickled meanwhile.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
