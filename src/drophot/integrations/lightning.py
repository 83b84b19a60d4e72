"""A tracker in Lightning's Trainer."""

from __future__ import annotations

import os
import tempfile
import uuid
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drophot._core.user_warnings import warn
from drophot.tracking import attach
from drophot.tracking.forgetting import ForgettingTracker
from drophot.tracking.presenter import Presenter, Taken

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import CombinedLoader
except ImportError as error:
    raise ImportError(
        "drophot.integrations.lightning needs the package lightning, which cannot be imported. "
        'Install it: pip install "drophot[lightning]"'
    ) from error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_HOW_TO_RETURN_LOGITS = (
    'Return them from `training_step`: `return {"loss": loss, "logits": logits}`. If they have '
    "another name, pass `TrackerCallback(tracker, logits=lambda outputs: ...)`"
)


class TrackerCallback(Callback):
    """Presents every training batch to a tracker, merges ranks, and saves the tracker's state.

    `training_step` must return the logits: `{"loss": loss, "logits": logits}`. The rows of the
    logits must be in the order of the batch; a step that permutes them cannot be detected.

    The batch must contain its samples' index, from an :class:`drophot.IndexedDataset`: last in a
    tuple, or as `"index"` in a dict. The index and the targets are read before the step, which may
    change the batch. A step that returns None skips its batch, also for the tracker. The pass in
    which `StochasticWeightAveraging` only updates the statistics of BatchNorm is not counted.

    Ranks are merged by `sync` at the end of every training epoch and before a checkpoint is saved.
    The tracker's state is saved in the Trainer's checkpoints, and `fit(ckpt_path=...)` restores it.
    A checkpoint without it causes a warning. A checkpoint that is saved because a rank failed has
    the state of the last merge. `ddp_notebook`, `ddp_fork` and `ddp_spawn` train in other
    processes; afterwards the tracker of the process that called `fit` has the merged state.

    Args:
        tracker: A :class:`drophot.ForgettingTracker` or :class:`drophot.DynamicsTracker` of the
            training set's length.
        logits: Gets the logits `(B, C)` from the return value of `training_step`. `None` takes its
            entry `"logits"`.
        targets: Gets the targets `(B,)` from a batch without its index. `None` takes the second of
            a pair, or the only entry of a dict among `targets`, `target`, `labels`, `label`.
        batch: Gets the tracked part from the batch of several loaders (`CombinedLoader`):
            `batch=lambda batch: batch["labelled"]`. If it returns None, nothing is counted.
        correct: For tasks other than classification: gets the batch without its index and the
            return value of `training_step`, and returns a bool `(B,)`. Needs a ForgettingTracker.
        losses: For models without logits `(B, C)`, such as language models: gets the batch without
            its index and the return value of `training_step`, and returns the loss of each sample,
            floats `(B,)`; see :func:`drophot.tracking.sequence_losses`. A sample whose loss is NaN
            is left out. Needs a DynamicsTracker with statistics of the loss alone.
        group: The ranks that see different batches, if not all do (tensor parallelism): a process
            group, or a function that gets it from the Trainer when `fit` has begun. `None` means
            all ranks, and with `ModelParallelStrategy` its data-parallel ranks.
        state_key: The name of the state in a checkpoint. If a Trainer has several such callbacks,
            give each a different name.

    Raises:
        TypeError: If `tracker` is not a tracker, or not the kind that `correct` or `losses` needs;
            after the first training batch, if there are no logits, no index or no targets.
        ValueError: If `correct` and `losses` are both given; before the first training batch, if a
            loader's dataset joins several IndexedDatasets; after it, if the logits or targets do
            not have the shape of a classification.
        RuntimeError: At the end of the first epoch, if no batch was counted.

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
        *,
        batch: Callable[[Any], Any] | None = None,
        correct: Callable[[Any, Any], Tensor] | None = None,
        losses: Callable[[Any, Any], Tensor] | None = None,
        group: ProcessGroup | Callable[[Trainer], ProcessGroup] | None = None,
        state_key: str = "TrackerCallback",
    ) -> None:
        self._presenter = Presenter(tracker, "TrackerCallback", logits, targets, correct, losses)
        self._batch = batch
        self._group = group
        self._state_key = state_key
        self._process_id, self._address = os.getpid(), uuid.uuid4().hex
        _callbacks[self._address] = self
        self._reset_run()

    @property
    def tracker(self) -> ForgettingTracker:
        """The tracker."""
        return self._presenter.tracker

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint's `"callbacks"`."""
        return self._state_key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called by Lightning on every rank before anything else.

        Raises:
            RuntimeError: If several processes were launched although the tracker has seen samples
                since its state was last saved.
        """
        if stage != "fit":
            return
        self._reset_run()
        self._trainer = trainer
        if os.getpid() != self._process_id and trainer.world_size > 1:
            try:  # marks the state as the one that all ranks start from
                self.tracker.load_state_dict(self.tracker.state_dict())
            except RuntimeError as error:
                raise RuntimeError(
                    "`tracker` has seen samples since its state was last saved, so `fit` cannot "
                    "launch several processes. Call "
                    "`tracker.load_state_dict(tracker.state_dict())` before `fit`."
                ) from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by Lightning on every rank, after it has resumed from a checkpoint."""
        self._merged_ranks = self._find_group(trainer)
        self._merge()
        self._presentations_before = int(self.tracker.presentations.sum())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by Lightning before each training epoch, which may have new loaders.

        Raises:
            ValueError: If a loader's dataset joins several IndexedDatasets.
        """
        for loader in _loaders(trainer.train_dataloader):
            attach.check_source(loader)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called by Lightning before each training batch."""
        self._taken = batch, self._take(trainer, batch)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Called by Lightning after each training batch."""
        (before, taken), self._taken = self._taken, (None, None)
        if getattr(trainer.fit_loop, "_skip_backward", False):
            # StochasticWeightAveraging updates the statistics of BatchNorm without training.
            self._presentations_before = None
            return
        if not outputs or batch is None:  # `outputs` is {} if the step returned None
            return
        if batch is not before:  # the step takes its batch from `dataloader_iter`
            taken = self._take(trainer, batch)
        if isinstance(taken, TypeError):
            raise taken
        if taken is not None:
            self._presenter.present(taken, outputs, pl_module, _HOW_TO_RETURN_LOGITS)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by Lightning after each training epoch, on every rank.

        Raises:
            RuntimeError: After the first epoch, if no rank counted a batch.
        """
        self._merge()
        if self._presentations_before is None:
            return
        if int(self.tracker.presentations.sum()) == self._presentations_before:
            raise RuntimeError(
                f"No training batch of the first epoch was counted, because "
                f"`{type(pl_module).__name__}.training_step` returned no logits. "
                f"{_HOW_TO_RETURN_LOGITS}."
            )
        self._presentations_before = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by Lightning on every rank.

        If `fit` launched this process, the state is sent to the process that called `fit`.
        """
        if os.getpid() == self._process_id or trainer.local_rank != 0:
            return
        handle, path = tempfile.mkstemp(suffix=".pt")
        with os.fdopen(handle, "wb") as file:
            torch.save(self.tracker.state_dict(), file)
        # The launcher returns `trainer.state` to that process, but not the callbacks. It reads the
        # pipe only after this process has ended, so only a path fits through it.
        setattr(trainer.state, f"drophot_{self._address}", _Message(self._address, path))

    def state_dict(self) -> dict[str, Any]:
        """Called by Lightning on every rank when it saves a checkpoint.

        Returns:
            The merged state of all ranks; that of the last merge if a rank has failed.
        """
        if self._merged is not None and self._trainer is not None and self._trainer.interrupted:
            return self._merged  # only the rank that failed gets here, so a merge would hang
        self._merge()
        return self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by Lightning on every rank when it resumes from a checkpoint."""
        self.tracker.load_state_dict(state_dict)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called by Lightning on every rank when it resumes from a checkpoint."""
        if self.state_key not in (states := checkpoint.get("callbacks", {})):
            warn(
                f"The checkpoint has no state of the tracker named {self.state_key!r}, only "
                f"{', '.join(map(repr, states)) or 'no callbacks'}. The training before it is not "
                f"counted."
            )

    def __getstate__(self) -> dict[str, Any]:
        of_the_run = ("_trainer", "_merged", "_merged_ranks", "_taken", "_presentations_before")
        return {name: value for name, value in vars(self).items() if name not in of_the_run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset_run()
        if os.getpid() == self._process_id:  # a copy; a spawned process keeps the address
            self._address = uuid.uuid4().hex
            _callbacks[self._address] = self

    def _reset_run(self) -> None:
        self._trainer: Trainer | None = None
        self._merged: dict[str, Any] | None = None
        self._merged_ranks: ProcessGroup | None = None
        self._taken: tuple[Any, Taken | TypeError | None] = None, None
        self._presentations_before: int | None = None

    def _take(self, trainer: Trainer, batch: Any) -> Taken | TypeError | None:
        """Read the index and targets of a batch. An error is kept until the step used the batch."""
        if batch is None:
            return None
        loaders = trainer.train_dataloader
        if self._batch is not None:
            batch = self._batch(batch)
            if batch is None:
                return None
        elif isinstance(loaders, Mapping | list | tuple | CombinedLoader):
            return TypeError(
                f"`batch` must be given because the batch comes from several loaders, got a "
                f"{type(loaders).__name__} and no `batch`. Say which part is tracked: "
                f'`TrackerCallback(tracker, batch=lambda batch: batch["labelled"])`.'
            )
        try:
            return self._presenter.take(batch)
        except TypeError as error:
            return error

    def _merge(self) -> None:
        self.tracker.sync(self._merged_ranks)
        if self._trainer is not None and self._trainer.world_size > 1:
            state = self.tracker.state_dict()
            self._merged = {k: v.cpu() if torch.is_tensor(v) else v for k, v in state.items()}

    def _find_group(self, trainer: Trainer) -> ProcessGroup | None:
        if callable(self._group):
            return self._group(trainer)
        mesh = getattr(trainer.strategy, "device_mesh", None)
        if self._group is None and mesh is not None:  # ModelParallelStrategy
            return mesh["data_parallel"].get_group()
        return self._group


def _loaders(loaders: Any) -> list[Any]:
    """The single loaders in the argument of `fit`."""
    if isinstance(loaders, CombinedLoader):
        return _loaders(loaders.iterables)
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        return [found for part in loaders for found in _loaders(part)]
    return [loaders]


_callbacks: weakref.WeakValueDictionary[str, TrackerCallback] = weakref.WeakValueDictionary()


class _Message:
    """When unpickled in the process of the callback, loads the state into its tracker."""

    def __init__(self, address: str, path: str) -> None:
        self.address, self.path = address, path

    def __deepcopy__(self, memo: Any) -> _Message:
        return self  # the launcher makes a copy before it pickles

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self.address, self.path)


def _receive(address: str, path: str) -> None:
    callback = _callbacks.get(address)
    if callback is not None and callback._process_id == os.getpid():
        state = torch.load(path, map_location="cpu", weights_only=True)
        callback.tracker.load_state_dict(state)
        Path(path).unlink()
