"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from drophot._core import random_state, scalars
from drophot._core.classifier import check_model, check_optimizer, first_nonfinite, require_outputs
from drophot._core.setting_checks import check_flag
from drophot._core.user_warnings import warn
from drophot.data import batching
from drophot.data.cache import Cache, Kept, check_cache, in_memory
from drophot.data.samples import first_sample, tensors_of
from drophot.training.evaluation import evaluate
from drophot.training.loaders import batches, check_rereadable, is_loader, loader_batches
from drophot.training.loss import Loss, check_callable
from drophot.training.memory_format import use_channels_last
from drophot.training.schedulers import SchedulerInterval, check_scheduler
from drophot.training.step import Step, fast_step

__all__ = ["Cache", "Fit", "batches", "evaluate", "first_sample", "fit", "in_memory"]

_IGNORE_INDEX = -100  # of torch's cross-entropy


def fit(
    model: nn.Module,
    dataset: Dataset[Any] | Iterable[Any],
    epochs: int,
    *,
    optimizer: Optimizer,
    batch_size: int = 64,
    seed: int = 0,
    loss: Loss | None = None,
    scheduler: LRScheduler | None = None,
    scheduler_interval: SchedulerInterval = "epoch",
    before_step: Callable[[nn.Module], object] | None = None,
    on_batch: Callable[[Tensor, Tensor, Tensor], object] | None = None,
    on_epoch: Callable[[int], object] | None = None,
    cache: Cache = "auto",
    cuda_graph: bool = True,
) -> None:
    """Train a classifier: every sample once per epoch, in a new random order each time.

    The data is decoded once and kept on the model's device, if that gives the same samples as
    decoding it in each epoch: see `in_memory`. Before each epoch, the kept samples are compared
    with the dataset, and what has changed is read again. No step waits for the device. The model is
    left in training mode.

    Only one thread at a time trains or evaluates through drophot, because random numbers belong to
    the process. Other threads wait until `fit` returns.

    On a GPU, the step is captured as a CUDA graph after three steps, and then repeated by one
    launch. A graph repeats operations on the GPU and no Python code: it takes the same branches
    each time, and a counter or a list in the forward pass or the loss does not grow. The step is
    captured again when one of these changes: the settings of the optimizer, such as the learning
    rate; `requires_grad`; a parameter, a buffer or a module that is replaced; a number, a string or
    a flag that is an attribute of a module, such as the probability of dropout; or a value that the
    loss holds. Other changes are not seen, such as that of a global variable. Operations are
    launched one by one if

    - the optimizer is not one of torch's own, is neither `SGD` nor has a setting `capturable`, or
      its method `step` was replaced by something other than a scheduler;
    - the model has hooks on modules, parameters or tensors, is wrapped in
      `DistributedDataParallel` or `DataParallel`, or is on several devices. Hooks of
      :meth:`drophot.Masks.hold` are captured, and other hooks of the optimizer are called after
      each launch;
    - the model or the loss waits for the GPU, as `.item()` does, draws from Python's or NumPy's
      generator, or changes an attribute in each call.

    The reason is logged (INFO, logger `drophot`). A warning is given if a capture fails.

    If a weight is NaN or infinite at the end, a warning says so.

    A loop of your own with the same arguments can replace this one in :class:`drophot.DropHot`: see
    `Fit`.

    Args:
        model: Called as `model(inputs)`, returns logits `(B, C)`. Trained in place.
        dataset: Samples `(input, target)` or `(input, target, index)`. Or a loader, which is
            iterated once per epoch and has no `__getitem__`. It yields batches `(inputs, targets)`,
            optionally with an index `(B,)` third and weights `(B,)` of the samples' losses fourth,
            as :class:`drophot.CrestLoader` does. A loader draws and orders its batches itself.
        epochs: Number of passes over the dataset.
        optimizer: Holds the model's parameters. Optimizers that need a closure, such as
            `torch.optim.LBFGS`, are refused.
        batch_size: Samples per step. The last batch of an epoch holds the remaining samples.
        seed: Draws the order of each epoch. Dropout draws from torch's global generator.
        loss: Called as `loss(logits, targets)`. Returns a scalar, or one loss per sample, shape
            `(B,)`, of which the mean is minimized. If a loader yields weights, it has to be one
            loss per sample (`reduction="none"`). The default is cross-entropy, for which targets
            are classes `(B,)` or probabilities `(B, C)`.
        scheduler: A learning rate scheduler of `optimizer`. Its `step()` is called without a metric
            after the optimizer's steps, before `on_batch` and `on_epoch`.
        scheduler_interval: Whether the scheduler steps after each `"epoch"` or each `"step"`.
        before_step: Called as `before_step(model)` after each backward pass and before the
            optimizer's step, when the gradients are in `parameter.grad`. Clips gradients, for
            example.
        on_batch: Called as `on_batch(index, logits, targets)` after each step, with the logits of
            that step's forward pass; `ForgettingTracker.update` fits, and is captured together with
            the step. Needs samples with an index.
        on_epoch: Called with the epoch's number, from 0, after each epoch.
        cache: Whether the decoded dataset is kept: `"auto"` decides as `in_memory` does, `True`
            always keeps it, `False` reads it again in each epoch.
        cuda_graph: Whether steps on a GPU may be captured as a CUDA graph: see above.

    Raises:
        ValueError: If `epochs` is negative, `batch_size` less than 1, the dataset or an epoch of a
            loader empty, the samples differ in shape, `on_batch` is given and the samples have no
            index, the optimizer holds none of the model's parameters, the scheduler belongs to
            another optimizer, `scheduler_interval` is "step" without a scheduler, logits and
            targets do not match, the loss is neither a scalar nor one number per sample, or a
            loader's weights are not finite floats `(B,)`.
        TypeError: If the samples or a loader's batches are not tuples of tensors and numbers, a
            loader can be read only once and `epochs` is above 1, the scheduler needs a metric, or
            the model, its output, the optimizer or another argument is of the wrong kind.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))
        >>> model = nn.Linear(1, 2)
        >>> fit(model, data, 50, optimizer=torch.optim.Adam(model.parameters(), lr=0.1))
        >>> evaluate(model, data)
        1.0

        With label smoothing, clipped gradients and a learning rate that falls in each step:

        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> fit(
        ...     model,
        ...     data,
        ...     5,
        ...     optimizer=optimizer,
        ...     loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        ...     scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
        ...     scheduler_interval="step",
        ...     before_step=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        ... )
        >>> optimizer.param_groups[0]["lr"]
        0.0
    """
    check_model(model)
    check_cache(cache)
    check_flag("cuda_graph", cuda_graph)
    epochs = scalars.integer("epochs", epochs)
    batch_size = scalars.integer("batch_size", batch_size)
    seed = scalars.integer("seed", seed)
    if epochs < 0:
        raise ValueError(f"`epochs` must not be negative, got {epochs}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    check_optimizer(model, optimizer)
    check_callable("loss", loss)
    check_callable("before_step", before_step)
    check_scheduler(scheduler, scheduler_interval, optimizer)
    every_step = scheduler is not None and scheduler_interval == "step"
    device = next(model.parameters()).device
    indexed = on_batch is not None
    whole: Any = dataset
    with random_state.exclusive():
        if is_loader(dataset):
            check_rereadable(dataset, epochs)
            num_classes, batches_of = 0, _loader_epochs(dataset, device, indexed=indexed)
        else:
            data = Kept(whole, device, cache, readings=epochs)
            num_classes = 0 if loss is not None else _count_classes(data.data)
            batches_of = _dataset_epochs(model, data, batch_size, seed, device, indexed=indexed)
        step_of = fast_step(
            model,
            optimizer,
            device,
            loss=loss,
            before_step=before_step,
            lr_changes=every_step,
            cuda_graph=cuda_graph,
            on_batch=on_batch,
        )
        with step_of as step, require_outputs(model, num_classes):
            for epoch in range(epochs):
                model.train()
                for inputs, targets, *more in batches_of(epoch, step):
                    logits = step(inputs, targets, *more[1:], index=more[0] if indexed else None)
                    if scheduler is not None and every_step:
                        scheduler.step()
                    if on_batch is not None and not step.reports:
                        on_batch(more[0], logits, targets)
                if scheduler is not None and not every_step:
                    scheduler.step()
                if on_epoch is not None:
                    on_epoch(epoch)
    if epochs:
        _warn_if_diverged(model)


def _warn_if_diverged(model: nn.Module) -> None:
    if name := first_nonfinite(model):
        warn(
            f"The training diverged: `{name}` of `model` has NaN or infinite weights after `fit`. "
            f"Lower the learning rate of `optimizer`, or look for inputs that are not finite."
        )


_Epochs = Callable[[int, Step], Iterator[tuple[Tensor, ...]]]


def _loader_epochs(loader: Any, device: torch.device, *, indexed: bool) -> _Epochs:
    return lambda epoch, _: loader_batches(loader, device, indexed=indexed, epoch=epoch)


def _dataset_epochs(
    model: nn.Module,
    kept: Kept,
    batch_size: int,
    seed: int,
    device: torch.device,
    *,
    indexed: bool,
) -> _Epochs:
    """A function from an epoch to its batches, in an order that one generator draws."""
    with random_state.preserved_rng():  # a random transform may draw
        width = len(first_sample("dataset", kept.data))
    if indexed and width != 3:
        raise ValueError(
            f"`dataset` must yield samples (input, target, index) for `on_batch`, but its samples "
            f"have {width} parts. Wrap it: IndexedDataset(dataset)."
        )
    channels_last = use_channels_last(model, kept.data, device)
    order = torch.Generator().manual_seed(seed)

    def batches_of(epoch: int, step: Step) -> Iterator[tuple[Tensor, ...]]:
        data = kept.again() if epoch else kept.data
        return batching.batches(
            data,
            batch_size,
            device,
            shuffle=order,
            channels_last=channels_last,
            workers=kept.workers,
            inputs_for=step.inputs_for,
        )

    return batches_of


def _count_classes(data: Any) -> int:
    """The number of classes in the targets of a dataset of tensors; 0 if it is not known."""
    tensors = tensors_of(data)
    if tensors is None or tensors[1].is_floating_point() or tensors[1].is_meta:
        return 0
    targets = tensors[1]
    negative = (targets < 0) & (targets != _IGNORE_INDEX)
    if bool(negative.any()):
        raise ValueError(
            f"`dataset` must have targets from 0, got {int(targets[negative][0])}. Cross-entropy "
            f"ignores {_IGNORE_INDEX} and no other negative target."
        )
    return int(targets.max()) + 1


class Fit(Protocol):
    """A training loop that can replace `fit` in :class:`drophot.DropHot`.

    In the modes that choose samples while the model trains (`"crest"`, `"fresh_subset"`,
    `"loss_sampling"`), and with `equal_steps` if the steps do not divide into whole epochs of the
    coreset, `dataset` is a `BatchLoader` in step 3: a re-iterable of batches `(inputs,
    targets, index)` or `(inputs, targets, index, weights)`. `batches` accepts both, so a loop that
    is written with it works in every mode. It should multiply each sample's loss by its weight
    where there are weights.

    Example:
        >>> from torch.nn import functional as F
        >>> def own_fit(
        ...     model, dataset, epochs, *, optimizer, batch_size, seed, on_batch, on_epoch
        ... ):
        ...     device = next(model.parameters()).device
        ...     order = torch.Generator().manual_seed(seed)
        ...     for epoch in range(epochs):
        ...         model.train()
        ...         for inputs, targets, *more in batches(
        ...             dataset, batch_size, device, shuffle=order
        ...         ):
        ...             logits = model(inputs)
        ...             losses = F.cross_entropy(logits, targets, reduction="none")
        ...             if len(more) == 2:
        ...                 losses = losses * more[1]
        ...             optimizer.zero_grad()
        ...             losses.mean().backward()
        ...             optimizer.step()
        ...             if on_batch is not None:
        ...                 on_batch(more[0], logits.detach(), targets)
        ...         if on_epoch is not None:
        ...             on_epoch(epoch)
    """

    def __call__(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        epochs: int,
        *,
        optimizer: Optimizer,
        batch_size: int,
        seed: int,
        on_batch: Callable[[Tensor, Tensor, Tensor], object] | None,
        on_epoch: Callable[[int], object] | None,
    ) -> object:
        """Train `model` for `epochs` epochs, as `fit` does.

        Args:
            model: The model to train in place.
            dataset: Samples `(input, target, index)`, or a `BatchLoader`: see above.
            epochs: Number of epochs.
            optimizer: Holds the model's parameters.
            batch_size: Samples per step.
            seed: Draws the order of the samples.
            on_batch: Call it as `on_batch(index, logits, targets)` after each step, if given.
            on_epoch: Call it with the epoch's number, from 0, after each epoch, if given.

        Returns:
            Anything; it is ignored.
        """
        ...
