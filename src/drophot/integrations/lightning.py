"""The tracker in Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from drophot import _watch
from drophot.forgetting import ForgettingTracker

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "drophot.integrations.lightning should find the package lightning. Found none that can be "
        'imported; install it: pip install "drophot[lightning]"'
    ) from error

_CURE = (
    'let `training_step` return them: `return {"loss": loss, "logits": logits}`; if they go by '
    "another name, say so: `TrackerCallback(tracker, logits=lambda outputs: ...)`"
)


class TrackerCallback(Callback):
    """Presents every training batch to a tracker, merges ranks, and lives in the checkpoint.

    `training_step` gives the logits in what it returns: `{"loss": loss, "logits": logits}`. The
    batch carries its samples' index, from an :class:`drophot.IndexedDataset`: last in a tuple, or
    as `"index"` in a dict. A step that returns None skips its batch, for the tracker as well.

    Ranks are merged by `sync` at the end of every training epoch and before a checkpoint. The
    tracker's state is in the Trainer's checkpoints and goes on with `fit(ckpt_path=...)`.

    Args:
        tracker: A :class:`drophot.ForgettingTracker` or :class:`drophot.DynamicsTracker` of the
            training set's length.
        logits: Gets the logits `(B, C)` from what `training_step` returns. `None` takes its
            `"logits"`.
        targets: Gets the targets `(B,)` from a batch without its index. `None` takes the second of
            a pair, or a dict's one entry of `targets`, `target`, `labels`, `label`.

    Raises:
        TypeError: If `tracker` is not a tracker; after the first training batch, if there are no
            logits, no index or no targets.

    Example:
        >>> from drophot import DynamicsTracker
        >>> callback = TrackerCallback(DynamicsTracker(50_000))  # Trainer(callbacks=[callback])
        >>> callback.tracker.num_samples
        50000
    """

    def __init__(
        self,
        tracker: ForgettingTracker,
        logits: Callable[[Any], Tensor] | None = None,
        targets: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not isinstance(tracker, ForgettingTracker):
            raise TypeError(
                f"`tracker` should be a ForgettingTracker or DynamicsTracker. Found "
                f"{_watch.describe(tracker)}."
            )
        self.tracker = tracker
        self._logits = logits
        self._targets = targets

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Lightning calls this after each training batch."""
        if pl_module.automatic_optimization and not outputs:  # {}, when a step returned None
            return
        logits = _watch.find_logits(outputs, self._logits, pl_module, _CURE)
        _, (index, targets) = _watch.split(batch, self._targets)
        self.tracker.update(index, logits, targets)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning calls this after each training epoch, on every rank."""
        self.tracker.sync()

    def state_dict(self) -> dict[str, Any]:
        """Lightning asks for this on every rank when it saves a checkpoint.

        Returns:
            The tracker's state, of all ranks.
        """
        self.tracker.sync()
        return self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this on every rank when it resumes from a checkpoint."""
        self.tracker.load_state_dict(state_dict)
