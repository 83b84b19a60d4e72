"""What a training loop owes a run, looked at as early as it can be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from drophot._core.classifier import first_nonfinite
from drophot.tracking.forgetting import ForgettingTracker


class LoopError(RuntimeError):
    """A training loop that does not do what `DropHot` asks of it, in this training or any other."""


@contextmanager
def watched(
    model: nn.Module, epochs: int, step: str, on_epoch: Callable[[int], object] | None
) -> Iterator[Callable[[int], None]]:
    """Follow a training: that its loop calls back, and that it does not diverge.

    Args:
        model: What is trained.
        epochs: How often the loop is to call back.
        step: The step of the run that the training is.
        on_epoch: What else is to be called after each epoch.

    Yields:
        What the loop has to call after each epoch.

    Raises:
        LoopError: If it was not called as often as that.
        ValueError: If a weight is not finite after an epoch or in the end.
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
            f"`fit` should call on_epoch after every epoch, {epochs} times. Found {calls} calls "
            f"in the step `{step}`."
        )
    check_finite(model, step, "when `fit` returned")


def check_finite(model: nn.Module, step: str, when: str) -> None:
    """Refuse a network that diverged: what comes of it would look like any other number.

    Args:
        model: What was trained.
        step: The step of the run that the training is.
        when: At what point of it.

    Raises:
        ValueError: If a weight that is trained is NaN or infinite.
    """
    if name := first_nonfinite(model):
        raise ValueError(
            f"The step `{step}` should leave finite weights. Found NaN or infinity in "
            f"`{name}` {when}: the training diverged. Lower the "
            f"learning rate of `optimizer`, or look for inputs that are not finite."
        )


def check_presented(tracker: ForgettingTracker, *, over: bool = True) -> None:
    """Refuse a training whose loop did not call back.

    Args:
        tracker: Was to see every sample, and at any time some.
        over: Whether the training is over.

    Raises:
        LoopError: If it did not.
    """
    missed, total = int((tracker.presentations == 0).sum()), len(tracker.presentations)
    if missed == total or (missed and over):
        raise LoopError(
            f"`fit` should call on_batch for every batch and on_epoch after every epoch. Found "
            f"{missed} of {total} samples that were never presented."
        )


def check_losses_reported(losses: Tensor) -> None:
    """Refuse a training in the mode "loss_sampling" whose loop reported no losses."""
    if bool(losses.isnan().all()):
        raise LoopError(
            "`fit` must call on_batch(index, logits, targets) after each step, because the mode "
            '"loss_sampling" chooses samples by their losses, but it reported no batch.'
        )
