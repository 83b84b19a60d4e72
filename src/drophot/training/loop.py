"""The smallest fast training loop, and the accuracy it leads to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from drophot._core import random_state, scalars
from drophot._core.classifier import (
    check_classes,
    check_model,
    check_optimizer,
    first_nonfinite,
    is_correct,
    logits_of,
    require_outputs,
)
from drophot._core.model_contexts import evaluating
from drophot.data.batching import batches
from drophot.data.cache import Cache, Kept, check_cache, in_memory
from drophot.data.samples import as_classes, first_sample, tensors_of
from drophot.training.step import fast_forward, fast_step, takes_channels_last

__all__ = ["Cache", "Fit", "batches", "evaluate", "first_sample", "fit", "in_memory"]

_IGNORED = -100  # by torch's cross-entropy
_CHUNK = 512  # samples judged in one go: their activations stay in a CPU's cache


def fit(
    model: nn.Module,
    dataset: Dataset[Any] | Iterable[Any],
    epochs: int,
    *,
    optimizer: Optimizer,
    batch_size: int = 64,
    seed: int = 0,
    on_batch: Callable[[Tensor, Tensor, Tensor], object] | None = None,
    on_epoch: Callable[[int], object] | None = None,
    cache: Cache = "auto",
) -> None:
    """Train a classifier with cross-entropy: every sample once an epoch, in a fresh order.

    The data is decoded once and kept on the model's device where that is the same as decoding it
    anew: see `in_memory`. Before each epoch what was kept is compared with the dataset, and what
    has changed is read anew. No step waits for the device. The model is left in training mode.

    Another thread that trains or evaluates through drophot meanwhile waits until this returns, as
    both would draw from the same random numbers.

    If the weights are not finite in the end, a warning says so.

    A user's own loop that takes the same arguments can stand in for this one in
    :class:`drophot.DropHot`; it has to call `on_batch` and `on_epoch` where they are given.

    Args:
        model: Called as `model(inputs)`, gives logits `(B, C)`. Trained where it is.
        dataset: Samples `(input, target)` or `(input, target, index)`. Or a loader: what is
            iterated once an epoch and has no `__getitem__`, and gives batches `(inputs, targets)`,
            the index third and weights `(B,)` of the samples' losses fourth, if there are any, as
            :class:`drophot.CrestLoader` does. It draws and orders its batches itself.
        epochs: How often to go over the dataset.
        optimizer: Holds the model's parameters.
        batch_size: Samples a step; the last batch of an epoch holds what is left.
        seed: Draws the order of each epoch. Dropout and the like draw from torch's own state.
        on_batch: Called as `on_batch(index, logits, targets)` after each step, with the logits
            that the step was made from: `ForgettingTracker.update` fits. Needs the index.
        on_epoch: Called with the epoch's number, from 0, after each epoch.
        cache: Whether the decoded dataset is kept: `"auto"` decides as `in_memory` does, `True`
            keeps it, `False` reads it anew each epoch.

    Raises:
        ValueError: If `epochs` is negative, `batch_size` less than 1, the dataset or an epoch of a
            loader empty, the samples differ in shape, `on_batch` is given and the samples carry no
            index, the optimiser holds nothing of the model, logits and targets do not go together,
            or a loader's weights are not finite floats `(B,)` or stand where the index belongs.
        TypeError: If the samples, or a loader's batches, are no tuples of tensors and numbers, a
            loader can be read once and `epochs` is above 1, or the model, the optimiser, what the
            model gives or another argument is of the wrong kind.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))
        >>> model = nn.Linear(1, 2)
        >>> fit(model, data, 50, optimizer=torch.optim.Adam(model.parameters(), lr=0.1))
        >>> evaluate(model, data)
        1.0
    """
    check_model(model)
    check_cache(cache)
    epochs = scalars.integer("epochs", epochs)
    batch_size = scalars.integer("batch_size", batch_size)
    seed = scalars.integer("seed", seed)
    if epochs < 0:
        raise ValueError(f"`epochs` should not be negative. Found {epochs}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` should be at least 1. Found {batch_size}.")
    check_optimizer(model, optimizer)
    device = next(model.parameters()).device
    whole: Any = dataset
    indexed = on_batch is not None
    with random_state.exclusive():
        if _is_loader(whole):
            classes, epoch_of = 0, _loaded(whole, epochs, device, indexed=indexed)
        else:
            data = Kept(whole, device, cache, readings=epochs)
            classes = _classes(data.data)
            epoch_of = _shuffled(model, data, batch_size, seed, device, indexed=indexed)
        with fast_step(model, optimizer, device) as step, require_outputs(model, classes):
            for epoch in range(epochs):
                model.train()
                for inputs, targets, *more in epoch_of(epoch):
                    logits = step(inputs, targets, *more[1:])
                    if on_batch is not None:
                        on_batch(more[0], logits, targets)
                if on_epoch is not None:
                    on_epoch(epoch)
    if epochs:
        _warn_of_divergence(model)


def _warn_of_divergence(model: nn.Module) -> None:
    """Say what is no longer finite; the caller may want to look at it, so it is no error."""
    if name := first_nonfinite(model):
        warnings.warn(
            f"`fit` should leave finite weights. Found NaN or infinity in `{name}`: the training "
            f"diverged, and the model is of no use. Lower the learning rate of `optimizer`, or "
            f"look for inputs that are not finite.",
            stacklevel=3,
        )


def _is_loader(dataset: Any) -> bool:
    """Whether something is iterated once an epoch, rather than indexed."""
    return not hasattr(dataset, "__getitem__") and hasattr(dataset, "__iter__")


def _shuffled(
    model: nn.Module,
    kept: Kept,
    batch_size: int,
    seed: int,
    device: torch.device,
    *,
    indexed: bool,
) -> Callable[[int], Iterator[tuple[Tensor, ...]]]:
    """Gives a dataset's batches, in a fresh order each time."""
    with random_state.preserved_rng():  # a random transform may draw as often as it likes
        width = len(first_sample("dataset", kept.data))
    if indexed and width != 3:
        raise ValueError(
            f"`dataset` should give (input, target, index) for `on_batch`. Found samples of "
            f"{width}; wrap the dataset in IndexedDataset."
        )
    layout = _layout(model, kept.data, device)
    order = torch.Generator().manual_seed(seed)

    def batches_of(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        data = kept.again() if epoch else kept.data
        return batches(data, batch_size, device, shuffle=order, channels_last=layout)

    return batches_of


def _classes(data: Any) -> int:
    """How many classes a dataset of tensors takes, to compare with the logits; else 0."""
    tensors = tensors_of(data)
    if tensors is None or tensors[1].is_floating_point() or tensors[1].is_meta:
        return 0
    targets = tensors[1]
    wrong = (targets < 0) & (targets != _IGNORED)
    if bool(wrong.any()):
        raise ValueError(
            f"`dataset` should have targets from 0. Found {int(targets[wrong][0])}; cross-entropy "
            f"leaves out {_IGNORED}, and no other number below 0."
        )
    return int(targets.max()) + 1


def _loaded(
    loader: Any, epochs: int, device: torch.device, *, indexed: bool
) -> Callable[[int], Iterator[tuple[Tensor, ...]]]:
    """Gives a loader's batches, on the device."""
    found = type(loader).__name__
    if epochs > 1 and hasattr(loader, "__next__"):
        raise TypeError(
            f"`dataset` should be a data set, or a loader that can be read anew in each of "
            f"{epochs} epochs. Found {found}, an iterator, which can be read once; give what it "
            f"was made from, such as the DataLoader."
        )

    def epoch_of(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        empty = True
        finite: list[Tensor] = []  # of weights that are not on the CPU: looked at in the end
        for batch in loader:
            empty = False
            if not isinstance(batch, tuple | list) or not 2 + indexed <= len(batch) <= 4:
                size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
                raise TypeError(
                    f"`dataset`, a loader, should give batches (inputs, targets), then an index, "
                    f"which `on_batch` needs, then weights. Found {type(batch).__name__}{size}."
                )
            parts = [torch.as_tensor(part) for part in batch]
            _check_columns(parts)
            if len(parts) == 4:
                ok = parts[3].isfinite().all()
                if ok.is_cpu:
                    _check_weights(ok)
                else:
                    finite.append(ok)
            inputs, targets, *more = (part.to(device, non_blocking=True) for part in parts)
            yield (inputs, as_classes(targets), *more)
        if finite:
            _check_weights(torch.stack(finite).all())
        if empty:
            raise ValueError(
                f"`dataset`, a loader, must yield at least one batch in each epoch. It yielded "
                f"none in epoch {epoch}. Is its batch size larger than the data with "
                f"drop_last=True, or does it return the same iterator each time?"
            )

    return epoch_of


def _check_columns(parts: list[Tensor]) -> None:
    """Refuse a loader's index or weights of another kind or shape, which would go unnoticed."""
    size = parts[0].shape[:1]
    if len(parts) > 2 and (parts[2].is_floating_point() or parts[2].is_complex()):
        raise ValueError(
            f"`dataset`, a loader, should give an index of integers third, and weights fourth. "
            f"Found {parts[2].dtype} third; give (inputs, targets, index, weights)."
        )
    if len(parts) == 4 and (not parts[3].is_floating_point() or parts[3].shape != size):
        raise ValueError(
            f"`dataset`, a loader, should give weights as floats of shape {tuple(size)}, one for "
            f"each sample. Found {parts[3].dtype} of shape {tuple(parts[3].shape)}; take "
            f"squeeze(1) of a column, float() of integers."
        )


def _check_weights(finite: Tensor) -> None:
    if not bool(finite):
        raise ValueError(
            "`dataset`, a loader, should give finite weights. Found NaN or infinity, after which "
            "no weight of the model would be a number."
        )


def evaluate(model: nn.Module, dataset: Dataset[Any], *, cache: Cache = "auto") -> float:
    """The share of samples that a classifier gets right; one whose logits have a NaN it gets wrong.

    The model comes back as it was, mode and random state included. The samples are read once.

    Args:
        model: Called as `model(inputs)`, gives logits `(B, C)`.
        dataset: Samples `(input, target)` or `(input, target, index)`.
        cache: `True` decodes all samples first, which helps nobody but who asks for it; the others
            read them batch by batch.

    Returns:
        The accuracy, in [0, 1].

    Raises:
        ValueError: If the dataset is empty, its samples differ in shape, the targets are not one
            integer in `[0, C)` for each sample, or the model does not give `(B, C)`.
        TypeError: If the samples are no tuples of tensors and numbers, or the model, the dataset or
            what the model gives is of the wrong kind.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, 0]))
        >>> evaluate(nn.Identity(), data)  # its inputs are the logits
        0.75
    """
    check_model(model)
    with evaluating(model) as device:
        data = Kept(dataset, device, cache, readings=1).data
        forward, layout = fast_forward(model, device), _layout(model, data, device)
        count, low, high = torch.zeros(3, dtype=torch.int64, device=device).unbind()
        width = 0
        for inputs, targets, *_ in batches(data, _CHUNK, device, channels_last=layout):
            logits = logits_of(model, forward, inputs)
            check_classes(logits, targets)
            count += is_correct(logits, targets).sum()
            low, high = torch.minimum(low, targets.min()), torch.maximum(high, targets.max())
            width = logits.shape[1]
    correct, least, most = torch.stack([count, low, high]).tolist()
    if least < 0 or most >= width:
        raise ValueError(
            f"`dataset` should have targets in [0, {width}), the classes of the model. Found "
            f"{least if least < 0 else most}, which no prediction can be; leave such samples out."
        )
    return correct / len(data)


class Fit(Protocol):
    """A training loop that can stand in for `fit` in :class:`drophot.DropHot`."""

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
        """Train `model` on `dataset`, and call `on_batch` and `on_epoch`, as `fit` does."""
        ...


def _layout(model: nn.Module, data: Dataset[Any], device: torch.device) -> bool:
    """Whether the model is given images with their channels last."""
    with random_state.preserved_rng():
        sample = torch.as_tensor(first_sample("dataset", data)[0]).to(device)
    return takes_channels_last(model, torch.stack([sample, sample]))
