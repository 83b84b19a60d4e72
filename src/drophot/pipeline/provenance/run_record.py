"""The configuration and the record of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from drophot._core.budget import Budget
from drophot._core.importance import importance_name
from drophot._core.json_values import Json
from drophot._core.mode_names import BASELINE
from drophot.pipeline.config import RunConfig
from drophot.pipeline.provenance.callables import factory_name
from drophot.pipeline.provenance.environment import device_name, versions
from drophot.pipeline.provenance.own_objects import described
from drophot.pipeline.provenance.torch_settings import changed_switches
from drophot.pipeline.pruning_steps import FinetunedModel
from drophot.records.coreset_text import to_text
from drophot.records.record import Record, fingerprint
from drophot.settings.names import name_of
from drophot.settings.tables import DEFAULTS, RECORD_FIELDS, SETTINGS

USUAL_STEPS = ("train", "prune", "finetune")
"""The steps that make the model of a record."""


def configuration(config: RunConfig) -> dict[str, Json]:
    """Everything that a record depends on, as JSON can hold it."""
    settings = {
        name: described(getattr(config.settings, name))
        for name, setting in SETTINGS.items()
        if not (setting.optional and getattr(config.settings, name) == DEFAULTS[name])
    }
    return {
        **config.experiment.description,
        **settings,
        "cache": config.cache,
        "ambient": changed_switches(config.device),
    }


def record_of(
    config: RunConfig,
    *,
    indices: Tensor,
    trained_accuracy: float,
    pruned_accuracy: float,
    finetuned: FinetunedModel,
    seconds: Mapping[str, float],
    steps: Sequence[str] = USUAL_STEPS,
) -> Record:
    """The record of a run whose model was made by some steps."""
    held = configuration(config)
    if tuple(steps) != USUAL_STEPS:
        held["steps_taken"] = [*steps]
    whole = json.loads(json.dumps(held))  # equal to what is read from a file
    settings = {name: value for name, value in whole.items() if name != "seed"}
    asked = config.settings
    size = config.num_kept if config.selector is None else len(indices)
    model = finetuned.model
    fields = {field: _plain(name, getattr(asked, name)) for name, field in RECORD_FIELDS.items()}
    coreset = ""
    if size == config.num_samples:
        fields["mode"] = BASELINE
    elif config.selector is not None:
        coreset = to_text(indices.cpu().numpy(), config.num_samples)
    return Record(
        **fields,
        model=factory_name(config.factory, model),
        num_kept=size,
        trained_accuracy=trained_accuracy,
        pruned_accuracy=pruned_accuracy,
        finetuned_accuracy=finetuned.accuracy,
        finetune_curve=finetuned.curve,
        sparsity=finetuned.sparsity,
        seconds=dict(seconds),
        device=device_name(config.device),
        versions=versions(),
        fingerprint=fingerprint(whole),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        settings=settings,
        cell=fingerprint(settings),
        test_samples=config.num_test_samples,
        coreset=coreset,
    )


def _plain(name: str, value: Any) -> Any:
    if name == "importance":
        return importance_name(value)
    if isinstance(value, Budget):
        return True  # the budget is in `settings`
    return value if isinstance(value, bool | int | float | str) else name_of(value)
