"""A grid gives equal records wherever its stages are computed, and can be gone on with."""

import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import current_process, get_all_start_methods, get_context
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.executors import (
    CELLS,
    RATIOS,
    STAGES,
    START_METHOD,
    Backwards,
    Noting,
    Plain,
    Promise,
    Watching,
    points,
    spawned,
    stamps,
    tiniest,
    tiny,
)
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import Dataset

from drophot import Grid, Record, fit
from drophot._core import random_state
from drophot.grid.executors import starts_all_at_once
from drophot.models import fcnet

pytestmark = pytest.mark.slow
# Workers import this module by its name: no conftest here, and what they need stands at the top.
PAGE = Path(__file__).parents[2] / "docs" / "executors.md"


ONE_SEED = RATIOS | {"data_ratios": [0.2], "seeds": [0]}
controlled = partial(tiny, "equal_steps", "reinitialize", ratios=ONE_SEED)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """What the whole grid gives without an executor."""
    return controlled().run(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Two processes, started once: each of them imports torch."""
    with spawned() as executor:
        yield executor


class Noisy(Dataset[Any]):
    """Samples that differ from one reading to the next, so that they are not held in memory."""

    def __init__(self, **others: Any) -> None:
        self.inputs, self.targets = points(200, 0).tensors
        vars(self).update(others)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        noise = torch.randn(2) * 0.1 + random.gauss(0, 0.1) + np.random.normal(0, 0.1)  # noqa: NPY002
        return self.inputs[position] + noise.float(), int(self.targets[position])


# --- executors of our own ----------------------------------------------------------------------


# --- the same records everywhere ---------------------------------------------------------------


def test_the_reference_is_the_whole_grid(reference: list[Record]) -> None:
    assert len({record.fingerprint for record in reference}) == len(reference) == 11
    assert {(r.mode, r.equal_steps, r.reinitialized) for r in reference} == {
        ("baseline", False, False),
        ("baseline", False, True),
        *((m, e, r) for m in ("high", "random") for e in (False, True) for r in (False, True)),
    }


def test_processes_that_are_spawned(
    reference: list[Record], pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    assert controlled().run(tmp_path, pool) == reference


@pytest.mark.skipif(sys.platform != "linux", reason="fork is for Linux")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork, since Python 3.12
def test_processes_that_are_forked(reference: list[Record], tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as forked:
        assert controlled().run(tmp_path, forked) == reference


def test_threads(reference: list[Record], tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        assert controlled().run(tmp_path, threads) == reference


@pytest.mark.parametrize("executor", [Plain, Backwards])
def test_executors_of_our_own(
    reference: list[Record], executor: type[Plain | Backwards], tmp_path: Path
) -> None:
    assert controlled().run(tmp_path, executor()) == reference


def blocks() -> list[str]:
    """What the page shows for packages that not everybody has; test_package runs the rest."""
    return re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.S)


PACKAGES = ["dask", "joblib", "ray", "submitit"]


def test_each_block_of_the_page_is_run_here() -> None:
    found = [re.findall(r"^(?:from|import) (\w+)", block, re.M) for block in blocks()]
    assert sorted(found) == [[package] for package in PACKAGES]


class Grids:
    """Stands in for `grid` on the page: several of them on one executor."""

    def __init__(self, *grids: Grid) -> None:
        self.grids = grids
        self.workers = 0
        self.begun: Path | None = None  # a store from which the first of them resumes

    def run(self, store: str, executor: Any) -> list[list[Record]]:
        self.workers = self.grids[-1].plan(executor=executor).workers
        if self.begun is not None:
            shutil.copytree(self.begun, f"{store}-0")
        return [grid.run(f"{store}-{n}", executor) for n, grid in enumerate(self.grids)]


def run_the_page(package: str, grids: Grids) -> list[list[Record]]:
    pytest.importorskip(package)
    names: dict[str, Any] = {"__name__": "page", "grid": grids}
    (block,) = (block for block in blocks() if f"{package}" in block)
    exec(compile(block, PAGE.name, "exec"), names)
    return names["found"]


def with_a_lambda() -> Grid:
    return tiniest(model=lambda: fcnet(in_features=2, hidden=8, num_classes=3))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("here")
def test_loky(reference: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as other processes: loky's default start method imports torch again, as `spawn`."""
    loky = pytest.importorskip("joblib.externals.loky")
    pytest.importorskip("cloudpickle")  # for the lambda
    monkeypatch.setattr(loky.backend.context, "_DEFAULT_START_METHOD", START_METHOD)
    grids = Grids(controlled(), with_a_lambda())
    try:
        assert run_the_page("joblib", grids) == [reference, with_a_lambda().run("here")]
    finally:
        loky.get_reusable_executor(2).shutdown(kill_workers=True)
    assert grids.workers == 2


@pytest.mark.usefixtures("here")
def test_dask(reference: list[Record]) -> None:
    pytest.importorskip("dask.distributed")
    import dask.config

    grids = Grids(controlled(), with_a_lambda())
    with dask.config.set({"distributed.worker.multiprocessing-method": START_METHOD}):
        assert run_the_page("dask", grids) == [reference, with_a_lambda().run("here")]
    assert grids.workers == 2


@pytest.mark.usefixtures("here")
def test_submitit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage starts two Pythons, so there are two of them, of which one needs the other."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", lambda: -1)  # no jobs of ours there
    grids, expected = Grids(with_a_lambda()), with_a_lambda().run("here")
    grids.begun = Path("here")
    left = [path.unlink() for path in Path("here", "stages").glob("*-random-*")]
    assert len(left) == 2
    assert run_the_page("submitit", grids) == [expected]


@pytest.mark.usefixtures("here")
def test_ray(reference: list[Record], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where it would leave a token
    ray = pytest.importorskip("ray")
    grids = Grids(controlled(), with_a_lambda())
    try:
        assert run_the_page("ray", grids) == [reference, with_a_lambda().run("here")]
    finally:
        ray.shutdown()


def test_data_that_is_random(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    """It cannot go by the store, as the test set does; what it draws is the same everywhere."""
    few = partial(tiny, ratios=RATIOS | {"data_ratios": [0.5], "seeds": [0]})
    expected = few(train_set=Noisy()).run(tmp_path / "here")
    assert few(train_set=Noisy()).run(tmp_path / "there", pool) == expected
    assert set(torch.load(tmp_path / "there" / "data.pt")) == {"test_set"}
    still = few().run(tmp_path / "still")
    assert [r.finetune_curve for r in still] != [r.finetune_curve for r in expected]


# --- threads and random state ------------------------------------------------------------------


def test_each_stage_has_the_threads_asked_for(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    noting = Noting(tmp_path, together=2)
    found = tiny(fit=noting, threads=3).run(tmp_path / "store", pool)
    assert len(found) == CELLS
    assert len(noting.workers) == STAGES
    assert len(set(noting.workers)) == 2
    assert {threads for _, threads in noting.notes} == {3}


@pytest.mark.parametrize("kind", ["here", "threads", "processes"])
def test_the_caller_is_left_alone(kind: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    noting = Noting(tmp_path)
    grid = tiniest(fit=noting, threads=3)
    before = random_state.state(), torch.get_num_threads()
    with ThreadPoolExecutor(2) as threads:
        executors = {"here": None, "threads": threads, "processes": pool}
        grid.run(tmp_path / "store", executors[kind])
    assert (random_state.state(), torch.get_num_threads()) == before
    assert before[1] != 3
    assert {threads for _, threads in noting.notes} == {3}


# --- order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["backwards", "threads", "processes"])
def test_a_stage_comes_once_and_when_it_can_begin(
    kind: str, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as threads:
        executors = {"backwards": Backwards(2), "threads": threads, "processes": pool}
        watching = Watching(executors[kind])
        tiny().run(tmp_path, watching)
    files = {path.name for path in (tmp_path / "stages").iterdir()}
    assert watching.futures.keys() == files == set(watching.finished)
    assert len(files) == STAGES
    assert watching.most <= 2 * 2
    if kind == "backwards":  # where nothing is done before somebody looks
        assert watching.most == 2 * 2
        assert watching.finished != list(watching.futures)


def test_all_that_can_begin_is_handed_over_where_workers_are_not_known(tmp_path: Path) -> None:
    watching = Watching(Backwards())
    tiny().run(tmp_path, watching)
    free = {n for n in watching.futures if "score" in n or ("train" in n and "random" in n)}
    assert set(list(watching.futures)[: len(free)]) == free
    assert len(free) == 2 * (1 + 2)
    assert watching.most >= len(free)


def test_submitits_own_executors_say_that_they_are_local(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    assert starts_all_at_once(submitit.LocalExecutor(tmp_path))
    assert starts_all_at_once(submitit.AutoExecutor(tmp_path, cluster="local"))
    assert not starts_all_at_once(submitit.AutoExecutor(tmp_path, cluster="debug"))
    with ThreadPoolExecutor(1) as executor:
        assert not starts_all_at_once(executor)


@pytest.mark.parametrize(("threads", "most"), [(1, 3), (2, 1)])
def test_jobs_on_this_machine_are_as_many_as_it_has_cores_for(
    threads: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    watching = Watching(Backwards())
    watching.cluster = "local"  # submitit's
    (tiny() if threads == 1 else tiniest(threads=threads)).run(tmp_path, watching)
    assert watching.most == most


class Overtaken(Plain):
    """Begins when another run on the same store is through."""

    stamps: dict[str, int] | None = None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Promise:
        if self.stamps is None:
            store = arguments[0].store.folder
            tiniest().run(store)
            self.stamps = stamps(store)
        return super().submit(function, *arguments)


def test_what_another_run_was_faster_with_is_not_computed_again(tmp_path: Path) -> None:
    executor = Overtaken()
    found = tiniest().run(tmp_path / "store", executor)
    assert executor.stamps == stamps(tmp_path / "store")
    assert len(executor.stamps) == 4
    assert found == tiniest().run(tmp_path / "here")


# --- before any work ---------------------------------------------------------------------------


def test_an_executor_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`executor` .*submit.* object"):
        tiny().run(tmp_path / "store", object())
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="no fork here")
def test_forks_and_several_threads_are_refused_before_any_work(tmp_path: Path) -> None:
    """They would wait for ever."""
    with (
        ProcessPoolExecutor(1, mp_context=get_context("fork")) as executor,
        pytest.raises(ValueError, match=r"`executor` .*fork and threads=2.*'spawn'"),
    ):
        tiniest(threads=2).run(tmp_path / "store", executor)
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="no fork here")
def test_forks_of_a_process_that_uses_cuda_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with (
        ProcessPoolExecutor(1, mp_context=get_context("fork")) as executor,
        pytest.raises(ValueError, match="`executor` .*fork .*CUDA.*'spawn'"),
    ):
        tiniest().run(tmp_path / "store", executor)
    assert not (tmp_path / "store").exists()


def test_a_worker_that_runs_the_script_again_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(current_process(), "_inheriting", True, raising=False)
    with spawned() as executor, pytest.raises(RuntimeError, match='if __name__ == "__main__"'):
        tiniest().run(tmp_path / "store", executor)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("method", get_all_start_methods())
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork, since Python 3.12
@pytest.mark.parametrize("name", ["model", "optimizer", "fit"])
def test_what_a_notebook_defines_goes_to_forks_only(
    method: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = ModuleType("__main__")
    exec(NOTEBOOK, vars(notebook))
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    grid = tiniest(**{name: partial(getattr(notebook, name))})
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as executor:
        if method == "fork":
            assert len(grid.run(tmp_path / "store", executor)) == 2
            return
        with pytest.raises(TypeError, match=f"`{name}` .* notebook.*%%writefile") as caught:
            grid.run(tmp_path / "store", executor)
    assert ("fork" in str(caught.value)) == ("fork" in get_all_start_methods())
    assert not (tmp_path / "store").exists()


NOTEBOOK = """
from torch.optim import Adam
import drophot
from drophot.models import fcnet

def model():
    return fcnet(in_features=2, hidden=8, num_classes=3)

def optimizer(parameters):
    return Adam(parameters, lr=0.02)

def fit(*arguments, **settings):
    drophot.fit(*arguments, **settings)
"""


def test_threads_are_sent_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        found = with_a_lambda().run(tmp_path / "there", executor)
    assert found == with_a_lambda().run(tmp_path / "here")


UNFIT: dict[str, Callable[[], Any]] = {
    "model": lambda: lambda: fcnet(in_features=2, hidden=8, num_classes=3),
    "optimizer": lambda: lambda parameters: Adam(parameters, lr=0.02),
    "fit": lambda: lambda *arguments, **named: fit(*arguments, **named),
    "train_set": lambda: Noisy(lock=Lock()),
    "test_set": lambda: Noisy(transform=lambda sample: sample),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_sent_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    thing = UNFIT[name]()
    grid = tiniest(**{name: thing})
    with (
        spawned() as executor,
        pytest.raises(TypeError, match=f"`{name}` .*worker"),
    ):
        grid.run(tmp_path / "there", executor)
    assert not (tmp_path / "there").exists()
    assert len(grid.run(tmp_path / "here")) == 2
