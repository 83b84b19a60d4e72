"""Steps 4 and 5 of a run: pruning, and fine-tuning with the removed weights held at zero."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drophot._core import random_state
from drophot._core.budget import Budget
from drophot._core.importance import FromBatches, Importance, check_importance, importance_name
from drophot._core.interruptions import must_propagate
from drophot.data.batching import batches
from drophot.data.samples import first_sample
from drophot.pipeline.config import RunConfig
from drophot.pipeline.fit_checks import LoopError
from drophot.pipeline.provenance.own_objects import unchanged
from drophot.pipeline.step import running
from drophot.prune import schedule
from drophot.prune.activation_repair import repair_alone
from drophot.prune.batchnorm import recalibrate_alone
from drophot.prune.magnitude import magnitude_prune
from drophot.prune.masks import Masks
from drophot.prune.prunable_weights import prunable
from drophot.prune.running_statistics import with_statistics
from drophot.prune.unpruned_weights import uncovered_warning_silenced
from drophot.structured.budget_selection import UnreachableBudgetError
from drophot.structured.channel_pruning import prune_channels
from drophot.structured.pruning_result import Pruned
from drophot.training.evaluation import evaluate


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedModel:
    """The result of step 4."""

    model: nn.Module
    masks: Masks
    schedule: schedule.Schedule | None = None
    """Prunes further in step 5."""
    channels: Pruned | None = None
    """The removed channels, if channels were removed."""
    num_prunable: int = 0
    """The prunable weights of the network before; 0 if step 4 was not taken."""
    accuracy: float
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetunedModel:
    """The result of step 5."""

    model: nn.Module
    masks: Masks
    curve: tuple[float, ...]
    """The accuracy after each epoch."""
    accuracy: float
    sparsity: float
    """The share of the dense network's prunable weights that is zero or removed."""
    seconds: float


def prune(config: RunConfig, model: nn.Module, removed: Masks | None = None) -> PrunedModel:
    """Step 4: remove weights or channels of a trained model, in place.

    Nothing more is removed if the schedule is "joint"; `removed` are the masks of step 3 then.
    """
    if config.settings.schedule == "joint" and removed is None:
        raise RuntimeError(
            'schedule="joint" prunes in `train`, so a model of your own has no masks: set '
            "`run.masks`, or use another schedule."
        )
    with running(config, "prune") as step:
        # A grid prunes a saved model, which has no gradients: an importance finds the same here.
        model.zero_grad(set_to_none=True)
        num_prunable = sum(weight.numel() for weight in prunable(model).values())
        dense = deepcopy(model) if config.settings.repair else None
        with unchanged("importance", config.settings.importance):
            importance = _importance(config, model, _shuffled(config))
            masks, pruner, channels = _pruned(config, model, removed, importance)
        if dense is not None:
            repair_alone(model, dense, _shuffled(config), channels)
        if config.settings.recalibrate_bn:
            recalibrate_alone(model, _shuffled(config))
        accuracy = evaluate(model, config.test_set)
    return PrunedModel(
        model=model,
        masks=masks,
        schedule=pruner,
        channels=channels,
        num_prunable=num_prunable,
        accuracy=accuracy,
        seconds=step.seconds,
    )


def finetune(config: RunConfig, pruned: PrunedModel) -> FinetunedModel:
    """Step 5: train a pruned model on the full training set, in place."""
    model, settings = pruned.model, config.settings
    curve: list[float] = []
    with running(config, "finetune", offset=1) as step:
        _replace_weights(config, pruned)
        optimizer = config.optimizer(model.parameters())
        pruner = pruned.schedule
        if pruner is not None and pruner.masks is not pruned.masks:
            pruner = None  # the user's masks replace the schedule's
        with _held(config, pruned, pruner, optimizer) as check_pace:

            def judge(_: int) -> None:
                curve.append(evaluate(model, config.test_set))
                check_pace(len(curve))

            epochs = settings.finetune_epochs
            step.fit(model, config.train_set, epochs, optimizer, on_epoch=judge)
        check_pace(settings.finetune_epochs)
    masks = pruned.masks if pruner is None else pruner.masks
    return FinetunedModel(
        model=model,
        masks=masks,
        curve=tuple(curve),
        accuracy=curve[-1] if curve else evaluate(model, config.test_set),
        sparsity=_sparsity(config, pruned, masks),
        seconds=step.seconds,
    )


def check_model(config: RunConfig) -> None:
    """Refuse pruning that the model or the length of fine-tuning does not allow."""
    settings, steps = config.settings, config.finetune_steps
    if settings.schedule == "joint" and config.train_steps <= settings.prunings:
        raise ValueError(
            f"`prunings` must be less than the number of training steps on the coreset, "
            f"{config.train_steps}, got {settings.prunings}. Raise `train_epochs` or lower "
            f"`prunings`."
        )
    if settings.schedule in ("gradual", "iterative") and steps < settings.prunings:
        raise ValueError(
            f"`prunings` must be at most the number of fine-tuning steps, {steps}, got "
            f"{settings.prunings}. Raise `finetune_epochs` or lower `prunings`."
        )
    removes_channels = bool(settings.structured) and settings.prune_ratio > 0
    given = settings.importance if settings.prune_ratio > 0 else None
    if not (settings.recalibrate_bn or removes_channels or given):
        return
    with random_state.preserved_rng(config.device, seed=settings.seed):
        probe = config.factory().to(config.device)
        if settings.recalibrate_bn and not with_statistics(probe):
            raise ValueError(
                f"`recalibrate_bn` needs a model with BatchNorm layers, and "
                f"{type(probe).__name__} has none. Remove it."
            )
        importance = _importance(config, probe, islice(_shuffled(config), 1))
        if importance and not isinstance(given, FromBatches):
            _check_reads_no_gradient(importance, probe)
        if removes_channels:
            _remove_channels(config, probe, importance)
        elif isinstance(given, FromBatches):
            _pruned(config, probe, None, importance)


def _importance(
    config: RunConfig, model: nn.Module, batches: Iterator[tuple[Tensor, ...]]
) -> Importance | None:
    """The importance of the run, computed from the model if it is a `FromBatches`.

    There is none if nothing is removed.
    """
    if config.settings.prune_ratio == 0:
        return None
    importance = config.settings.importance
    if not isinstance(importance, FromBatches):
        return importance
    made = importance.make(model, batches)
    check_importance("importance", made)
    return made


def _check_reads_no_gradient(importance: Importance, model: nn.Module) -> None:
    """Refuse an importance that fails without gradients, and succeeds with gradients of zero."""
    weights = prunable(model)
    if not weights:
        return  # pruning raises the error
    name, weight = next(iter(weights.items()))
    weight.grad = None
    error = _error_of(importance, name, weight)
    if error is None:
        return
    weight.grad = torch.zeros_like(weight)
    works_with_gradients = _error_of(importance, name, weight) is None
    weight.grad = None
    if works_with_gradients:
        raise ValueError(
            f"`importance` must not need `weight.grad`, since a run prunes without gradients: "
            f"`{importance_name(importance)}` raised {type(error).__name__} for `{name}`. To rank "
            f"by gradients, pass FromBatches(Taylor), or call `magnitude_prune` or "
            f"`prune_channels` after a backward pass."
        ) from error


def _error_of(importance: Importance, name: str, weight: nn.Parameter) -> Exception | None:
    try:
        with torch.no_grad():
            importance(name, weight)
    except Exception as error:
        if must_propagate(error):
            raise
        return error
    return None


def _pruned(
    config: RunConfig, model: nn.Module, removed: Masks | None, importance: Importance | None
) -> tuple[Masks, schedule.Schedule | None, Pruned | None]:
    settings = config.settings
    if settings.schedule == "joint":
        assert removed is not None
        removed.apply(model)  # which changes nothing unless the user replaced them
        return removed, None, None
    ratio, times = settings.prune_ratio, settings.prunings
    if settings.structured:
        channels = _remove_channels(config, model, importance)
        # No weight that is left was removed, zeros included.
        left = prunable(model, ())
        masks = Masks(model, {n: torch.ones_like(w, dtype=torch.bool) for n, w in left.items()})
        return masks, None, channels
    how: dict[str, Any] = {"scope": settings.scope, "importance": importance}
    with uncovered_warning_silenced():  # the constructor of the run has given it
        if settings.schedule == "one-shot":
            return magnitude_prune(model, ratio, **how), None, None
        steps = config.finetune_steps
        if settings.schedule == "gradual":
            ratios, every = schedule.cubic(ratio, times), steps // 2 // max(times - 1, 1)
        else:
            ratios, every = schedule.geometric(ratio, times), steps // times
        pruner = schedule.Schedule(model, ratios, every=max(every, 1), **how)
        return pruner.masks, pruner, None


def _remove_channels(config: RunConfig, model: nn.Module, importance: Importance | None) -> Pruned:
    settings = config.settings
    ratio, budget = settings.prune_ratio, settings.structured
    how: dict[str, Any] = {"importance": importance, "rules": settings.rules}
    try:
        if not isinstance(budget, Budget) or not ratio:
            return prune_channels(model, ratio, _sample(config), **how)
        # Rounded, since 1 - 0.7 is slightly more than 0.3, which would keep one channel more.
        limited = replace(budget, min_kept=max(budget.min_kept, round(1 - ratio, 12)))
        return prune_channels(model, example_inputs=_sample(config), to=limited, **how)
    except UnreachableBudgetError as error:
        raise _unreachable(error, budget, ratio) from None
    except ValueError as error:
        if str(error).startswith(("`to`", "`ratio`")):
            error.add_note("In a run, `to` is `structured`, and `ratio` is `prune_ratio`.")
        raise


def _unreachable(error: UnreachableBudgetError, budget: Any, ratio: float) -> ValueError:
    """The error in the words of the settings of a run."""
    limit, fix = f"`prune_ratio={ratio:g}`", "raise `prune_ratio`"
    if budget.min_kept >= round(1 - ratio, 12):
        limit, fix = f"min_kept={budget.min_kept:g}", "lower `min_kept`"
    return ValueError(
        f"`structured` must be a budget that can be reached, got {budget!r}, but {error.least} "
        f"remain with {limit}{error.why}. Raise the limit or {fix}."
    )


def _shuffled(config: RunConfig) -> Iterator[tuple[Tensor, ...]]:
    """Batches of the training set in a random order."""
    size = config.settings.batch_size
    order = torch.Generator().manual_seed(config.training_seed)
    found = batches(config.train_set, size, config.device, shuffle=order)
    # A last batch of one sample is left out, since BatchNorm may not take it.
    return (batch for batch in found if len(batch[0]) > 1 or size == 1)


def _replace_weights(config: RunConfig, pruned: PrunedModel) -> None:
    """Give the model other weights under its masks, if the settings ask for that."""
    if config.settings.reinitialize:
        schedule.rewind(pruned.model, pruned.masks, _new_state(config))
    if config.settings.rewind:
        with random_state.preserved_rng(config.device, seed=config.training_seed):
            start = _new_state(config)
        schedule.rewind(pruned.model, pruned.masks, start)


def _new_state(config: RunConfig) -> dict[str, Any]:
    return config.factory().to(config.device).state_dict()


@contextmanager
def _held(
    config: RunConfig,
    pruned: PrunedModel,
    pruner: schedule.Schedule | None,
    optimizer: Optimizer,
) -> Generator[Callable[[int], None]]:
    """Hold the removed weights at zero, and let a schedule prune further.

    Yields a function to call after each epoch with their number so far: it refuses a loop that
    takes too few steps for the schedule to end.
    """
    settings = config.settings
    holding: AbstractContextManager[object] = nullcontext()
    if pruner is not None:
        holding = pruner.hold(optimizer)
    elif config.protocol.holds_masks and not settings.structured:
        holding = pruned.masks.hold(optimizer)

    def check_pace(epochs: int) -> None:
        if pruner is None:
            return
        needed = pruner.every * (len(pruner.ratios) - 1)
        if epochs and pruner.steps * settings.finetune_epochs < needed * epochs:
            raise LoopError(
                f"`fit` must step the optimizer for every batch, {config.finetune_steps} times in "
                f"total, of which schedule={settings.schedule!r} needs {needed}, got "
                f"{pruner.steps} steps in {epochs} of {settings.finetune_epochs} epochs. Lower "
                f"`prunings` or raise `finetune_epochs`."
            )

    with holding:
        yield check_pace


def _sparsity(config: RunConfig, pruned: PrunedModel, masks: Masks) -> float:
    """The share of the dense network's prunable or masked weights that is zero or removed."""
    model = pruned.model
    weights = {id(weight): weight for weight in prunable(model).values()}
    masked = map(model.get_parameter, masks)  # a user's masks may cover other weights too
    weights |= {id(weight): weight for weight in masked}
    total = sum(weight.numel() for weight in weights.values())
    if config.settings.structured and pruned.num_prunable:
        total = pruned.num_prunable
    left = sum(int(weight.detach().count_nonzero()) for weight in weights.values())
    return 1 - left / total


def _sample(config: RunConfig) -> Tensor:
    sample = first_sample("train_set", config.train_set)[0]
    return torch.as_tensor(sample)[None].to(config.device)
