"""Random subsets and seeds that are the same on every device and in every version."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from drophot._core.arrays import IntArray

BLOCK = 1 << 22  # positions processed at a time, which bounds the size of temporaries


def draw(
    blocks: Callable[[], Iterable[IntArray]],
    total: int,
    size: int,
    seed: int,
    *,
    stream: int = 0,
    largest: bool = False,
    num_deviations: float = 12,
) -> IntArray:
    """Draw `size` positions at random: those with the smallest hashes, or with the largest.

    Hashes are uniformly distributed, so the threshold is known in advance up to a few standard
    deviations. One pass keeps the positions that are certainly below it and the few around it; the
    hashes of all positions are never held at once.

    Args:
        blocks: Returns all positions in blocks; called once per pass.
        total: The number of positions.
        size: How many to draw.
        seed: Determines the hashes.
        stream: Draws of different streams are independent.
        largest: Take the largest hashes instead of the smallest.
        num_deviations: Half the width of the first guess, in standard deviations.

    Returns:
        The drawn positions, in no particular order.
    """
    if size >= total:
        return np.concatenate([*blocks(), np.empty(0, np.int64)])
    width = num_deviations * (sqrt(size * (1 - size / total)) + 1)
    while True:
        low, high = (_hash_quantile((size + side * width) / total) for side in (-1, 1))
        certain, candidates, candidate_hashes = [], [], []
        for block in blocks():
            hashes = splitmix64(block, seed, stream)
            hashes = ~hashes if largest else hashes
            certain.append(block[hashes < low])
            between = (hashes >= low) & (hashes <= high)
            candidates.append(block[between])
            candidate_hashes.append(hashes[between])
        found, near = np.concatenate(certain), np.concatenate(candidates)
        order = np.concatenate(candidate_hashes)
        if len(found) <= size <= len(found) + len(near):
            rest = near[np.argsort(order)[: size - len(found)]]
            return np.concatenate([found, rest])
        width *= 16


def _hash_quantile(fraction: float) -> np.uint64:
    """The value that this fraction of all hashes is below."""
    return np.uint64(min(max(int(fraction * 2**64), 0), 2**64 - 1))


def position_blocks(total: int, block: int = BLOCK) -> Callable[[], Iterable[IntArray]]:
    """All positions in `[0, total)` in blocks, as `draw` takes them."""
    return lambda: (np.arange(start, min(start + block, total)) for start in range(0, total, block))


def splitmix64(values: IntArray, seed: int, stream: int = 0) -> NDArray[np.uint64]:
    """The SplitMix64 hash of every value; different values never collide in one seed and stream."""
    step = np.uint64(0x9E3779B97F4A7C15)
    return _mix(hash_start(seed, stream) + (values.astype(np.uint64) + np.uint64(1)) * step)


def hash_start(seed: int, stream: int = 0) -> NDArray[np.uint64]:
    """What the hashes of a seed and a stream have in common, shape `(1,)`."""
    return _mix(_mix(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(stream))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def derive_seed(seed: int, number: int) -> int:
    """A seed in [0, 2⁶³) for the `number`-th of several draws that share one seed."""
    return int(splitmix64(np.array([number]), seed, stream=3)[0] >> np.uint64(1))


def cpu_generator(seed: int) -> torch.Generator:
    """A seeded CPU generator, so that the numbers do not depend on the device."""
    return torch.Generator().manual_seed(seed % 2**63)
