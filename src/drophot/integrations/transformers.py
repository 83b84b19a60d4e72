"""A tracker in Hugging Face's Trainer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from drophot._core.user_warnings import warn
from drophot.integrations import tracker_file
from drophot.integrations.training_set import check_training_set
from drophot.tracking import attach
from drophot.tracking.forgetting import ForgettingTracker
from drophot.tracking.presenter import Presenter, Taken
from drophot.tracking.tensor_matching import tensors
from drophot.tracking.validation import describe

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "drophot.integrations.transformers needs the packages transformers and accelerate, which "
        'cannot be imported. Install them: pip install "drophot[transformers]"'
    ) from error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_HOW_TO_GET_LOGITS = (
    "Say how to get them from the model's output: `TrackedTrainer(..., logits=lambda outputs: ...)`"
)
_FIX = (
    "Pass the tensors of the batch unchanged, or return `(loss, outputs)` from `compute_loss` if "
    "`return_outputs` is true. Put TrackerMixin before your Trainer: "
    "`class MyTracked(TrackerMixin, MyTrainer)`"
)
# For a type checker, the mixin is a Trainer; for Python it is not.
_Base = Trainer if TYPE_CHECKING else object


class TrackerMixin(_Base):
    """Makes a Trainer present its training batches to a tracker.

    A Trainer's callbacks see neither inputs nor logits, and the Trainer drops every column that the
    model's `forward` does not name. This class keeps the column `index`, removes it from each batch
    before the model is called, and reads the logits when the loss is computed. Evaluation is not
    counted.

    Put it before your own Trainer, `class MyTracked(TrackerMixin, MyTrainer)`, or use
    :class:`TrackedTrainer`. The outputs are those that `compute_loss` returns with the loss. If it
    returns only the loss, or if `training_step` does not call it, the outputs of the first forward
    on the batch's own tensors are used: the largest inputs of that forward, apart from labels, must
    be tensors of the batch. A step that computes its loss more than once presents its batch once.
    The rows of the logits must be in the order of the batch; a `compute_loss` that permutes them
    and returns its outputs cannot be detected.

    Ranks are merged by `sync` at the end of every epoch and before a checkpoint is saved. Each
    checkpoint has the tracker's state as `tracker.pt`, and `train(resume_from_checkpoint=...)`
    restores it. With `model_init`, each call of `train` creates a new network and resets the
    tracker, so that after `hyperparameter_search` the tracker has the last trial. An attempt that
    `auto_find_batch_size` abandoned is not counted.

    Args:
        *args: Arguments of the Trainer.
        tracker: A :class:`drophot.ForgettingTracker` or :class:`drophot.DynamicsTracker` with as
            many samples as the dataset that the indices refer to.
        logits: Gets the logits `(B, C)` from the model's output. `None` takes its entry `"logits"`.
        targets: Gets the targets `(B,)` from a batch without its index. `None` takes the Trainer's
            label (`labels`).
        correct: For tasks other than classification: gets the batch without its index and the
            model's outputs, and returns a bool `(B,)`. Needs a ForgettingTracker.
        losses: For models without logits `(B, C)`, such as language models: gets the batch without
            its index and the model's outputs, and returns the loss of each sample, floats `(B,)`;
            see :func:`drophot.tracking.sequence_losses`. A sample whose loss is NaN is left out.
            Needs a DynamicsTracker with statistics of the loss alone.
        group: The ranks that see different batches, if not all do (tensor or context parallelism):
            a process group, or a function that gets it from the Trainer. `None` means all ranks.
        **kwargs: Arguments of the Trainer. `train_dataset` is an :class:`drophot.IndexedDataset`
            whose samples are dicts, a `Subset` of one, or any other dataset with a column `index`.

    Raises:
        TypeError: If `tracker` is not a tracker, or not the kind that `correct` or `losses` needs;
            at the first batch, if it has no index or no labels, or the model's output has no
            logits.
        ValueError: If `correct` and `losses` are both given; if the training set has more samples
            than the tracker, has a column `index` with other numbers, or joins several
            IndexedDatasets; at the first batch, if the logits or labels do not have the shape of a
            classification; when training begins, if ranks share batches and no `group` is given.
        RuntimeError: After a batch for which the model was called only on tensors that are not the
            batch's, and whose outputs were not returned; at the end of the first epoch, if no batch
            was counted.
    """

    def __init__(
        self,
        *args: Any,
        tracker: ForgettingTracker,
        logits: Callable[[Any], Tensor] | None = None,
        targets: Callable[[Any], Tensor] | None = None,
        correct: Callable[[Any, Any], Tensor] | None = None,
        losses: Callable[[Any, Any], Tensor] | None = None,
        group: ProcessGroup | Callable[[Trainer], ProcessGroup] | None = None,
        **kwargs: Any,
    ) -> None:
        self._presenter = Presenter(
            tracker, "TrackedTrainer", logits, targets or self._labels, correct, losses
        )
        self._group = group
        self._awaited: Taken | None = None  # the batch of this step, until it is presented
        self._tensors: list[Tensor] = []  # the tensors of that batch without its labels
        self._label_tensors: list[Tensor] = []
        self._presented: Tensor | None = None  # the index of the last batch
        self._heard: Any = None  # the model's outputs, seen by a forward hook
        self._unrecognised = False  # whether the model was called on other tensors in this step
        super().__init__(*args, **kwargs)
        check_training_set(self.train_dataset, tracker.num_samples)
        self._keeper = _Keeper(self)
        self.add_callback(self._keeper)

    @property
    def tracker(self) -> ForgettingTracker:
        """The tracker."""
        return self._presenter.tracker

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's step, in which the batch is presented."""
        with self._awaiting(model, inputs) as rest:
            loss = super().training_step(model, rest, *args, **kwargs)
            self._present_heard(model)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's loss. In training, the batch is presented."""
        rest, index = _without_index(inputs)
        compute = partial(self._compute, super().compute_loss, model)
        if index is None or not model.training or index is self._presented:
            return compute(rest, return_outputs, *args, **kwargs)
        self._presented = index  # a `training_step` of a subclass may call this twice
        with self._awaiting(model, inputs) as rest:
            return compute(rest, return_outputs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's step, for a batch without its index."""
        return super().prediction_step(model, _without_index(inputs)[0], *args, **kwargs)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's training. The tracker resumes from the same checkpoint.

        Args:
            resume_from_checkpoint: The folder of a checkpoint, or True for the last complete one
                with a tracker.
            *args: Arguments of the Trainer.
            **kwargs: Arguments of the Trainer.

        Returns:
            The Trainer's result.

        Raises:
            FileNotFoundError: If the checkpoint has no state of a tracker.
        """
        if self.model_init is not None:  # trains another network
            self.tracker.reset()
        self._keeper.initial_state = None
        folder = resume_from_checkpoint
        if folder is True:
            newest = get_last_checkpoint(str(self.args.output_dir))
            folder = tracker_file.last_complete(Path(str(self.args.output_dir))) or newest
            if newest and folder and Path(folder) != Path(newest):
                warn(
                    f"The last checkpoint, {newest}, is incomplete or has no state of a tracker. "
                    f"Training resumes from {folder}."
                )
        if folder:
            tracker_file.load(self.tracker, Path(folder))
            resume_from_checkpoint = str(folder)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Save the tracker before the Trainer's files, so that every complete checkpoint has it."""
        self.tracker.sync(self._ranks())
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial))
            folder /= f"checkpoint-{self.state.global_step}"
            tracker_file.save(self.tracker, folder)
        super()._save_checkpoint(model, trial, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        if columns is not None and "index" not in columns:
            columns.append("index")

    def _ranks(self) -> ProcessGroup | None:
        return self._group(self) if callable(self._group) else self._group

    def _labels(self, batch: Any) -> Any:
        return batch[(self.label_names or ["labels"])[0]]

    def _take(self, inputs: Any) -> Taken:
        """Read the index and targets of a batch."""
        try:
            return self._presenter.take(inputs)
        except (TypeError, KeyError) as error:
            label = (self.label_names or ["labels"])[0]
            raise TypeError(
                f"A training batch must have `index` and `{label}`, got {describe(inputs)}. Wrap "
                f"the training set in IndexedDataset, and check that `data_collator` keeps both. "
                f"If the Trainer has dropped them, pass "
                f"`TrainingArguments(remove_unused_columns=False)`. If the labels have another "
                f"name, pass `targets=lambda batch: ...`."
            ) from error

    def _compute(
        self,
        compute_loss: Callable[..., Any],
        model: Any,
        inputs: Any,
        return_outputs: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Compute the loss, with the outputs if a batch waits for them and they are available."""
        awaited = self._awaited is not None and model.training
        more = return_outputs or (awaited and _takes_return_outputs(compute_loss))
        if args:
            result = compute_loss(model, inputs, more, *args, **kwargs)
        elif more:
            result = compute_loss(model, inputs, return_outputs=True, **kwargs)
        else:
            result = compute_loss(model, inputs, **kwargs)
        if not awaited:
            return result
        if isinstance(result, tuple):
            self._present(result[1], model)
        else:
            self._present_heard(model)
        return result[0] if isinstance(result, tuple) and not return_outputs else result

    def _present(self, outputs: Any, model: Any) -> None:
        taken, self._awaited, self._heard = self._awaited, None, None
        if taken is not None:
            self._presenter.present(taken, outputs, model, _HOW_TO_GET_LOGITS)

    def _present_heard(self, model: Any) -> None:
        if self._heard is not None:
            self._present(self._heard, model)

    @contextmanager
    def _awaiting(self, model: nn.Module, inputs: Any) -> Iterator[Any]:
        """Yield a batch without its index. Meanwhile, listen for a forward on its tensors."""
        self._awaited, (rest, _) = self._take(inputs), _without_index(inputs)
        self._remember(rest)
        self._unrecognised = False
        # The Trainer's own step and loss return the outputs, so no hook is needed.
        handle = (
            model.register_forward_hook(self._hear, with_kwargs=True) if _overridden(self) else None
        )
        try:
            yield rest
            if self._awaited is not None and self._unrecognised:
                raise RuntimeError(
                    f"The model must be called on the batch's own tensors, or its outputs must be "
                    f"returned with the loss, but {_names(self)} calls it on other tensors, whose "
                    f"logits may belong to another batch. {_FIX}."
                )
        finally:
            self._awaited, self._heard = None, None
            self._tensors, self._label_tensors = [], []
            if handle is not None:
                handle.remove()

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        if self._awaited is not None:  # moving them to the device creates other tensors
            self._remember(inputs)
        return inputs

    def _remember(self, batch: Any) -> None:
        """Remember the tensors that a batch is recognized by, and its labels."""
        rest, labels = self._without_labels(batch)
        self._tensors += tensors(rest)
        self._label_tensors += tensors(labels)

    def _without_labels(self, inputs: Any) -> tuple[Any, Any]:
        if not isinstance(inputs, Mapping):
            return inputs, ()
        names = {"labels", *(self.label_names or ())}
        rest = {name: value for name, value in inputs.items() if name not in names}
        return rest, [value for name, value in inputs.items() if name in names]

    def _hear(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._awaited is None or self._heard is not None or not model.training:
            return
        inputs = [self._without_labels(value)[0] for value in (*args, kwargs)]
        labels = {id(value) for value in self._label_tensors}
        given = [value for value in tensors(inputs) if id(value) not in labels]
        size = len(self._awaited[0])
        rows = [value for value in given if value.dim() and len(value) == size] or given
        largest = max((value.nbytes for value in rows), default=0)
        own = {id(value) for value in self._tensors}
        if rows and all(id(value) in own for value in rows if value.nbytes == largest):
            self._heard = output
        elif torch.is_grad_enabled():
            self._unrecognised = True


class TrackedTrainer(TrackerMixin, Trainer):
    """Hugging Face's Trainer with :class:`TrackerMixin`."""


class _Keeper(TrainerCallback):
    """Merges ranks, and checks that batches are counted. Called on every rank."""

    def __init__(self, trainer: TrackerMixin) -> None:
        self.trainer = trainer
        self.initial_state: dict[str, Any] | None = None  # when `train` was called
        self._seen: int | None = None
        self._step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tracker = self.trainer.tracker
        attach.check_source(kwargs.get("train_dataloader"))
        self._check_ranks()
        if self.initial_state is not None:  # another attempt, with smaller batches
            tracker.load_state_dict(self.initial_state)
        tracker.sync(self.trainer._ranks())
        if args.auto_find_batch_size and self.initial_state is None:
            self.initial_state = tracker.state_dict()
        self._seen, self._step = int(tracker.presentations.sum()), state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.tracker.sync(trainer._ranks())
        if self._seen is None or state.global_step == self._step:
            return
        if int(trainer.tracker.presentations.sum()) == self._seen:
            raise RuntimeError(
                f"No training batch of the first epoch was counted, because {_names(trainer)} "
                f"neither returned the model's outputs nor called the model on the batch's own "
                f"tensors. {_FIX}."
            )
        self._seen = None

    def _check_ranks(self) -> None:
        sizes = {
            name: getattr(self.trainer, f"get_{name}_size", int)() for name in ("tp", "cp", "sp")
        }
        if self.trainer._group is None and max(sizes.values()) > 1:
            raise ValueError(
                f"`group` must be given because some ranks share their batches: {sizes}. Pass the "
                f"ranks that see different batches: `TrackedTrainer(..., group=lambda trainer: "
                f"trainer.accelerator.torch_device_mesh['dp'].get_group())`."
            )


def _overridden(trainer: TrackerMixin) -> list[str]:
    """Which of `training_step` and `compute_loss` a subclass of the Trainer overrides."""
    others = [
        kind for kind in type(trainer).__mro__ if kind not in (TrackerMixin, *Trainer.__mro__)
    ]
    names = ("training_step", "compute_loss")
    return [name for name in names if any(name in vars(kind) for kind in others)]


def _names(trainer: TrackerMixin) -> str:
    """The methods that did not pass on the logits, for errors."""
    names = _overridden(trainer) or ["training_step"]
    return " or ".join(f"`{type(trainer).__name__}.{name}`" for name in names)


def _takes_return_outputs(method: Callable[..., Any]) -> bool:
    parameters = inspect.signature(method).parameters
    return "return_outputs" in parameters or any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    )


def _without_index(inputs: Any) -> tuple[Any, Any]:
    if not isinstance(inputs, Mapping) or "index" not in inputs:
        return inputs, None
    rest: Any = copy.copy(inputs)
    index = rest["index"]
    del rest["index"]
    return rest, index
