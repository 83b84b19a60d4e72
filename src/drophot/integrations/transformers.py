"""The tracker in Hugging Face's Trainer."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from drophot.data.indexing import IndexedDataset
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
        "drophot.integrations.transformers should find the packages transformers and accelerate. "
        'Found none that can be imported; install them: pip install "drophot[transformers]"'
    ) from error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FILE = "tracker.pt"
_LAST_FILE = "trainer_state.json"  # what the Trainer writes last into a checkpoint
_CURE = (
    "say how to get them from what the model returns: "
    "`TrackedTrainer(..., logits=lambda outputs: ...)`"
)
_REMEDY = (
    "pass the batch's tensors as they are, or let `compute_loss` return `(loss, outputs)` where "
    "`return_outputs` is true, and put TrackerMixin before the Trainer that has it: "
    "`class MyTracked(TrackerMixin, MyTrainer)`"
)
# For a type checker the mixin is what it is mixed into; for Python it is not.
_Base = Trainer if TYPE_CHECKING else object


class TrackerMixin(_Base):
    """Makes a Trainer present its training batches to a tracker.

    A Trainer's callbacks see neither inputs nor logits, and it drops every column that the model's
    `forward` does not name. This keeps the column `index`, takes it off each batch before the model
    is called, and reads the logits where the loss is computed. Evaluation is not counted.

    Put it in front of a Trainer of your own: `class MyTracked(TrackerMixin, MyTrainer)`, or take
    :class:`TrackedTrainer`. The outputs are those that `compute_loss` returns beside the loss. If
    it returns the loss alone, or if `training_step` does not call it, they are those of the first
    forward on the batch's own tensors: the largest inputs of that forward, labels aside, are
    tensors of the batch. A step that computes its loss more than once presents its batch once. The
    rows of the logits must be in the order of the batch; a `compute_loss` that permutes them and
    returns its outputs cannot be detected.

    Ranks are merged by `sync` at the end of every epoch and before a checkpoint. Each checkpoint
    has the tracker's state as `tracker.pt`, and `train(resume_from_checkpoint=...)` resumes from
    it. With `model_init` each call of `train` makes a new network and is counted from the start, so
    that after `hyperparameter_search` the tracker has the last trial. An attempt that
    `auto_find_batch_size` gave up is not counted.

    Args:
        *args: What the Trainer takes.
        tracker: A :class:`drophot.ForgettingTracker` or :class:`drophot.DynamicsTracker` of as many
            samples as the indices are taken from.
        logits: Gets the logits `(B, C)` from what the model returns. `None` takes its `"logits"`.
        targets: Gets the targets `(B,)` from a batch without its index. `None` takes the Trainer's
            label (`labels`).
        correct: For tasks other than classification: gets the batch without its index and the
            model's outputs, and gives a bool `(B,)`. Needs a ForgettingTracker.
        group: The ranks that see different batches, if not all do (tensor or context parallel): a
            process group, or a function that gets it from the Trainer. `None` means all ranks.
        **kwargs: What the Trainer takes. `train_dataset` is an :class:`drophot.IndexedDataset`
            whose samples are dicts, a `Subset` of one, or any other dataset with a column `index`.

    Raises:
        TypeError: If `tracker` is not a tracker, or is a DynamicsTracker where `correct` is given;
            at the first batch, if it has no index or no labels, or the model's output no logits.
        ValueError: If the training set has more samples than the tracker, or a column `index` with
            other numbers than theirs, or joins several IndexedDatasets; at the first batch, if the
            logits or labels have not the shape of a classification; when training begins, if ranks
            share batches and no `group` is given.
        RuntimeError: After a batch for which the model was called on other tensors than the
            batch's, and whose outputs were not returned; at the end of the first epoch, if no
            batch was counted.
    """

    def __init__(
        self,
        *args: Any,
        tracker: ForgettingTracker,
        logits: Callable[[Any], Tensor] | None = None,
        targets: Callable[[Any], Tensor] | None = None,
        correct: Callable[[Any, Any], Tensor] | None = None,
        group: ProcessGroup | Callable[[Trainer], ProcessGroup] | None = None,
        **kwargs: Any,
    ) -> None:
        self._presenter = Presenter(
            tracker, "TrackedTrainer", logits, targets or self._labels, correct
        )
        self._group = group
        self._awaited: Taken | None = None  # the batch of this step, until it is presented
        self._tensors: list[Tensor] = []  # that batch's, without its labels
        self._label_tensors: list[Tensor] = []
        self._presented: Tensor | None = None  # the index of the last one
        self._heard: Any = None  # the model's outputs, where nobody returns them
        self._unrecognised = False  # whether a forward of this step was on other tensors
        super().__init__(*args, **kwargs)
        data: Any = self.train_dataset
        attach.check_source(Subset(data, []))
        size = len(data) if hasattr(data, "__len__") else None
        if isinstance(data, Subset) and isinstance(data.dataset, IndexedDataset):
            size = max(data.indices, default=-1) + 1  # the samples' numbers in the whole
        if size is not None and size > tracker.num_samples:
            raise ValueError(
                f"`tracker` should be of the training set's {size} samples. Found one of "
                f"{tracker.num_samples}; make it with `num_samples=len(dataset)`, the dataset that "
                f"IndexedDataset wraps."
            )
        _check_column(data, tracker.num_samples)
        self._keeper = _Keeper(self)
        self.add_callback(self._keeper)

    @property
    def tracker(self) -> ForgettingTracker:
        """The tracker."""
        return self._presenter.tracker

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; the batch is presented on the way."""
        with self._awaiting(model, inputs) as rest:
            loss = super().training_step(model, rest, *args, **kwargs)
            self._present_heard(model)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's; a batch in training is presented on the way."""
        rest, index = _without_index(inputs)
        compute = partial(self._compute, super().compute_loss, model)
        if index is None or not model.training or index is self._presented:
            return compute(rest, return_outputs, *args, **kwargs)
        self._presented = index  # a `training_step` in front of this class may come twice
        with self._awaiting(model, inputs) as rest:
            return compute(rest, return_outputs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, for a batch without its index."""
        return super().prediction_step(model, _without_index(inputs)[0], *args, **kwargs)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's; resuming from a checkpoint, the tracker resumes from it too.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last one that is whole
                and has a tracker.
            *args: What the Trainer takes.
            **kwargs: What the Trainer takes.

        Returns:
            What the Trainer returns.

        Raises:
            FileNotFoundError: If the checkpoint has no tracker in it.
        """
        if self.model_init is not None:  # another network, so counted from the start
            self.tracker.reset()
        self._keeper.before = None
        folder = resume_from_checkpoint
        if folder is True:
            newest = get_last_checkpoint(str(self.args.output_dir))
            folder = _last_whole(Path(str(self.args.output_dir))) or newest
            if newest and folder and Path(folder) != Path(newest):
                warnings.warn(
                    f"The last checkpoint should be whole and have the tracker's state in it. "
                    f"Found that {newest} is not; resuming from {folder}.",
                    stacklevel=2,
                )
        if folder:
            file = Path(folder) / _FILE
            if not file.exists():
                raise FileNotFoundError(
                    f"The checkpoint {folder} should have the tracker's state in it. Found no "
                    f"{_FILE}; resume from one that was written with this tracker."
                )
            state = torch.load(file, map_location="cpu", weights_only=True)
            self.tracker.load_state_dict(state)
            resume_from_checkpoint = str(folder)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Before the Trainer writes its own files, so that a whole checkpoint has the tracker."""
        self.tracker.sync(self._ranks())
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial))
            folder /= f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"{_FILE}.part"
            torch.save(self.tracker.state_dict(), part)
            part.replace(folder / _FILE)  # whole or not at all
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
        """What counting needs of a batch."""
        try:
            return self._presenter.take(inputs)
        except (TypeError, KeyError) as error:
            label = (self.label_names or ["labels"])[0]
            raise TypeError(
                f"A training batch should have `index` and `{label}`. Found "
                f"{describe(inputs)}; wrap the training set in IndexedDataset, and see that "
                f"`data_collator` keeps them. Should the Trainer itself have dropped them, train "
                f"with `TrainingArguments(remove_unused_columns=False)`. Labels by another name: "
                f"`targets=lambda batch: ...`."
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
        """The loss; its outputs are asked for if they are awaited and can be had."""
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
            self._presenter.present(taken, outputs, model, _CURE)

    def _present_heard(self, model: Any) -> None:
        if self._heard is not None:
            self._present(self._heard, model)

    @contextmanager
    def _awaiting(self, model: nn.Module, inputs: Any) -> Iterator[Any]:
        """A batch without its index, and what the first forward on its own tensors gives."""
        self._awaited, (rest, _) = self._take(inputs), _without_index(inputs)
        self._know(rest)
        self._unrecognised = False
        # Where step and loss are the Trainer's, the loss comes with the outputs.
        handle = model.register_forward_hook(self._hear, with_kwargs=True) if _own(self) else None
        try:
            yield rest
            if self._awaited is not None and self._unrecognised:
                raise RuntimeError(
                    f"The model should be called on the batch's own tensors, or its outputs be "
                    f"returned with the loss. Found that {_by(self)} calls it on other tensors, "
                    f"whose logits may be another batch's; {_REMEDY}."
                )
        finally:
            self._awaited, self._heard = None, None
            self._tensors, self._label_tensors = [], []
            if handle is not None:
                handle.remove()

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        if self._awaited is not None:  # on the device they may be other tensors
            self._know(inputs)
        return inputs

    def _know(self, batch: Any) -> None:
        """Remember the tensors by which a batch is recognised: all but its labels."""
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
    """The Trainer, with :class:`TrackerMixin`."""


class _Keeper(TrainerCallback):
    """Merges ranks, and sees that something is counted; called on every rank."""

    def __init__(self, trainer: TrackerMixin) -> None:
        self.trainer = trainer
        self.before: dict[str, Any] | None = None  # what `train` began with
        self._seen: int | None = None
        self._step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tracker = self.trainer.tracker
        attach.check_source(kwargs.get("train_dataloader"))
        self._check_ranks()
        if self.before is not None:  # a smaller batch is tried
            tracker.load_state_dict(self.before)
        tracker.sync(self.trainer._ranks())
        if args.auto_find_batch_size and self.before is None:
            self.before = tracker.state_dict()
        self._seen, self._step = int(tracker.presentations.sum()), state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.tracker.sync(trainer._ranks())
        if self._seen is None or state.global_step == self._step:
            return
        if int(trainer.tracker.presentations.sum()) == self._seen:
            raise RuntimeError(
                f"Every training batch should be counted. Found none in the first epoch: "
                f"{_by(trainer)} neither returned the model's outputs to the tracker nor called "
                f"the model that it is given on the batch's own tensors; {_REMEDY}."
            )
        self._seen = None

    def _check_ranks(self) -> None:
        sizes = {
            name: getattr(self.trainer, f"get_{name}_size", int)() for name in ("tp", "cp", "sp")
        }
        if self.trainer._group is None and max(sizes.values()) > 1:
            raise ValueError(
                f"`group` should be the ranks that see different batches. Found none, and ranks "
                f"that share theirs: {sizes}; `TrackedTrainer(..., group=lambda trainer: "
                f"trainer.accelerator.torch_device_mesh['dp'].get_group())`."
            )


def _own(trainer: TrackerMixin) -> list[str]:
    """Which of the step and the loss are not the Trainer's own."""
    others = [
        kind for kind in type(trainer).__mro__ if kind not in (TrackerMixin, *Trainer.__mro__)
    ]
    names = ("training_step", "compute_loss")
    return [name for name in names if any(name in vars(kind) for kind in others)]


def _by(trainer: TrackerMixin) -> str:
    """The methods that may have kept the logits from the tracker, for errors."""
    names = _own(trainer) or ["training_step"]
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


def _check_column(data: Any, num_samples: int) -> None:
    """A datasets.Dataset's own column `index`: each number once, and none that is too large."""
    if "index" not in (getattr(data, "column_names", None) or ()) or not hasattr(data, "__len__"):
        return
    index = np.asarray(data.with_format("numpy")["index"][:])
    if not np.issubdtype(index.dtype, np.integer) or index.ndim != 1:
        raise ValueError(f"The column `index` should hold integers. Found {index.dtype}.")
    if len(index) and not (index.min() >= 0 and index.max() < num_samples):
        wrong = index.min() if index.min() < 0 else index.max()
        raise ValueError(
            f"The column `index` should be in [0, {num_samples}), the tracker's samples. Found "
            f"{wrong}; make the tracker with the length of the dataset that was numbered."
        )
    values, counts = np.unique(index, return_counts=True)
    if len(values) < len(index):
        raise ValueError(
            f"The column `index` should have each number once. Found {values[counts.argmax()]} "
            f"{counts.max()} times; drop the column and wrap the dataset in IndexedDataset."
        )


def _last_whole(folder: Path) -> str | None:
    """The last checkpoint that was written to its end, with a tracker."""
    found: list[tuple[int, str]] = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if not step.isdigit() or not (path / _FILE).exists():
            continue
        try:
            json.loads((path / _LAST_FILE).read_text())
        except (OSError, ValueError):
            continue
        found.append((int(step), str(path)))
    return max(found)[1] if found else None
