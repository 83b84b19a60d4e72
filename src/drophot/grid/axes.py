"""The values that a grid combines, checked, and the runs that they make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from drophot._core.importance import RunImportance, importance_name
from drophot._core.ratios import num_kept
from drophot._core.user_warnings import warn
from drophot.grid.stages import BASELINE_RUN, RunSettings
from drophot.pipeline import modes as pipeline_modes
from drophot.pipeline.config import RunConfig
from drophot.pipeline.preflight import with_settings
from drophot.pipeline.step_3_batches import selects_again
from drophot.settings.names import Mode, name_of
from drophot.settings.tables import CONTROLS, SETTINGS, file_part
from drophot.tracking.statistics import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The values of each setting that a grid varies."""

    data_ratios: list[float]
    modes: list[Mode]
    prune_ratios: list[float]
    importances: list[RunImportance]
    seeds: list[int]
    controls: list[str]
    coresets: list[RunSettings] = field(default_factory=list[RunSettings])
    """The settings of each coreset and its training, by data ratio and mode."""

    @property
    def training_changes(self) -> list[RunSettings]:
        """The settings of the controls that change scoring or training, and of no control."""
        return [{}, *self._changes(of_training=True)]

    @property
    def pruning_changes(self) -> list[RunSettings]:
        """The settings of the controls that change what follows training, and of no control."""
        return [{}, *self._changes(of_training=False)]

    def _changes(self, *, of_training: bool) -> list[RunSettings]:
        changes = [CONTROLS[control] for control in self.controls]
        return [
            {name: value}
            for name, value in changes
            if (SETTINGS[name].stage != "finetune") == of_training
        ]

    @property
    def own_scores(self) -> list[Score]:
        """The user's own scores that the modes select by, which one scoring follows together."""
        scores = [pipeline_modes.own_score_of(mode) for mode in self.modes]
        return list({score.name: score for score in scores if score is not None}.values())

    def runs(self) -> Iterator[RunSettings]:
        """The runs by seed, baseline first, data ratio, mode, prune ratio and importance."""
        coresets = [BASELINE_RUN, *self.coresets]
        dense = [] if 0.0 in self.prune_ratios else [0.0]  # the dense baseline is always a run
        for seed, coreset in product(self.seeds, coresets):
            for ratio in (dense if coreset is BASELINE_RUN else []) + self.prune_ratios:
                # Nothing is ranked for a ratio of 0, so that every grid has the same dense runs.
                dense_pruning = [(None, self.pruning_changes[0])]
                prunings = product(self.importances, self.pruning_changes)
                for importance, change in prunings if ratio > 0 else dense_pruning:
                    pruning = {"prune_ratio": ratio, "importance": importance, **change}
                    yield {"seed": seed, **coreset, **pruning}


def checked_axes(
    config: RunConfig,
    *,
    data_ratios: Iterable[float],
    modes: Iterable[Mode],
    prune_ratios: Iterable[float],
    importances: Iterable[RunImportance] | None,
    seeds: Iterable[int],
    controls: Iterable[str],
) -> Axes:
    """Check the values of each axis, and that a run can combine them.

    Raises:
        TypeError: If an argument is not a list, or a value is of the wrong kind.
        ValueError: If a list is empty, holds a value twice or one that is out of range, or two
            values cannot be combined.
    """
    for control, (name, value) in CONTROLS.items():
        if getattr(config.settings, name) == value:
            raise ValueError(
                f"`pipeline` must leave its controls to the grid, got {name}={value!r}. Pass "
                f"controls=[{control!r}] to the grid, which compares it with the run without."
            )
    # Each value is tried with others that fit any value; combinations are tried below.
    neutral = with_settings(config, mode="random", data_ratio=1.0)
    controls = list(controls)
    equal = {"equal_steps": True} if "equal_steps" in controls else {}
    ratios = _checked("data_ratios", data_ratios, neutral)
    removed = _checked("prune_ratios", prune_ratios, config)
    pruned = with_settings(config, prune_ratio=max(removed))
    given = [config.settings.importance] if importances is None else importances
    axes = Axes(
        data_ratios=ratios,
        modes=_checked("modes", modes, with_settings(neutral, data_ratio=min(ratios), **equal)),
        prune_ratios=removed,
        importances=_checked("importances", given, pruned),
        seeds=_checked("seeds", seeds, config),
        controls=controls,
    )
    for control in axes.controls:
        if control not in CONTROLS:
            choices = ", ".join(f'"{name}"' for name in CONTROLS)
            raise ValueError(f"`controls` must be of {choices}, got {control!r}.")
    _check_scores(axes.modes)
    _check_sizes(axes.data_ratios, config.num_samples)
    coresets = _checked_coresets(config, axes)
    for ratio, importance, control in product(removed, axes.importances, axes.controls):
        name, value = CONTROLS[control]
        # The smallest coreset, whose steps may be too few for a schedule.
        own = {"data_ratio": min(ratios), "prune_ratio": ratio, "importance": importance}
        with_settings(config, **own, **{name: value})
    return replace(axes, coresets=coresets)


def _checked_coresets(config: RunConfig, axes: Axes) -> list[RunSettings]:
    """The coresets and their trainings, without those too short for an `Adaptive` mode.

    A ratio and a mode that no control trains for long enough are refused.
    """
    found: list[RunSettings] = []
    left_out: dict[str, None] = {}
    for ratio, mode in product(axes.data_ratios, axes.modes):
        runs: list[RunSettings] = [
            {"mode": mode, "data_ratio": ratio, **change} for change in axes.training_changes
        ]
        long_enough = [run for run in runs if selects_again(config.replace(**run))]
        for run in long_enough or runs[-1:]:
            changed = with_settings(config, **run)
            if "scores" in changed.needs:
                pipeline_modes.check_presentations(mode, changed.settings.score_epochs)
        if len(long_enough) < len(runs):
            left_out[name_of(mode)] = None
        found += long_enough
    if left_out:
        warn(
            f"The grid runs {', '.join(map(repr, left_out))} only with `equal_steps`: in the "
            f"{config.settings.train_epochs} epochs of `train_epochs`, the only selection would be "
            f"random. To have the other runs, lower `every` or raise `train_epochs`."
        )
    return found


def _checked(name: str, values: Iterable[Any], config: RunConfig) -> list[Any]:
    """The values of one axis as the settings of a run hold them."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"`{name}` must be a list, got {values!r}. Pass [{values!r}].")
    found = list(values)
    if not found:
        raise ValueError(f"`{name}` must have at least one value, got none.")
    setting = name.removesuffix("s")
    for position, value in enumerate(found):
        try:  # the settings convert numbers to plain ones
            changed = with_settings(config, **{setting: value}).settings
            value = found[position] = getattr(changed, setting)
        except (ValueError, TypeError) as error:
            error.add_note(f"The value is in `{name}`.")
            raise
        if any(_same(name, value, earlier) for earlier in found[:position]):
            raise ValueError(f"`{name}` must hold each value once, got {value!r} twice.")
        if name == "importances":
            for earlier in found[:position]:
                _check_names(earlier, value)
    return found


def _check_names(importance: RunImportance, other: RunImportance) -> None:
    """Refuse two importances that records or the files of a store could not tell apart."""
    names = importance_name(importance), importance_name(other)
    if names[0] == names[1]:
        got = f"two of {names[0]!r}"
    elif file_part("importance", importance) == file_part("importance", other):
        got = f"{names[0]!r} and {names[1]!r}, which give the same file name"
    else:
        return
    raise ValueError(
        f"`importances` must have different names, got {got}. The name is that of the function or "
        f"class, and `None` is named 'magnitude'. Rename one of them, or call it in a function of "
        f"another name."
    )


def _same(name: str, value: Any, other: Any) -> bool:
    """Whether two values of an axis are the same: modes by name or meaning."""
    if name == "importances":
        return value is other
    if name != "modes":
        return value == other
    long = pipeline_modes.as_scored(value)
    same = long is not None and long == pipeline_modes.as_scored(other)
    return same or name_of(value) == name_of(other)


def _check_scores(modes: Iterable[Mode]) -> None:
    """Refuse two scores of one name, which one scoring could not follow together."""
    scores: dict[str, Score] = {}
    for mode in modes:
        score = pipeline_modes.own_score_of(mode)
        if score is not None and scores.setdefault(score.name, score) != score:
            raise ValueError(
                f"`modes` must not select by two scores of one name, got two of {score.name!r}. "
                f"Rename one, or pass the same object to both modes."
            )


def _check_sizes(data_ratios: Sequence[float], total: int) -> None:
    """Refuse a ratio that keeps all samples, and two ratios that keep the same number."""
    ratios: dict[int, float] = {}
    for ratio in data_ratios:
        size = num_kept(total, ratio)
        if size == total:
            raise ValueError(
                f"`data_ratios` must each leave out a sample, got {ratio:g}, which keeps {size} of "
                f"{total}. That is the baseline, which is always computed. Remove {ratio:g}."
            )
        if size in ratios:
            raise ValueError(
                f"`data_ratios` must each keep a different number of samples, got "
                f"{ratios[size]:g} and {ratio:g}, which both keep {size} of {total}. Remove one "
                f"of them."
            )
        ratios[size] = ratio
