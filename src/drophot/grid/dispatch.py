"""Hand a grid's stages to an executor, and collect what they give and what went wrong."""

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
from typing import Any

from drophot._core.memory import is_out_of_memory
from drophot.grid import executors
from drophot.grid.compute import Job, compute
from drophot.grid.stages import Stage
from drophot.pipeline.fit_checks import LoopError
from drophot.records import Record

logger = logging.getLogger("drophot")

# No room, or no right to write: each further stage would be computed in vain.
_DISK = {errno.ENOSPC, errno.EROFS, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

# Seconds between two checks whether futures without `add_done_callback` are done; doubles up to the
# last number while none is. Other futures wake the loop; the last number is for those that do not.
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 1.0


def send(
    executor: Any,
    todo: Mapping[Stage, Stage | None],
    job: Job,
    finished: Callable[[Stage, Record | None], None],
    *,
    limit: int | None = None,
) -> None:
    """Compute stages on an executor, each as soon as what it needs is there.

    A stage that ran out of memory is computed once more when no other one runs. One that fails
    stops those that need it and no others.

    Args:
        executor: Computes them; `None` computes them here, one after the other.
        todo: The stages in order, and which of them each has to wait for.
        job: What all stages are computed with.
        finished: Called with each stage that is done, and its record.
        limit: How many there is memory for at once, if that is less than there are workers.

    Raises:
        Exception: The first that a stage raised, when all that could be computed is; its notes name
            every stage that failed. At once what would make all stages fail: a full disk, a pool
            that broke, a `fit` that does not call back. Stages that had not begun are cancelled.
    """
    if executor is None:
        executor, limit = _Here(), 1
    with TemporaryDirectory(prefix="drophot-", ignore_cleanup_errors=True) as folder:
        _Sending(executor, todo, job, finished, limit, Path(folder)).run()


class _Sending:
    """The stages of one call, and how far each is."""

    def __init__(
        self,
        executor: Any,
        todo: Mapping[Stage, Stage | None],
        job: Job,
        finished: Callable[[Stage, Record | None], None],
        limit: int | None,
        marks: Path,
    ) -> None:
        self.executor, self.todo, self.job, self.finished = executor, todo, job, finished
        self.waiting, self.running = dict(todo), list[tuple[Any, Stage]]()
        self.alone = set[Stage]()  # what ran out of memory, until it is done
        self.failed: dict[Stage, Exception] = {}
        self.skipped = 0
        self.begun = False  # whether any stage ended, well or not
        self.ended = Event()  # set when a future calls back
        self.calls_back = True  # whether all futures do
        self.processes: dict[int, Any] = {}
        self.marks = marks
        # So many at a time that no worker waits, and so few that what was begun comes first.
        most = 2 * (executors.num_workers(executor) or len(todo))
        if executors.starts_all_at_once(executor):
            most = max(1, (os.cpu_count() or 1) // job.threads)
        self.most = min(most, limit or most)
        # Processes of a pool leave a mark of what they are at, for when one is killed.
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
        """Hand over what can begin, as far as there is room."""
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
                if self.running or self.begun:
                    self.broken(error)
                else:
                    error.add_note("The pool broke before this call: give a new one.")
                raise
            if not callable(getattr(future, "result", None)):
                raise TypeError(
                    f"`executor` should give something with result() for each submit(). Found "
                    f"{type(future).__name__} from {type(self.executor).__name__}; give a "
                    f"concurrent.futures.ProcessPoolExecutor, say."
                )
            del self.waiting[stage]
            self.running.append((future, stage))
            if callable(call_back := getattr(future, "add_done_callback", None)):
                call_back(lambda _: self.ended.set())
            else:
                self.calls_back = False
            pending.add(stage)
            if isinstance(processes := getattr(self.executor, "_processes", None), dict):
                self.processes |= processes

    def take(self, future: Any, stage: Stage) -> None:
        """Go on from a stage that is done or failed."""
        try:
            found = future.result()
        except BrokenExecutor as error:
            self.broken(error)
            raise
        except Exception as error:
            if is_out_of_memory(error) and stage not in self.alone and self.most > 1:
                logger.warning("%s ran out of memory: once more, alone", stage.name)
                self.alone.add(stage)
                self.waiting[stage] = self.todo[stage]
                return
            self.alone.discard(stage)
            self.begun = True
            if isinstance(error, LoopError) or _is_disk(error):
                error.add_note(f"This happened in the stage {stage.name}.")
                raise
            self.fail(stage, error)
            return
        self.alone.discard(stage)
        if not (isinstance(found, tuple) and found[:1] == (stage.name,)):
            raise TypeError(
                f"`executor` should give what the function that it was handed returned. Found "
                f"{type(found).__name__} for the stage {stage.name} from "
                f"{type(self.executor).__name__}; let result() wait for that and return it."
            )
        self.begun = True
        self.finished(stage, found[1])

    def fail(self, stage: Stage, error: Exception) -> None:
        """Keep an error for the end, and leave out what needs its stage."""
        logger.warning("%s failed; what does not need it goes on", stage.name, exc_info=error)
        cause: BaseException | None = error
        while cause is not None:  # or the frames hold on to the network until the end
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        self.failed[stage] = error
        lost = {stage}
        for other, need in list(self.waiting.items()):  # in order: what is needed comes first
            if need in lost:
                lost.add(other)
                del self.waiting[other]
        self.skipped += len(lost) - 1

    def error(self) -> Exception:
        """The first failure, with the names of all."""
        (stage, error), *others = self.failed.items()
        error.add_note(f"This happened in the stage {stage.name}.")
        for other, cause in others:
            error.add_note(f"The stage {other.name} failed too: {_line(cause)}")
        left = f", but {self.skipped} that need what failed" if self.skipped else ""
        error.add_note(f"All other stages are done{left}.")
        return error

    def broken(self, error: BrokenExecutor) -> None:
        """Keep what was done when a pool broke, and say which stages ran."""
        futures, self.running = self.running, []
        end = time.monotonic() + 10
        for future, stage in futures:  # all of them are told, one after the other
            with suppress(Exception):
                self.finished(stage, future.result(max(0.0, end - time.monotonic()))[1])
        ran = _marked(self.marks)
        if names := sorted(_killed(self.processes, ran) or ran.values()):
            error.add_note(
                f"This happened in the stage {' or '.join(names)}. Systems end processes where "
                f"memory runs out: use fewer."
            )
        elif not self.begun:
            error.add_note(executors.why_none_started(self.executor))


class _Here:
    """Computes a stage when it comes."""

    _max_workers = 1

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def _work(marks: Path | None, parent: int, job: Job, stage: Stage) -> tuple[str, Record | None]:
    """Compute a stage, in a worker: with a note of what it is at, and errors that can be sent."""
    mark = None if marks is None else marks / str(os.getpid())
    try:
        if mark is not None:
            with suppress(OSError):  # the caller has gone
                mark.write_text(stage.name)
        return stage.name, compute(job, stage)
    except Exception as error:
        if os.getpid() == parent or _comes_back(error):
            raise
        kind = MemoryError if is_out_of_memory(error) else RuntimeError
        words = kind(_line(error))
        words.add_note("".join(traceback.format_exception(error)))
        raise words from None
    finally:
        if mark is not None:
            with suppress(OSError):
                mark.unlink()


def _comes_back(error: Exception) -> bool:
    """Whether an error can be sent: one that cannot be read on arrival breaks the whole pool."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def _done(running: list[tuple[Any, Stage]]) -> list[tuple[Any, Stage]]:
    """Those that are done. Where futures cannot say, they are waited for."""
    return [pair for pair in running if getattr(pair[0], "done", lambda: True)()]


def _marked(folder: Path) -> dict[int, str]:
    """The stages that processes of a broken pool were at, by process."""
    found = {}
    for mark in folder.iterdir():
        with suppress(FileNotFoundError):  # it ended after all
            found[int(mark.name)] = mark.read_text()
    return {pid: name for pid, name in found.items() if name}


def _killed(processes: Mapping[int, Any], ran: Mapping[int, str]) -> set[str]:
    """The stages of the workers that ended by themselves, not by their pool that broke."""
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
