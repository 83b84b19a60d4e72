"""The modes of a run and of a grid: how the samples of step 3 are chosen, and what that needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from drophot.coreset import score_selection
from drophot.coreset.stratified import Stratified
from drophot.tracking.dynamics import Statistic
from drophot.training import loop

OfFeatures = Literal["k_center", "facility_location"]
Dynamic = Literal["crest", "fresh_subset", "loss_sampling"]
Name = Literal["high", "low", "random"] | OfFeatures | Dynamic

OF_FEATURES: tuple[str, ...] = get_args(OfFeatures)
DYNAMIC: tuple[str, ...] = get_args(Dynamic)


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
        >>> str(Scored("el2n", balanced=True))
        'el2n-high-balanced'
        >>> str(Scored("aum", Stratified(hard="low", cutoff=0.1)))
        'aum-stratified-cutoff0.1-low'
        >>> str(Scored(mode="random", balanced=True))
        'random-balanced'
    """

    statistic: Statistic = "forgetting"
    mode: Literal["high", "low", "random"] | Stratified = "high"
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.statistic not in get_args(Statistic):
            raise ValueError(
                f"`statistic` should be one of {', '.join(map(repr, get_args(Statistic)))}. Found "
                f"{self.statistic!r}."
            )
        score_selection.check_mode("mode", self.mode)

    def __str__(self) -> str:
        score = "" if self.mode == "random" else f"{self.statistic}-"
        return f"{score}{name(self.mode)}" + "-balanced" * self.balanced


Mode = Name | Stratified | Scored


def name(mode: Mode | Literal["baseline"]) -> str:
    """What a record and a file call a mode.

    Args:
        mode: The mode.

    Returns:
        Its word; of a strategy its settings too, where they are not the defaults.
    """
    return mode.name if isinstance(mode, Stratified) else str(mode)


def scored(mode: Mode) -> Scored | None:
    """A mode that goes by a score, in its long form.

    Args:
        mode: The mode.

    Returns:
        The long form; nothing if it needs no score.
    """
    if isinstance(mode, Scored):
        return mode
    if isinstance(mode, Stratified) or mode == "high" or mode == "low":
        return Scored(mode=mode)
    return None


def needs_step_1(mode: Mode) -> bool:
    """Whether a mode needs what step 1 finds, its scores or its network.

    Args:
        mode: The mode.

    Returns:
        Whether it does.
    """
    how = scored(mode)
    return mode in OF_FEATURES if how is None else how.mode != "random"


def is_drophots_own(fit: Any) -> bool:
    """Whether a training loop is drophot's own, with `functools.partial` around it or not.

    Args:
        fit: The loop.

    Returns:
        Whether it is.
    """
    while isinstance(fit, partial):
        fit = fit.func
    return fit is loop.fit


def check(run: Any) -> None:
    """Refuse an unknown mode, or one that does not go with the other settings.

    Args:
        run: Has `mode`, `data_ratio`, `protocol` and `fit`.

    Raises:
        ValueError: If it is.
    """
    mode = run.mode
    words = (*score_selection.WORDS, *OF_FEATURES, *DYNAMIC)
    found = scored(mode) if isinstance(mode, Scored | Stratified) else None
    if found is not None:
        score_selection.check_mode("mode", found.mode, run.data_ratio)
    elif not isinstance(mode, str) or mode not in words:
        raise ValueError(
            f"`mode` should be one of {', '.join(map(repr, words))}, a Stratified() or a Scored(). "
            f"Found {mode!r}."
        )
    if run.protocol == "released" and mode not in ("high", "low", "random"):
        raise ValueError(
            f'`protocol="released"` should choose as the released code does: mode "high", "low" '
            f'or "random". Found {name(run.mode)!r}.'
        )
    if mode in DYNAMIC and not is_drophots_own(run.fit):
        raise ValueError(
            f"`mode={mode!r}` chooses while it trains, and gives weighted batches to drophot's own "
            f"loop. Found a `fit` of your own; leave it out, or iterate the loader in your loop."
        )
