"""Steps 1 to 3 of a run: following all samples, keeping some, and training on these."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from drophot._core import random_state
from drophot._core.arrays import as_indices
from drophot._core.user_warnings import warn
from drophot.coreset.builtin_selectors import FeatureSelector
from drophot.coreset.score_ranking import check_scores
from drophot.coreset.selectors import Evidence, checked_indices
from drophot.data.batching import batches, num_batches
from drophot.data.samples import known_targets, targets_of
from drophot.pipeline import fit_checks, modes
from drophot.pipeline.config import RunConfig
from drophot.pipeline.joint_pruning import pruning_while_training
from drophot.pipeline.provenance.own_objects import unchanged
from drophot.pipeline.released_protocol import always_evaluating
from drophot.pipeline.step import running
from drophot.pipeline.step_3_batches import (
    random_part,
    sampled_batches,
    subset,
    successive_epochs,
    successive_epochs_of_coreset,
)
from drophot.prune.masks import Masks
from drophot.settings.declarations import Forgetting
from drophot.settings.names import name_of
from drophot.tracking.dynamics import DynamicsTracker
from drophot.tracking.statistics import DEFAULT, Score
from drophot.training.evaluation import evaluate


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """The result of step 1."""

    model: nn.Module
    """The network that was trained on the full training set."""
    tracker: DynamicsTracker | None
    """The tracker of the samples; `None` if the protocol has its own counter."""
    scores: Tensor
    """Shape `(N,)`: the score that the mode selects by."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The result of step 2."""

    indices: Tensor
    """The positions of the kept samples `(K,)`; all for a mode that chooses while step 3 trains."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """The result of step 3."""

    model: nn.Module
    masks: Masks | None = None
    """Of the weights that were removed during training; `None` if step 4 removes them."""
    accuracy: float
    seconds: float


def score(config: RunConfig, own_scores: Sequence[Score] = ()) -> Scoring:
    """Step 1: train on the full training set and follow every sample.

    The tracker follows the score of the run's mode and, besides the built-in ones, `own_scores`.
    """
    settings, protocol = config.settings, config.protocol
    toneva = settings.forgetting == "toneva"
    if protocol.counter is None:
        modes.check_presentations(settings.mode, settings.score_epochs)
    with running(config, "score") as step:
        model = config.factory().to(config.device)
        followed = _distinct(own_scores, modes.own_score_of(settings.mode))
        tracker = DynamicsTracker(
            config.num_samples, device=config.device, statistics=(*DEFAULT, *followed)
        )
        counter = protocol.counter and protocol.counter(config.num_samples, settings.seed)
        if protocol.counter is not None and counter is None:
            raise TypeError(
                f"`counter` of protocol {protocol.name!r} must return an object with `observe` and "
                f"`scores`, got None."
            )
        observer = tracker if counter is None else counter

        def observe(_: int) -> None:
            if toneva:  # the tracker sees the batches
                fit_checks.check_presented(tracker, over=False)
            else:
                observer.observe(model, batches(config.train_set, 1024, config.device))

        with _baseline_mode(config, model), ExitStack() as uses:
            for one in followed:
                uses.enter_context(unchanged("statistic", one))
            step.fit(
                model,
                config.train_set,
                settings.score_epochs,
                config.optimizer(model.parameters()),
                on_batch=tracker.update if toneva else None,
                on_epoch=observe,
            )
        if counter is not None:
            scores = counter.scores
        else:
            fit_checks.check_presented(tracker)
            wanted = modes.statistic_of(settings.mode) or "forgetting"
            scores = statistic(tracker, wanted, settings.forgetting)
    return Scoring(
        model=model,
        tracker=tracker if counter is None else None,
        scores=scores,
        seconds=step.seconds,
    )


def _distinct(scores: Sequence[Score], another: Score | None) -> list[Score]:
    found = {score.name: score for score in scores}
    return list((found | ({} if another is None else {another.name: another})).values())


def statistic(tracker: DynamicsTracker, score: str | Score, forgetting: Forgetting) -> Tensor:
    """A score of step 1, `(N,)`; `"forgetting"` follows the setting of that name."""
    name = score if isinstance(score, str) else score.name
    if name == "forgetting":
        return tracker.scores("hardest" if forgetting == "toneva" else "zero")
    return tracker.scores(name)


def missing(
    config: RunConfig,
    *,
    scores: Tensor | None,
    scorer: nn.Module | None,
    confidence: Tensor | None,
) -> str | None:
    """What step 1 has to give before `select` can work: an attribute of a run, or nothing."""
    if "scores" in config.needs and scores is None:
        return "scores"
    if "confidence" in config.needs and confidence is None:
        return "tracker"
    return "scorer" if "model" in config.needs and scorer is None else None


def select(
    config: RunConfig,
    *,
    scores: Tensor | None = None,
    scorer: nn.Module | None = None,
    confidence: Tensor | None = None,
) -> Selection:
    """Step 2: keep a share of the training samples, by the results of step 1."""
    total, mode = config.num_samples, config.settings.mode
    if lack := missing(config, scores=scores, scorer=scorer, confidence=confidence):
        needed = {"scorer": "a trained scoring network", "tracker": "a tracker's confidences"}
        raise RuntimeError(
            f"mode {name_of(mode)!r} needs {needed.get(lack, lack)}: call `run.score()` "
            f"first, or set `run.{lack}`."
        )
    if scores is not None and len(scores := check_scores(scores)) != total:
        raise ValueError(
            f"`scores` must have one entry for each training sample, {total}, got {len(scores)}."
        )
    with running(config, "select") as step:
        indices = _choose(config, scores, scorer, confidence)
    _warn_of_empty_classes(config, indices)
    return Selection(indices=indices, seconds=step.seconds)


def _choose(
    config: RunConfig,
    scores: Tensor | None,
    scorer: nn.Module | None,
    confidence: Tensor | None,
) -> Tensor:
    settings, total = config.settings, config.num_samples
    selector = config.selector
    if selector is None or config.keeps_all:
        return torch.arange(total, device="cpu")
    copies = {  # so that a selector cannot change the data or the results
        name: values.clone()
        for name, values in (("scores", scores), ("confidence", confidence))
        if values is not None and name in config.needs
    }
    evidence = Evidence(
        num_samples=total,
        **copies,
        model=scorer if "model" in config.needs else None,
        targets=targets_of(config.train_set).clone() if "targets" in config.needs else None,
        dataset=config.train_set,
    )
    with unchanged("mode", settings.mode):
        indices = selector.select(settings.data_ratio, evidence, settings.seed)
    return checked_indices(selector, indices, settings.data_ratio, total)


def _warn_of_empty_classes(config: RunConfig, indices: Tensor) -> None:
    """Warn if a coreset holds no sample of some class that the training set has."""
    known = known_targets(config.train_set)
    if known is None:
        return
    targets = known.cpu()
    empty = np.setdiff1d(targets.numpy(), targets[indices].numpy()).tolist()
    if empty:
        settings = config.settings
        warn(
            f"`data_ratio={settings.data_ratio}` and `mode={name_of(settings.mode)!r}` leave no "
            f"sample of classes {empty}, which the model will not learn in `train`. Raise "
            f"`data_ratio`."
        )


def checked_positions(config: RunConfig, indices: object) -> Tensor:
    """The positions of the kept samples, which a user may have replaced, as int64 on the CPU."""
    found = torch.as_tensor(as_indices("indices", indices, config.num_samples))
    if _selects_while_training(config) and len(found) != config.num_samples:
        raise ValueError(
            f"`indices` must hold all {config.num_samples} positions, from which mode "
            f"{name_of(config.settings.mode)!r} selects while it trains, got {len(found)}. To "
            f"train on your own selection, pass a selector as `mode`."
        )
    if not len(found):
        raise ValueError("`indices` must hold at least one position, got none.")
    return found


def train(config: RunConfig, indices: Tensor) -> TrainedModel:
    """Step 3: train a new model on the kept samples, for the epochs or steps asked for."""
    settings, size = config.settings, config.settings.batch_size
    reselects = _selects_while_training(config)
    same_mode = unchanged("mode", settings.mode) if reselects else nullcontext()
    with running(config, "train") as step, same_mode:
        model = config.factory().to(config.device)
        optimizer = config.optimizer(model.parameters())
        sampled = sampled_batches(config, model) if reselects else None
        sampling = None if sampled is None else sampled.sampling
        each = num_batches(len(indices) if sampled is None else config.num_kept, size)
        whole = num_batches(config.num_samples, size)  # as the baseline has in each epoch
        epochs, last = settings.train_epochs, 0
        if settings.equal_steps:
            epochs, last = divmod(epochs * whole, each)
        pruning = pruning_while_training(config, model, optimizer, epochs * each + last)
        with pruning as pruner:
            if last and not fit_checks.is_library_fit(config.fit):
                # A single call: a user's loop may set up a scheduler in each.
                if sampled is None:
                    loader = successive_epochs_of_coreset(config, indices, epochs, last, step.seed)
                else:
                    loader = successive_epochs(sampled.loader, epochs, each, last)
                step.fit_loader(model, loader, settings.train_epochs, whole, optimizer, sampling)
            elif sampled is not None:
                step.fit_loader(model, sampled.loader, epochs, each, optimizer, sampling)
                if last:
                    step.fit_loader(model, sampled.loader, 1, last, optimizer, sampling)
            else:
                with _baseline_mode(config, model) if config.keeps_all else nullcontext():
                    step.fit(model, subset(config, indices), epochs, optimizer)
                    if last:
                        some = random_part(config, indices, last)
                        step.fit(model, subset(config, some), 1, optimizer)
        accuracy = evaluate(model, config.test_set)
    masks = None if pruner is None else pruner.masks
    return TrainedModel(model=model, masks=masks, accuracy=accuracy, seconds=step.seconds)


def _selects_while_training(config: RunConfig) -> bool:
    return config.selector is None and not config.keeps_all


def _baseline_mode(config: RunConfig, model: nn.Module) -> AbstractContextManager[None]:
    return always_evaluating(model) if config.protocol.baseline_in_eval_mode else nullcontext()


def check_features(config: RunConfig) -> None:
    """Refuse a mode that selects by features which the model does not have."""
    mode = config.settings.mode
    selector = mode.selector if isinstance(mode, modes.Adaptive) else config.selector
    if not isinstance(selector, FeatureSelector) or config.keeps_all:
        return
    with random_state.preserved_rng(config.device, seed=config.settings.seed):
        model = config.factory().to(config.device)
        try:
            selector.features(model, Subset(config.train_set, [0]))
        except ValueError as error:
            error.add_note(f"`mode={selector.name!r}` needs these features of `model`.")
            raise
