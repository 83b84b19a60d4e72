"""Pools of processes on GPUs, with stand-ins for the GPUs and for NVIDIA's MPS."""

from __future__ import annotations

import multiprocessing
import os
import stat
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.executors import START_METHOD, spawned, tiniest

from drophot import Grid
from drophot.grid import GpuPool, mps

VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY")

# Behaves like nvidia-cuda-mps-control: -d starts, and commands come by stdin.
CONTROL = f"""#!{sys.executable}
import os, sys
from pathlib import Path
daemon = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "nowhere")) / "daemon"
if sys.argv[1:] == ["-d"]:
    if os.environ.get("NO_MPS"):
        print("An instance of this daemon is already running")
        sys.exit(1)
    daemon.write_text("runs")
elif not daemon.exists():
    print("Cannot find MPS control daemon process")
    sys.exit(1)
elif sys.stdin.read() == "quit\\n":
    daemon.unlink()
"""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for NVIDIA's program, which nobody started yet."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "nvidia-cuda-mps-control"
    program.write_text(CONTROL)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda n: SimpleNamespace(uuid=f"0000-{n}")
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def start_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that need not import torch. Those of one test are spawned, as a user's are."""
    quick = get_context(START_METHOD)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: quick)


def on_cuda(**settings: object) -> Grid:
    """A grid that would run on a GPU."""
    grid = tiniest(**settings)
    grid._config = replace(grid._config, device=torch.device("cuda"))
    return grid


def _variables() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in VARIABLES)


@pytest.mark.slow
@pytest.mark.usefixtures("control")
def test_a_worker_for_each_gpu_needs_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 3)
    with GpuPool(workers_per_gpu=1, gpus=[2]) as pool:
        assert pool.submit(_variables).result() == ("GPU-0000-2", None)


@pytest.mark.slow
@pytest.mark.usefixtures("control")
def test_workers_are_spread_over_gpus_and_share_a_service_that_ends_with_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 2)
    start_quickly(monkeypatch)
    with GpuPool(workers_per_gpu=2) as pool:
        calls = [pool.submit(_one_of_four, tmp_path) for _ in range(4)]
        names, folders = zip(*(call.result() for call in calls), strict=True)
        assert sorted(names) == 2 * ["GPU-0000-0"] + 2 * ["GPU-0000-1"]
        (folder,) = set(folders)
        assert mps.is_running(Path(folder))
        assert os.environ.get("CUDA_MPS_PIPE_DIRECTORY") is None  # this process is no client
    assert not Path(folder).exists()


def _one_of_four(folder: Path) -> tuple[str | None, ...]:
    """The variables of a worker that waits for the other three."""
    (folder / f"{os.getpid()}.worker").touch()
    end = time.monotonic() + 200
    while len(list(folder.glob("*.worker"))) < 4:
        assert time.monotonic() < end
        time.sleep(0.05)
    return _variables()


@pytest.mark.usefixtures("control")
def test_a_service_that_runs_is_used_and_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 1)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert mps.start(tmp_path) is None
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with GpuPool(workers_per_gpu=2):
        assert list(tmp_path.glob("mps-*")) == []
    assert mps.is_running()


@pytest.mark.usefixtures("control")
def test_a_pool_that_is_not_shut_down_ends_its_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pool = GpuPool(workers_per_gpu=2)
    assert len(list(tmp_path.glob("mps-*"))) == 1
    del pool
    assert list(tmp_path.glob("mps-*")) == []


@pytest.mark.parametrize("installed", [False, True])
def test_a_service_that_cannot_start_is_an_error(
    installed: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 1)
    if installed:
        request.getfixturevalue("control")
        monkeypatch.setenv("NO_MPS", "1")
    else:
        monkeypatch.setenv("PATH", "")
    why = "already running" if installed else "not found"
    with pytest.raises(RuntimeError, match=rf"`workers_per_gpu`.*{why}.*workers_per_gpu=1"):
        GpuPool(workers_per_gpu=2)


def test_numbers_of_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="GpuPool needs a GPU"):
        GpuPool()
    gpus(monkeypatch, 2)
    for wrong in ([2], [0, 0], []):
        with pytest.raises(ValueError, match=r"`gpus`.* 2.*got \["):
            GpuPool(gpus=wrong)
    with pytest.raises(TypeError, match="`gpus`.*'0'"):
        GpuPool(gpus="0")
    with pytest.raises(ValueError, match="`workers_per_gpu`.*0"):
        GpuPool(workers_per_gpu=0)


@pytest.mark.slow
def test_parts_of_a_gpu_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    start_quickly(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a, MIG-b")
    with GpuPool(workers_per_gpu=1, gpus=[1]) as pool:
        assert pool.submit(_variables).result() == ("MIG-b", None)


def test_the_device_of_a_grid_in_a_pool_of_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 2)
    with GpuPool(workers_per_gpu=1) as pool:
        with pytest.raises(ValueError, match="`device`.*'cpu'"):
            tiniest().run(tmp_path / "store", pool)
        grid = on_cuda()
        grid._config = replace(grid._config, device=torch.device("cuda:1"))
        with pytest.raises(ValueError, match=r"`device`.*'cuda:1'.*GpuPool\(gpus="):
            grid.run(tmp_path / "store", pool)
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="no fork here")
def test_a_pool_that_forks_is_refused_for_a_grid_on_cuda(tmp_path: Path) -> None:
    with (
        ProcessPoolExecutor(1, mp_context=get_context("fork")) as executor,
        pytest.raises(ValueError, match=r"`executor` .*fork.*CUDA.*GpuPool.*'spawn'"),
    ):
        on_cuda().run(tmp_path / "store", executor)
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("control")
def test_processes_that_take_turns_on_a_gpu_are_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopError(Exception): ...

    def stop(*_: object) -> None:
        raise StopError

    grid = on_cuda()
    monkeypatch.setattr(grid, "_runs", stop)  # the next thing that a run does

    def run(executor: ProcessPoolExecutor) -> None:
        with pytest.raises(StopError):
            grid.run(tmp_path / "store", executor)

    three = ProcessPoolExecutor(3, mp_context=get_context("spawn"))
    with pytest.warns(UserWarning, match="`executor` has 3.*GpuPool") as caught:
        run(three)
    assert caught[0].filename == __file__
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert mps.start(tmp_path) is None
    run(three)  # without a warning
    mps.stop(tmp_path)
    run(spawned(1))
    gpus(monkeypatch, 2)
    run(three)  # which may be spread over the GPUs


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize(
    ("workers", "sharing", "words"),
    [(2, "mps", "share their GPU by MPS"), (1, "one each", "with a GPU each")],
)
def test_a_plan_says_how_gpus_are_shared(
    workers: int, sharing: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tiniest()
    assert grid.plan().gpu_sharing is None
    gpus(monkeypatch, 2)
    monkeypatch.setattr("drophot._core.memory.available", lambda _: float("inf"))
    with GpuPool(workers_per_gpu=workers) as pool:
        monkeypatch.setattr("drophot.grid.grid.estimate", lambda *_: COST)
        grid._config = replace(grid._config, device=torch.device("cuda"))
        found = grid.plan(executor=pool)
    assert (found.gpu_sharing, found.workers, found.seconds) == (sharing, 2 * workers, 50.0)
    assert words in str(found)


COST = SimpleNamespace(memory=1, bytes=1, seconds=100.0)
