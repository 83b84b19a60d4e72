"""Division of a selection's size among the classes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from drophot._core.arrays import IntArray, as_integers
from drophot._core.seeded_draw import splitmix64


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
