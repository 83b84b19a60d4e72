"""The stages of a grid: what is computed once, and which stage it continues from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from drophot._core.mode_names import BASELINE
from drophot._core.setting_declaration import StageName
from drophot.settings.declarations import Settings
from drophot.settings.names import needs_scoring
from drophot.settings.tables import file_part, varying
from drophot.tracking.statistics import Score

RunSettings = Mapping[str, object]
"""The settings of a run in which it may differ from the others, by name."""

BASELINE_RUN: RunSettings = {"mode": BASELINE, "data_ratio": 1.0}
"""The mode and the ratio of a run that keeps all samples."""


_LONGEST_NAME = 200  # of at most 255 bytes, with room for suffixes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A scoring, training or fine-tuning that all runs with the same settings up to it share.

    Stages are equal if their names are.
    """

    name: str
    """The stage's file in a store."""
    kind: StageName = field(compare=False)
    settings: Settings = field(compare=False)
    """The settings of the run that computes the stage."""
    predecessor: Stage | None = field(compare=False, repr=False)
    """The stage whose result this one continues from."""
    scores: Sequence[Score] = field(default=(), compare=False, repr=False)
    """The user's own scores that a scoring follows."""

    @property
    def epochs(self) -> float:
        """The passes over the full training set that the stage trains for."""
        if self.kind == "score":
            return self.settings.score_epochs
        if self.kind == "finetune":
            return self.settings.finetune_epochs
        share = 1 if self.settings.equal_steps else self.settings.data_ratio
        return self.settings.train_epochs * share


def stage_of(
    run: RunSettings,
    settings: Settings,
    scores: Sequence[Score] = (),
    kind: StageName = "finetune",
) -> Stage:
    """A stage of a run, with its predecessors.

    Args:
        run: The settings of the run.
        settings: Those of the pipeline, which hold for what the run does not name.
        scores: The user's own scores that the modes of the grid select by.
        kind: Which stage.
    """
    names = varying(kind)
    joint = run.get("schedule", settings.schedule) == "joint"
    if joint and kind == "train":  # it prunes, too
        names += ["schedule", "prune_ratio", "importance"]
    values = {name: run.get(name, getattr(settings, name)) for name in names}
    parts = [kind, *(file_part(name, value) for name, value in values.items())]
    is_baseline = run.get("mode") == BASELINE
    if kind == "score":
        parts += [score.name for score in scores]
    if kind == "score" or is_baseline:
        values["mode"] = "random"  # a scoring serves all modes, and a baseline keeps all samples
    own = replace(settings, **values)
    before: StageName | None = None
    if kind == "finetune":
        scored = is_baseline and scoring_is_baseline(settings) and not joint
        before = "score" if scored else "train"
    elif kind == "train" and not is_baseline and needs_scoring(own.mode):
        before = "score"
    return Stage(
        name=_file_name("-".join(filter(None, parts)), ".json" if kind == "finetune" else ".pt"),
        kind=kind,
        settings=own,
        predecessor=None if before is None else stage_of(run, settings, scores, before),
        scores=tuple(scores) if kind == "score" else (),
    )


def _file_name(name: str, suffix: str) -> str:
    """A file name of a length that every file system allows."""
    if len(name) > _LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        name = f"{name[: _LONGEST_NAME - 17]}-{digest}"
    return name + suffix


def scoring_is_baseline(settings: Settings) -> bool:
    """Whether the network of step 1 is the one that training on everything gives, to the bit."""
    return settings.score_epochs == settings.train_epochs


def to_compute(
    last: Iterable[Stage], is_stored: Callable[[Stage], bool]
) -> dict[Stage, Stage | None]:
    """The stages to compute for the last stages of some runs.

    Args:
        last: The last stage of each run.
        is_stored: Whether the result of a stage is there; asked once for each stage.

    Returns:
        The stages in an order in which they can be computed, each with the one among them that it
        has to wait for.
    """
    todo: dict[Stage, Stage | None] = {}
    stored: set[Stage] = set()

    def is_missing(stage: Stage) -> bool:
        if stage in todo or stage in stored:
            return stage in todo
        if is_stored(stage):
            stored.add(stage)
            return False
        before = stage.predecessor
        todo[stage] = before if before is not None and is_missing(before) else None
        return True

    for stage in last:
        is_missing(stage)
    return todo
