"""Processes that start quickly: each is forked from a server that has imported PRELOADED only.

`Popen([sys.executable, ...])` imports torch again, which takes seconds of CPU time. These processes
share nothing with the one that starts them either: the server ran nothing of a test.
"""

import builtins
import multiprocessing
import os
import re
import runpy
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PRELOADED = ["torch", "torch._dynamo", "torchvision", "hypothesis", "pytest", "drophot.grid"]
PRELOADED += ["matplotlib.pyplot", "scipy.stats", "sklearn.datasets"]  # as far as they are there


def begin(
    function: Callable[..., object],
    *arguments: Any,
    folder: Path,
    output: Path,
    errors: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Call a function in another process, in a process group of its own.

    What it prints is appended to the file `output`, errors too if they have no file of their own.
    """
    files = str(output), str(errors or output)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    process = multiprocessing.get_context("forkserver").Process(
        target=_call, args=(function, arguments, str(folder), files, variables)
    )
    process.start()
    return process


def _call(
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    folder: str,
    files: tuple[str, str],
    variables: dict[str, str],
) -> None:
    import torch

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    function(*arguments)


def finish(*processes: BaseProcess, errors: Path) -> None:
    """Wait until all processes have ended well. If one fails, the others are killed."""
    running = list(processes)
    try:
        while running:
            wait([process.sentinel for process in running])
            running = [process for process in running if process.exitcode is None]
            assert not any(process.exitcode for process in processes), errors.read_text()
    finally:
        for process in running:
            process.kill()
            process.join()


def run_script(script: Path, *arguments: str, folder: Path, filters: Sequence[str]) -> str:
    """What a script prints that is run with the options `-W` of these filters."""
    with TemporaryDirectory() as other:
        output, errors = Path(other) / "output", Path(other) / "errors"
        process = begin(
            _as_main, str(script), arguments, filters, folder=folder, output=output, errors=errors
        )
        finish(process, errors=errors)
        return output.read_text()


def _as_main(script: str, arguments: tuple[str, ...], filters: Sequence[str]) -> None:
    for option in filters:
        action, message, category = (option + "::").split(":")[:3]
        kind = getattr(builtins, category or "Warning")
        warnings.filterwarnings(action, re.escape(message), kind)
        sys.warnoptions.append(option)  # which the processes that the script spawns get
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def ranks(count: int, function: Callable[..., object], *arguments: Any, folder: Path) -> None:
    """Call a function in `count` processes, with the environment that `torchrun` gives its ranks.

    As with `torchrun`, the process that starts them has the store at which they meet. They are
    forks of one process, so that the modules that the function needs are imported once.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    output = folder / "ranks.output"
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    parent = begin(
        _fork_ranks,
        *(count, function, arguments, output),
        folder=folder,
        output=output,
        environment=environment,
    )
    try:
        finish(parent, errors=output)
    except BaseException:
        if parent.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
        raise


def _fork_ranks(
    count: int, function: Callable[..., object], arguments: tuple[Any, ...], output: Path
) -> None:
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_rank, args=(n, function, arguments)) for n in range(count)]
    for process in started:
        process.start()
    finish(*started, errors=output)


def _rank(rank: int, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    function(*arguments)


def run_script_on_ranks(
    count: int, script: Path, *arguments: str, folder: Path, filters: Sequence[str]
) -> str:
    """What a script prints that `torchrun` would start."""
    ranks(count, _as_main, str(script), arguments, filters, folder=folder)
    return (folder / "ranks.output").read_text()
