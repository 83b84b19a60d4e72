"""Division of a selection's size among the classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from drophot._core.arrays import IntArray, as_integers
from drophot._core.seeded_draw import splitmix64

# Takes scores (N,), a size, a seed and the samples' positions; returns the positions drawn.
Draw = Callable[[Tensor, int, int, IntArray | None], IntArray]


def check_targets(targets: Tensor | ArrayLike, length: int) -> IntArray:
    """The targets as int64 `(length,)`, checked to hold one class per sample."""
    classes = as_integers("targets", targets)
    if classes.shape != (length,):
        raise ValueError(
            f"`targets` must hold one class per sample, shape ({length},), got shape "
            f"{classes.shape}."
        )
    return classes


def class_members(classes: IntArray) -> list[IntArray]:
    """The positions of each class in ascending order, the classes in ascending order."""
    order = np.argsort(classes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(classes[order])) + 1)


def proportional_sizes(counts: Iterable[int], size: int, seed: int) -> IntArray:
    """Divide `size` among classes of these counts by largest remainders; `seed` breaks ties."""
    counts = np.fromiter(counts, dtype=np.int64)
    found, remainders = np.divmod(counts * size, int(counts.sum()))
    order = np.lexsort((splitmix64(np.arange(len(counts)), seed), -remainders))
    found[order[: size - int(found.sum())]] += 1
    return found


def random_proportional_sizes(
    counts: Iterable[int], size: int, generator: np.random.Generator
) -> IntArray:
    """Divide `size` among classes so that each gets its exact proportion in expectation.

    The remainders are assigned by systematic sampling, so no class gets more samples than it has.

    References:
        Madow and Madow, On the theory of systematic sampling, 1944.
    """
    counts = np.fromiter(counts, dtype=np.int64)
    total = int(counts.sum())
    found, remainders = np.divmod(counts * size, total)
    reached = np.cumsum(remainders) + int(generator.integers(total))
    return found + reached // total - (reached - remainders) // total


def draw_balanced(
    draw: Draw,
    scores: Tensor,
    size: int,
    seed: int,
    classes: IntArray | None,
    positions: IntArray | None = None,
) -> Tensor:
    """Draw `size` samples, within each class its proportional share if `classes` are given.

    Args:
        draw: Draws from all samples, or from those of one class.
        scores: Shape `(N,)`.
        size: How many to draw.
        seed: Passed to `draw`; breaks ties among the shares.
        classes: Shape `(N,)`.
        positions: The samples' positions in the whole dataset, by default `0 … N - 1`.

    Returns:
        The drawn positions in the whole dataset, int64, ascending, on the CPU.
    """
    if classes is None:
        return torch.from_numpy(np.sort(draw(scores, size, seed, positions)))
    found = []
    members = class_members(classes)
    sizes = proportional_sizes(map(len, members), size, seed).tolist()
    for group, share in zip(members, sizes, strict=True):
        if share:
            own = scores[torch.from_numpy(group).to(scores.device)]
            indices = group if positions is None else positions[group]
            found.append(draw(own, share, seed, indices))
    return torch.from_numpy(np.sort(np.concatenate(found)))
