"""Checks of what a user's training loop reads of a loader and reports of its batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from drophot.pipeline.fit_checks import LoopError


class LoaderUse:
    """A loader that counts how often its batches are read and reported.

    Args:
        loader: Yields batches `(inputs, targets, index, ...)`.
        num_batches: The number of batches to read in each epoch.
        losses: Shape `(N,)`, the losses that the reports update; `None` if none are needed.
        step: The name of the step, for errors.
    """

    def __init__(
        self,
        loader: Iterable[tuple[Tensor, ...]],
        num_batches: int,
        losses: Tensor | None,
        step: str,
    ) -> None:
        self._loader, self._num_batches, self._step = loader, num_batches, step
        self._read = 0
        # How often each sample was read but not reported. Checked once an epoch, since a check of
        # each batch would wait for the device.
        self._unreported = None if losses is None else torch.zeros_like(losses, dtype=torch.int64)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self._loader:
            self._read += 1
            self._count(batch[2], 1)
            yield batch

    def reported(self, index: Tensor) -> None:
        """Count a report of a batch."""
        self._count(index, -1)

    def _count(self, index: Tensor, change: int) -> None:
        if self._unreported is not None:
            index = index.to(self._unreported.device, torch.int64)
            index = index.clamp(0, len(self._unreported) - 1)
            self._unreported.index_add_(0, index, torch.full_like(index, change))

    def check(self, epoch: int) -> None:
        """Refuse an epoch in which not every batch was read and reported exactly once."""
        read, self._read = self._read, 0
        if read != self._num_batches:
            raise LoopError(
                f"`fit` must iterate over `dataset` once per epoch and read all of its batches, "
                f"{self._num_batches}, but it read {read} in epoch {epoch} of the step "
                f"`{self._step}`."
            )
        if self._unreported is None or not bool(self._unreported.any()):
            return
        missing, wrong = (int((self._unreported * sign).clamp(min=0).sum()) for sign in (1, -1))
        raise LoopError(
            f"`fit` must call on_batch(index, logits, targets) once for each batch, with the index "
            f'of that batch, because the mode "loss_sampling" chooses samples by their losses. In '
            f"epoch {epoch}, it read {missing} samples without reporting them, and reported "
            f"{wrong} that it had not read."
        )
