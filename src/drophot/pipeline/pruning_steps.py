"""Step 4 of a run, and what of it holds through step 5."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import ceil
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from drophot._core import random_state
from drophot.pipeline.fit_checks import LoopError
from drophot.prune import schedule
from drophot.prune.batchnorm import recalibrate_alone
from drophot.prune.magnitude import magnitude_prune
from drophot.prune.masks import Masks
from drophot.prune.prunable_weights import prunable
from drophot.prune.running_statistics import with_statistics
from drophot.prune.unpruned_weights import uncovered_warning_silenced
from drophot.structured.channel_pruning import prune_channels
from drophot.training import loop

ScheduleName = Literal["one-shot", "gradual", "iterative"]


def prune(run: Any) -> Masks:
    """Prune a run's model, and leave its schedule or what channels went on the run.

    Args:
        run: With the settings, the model and the data of a :class:`drophot.DropHot`.

    Returns:
        The masks.
    """
    model: nn.Module = run.model
    run.pruner = run.channels = None
    run.prunable = sum(weight.numel() for weight in prunable(model).values())
    if run.structured:
        run.channels = prune_channels(model, run.prune_ratio, _sample(run))
        # Nothing that is left was removed, zeros included.
        left = prunable(model, ())
        masks = Masks(model, {n: torch.ones_like(w, dtype=torch.bool) for n, w in left.items()})
    elif run.schedule == "one-shot":
        with uncovered_warning_silenced():  # by the run's constructor
            masks = magnitude_prune(model, run.prune_ratio, scope=run.scope)
    else:
        steps, times = _steps(run), run.prunings
        if run.schedule == "gradual":
            ratios, every = schedule.cubic(run.prune_ratio, times), steps // 2 // max(times - 1, 1)
        else:
            ratios, every = schedule.geometric(run.prune_ratio, times), steps // times
        with uncovered_warning_silenced():
            run.pruner = schedule.Schedule(model, ratios, every=max(every, 1), scope=run.scope)
        masks = run.pruner.masks
    if run.recalibrate_bn:
        order = torch.Generator().manual_seed(2 * run.seed)
        batches = loop.batches(run.train_set, run.batch_size, run.device, shuffle=order)
        recalibrate_alone(model, _whole(batches, run.batch_size))
    return masks


def start_over(run: Any) -> None:
    """Give the model other weights under its masks, where that is asked for.

    Args:
        run: A run whose model is pruned.
    """
    if run.reinitialize:
        schedule.rewind(run.model, run.masks, run.factory().to(run.device).state_dict())
    if run.rewind:
        with random_state.preserved_rng(run.device, seed=2 * run.seed):  # as in step 3
            start = run.factory().to(run.device).state_dict()
        schedule.rewind(run.model, run.masks, start)


@contextmanager
def held(run: Any, optimizer: Optimizer) -> Iterator[Callable[[int], None]]:
    """Keep what was removed at zero, and prune on where a schedule is not at its end.

    Args:
        run: A run whose model is pruned.
        optimizer: What trains it.

    Yields:
        To be called with the number of epochs so far after each: it refuses a pace at which the
        schedule will not reach its end.

    Raises:
        LoopError: If `fit` took too few steps for that.
    """
    pruner = run.pruner if run.pruner is not None and run.pruner.masks is run.masks else None
    holding: AbstractContextManager[Any] = nullcontext()
    if pruner is not None:
        holding = pruner.hold(optimizer)
    elif run.protocol != "released" and not run.structured:
        holding = run.masks.hold(optimizer)

    def check_pace(epochs: int) -> None:
        if pruner is None:
            return
        needed = pruner.every * (len(pruner.ratios) - 1)
        if epochs and pruner.steps * run.finetune_epochs < needed * epochs:
            raise LoopError(
                f"`fit` should step the optimiser for every batch, {_steps(run)} times in all, of "
                f"which the schedule {run.schedule!r} needs {needed}. Found {pruner.steps} steps "
                f"in {epochs} of {run.finetune_epochs} epochs; lower `prunings` or raise "
                f"`finetune_epochs`."
            )

    with holding:
        yield check_pace
    if pruner is not None:
        run.masks = pruner.masks
        check_pace(run.finetune_epochs)


def removed(run: Any) -> float:
    """The share of the dense network's prunable or masked weights that is zero or gone.

    Args:
        run: A run whose model is pruned.

    Returns:
        The share.
    """
    weights = {id(weight): weight for weight in prunable(run.model).values()}
    masked = map(run.model.get_parameter, run.masks)  # of a user's own: perhaps of others too
    weights |= {id(weight): weight for weight in masked}
    total = sum(weight.numel() for weight in weights.values())
    if run.structured and run.prunable:
        total = run.prunable
    left = sum(int(weight.detach().count_nonzero()) for weight in weights.values())
    return 1 - left / total


def check(run: Any) -> None:
    """Refuse settings of pruning that cannot work, or not together.

    Args:
        run: With the settings of a :class:`drophot.DropHot`.

    Raises:
        ValueError: If they cannot.
    """
    if run.schedule not in ("one-shot", "gradual", "iterative"):
        raise ValueError(
            f'`schedule` should be "one-shot", "gradual" or "iterative". Found {run.schedule!r}.'
        )
    several = run.schedule != "one-shot"
    for name, other, why in (
        ("rewind", run.reinitialize, "reinitialize: the weights are either the first or new ones"),
        ("rewind", several, "a schedule: its mask is not final when fine-tuning begins"),
        ("reinitialize", several, "a schedule: its mask is not final when fine-tuning begins"),
        ("structured", several, "a schedule: channels do not come off one by one"),
        ("structured", run.rewind or run.reinitialize, "other weights: there is no mask for them"),
        ("structured", run.scope != "layer", "another scope: each layer loses the same share"),
    ):
        if getattr(run, name) and other:
            raise ValueError(f"`{name}` should not be given with {why}. Found both; leave one out.")
    if run.protocol == "released" and (several or run.structured):
        raise ValueError(
            '`protocol="released"` cannot be combined with other pruning: it prunes in one shot '
            f"and holds no masks. Found schedule={run.schedule!r} and structured={run.structured}; "
            f"leave them out."
        )


def check_model(run: Any) -> None:
    """Refuse pruning that the model or the length of fine-tuning does not allow.

    Args:
        run: With the settings, the factory and the data of a :class:`drophot.DropHot`.

    Raises:
        ValueError: If it does not.
    """
    if run.schedule != "one-shot" and _steps(run) < run.prunings:
        raise ValueError(
            f"`prunings` should be at most the steps of fine-tuning, {_steps(run)}. Found "
            f"{run.prunings}; raise finetune_epochs."
        )
    if not (run.recalibrate_bn or (run.structured and run.prune_ratio)):
        return
    with random_state.preserved_rng(run.device, seed=run.seed):
        probe = run.factory().to(run.device)
        if run.recalibrate_bn and not with_statistics(probe):
            raise ValueError(
                f"`recalibrate_bn` needs a model with BatchNorm layers, and "
                f"{type(probe).__name__} has none. Leave it out."
            )
        if run.structured and run.prune_ratio:
            prune_channels(probe, run.prune_ratio, _sample(run))


def _steps(run: Any) -> int:
    return run.finetune_epochs * ceil(len(run.train_set) / run.batch_size)


def _sample(run: Any) -> torch.Tensor:
    sample = loop.first_sample("train_set", run.train_set)[0]
    return torch.as_tensor(sample)[None].to(run.device)


def _whole(batches: Iterator[Any], size: int) -> Iterator[Any]:
    """Batches without a last one of a single sample, which BatchNorm may not take."""
    for batch in batches:
        if len(batch[0]) > 1 or size == 1:
            yield batch
