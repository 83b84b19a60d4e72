"""What the greedy selectors have in common: their input, classes, a start, and their result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import frexp, prod
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from drophot._core import memory, scalars
from drophot._core.arrays import IntArray, as_indices, as_real_tensor
from drophot._core.exact_arithmetic import exact
from drophot._core.ratios import check_keep_ratio, num_kept
from drophot.coreset.class_balance import check_targets, class_members, proportional_sizes

logger = logging.getLogger("drophot")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coreset:
    """What a selector kept, and in which order.

    All tensors are on the CPU.

    Example:
        >>> from drophot import facility_location
        >>> coreset = facility_location(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), ratio=0.5)
        >>> coreset.indices, coreset.weights
        (tensor([1, 3]), tensor([3., 1.]))
        >>> coreset.ranking, coreset.gains
        (tensor([1, 3]), tensor([26.,  8.]))
    """

    indices: Tensor
    """The kept samples' positions `(K,)`: int64, ascending, unique, as `select` gives them."""
    weights: Tensor | None
    """How many samples each of them stands for, itself included `(K,)`: float32, together `N`, or
    the samples of the classes that keep any."""
    ranking: Tensor
    """The samples in the order in which they were chosen, a start excepted; with `targets` one
    class after the other."""
    gains: Tensor
    """What each of the ranking gained when it was chosen, float32 of its shape."""

    def __len__(self) -> int:
        return len(self.indices)


# Of one group's features (n, D), how many to keep, the places of a start and a seed: the places
# chosen, their gains, and for each sample which of start and chosen stands for it, if known.
Greedy = Callable[[Tensor, int, Tensor, int], tuple[Tensor, Tensor, Tensor | None]]


@exact(products=True)
def greedy(
    algorithm: Greedy,
    needs: Callable[[int, int, int, int], int],
    features: Tensor | ArrayLike,
    ratio: float,
    targets: Tensor | ArrayLike | None,
    start: Tensor | ArrayLike | None,
    seed: int,
) -> Coreset:
    """Check the input, say what memory it takes, and choose, class by class if these are given.

    Args:
        algorithm: Chooses in one group.
        needs: Bytes for a group of n samples, D features, so many kept and bytes a number.
        features: Shape `(N, D)`.
        ratio: The share kept.
        targets: The classes.
        start: What is kept already.
        seed: Any integer.

    Returns:
        The coreset.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of range or of another shape.
        MemoryError: If there is not enough memory.
    """
    ratio = check_keep_ratio("ratio", ratio)
    seed = scalars.integer("seed", seed)
    values = _check_features(features)
    total = len(values)
    size = num_kept(total, ratio)
    before = _check_start(start, total, size)
    groups = [np.arange(total)] if targets is None else class_members(check_targets(targets, total))
    sizes = proportional_sizes(map(len, groups), size, seed).tolist()
    begun = _begun(groups, sizes, before, of_classes=targets is not None)
    largest = max((len(g), s) for g, s in zip(groups, sizes, strict=True))
    _check_memory(values, needs, largest, in_parts=targets is not None)
    values, scale = _centred(values)

    ranking, gains = [], []
    weights = np.zeros(total, dtype=np.float32)
    known = True
    for group, share, place in zip(groups, sizes, begun, strict=True):
        if not share:
            continue
        part = values if targets is None else values[torch.from_numpy(group).to(values.device)]
        chosen, gained, owner = algorithm(part, share, torch.from_numpy(place), seed)
        ranking.append(group[chosen.numpy()])
        gains.append((gained.cpu().double() * scale).float())
        if owner is None:
            known = False
        else:
            who = group[np.concatenate([place, chosen.numpy()])]
            weights[who] = np.bincount(owner.cpu().numpy(), minlength=len(who))
    order = np.concatenate(ranking)
    indices = np.sort(np.concatenate([before, order]))
    return Coreset(
        indices=torch.from_numpy(indices),
        weights=torch.from_numpy(weights[indices]) if known else None,
        ranking=torch.from_numpy(order),
        gains=torch.cat(gains),
    )


def _check_features(features: Tensor | ArrayLike) -> Tensor:
    if isinstance(features, Tensor | np.ndarray):
        wide = "float32" in str(features.dtype) or "float64" in str(features.dtype)
        if not wide:  # they are copied as float32 before anything else
            device = features.device if isinstance(features, Tensor) else torch.device("cpu")
            _check_free(tuple(features.shape), device, 4 * prod(features.shape))
    values = as_real_tensor("features", features)
    if values.dim() != 2 or 0 in values.shape:
        raise ValueError(
            f"`features` should have shape (N, D), both at least 1. Found {tuple(values.shape)}; "
            f"flatten(1) makes rows of images."
        )
    if not values.is_floating_point():
        values = values.float()
    wrong = torch.cat([~part.isfinite().all(1) for part in _parts(values)])
    if wrong.any():
        raise ValueError(
            f"`features` should be finite. Found {int(wrong.sum())} samples that are not, the "
            f"first at position {int(wrong.nonzero()[0, 0])}; drop those first."
        )
    return values


def _centred(values: Tensor) -> tuple[Tensor, float]:
    """A copy around 0 and of a size that squares well, by a power of two that is given too."""
    largest = max(float(part.abs().amax()) for part in _parts(values))
    power = frexp(largest)[1]
    # In two steps, as the power of the largest numbers is none itself.
    found = (values / 2.0 ** (power // 2)).div_(2.0 ** (power - power // 2))
    return found.sub_(_middle(found)), 2.0**power


def _middle(values: Tensor) -> Tensor:
    """Of each column the number nearest to its mean."""
    # The mean itself has more digits than the features: less it, equal distances would differ.
    mean = values.mean(0)
    found = values[0].clone()
    for part in _parts(values):
        nearest = part.gather(0, (part - mean).abs_().argmin(0, keepdim=True))[0]
        found = torch.where((nearest - mean).abs() < (found - mean).abs(), nearest, found)
    return found


def _parts(values: Tensor) -> Iterator[Tensor]:
    return (values[block] for block in rows(len(values), values.shape[1]))


def square_norms(values: Tensor) -> Tensor:
    """Of each row, with no second copy of all.

    Args:
        values: Shape `(N, D)`.

    Returns:
        Shape `(N,)`.
    """
    return torch.cat([part.square().sum(1) for part in _parts(values)])


def _check_start(start: Any, total: int, size: int) -> IntArray:
    if start is None:
        return np.empty(0, dtype=np.int64)
    found = as_indices("start", start, total)
    if len(found) > size:
        raise ValueError(
            f"`start` counts among the {size} samples kept. Found {len(found)}; raise the ratio."
        )
    return found


def _begun(
    groups: list[IntArray], sizes: list[int], before: IntArray, *, of_classes: bool
) -> list[IntArray]:
    """The start's places within each group."""
    found = []
    for number, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        inside = before[np.isin(before, group)] if of_classes else before
        if len(inside) > size:
            raise ValueError(
                f"`start` should have no more samples of a class than its share. Found "
                f"{len(inside)} of the {number + 1}-th class, which keeps {size}; leave some out, "
                f"or leave out `targets`."
            )
        found.append(np.searchsorted(group, inside))
    return found


def _check_memory(
    values: Tensor,
    needs: Callable[[int, int, int, int], int],
    largest: tuple[int, int],
    *,
    in_parts: bool,
) -> None:
    """Say what will be taken, before anything is: a copy of all, and what the largest part does."""
    total, size = largest
    amount = needs(total, values.shape[1], size, values.dtype.itemsize) + values.nbytes
    if in_parts:
        amount += values.dtype.itemsize * total * values.shape[1]
    logger.info(
        "%d of %d samples, %d features: %.2f GB of memory beside the features",
        size,
        total,
        values.shape[1],
        amount / 1e9,
    )
    _check_free(tuple(values.shape), values.device, amount)


def _check_free(shape: tuple[int, ...], device: torch.device, amount: int) -> None:
    if amount > (free := memory.available(device)):
        raise MemoryError(
            f"`features` of {shape} need {amount / 1e9:.1f} GB more. Found "
            f"{free / 1e9:.1f} GB free on {device}; give `targets`, which takes one class "
            f"at a time, fewer features or another device."
        )


def rows(total: int, width: int) -> Iterator[slice]:
    """Blocks of rows small enough that a block times `width` stays in a cache.

    Args:
        total: How many rows there are.
        width: How many numbers a row of the result has.

    Yields:
        The blocks, in order.
    """
    step = max(64, (1 << 19) // max(width, 1))
    for begin in range(0, total, step):
        yield slice(begin, min(begin + step, total))
