"""Pruning in step 3, while the network trains on its coreset: the schedule "joint"."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from drophot._core.importance import FromBatches
from drophot.pipeline.config import RunConfig
from drophot.pipeline.fit_checks import LoopError
from drophot.pipeline.provenance.own_objects import unchanged
from drophot.prune.schedule import Schedule, cubic
from drophot.prune.unpruned_weights import uncovered_warning_silenced


@contextmanager
def pruning_while_training(
    config: RunConfig, model: nn.Module, optimizer: Optimizer, steps: int
) -> Generator[Schedule | None]:
    """Let a training of so many steps prune the model, if the run's schedule is "joint".

    The prunings divide the training into parts of equal length, so that the network trains before
    the first and after the last one. Yields what prunes.
    """
    settings = config.settings
    if settings.schedule != "joint":
        yield None
        return
    times = settings.prunings
    ratios, every = (0.0, *cubic(settings.prune_ratio, times)), max(steps // (times + 1), 1)
    importance = settings.importance
    assert not isinstance(importance, FromBatches)  # `check_combinations` refuses it
    with unchanged("importance", importance):
        with uncovered_warning_silenced():  # the constructor of the run has given it
            pruner = Schedule(
                model, ratios, every=every, scope=settings.scope, importance=importance
            )
        with pruner.hold(optimizer):
            yield pruner
    if not pruner.finished:
        raise LoopError(
            f"`fit` must step the optimizer for every batch, {steps} times in the step `train`, of "
            f'which schedule="joint" needs {every * times}, got {pruner.steps}. Lower `prunings` '
            f"or raise `train_epochs`."
        )
