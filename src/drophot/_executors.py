"""The stages of a grid on whatever executor there is."""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from typing import Any

from torch.utils.data import TensorDataset

from drophot._memory import is_out_of_memory
from drophot._samples import is_plainly
from drophot._stages import Stage, compute
from drophot._store import Store
from drophot.pipeline import DropHot
from drophot.records import Record, describe

logger = logging.getLogger("drophot")


def check(executor: Any, pipeline: DropHot, threads: int) -> None:
    """Refuse what is no executor, and a pipeline that cannot be sent to its workers.

    Args:
        executor: What is to compute stages.
        pipeline: Whose stages they are.
        threads: How many each stage uses.

    Raises:
        TypeError: If it is none, or a part of the pipeline cannot be pickled.
        ValueError: If its workers would wait for ever.
    """
    if not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"`executor` should have submit(function, *arguments). Found "
            f"{type(executor).__name__}; give a concurrent.futures.ProcessPoolExecutor, say."
        )
    if isinstance(executor, ThreadPoolExecutor):
        return  # nothing is sent
    context = getattr(executor, "_mp_context", None)
    if threads > 1 and context is not None and context.get_start_method() == "fork":
        # OpenMP's threads do not live on in a fork: its first wide operation never ends.
        raise ValueError(
            f"`executor` should not fork where stages use several threads. Found fork and "
            f"threads={threads}; give ProcessPoolExecutor(..., mp_context=get_context('spawn'))."
        )
    dumps = pickle.dumps
    if not type(executor).__module__.startswith("concurrent.futures"):
        with suppress(ImportError):  # what Dask, loky, submitit and Ray send with
            dumps = import_module("cloudpickle").dumps
    things = {"model": pipeline.factory, "optimizer": pipeline.optimizer, "fit": pipeline.fit}
    for name, data in (("train_set", pipeline.train_set), ("test_set", pipeline.test_set)):
        if not is_plainly(data, TensorDataset):  # tensors go by the store
            things[name] = data
    for name, thing in things.items():
        try:
            dumps(thing)
        except Exception as error:
            raise TypeError(
                f"`{name}` should be one that can be sent to a worker. Found {describe(thing)}, "
                f"which cannot be pickled ({error}); define it at the top of a module, or use "
                f"functools.partial in place of a lambda."
            ) from error


def send(
    executor: Any,
    todo: Mapping[Stage, Stage | None],
    task: tuple[DropHot, Store, int, str],
    finished: Callable[[Stage, Record | None], None],
    *,
    limit: int | None = None,
) -> None:
    """Compute stages on an executor, each as soon as what it needs is there.

    A stage that ran out of memory is computed once more when no other one runs.

    Args:
        executor: Computes them.
        todo: The stages in order, and which of them each has to wait for.
        task: What `compute` needs besides: the pipeline, the store, threads and the data's digest.
        finished: Called with each stage that is done, and its record.
        limit: How many there is memory for at once, if that is less than there are workers.

    Raises:
        Exception: Whatever a stage raised. Stages that had not begun are cancelled.
    """
    pipeline, store, threads, data = task
    waiting, running = dict(todo), list[tuple[Any, Stage]]()
    alone = set[Stage]()  # what ran out of memory, until it is done
    # So many at a time that no worker waits, and so few that what was begun comes first.
    most = 2 * (workers(executor) or len(todo))
    if _starts_all_at_once(executor):
        most = max(1, (os.cpu_count() or 1) // threads)
    most = min(most, limit or most)
    try:
        while waiting or running:
            pending = {stage for _, stage in running}
            for stage, need in list(waiting.items()):
                room = stage in alone and not running if alone else len(running) < most
                if room and need not in waiting and need not in pending:
                    del waiting[stage]
                    future = executor.submit(compute, pipeline, store, stage, threads, data)
                    running.append((future, stage))
                    pending.add(stage)
            # Where futures cannot say whether they are done, they are waited for.
            done = [pair for pair in running if getattr(pair[0], "done", lambda: True)()]
            for future, stage in done:
                running.remove((future, stage))
                try:
                    record = future.result()
                except BaseException as error:
                    if is_out_of_memory(error) and stage not in alone:
                        logger.warning("%s ran out of memory: once more, alone", stage.name)
                        alone.add(stage)
                        waiting[stage] = todo[stage]
                        continue
                    error.add_note(f"This happened in the stage {stage.name}.")
                    if isinstance(error, BrokenExecutor):
                        error.add_note("Systems end processes where memory runs out: use fewer.")
                    raise
                alone.discard(stage)
                finished(stage, record)
            if not done:
                time.sleep(0.02)
    except BaseException:
        for future, _ in running:
            getattr(future, "cancel", lambda: None)()
        raise


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
    return hasattr(executor, "_max_workers") or _starts_all_at_once(executor)


def _starts_all_at_once(executor: Any) -> bool:
    """Whether it is submitit's, on this machine: as many processes as it is given stages."""
    name = getattr(executor, "name", None)  # LocalExecutor's; AutoExecutor has a cluster
    return "local" in (getattr(executor, "cluster", None), name() if callable(name) else None)
