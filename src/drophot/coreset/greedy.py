"""The parts that greedy selectors share: input checks, classes, start samples and the result."""

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
    """The result of a greedy selector: the kept samples, and the order of their selection.

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
    """The indices of the kept samples `(K,)`: int64, ascending, unique, as for `select`."""
    weights: Tensor | None
    """How many samples each kept sample represents, itself included `(K,)`: float32. They sum to
    `N`, or to the size of the classes that keep any samples."""
    ranking: Tensor
    """The kept samples in the order of their selection, without the start samples; with `targets`,
    class after class."""
    gains: Tensor
    """The gain of each sample in the ranking when it was selected, float32 of the same shape."""

    def __len__(self) -> int:
        return len(self.indices)


# Takes the features (n, D) of one group, the number to keep, the positions of the start samples and
# a seed. Returns the positions selected, their gains, and for each sample which of the start and
# selected samples represents it, if known.
Algorithm = Callable[[Tensor, int, Tensor, int], tuple[Tensor, Tensor, Tensor | None]]

# The bytes needed for a group, from n, D, the number kept and the bytes per number.
MemoryNeeded = Callable[[int, int, int, int], int]


@exact(products=True)
def greedy(
    algorithm: Algorithm,
    memory_needed: MemoryNeeded,
    features: Tensor | ArrayLike,
    ratio: float,
    targets: Tensor | ArrayLike | None,
    start: Tensor | ArrayLike | None,
    seed: int,
    *,
    centered: bool = True,
) -> Coreset:
    """Check the input and the available memory, then select, within classes if there are targets.

    Args:
        algorithm: Selects in one group.
        memory_needed: How much memory that takes.
        features: Shape `(N, D)`.
        ratio: The fraction kept.
        targets: The classes.
        start: The indices of samples that are already kept.
        seed: Any integer.
        centered: Whether the features may be shifted and scaled, for exact Euclidean distances.
    """
    ratio = check_keep_ratio("ratio", ratio)
    seed = scalars.integer("seed", seed)
    values = _check_features(features)
    total = len(values)
    size = num_kept(total, ratio)
    started = _check_start(start, total, size)
    groups = [np.arange(total)] if targets is None else class_members(check_targets(targets, total))
    sizes = proportional_sizes(map(len, groups), size, seed).tolist()
    starts = _starts_in_groups(groups, sizes, started, of_classes=targets is not None)
    largest = max((len(g), s) for g, s in zip(groups, sizes, strict=True))
    _check_memory(values, memory_needed, largest, in_parts=targets is not None)
    values, scales = _centered(values) if centered else (values, (1.0, 1.0))

    ranking, gains = [], []
    weights = np.zeros(total, dtype=np.float32)
    known = True
    for group, share, positions in zip(groups, sizes, starts, strict=True):
        if not share:
            continue
        part = values if targets is None else values[torch.from_numpy(group).to(values.device)]
        chosen, gained, owner = algorithm(part, share, torch.from_numpy(positions), seed)
        ranking.append(group[chosen.numpy()])
        gains.append((gained.cpu().double() * scales[0] * scales[1]).float())
        if owner is None:
            known = False
        else:
            owners = group[np.concatenate([positions, chosen.numpy()])]
            weights[owners] = np.bincount(owner.cpu().numpy(), minlength=len(owners))
    order = np.concatenate(ranking)
    indices = np.sort(np.concatenate([started, order]))
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
            _check_free_memory(tuple(features.shape), device, 4 * prod(features.shape))
    values = as_real_tensor("features", features)
    if values.dim() != 2 or 0 in values.shape:
        raise ValueError(
            f"`features` must have shape (N, D), both at least 1, got {tuple(values.shape)}. Use "
            f"flatten(1) to convert images."
        )
    if not values.is_floating_point():
        values = values.float()
    wrong = torch.cat([~part.isfinite().all(1) for part in _row_blocks_of(values)])
    if wrong.any():
        raise ValueError(
            f"`features` must be finite, but those of {int(wrong.sum())} samples are not, the "
            f"first at index {int(wrong.nonzero()[0, 0])}. Remove these samples first."
        )
    return values


def _centered(values: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """A copy that is centered and scaled so that squares do not overflow, and the scale.

    The scale is a power of two, so that scaling is exact. It is the product of two, because that
    for the largest numbers is not a finite number.
    """
    largest = max(float(part.abs().amax()) for part in _row_blocks_of(values))
    power = frexp(largest)[1]
    scales = 2.0 ** (power // 2), 2.0 ** (power - power // 2)
    found = (values / scales[0]).div_(scales[1])
    return found.sub_(_center(found)), scales


def _center(values: Tensor) -> Tensor:
    """The value of each column that is nearest to the mean of the column."""
    # The mean has more digits than the features, so after subtracting it equal distances would
    # differ.
    mean = values.mean(0)
    found = values[0].clone()
    for part in _row_blocks_of(values):
        nearest = part.gather(0, (part - mean).abs_().argmin(0, keepdim=True))[0]
        found = torch.where((nearest - mean).abs() < (found - mean).abs(), nearest, found)
    return found


def row_blocks(total: int, width: int) -> Iterator[slice]:
    """Blocks of `total` rows, small enough that a block of `width` columns fits in the cache."""
    step = max(64, (1 << 19) // max(width, 1))
    for begin in range(0, total, step):
        yield slice(begin, min(begin + step, total))


def _row_blocks_of(values: Tensor) -> Iterator[Tensor]:
    return (values[block] for block in row_blocks(len(values), values.shape[1]))


def squared_norms(values: Tensor) -> Tensor:
    """The squared norms `(N,)` of rows `(N, D)`, computed without a copy of all rows."""
    return torch.cat([part.square().sum(1) for part in _row_blocks_of(values)])


def _check_start(start: Any, total: int, size: int) -> IntArray:
    if start is None:
        return np.empty(0, dtype=np.int64)
    found = as_indices("start", start, total)
    if len(found) > size:
        raise ValueError(
            f"`start` has {len(found)} samples, which count among the {size} samples kept. "
            f"Increase the ratio or leave some out."
        )
    return found


def _starts_in_groups(
    groups: list[IntArray], sizes: list[int], started: IntArray, *, of_classes: bool
) -> list[IntArray]:
    """The positions of the start samples within each group."""
    found = []
    for number, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        inside = started[np.isin(started, group)] if of_classes else started
        if len(inside) > size:
            raise ValueError(
                f"`start` must not have more samples of a class than the class keeps, got "
                f"{len(inside)} samples of class number {number + 1}, which keeps {size}. Leave "
                f"some out, or do not pass `targets`."
            )
        found.append(np.searchsorted(group, inside))
    return found


def _check_memory(
    values: Tensor,
    memory_needed: MemoryNeeded,
    largest: tuple[int, int],
    *,
    in_parts: bool,
) -> None:
    """Log and check the memory for a copy of the features and for the largest group."""
    total, size = largest
    amount = memory_needed(total, values.shape[1], size, values.dtype.itemsize) + values.nbytes
    if in_parts:
        amount += values.dtype.itemsize * total * values.shape[1]
    logger.info(
        "%d of %d samples, %d features: needs %.2f GB of memory besides the features",
        size,
        total,
        values.shape[1],
        amount / 1e9,
    )
    _check_free_memory(tuple(values.shape), values.device, amount)


def _check_free_memory(shape: tuple[int, ...], device: torch.device, amount: int) -> None:
    if amount > (free := memory.available(device)):
        raise MemoryError(
            f"`features` of shape {shape} need {amount / 1e9:.1f} GB more, but only "
            f"{free / 1e9:.1f} GB are free on {device}. Pass `targets` to process one class at a "
            f"time, or use fewer features or another device."
        )
