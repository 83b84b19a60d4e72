"""Learning rate schedulers in the training loop."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

SchedulerInterval = Literal["epoch", "step"]


def check_scheduler(scheduler: Any, interval: Any, optimizer: Optimizer) -> None:
    """Refuse a scheduler that `fit` cannot step, or that schedules another optimizer."""
    check_interval(scheduler, interval)
    if scheduler is None:
        return
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "`scheduler` must step without a metric, got ReduceLROnPlateau. Call its step(metric) "
            "in `on_epoch` instead."
        )
    if not isinstance(scheduler, LRScheduler):
        kind = scheduler if isinstance(scheduler, type) else type(scheduler)
        raise TypeError(
            f"`scheduler` must be a torch.optim.lr_scheduler.LRScheduler of `optimizer`, got "
            f"{kind.__name__}. Pass an instance, such as "
            f"torch.optim.lr_scheduler.StepLR(optimizer, 10)."
        )
    if scheduler.optimizer.param_groups is not optimizer.param_groups:
        raise ValueError(
            f"`scheduler` must schedule `optimizer`, got a {type(scheduler).__name__} of another "
            f"optimizer ({type(scheduler.optimizer).__name__}). Make it from the optimizer that "
            f"you pass."
        )


def check_interval(scheduler: object, interval: object) -> None:
    """Refuse an unknown interval, and one that is given without a scheduler."""
    if interval not in get_args(SchedulerInterval):
        raise ValueError(f'`scheduler_interval` must be "epoch" or "step", got {interval!r}.')
    if scheduler is None and interval != "epoch":
        raise ValueError(
            f"`scheduler_interval` needs a scheduler, got {interval!r} and no `scheduler`. Pass "
            f"`scheduler` too, or remove `scheduler_interval`."
        )
