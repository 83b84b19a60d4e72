"""The modes of a run: which selector chooses the samples of step 3, and what it needs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from drophot.coreset import score_selection
from drophot.coreset.stratified import Stratified
from drophot.pipeline.temporary_selectors import Evidence, Selector, selector, stratified_name
from drophot.settings import SAMPLING_MODES, Mode, name_of
from drophot.tracking.dynamics import Statistic

_NEEDS = {"scores", "model", "targets"}


@dataclass(frozen=True, slots=True)
class Scored:
    """A mode of a run or a grid: by which score, which end of it, and whether class by class.

    `"high"` is `Scored("forgetting", "high")`.

    Args:
        statistic: The score: `"forgetting"`, as the run's own setting defines it, or another one of
            :class:`drophot.DynamicsTracker`, over the same presentations.
        mode: `"high"`, `"low"` or a :class:`drophot.coreset.Stratified`, as for
            :func:`drophot.select`; or `"random"`, which with `balanced` is the control of all that
            are balanced, and needs no score.
        balanced: Each class keeps its share.

    Raises:
        ValueError: If the statistic or the mode is unknown.

    Example:
        >>> from drophot import Stratified
        >>> Scored("el2n", balanced=True).name
        'el2n-high-balanced'
        >>> Scored("aum", Stratified(hard="low", cutoff=0.1)).name
        'aum-stratified-cutoff0.1-low'
        >>> Scored(mode="random", balanced=True).name
        'random-balanced'
    """

    statistic: Statistic = "forgetting"
    mode: Literal["high", "low", "random"] | Stratified = "high"
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.statistic not in get_args(Statistic):
            raise ValueError(
                f"`statistic` must be one of {', '.join(map(repr, get_args(Statistic)))}, got "
                f"{self.statistic!r}."
            )
        score_selection.check_mode("mode", self.mode)

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The mode's name in records, files and tables."""
        score = "" if self.mode == "random" else f"{self.statistic}-"
        return f"{score}{stratified_name(self.mode)}" + "-balanced" * self.balanced

    @property
    def needs(self) -> frozenset[str]:
        """What `select` needs."""
        scores = {"scores"} if self.mode != "random" else set[str]()
        return frozenset(scores | ({"targets"} if self.balanced else set[str]()))

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        """Keep a share of the samples.

        Args:
            ratio: The share **kept**, in (0, 1].
            evidence: Holds what `needs` names.
            seed: Breaks ties and draws.

        Returns:
            The positions of the kept samples, int64, shape `(K,)`.
        """
        scores = evidence.scores
        if scores is None:
            scores = torch.zeros(evidence.num_samples, device="cpu")
        targets = evidence.targets if self.balanced else None
        return score_selection.select(scores, ratio, self.mode, targets=targets, seed=seed)


def selector_of(mode: Mode) -> Selector | None:
    """The selector of a mode; `None` for a mode that chooses while step 3 trains."""
    if isinstance(mode, str):
        return None if mode in SAMPLING_MODES else selector(mode)
    for name in ("needs", "select"):
        if not hasattr(mode, name):
            raise TypeError(
                f"`mode` must be a name or a selector, got {mode!r}, which has no `{name}`. See "
                f"drophot.coreset.Selector for what a selector has."
            )
    return mode  # type: ignore[return-value]


def needs_of(mode: Mode) -> Collection[str]:
    """What a mode needs: any of "scores" and "model", which step 1 gives, and "targets"."""
    chosen = selector_of(mode)
    return () if chosen is None else chosen.needs


def needs_scoring(mode: Mode) -> bool:
    """Whether a mode needs step 1."""
    return not {"scores", "model"}.isdisjoint(needs_of(mode))


def statistic_of(mode: Mode) -> Statistic | None:
    """The score that a mode selects by, if it needs one: of a selector its `statistic`, if any."""
    if "scores" not in needs_of(mode):
        return None
    return getattr(mode, "statistic", "forgetting")


def as_scored(mode: Mode) -> Scored | None:
    """A mode that goes by a score in its long form; `None` for any other."""
    if isinstance(mode, Scored):
        return mode
    if isinstance(mode, Stratified) or mode == "high" or mode == "low":
        return Scored(mode=mode)
    return None


def check_mode(mode: Mode, ratio: float) -> None:
    """Check that a mode is a selector, and that it can keep a share of the samples."""
    chosen = selector_of(mode)
    if chosen is not None and (unknown := set(chosen.needs) - _NEEDS):
        raise ValueError(
            f"`needs` of the selector {name_of(mode)!r} must be of "
            f"{', '.join(map(repr, sorted(_NEEDS)))}, got {sorted(unknown)[0]!r}."
        )
    inner = mode.mode if isinstance(mode, Scored) else mode
    if isinstance(inner, Stratified):
        score_selection.check_mode("mode", inner, ratio)
