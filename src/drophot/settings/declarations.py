"""The declarations of the settings of a run: the fields of `Settings`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from drophot._core import scalars
from drophot._core.budget import Budget
from drophot._core.importance import RunImportance, check_run_importance, importance_name
from drophot._core.mode_names import (
    ADAPTIVE_NAMES,
    BASELINE,
    SAMPLING_MODES,
    SELECTOR_NAMES,
    FeatureMode,
    ScoreMode,
)
from drophot._core.operator_rules import rules_by_name
from drophot._core.ratios import check_keep_ratio, check_prune_ratio
from drophot._core.setting_checks import check_flag, check_structured, name_or_object, one_of
from drophot._core.setting_declaration import Setting
from drophot._core.setting_declaration import declare as _declare
from drophot.settings.combinations import check_combinations
from drophot.settings.names import Mode, Named, name_of

Forgetting = Literal["paper", "toneva"]
Scope = Literal["layer", "global", "erk", "lamp"]
ScheduleName = Literal["one-shot", "gradual", "iterative", "joint"]
ProtocolName = Literal[
    "paper", "released", "released-scores", "released-masks", "released-baseline"
]


def _at_least(least: int) -> Callable[[str, Any], object]:
    return lambda name, value: scalars.integer(name, value, least=least)


def _importance_part(importance: RunImportance) -> str:
    """A function may have a name that no file can have, such as "<lambda>"."""
    if importance is None:
        return ""
    return "importance-" + re.sub(r"[^A-Za-z0-9._-]+", "_", importance_name(importance))


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
            by magnitude. A :class:`drophot.prune.importances.FromBatches` is computed from the
            trained network.
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
            file_part=name_of,
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
    importance: RunImportance = field(
        default=None,
        metadata=_declare(
            check=check_run_importance,
            stage="finetune",
            varies=True,
            record_field="importance",
            heading="importance",
            file_part=_importance_part,
            optional=True,
        ),
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
        for one in fields(Settings):  # a subclass has other fields, too
            setting: Setting = one.metadata["setting"]
            object.__setattr__(self, one.name, setting.check(one.name, getattr(self, one.name)))
        check_combinations(self)
