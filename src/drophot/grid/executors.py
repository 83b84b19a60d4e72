"""Checks and properties of executors, before a grid submits stages to them."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch.utils.data import TensorDataset

from drophot._core import user_warnings
from drophot._core.importance import RunImportance
from drophot.data.samples import is_plainly
from drophot.grid import mps
from drophot.grid.gpu_pool import GpuPool
from drophot.pipeline.config import RunConfig
from drophot.pipeline.provenance.callables import callable_text
from drophot.settings.names import Mode
from drophot.settings.tables import SETTINGS


class SubmittedCall(Protocol):
    """The result of `submit`, such as a `concurrent.futures.Future`."""

    def result(self) -> object:
        """Wait for the call, and return its result or raise its error."""
        ...


class Executor(Protocol):
    """An object that computes calls, such as a `concurrent.futures.Executor`."""

    def submit(self, function: Callable[..., object], /, *arguments: object) -> SubmittedCall:
        """Start a call."""
        ...


def check(
    executor: Executor,
    config: RunConfig,
    modes: Iterable[Mode],
    importances: Iterable[RunImportance],
    threads: int,
) -> None:
    """Refuse an object that is not an executor, and a run that cannot be sent to its workers.

    Args:
        executor: Computes the stages.
        config: The run of the stages.
        modes: The modes of the grid.
        importances: The importances of the grid.
        threads: The number of threads of each stage.

    Raises:
        TypeError: If there is no `submit`, or a part of the run cannot be sent.
        ValueError: If its workers could not start, or would wait forever.
        RuntimeError: If this process is a worker that is just starting, because the script has no
            `__main__` guard.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            '`executor` must be used under `if __name__ == "__main__":`, but a worker imported the '
            "script and reached Grid.run in it. Move the code that runs the grid under that line."
        )
    if not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"`executor` must have submit(function, *arguments), got {type(executor).__name__}. "
            f"Pass a concurrent.futures.ProcessPoolExecutor, for example."
        )
    if isinstance(executor, ThreadPoolExecutor):
        return  # nothing is sent
    on_gpu = config.device.type == "cuda"
    if isinstance(executor, GpuPool) and not (on_gpu and config.device.index in (None, 0)):
        raise ValueError(
            f"`device` must be 'cuda' for GpuPool, whose workers see one GPU each, got "
            f"{str(config.device)!r}. Choose the GPUs with GpuPool(gpus=...)."
        )
    method = _start_method(executor)
    if method == "fork" and threads > 1:
        # OpenMP's threads do not survive a fork, and its first parallel operation then hangs.
        raise ValueError(
            f"`executor` must not fork if stages use several threads, got fork and "
            f"threads={threads}. Pass ProcessPoolExecutor(..., mp_context=get_context('spawn'))."
        )
    if method == "fork" and (on_gpu or torch.cuda.is_initialized()):
        raise ValueError(
            "`executor` must not fork if CUDA is used, which does not work after a fork. Pass "
            "drophot.grid.GpuPool(), or ProcessPoolExecutor(..., mp_context=get_context('spawn'))."
        )
    _check_sendable(executor, _parts(config, modes, importances), method, threads)
    if gpu_sharing(executor, config.device) == "turns":
        user_warnings.warn(
            f"`executor` has {num_workers(executor)} processes on one GPU, which take turns: the "
            f"grid is no faster than with one process. Pass drophot.grid.GpuPool(), which lets "
            f"them compute at the same time (NVIDIA's multi-process service)."
        )


GpuSharing = Literal["mps", "turns", "one each"]


def gpu_sharing(executor: Executor | None, device: torch.device) -> GpuSharing | None:
    """How the processes of a local pool share its GPUs; `None` on a CPU or if it is not known."""
    if device.type != "cuda" or executor is None or not is_local(executor):
        return None
    if isinstance(executor, ThreadPoolExecutor) or starts_all_at_once(executor):
        return None
    if (num_workers(executor) or 1) <= num_gpus(executor):
        return "one each"
    if isinstance(executor, GpuPool) or mps.is_running():
        return "mps"
    # With several GPUs, an initializer of the pool may have spread its workers.
    return "turns" if torch.cuda.device_count() <= 1 else None


def num_gpus(executor: Executor) -> int:
    """The number of GPUs that the stages are spread over."""
    return executor.num_gpus if isinstance(executor, GpuPool) else 1


def _parts(
    config: RunConfig, modes: Iterable[Mode], importances: Iterable[RunImportance]
) -> list[tuple[str, object]]:
    """The parts of a run that may not be sendable, with the names of their arguments."""
    parts: list[tuple[str, object]] = [
        ("model", config.factory),
        ("optimizer", config.optimizer),
        ("fit", config.fit),
    ]
    for name, data in (("train_set", config.train_set), ("test_set", config.test_set)):
        if not is_plainly(data, TensorDataset):  # tensors are read from the store
            parts.append((name, data))
    parts += [("modes", mode) for mode in modes if not isinstance(mode, str)]
    parts += [("importance", one) for one in importances if one is not None]
    own = SETTINGS.keys() - {"mode", "importance"}
    settings = [(name, getattr(config.settings, name)) for name in SETTINGS if name in own]
    plain = (bool, int, float, str, type(None))
    return parts + [(name, value) for name, value in settings if not isinstance(value, plain)]


def _check_sendable(
    executor: Executor, parts: Iterable[tuple[str, object]], method: str | None, threads: int
) -> None:
    dumps, foreign = pickle.dumps, not isinstance(executor, ProcessPoolExecutor)
    if foreign:
        with suppress(ImportError):  # Dask, loky, submitit and Ray use it
            dumps = import_module("cloudpickle").dumps
    # Objects of `__main__` are sent by name, and a new process has another `__main__`.
    unseen = method not in (None, "fork") and not foreign and _main_file() is None
    for name, part in parts:
        try:
            content: bytes = dumps(part)
        except Exception as error:
            raise TypeError(
                f"`{name}` must be sendable to a worker, got {callable_text(part)}, which cannot "
                f"be pickled ({error}). Define it at the top level of a module, or use "
                f"functools.partial in place of a lambda."
            ) from error
        if unseen and b"__main__" in content:
            forks = "fork" in multiprocessing.get_all_start_methods() and threads == 1
            forks = forks and not torch.cuda.is_initialized()
            fork = "pass mp_context=get_context('fork') to the pool, " if forks else ""
            raise TypeError(
                f"`{name}` must be importable in a new process, got {_qualified_name(part)} of a "
                f"notebook or an interactive session, which processes started by {method!r} cannot "
                f"see. Put it into a module and import it (%%writefile networks.py), {fork}or use "
                f"joblib's loky with cloudpickle installed."
            )


def why_none_started(executor: Executor) -> str:
    """A note for the error of a pool that broke before any stage started."""
    file, method = _main_file(), _start_method(executor)
    guard = ""
    if file is not None and method not in (None, "fork"):
        guard = (
            f"Processes started by {method!r} import {file}, so its code that runs the grid must "
            f'be under `if __name__ == "__main__":`. '
        )
        with suppress(OSError, UnicodeDecodeError):
            if "__main__" not in file.read_text():
                guard += "It has no such line. "
    return (
        f"No stage had started, because the workers could not start. {guard}See their output. "
        f"Operating systems also kill processes when memory runs out; if so, use fewer workers."
    )


def num_workers(executor: Executor) -> int | None:
    """The number of stages that an executor computes side by side, if it is known."""
    if (pool := getattr(executor, "_max_workers", None)) is not None:
        return pool
    if (client := getattr(executor, "_client", None)) is not None:  # Dask's
        return len(client.nthreads())  # processes: each computes one stage at a time
    return None


def is_local(executor: Executor) -> bool:
    """Whether the workers are known to share this machine's memory.

    Those of process pools do, joblib's included, and those of submitit's local executor.
    """
    return hasattr(executor, "_max_workers") or starts_all_at_once(executor)


def starts_all_at_once(executor: Executor) -> bool:
    """Whether an executor is submitit's on this machine, which starts a process for each call."""
    name = getattr(executor, "name", None)  # LocalExecutor's; AutoExecutor has a cluster
    return "local" in (getattr(executor, "cluster", None), name() if callable(name) else None)


def _start_method(executor: Executor) -> str | None:
    """How a process pool of the standard library or of loky starts its processes."""
    context = getattr(executor, "_mp_context", None)
    return None if context is None else context.get_start_method()


def _main_file() -> Path | None:
    """The running script, which new processes import; `None` in a notebook."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None) or getattr(main.__spec__, "origin", None)
    return Path(file) if file and Path(file).exists() else None


def _qualified_name(thing: object) -> str:
    """The name of a function or class, or of the class of an object."""
    return getattr(thing, "__qualname__", type(thing).__qualname__)
