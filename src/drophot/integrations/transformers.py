"""The tracker in Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drophot import _watch
from drophot.forgetting import ForgettingTracker

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "drophot.integrations.transformers should find the packages transformers and accelerate. "
        'Found none that can be imported; install them: pip install "drophot[transformers]"'
    ) from error

_FILE = "tracker.pt"
_CURE = (
    "say how to get them from what the model returns: "
    "`TrackedTrainer(..., logits=lambda outputs: ...)`"
)
# For a type checker the mixin is what it is mixed into; for Python it is not.
_Base = Trainer if TYPE_CHECKING else object


class TrackerMixin(_Base):
    """Makes any Trainer present its training batches to a tracker.

    A Trainer's callbacks see neither inputs nor logits, and it drops every column that the model's
    `forward` does not name. This keeps the column `index`, takes it off each batch before the model
    is called, and reads the logits where the loss is computed. So it works with any model, collator
    and loss that the Trainer works with, label smoothing, gradient accumulation and several
    processes included; evaluation is not counted.

    Put it in front of a Trainer of your own: `class MyTracked(TrackerMixin, MyTrainer)`, or take
    :class:`TrackedTrainer`. Ranks are merged by `sync` at the end of every epoch and before a
    checkpoint. The tracker's state lies in each checkpoint as `tracker.pt`, and
    `train(resume_from_checkpoint=...)` goes on from it.

    Args:
        *args: What the Trainer takes.
        tracker: A :class:`drophot.ForgettingTracker` or :class:`drophot.DynamicsTracker` of the
            training set's length.
        logits: Gets the logits `(B, C)` from what the model returns. `None` takes its `"logits"`.
        **kwargs: What the Trainer takes. `train_dataset` is an :class:`drophot.IndexedDataset`
            whose samples are dicts, or any other dataset with a column `index`.

    Raises:
        TypeError: If `tracker` is not a tracker; at the first batch, if it has no index or no
            labels, or the model's output no logits.
        ValueError: If the training set's length is not the tracker's.
    """

    def __init__(
        self,
        *args: Any,
        tracker: ForgettingTracker,
        logits: Callable[[Any], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(tracker, ForgettingTracker):
            raise TypeError(
                f"`tracker` should be a ForgettingTracker or DynamicsTracker. Found "
                f"{_watch.describe(tracker)}."
            )
        super().__init__(*args, **kwargs)
        data: Any = self.train_dataset
        size = len(data) if hasattr(data, "__len__") else None
        if size is not None and size != tracker.num_samples:
            raise ValueError(
                f"`tracker` should be of the training set's {size} samples. Found one of "
                f"{tracker.num_samples}; make it with `num_samples=len(train_dataset)`."
            )
        self.tracker = tracker
        self._logits = logits
        self.add_callback(_Keeper(tracker))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's; a batch in training is presented on the way."""
        index = inputs.pop("index", None)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        label = (self.label_names or ["labels"])[0]
        if index is None or label not in inputs:
            raise TypeError(
                f"A training batch should have `index` and `{label}`. Found "
                f"{_watch.describe(inputs)}; wrap the training set in IndexedDataset, and see that "
                f"`data_collator` keeps them. Should the Trainer itself have dropped them, train "
                f"with `TrainingArguments(remove_unused_columns=False)`."
            )
        targets = inputs[label]  # before a loss of its own takes them out
        loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        logits = _watch.find_logits(outputs, self._logits, model, _CURE)
        self.tracker.update(index, logits, targets)
        return (loss, outputs) if return_outputs else loss

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's; resuming from a checkpoint, the tracker resumes from it too.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last one.
            *args: What the Trainer takes.
            **kwargs: What the Trainer takes.

        Returns:
            What the Trainer returns.

        Raises:
            FileNotFoundError: If the checkpoint has no tracker in it.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))
        if folder:
            file = Path(folder) / _FILE
            if not file.exists():
                raise FileNotFoundError(
                    f"The checkpoint {folder} should have the tracker's state in it. Found no "
                    f"{_FILE}; resume from one that was written with this tracker."
                )
            state = torch.load(file, map_location="cpu", weights_only=True)
            self.tracker.load_state_dict(state)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        if columns is not None and "index" not in columns:
            columns.append("index")


class TrackedTrainer(TrackerMixin, Trainer):
    """The Trainer, with :class:`TrackerMixin`."""


class _Keeper(TrainerCallback):
    """Merges ranks, and puts the tracker into the checkpoint; called on every rank."""

    def __init__(self, tracker: ForgettingTracker) -> None:
        self.tracker = tracker

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tracker.sync()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tracker.sync()
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            part = folder / f"{_FILE}.part"
            torch.save(self.tracker.state_dict(), part)
            part.replace(folder / _FILE)  # whole or not at all
