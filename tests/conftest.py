"""What all tests share: one thread each, and the real data where it is."""

import gc
import importlib
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import filterfalse
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interpreter import patch_language_once
from helpers.processes import PRELOADED
from torch.overrides import (
    _get_current_function_mode_stack,  # pyright: ignore[reportPrivateUsage]
)

try:
    import hypothesis
except ImportError:  # .ci/gpu leaves out the files that need it
    hypothesis = None

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

torch.manual_seed(0)  # what the test files draw when they are imported
torch.set_num_threads(1)  # the networks here are so small that threads wait for each other


os.environ.setdefault("MPLBACKEND", "Agg")  # which matplotlib reads as the server imports it
# Processes are forked from one that has imported these: data workers, and helpers/processes.py.
if "forkserver" in multiprocessing.get_all_start_methods():
    multiprocessing.set_forkserver_preload(PRELOADED)


# A script in a subfolder, run in a separate process, finds this file and the helpers too.
PATHS = [Path(__file__).parent, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def start(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, PATHS))},
    )


def run(*arguments: str | Path, folder: Path) -> str:
    """Python, as a process of its own; what it prints."""
    result = start(*arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def torchrun(processes: int, script: str | Path, *arguments: str, folder: Path) -> str:
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    result = start(*launch, script, *arguments, folder=folder)
    # With torch 2.15 a DDP model leaves gloo's threads behind, which on a busy machine may die as
    # Python ends (one run of 45), whatever the script does: once more, then it counts.
    if "terminate called without an active exception" in result.stderr:
        result = start(*launch, script, *arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


# No time limits, since machines differ; the same examples each time where nobody can look.
if hypothesis is not None:
    common: dict[str, Any] = {"deadline": None, "derandomize": "CI" in os.environ}
    hypothesis.settings.register_profile("drophot", max_examples=50, **common)
    hypothesis.settings.register_profile("thorough", max_examples=200, **common)  # .ci/versions
    hypothesis.settings.load_profile("drophot")


def pytest_configure(config: pytest.Config) -> None:
    # Of xdist from 3.7 on: files are handed out in the order of the tests, which is set below,
    # instead of by their number of tests.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    # In a new environment, Python compiles what it imports. The second worker begins with other
    # packages than the first, so that the two do not compile the same ones at the same time.
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1":
        for name in ("transformers", "lightning.pytorch", "datasets", "torch._dynamo"):
            with suppress(ImportError):
                importlib.import_module(name)
    if os.environ.get("TRITON_INTERPRET") == "1":  # as test_interpreted.py sets it
        patch_language_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with many slow tests come first, so that two workers end at about the same time. One
    # file has a single test, which takes the longest of all.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: (item.path.name != "test_interpreted.py", -slow[item.path]))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


def pytest_collection_finish() -> None:
    gc.freeze()  # what the imports have made stays, and collections need not look at it each time


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    torch.manual_seed(0)  # a test draws the same numbers whichever ran before it
    modes = _get_current_function_mode_stack()
    yield
    left = [*filterfalse(modes.__contains__, _get_current_function_mode_stack())]
    assert not left, f"the test left {left} active, which changes the tests after it"


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn but saved as an empty SVG, which saves most of the time of a page."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(
        figure, "savefig", lambda _, file, **options: file.write('<svg id="blank"></svg>')
    )


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    root = SHARED / "data"
    if not (root / "MNIST" / "raw").exists():
        pytest.skip("real MNIST is not beside the checkout")
    return root


@pytest.fixture(scope="session")
def published_lenet() -> Path:
    path = SHARED / "paper" / "lenet_baseline.npz"
    if not path.exists():
        pytest.skip("the authors' published LeNet is not beside the checkout")
    return path
