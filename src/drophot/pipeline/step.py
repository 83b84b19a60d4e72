"""One step of a run: its random numbers, its time, and the trainings in it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from drophot._core import progress, random_state
from drophot.pipeline import fit_checks
from drophot.pipeline.config import RunConfig
from drophot.training import loop

StepName = Literal["score", "select", "train", "prune", "finetune"]


class Step:
    """A step in progress: see `running`."""

    def __init__(self, config: RunConfig, name: StepName, seed: int) -> None:
        self.name, self.seed, self.seconds = name, seed, 0.0
        self._config = config

    def fit(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        epochs: int,
        optimizer: Optimizer,
        *,
        on_batch: Callable[[Tensor, Tensor, Tensor], object] | None = None,
        on_epoch: Callable[[int], object] | None = None,
    ) -> None:
        """Train by the run's loop, and check that it does what a run needs."""
        config = self._config
        fit = config.fit
        if fit is loop.fit:
            fit = partial(loop.fit, cache=config.cache)
        with (
            fit_checks.watched(model, epochs, self.name, on_epoch) as watched,
            progress.epoch_bar(config.progress, epochs, self.name, watched) as after,
        ):
            fit(
                model,
                dataset,
                epochs,
                optimizer=optimizer,
                batch_size=config.settings.batch_size,
                seed=self.seed,
                on_batch=on_batch,
                on_epoch=after,
            )


@contextmanager
def running(config: RunConfig, name: StepName, *, offset: int = 0) -> Generator[Step]:
    """Time a step and give it random numbers that depend on the run's seed and `offset` alone."""
    step = Step(config, name, config.training_seed + offset)
    start = perf_counter()
    with random_state.preserved_rng(config.device, seed=step.seed):
        yield step
    step.seconds = perf_counter() - start
