"""The samples and targets of a dataset, read as a DataLoader reads them."""

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

# Datasets of torchvision whose target is `targets[i]`, and those whose target is `samples[i][1]`.
_BY_TARGETS = {"MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100"}
_BY_SAMPLES = {"DatasetFolder", "ImageFolder", "ImageNet"}


def is_plainly(dataset: Any, kind: type[T]) -> TypeGuard[T]:
    """Whether a dataset is of exactly this class, so that the result of reading it is known.

    A subclass or an object with its own methods may give anything else.
    """
    return type(dataset) is kind and "__getitems__" not in vars(dataset)


def tensors_of(dataset: Any) -> tuple[Tensor, ...] | None:
    """All samples of a dataset that consists of tensors; `None` if they are not known."""
    if is_plainly(dataset, TensorDataset):
        whole = all(isinstance(t, Tensor) and t.dim() for t in dataset.tensors)
        lengths = {len(t) for t in dataset.tensors} if whole else set()
        return tuple(dataset.tensors) if len(lengths) == 1 else None
    if is_plainly(dataset, IndexedDataset):
        inner = tensors_of(dataset.dataset)
        return inner and (*inner, torch.arange(len(inner[0]), device=inner[0].device))
    if is_plainly(dataset, Subset):
        inner = tensors_of(dataset.dataset)
        positions = None if inner is None else _positions(dataset.indices)
        if inner is None or positions is None:
            return None
        return tuple(tensor[positions.to(tensor.device)] for tensor in inner)
    return None


def _positions(indices: Any) -> Tensor | None:
    """The indices of a `Subset` if they are integers. Torch interprets others differently."""
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
    """A batch, read as a DataLoader does: in one call if the dataset has `__getitems__`.

    Args:
        dataset: The dataset.
        positions: The positions of the samples.
        name: The name of the caller's argument, for errors.

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
    """Samples of one shape as a batch, detached so that `backward` ends at the data."""
    parts = default_collate(samples)
    return tuple(part.detach() if isinstance(part, Tensor) else part for part in parts)


def _check_shapes(
    name: str, samples: list[Any], positions: Sequence[int], error: Exception
) -> None:
    first = _shapes(samples[0])
    for position, sample in zip(positions, samples, strict=True):
        if (found := _shapes(sample)) != first:
            raise ValueError(
                f"`{name}` must have samples of one shape, got {_format(found)} at position "
                f"{position} and {_format(first)} at position {positions[0]}. Crop or resize them."
            ) from error


def _shapes(sample: Any) -> Any:
    if not isinstance(sample, tuple | list):
        return type(sample).__name__
    return tuple(np.shape(part) if hasattr(part, "shape") else () for part in sample)


def _format(shapes: Any) -> str:
    return str(shapes[0]) if isinstance(shapes, tuple) and shapes else str(shapes)


def targets_of(dataset: Any) -> Tensor:
    """The targets of all samples, integers `(N,)` on the CPU, without reading if they are known."""
    if (known := known_targets(dataset)) is not None:
        return as_classes(known.cpu())
    found = []
    with random_state.preserved_rng():
        for start in range(0, len(dataset), _CHUNK_SIZE):
            positions = list(range(start, min(start + _CHUNK_SIZE, len(dataset))))
            found += [torch.as_tensor(s[1]).cpu() for s in _samples(dataset, positions)]
    return as_classes(torch.stack(found))


def as_classes(targets: Tensor) -> Tensor:
    """Targets of any integer type or bool as int64, the dtype of torch's losses.

    Other targets are returned as they are.
    """
    is_class = not (targets.is_floating_point() or targets.is_complex())
    return targets.long() if is_class else targets


_CHUNK_SIZE = 256  # samples that are read at a time for their targets


def known_targets(dataset: Any) -> Tensor | None:
    """The targets of all samples, if they are known without reading the samples."""
    if (tensors := tensors_of(dataset)) is not None:
        return tensors[1]
    if is_plainly(dataset, IndexedDataset):
        return known_targets(dataset.dataset)
    if is_plainly(dataset, Subset):
        inner, positions = known_targets(dataset.dataset), _positions(dataset.indices)
        return None if inner is None or positions is None else inner[positions.to(inner.device)]
    if is_from_torchvision(dataset, _BY_TARGETS) and dataset.target_transform is None:
        return torch.as_tensor(dataset.targets)
    if is_from_torchvision(dataset, _BY_SAMPLES) and dataset.target_transform is None:
        return torch.as_tensor([target for _, target in dataset.samples])
    return None


def is_from_torchvision(thing: Any, names: set[str], part: str = "datasets") -> bool:
    """Whether an object is exactly of one of these classes of a part of torchvision."""
    kind = type(thing)
    from_torchvision = kind.__module__.startswith(f"torchvision.{part}.") and kind.__name__ in names
    return from_torchvision and "__getitems__" not in vars(thing)


def first_sample(name: str, dataset: Any) -> tuple[Any, ...]:
    """The first sample of a dataset, checked for the samples that this library can train on.

    Args:
        name: The name of the caller's argument, for errors.
        dataset: The dataset.

    Returns:
        The sample, `(input, target)` or `(input, target, index)`.

    Raises:
        ValueError: If the dataset is empty.
        TypeError: If it is a loader, has no length, or the sample is not such a tuple.

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
            f"`{name}` must be map-style, with samples at positions from 0, got "
            f"{type(dataset).__name__}, which raised {type(error).__name__} at position 0. If it "
            f"is a dictionary of datasets, pass one of them. If it is a stream, pass its samples "
            f"as a list."
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
            f"`{name}` must have samples (input, target) or (input, target, index) with a tensor "
            f"as input, got {kinds}. Convert images by a transform such as "
            f"torchvision.transforms.ToTensor(). For dicts, write your own training loop."
        )
    return tuple(sample)


def _check_kind(name: str, dataset: Any) -> None:
    found = type(dataset).__name__
    if not hasattr(dataset, "__getitem__") and hasattr(dataset, "dataset"):
        raise TypeError(
            f"`{name}` must be a dataset, not a loader, got {found}. Pass its dataset: "
            f"`loader.dataset`."
        )
    if isinstance(dataset, torch.nn.Module):
        raise TypeError(
            f"`{name}` must be a dataset, got the model {found}. The model is the first argument "
            f"and the dataset the second."
        )
    for method in ("__len__", "__getitem__"):
        if not hasattr(dataset, method):
            lack = "a length" if method == "__len__" else "`__getitem__`"
            raise TypeError(
                f"`{name}` must be map-style, with `__len__` and `__getitem__`, got {found} "
                f"without {lack}."
            )
