"""Coverage-centric selection: samples from the whole range of difficulty."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from drophot._core import scalars
from drophot._core.arrays import IntArray
from drophot._core.ratios import num_removed
from drophot._core.seeded_draw import splitmix64
from drophot.coreset.score_ranking import End, draw_by_score, select_by_score
from drophot.coreset.selectors import Evidence, check_evidence

_MAX_BINS = 1 << 30
_STREAM = 2  # draws within bins are independent of tie-breaking and of "random"


@dataclass(frozen=True, slots=True)
class Stratified:
    """Keep samples of all difficulties instead of one end: coverage-centric selection (CCS).

    The `cutoff * N` hardest samples are left out. The range of the remaining scores is divided into
    `bins` bins of equal width, which are visited from the least to the most populated. From each
    bin, as many samples are drawn at random as the remaining budget divided by the number of
    remaining bins allows, or all of them if there are fewer. Rare difficulties are therefore kept
    completely and frequent ones are thinned out. The number of kept samples is exactly `K`.

    With `targets`, all of this is done within each class.

    References:
        Zheng, Liu, Lai and Prakash, Coverage-centric Coreset Selection for High Pruning Rates,
        ICLR 2023, https://openreview.net/forum?id=QwKvL6wC8Yi, algorithm 1.

    Args:
        bins: The number of bins.
        cutoff: The fraction of **all** samples that is left out as too hard, in [0, 1). Together
            with the ratio it must be at most 1. The best value depends on the ratio and on the
            fraction of wrong labels (Zheng et al. use 0 for keeping 70 % of CIFAR-10, 0.3 for
            10 %). Choose it on a validation set; choosing it on the test set is an unfair
            advantage.
        hard: Which scores are hard: `"high"` for forgetting, EL2N and loss, `"low"` for AUM and
            confidence.
        balanced: Each class keeps its share. :func:`drophot.select` does this whenever it is given
            `targets`.

    Raises:
        TypeError: If `bins` is not an integer or `cutoff` not a number.
        ValueError: If `bins` is less than 1, `cutoff` is not in [0, 1) or `hard` is not a valid
            value.

    Example:
        >>> from drophot import select
        >>> select([0, 0, 0, 0, 1, 2, 9, 9], 0.5, Stratified(bins=9, cutoff=0.25)).tolist()[2:]
        [4, 5]
    """

    bins: int = 50
    cutoff: float = 0.0
    hard: End = "high"
    balanced: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bins", scalars.integer("bins", self.bins, least=1))
        cutoff = scalars.real("cutoff", self.cutoff, "a number in [0, 1)")
        object.__setattr__(self, "cutoff", cutoff)
        if self.bins > _MAX_BINS:
            raise ValueError(
                f"`bins` must be at most {_MAX_BINS:,}, got {self.bins:,}. A few thousand bins "
                f"separate the scores just as well."
            )
        if not 0 <= self.cutoff < 1:
            raise ValueError(
                f"`cutoff` must be in [0, 1), got {self.cutoff:g}. To leave out 10 %, pass 0.1."
            )
        if self.hard not in ("high", "low"):
            raise ValueError(f'`hard` must be "high" or "low", got {self.hard!r}.')

    @property
    def name(self) -> str:
        """The name in records: the settings that differ from the defaults."""
        parts = ["stratified"]
        parts += [f"bins{self.bins}"] * (self.bins != 50)
        parts += [f"cutoff{self.cutoff}"] * (self.cutoff != 0)
        parts += [self.hard] * (self.hard != "high")
        return "-".join([*parts, *["balanced"] * self.balanced])

    @property
    def needs(self) -> Collection[str]:
        """The scores, and with `balanced` the targets."""
        return ("scores", "targets") if self.balanced else ("scores",)

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        """Select a fraction of the samples: see :class:`drophot.coreset.Selector`.

        Args:
            ratio: The fraction kept, in (0, 1].
            evidence: With `scores`, and with `targets` if `balanced`.
            seed: Determines every random choice.

        Returns:
            The indices of the kept samples, int64, ascending, shape `(K,)`.

        Raises:
            ValueError: If the evidence lacks something, `cutoff` and `ratio` are together more than
                1, or a score is not finite.
        """
        check_evidence(self, evidence)
        check_cutoff(self, ratio)
        assert evidence.scores is not None
        targets = evidence.targets if self.balanced else None
        draw = partial(draw_from_strata, self)
        return select_by_score(draw, evidence.scores, ratio, targets=targets, seed=seed)


def check_cutoff(mode: Stratified, ratio: float) -> None:
    """Refuse a ratio that is larger than the share that the cutoff leaves."""
    if ratio + mode.cutoff > 1 + 1e-9:
        raise ValueError(
            f"`cutoff` and the ratio must sum to at most 1, got cutoff={mode.cutoff} and "
            f"ratio={ratio}. Lower one of them."
        )


def draw_from_strata(
    mode: Stratified, scores: Tensor, size: int, seed: int, positions: IntArray | None = None
) -> IntArray:
    """Draw `size` positions, in no particular order; `None` means positions 0 to `N - 1`."""
    total = len(scores)
    positions = np.arange(total) if positions is None else positions
    remaining = max(size, total - num_removed(total, mode.cutoff))
    easier = "low" if mode.hard == "high" else "high"
    left = np.sort(draw_by_score(scores, remaining, easier, seed, positions))
    inside = torch.from_numpy(np.searchsorted(positions, left))
    return _draw_from_bins(*_bins(scores[inside], mode.bins), left, size, seed)


def _draw_from_bins(
    sizes: IntArray, bins: IntArray, positions: IntArray, size: int, seed: int
) -> IntArray:
    budget, order = size, np.argsort(sizes, kind="stable")
    quotas = np.empty_like(sizes)
    for left, number in zip(range(len(sizes), 0, -1), order.tolist(), strict=True):
        quotas[number] = quota = min(int(sizes[number]), budget // left)
        budget -= quota
    # Sorted by bin and then by hash; the first samples of each bin are kept.
    hashes = splitmix64(positions, seed, _STREAM)
    order = np.argsort(hashes)
    order = order[np.argsort(bins[order], kind="stable")]
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return positions[order[rank < np.repeat(quotas, sizes)]]


def _bins(scores: Tensor, count: int) -> tuple[IntArray, IntArray]:
    """The sizes of the bins that are not empty, and in which of these each sample is."""
    values = scores.double().cpu()  # so that no range overflows and integers keep their order
    low, high = values.amin(), values.amax()
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(
            "`scores` must be finite to be divided into bins, got an infinite score. Remove "
            'those samples first, or use mode="high" or "low".'
        )
    # Halved, because the difference of two large numbers may overflow.
    width = (high / 2 - low / 2).clamp_(min=torch.finfo(torch.float64).tiny)
    # Multiplied before it is divided, so that integer scores on a boundary get the right bin.
    bins = (values / 2 - low / 2) * (count / 2**20) / (width / 2**20)
    bins = bins.long().clamp_(0, count - 1).numpy()
    if count > 2 * len(bins) + 1024:
        _, bins, sizes = np.unique(bins, return_inverse=True, return_counts=True)
        return sizes, bins
    sizes = np.bincount(bins)
    number = np.cumsum(sizes > 0) - 1
    sizes = sizes[sizes > 0]
    # NumPy sorts integers of up to 16 bits in linear time.
    return sizes, number.astype(np.min_scalar_type(len(sizes)))[bins]
