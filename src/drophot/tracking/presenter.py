"""One batch of somebody else's trainer, counted by its logits or by a judgement of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from drophot.tracking import attach
from drophot.tracking.dynamics import DynamicsTracker
from drophot.tracking.forgetting import ForgettingTracker


class Presenter:
    """Takes index and targets from a batch, and later counts it by what the step gave.

    Args:
        tracker: Who counts.
        owner: The public class that the user called, for errors.
        logits: Gets the logits from the step's outputs; `None` takes their `"logits"`.
        targets: As in :func:`drophot.tracking.attach.split`.
        correct: Gets the batch without its index and the outputs, and says which samples are right.

    Raises:
        TypeError: If `tracker` is not a tracker, or `correct` is given for one that needs logits.
    """

    def __init__(
        self,
        tracker: ForgettingTracker,
        owner: str,
        logits: Callable[[Any], Tensor] | None,
        targets: Callable[[Any], Tensor] | None,
        correct: Callable[[Any, Any], Tensor] | None,
    ) -> None:
        if not isinstance(tracker, ForgettingTracker):
            raise TypeError(
                f"`tracker` should be a ForgettingTracker or DynamicsTracker. Found "
                f"{attach.describe(tracker)}."
            )
        if correct is not None and isinstance(tracker, DynamicsTracker):
            raise TypeError(
                "`correct` should go with a ForgettingTracker. Found a DynamicsTracker, whose "
                "statistics need logits and classes."
            )
        self.tracker = tracker
        self._owner = owner
        self._logits = logits
        self._targets = targets
        self._correct = correct

    def take(self, batch: Any) -> Taken:
        """Read what counting needs, before a step can change the batch.

        Args:
            batch: With its index.

        Returns:
            What `present` takes.

        Raises:
            TypeError: If the batch has no index, or no targets where they are needed.
        """
        if self._correct is not None:
            rest, (index, _) = attach.split(batch, _nothing)
            return index.clone(), None, rest
        _, (index, targets) = attach.split(batch, self._targets)
        return index.clone(), targets.clone() if isinstance(targets, Tensor) else targets, None

    def present(self, taken: Taken, outputs: Any, source: object, cure: str) -> None:
        """Count a batch.

        Args:
            taken: From `take`.
            outputs: What the model or the step gave.
            source: Who gave it, for errors.
            cure: What to do if there are no logits in it, for errors.

        Raises:
            TypeError: If there are no logits, or the targets are not integers.
            ValueError: If the shapes are not those of a classification, or as in `update`.
        """
        index, targets, batch = taken
        if self._correct is not None:
            self.tracker.update_correct(index, self._correct(batch, outputs))
            return
        logits = attach.find_logits(outputs, self._logits, source, cure)
        judge = (
            f"for any other task judge the samples yourself: `{self._owner}(ForgettingTracker(n), "
            f"correct=lambda batch, outputs: ...)` gives a bool for each"
        )
        if isinstance(targets, Tensor) and targets.is_floating_point():
            raise TypeError(f"`targets` should be integers. Found {targets.dtype}; {judge}.")
        if logits.dim() != 2 or (isinstance(targets, Tensor) and targets.dim() != 1):
            shape = tuple(targets.shape) if isinstance(targets, Tensor) else targets
            raise ValueError(
                f"`logits` should have shape (B, C) and `targets` shape (B,). Found "
                f"{tuple(logits.shape)} and {shape}; {judge}."
            )
        self.tracker.update(index, logits, targets)


Taken = tuple[Tensor, Any, Any]  # index; targets, or none; the batch, where `correct` wants it


def _nothing(_: Any) -> Any:
    return None
