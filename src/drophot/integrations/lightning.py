"""The tracker in Lightning's Trainer."""

from __future__ import annotations

import os
import tempfile
import uuid
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drophot.tracking import attach
from drophot.tracking.forgetting import ForgettingTracker
from drophot.tracking.presenter import Presenter, Taken

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import CombinedLoader
except ImportError as error:
    raise ImportError(
        "drophot.integrations.lightning should find the package lightning. Found none that can be "
        'imported; install it: pip install "drophot[lightning]"'
    ) from error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CURE = (
    'let `training_step` return them: `return {"loss": loss, "logits": logits}`; if they go by '
    "another name, say so: `TrackerCallback(tracker, logits=lambda outputs: ...)`"
)


class TrackerCallback(Callback):
    """Presents every training batch to a tracker, merges ranks, and lives in the checkpoint.

    `training_step` gives the logits in what it returns: `{"loss": loss, "logits": logits}`. The
    rows of the logits must be in the order of the batch; a step that permutes them cannot be
    detected.

    The batch carries its samples' index, from an :class:`drophot.IndexedDataset`: last in a tuple,
    or as `"index"` in a dict. Index and targets are read before the step, which may change the
    batch. A step that returns None skips its batch, for the tracker as well. The pass in which
    `StochasticWeightAveraging` only updates batch norm's statistics is not counted.

    Ranks are merged by `sync` at the end of every training epoch and before a checkpoint. The
    tracker's state is in the Trainer's checkpoints, and `fit(ckpt_path=...)` resumes from it; a
    checkpoint without one is a warning. A checkpoint that is written because a rank failed has the
    state of the last merge. With `ddp_notebook`, `ddp_fork` and `ddp_spawn`, which train in
    processes of their own, the tracker of the process that called `fit` has the merged state
    afterwards.

    Args:
        tracker: A :class:`drophot.ForgettingTracker` or :class:`drophot.DynamicsTracker` of the
            training set's length.
        logits: Gets the logits `(B, C)` from what `training_step` returns. `None` takes its
            `"logits"`.
        targets: Gets the targets `(B,)` from a batch without its index. `None` takes the second of
            a pair, or a dict's one entry of `targets`, `target`, `labels`, `label`.
        batch: Gets the tracked part from what several loaders give together (`CombinedLoader`):
            `batch=lambda batch: batch["labelled"]`. Where it gives None, nothing is counted.
        correct: For tasks other than classification: gets the batch without its index and what
            `training_step` returned, and gives a bool `(B,)`. Needs a ForgettingTracker.
        group: The ranks that see different batches, if not all do (tensor parallel): a process
            group, or a function that gets it from the Trainer once `fit` has begun. `None` means
            all ranks, and with `ModelParallelStrategy` its data-parallel ones.
        state_key: The name of the state in a checkpoint; give each of several callbacks in one
            Trainer its own.

    Raises:
        TypeError: If `tracker` is not a tracker, or is a DynamicsTracker where `correct` is given;
            after the first training batch, if there are no logits, no index or no targets.
        ValueError: Before the first training batch, if a loader's data set joins several
            IndexedDatasets; after it, if the logits or targets have not the shape of a
            classification.
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
        group: ProcessGroup | Callable[[Trainer], ProcessGroup] | None = None,
        state_key: str = "TrackerCallback",
    ) -> None:
        self._presenter = Presenter(tracker, "TrackerCallback", logits, targets, correct)
        self._batch = batch
        self._group = group
        self._state_key = state_key
        self._made_in, self._address = os.getpid(), uuid.uuid4().hex
        _callbacks[self._address] = self
        self._forget_the_run()

    @property
    def tracker(self) -> ForgettingTracker:
        """The tracker."""
        return self._presenter.tracker

    @property
    def state_key(self) -> str:
        """Where the state is in a checkpoint's `"callbacks"`."""
        return self._state_key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning calls this on every rank before anything else.

        Raises:
            RuntimeError: If several processes were launched from one whose tracker has seen
                samples that are in no saved state.
        """
        if stage != "fit":
            return
        self._forget_the_run()
        self._trainer = trainer
        if os.getpid() != self._made_in and trainer.world_size > 1:
            try:  # so that every rank knows what all start from
                self.tracker.load_state_dict(self.tracker.state_dict())
            except RuntimeError as error:
                raise RuntimeError(
                    "`tracker` should have been saved and loaded before `fit` launches several "
                    "processes. Found samples that it saw since; call "
                    "`tracker.load_state_dict(tracker.state_dict())` before `fit`."
                ) from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning calls this on every rank, after it has resumed from a checkpoint."""
        self._merged_ranks = self._find_group(trainer)
        self._merge()
        self._seen_before = int(self.tracker.presentations.sum())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning calls this before each training epoch, which may have new loaders.

        Raises:
            ValueError: If a loader's data set joins several IndexedDatasets.
        """
        for loader in _loaders(trainer.train_dataloader):
            attach.check_source(loader)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lightning calls this before each training batch."""
        self._taken = batch, self._take(trainer, batch)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Lightning calls this after each training batch."""
        (before, taken), self._taken = self._taken, (None, None)
        if getattr(trainer.fit_loop, "_skip_backward", False):
            # StochasticWeightAveraging updates batch norm's statistics: nothing is trained.
            self._seen_before = None
            return
        if not outputs or batch is None:  # {}, when a step returned None
            return
        if batch is not before:  # a step that takes its batch from `dataloader_iter`
            taken = self._take(trainer, batch)
        if isinstance(taken, TypeError):
            raise taken
        if taken is not None:
            self._presenter.present(taken, outputs, pl_module, _CURE)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning calls this after each training epoch, on every rank.

        Raises:
            RuntimeError: After the first epoch, if no rank counted a batch.
        """
        self._merge()
        if self._seen_before is None:
            return
        if int(self.tracker.presentations.sum()) == self._seen_before:
            raise RuntimeError(
                f"Every training batch should be counted. Found none in the first epoch: "
                f"`{type(pl_module).__name__}.training_step` returned nothing; {_CURE}."
            )
        self._seen_before = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning calls this on every rank.

        If `fit` launched this process, the state is sent to the process that called `fit`.
        """
        if os.getpid() == self._made_in or trainer.local_rank != 0:
            return
        handle, path = tempfile.mkstemp(suffix=".pt")
        with os.fdopen(handle, "wb") as file:
            torch.save(self.tracker.state_dict(), file)
        # The launcher returns `trainer.state` to that process, and nothing of callbacks. It reads
        # the pipe after this process has ended, so no more than a path may be sent through it.
        setattr(trainer.state, f"drophot_{self._address}", _Message(self._address, path))

    def state_dict(self) -> dict[str, Any]:
        """Lightning asks for this on every rank when it saves a checkpoint.

        Returns:
            The tracker's state, of all ranks; as of the last merge if a rank has failed.
        """
        if self._merged is not None and self._trainer is not None and self._trainer.interrupted:
            return self._merged  # only the rank that failed is here; the others do not answer
        self._merge()
        return self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this on every rank when it resumes from a checkpoint."""
        self.tracker.load_state_dict(state_dict)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning calls this on every rank when it resumes from a checkpoint."""
        if self.state_key not in (states := checkpoint.get("callbacks", {})):
            warnings.warn(
                f"The checkpoint should have the tracker's state as {self.state_key!r}. Found "
                f"{', '.join(map(repr, states)) or 'no callback'}; what was trained before it is "
                f"not counted.",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        of_the_run = ("_trainer", "_merged", "_merged_ranks", "_taken", "_seen_before")
        return {name: value for name, value in vars(self).items() if name not in of_the_run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget_the_run()
        if os.getpid() == self._made_in:  # a copy; in a spawned process it keeps the address
            self._address = uuid.uuid4().hex
            _callbacks[self._address] = self

    def _forget_the_run(self) -> None:
        self._trainer: Trainer | None = None
        self._merged: dict[str, Any] | None = None
        self._merged_ranks: ProcessGroup | None = None
        self._taken: tuple[Any, Taken | TypeError | None] = None, None
        self._seen_before: int | None = None

    def _take(self, trainer: Trainer, batch: Any) -> Taken | TypeError | None:
        """What counting needs of a batch; an error is kept for a batch that is not skipped."""
        if batch is None:
            return None
        loaders = trainer.train_dataloader
        if self._batch is not None:
            batch = self._batch(batch)
            if batch is None:
                return None
        elif isinstance(loaders, Mapping | list | tuple | CombinedLoader):
            return TypeError(
                f"`batch` should say which part of a batch is tracked, as several loaders give it "
                f"together. Found a {type(loaders).__name__} and no `batch`; "
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
    """The single loaders in what `fit` was given."""
    if isinstance(loaders, CombinedLoader):
        return _loaders(loaders.iterables)
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        return [found for part in loaders for found in _loaders(part)]
    return [loaders]


_callbacks: weakref.WeakValueDictionary[str, TrackerCallback] = weakref.WeakValueDictionary()


class _Message:
    """Unpickled in the process that made the callback, it loads the state into the tracker."""

    def __init__(self, address: str, path: str) -> None:
        self.address, self.path = address, path

    def __deepcopy__(self, memo: Any) -> _Message:
        return self  # the launcher copies before it pickles

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self.address, self.path)


def _receive(address: str, path: str) -> None:
    callback = _callbacks.get(address)
    if callback is not None and callback._made_in == os.getpid():
        state = torch.load(path, map_location="cpu", weights_only=True)
        callback.tracker.load_state_dict(state)
        Path(path).unlink()
