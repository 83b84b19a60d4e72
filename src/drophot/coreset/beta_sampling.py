"""Beta sampling: the higher the pruning ratio, the easier the samples that are drawn."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from torch import Tensor

from drophot._core import scalars
from drophot._core.arrays import IntArray, as_real_tensor
from drophot._core.seeded_draw import splitmix64
from drophot.coreset.score_ranking import select_by_score
from drophot.coreset.selectors import Evidence, check_evidence

_CONCENTRATION = 15  # C of the paper
_ROUNDING = 1e-6  # by which a mean of probabilities in float32 may leave [0, 1]
_NUM_HARDEST = 10  # samples whose mean confidence is the mode of the density if nothing is pruned
_STREAM = 4  # independent of tie-breaking, of "random" and of the draws of `Stratified`


@dataclass(frozen=True, slots=True, eq=False)
class Beta:
    r"""Draw samples by their score, and easier ones the fewer are kept: the sampling of DUAL.

    The probability to draw a sample is proportional to its score times the density of a Beta
    distribution at its mean confidence. With the pruning ratio :math:`r = 1 - \text{ratio}` and
    :math:`\mu`, the mean confidence of the ten samples with the highest scores, the parameters are

    .. math:: \beta = 15 \, (1 - \mu) \, (1 - r^{c}), \qquad \alpha = 16 - \beta.

    If little is pruned, samples as hard as those ten are the most likely ones; if much is, easy
    ones are. Samples are drawn without replacement, exactly `K` of them. If fewer than `K` have a
    positive probability, the rest is drawn uniformly from the others. With `targets`, all of this
    is done within each class.

    References:
        Cho, Shin, Kang and Yun, Lightweight Dataset Pruning without Full Training via Example
        Difficulty and Prediction Uncertainty, ICML 2025, https://arxiv.org/abs/2502.06905.

    Args:
        confidence: The mean probability of each sample's target over the presentations from which
            the scores are computed, shape `(N,)`: `tracker.scores("confidence")`. Samples that
            are not selected from, because of `among`, may have NaN. Values that leave [0, 1] by
            at most 1e-6, as rounded means do, are set to 0 or 1. In a mode of
            :class:`drophot.DropHot` or :class:`drophot.Grid`, leave it out: then each run takes the
            confidences of step 1, as in `Scored(DUAL(), Beta())`.
        exponent: `c`, greater than 0. The authors' code uses 4; the larger it is, the longer hard
            samples are preferred. Choose it on a validation set.
        balanced: Each class keeps its share. :func:`drophot.select` does this whenever it is given
            `targets`.

    Raises:
        TypeError: If `confidence` does not hold real numbers, or `exponent` is not a number.
        ValueError: If `confidence` is not in [0, 1] or not one-dimensional, or `exponent` is not
            greater than 0; in a selection, if there are no confidences, or that of a candidate is
            NaN.

    Example:
        >>> import torch
        >>> from drophot import select
        >>> scores, confidence = torch.rand(100), torch.rand(100)  # of DUAL, of the same training
        >>> len(select(scores, 0.1, Beta(confidence)))
        10
    """

    confidence: Tensor | None = None
    exponent: float = 4.0
    balanced: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.confidence is not None:
            object.__setattr__(self, "confidence", _checked_confidence(self.confidence))
        exponent = scalars.real("exponent", self.exponent)
        if not exponent > 0:
            raise ValueError(
                f"`exponent` must be greater than 0, got {exponent:g}. The authors use 4."
            )
        object.__setattr__(self, "exponent", exponent)

    @property
    def name(self) -> str:
        """The name in records: the settings that differ from the defaults.

        It begins with `"beta-given"` if the object holds the confidences.
        """
        parts = ["beta", *["given"] * (self.confidence is not None)]
        parts += [*[f"exponent{self.exponent:g}"] * (self.exponent != 4)]
        return "-".join([*parts, *["balanced"] * self.balanced])

    @property
    def needs(self) -> Collection[str]:
        """The scores, the confidences if it holds none, and with `balanced` the targets."""
        return ("scores", *["confidence"] * (self.confidence is None), *["targets"] * self.balanced)

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        """Select a fraction of the samples: see :class:`drophot.coreset.Selector`.

        Args:
            ratio: The fraction kept, in (0, 1].
            evidence: With what `needs` lists.
            seed: Determines every random choice.

        Returns:
            The indices of the kept samples, int64, ascending, shape `(K,)`.

        Raises:
            ValueError: If the evidence lacks something, a score is negative, or `confidence` has
                another length or NaN.
        """
        check_evidence(self, evidence)
        assert evidence.scores is not None
        targets = evidence.targets if self.balanced else None
        mode = (
            self if self.confidence is not None else replace(self, confidence=evidence.confidence)
        )
        check_confidence(mode, evidence.num_samples)
        draw = partial(draw_by_density, mode, ratio)
        return select_by_score(draw, evidence.scores, ratio, targets=targets, seed=seed)


def check_confidence(mode: Beta, total: int) -> None:
    """Refuse a selection without confidences, or with those of another number of samples."""
    if mode.confidence is None:
        raise ValueError(
            "`confidence` must be given to Beta() in `select`, which has no tracker, got None. "
            'Pass `Beta(tracker.scores("confidence"))`.'
        )
    if len(mode.confidence) != total:
        raise ValueError(
            f"`confidence` must have one entry for each of the {total} samples, got "
            f"{len(mode.confidence)}."
        )


def draw_by_density(
    mode: Beta,
    ratio: float,
    scores: Tensor,
    size: int,
    seed: int,
    positions: IntArray | None = None,
) -> IntArray:
    """Draw `size` positions, in no particular order; `None` means positions 0 to `N - 1`."""
    positions = np.arange(len(scores)) if positions is None else positions
    values = scores.double().cpu().numpy()
    if len(values) and not (values.min() >= 0 and values.max() < np.inf):
        raise ValueError(
            f"`scores` must be finite and at least 0 for Beta(), got scores from {values.min():g} "
            f"to {values.max():g}. Use those of DUAL."
        )
    assert mode.confidence is not None
    confidence = mode.confidence.numpy()[positions]
    if len(lack := positions[np.isnan(confidence)]):
        raise ValueError(
            f"`confidence` must not be NaN for samples to select from, but it is for {len(lack)} "
            f"of {len(positions)}, the first at index {lack[0]}. NaN marks a sample that was never "
            f"presented. Leave it out of `among`."
        )
    hardest = np.argsort(-values, kind="stable")[:_NUM_HARDEST]
    pruned = 1 - ratio
    beta = _CONCENTRATION * (1 - confidence[hardest].mean()) * (1 - pruned**mode.exponent)
    alpha = _CONCENTRATION + 1 - beta
    with np.errstate(divide="ignore", invalid="ignore"):
        density = _times_log(alpha - 1, confidence) + _times_log(beta - 1, 1 - confidence)
        weight = np.where(values > 0, np.log(values) + density, -np.inf)
        # The smallest of independent exponential variables, divided by the weights: the same
        # distribution as drawing one after the other without replacement.
        uniform = (splitmix64(positions, seed, _STREAM) >> np.uint64(11)).astype(float) + 0.5
        draws = np.log(-np.log(uniform / 2**53))
    # Equal keys are infinite. The draws decide among them, too.
    return positions[np.lexsort((draws, draws - weight))[:size]]


def _checked_confidence(confidence: Tensor) -> Tensor:
    found = as_real_tensor("confidence", confidence).detach().cpu().double()
    if found.dim() != 1:
        raise ValueError(
            f"`confidence` must have shape (N,), got {tuple(found.shape)}. Pass "
            f'`tracker.scores("confidence")`.'
        )
    outside = (found < -_ROUNDING) | (found > 1 + _ROUNDING)
    if outside.any():
        raise ValueError(
            f"`confidence` must hold probabilities in [0, 1], got {float(found[outside][0])}. Pass "
            f'`tracker.scores("confidence")`.'
        )
    return found.clamp(0, 1)


def _times_log(factor: float, values: np.ndarray) -> np.ndarray:
    """`factor * log(values)`, 0 if the factor is 0."""
    return factor * np.log(values) if factor else np.zeros_like(values)
