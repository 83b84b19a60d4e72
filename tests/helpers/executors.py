"""Executors that watch, lose or mix what a grid gives them, and a grid for them."""

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Adam
from torch.utils.data import Dataset, TensorDataset

from drophot import DropHot, Grid, Record, fit
from drophot.models import fcnet


def points(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 2, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long())


SETTINGS: dict[str, Any] = {
    "model": partial(fcnet, in_features=2, hidden=8, num_classes=3),
    "train_set": points(200, 0),
    "test_set": points(100, 1),
    "data_ratio": 0.5,
    "mode": "high",
    "prune_ratio": 0.5,
    "score_epochs": 3,
    "train_epochs": 3,
    "finetune_epochs": 1,
    "optimizer": partial(Adam, lr=0.02),
    "batch_size": 32,
    "device": "cpu",
}


RATIOS: dict[str, Any] = {
    "data_ratios": [0.2, 0.5],
    "modes": ["high", "random"],
    "prune_ratios": [0.8],
    "seeds": [0, 1],
}


CELLS = 2 * ((1 + 1) + 4)  # of RATIOS; baselines have the dense network too


STAGES = CELLS + 2 * (1 + 4)


def tiny(*controls: Any, threads: int = 1, ratios: Any = RATIOS, **changes: Any) -> Grid:
    """Two of everything but of the prune ratios, with other settings of the run."""
    run = DropHot(**(SETTINGS | changes))
    return Grid(run, **ratios, controls=controls, threads=threads)


def tiniest(threads: int = 1, **changes: Any) -> Grid:
    """Four stages: two that need nothing, and two that need these."""
    ratios = {"data_ratios": [0.2], "modes": ["random"], "prune_ratios": [0], "seeds": [0]}
    return Grid(DropHot(**(SETTINGS | changes)), **ratios, threads=threads)


# Of the methods that fork nothing of the tests, the one that takes least time.
START_METHOD = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"


def spawned(workers: int = 2) -> ProcessPoolExecutor:
    """Each worker imports torch again, which takes seconds."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def quick_pool(workers: int = 2) -> ProcessPoolExecutor:
    """Processes for tests in which the start method does not matter."""
    return ProcessPoolExecutor(workers, mp_context=get_context(START_METHOD))


def of_any_fit(records: list[Record]) -> list[Record]:
    """The records, but for the name of the training loop."""
    return [replace(record, fingerprint="") for record in records]


class AwkwardError(ArithmeticError):
    """Cannot be read where it is sent."""

    def __init__(self, words: str, number: int) -> None:
        super().__init__(f"{words} {number}")


FAULTS = {
    "raise": FloatingPointError("as if"),
    "awkward": AwkwardError("as if", 2),
    "interrupt": KeyboardInterrupt(),
    "full": OSError(errno.ENOSPC, "No space left on device"),
}


@dataclass(frozen=True)
class Noting:
    """Trains as `fit` does, and writes down where; a file `fault` lets seed 1 go wrong."""

    folder: Path
    together: int = 1  # workers that wait for each other before they begin
    parent: int = field(default_factory=os.getpid)

    def __call__(
        self, model: nn.Module, dataset: Dataset[Any], epochs: int, *, seed: int, **how: Any
    ) -> None:
        with (self.folder / "notes").open("a") as file:
            file.write(f"{os.getpid()} {torch.get_num_threads()}\n")
        end = time.monotonic() + 600 * (os.getpid() != self.parent)
        while len(set(self.workers)) < self.together and time.monotonic() < end:
            time.sleep(0.01)
        fault = self.folder / "fault"
        if seed == 3 and fault.exists():  # what seed 1 draws from as it is fine-tuned
            if fault.read_text() != "die":
                raise FAULTS[fault.read_text()]
            fault.unlink()
            os._exit(1)
        fit(model, dataset, epochs, seed=seed, **how)

    @property
    def notes(self) -> list[tuple[int, int]]:
        """The process and its number of threads, of each training."""
        lines = (self.folder / "notes").read_text().splitlines()
        return [(int(pid), int(threads)) for pid, threads in map(str.split, lines)]

    @property
    def workers(self) -> list[int]:
        """The processes of the trainings that were not here."""
        return [pid for pid, _ in self.notes if pid != self.parent]


class Promise:
    """A future that knows nothing but its result."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result = call


class Plain:
    """The least that an executor can be."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Promise:
        return Promise(partial(function, *arguments))


class Late(Future[Any]):
    """Is computed when somebody asks whether it is done, and nothing came after it."""

    def __init__(self, queue: list["Late"], call: Callable[[], Any]) -> None:
        super().__init__()
        self.queue, self.call = queue, call

    def done(self) -> bool:
        if self.queue[-1:] == [self]:
            self.queue.pop()
            try:
                self.set_result(self.call())
            except Exception as error:
                self.set_exception(error)
        return super().done()

    def cancel(self) -> bool:
        return super().cancel() and not self.set_running_or_notify_cancel()


class Backwards:
    """Computes what came last first, here, one at each look."""

    def __init__(self, workers: int | None = None) -> None:
        self._max_workers = workers
        self.queue: list[Late] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Late:
        self.queue.append(Late(self.queue, partial(function, *arguments)))
        return self.queue[-1]


class Watching:
    """Hands stages on to an executor, and looks what is there when they come."""

    def __init__(self, executor: Any) -> None:
        self.executor, self._max_workers = executor, executor._max_workers
        self.futures: dict[str, Future[Any]] = {}
        self.finished: list[str] = []
        self.most = 0

    def submit(self, function: Any, job: Any, stage: Any) -> Any:
        need = stage.predecessor
        assert need is None or job.store.load(need.name) is not None, f"{stage.name} came too early"
        assert stage.name not in self.futures, f"{stage.name} came twice"
        future = self.executor.submit(function, job, stage)
        self.futures[stage.name] = future
        future.add_done_callback(lambda _: self.finished.append(stage.name))
        # The class's own `done`: that of Late computes.
        self.most = max(self.most, sum(not Future.done(f) for f in self.futures.values()))
        return future

    def good(self) -> set[Future[Any]]:
        """Those that came to a good end."""
        ended = (f for f in self.futures.values() if Future.done(f) and not f.cancelled())
        return {future for future in ended if not future.exception()}


def stamps(store: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (store / "stages").iterdir()}
