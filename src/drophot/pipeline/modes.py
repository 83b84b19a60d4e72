"""The modes of a run: the selector that chooses the samples of step 3, and its needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from torch import Tensor

from drophot._core import scalars
from drophot._core.mode_names import SAMPLING_MODES
from drophot.coreset.beta_sampling import Beta
from drophot.coreset.builtin_selectors import ByScore, Random, selector_by_name
from drophot.coreset.selectors import Evidence, Selector, check_selector, is_selector
from drophot.coreset.stratified import Stratified, check_cutoff
from drophot.sampling.adaptive_subset import check_repeatable
from drophot.settings.names import Mode, Named, name_of
from drophot.settings.tables import SETTINGS
from drophot.tracking.accumulators import Accumulator
from drophot.tracking.statistics import (
    BUILT_IN,
    HardEnd,
    Score,
    Statistic,
    check_score,
    is_builtin_score,
)


@dataclass(frozen=True, slots=True)
class Scored:
    """Select by a score of step 1, from either end, and optionally class by class.

    It is a mode of a run or a grid. `"high"` is `Scored("forgetting", "high")`.

    Args:
        statistic: The score: `"forgetting"`, as the run's setting of that name defines it, another
            one of :class:`drophot.DynamicsTracker`, or your own :class:`drophot.tracking.Score`,
            which step 1 then follows. All are taken over the same presentations.
        mode: `"high"` keeps the samples with the largest values and `"low"` those with the
            smallest, whichever of them are the hard ones (`hard_end` of the score tells).
            :class:`drophot.Stratified` covers all values, and its `hard` has to equal the
            `hard_end` of your own score. A :class:`drophot.coreset.Beta` draws by the scores and
            the confidences of step 1. `"random"` needs no score: with `balanced` it is the
            control of all balanced modes.
        balanced: Whether each class keeps its share.

    Raises:
        TypeError: If the statistic is neither a name nor a score.
        ValueError: If the statistic or the mode is unknown, the name or the hard end of a score
            cannot be used, or the ends differ.

    Example:
        >>> from drophot import Stratified
        >>> Scored("el2n", balanced=True).name
        'el2n-high-balanced'
        >>> Scored("aum", Stratified(hard="low", cutoff=0.1)).name
        'aum-stratified-cutoff0.1-low'
        >>> Scored(mode="random", balanced=True).name
        'random-balanced'
        >>> from drophot.coreset import Beta
        >>> from drophot.tracking import DUAL
        >>> Scored(DUAL(window=5), Beta(), balanced=True).name
        'dual-beta-balanced'
    """

    statistic: Statistic | Score = "forgetting"
    mode: Literal["high", "low", "random"] | Stratified | Beta = "high"
    balanced: bool = False

    def __post_init__(self) -> None:
        check_statistic(self.statistic)
        mode, statistic = self.mode, self.statistic
        if isinstance(mode, Stratified):
            if not isinstance(statistic, str) and mode.hard != statistic.hard_end:
                raise ValueError(
                    f"`mode` has hard={mode.hard!r}, but the hard samples of score "
                    f"{statistic.name!r} are those with {statistic.hard_end} values. Pass "
                    f"Stratified(hard={statistic.hard_end!r})."
                )
        elif isinstance(mode, Beta):
            if _hard_end(statistic) != "high":
                raise ValueError(
                    f"`statistic` must be high for hard samples if `mode` is a Beta(), got "
                    f"{self.statistic_name!r}. Use a DUAL()."
                )
        elif mode not in ("high", "low", "random"):
            raise ValueError(
                f'`mode` must be "high", "low", "random", a Stratified() or a Beta(), got {mode!r}.'
            )
        if is_builtin_score(statistic):  # its name says everything about it
            object.__setattr__(self, "statistic", self.statistic_name)

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The mode's name in records, files and tables."""
        selector = self._selector
        if isinstance(selector, Random):
            return selector.name
        return f"{self.statistic_name}-{selector.name}"

    @property
    def statistic_name(self) -> str:
        """The name of the score."""
        return self.statistic if isinstance(self.statistic, str) else self.statistic.name

    @property
    def needs(self) -> tuple[str, ...]:
        """What `select` needs: the scores, for a Beta the confidences, balanced the targets."""
        return tuple(self._selector.needs)

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        """Keep a share of the samples: see :class:`drophot.coreset.Selector`.

        Args:
            ratio: The share **kept**, in (0, 1].
            evidence: Holds what `needs` names.
            seed: Breaks ties and draws.

        Returns:
            The positions of the kept samples, int64, shape `(K,)`.
        """
        return self._selector.select(ratio, evidence, seed)

    @property
    def _selector(self) -> ByScore | Random | Stratified | Beta:
        if isinstance(self.mode, Stratified | Beta):
            return replace(self.mode, balanced=self.balanced or self.mode.balanced)
        if self.mode == "random":
            return Random(balanced=self.balanced)
        return ByScore(self.mode, balanced=self.balanced)


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Select again every few epochs while step 3 trains, from the model as it is.

    It is a mode of a run or a grid, and uses no result of step 1. The first selection is random.
    See :class:`drophot.AdaptiveSubset`, which does the same in any training loop. Compare it with
    `"fresh_subset"`, at equal steps. `Adaptive("random", every=5)` is the control that changes its
    samples equally often. `"crest"` is a mode that reselects already; `"facility_location"` selects
    the medoids of the same features among all samples.

    Args:
        mode: What selects: `"high"`, `"low"`, `"random"`, `"k_center"`, `"facility_location"`,
            `"density_facility_location"`, a :class:`drophot.Stratified`, a :class:`Scored` or your
            own :class:`drophot.coreset.Selector`.
        every: The number of epochs between two selections. An epoch is a pass over the selected
            samples, also if the run takes equal steps, and is shorter the fewer are kept. If step 3
            takes no more epochs than that, there is one random selection only and `mode` is never
            used: a run refuses such a mode.

    Raises:
        TypeError: If `every` is not an integer, or `mode` is not a selector.
        ValueError: If `every` is less than 1, or `mode` is unknown, selects while step 3 trains
            already, or needs several presentations of each sample.

    Example:
        >>> Adaptive("high", every=5).name
        'adaptive5-high'
        >>> Adaptive(Scored("el2n", balanced=True), every=2).name
        'adaptive2-el2n-high-balanced'
    """

    mode: Mode
    every: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", SETTINGS["mode"].check("mode", self.mode))
        object.__setattr__(self, "every", scalars.integer("every", self.every, least=1))
        if (selector := selector_of(self.mode)) is None:
            medoids = ' For medoids of gradients every few epochs, pass "facility_location".'
            raise ValueError(
                f"`mode` must select once, so that it can be repeated, got "
                f"{name_of(self.mode)!r}, which selects while step 3 trains already. Pass it as "
                f"the mode of the run.{medoids if self.mode == 'crest' else ''}"
            )
        check_repeatable(selector)

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The mode's name in records, files and tables."""
        return f"adaptive{self.every}-{name_of(self.mode)}"

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs of step 1: nothing."""
        return ()

    @property
    def selector(self) -> Selector:
        """The selector that is used at each selection."""
        return cast("Selector", selector_of(self.mode))


def _hard_end(statistic: Statistic | Score) -> HardEnd:
    if statistic == "forgetting":
        return "high"
    return (BUILT_IN[statistic] if isinstance(statistic, str) else statistic).hard_end


def check_statistic(statistic: object) -> None:
    """Check that a score is one of step 1, or one that step 1 can follow."""
    if isinstance(statistic, str):
        if statistic not in get_args(Statistic):
            raise ValueError(
                f"`statistic` must be one of {', '.join(map(repr, get_args(Statistic)))}, or an "
                f"object with `name`, `hard_end` and a call, got {statistic!r}."
            )
    elif isinstance(statistic, type) or not isinstance(statistic, Score):
        raise TypeError(
            f"`statistic` must be the name of a score, or an object with `name`, `hard_end` and a "
            f"call, got {statistic!r}. See drophot.tracking.Score."
        )
    else:
        check_score(statistic)


def selector_of(mode: Mode) -> Selector | None:
    """The selector of a mode; `None` for a mode that chooses while step 3 trains."""
    if isinstance(mode, str):
        return None if mode in SAMPLING_MODES else selector_by_name(mode)
    return None if isinstance(mode, Adaptive) else _as_selector(mode)


def _as_selector(mode: Named) -> Selector:
    if not is_selector(mode):
        raise TypeError(
            f"`mode` must be a name or a selector, an object with `name`, `needs` and `select`, "
            f"got {mode!r}. See drophot.coreset.Selector."
        )
    selector: Selector = mode  # pyright: ignore[reportAssignmentType] # just checked
    check_selector("mode", selector)
    return selector


def statistic_of(mode: Mode) -> Statistic | Score | None:
    """The score of step 1 that a mode selects by, if it needs one.

    That is the attribute `statistic` of its selector, and without one the forgetting events.
    """
    selector = selector_of(mode)
    if selector is None or "scores" not in selector.needs:
        return None
    statistic: Statistic | Score = getattr(selector, "statistic", "forgetting")
    return statistic


def own_score_of(mode: Mode) -> Score | None:
    """The user's score that step 1 has to track for a mode, if any."""
    score = statistic_of(mode)
    if score is None or isinstance(score, str):
        return None
    return None if is_builtin_score(score) else score


def as_scored(mode: Mode) -> Scored | None:
    """The long form of a built-in mode that selects by a score; `None` for any other mode."""
    if isinstance(mode, Scored):
        return mode
    if isinstance(mode, str):
        return Scored(mode=mode) if mode == "high" or mode == "low" else None
    if isinstance(mode, Stratified):
        return Scored(mode=mode)
    if isinstance(mode, ByScore):
        return Scored(mode=mode.end, balanced=mode.balanced)
    return None


def check_presentations(mode: Mode, score_epochs: int) -> None:
    """Refuse a score that needs each sample more often than step 1 presents it."""
    statistic = statistic_of(mode)
    if isinstance(statistic, Accumulator) and statistic.num_needed > score_epochs:
        raise ValueError(
            f"`score_epochs` must be at least {statistic.num_needed}, the presentations of each "
            f"sample that the score {statistic.name!r} of mode {name_of(mode)!r} needs, got "
            f"{score_epochs}. Raise `score_epochs` or lower `window` of the score."
        )


def check_mode(mode: Mode, ratio: float) -> None:
    """Check that a mode has a selector that can keep a share of the samples."""
    if isinstance(mode, Adaptive):
        mode = mode.mode
    statistic = statistic_of(mode)
    if statistic is not None:
        check_statistic(statistic)
    inner = mode.mode if isinstance(mode, Scored) else mode
    if isinstance(inner, Stratified):
        check_cutoff(inner, ratio)
