"""The record of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from drophot import modes
from drophot._core.ratios import kept
from drophot.pipeline.provenance.callables import factory_name
from drophot.pipeline.provenance.environment import device_name, versions
from drophot.records import Record, fingerprint


def of_run(run: Any, curve: Iterable[float], accuracy: float, sparsity: float) -> Record:
    """The record of a run that is through.

    Args:
        run: A :class:`drophot.DropHot`.
        curve: Its accuracies after each epoch of fine-tuning.
        accuracy: The one in the end.
        sparsity: What it counted of prunable weights that are zero or gone.

    Returns:
        The record.
    """
    total = len(run.train_set)
    configuration = json.loads(json.dumps(run.configuration))  # equal to what is read from a file
    settings = {name: value for name, value in configuration.items() if name != "seed"}
    size = kept(total, run.data_ratio) if run.mode in modes.DYNAMIC else len(run.indices)
    return Record(
        model=factory_name(run.factory, run.model),
        mode="baseline" if size == total else modes.name(run.mode),
        keep_ratio=run.data_ratio,
        kept=size,
        prune_ratio=run.prune_ratio,
        seed=run.seed,
        trained_accuracy=run.trained_accuracy,
        pruned_accuracy=run.pruned_accuracy,
        finetuned_accuracy=accuracy,
        finetune_curve=tuple(curve),
        sparsity=sparsity,
        seconds=dict(run.seconds),
        device=device_name(run.device),
        versions=versions(),
        fingerprint=fingerprint(configuration),
        protocol=run.protocol,
        equal_steps=run.equal_steps,
        reinitialized=run.reinitialize,
        rewound=run.rewind,
        recalibrated=run.recalibrate_bn,
        schedule=run.schedule,
        scope=run.scope,
        structured=run.structured,
        parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        settings=settings,
        cell=fingerprint(settings),
        test_samples=len(run.test_set),
    )
