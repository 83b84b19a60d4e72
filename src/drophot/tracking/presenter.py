"""Presents the batches of another library's trainer to a tracker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from drophot.tracking import attach
from drophot.tracking.dynamics import DynamicsTracker
from drophot.tracking.forgetting import ForgettingTracker
from drophot.tracking.validation import describe

# The index; the targets, or None; the batch without its index, if `correct` or `losses` needs it.
Taken = tuple[Tensor, Any, Any]


class Presenter:
    """Takes the index and targets from a batch, and later presents it with the step's outputs.

    Args:
        tracker: The tracker.
        owner: The public class that the user called, for errors.
        logits: Gets the logits from the step's outputs; `None` takes their entry `"logits"`.
        targets: As in :func:`drophot.tracking.attach.split`.
        correct: Gets the batch without its index and the outputs, and returns which samples are
            correct.
        losses: Gets the same, and returns the loss of each sample, NaN if it has none.

    Raises:
        TypeError: If `tracker` is not a tracker, or not one for `correct` or `losses`.
        ValueError: If both are given.
    """

    def __init__(
        self,
        tracker: ForgettingTracker,
        owner: str,
        logits: Callable[[Any], Tensor] | None,
        targets: Callable[[Any], Tensor] | None,
        correct: Callable[[Any, Any], Tensor] | None,
        losses: Callable[[Any, Any], Tensor] | None,
    ) -> None:
        if not isinstance(tracker, ForgettingTracker):
            raise TypeError(
                f"`tracker` must be a ForgettingTracker or DynamicsTracker, got "
                f"{describe(tracker)}."
            )
        if correct is not None and isinstance(tracker, DynamicsTracker):
            raise TypeError(
                "`correct` cannot be used with a DynamicsTracker, whose statistics need logits and "
                "classes. Use a ForgettingTracker."
            )
        if losses is not None and correct is not None:
            raise ValueError(
                "`correct` and `losses` must not both be given: a tracker counts either forgetting "
                "events or losses. Use two trackers."
            )
        if losses is not None and not isinstance(tracker, DynamicsTracker):
            raise TypeError(
                "`losses` needs a DynamicsTracker, got a ForgettingTracker. Use "
                '`DynamicsTracker(n, statistics=["loss"])`.'
            )
        self.tracker = tracker
        self._owner = owner
        self._logits = logits
        self._targets = targets
        self._correct = correct
        self._losses = losses

    def take(self, batch: Any) -> Taken:
        """Read what `present` needs, before a step can change the batch.

        Raises:
            TypeError: If the batch has no index, or no targets where they are needed.
        """
        if self._correct is not None or self._losses is not None:
            rest, (index, _) = attach.split(batch, _no_targets)
            return index.clone(), None, rest
        _, (index, targets) = attach.split(batch, self._targets)
        return index.clone(), targets.clone() if isinstance(targets, Tensor) else targets, None

    def present(self, taken: Taken, outputs: Any, source: object, fix: str) -> None:
        """Present a batch.

        Args:
            taken: The result of `take`.
            outputs: The outputs of the model or the step.
            source: The model or the trainer, for errors.
            fix: The advice of the error if there are no logits in the outputs.

        Raises:
            TypeError: If there are no logits, or the targets are not integers.
            ValueError: If the shapes are not those of a classification, or as in `update`.
        """
        index, targets, batch = taken
        if self._correct is not None:
            self.tracker.update_correct(index, self._correct(batch, outputs))
            return
        if self._losses is not None:
            self._present_losses(index, self._losses(batch, outputs))
            return
        logits = attach.find_logits(outputs, self._logits, source, fix)
        alternative = (
            f"For any task other than classification, decide which samples are correct: "
            f"`{self._owner}(ForgettingTracker(n), correct=lambda batch, outputs: ...)` returns a "
            f"bool for each sample"
        )
        if isinstance(targets, Tensor) and targets.is_floating_point():
            raise TypeError(f"`targets` must be integers, got {targets.dtype}. {alternative}.")
        if logits.dim() != 2 or (isinstance(targets, Tensor) and targets.dim() != 1):
            shape = tuple(targets.shape) if isinstance(targets, Tensor) else targets
            raise ValueError(
                f"`logits` must have shape (B, C) and `targets` shape (B,), got "
                f"{tuple(logits.shape)} and {shape}. {alternative}."
            )
        self.tracker.update(index, logits, targets)

    def _present_losses(self, index: Tensor, losses: Any) -> None:
        assert isinstance(self.tracker, DynamicsTracker)
        if isinstance(losses, Tensor) and losses.shape == index.shape:
            known = ~losses.isnan()
            index, losses = index[known.to(index.device)], losses[known]
        self.tracker.update_loss(index, losses)


def _no_targets(_: Any) -> Any:
    return None
