"""Refuse a run that cannot work, before it starts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, TensorDataset

from drophot.training import first_sample


def check_counts(least: int, **counts: Any) -> None:
    """Refuse what is no integer of at least `least`.

    Args:
        least: The least that each may be.
        **counts: The values, by their names.

    Raises:
        TypeError: If one is not an integer.
        ValueError: If one is less.
    """
    for name, value in counts.items():
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError(f"`{name}` should be an integer. Found {value!r}.") from None
        if number < least:
            raise ValueError(f"`{name}` should be at least {least}. Found {value}.")


def build(
    factory: Callable[[], nn.Module],
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
    train_set: Dataset[Any],
    test_set: Dataset[Any],
) -> tuple[nn.Module, int]:
    """Build a model to throw away and try it on the data's first samples.

    Args:
        factory: Makes models.
        optimizer: Makes optimisers.
        train_set: Samples `(input, target)`.
        test_set: Likewise.

    Returns:
        The model and its number of classes.

    Raises:
        TypeError: If a factory is none.
        ValueError: If a data set is empty or has an index already, the inputs differ in shape, or
            the model cannot take them or gives no logits.
    """
    samples = []
    for name, dataset in (("train_set", train_set), ("test_set", test_set)):
        samples.append(first_sample(name, dataset))
        if len(samples[-1]) != 2:
            raise ValueError(
                f"`{name}` should give samples (input, target). Found {len(samples[-1])} parts; "
                f"give the data set itself, not in an IndexedDataset: the index is added here."
            )
    inputs, other = (torch.as_tensor(sample[0])[None] for sample in samples)
    if inputs.shape != other.shape or inputs.dtype != other.dtype:
        raise ValueError(
            f"`test_set` should have inputs like `train_set`, {tuple(inputs.shape[1:])} of "
            f"{inputs.dtype}. Found {tuple(other.shape[1:])} of {other.dtype}; give both the same "
            f"transform."
        )
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"`model` should be a factory: called without arguments it gives a new model. Found "
            f"{type(factory).__name__}; give the class or function that makes it, or a lambda."
        )
    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` should give an nn.Module. Found {type(model).__name__}.")
    if factory() is model:
        raise ValueError(
            "`model` should give a new model each time. Found the same object twice, whose "
            "training would go on instead of starting anew; build the model inside the factory."
        )
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        raise TypeError(
            f"`optimizer` should be a factory: called with parameters it gives an optimiser. Found "
            f"{type(optimizer).__name__}; give functools.partial(torch.optim.Adam, lr=1e-3), say."
        )
    if not isinstance(made := optimizer(model.parameters()), Optimizer):
        raise TypeError(f"`optimizer` should give an Optimizer. Found {type(made).__name__}.")
    model.eval()
    with torch.no_grad():
        try:
            logits = model(torch.cat([inputs, other]))
        except Exception as error:
            raise ValueError(
                f"`model` should take inputs (B, {', '.join(map(str, inputs.shape[1:]))}), as the "
                f"data gives them. Found {type(error).__name__}: {error}"
            ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"`model` should give logits (B, C) with C at least 2. Found {found} for a batch of 2."
        )
    return model, logits.shape[1]


def check_targets(name: str, dataset: Dataset[Any], num_classes: int) -> int:
    """Refuse targets that are no classes of the model, as far as they are in memory.

    Args:
        name: What the caller calls the data set.
        dataset: What `in_memory` gave.
        num_classes: `C`.

    Returns:
        The number of classes that occur; 0 if the data set is not in memory.

    Raises:
        ValueError: If a target is not in `[0, C)`.
    """
    if not isinstance(dataset, TensorDataset):
        return 0
    targets = dataset.tensors[1]
    if targets.dim() != 1 or targets.is_floating_point():
        raise ValueError(
            f"`{name}` should have one integer as target. Found shape {tuple(targets.shape[1:])} "
            f"of {targets.dtype}."
        )
    wrong = ((targets < 0) | (targets >= num_classes)).nonzero()[:, 0]
    if len(wrong):
        raise ValueError(
            f"`{name}` should have targets in [0, {num_classes}), the classes of the model. Found "
            f"{int(targets[wrong[0]])} at position {int(wrong[0])}."
        )
    return len(targets.unique())


def check_sizes(
    model: nn.Module,
    train_set: Dataset[Any],
    size: int,
    *,
    data_ratio: float,
    num_classes: int,
    batch_size: int,
) -> None:
    """Refuse a coreset that leaves a class or a batch empty.

    Args:
        model: A model to throw away.
        train_set: All training samples.
        size: `K`.
        data_ratio: The share that gave it.
        num_classes: How many classes occur in the training set.
        batch_size: Samples a step.

    Raises:
        ValueError: If fewer samples are kept than there are classes, or the last batch of an epoch
            is a single sample and the model cannot train on one.
    """
    total = len(train_set)  # type: ignore[arg-type]
    if size < num_classes:
        raise ValueError(
            f"`data_ratio` should keep a sample of each class. Found {data_ratio}, which keeps "
            f"{size} of {total} samples for {num_classes} classes; raise it to at least "
            f"{num_classes / total:.3g}."
        )
    for count, what in (
        (size, f"`data_ratio={data_ratio}` keeps {size} samples"),
        (total, f"`train_set` has {total} samples"),
    ):
        if (count % batch_size or batch_size) != 1:
            continue
        single = torch.as_tensor(first_sample("train_set", train_set)[0])[None]
        model.train()
        try:
            model(single.cpu())
        except ValueError as error:  # BatchNorm, of a single value
            raise ValueError(
                f"`batch_size` should not leave a last batch of one sample, on which this model "
                f"cannot train. Found {batch_size}, and {what}; change `batch_size`. ({error})"
            ) from error


def empty_classes(train_set: Dataset[Any], indices: Tensor) -> list[int]:
    """The classes that occur in the training set and not in a coreset.

    Args:
        train_set: What `in_memory` gave.
        indices: The coreset, `(K,)`.

    Returns:
        The classes; none if the training set is not in memory.
    """
    if not isinstance(train_set, TensorDataset):
        return []
    targets = train_set.tensors[1].cpu()
    return sorted(set(targets.unique().tolist()) - set(targets[indices].unique().tolist()))
