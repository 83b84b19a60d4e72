"""Coverage-centric selection: a little of every difficulty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from drophot._core import scalars
from drophot._core.arrays import IntArray
from drophot._core.ratios import num_removed
from drophot._core.seeded_draw import splitmix64

_MOST_BINS = 1 << 30
_STREAM = 2  # which of a bin are taken has nothing to do with how ties fall, nor with "random"


@dataclass(frozen=True, slots=True)
class Stratified:
    """Keep a little of every difficulty, not one end: coverage-centric selection (CCS).

    The `cutoff * N` hardest samples are left out. The range of the other scores is split into
    `bins` of equal width, and these are visited from the one with the fewest samples to the one
    with the most: each gives what the budget that is left, divided by the bins that are left,
    allows, or all that it has, at random. So rare difficulties are kept whole and common ones are
    thinned out. What is kept is exactly `K`, whatever the scores.

    With `targets` all of this happens within each class.

    References:
        Zheng, Liu, Lai and Prakash, Coverage-centric Coreset Selection for High Pruning Rates,
        ICLR 2023, https://openreview.net/forum?id=QwKvL6wC8Yi, algorithm 1.

    Args:
        bins: Into how many bins the range of the scores is split.
        cutoff: The share of the **full** set that is left out as too hard, in [0, 1); together
            with the share kept at most 1. What is good depends on the share kept and on how many
            labels are wrong (Zheng et al.: 0 at 70 % of CIFAR-10 kept, 0.3 at 10 %). Choose it on
            a validation set; chosen on test data it is an unfair advantage.
        hard: Which scores are the hard ones: `"high"` for forgetting, EL2N and loss, `"low"` for
            AUM and confidence.

    Raises:
        TypeError: If `bins` is not an integer or `cutoff` not a number.
        ValueError: If `bins` is below 1, `cutoff` not in [0, 1) or `hard` another word.

    Example:
        >>> from drophot import select
        >>> select([0, 0, 0, 0, 1, 2, 9, 9], 0.5, Stratified(bins=9, cutoff=0.25)).tolist()[2:]
        [4, 5]
    """

    bins: int = 50
    cutoff: float = 0.0
    hard: Literal["high", "low"] = "high"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bins", scalars.integer("bins", self.bins, least=1))
        cutoff = scalars.real("cutoff", self.cutoff, "a number in [0, 1)")
        object.__setattr__(self, "cutoff", cutoff)
        if self.bins > _MOST_BINS:
            raise ValueError(
                f"`bins` should be at most {_MOST_BINS:,}. Found {self.bins:,}; that many leave "
                f"each score a bin to itself, which a few thousand do too."
            )
        if not 0 <= self.cutoff < 1:
            raise ValueError(
                f"`cutoff` should be the share of the full set left out, in [0, 1). Found "
                f"{self.cutoff:g}; to leave out 10 % give 0.1."
            )
        if self.hard not in ("high", "low"):
            raise ValueError(
                f'`hard` should be "high" or "low": which scores are the hard ones. Found '
                f"{self.hard!r}."
            )

    def check(self, ratio: float) -> None:
        """Refuse a share kept that the cutoff leaves no room for.

        Args:
            ratio: The share kept.

        Raises:
            ValueError: If both are more than everything.
        """
        if ratio + self.cutoff > 1 + 1e-9:
            raise ValueError(
                f"`cutoff` should leave what is to be kept: together with the ratio at most 1. "
                f"Found cutoff={self.cutoff} and ratio={ratio}; lower one of them."
            )

    def remaining(self, total: int, size: int) -> int:
        """How many samples the cutoff leaves.

        Args:
            total: How many there are.
            size: How many are to be kept.

        Returns:
            Their number, at least `size`.
        """
        return max(size, total - num_removed(total, self.cutoff))

    def draw(self, scores: Tensor, positions: IntArray, size: int, seed: int) -> IntArray:
        """Keep `size` of the samples that the cutoff has left.

        Args:
            scores: Finite numbers, one for each.
            positions: Where they stand among all samples.
            size: How many to keep.
            seed: Draws.

        Returns:
            The positions kept, unordered.
        """
        sizes, place = self._bins(scores)
        budget, order = size, np.argsort(sizes, kind="stable")
        quotas = np.empty_like(sizes)
        for left, number in zip(range(len(sizes), 0, -1), order.tolist(), strict=True):
            quotas[number] = quota = min(int(sizes[number]), budget // left)
            budget -= quota
        # Bin by bin, and in each by hash: the first ones of a bin are those that it gives.
        keys = splitmix64(positions, seed, _STREAM)
        order = np.argsort(keys)
        order = order[np.argsort(place[order], kind="stable")]
        rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return positions[order[rank < np.repeat(quotas, sizes)]]

    def _bins(self, scores: Tensor) -> tuple[IntArray, IntArray]:
        """How many samples each bin that has any holds, and in which of these each sample is."""
        values = scores.double().cpu()  # so that no range overflows, and integers keep their order
        low, high = values.amin(), values.amax()
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(
                "`scores` should be finite to be split into bins. Found an infinite one; drop "
                'those samples first, or take mode="high" or "low".'
            )
        # Halves, as the distance of two large numbers may be none.
        width = (high / 2 - low / 2).clamp_(min=torch.finfo(torch.float64).tiny)
        # Multiplied first, so that whole numbers fall into the bins that they bound.
        place = (values / 2 - low / 2) * (self.bins / 2**20) / (width / 2**20)
        place = place.long().clamp_(0, self.bins - 1).numpy()
        if self.bins > 2 * len(place) + 1024:
            _, place, sizes = np.unique(place, return_inverse=True, return_counts=True)
            return sizes, place
        sizes = np.bincount(place)
        number = np.cumsum(sizes > 0) - 1
        sizes = sizes[sizes > 0]
        # NumPy sorts numbers of up to 16 bits in linear time.
        return sizes, number.astype(np.min_scalar_type(len(sizes)))[place]
