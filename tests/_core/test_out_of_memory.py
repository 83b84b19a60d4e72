"""Memory is looked at before it is used, and what runs out of it is computed once more, alone."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.executors import Plain, Watching, of_any_fit, points, quick_pool, stamps, tiny

from drophot import DropHot, Grid, Record, fit
from drophot._core import memory
from drophot.models import fcnet

pytestmark = pytest.mark.slow


@dataclass
class Hungry:
    """Trains, but for each coreset of 40 samples asks `times` times for more than there is."""

    folder: Path
    times: int
    pause: float = 0.0

    def __call__(self, model: Any, dataset: Any, epochs: int, **others: Any) -> None:
        begun = time.monotonic()
        if len(dataset) == 40 and not (self.folder / "fed").exists():
            name = f"failed {sum(dataset[i][2] for i in range(40))}"
            if len(list(self.folder.glob(f"{name} *"))) < self.times:
                (self.folder / f"{name} {begun}").touch()
                torch.empty(1 << 60, dtype=torch.uint8)
        time.sleep(self.pause)
        fit(model, dataset, epochs, **others)
        (self.folder / f"done {begun} {time.monotonic()} {len(dataset)}").touch()

    def done(self) -> list[tuple[float, float, int]]:
        """When each training that was finished began and ended, and its samples."""
        names = (path.name.split() for path in self.folder.glob("done*"))
        return sorted((float(begun), float(ended), int(size)) for _, begun, ended, size in names)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with quick_pool() as executor:
        yield executor


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """What the tiny grid gives where there is enough memory."""
    return tiny().run(tmp_path_factory.mktemp("here"))


def test_what_runs_out_of_memory_is_computed_once_more_alone(
    pool: ProcessPoolExecutor,
    reference: list[Record],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hungry = Hungry(tmp_path, 1, pause=0.1)
    with caplog.at_level(logging.WARNING, logger="drophot"):
        found = tiny(fit=hungry).run(tmp_path / "store", pool)
    assert of_any_fit(found) == of_any_fit(reference)
    messages = [m for m in caplog.messages if "ran out of memory" in m and "alone" in m]
    assert len(messages) == 4
    assert all(m.startswith("train-seed") for m in messages)
    done = hungry.done()
    alone = [span for span in done if span[2] == 40]
    assert len(alone) == 4
    for begun, ended, _ in alone:
        others = [span for span in done if span[0] != begun]
        assert all(end <= begun or start >= ended for start, end, _ in others)
    assert any(start < end for (_, end, _), (start, _, _) in pairwise(done)), "the others are not"


@pytest.mark.parametrize("kind", ["processes", "plain"])
def test_what_runs_out_of_memory_twice_is_an_error(
    kind: str, pool: ProcessPoolExecutor, reference: list[Record], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        tiny(fit=Hungry(tmp_path, 2)).run(store, pool if kind == "processes" else Plain())
    assert "train-seed" in caught.value.__notes__[0]
    kept = stamps(store)
    assert any(name.startswith("score") for name in kept)
    (tmp_path / "fed").touch()
    found = tiny(fit=Hungry(tmp_path, 2)).run(store, pool)
    assert of_any_fit(found) == of_any_fit(reference)
    assert kept.items() <= stamps(store).items()


def test_without_an_executor_it_is_alone_already(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="allocate memory"):
        tiny(fit=Hungry(tmp_path, 1)).run(tmp_path / "store")


def with_memory(share: float) -> Callable[[Any], float]:
    """So much memory, of what a worker of the tiny grid takes."""
    needed = tiny().plan().memory
    return lambda device: share * needed


def test_no_more_workers_than_there_is_memory_for(
    monkeypatch: pytest.MonkeyPatch, reference: list[Record], tmp_path: Path
) -> None:
    ran: set[int] = set()
    with ThreadPoolExecutor(3) as threads:
        for share, expected in ((0.1, 1), (1.2, 1), (2.3, 2), (float("inf"), 3), (50.0, 3)):
            monkeypatch.setattr("drophot._core.memory.available", with_memory(share))
            plan = tiny().plan(executor=threads)
            assert plan.workers == expected
            assert f"on {expected} worker{'s' * (expected > 1)} of 0.4 GB" in str(plan)
            if expected in ran:
                continue
            ran.add(expected)
            executor = Watching(threads)
            store = tmp_path / f"store{share}"
            assert tiny().run(store, executor) == reference
            assert executor.most == (expected if expected < 3 else 6), share


def test_elsewhere_memory_is_not_ours_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drophot._core.memory.available", with_memory(0.1))

    class Remote:
        """As Dask's."""

        def __init__(self) -> None:
            self._client = SimpleNamespace(nthreads=lambda: dict.fromkeys("abc", 1))

        def submit(self, *_: Any) -> None: ...

    assert tiny().plan(executor=Remote()).workers == 3


def test_a_workers_memory_grows_with_the_model_and_the_batch() -> None:
    def plan(hidden: int, batch_size: int) -> int:
        run = DropHot(
            partial(fcnet, in_features=2, hidden=hidden, num_classes=3),
            points(200, 0),
            points(100, 1),
            data_ratio=0.5,
            mode="high",
            prune_ratio=0.5,
            batch_size=batch_size,
            device="cpu",
        )
        grid = Grid(run, data_ratios=[0.5], modes=["high"], prune_ratios=[0.5], seeds=[0])
        return grid.plan().memory

    small, wide, large = plan(8, 16), plan(80, 16), plan(8, 160)
    assert wide - small == 4 * (72 * 6 * 4) + 16 * 72 * 4
    assert large > small + 144 * 8 * 4
    assert small > 4e8, "Python and torch themselves"


def test_a_store_that_is_done_needs_nothing(tmp_path: Path) -> None:
    tiny().run(tmp_path / "store")
    assert tiny().plan(tmp_path / "store").memory == 0


def test_there_is_memory_here() -> None:
    assert 1e8 < memory.available("cpu") < 1e14
