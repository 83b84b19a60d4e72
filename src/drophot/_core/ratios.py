"""How many samples a share is, how classes divide it, and which ones chance takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import floor, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from drophot._core import scalars
from drophot._core.arrays import integers

BLOCK = 1 << 22  # samples looked at in one go: what is made on the way stays small
_SPREAD = 12  # standard deviations within which an edge among random numbers surely lies

Positions = NDArray[np.int64]


def kept(num_samples: int, ratio: float) -> int:
    """How many samples a share `ratio` of `num_samples` is.

    Args:
        num_samples: `N`.
        ratio: The share kept, in (0, 1].

    Returns:
        `K = max(1, floor(ratio * N + 0.5))`: rounded, halves up, never none.

    Example:
        >>> kept(100, 0.29), kept(5, 0.5), kept(3, 0.01)
        (29, 3, 1)
    """
    return max(1, floor(float(ratio) * num_samples + 0.5))


def check_ratio(name: str, ratio: Any) -> float:
    """Refuse a ratio that is no share kept.

    Args:
        name: What the caller calls it.
        ratio: The value.

    Returns:
        It as a plain float.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in (0, 1].
    """
    found = scalars.share(name, ratio, "(0, 1]")
    if not 0 < found <= 1:
        meant = found if 2 <= found <= 100 else 10.0
        raise ValueError(
            f"`{name}` should be the share of samples kept, in (0, 1]. Found {ratio}; to keep "
            f"{meant:g} % give {meant / 100:g}."
        )
    return found


def check_targets(targets: Tensor | ArrayLike, length: int) -> Positions:
    """Refuse targets that are not one class for each sample.

    Args:
        targets: The classes, integers.
        length: How many there should be.

    Returns:
        The classes, int64, shape `(N,)`.

    Raises:
        TypeError: If they are not integers.
        ValueError: If they have another shape.
    """
    classes = integers("targets", targets)
    if classes.shape != (length,):
        raise ValueError(
            f"`targets` should have one class for each sample, shape ({length},). Found "
            f"{classes.shape}."
        )
    return classes


def check_positions(name: str, positions: Any, total: int, cure: str = "") -> Positions:
    """Refuse what does not name distinct samples.

    Args:
        name: What the caller calls them.
        positions: The samples, integers, in any order.
        total: How many samples there are.
        cure: What to do about a bool mask.

    Returns:
        The positions as they are given, int64, perhaps none.

    Raises:
        TypeError: If they are not integers.
        ValueError: If one is out of range or named twice, or they have more than one dimension.
    """
    found = integers(name, positions, "positions of samples, integers", cure)
    outside = (found < 0) | (found >= total)
    if found.ndim != 1 or outside.any():
        wrong = found.flat[np.argmax(outside)]
        raise ValueError(
            f"`{name}` should be positions in [0, {total}), one dimension. Found {wrong} in shape "
            f"{found.shape}."
        )
    if len(np.unique(found)) < len(found):
        raise ValueError(
            f"`{name}` should name each sample once. Found {len(found) - len(np.unique(found))} "
            f"repeated; give {name}.unique()."
        )
    return found


def members(classes: Positions) -> list[Positions]:
    """Where the samples of each class stand.

    Args:
        classes: Those of all samples, shape `(N,)`.

    Returns:
        The positions of each class, ascending, the classes in ascending order.
    """
    order = np.argsort(classes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(classes[order])) + 1)


def shares(counts: Iterable[int], size: int, seed: int) -> Positions:
    """Divide `size` among groups of these counts by largest remainders, equal ones at random.

    Args:
        counts: The groups' sizes.
        size: At most their sum.
        seed: Breaks ties.

    Returns:
        How many of each, together `size`.
    """
    counts = np.fromiter(counts, dtype=np.int64)
    found, remainders = np.divmod(counts * size, int(counts.sum()))
    order = np.lexsort((hashed(np.arange(len(counts)), seed), -remainders))
    found[order[: size - int(found.sum())]] += 1
    return found


def dealt(counts: Iterable[int], size: int, chance: np.random.Generator) -> Positions:
    """Divide `size` among groups of these counts, what is left over by chance.

    So that over many draws each group has exactly its proportion, the smallest ones too.

    References:
        Madow and Madow, On the theory of systematic sampling, 1944.

    Args:
        counts: The groups' sizes.
        size: At most their sum.
        chance: Draws.

    Returns:
        How many of each, together `size`; of no group more than it has.
    """
    counts = np.fromiter(counts, dtype=np.int64)
    total = int(counts.sum())
    found, remainders = np.divmod(counts * size, total)
    reached = np.cumsum(remainders) + int(chance.integers(total))
    return found + reached // total - (reached - remainders) // total


def drawn(
    blocks: Callable[[], Iterable[Positions]],
    total: int,
    size: int,
    seed: int,
    *,
    stream: int = 0,
    last: bool = False,
) -> Positions:
    """`size` of the positions at random: those whose hashes are smallest, or the largest.

    Hashes are uniform, so that it is known beforehand about where the edge lies: one pass keeps
    what is surely below it and the few that are near, and never holds all of them.

    Args:
        blocks: Gives the positions part by part, as often as it is called.
        total: How many they are.
        size: How many are wanted.
        seed: Draws.
        stream: Another one has nothing to do with this one.
        last: Take the largest hashes.

    Returns:
        The positions, unordered.
    """
    if size >= total:
        return np.concatenate([*blocks(), np.empty(0, np.int64)])
    spread = _SPREAD * (sqrt(size * (1 - size / total)) + 1)
    while True:
        low, high = (_key((size + side * spread) / total) for side in (-1, 1))
        sure, near, keys = [], [], []
        for block in blocks():
            key = hashed(block, seed, stream)
            key = ~key if last else key
            sure.append(block[key < low])
            between = (key >= low) & (key <= high)
            near.append(block[between])
            keys.append(key[between])
        found, edge, order = np.concatenate(sure), np.concatenate(near), np.concatenate(keys)
        if len(found) <= size <= len(found) + len(edge):
            rest = edge[np.argsort(order)[: size - len(found)]]
            return np.concatenate([found, rest])
        spread *= 16


def _key(share: float) -> np.uint64:
    """The hash below which this share of all hashes lies."""
    return np.uint64(min(max(int(share * 2**64), 0), 2**64 - 1))


def every(total: int) -> Callable[[], Iterable[Positions]]:
    """All positions, for `drawn`.

    Args:
        total: How many they are.

    Returns:
        Gives them part by part.
    """
    return lambda: (np.arange(start, min(start + BLOCK, total)) for start in range(0, total, BLOCK))


def hashed(values: Positions, seed: int, stream: int = 0) -> NDArray[np.uint64]:
    """SplitMix64 of every value: under one seed and stream different values never collide.

    Args:
        values: Integers.
        seed: Any integer.
        stream: Another one gives hashes that have nothing to do with these.

    Returns:
        The hashes, of the values' shape.
    """
    start = _mix(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(stream)
    step = np.uint64(0x9E3779B97F4A7C15)
    return _mix(_mix(start) + (values.astype(np.uint64) + np.uint64(1)) * step)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fresh(seed: int, number: int) -> int:
    """A seed for the `number`-th of several draws under one seed.

    Args:
        seed: Any integer.
        number: From 0.

    Returns:
        In [0, 2⁶³).
    """
    return int(hashed(np.array([number]), seed, stream=3)[0] >> np.uint64(1))


def generator(seed: int) -> torch.Generator:
    """A generator of the CPU's, as every device draws the same by it.

    Args:
        seed: Any integer.

    Returns:
        The generator.
    """
    return torch.Generator().manual_seed(seed % 2**63)
