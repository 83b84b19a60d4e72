"""What a grid would take: time, disk and memory, from a few measured steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.utils.data import Subset

from drophot._core import random_state
from drophot._core.ratios import num_kept
from drophot.grid.stages import Stage, limited_threads
from drophot.pipeline import fit_checks
from drophot.pipeline.drophot import DropHot
from drophot.training import loop
from drophot.training.step_memory import step_memory

# What a process takes before it has done anything: Python with torch; a context on a GPU.
_PROCESS = (400_000_000, 600_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is still to be done of a grid, as `str` shows it."""

    cells: int
    """All cells of the grid, done or not."""
    scorings: int
    """Trainings on everything that give scores, still to be done."""
    trainings: int
    """Trainings on a coreset, still to be done, and on everything if no scoring is one."""
    finetunings: int
    """Cells still to be done."""
    epochs: float
    """Passes over the full training set still to be done."""
    samples: int
    """The size of the full training set."""
    workers: int
    """Stages side by side, as far as that is known."""
    seconds: float | None
    """An estimate, from a few measured steps on this machine; `None` with a `fit` of your own,
    which is not called to measure it."""
    bytes: int
    """An estimate of what the store will hold more than it does."""
    memory: int
    """An estimate of the bytes that a worker takes at once."""

    @property
    def stages(self) -> int:
        """All stages still to be done."""
        return self.scorings + self.trainings + self.finetunings

    def __str__(self) -> str:
        if self.seconds is None:
            duration = "time not known, for `fit` is your own,"
        elif self.seconds > 90:
            duration = f"about {self.seconds / 60:.0f} min"
        else:
            duration = f"about {self.seconds:.0f} s"
        return (
            f"{self.stages} stages to do for {self.finetunings} of {self.cells} cells "
            f"({self.scorings} scorings, {self.trainings} trainings, {self.finetunings} "
            f"fine-tunings), {self.epochs:,.0f} epochs of {self.samples:,} samples: {duration} "
            f"on {self.workers} worker{'s' * (self.workers > 1)} of "
            f"{self.memory / 1e9:.1f} GB, {self.bytes / 1e6:,.1f} MB to store."
        )


def estimate(
    pipeline: DropHot, stages: Sequence[Stage], threads: int
) -> tuple[float | None, int, int]:
    """What stages cost, from a few measured steps.

    A user's `fit` is never called for it: it may log, write checkpoints or count its calls.

    Args:
        pipeline: Whose stages they are.
        stages: Those that are still to be done.
        threads: Of the CPU for each stage.

    Returns:
        Seconds on one worker, if they are known; bytes in the store; bytes in memory that each
        worker takes, without the data.
    """
    if not stages:
        return 0.0, 0, 0
    run = pipeline
    total, tests = len(run.train_set), len(run.test_set)  # type: ignore[arg-type]
    few = Subset(run.train_set, range(min(total, 16 * run.batch_size)))
    measured = fit_checks.is_library_fit(run.fit)
    training_pass = evaluating = 0.0
    with limited_threads(threads), random_state.preserved_rng(run.device, seed=0):
        model = run.factory().to(run.device)
        first = next(loop.batches(loop.in_memory(few, run.device), run.batch_size, run.device))
        needed = _PROCESS[run.device.type == "cuda"] + step_memory(model, *first[:2])
        if measured:
            optimizer = run.optimizer(model.parameters())

            def train() -> None:
                run.fit(
                    model,
                    few,
                    1,
                    optimizer=optimizer,
                    batch_size=run.batch_size,
                    seed=0,
                    on_batch=None,
                    on_epoch=None,
                )

            training_pass = _seconds(train) / len(few) * total
            evaluating = _seconds(lambda: loop.evaluate(model, few)) / len(few)
    seconds, size = 0.0, 0
    state = sum(getattr(value, "nbytes", 0) for value in model.state_dict().values())
    for stage in stages:
        epochs = stage.epochs(run)
        seconds += epochs * training_pass
        if stage.kind == "finetune":
            seconds += epochs * tests * evaluating
            size += 1000
        elif stage.kind == "train":
            size += state + 8 * num_kept(total, stage.data_ratio)
        else:
            seconds += epochs * total * evaluating
            size += 28 * total + state
    return seconds if measured else None, size, needed


def _seconds(do: Callable[[], object]) -> float:
    """How long something takes, once it is warm."""
    do()
    times = 0
    start = time.perf_counter()
    while times == 0 or (time.perf_counter() - start < 0.2 and times < 10):
        do()
        times += 1
    return (time.perf_counter() - start) / times
