"""From scores to a coreset: which samples to keep."""

from __future__ import annotations

import operator
from math import floor
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from drophot import _radix

Mode = Literal["high", "low", "random"]


def select(
    scores: Tensor | ArrayLike,
    ratio: float,
    mode: Mode = "high",
    *,
    targets: Tensor | ArrayLike | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Keep a share `ratio` of the samples: those of the highest or lowest scores, or any.

    `ratio` is the share **kept**. Of `N` samples `K = max(1, floor(ratio * N + 0.5))` are kept,
    exactly. Equal scores are broken at random: by a hash of `seed` and the sample's position that
    is the same on every device and in every version, and so the coreset is too. For one `seed` a
    smaller ratio's coreset is part of a larger one's (with `targets`, save for the sample by
    which the rounding of the shares can move a class).

    References:
        Gupta et al., Drop it Like it's Hot: Network Pruning with Data Selection, section 4.2
        ("high" and "low"). The tie-breaking hash is SplitMix64's: Steele et al., Fast Splittable
        Pseudorandom Number Generators, 2014, https://doi.org/10.1145/2660193.2660195.

    Args:
        scores: One real number for each sample, shape `(N,)`: forgetting scores, or any others.
        ratio: The share kept, in (0, 1].
        mode: `"high"` keeps the highest scores, `"low"` the lowest, `"random"` a uniformly random
            subset of the same size, the control that a score has to beat.
        targets: The samples' classes, integers, shape `(N,)`. Given, each class keeps its share
            of `K` by the method of largest remainders, and the mode chooses within the classes. A
            class whose share rounds to 0 keeps nothing.
        seed: Breaks ties and draws the random subset.

    Returns:
        The positions of the kept samples, int64, ascending, unique, shape `(K,)`, on the CPU, for
        `torch.utils.data.Subset`.

    Raises:
        TypeError: If `ratio` is not a number, `seed` not an integer, `scores` not real or
            `targets` not of integers.
        ValueError: If `ratio` is not in (0, 1], `mode` is unknown, `scores` is empty, not of one
            dimension or holds a NaN, or `targets` has another length.

    Example:
        >>> scores = torch.tensor([0, 3, 1, 7, 0, 2])
        >>> select(scores, 0.5)
        tensor([1, 3, 5])
        >>> select(scores, 1 / 3, "low")
        tensor([0, 4])
        >>> select(scores, 0.5, targets=[0, 0, 0, 0, 1, 1])
        tensor([1, 3, 5])
    """
    check_ratio("ratio", ratio)
    check_mode("mode", mode)
    seed = operator.index(seed)
    values = _check_scores(scores)
    size = kept(len(values), ratio)
    if targets is None:
        return torch.from_numpy(np.sort(_choose(values, size, mode, seed)))

    classes = _check_targets(targets, len(values))
    order = np.argsort(classes, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(classes[order])) + 1)
    sizes = _shares(np.array([len(member) for member in members]), size, seed)
    indices = [
        member[_choose(values[torch.from_numpy(member)], int(share), mode, seed, member)]
        for member, share in zip(members, sizes, strict=True)
        if share
    ]
    return torch.from_numpy(np.sort(np.concatenate(indices)))


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
    return max(1, floor(ratio * num_samples + 0.5))


def check_ratio(name: str, ratio: Any) -> None:
    """Refuse a ratio that is no share kept.

    Args:
        name: What the caller calls it.
        ratio: The value.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in (0, 1].
    """
    try:
        inside = 0 < float(ratio) <= 1
    except (TypeError, ValueError):
        raise TypeError(
            f"`{name}` should be a number in (0, 1]. Found {type(ratio).__name__}."
        ) from None
    if not inside:
        raise ValueError(
            f"`{name}` should be the share of samples kept, in (0, 1]. Found {ratio}; to keep "
            f"10 % give 0.1."
        )


def check_mode(name: str, mode: Any) -> None:
    """Refuse an unknown mode.

    Args:
        name: What the caller calls it.
        mode: The value.

    Raises:
        ValueError: If it is unknown.
    """
    if mode not in get_args(Mode):
        raise ValueError(f'`{name}` should be "high", "low" or "random". Found {mode!r}.')


def _choose(
    scores: Tensor, size: int, mode: Mode, seed: int, positions: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Which `size` of the scores to keep, unordered; `positions` are theirs among all samples."""
    # All samples stand in one order, by score and then by hash. "low" takes it from below and
    # "high" from above, so that the two meet no sooner than they must.
    if positions is None:
        positions = np.arange(len(scores))
    if mode == "random":
        # A stream of its own, so that the control has nothing to do with how ties fell.
        return _smallest(_hash(positions, seed, stream=1), size)
    rank = len(scores) - size if mode == "high" else size - 1
    edge = _nth(scores, rank)
    inside = (scores > edge) if mode == "high" else (scores < edge)
    sure = inside.nonzero()[:, 0].cpu().numpy()
    tied = (scores == edge).nonzero()[:, 0].cpu().numpy()
    hashes = _hash(positions[tied], seed)
    order = ~hashes if mode == "high" else hashes
    return np.concatenate([sure, tied[_smallest(order, size - len(sure))]])


def _nth(scores: Tensor, rank: int) -> Tensor:
    """The score that stands at `rank` (from 0) in ascending order."""
    if not scores.is_cuda:
        return _radix.nth(scores, rank)
    # topk is torch's parallel radix selection; unsorted, it does nothing more.
    from_below = 2 * rank < len(scores)
    size = rank + 1 if from_below else len(scores) - rank
    top = scores.topk(size, largest=not from_below, sorted=False).values
    return top.amax() if from_below else top.amin()


def _smallest(keys: NDArray[np.uint64], size: int) -> NDArray[np.int64]:
    """Where the `size` smallest keys stand; they are all different."""
    if size == len(keys):
        return np.arange(size)
    return np.flatnonzero(keys < np.partition(keys, size)[size])


def _hash(values: NDArray[np.int64], seed: int, stream: int = 0) -> NDArray[np.uint64]:
    """SplitMix64 of every value: under one seed and stream different values never collide."""
    start = _mix(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(stream)
    step = np.uint64(0x9E3779B97F4A7C15)
    return _mix(_mix(start) + (values.astype(np.uint64) + np.uint64(1)) * step)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _shares(counts: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Split `size` over classes of these counts by largest remainders, equal ones at random."""
    total = int(counts.sum())
    shares, remainders = np.divmod(counts * size, total)
    order = np.lexsort((_hash(np.arange(len(counts)), seed), -remainders))
    shares[order[: size - int(shares.sum())]] += 1
    return shares


def _check_scores(scores: Tensor | ArrayLike) -> Tensor:
    if isinstance(scores, Tensor):
        values = scores.detach()
    else:  # torch takes no reversed views and warns of read-only ones; NumPy copies those alone
        values = torch.as_tensor(np.require(scores, requirements=["C", "W"]))
    if values.is_complex():
        raise TypeError(f"`scores` should be real numbers. Found {values.dtype}.")
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(
            f"`scores` should have shape (N,) with N at least 1. Found {tuple(values.shape)}."
        )
    if values.is_floating_point():
        if values.dtype.itemsize < 4:
            values = values.float()  # exact
        if values.amax().isnan():
            nan = values.isnan()
            raise ValueError(
                f"`scores` should hold no NaN. Found {int(nan.sum())}, the first at position "
                f"{int(nan.nonzero()[0, 0])}; score or drop those samples first."
            )
        return values
    # Unsigned integers of more than 8 bits can do next to nothing in torch.
    small = values.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return values if small else values.long()


def _check_targets(targets: Tensor | ArrayLike, length: int) -> NDArray[np.int64]:
    classes = np.asarray(targets.cpu() if isinstance(targets, Tensor) else targets)
    if not np.issubdtype(classes.dtype, np.integer):
        raise TypeError(f"`targets` should be integers. Found {classes.dtype}.")
    if classes.shape != (length,):
        raise ValueError(
            f"`targets` should have one class for each score, shape ({length},). Found "
            f"{classes.shape}."
        )
    return classes.astype(np.int64)
