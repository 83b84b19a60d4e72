"""Submit the stages of a grid to an executor, and collect their results and errors."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any, TypeGuard

from drophot._core.memory import is_out_of_memory
from drophot.grid import executors
from drophot.grid.compute import Job, compute
from drophot.grid.executors import Executor, SubmittedCall
from drophot.grid.stages import Stage
from drophot.pipeline.fit_checks import LoopError
from drophot.records.record import Record

logger = logging.getLogger("drophot")

# The disk is full or not writable, so the result of no further stage could be stored.
_DISK = {errno.ENOSPC, errno.EROFS, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

# Seconds between two checks whether futures without `add_done_callback` are done; doubles up to the
# last number while none is. Other futures wake the loop; the last number is for those that do not.
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 1.0


def send(
    executor: Executor | None,
    todo: Mapping[Stage, Stage | None],
    job: Job,
    finished: Callable[[Stage, Record | None], None],
    *,
    limit: int | None = None,
) -> None:
    """Compute stages on an executor, each as soon as the stage that it needs is done.

    A stage that ran out of memory is computed once more when no other stage runs. A stage that
    fails only stops the stages that need it.

    Args:
        executor: Computes the stages; `None` computes them in this process, one after the other.
        todo: The stages in order, each with the one among them that it has to wait for.
        job: The run, store and settings that all stages share.
        finished: Called with each finished stage and its record.
        limit: The number of stages that fit into memory at once, if it is known.

    Raises:
        Exception: The first error of a stage, after all other stages that can be computed. Its
            notes name every failed stage. An error that every stage would meet is raised
            immediately: a full disk, a broken pool, a `fit` that does not call its callbacks.
            Stages that have not started are cancelled then.
    """
    if executor is None:
        executor, limit = _SameProcess(), 1
    with TemporaryDirectory(prefix="drophot-", ignore_cleanup_errors=True) as folder:
        _Dispatch(executor, todo, job, finished, limit, Path(folder)).run()


class _Dispatch:
    """The stages of one call and their progress."""

    def __init__(
        self,
        executor: Executor,
        todo: Mapping[Stage, Stage | None],
        job: Job,
        finished: Callable[[Stage, Record | None], None],
        limit: int | None,
        marks: Path,
    ) -> None:
        self.executor, self.todo, self.job, self.finished = executor, todo, job, finished
        self.waiting, self.running = dict(todo), list[tuple[SubmittedCall, Stage]]()
        self.alone = set[Stage]()  # stages that ran out of memory, until they are done
        self.failed: dict[Stage, Exception] = {}
        self.skipped = 0
        self.any_ended = False  # whether any stage finished or failed
        self.ended = Event()  # set when a future calls back
        self.calls_back = True  # whether all futures do
        self.processes: dict[int, object] = {}
        self.marks = marks
        # Enough that no worker waits, and few enough that started runs are finished first.
        most = 2 * (executors.num_workers(executor) or len(todo))
        if executors.starts_all_at_once(executor):
            most = max(1, (os.cpu_count() or 1) // job.threads)
        self.most = min(most, limit or most)
        # Processes of a pool write the name of their stage to a file, in case one is killed.
        marked = hasattr(executor, "_processes")
        self.work = partial(_work, marks if marked else None, os.getpid())

    def run(self) -> None:
        pause = _FIRST_PAUSE
        try:
            while self.waiting or self.running:
                self.submit()
                self.ended.clear()  # before the check, so that no future ends unnoticed after it
                done = _done(self.running)
                for future, stage in done:
                    self.running.remove((future, stage))
                    self.take(future, stage)
                if done:
                    pause = _FIRST_PAUSE
                else:
                    self.ended.wait(_LAST_PAUSE if self.calls_back else pause)
                    pause = min(2 * pause, _LAST_PAUSE)
        except BaseException as error:
            for future, _ in self.running:
                getattr(future, "cancel", lambda: None)()
            for stage, cause in self.failed.items():
                error.add_note(f"Before that the stage {stage.name} failed: {_line(cause)}")
            raise
        if self.failed:
            raise self.error()

    def submit(self) -> None:
        """Submit the stages that can start, up to the limit."""
        pending = {stage for _, stage in self.running}
        for stage, need in list(self.waiting.items()):
            room = len(self.running) < self.most
            if self.alone:
                room = stage in self.alone and not self.running
            if not room or need in self.waiting or need in pending:
                continue
            try:
                future = self.executor.submit(self.work, self.job, stage)
            except BrokenExecutor as error:
                if self.running or self.any_ended:
                    self.broken(error)
                else:
                    error.add_note("The pool broke before this call. Pass a new one.")
                raise
            if not callable(getattr(future, "result", None)):
                raise TypeError(
                    f"`executor` must return an object with result() from submit(), got "
                    f"{type(future).__name__} from {type(self.executor).__name__}. Pass a "
                    f"concurrent.futures.ProcessPoolExecutor, for example."
                )
            del self.waiting[stage]
            self.running.append((future, stage))
            if callable(call_back := getattr(future, "add_done_callback", None)):
                call_back(self.wake)
            else:
                self.calls_back = False
            pending.add(stage)
            if isinstance(processes := getattr(self.executor, "_processes", None), dict):
                self.processes |= processes

    def wake(self, _: object) -> None:
        """Let `run` look at the futures, called by one that is done."""
        self.ended.set()

    def take(self, future: SubmittedCall, stage: Stage) -> None:
        """Process the result or the error of a stage."""
        try:
            found = future.result()
        except BrokenExecutor as error:
            self.broken(error)
            raise
        except Exception as error:
            if is_out_of_memory(error) and stage not in self.alone and self.most > 1:
                logger.warning("%s ran out of memory and is computed again alone", stage.name)
                self.alone.add(stage)
                self.waiting[stage] = self.todo[stage]
                return
            self.alone.discard(stage)
            self.any_ended = True
            if isinstance(error, LoopError) or _is_disk(error):
                error.add_note(f"The error is from the stage {stage.name}.")
                raise
            self.fail(stage, error)
            return
        self.alone.discard(stage)
        if not _is_result_of(found, stage):
            raise TypeError(
                f"`executor` must return the result of the submitted function, got "
                f"{type(found).__name__} for the stage {stage.name} from "
                f"{type(self.executor).__name__}. Let result() wait for the function and return "
                f"its result."
            )
        self.any_ended = True
        self.finished(stage, found[1])

    def fail(self, stage: Stage, error: Exception) -> None:
        """Keep an error for the end, and leave out the stages that need the failed one."""
        logger.warning("%s failed; stages that do not need it continue", stage.name, exc_info=error)
        cause: BaseException | None = error
        while cause is not None:  # its frames would keep the network in memory
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        self.failed[stage] = error
        lost = {stage}
        for other, need in list(self.waiting.items()):  # needed stages come first
            if need in lost:
                lost.add(other)
                del self.waiting[other]
        self.skipped += len(lost) - 1

    def error(self) -> Exception:
        """The first error, with the names of all failed stages."""
        (stage, error), *others = self.failed.items()
        error.add_note(f"The error is from the stage {stage.name}.")
        for other, cause in others:
            error.add_note(f"The stage {other.name} failed too: {_line(cause)}")
        left = f", except {self.skipped} that need a failed one" if self.skipped else ""
        error.add_note(f"All other stages are done{left}.")
        return error

    def broken(self, error: BrokenExecutor) -> None:
        """Keep the results of a pool that broke, and name the stages that ran."""
        futures, self.running = self.running, []
        end = time.monotonic() + 10
        for future, stage in futures:  # the pool notifies them one after the other
            with suppress(Exception):
                wait: Any = future.result  # only the futures of a pool take a timeout
                self.finished(stage, wait(max(0.0, end - time.monotonic()))[1])
        ran = _marked(self.marks)
        if names := sorted(_killed(self.processes, ran) or ran.values()):
            error.add_note(
                f"The worker was killed in the stage {' or '.join(names)}. Operating systems kill "
                f"processes when memory runs out; if so, use fewer workers."
            )
        elif not self.any_ended:
            error.add_note(executors.why_none_started(self.executor))


class _SameProcess:
    """An executor that computes a call when it is submitted."""

    _max_workers = 1

    def submit(self, function: Callable[..., object], /, *arguments: object) -> Future[object]:
        future: Future[object] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def _work(marks: Path | None, parent: int, job: Job, stage: Stage) -> tuple[str, Record | None]:
    """Compute a stage in a worker, with its name in a file, and errors that can be sent."""
    mark = None if marks is None else marks / str(os.getpid())
    try:
        if mark is not None:
            with suppress(OSError):  # the folder of the caller is gone
                mark.write_text(stage.name)
        return stage.name, compute(job, stage)
    except Exception as error:
        if os.getpid() == parent or _is_sendable(error):
            raise
        kind = MemoryError if is_out_of_memory(error) else RuntimeError
        sendable = kind(_line(error))
        sendable.add_note("".join(traceback.format_exception(error)))
        raise sendable from None
    finally:
        if mark is not None:
            with suppress(OSError):
                mark.unlink()


def _is_sendable(error: Exception) -> bool:
    """Whether an error can be pickled and unpickled; any other breaks the whole pool."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def _is_result_of(found: object, stage: Stage) -> TypeGuard[tuple[str, Record | None]]:
    """Whether an executor returned what `_work` returns for a stage."""
    return isinstance(found, tuple) and found[:1] == (stage.name,)


def _done(running: list[tuple[SubmittedCall, Stage]]) -> list[tuple[SubmittedCall, Stage]]:
    """The calls that are done. Calls that cannot tell are taken as done, and waited for."""
    return [pair for pair in running if getattr(pair[0], "done", lambda: True)()]


def _marked(folder: Path) -> dict[int, str]:
    """The stages of the processes of a broken pool, by process id."""
    found = dict[int, str]()
    for mark in folder.iterdir():
        with suppress(FileNotFoundError):  # the process finished its stage
            found[int(mark.name)] = mark.read_text()
    return {pid: name for pid, name in found.items() if name}


def _killed(processes: Mapping[int, object], ran: Mapping[int, str]) -> set[str]:
    """The stages of the workers that were killed, and not terminated by their broken pool."""
    end, codes = time.monotonic() + 5, dict[int, int | None]()
    while True:
        codes = {pid: getattr(processes.get(pid), "exitcode", 0) for pid in ran}
        if None not in codes.values() or time.monotonic() > end:
            break
        time.sleep(0.01)
    return {ran[pid] for pid, code in codes.items() if code not in (None, 0, -signal.SIGTERM)}


def _is_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
