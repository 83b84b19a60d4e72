"""The estimated cost of a grid in time, disk space and memory, from a few measured steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.utils.data import Dataset, Subset

from drophot._core import random_state
from drophot._core.ratios import num_kept
from drophot.data.batching import batches
from drophot.data.cache import in_memory
from drophot.grid.compute import limited_threads
from drophot.grid.executors import GpuSharing
from drophot.grid.stages import Stage
from drophot.pipeline.config import RunConfig
from drophot.pipeline.fit_checks import is_library_fit
from drophot.pipeline.step_3_batches import selection_passes
from drophot.training.evaluation import evaluate
from drophot.training.step_memory import step_memory

# The memory of an idle process: of Python with torch on the CPU, of a context on a GPU.
_IDLE_PROCESS = {"cpu": 400_000_000, "cuda": 600_000_000}

_SHARING = {
    None: "",
    "mps": " that share their GPU by MPS",
    "turns": " that take turns on one GPU",
    "one each": " with a GPU each",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The part of a grid that is left to compute, with an estimate of its cost."""

    runs: int
    """All runs of the grid, computed or not."""
    scorings: int
    """The trainings on all samples that give scores and are left to do."""
    trainings: int
    """The trainings on a coreset that are left to do, and on all samples if no scoring is one."""
    finetunings: int
    """The runs that are left to do, each of which ends with a fine-tuning."""
    epochs: float
    """The passes over the full training set that are left to do: epochs of training, and the
    passes in which an :class:`drophot.Adaptive` selects again."""
    samples: int
    """The size of the full training set."""
    workers: int
    """The number of stages that run side by side, as far as that is known."""
    seconds: float | None
    """An estimate from a few steps measured on this machine; `None` with your own `fit`, which is
    not called to measure it. Workers that share a GPU are counted as one, since what they gain
    depends on the network."""
    bytes: int
    """An estimate of the bytes that the store will grow by."""
    memory: int
    """An estimate of the bytes of memory that each worker needs."""
    gpu_sharing: GpuSharing | None = None
    """How workers on this machine's GPUs share them: `"mps"` at the same time, by NVIDIA's
    multi-process service; `"turns"` one after the other; `"one each"`. `None` if there are no such
    workers."""

    @property
    def stages(self) -> int:
        """The number of stages that are left to do."""
        return self.scorings + self.trainings + self.finetunings

    def __str__(self) -> str:
        if self.seconds is None:
            duration = "time not known with your own `fit`,"
        elif self.seconds > 90:
            duration = f"about {self.seconds / 60:.0f} min"
        else:
            duration = f"about {self.seconds:.0f} s"
        return (
            f"{self.stages} stages to do for {self.finetunings} of {self.runs} runs "
            f"({self.scorings} scorings, {self.trainings} trainings, {self.finetunings} "
            f"fine-tunings), {self.epochs:,.0f} epochs of {self.samples:,} samples: {duration} "
            f"on {self.workers} worker{'s' * (self.workers > 1)} of "
            f"{self.memory / 1e9:.1f} GB{_SHARING[self.gpu_sharing]}, "
            f"{self.bytes / 1e6:,.1f} MB to store."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of some stages."""

    seconds: float | None
    """Seconds on one worker, if known."""
    bytes: int
    """Bytes in the store."""
    memory: int
    """The bytes that each worker needs, without the data."""


def passes(config: RunConfig, stage: Stage) -> float:
    """The passes over the full training set that a stage takes: see `Plan.epochs`."""
    return stage.epochs + _selection_passes(config, stage)


def estimate(config: RunConfig, stages: Sequence[Stage], threads: int) -> Cost:
    """Estimate the cost of stages, without a call of the user's own `fit`."""
    if not stages:
        return Cost(seconds=0.0, bytes=0, memory=0)
    total, tests = config.num_samples, config.num_test_samples
    batch_size, device = config.settings.batch_size, config.device
    few = Subset(config.train_set, range(min(total, 16 * batch_size)))
    # A user's `fit` may log, write checkpoints or count its calls.
    is_measured = is_library_fit(config.fit)
    training_pass = evaluating = 0.0
    with limited_threads(threads), random_state.preserved_rng(device, seed=0):
        model = config.factory().to(device)
        inputs, targets, *_ = next(batches(in_memory(few, device), batch_size, device))
        needed = _IDLE_PROCESS["cuda" if device.type == "cuda" else "cpu"]
        needed += step_memory(model, inputs, targets)
        if is_measured:
            training_pass = _training_seconds(config, model, few) / len(few) * total
            evaluating = _seconds(lambda: evaluate(model, few)) / len(few)
    seconds, size = 0.0, 0
    state = sum(getattr(value, "nbytes", 0) for value in model.state_dict().values())
    for stage in stages:
        seconds += stage.epochs * training_pass
        if stage.kind == "finetune":
            seconds += stage.epochs * tests * evaluating
            size += 1000
        elif stage.kind == "train":
            seconds += _selection_passes(config, stage) * total * evaluating
            size += state + 8 * num_kept(total, stage.settings.data_ratio)
        else:
            seconds += stage.epochs * total * evaluating
            size += 28 * total + state
    return Cost(seconds=seconds if is_measured else None, bytes=size, memory=needed)


def _selection_passes(config: RunConfig, stage: Stage) -> int:
    if stage.kind != "train":
        return 0
    return selection_passes(replace(config, settings=stage.settings))


def _training_seconds(config: RunConfig, model: nn.Module, samples: Dataset[object]) -> float:
    optimizer = config.optimizer(model.parameters())

    def train() -> None:
        config.fit(
            model,
            samples,
            1,
            optimizer=optimizer,
            batch_size=config.settings.batch_size,
            seed=0,
            on_batch=None,
            on_epoch=None,
        )

    return _seconds(train)


def _seconds(do: Callable[[], object]) -> float:
    """How long a call takes after a first one."""
    do()
    times = 0
    start = time.perf_counter()
    while times == 0 or (time.perf_counter() - start < 0.2 and times < 10):
        do()
        times += 1
    return (time.perf_counter() - start) / times
