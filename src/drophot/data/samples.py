"""What a data set's samples are: read as its user wrote it, or known without reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from drophot._core import random_state
from drophot.data.indexing import IndexedDataset

T = TypeVar("T")

# torchvision's data sets that give `targets[i]` as the target, and those that give `samples[i][1]`.
_BY_TARGETS = {"MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100"}
_BY_SAMPLES = {"DatasetFolder", "ImageFolder", "ImageNet"}


def is_plainly(dataset: Any, kind: type[T]) -> TypeGuard[T]:
    """Whether a data set is of a kind exactly, so that it is known what reading it gives.

    A subclass may give anything else, and so may an object with a method of its own.

    Args:
        dataset: The data set.
        kind: The class.

    Returns:
        Whether it is.
    """
    return type(dataset) is kind and "__getitems__" not in vars(dataset)


def tensors_of(dataset: Any) -> tuple[Tensor, ...] | None:
    """The tensors of a data set that is made of tensors already.

    Args:
        dataset: The data set.

    Returns:
        What reading it gives, all samples at once; `None` if that is not known without reading.
    """
    if is_plainly(dataset, TensorDataset):
        whole = all(isinstance(t, Tensor) and t.dim() for t in dataset.tensors)
        lengths = {len(t) for t in dataset.tensors} if whole else set()
        return tuple(dataset.tensors) if len(lengths) == 1 else None
    if is_plainly(dataset, IndexedDataset):
        inner = tensors_of(dataset.dataset)
        return inner and (*inner, torch.arange(len(inner[0]), device=inner[0].device))
    if is_plainly(dataset, Subset):
        inner = tensors_of(dataset.dataset)
        places = None if inner is None else _places(dataset.indices)
        if inner is None or places is None:
            return None
        return tuple(tensor[places.to(tensor.device)] for tensor in inner)
    return None


def _places(indices: Any) -> Tensor | None:
    """Indices of a `Subset` that are plainly integers. Of others torch makes other things."""
    if isinstance(indices, range):
        return torch.arange(indices.start, indices.stop, indices.step)
    if isinstance(indices, list | tuple):
        if all(type(i) is int or isinstance(i, np.integer) for i in indices):
            return torch.as_tensor([int(i) for i in indices], dtype=torch.int64)
        return None
    if isinstance(indices, np.ndarray) and indices.ndim == 1:
        plain = np.issubdtype(indices.dtype, np.integer)
        return torch.from_numpy(indices.astype(np.int64)) if plain else None
    if isinstance(indices, Tensor) and indices.dim() == 1:
        plain = indices.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)
        return indices.long() if plain else None
    return None


def read(dataset: Any, positions: Sequence[int], name: str = "dataset") -> tuple[Tensor, ...]:
    """A batch: read as a `DataLoader` does, in one call where the data set has one for it.

    Args:
        dataset: The data set.
        positions: Which samples.
        name: What the caller calls the data set.

    Returns:
        The samples' parts, stacked.

    Raises:
        ValueError: If the samples differ in shape.
    """
    if is_plainly(dataset, TensorDataset) and (tensors := tensors_of(dataset)) is not None:
        return tuple(tensor[list(positions)].detach() for tensor in tensors)
    samples = _samples(dataset, list(positions))
    try:
        return stacked(samples)
    except Exception as error:
        _check_shapes(name, samples, positions, error)
        raise


def _samples(dataset: Any, positions: list[int]) -> list[Any]:
    fetch = getattr(dataset, "__getitems__", None)
    return list(fetch(positions)) if fetch else [dataset[i] for i in positions]


def stacked(samples: list[Any]) -> tuple[Tensor, ...]:
    """Samples as a batch, which belongs to no graph: `backward` ends at the data.

    Args:
        samples: Of one shape.

    Returns:
        The samples' parts, stacked.
    """
    parts = default_collate(samples)
    return tuple(part.detach() if isinstance(part, Tensor) else part for part in parts)


def _check_shapes(
    name: str, samples: list[Any], positions: Sequence[int], error: Exception
) -> None:
    first = _shapes(samples[0])
    for place, sample in zip(positions, samples, strict=True):
        if (found := _shapes(sample)) != first:
            raise ValueError(
                f"`{name}` should have samples of one shape. Found {_words(found)} at position "
                f"{place} and {_words(first)} at position {positions[0]}; crop or resize them."
            ) from error


def _shapes(sample: Any) -> Any:
    if not isinstance(sample, tuple | list):
        return type(sample).__name__
    return tuple(np.shape(part) if hasattr(part, "shape") else () for part in sample)


def _words(shapes: Any) -> str:
    return str(shapes[0]) if isinstance(shapes, tuple) and shapes else str(shapes)


def targets_of(dataset: Any) -> Tensor:
    """The targets of all samples, without reading the samples where they are known.

    Args:
        dataset: What `in_memory` gave, or any other map-style dataset.

    Returns:
        Integers, shape `(N,)`, on the CPU.
    """
    if (known := known_targets(dataset)) is not None:
        return as_classes(known.cpu())
    found = []
    with random_state.preserved_rng():
        for start in range(0, len(dataset), _CHUNK):
            places = list(range(start, min(start + _CHUNK, len(dataset))))
            found += [torch.as_tensor(s[1]).cpu() for s in _samples(dataset, places)]
    return as_classes(torch.stack(found))


def as_classes(targets: Tensor) -> Tensor:
    """Targets of any integer type, or truth values, as the integers that torch's losses take.

    Args:
        targets: Of any kind.

    Returns:
        int64, or the targets themselves if they are no integers.
    """
    is_class = not (targets.is_floating_point() or targets.is_complex())
    return targets.long() if is_class else targets


_CHUNK = 256  # samples that are read in one go, of which only the targets stay


def known_targets(dataset: Any) -> Tensor | None:
    """The targets of all samples, if they are known without reading the samples.

    Args:
        dataset: Any data set.

    Returns:
        As they stand there, or `None`.
    """
    if (tensors := tensors_of(dataset)) is not None:
        return tensors[1]
    if is_plainly(dataset, IndexedDataset):
        return known_targets(dataset.dataset)
    if is_plainly(dataset, Subset):
        inner, places = known_targets(dataset.dataset), _places(dataset.indices)
        return None if inner is None or places is None else inner[places.to(inner.device)]
    if is_torchvisions(dataset, _BY_TARGETS) and dataset.target_transform is None:
        return torch.as_tensor(dataset.targets)
    if is_torchvisions(dataset, _BY_SAMPLES) and dataset.target_transform is None:
        return torch.as_tensor([target for _, target in dataset.samples])
    return None


def is_torchvisions(thing: Any, names: set[str], part: str = "datasets") -> bool:
    """Whether a thing is of one of torchvision's classes, and exactly so.

    Args:
        thing: A data set, or a transform.
        names: The classes' names.
        part: Which part of torchvision they are from.

    Returns:
        Whether it is.
    """
    kind = type(thing)
    ours = kind.__module__.startswith(f"torchvision.{part}.") and kind.__name__ in names
    return ours and "__getitems__" not in vars(thing)


def first_sample(name: str, dataset: Any) -> tuple[Any, ...]:
    """A data set's first sample, as far as this library can train on it.

    Args:
        name: What the caller calls the data set.
        dataset: The data set.

    Returns:
        The sample, `(input, target)` or `(input, target, index)`.

    Raises:
        ValueError: If the data set is empty.
        TypeError: If it is a loader, has no length, or the sample is no such tuple.

    Example:
        >>> first_sample("dataset", [(torch.zeros(2), 1)])
        (tensor([0., 0.]), 1)
    """
    _check_kind(name, dataset)
    if len(dataset) == 0:
        raise ValueError(f"`{name}` must have at least one sample, but it is empty.")
    try:
        sample = _samples(dataset, [0])[0]
    except (NotImplementedError, KeyError) as error:
        raise TypeError(
            f"`{name}` should be map-style, with samples at positions from 0. Found "
            f"{type(dataset).__name__}, which gave {type(error).__name__} at position 0; of a "
            f"dictionary of data sets give one, and of a stream the samples as a list."
        ) from error
    if (
        not isinstance(sample, tuple | list)
        or len(sample) not in (2, 3)
        or not isinstance(sample[0], Tensor | np.ndarray)
        or not all(isinstance(part, Tensor | np.ndarray | np.number | int) for part in sample[1:])
    ):
        kinds = (
            f"({', '.join(type(part).__name__ for part in sample)})"
            if isinstance(sample, tuple | list)
            else type(sample).__name__
        )
        raise TypeError(
            f"`{name}` should give samples (input, target) or (input, target, index) with a tensor "
            f"as input. Found {kinds}; images become tensors by a transform such as "
            f"torchvision.transforms.ToTensor(), and dicts are for a loop of your own."
        )
    return tuple(sample)


def _check_kind(name: str, dataset: Any) -> None:
    found = type(dataset).__name__
    if not hasattr(dataset, "__getitem__") and hasattr(dataset, "dataset"):
        raise TypeError(
            f"`{name}` should be a data set, not a loader of one. Found {found}; give its data "
            f"set, as in `loader.dataset`."
        )
    if isinstance(dataset, torch.nn.Module):
        raise TypeError(
            f"`{name}` should be a data set. Found {found}, a model; the model comes first and the "
            f"data set second."
        )
    for method in ("__len__", "__getitem__"):
        if not hasattr(dataset, method):
            lack = "a length" if method == "__len__" else "`__getitem__`"
            raise TypeError(
                f"`{name}` should be map-style, with `__len__` and `__getitem__`. Found {found} "
                f"without {lack}."
            )
