"""Processes that start quickly: each is forked from a server that has imported torch, and no more.

`Popen([sys.executable, ...])` imports torch again, which takes seconds of CPU time. These processes
share nothing with the one that starts them either: the server ran nothing of a test.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "torch._dynamo", "torchvision", "hypothesis", "pytest", "drophot.grid"]


def begin(
    function: Callable[..., object],
    *arguments: Any,
    folder: Path,
    output: Path,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Call a function in another process, in a process group of its own.

    What it prints is appended to the file `output`.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    process = multiprocessing.get_context("forkserver").Process(
        target=_call, args=(function, arguments, str(folder), str(output), variables)
    )
    process.start()
    return process


def _call(
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    folder: str,
    output: str,
    variables: dict[str, str],
) -> None:
    import torch

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    torch.set_num_threads(1)
    function(*arguments)
    sys.stdout.flush()


def finish(*processes: BaseProcess, output: Path) -> None:
    """Wait until all processes have ended well. If one fails, the others are killed."""
    try:
        while running := [process for process in processes if process.exitcode is None]:
            wait([process.sentinel for process in running])
            assert not any(process.exitcode for process in processes), output.read_text()
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert not any(process.exitcode for process in processes), output.read_text()


def run_script(path: str, arguments: tuple[str, ...], errors: str | None) -> None:
    """Run a script as `python -W errors path *arguments` does."""
    if errors is not None:
        sys.warnoptions.append(errors)  # for the processes that it spawns
        warnings.filterwarnings("error", category=getattr(__import__("builtins"), errors))
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def ranks(count: int, function: Callable[..., object], *arguments: Any, folder: Path) -> None:
    """Call a function in `count` processes, with the environment that `torchrun` gives its ranks.

    As with `torchrun`, the process that starts them has the store at which they meet.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    output = folder / "ranks.output"
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    started = [
        begin(
            function,
            *arguments,
            folder=folder,
            output=output,
            environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    finish(*started, output=output)
