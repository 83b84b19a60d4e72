"""The settings of a run, each declared once with everything that the library needs to know.

A field of :class:`Settings` is the only declaration of a setting. Its metadata, a :class:`Setting`,
says how a value is checked, which stages of a grid depend on it, how a grid varies it, and where
records, file names and tables show it. The constructor of :class:`drophot.DropHot`, the cells and
controls of :class:`drophot.Grid`, the pairing of records in :mod:`drophot.stats` and the columns of
:mod:`drophot.report` are derived from these fields.

To add a setting, add a field here, describe it in the docstring of `Settings`, and use it in the
step that it changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast, get_args

from drophot._core import scalars
from drophot._core.budget import Budget
from drophot._core.importance import Importance, check_importance
from drophot._core.json_values import Json
from drophot._core.mode_names import (
    ADAPTIVE_NAMES,
    BASELINE,
    SAMPLING_MODES,
    SELECTOR_NAMES,
    FeatureMode,
    ModeName,
    ScoreMode,
)
from drophot._core.operator_rules import rules_by_name
from drophot._core.ratios import check_keep_ratio, check_prune_ratio
from drophot._core.setting_checks import check_flag, check_structured, name_or_object, one_of
from drophot._core.setting_declaration import Setting, StageName
from drophot._core.setting_declaration import declare as _declare


class Named(Protocol):
    """An object that records, files and tables call by its name."""

    @property
    def name(self) -> str:
        """Letters, digits, dots, hyphens and underscores."""
        ...


Mode = ModeName | Named
Forgetting = Literal["paper", "toneva"]
Scope = Literal["layer", "global", "erk", "lamp"]
ScheduleName = Literal["one-shot", "gradual", "iterative", "joint"]
ProtocolName = Literal[
    "paper", "released", "released-scores", "released-masks", "released-baseline"
]


def _at_least(least: int) -> Callable[[str, Any], object]:
    return lambda name, value: scalars.integer(name, value, least=least)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a run. Each value is checked, and numbers become plain Python numbers.

    Args:
        data_ratio: The share of training samples **kept**, in (0, 1].
        mode: How these are chosen. `"high"` keeps the samples that are forgotten most often,
            `"low"` those that are forgotten least often, and `"random"` a random subset.
            :class:`drophot.Stratified` covers all scores and :class:`drophot.Scored` uses another
            score or chooses class by class. `"k_center"`, `"facility_location"` and
            `"density_facility_location"` choose by the features of step 1's network. `"crest"`,
            `"fresh_subset"` and `"loss_sampling"` choose while step 3 trains, and
            :class:`drophot.Adaptive` selects again every few epochs by any of the others. Your own
            :class:`drophot.coreset.Selector` works too. See "How to choose a coreset".
        prune_ratio: The share of the prunable weights **removed**, in [0, 1): see
            :func:`drophot.magnitude_prune`. A warning is given if they are not nearly all of the
            matrix weights.
        forgetting: When a sample counts as forgotten. `"paper"` evaluates the model after each
            epoch, and a sample that was never correct scores 0. `"toneva"` uses the logits of the
            training batches, without an extra pass, and a sample that was never correct is the
            hardest.
        protocol: `"paper"` follows the paper's text and `"released"` its released code, with all
            its faults. `"released-scores"`, `"released-masks"` and `"released-baseline"` have one
            fault each. A :class:`drophot.pipeline.RunProtocol` defines your own: see
            :mod:`drophot.pipeline.released_protocol`.
        equal_steps: Train on the coreset for as many steps as `train_epochs` epochs of the full
            training set take.
        reinitialize: Fine-tune the pruned network from new random weights, which shows the value of
            the mask without the weights that it was found with.
        rewind: Fine-tune the pruned network from the weights that step 3 started with, as in the
            lottery ticket hypothesis.
        recalibrate_bn: Recompute the statistics of BatchNorm after pruning.
        repair: Match the activations to those before pruning: see :func:`drophot.prune.repair`.
        schedule: `"one-shot"` prunes once, in step 4. `"gradual"` and `"iterative"` continue in
            step 5, with cubic ratios over its first half or in equal rounds: see
            :mod:`drophot.prune`. `"joint"` prunes in step 3, while the network trains on its
            coreset: with cubic ratios and at equal intervals, before, between and after which it
            trains. Step 4 removes nothing more then. With an :class:`drophot.Adaptive` mode, data
            and weights are selected in turn.
        prunings: How often a schedule prunes. `"gradual"` and `"iterative"` count step 4.
        scope: `"layer"` removes the share from each layer, as the authors did. For the others see
            :func:`drophot.magnitude_prune`.
        structured: Remove channels instead of weights: see :mod:`drophot.structured`. With a
            :class:`drophot.structured.Budget`, the network is pruned to the budget, and
            `prune_ratio` is the largest share that each layer may lose. A `prune_ratio` of 0
            removes nothing then. FLOPs count for one sample; latency cannot be limited.
        importance: A function that gives each weight its importance, for
            :func:`drophot.magnitude_prune` or, with `structured`, for
            :func:`drophot.structured.prune_channels`. The least important are removed. `None` ranks
            by magnitude.
        rules: With `structured`, functions by operator for operators of your own: see
            :func:`drophot.structured.prune_channels`. They are kept by the operators' names.
        score_epochs: Epochs of step 1, on the full training set.
        train_epochs: Epochs of step 3, on the coreset.
        finetune_epochs: Epochs of step 5, on the full training set.
        batch_size: Samples per step.
        seed: The seed of initialization, order and ties; not negative.

    Raises:
        TypeError: If a value is of the wrong kind.
        ValueError: If a value is out of range, or two values cannot be combined.

    Example:
        >>> settings = Settings(data_ratio=0.5, mode="high", prune_ratio=0.8)
        >>> settings.schedule, settings.seed
        ('one-shot', 0)
    """

    mode: Mode = field(
        metadata=_declare(
            check=name_or_object(
                (*get_args(ScoreMode), *get_args(FeatureMode), *SAMPLING_MODES),
                "a selector such as Stratified(), Scored() or your own, or an Adaptive()",
                reserved=f"{BASELINE}|{SELECTOR_NAMES}|{ADAPTIVE_NAMES}",
            ),
            stage="train",
            varies=True,
            record_field="mode",
            file_part=lambda mode: name_of(mode),
        )
    )
    data_ratio: float = field(
        metadata=_declare(
            check=check_keep_ratio,
            stage="train",
            varies=True,
            record_field="keep_ratio",
            file_part=lambda ratio: f"keep{ratio}",
        )
    )
    prune_ratio: float = field(
        metadata=_declare(
            check=check_prune_ratio,
            stage="finetune",
            varies=True,
            record_field="prune_ratio",
            file_part=lambda ratio: f"prune{ratio}",
        )
    )
    forgetting: Forgetting = field(
        default="paper",
        metadata=_declare(check=one_of(*get_args(Forgetting)), stage="score", scoring_only=True),
    )
    protocol: ProtocolName | Named = field(
        default="paper",
        metadata=_declare(
            check=name_or_object(get_args(ProtocolName), "a RunProtocol", reserved=BASELINE),
            stage="score",
            record_field="protocol",
            heading="protocol",
        ),
    )
    equal_steps: bool = field(
        default=False,
        metadata=_declare(
            check=check_flag,
            stage="train",
            varies=True,
            record_field="equal_steps",
            heading="steps",
            words={True: "equal", False: "fewer"},
            controls={"equal_steps": True},
            file_part=lambda on: "equal" * on,
        ),
    )
    reinitialize: bool = field(
        default=False,
        metadata=_declare(
            check=check_flag,
            stage="finetune",
            varies=True,
            record_field="reinitialized",
            heading="weights",
            words={True: "new", False: "trained"},
            controls={"reinitialize": True},
            file_part=lambda on: "new" * on,
        ),
    )
    rewind: bool = field(
        default=False,
        metadata=_declare(
            check=check_flag,
            stage="finetune",
            varies=True,
            record_field="rewound",
            heading="start",
            words={True: "rewound", False: "kept"},
            controls={"rewind": True},
            file_part=lambda on: "rewound" * on,
        ),
    )
    recalibrate_bn: bool = field(
        default=False,
        metadata=_declare(
            check=check_flag,
            stage="finetune",
            varies=True,
            record_field="recalibrated",
            heading="BatchNorm",
            words={True: "recalibrated", False: "as trained"},
            controls={"recalibrate_bn": True},
            file_part=lambda on: "bn" * on,
        ),
    )
    repair: bool = field(
        default=False,
        metadata=_declare(
            check=check_flag,
            stage="finetune",
            varies=True,
            heading="activations",
            words={True: "repaired", False: "as pruned"},
            controls={"repair": True},
            file_part=lambda on: "repaired" * on,
            optional=True,
        ),
    )
    schedule: ScheduleName = field(
        default="one-shot",
        metadata=_declare(
            check=one_of(*get_args(ScheduleName)),
            stage="finetune",
            varies=True,
            record_field="schedule",
            heading="schedule",
            controls={"gradual": "gradual", "iterative": "iterative", "joint": "joint"},
            file_part=lambda schedule: "" if schedule == "one-shot" else schedule,
        ),
    )
    prunings: int = field(default=5, metadata=_declare(check=_at_least(1), stage="finetune"))
    scope: Scope = field(
        default="layer",
        metadata=_declare(
            check=one_of(*get_args(Scope)), stage="finetune", record_field="scope", heading="scope"
        ),
    )
    structured: bool | Budget = field(
        default=False,
        metadata=_declare(
            check=check_structured,
            stage="finetune",
            record_field="structured",
            heading="removed are",
            words={True: "channels", False: "weights"},
        ),
    )
    importance: Importance | None = field(
        default=None, metadata=_declare(check=check_importance, stage="finetune", optional=True)
    )
    rules: Mapping[Any, Callable[..., None]] | None = field(
        default=None, metadata=_declare(check=rules_by_name, stage="finetune", optional=True)
    )
    score_epochs: int = field(
        default=10, metadata=_declare(check=_at_least(1), stage="score", scoring_only=True)
    )
    train_epochs: int = field(default=10, metadata=_declare(check=_at_least(0), stage="train"))
    finetune_epochs: int = field(
        default=10, metadata=_declare(check=_at_least(0), stage="finetune")
    )
    batch_size: int = field(default=64, metadata=_declare(check=_at_least(1), stage="score"))
    seed: int = field(
        default=0,
        metadata=_declare(
            check=_at_least(0),
            stage="score",
            varies=True,
            record_field="seed",
            file_part=lambda seed: f"seed{seed}",
        ),
    )

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            object.__setattr__(self, name, setting.check(name, getattr(self, name)))
        scheduled = self.schedule != "one-shot"
        unfinished = scheduled and self.schedule != "joint"  # when fine-tuning starts
        schedule = f"schedule={self.schedule!r}"
        for name, other, given, why in (
            ("rewind", "reinitialize=True", self.reinitialize, _START),
            ("repair", "recalibrate_bn=True", self.recalibrate_bn, _BOTH),
            ("repair", schedule, self.schedule == "joint", _NO_DENSE),
            ("rewind", schedule, unfinished, _MASK),
            ("reinitialize", schedule, unfinished, _MASK),
            ("structured", schedule, scheduled, "channels are removed in one shot"),
            ("structured", "rewind=True", self.rewind, _NO_MASK),
            ("structured", "reinitialize=True", self.reinitialize, _NO_MASK),
            ("structured", f"scope={self.scope!r}", self.scope != "layer", "it has its own rule"),
        ):
            if getattr(self, name) and given:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` cannot be combined with `{other}`: {why}. "
                    f"Remove one of them."
                )
        if self.repair and self.batch_size == 1:
            raise ValueError(
                "`repair=True` needs `batch_size` of at least 2, since one sample has no variance, "
                "got 1. Raise `batch_size`, or remove `repair`."
            )
        if self.rules and not self.structured:
            raise ValueError(
                f"`rules` can only be used with `structured=True`, got rules for "
                f"{', '.join(self.rules)}. Remove them, or set `structured`."
            )


_START = "fine-tuning starts either from the first weights or from new ones"
_BOTH = "it corrects the outputs of BatchNorm too"
_MASK = "the mask of a schedule is not final when fine-tuning starts"
_NO_DENSE = "there is no network before pruning with the same training"
_NO_MASK = "removed channels leave no mask to put other weights under"

SETTINGS: Mapping[str, Setting] = MappingProxyType({
    one.name: one.metadata["setting"] for one in fields(Settings)
})
"""Every setting by its name, in the order of their declaration."""

DEFAULTS: Mapping[str, object] = MappingProxyType({
    one.name: one.default for one in fields(Settings) if one.default is not MISSING
})
"""The defaults of the settings that have one."""

STAGES: tuple[StageName, ...] = get_args(StageName)
"""The stages of a grid, in their order."""

CONTROLS: Mapping[str, tuple[str, object]] = MappingProxyType({
    control: (name, value)
    for name, setting in SETTINGS.items()
    for control, value in setting.controls.items()
})
"""The controls of a grid: the setting that each changes, and the value that it sets."""

RECORD_FIELDS: Mapping[str, str] = MappingProxyType({
    name: setting.record_field for name, setting in SETTINGS.items() if setting.record_field
})
"""The fields of a `Record` that hold a setting, by the setting's name."""

SCORING_ONLY: frozenset[str] = frozenset(
    name for name, setting in SETTINGS.items() if setting.scoring_only
)
"""The settings that only step 1 depends on."""


def name_of(value: str | Named) -> str:
    """The name of a mode or a protocol in records, files and tables."""
    return value if isinstance(value, str) else value.name


def needs_scoring(mode: str | Named) -> bool:
    """Whether a mode selects by a result of step 1."""
    needs = getattr(mode, "needs", None)
    if needs is None:  # a name, which says nothing about a user's own selector
        name = name_of(mode)
        return name not in _WITHOUT_SCORING and not re.match(r"adaptive\d+-", name)
    return not {"scores", "confidence", "model"}.isdisjoint(needs)


_WITHOUT_SCORING = {BASELINE, "random", "random-balanced", *SAMPLING_MODES}


def varying(stage: StageName = "finetune") -> list[str]:
    """The settings that cells may differ in and that results up to a stage depend on, by stage."""
    reached = STAGES[: STAGES.index(stage) + 1]
    return [
        name
        for one in reached
        for name, setting in SETTINGS.items()
        if setting.varies and setting.stage == one
    ]


def file_part(name: str, value: object) -> str:
    """The part of a stage's file name for the value of a setting; empty for most defaults."""
    setting = SETTINGS[name]
    if setting.file_part is not None:
        return setting.file_part(value)
    return "" if name in DEFAULTS and value == DEFAULTS[name] else f"{name}{value}"


def with_defaults(configuration: Mapping[str, Json]) -> dict[str, Json]:
    """Add the optional settings that a configuration leaves out, at their defaults."""
    added = {name: DEFAULTS[name] for name, setting in SETTINGS.items() if setting.optional}
    return cast("dict[str, Json]", added | dict(configuration))
