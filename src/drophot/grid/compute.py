"""The computation of a stage, in a worker or in the process of the grid."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import nan
from threading import Lock
from typing import get_args

import torch

from drophot._core.json_values import Json
from drophot.grid.saved_model import SavedModel, saved_model
from drophot.grid.stages import Stage, scoring_is_baseline
from drophot.grid.store import Store
from drophot.grid.worker_data import load_data
from drophot.pipeline import modes, pruning_steps, selection_steps
from drophot.pipeline.config import RunConfig
from drophot.pipeline.provenance.run_record import record_of
from drophot.pipeline.provenance.torch_settings import with_switches
from drophot.prune.masks import Masks
from drophot.records.json_lines import from_line, to_line
from drophot.records.record import Record
from drophot.tracking.statistics import Score, Statistic
from drophot.training.evaluation import evaluate

# Random state and the number of threads belong to the process: its stages take turns.
_one_at_a_time = Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The run, store and settings that all stages of a call of `Grid.run` share."""

    config: RunConfig
    """The grid's pipeline, on the way to a worker without its data."""
    store: Store
    threads: int
    """CPU threads for each stage."""
    switches: Mapping[str, Json] | None = None
    """The global switches of torch to set in a worker; `None` leaves them alone."""


def compute(job: Job, stage: Stage) -> Record | None:
    """Compute a stage and store its result, unless another process was faster.

    Args:
        job: Shared by all stages.
        stage: The stage, whose predecessor is in the store.

    Returns:
        The record, if the stage is a fine-tuning.

    Raises:
        RuntimeError: If the result of its predecessor was damaged in the meantime.
    """
    store, device = job.store, job.config.device
    around = nullcontext() if job.switches is None else with_switches(job.switches, device)
    with _one_at_a_time, limited_threads(job.threads), around:
        found = store.load(stage.name)
        if found is None:
            config = replace(load_data(job.config), settings=stage.settings)
            store.check_writable()
            before = _result_before(store, stage)
            try:
                found = _result(config, stage, before)
            finally:
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # for the other processes
            store.save(stage.name, found)
    return from_line(found.decode()) if stage.kind == "finetune" else None


def _result_before(store: Store, stage: Stage) -> SavedModel | None:
    if stage.predecessor is None:
        return None
    content = store.load(stage.predecessor.name)
    if content is None:
        raise RuntimeError(
            f"{stage.predecessor.name} in {store.folder} was damaged in the meantime. Run the "
            f"grid again."
        )
    return SavedModel.from_bytes(content)


def _result(config: RunConfig, stage: Stage, before: SavedModel | None) -> bytes:
    """The content of a stage's file."""
    if stage.kind == "score":
        return _score(config, stage.scores).to_bytes()
    if stage.kind == "train":
        return _train(config, before).to_bytes()
    assert before is not None
    return to_line(_finetune(config, before)).encode()


def _score(config: RunConfig, own_scores: Sequence[Score]) -> SavedModel:
    found = selection_steps.score(config, own_scores)
    scores = {"forgetting": found.scores}
    if found.tracker is not None:
        forgetting = config.settings.forgetting
        scores = {
            name: selection_steps.statistic(found.tracker, name, forgetting)
            for name in (*get_args(Statistic), *(score.name for score in own_scores))
        }
    accuracy = nan
    if scoring_is_baseline(config.settings):
        accuracy = evaluate(found.model, config.test_set)
    return saved_model(
        config,
        found.model,
        indices=torch.arange(config.num_samples),
        accuracy=accuracy,
        seconds={"score": found.seconds},
        scores={name: values.cpu() for name, values in scores.items()},
    )


def _train(config: RunConfig, scoring: SavedModel | None) -> SavedModel:
    mode, seconds = config.settings.mode, dict[str, float]()
    scores = scorer = confidence = None
    if scoring is not None:
        seconds = scoring.seconds
        if "scores" in config.needs:
            statistic = modes.statistic_of(mode) or "forgetting"
            scores = scoring.scores[statistic if isinstance(statistic, str) else statistic.name]
        if "confidence" in config.needs:
            confidence = scoring.scores["confidence"]
        if "model" in config.needs:
            scorer = scoring.model(config)
    selected = selection_steps.select(config, scores=scores, scorer=scorer, confidence=confidence)
    trained = selection_steps.train(config, selected.indices)
    return saved_model(
        config,
        trained.model,
        indices=selected.indices,
        accuracy=trained.accuracy,
        seconds={**seconds, "select": selected.seconds, "train": trained.seconds},
        masks=trained.masks,
    )


def _finetune(config: RunConfig, trained: SavedModel) -> Record:
    model = trained.model(config)
    removed = None
    if trained.masks:
        masks = {name: mask.to(config.device) for name, mask in trained.masks.items()}
        removed = Masks(model, masks)
    pruned = pruning_steps.prune(config, model, removed)
    finetuned = pruning_steps.finetune(config, pruned)
    return record_of(
        config,
        indices=trained.indices,
        trained_accuracy=trained.accuracy,
        pruned_accuracy=pruned.accuracy,
        finetuned=finetuned,
        seconds={**trained.seconds, "prune": pruned.seconds, "finetune": finetuned.seconds},
    )


@contextmanager
def limited_threads(threads: int) -> Generator[None, None, None]:
    """Let torch use so many threads of the CPU within a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
