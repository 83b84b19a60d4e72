"""Checks, as early as possible, that a training loop does what a run requires."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer

from drophot._core.classifier import first_nonfinite
from drophot._core.signatures import bound_keywords, without_partials
from drophot.tracking.forgetting import ForgettingTracker
from drophot.training import loop
from drophot.training.schedulers import check_interval

OnBatch = Callable[[Tensor, Tensor, Tensor], object]


class LoopError(RuntimeError):
    """A training loop that does not do what `DropHot` requires, in this training or any other."""


_SET_BY_THE_RUN = ("optimizer", "batch_size", "seed", "on_batch", "on_epoch")


def check_bound_arguments(fit: object) -> None:
    """Refuse a partial of `fit` that sets an argument which the run passes itself."""
    bound = bound_keywords(fit)
    if wrong := [name for name in _SET_BY_THE_RUN if name in bound]:
        raise ValueError(
            f"`fit` must leave {', '.join(_SET_BY_THE_RUN)} to the run, got a partial that sets "
            f"{wrong[0]!r}. Remove it there."
        )
    if is_library_fit(fit):
        check_interval(bound.get("scheduler"), bound.get("scheduler_interval", "epoch"))


def is_library_fit(fit: object) -> bool:
    """Whether a training loop is :func:`drophot.training.fit`, perhaps in a `functools.partial`."""
    return without_partials(fit) is loop.fit


@contextmanager
def watched(
    model: nn.Module, epochs: int, step: str, on_epoch: Callable[[int], object] | None
) -> Generator[Callable[[int], None]]:
    """Check that a training loop calls back after each epoch, and that it does not diverge.

    Yields the function to call after each epoch, which also calls `on_epoch`.
    """
    calls = 0

    def after(epoch: int) -> None:
        nonlocal calls
        calls += 1
        check_finite(model, step, f"after epoch {calls} of {epochs}")
        if on_epoch is not None:
            on_epoch(epoch)

    yield after
    if calls != epochs:
        raise LoopError(
            f"`fit` must call `on_epoch` after every epoch, {epochs} times, got {calls} calls in "
            f"the step `{step}`."
        )
    check_finite(model, step, "when `fit` returned")


def check_finite(model: nn.Module, step: str, when: str) -> None:
    """Refuse a network that diverged: later results would look like any others."""
    if name := first_nonfinite(model):
        raise ValueError(
            f"The step `{step}` must leave finite weights, got NaN or infinity in `{name}` {when}: "
            f"the training diverged. Lower the learning rate of `optimizer`, or look for inputs "
            f"that are not finite."
        )


def check_presented(tracker: ForgettingTracker, *, over: bool = True) -> None:
    """Refuse a training whose loop did not call back: some samples were never presented.

    Until the training is over, it is enough that some were.
    """
    missed, total = int((tracker.presentations == 0).sum()), len(tracker.presentations)
    if missed == total or (missed and over):
        raise LoopError(
            f"`fit` must call `on_batch` for every batch and `on_epoch` after every epoch, but "
            f"{missed} of {total} samples were never presented."
        )


@contextmanager
def counted_reports(on_batch: OnBatch, optimizer: Optimizer, step: str) -> Generator[OnBatch]:
    """Check that a training loop reports the batch of each step of its optimizer.

    Yields the function to call after each step.
    """
    reports = steps = 0

    def report(index: Tensor, logits: Tensor, targets: Tensor) -> None:
        nonlocal reports
        reports += 1
        on_batch(index, logits, targets)

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    handle = optimizer.register_step_post_hook(count)
    try:
        yield report
    finally:
        handle.remove()
    if 0 < reports < steps:
        raise LoopError(
            f"`fit` must call on_batch(index, logits, targets) for every batch, but in the step "
            f"`{step}` it called it {reports} times and took {steps} steps of the optimizer."
        )
