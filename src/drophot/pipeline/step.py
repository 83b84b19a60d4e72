"""One step of a run: its random numbers, its time, and the trainings in it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from functools import partial
from time import perf_counter
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import Dataset

from drophot._core import progress, random_state
from drophot._core.signatures import bound_keywords
from drophot.pipeline import fit_checks
from drophot.pipeline.config import RunConfig
from drophot.pipeline.loader_use import LoaderUse
from drophot.sampling.loss_sampling import LossSampling
from drophot.training.loaders import BatchLoader

StepName = Literal["score", "select", "train", "prune", "finetune"]


class Step:
    """A step in progress: see `running`."""

    def __init__(self, config: RunConfig, name: StepName, seed: int) -> None:
        self.name, self.seed, self.seconds = name, seed, 0.0
        self._config = config

    def fit(
        self,
        model: nn.Module,
        dataset: Dataset[object],
        epochs: int,
        optimizer: Optimizer,
        *,
        on_batch: Callable[[Tensor, Tensor, Tensor], object] | None = None,
        on_epoch: Callable[[int], object] | None = None,
    ) -> None:
        """Train by the run's loop, and check that it does what a run needs."""
        config = self._config
        fit = config.fit
        if fit_checks.is_library_fit(fit) and "cache" not in bound_keywords(fit):
            fit = partial(fit, **{"cache": config.cache})
        reports = nullcontext(on_batch)
        if on_batch is not None and not fit_checks.is_library_fit(fit):
            reports = fit_checks.counted_reports(on_batch, optimizer, self.name)
        with (
            fit_checks.watched(model, epochs, self.name, on_epoch) as watched,
            progress.epoch_bar(config.progress, epochs, self.name, watched) as after,
            reports as report,
        ):
            fit(
                model,
                dataset,
                epochs,
                optimizer=optimizer,
                batch_size=config.settings.batch_size,
                seed=self.seed,
                on_batch=report,
                on_epoch=after,
            )

    def fit_loader(
        self,
        model: nn.Module,
        loader: Iterable[tuple[Tensor, ...]],
        epochs: int,
        num_batches: int,
        optimizer: Optimizer,
        sampling: LossSampling | None,
    ) -> None:
        """Train on batches that are there already, and tell `sampling` their losses."""
        config = self._config
        on_batch = None if sampling is None else partial(_update_losses, sampling)
        if fit_checks.is_library_fit(config.fit):
            dataset = BatchLoader(loader, num_batches)
            self.fit(model, dataset, epochs, optimizer, on_batch=on_batch)
            return
        losses_of = None if sampling is None else sampling.losses
        use = LoaderUse(loader, num_batches, losses_of, self.name)

        def report(index: Tensor, logits: Tensor, targets: Tensor) -> None:
            if on_batch is not None:
                on_batch(index, logits, targets)
                use.reported(index)

        self.fit(
            model,
            BatchLoader(use, num_batches),
            epochs,
            optimizer,
            on_batch=None if sampling is None else report,
            on_epoch=use.check,
        )


def _update_losses(sampling: LossSampling, index: Tensor, logits: Tensor, targets: Tensor) -> None:
    sampling.update(index, F.cross_entropy(logits.float(), targets, reduction="none"))


@contextmanager
def running(config: RunConfig, name: StepName, *, offset: int = 0) -> Generator[Step]:
    """Time a step and give it random numbers that depend on the run's seed and `offset` alone."""
    step = Step(config, name, config.training_seed + offset)
    start = perf_counter()
    with random_state.preserved_rng(config.device, seed=step.seed):
        yield step
    step.seconds = perf_counter() - start
