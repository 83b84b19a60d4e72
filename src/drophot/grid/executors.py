"""What a grid has to know of an executor before it hands it stages."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from drophot.data.samples import is_plainly
from drophot.pipeline.drophot import DropHot
from drophot.pipeline.provenance.callables import callable_text


def check(executor: Any, pipeline: DropHot, threads: int) -> None:
    """Refuse what is no executor, and a pipeline that cannot be sent to its workers.

    Args:
        executor: What is to compute stages.
        pipeline: Whose stages they are.
        threads: How many each stage uses.

    Raises:
        TypeError: If it is none, or a part of the pipeline cannot be sent.
        ValueError: If its workers could not begin, or would wait for ever.
        RuntimeError: If this is a worker that is just starting: the script has no guard.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            '`executor` should be used under `if __name__ == "__main__":`. Found a worker that '
            "imports the script and comes to Grid.run in it; put what the script does under that "
            "line."
        )
    if not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"`executor` should have submit(function, *arguments). Found "
            f"{type(executor).__name__}; give a concurrent.futures.ProcessPoolExecutor, say."
        )
    if isinstance(executor, ThreadPoolExecutor):
        return  # nothing is sent
    method = _start_method(executor)
    if method == "fork" and threads > 1:
        # OpenMP's threads do not live on in a fork: its first wide operation never ends.
        raise ValueError(
            f"`executor` should not fork where stages use several threads. Found fork and "
            f"threads={threads}; give ProcessPoolExecutor(..., mp_context=get_context('spawn'))."
        )
    if method == "fork" and torch.cuda.is_initialized():
        raise ValueError(
            "`executor` should not fork once CUDA is in use, which does not work in a fork. Found "
            "fork and an initialised CUDA; give ProcessPoolExecutor(..., "
            "mp_context=get_context('spawn'))."
        )
    dumps, foreign = pickle.dumps, not isinstance(executor, ProcessPoolExecutor)
    if foreign:
        with suppress(ImportError):  # what Dask, loky, submitit and Ray send with
            dumps = import_module("cloudpickle").dumps
    # What is defined there goes to a new process by name, and the process has another __main__.
    unseen = method not in (None, "fork") and not foreign and _main_file() is None
    things = {"model": pipeline.factory, "optimizer": pipeline.optimizer, "fit": pipeline.fit}
    for name, data in (("train_set", pipeline.train_set), ("test_set", pipeline.test_set)):
        if not is_plainly(data, TensorDataset):  # tensors go by the store
            things[name] = data
    for name, thing in things.items():
        try:
            content = dumps(thing)
        except Exception as error:
            raise TypeError(
                f"`{name}` should be one that can be sent to a worker. Found "
                f"{callable_text(thing)}, which cannot be pickled ({error}); define it at the top "
                f"of a module, or use "
                f"functools.partial in place of a lambda."
            ) from error
        if unseen and b"__main__" in content:
            forks = "fork" in multiprocessing.get_all_start_methods() and threads == 1
            forks = forks and not torch.cuda.is_initialized()
            fork = "give the pool mp_context=get_context('fork'), " if forks else ""
            raise TypeError(
                f"`{name}` should be one that a new process can import. Found {_called(thing)} "
                f"of a notebook or an interactive session, which processes that {method!r} starts "
                f"do not see; put it into a module and import it (%%writefile networks.py), "
                f"{fork}or use joblib's loky with cloudpickle installed."
            )


def why_none_began(executor: Any) -> str:
    """What the user of a pool that broke before any stage began may want to know.

    Args:
        executor: The pool.

    Returns:
        A note for the error.
    """
    file, method = _main_file(), _start_method(executor)
    guard = ""
    if file is not None and method not in (None, "fork"):
        guard = (
            f"Processes that {method!r} starts import {file}: what that does has to stand under "
            f'`if __name__ == "__main__":`. '
        )
        with suppress(OSError, UnicodeDecodeError):
            if "__main__" not in file.read_text():
                guard += "Found no such line in it. "
    return (
        f"No stage had begun: the workers did not come up. {guard}See what they printed. Systems "
        f"also end processes where memory runs out: use fewer."
    )


def workers(executor: Any) -> int | None:
    """How many stages an executor computes side by side.

    Args:
        executor: Computes them.

    Returns:
        Their number, where it says so.
    """
    if (pool := getattr(executor, "_max_workers", None)) is not None:
        return pool
    if (client := getattr(executor, "_client", None)) is not None:  # Dask's
        return len(client.nthreads())  # processes: each computes one stage at a time
    return None


def on_this_machine(executor: Any) -> bool:
    """Whether an executor's workers share this machine's memory, as far as that is known.

    Args:
        executor: Computes stages.

    Returns:
        Whether they do: those of process pools, joblib's among them, and of submitit's local one.
    """
    return hasattr(executor, "_max_workers") or starts_all_at_once(executor)


def starts_all_at_once(executor: Any) -> bool:
    """Whether an executor is submitit's, on this machine: a process for each stage it is given.

    Args:
        executor: Computes stages.

    Returns:
        Whether it is.
    """
    name = getattr(executor, "name", None)  # LocalExecutor's; AutoExecutor has a cluster
    return "local" in (getattr(executor, "cluster", None), name() if callable(name) else None)


def _start_method(executor: Any) -> str | None:
    """How a pool of the standard library, or loky, starts its processes."""
    context = getattr(executor, "_mp_context", None)
    return None if context is None else context.get_start_method()


def _main_file() -> Path | None:
    """The file of the running script, which new processes import; a notebook has none."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None) or getattr(main.__spec__, "origin", None)
    return Path(file) if file and Path(file).exists() else None


def _called(thing: Any) -> str:
    """The name of a function or class, or of an object's class."""
    return getattr(thing, "__qualname__", type(thing).__qualname__)
