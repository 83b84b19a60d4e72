"""Refuse a run that cannot work, before it starts: a trial of its model on its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from drophot._core import random_state
from drophot._core.classifier import check_optimizer
from drophot.data.cache import Kept
from drophot.data.indexing import IndexedDataset
from drophot.data.samples import first_sample, known_targets, tensors_of
from drophot.pipeline import fit_checks, pruning_steps, selection_steps
from drophot.pipeline.config import Arguments, RunConfig
from drophot.pipeline.provenance.experiment import describe_experiment
from drophot.pipeline.step_3_batches import check_selects_again
from drophot.prune.prunable_weights import prunable
from drophot.prune.unpruned_weights import uncovered_warning_silenced, warn_of_uncovered

_CHUNK = 1024  # samples checked at a time


def prepare(arguments: Arguments) -> RunConfig:
    """Try a run on its data, and move the data to memory or the device."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings, given = arguments.settings, (arguments.train_set, arguments.test_set)
    with (
        # `channels` names the weights left then.
        uncovered_warning_silenced(bool(settings.structured)),
        random_state.preserved_rng(device, seed=settings.seed),
    ):
        fit_checks.check_bound_arguments(arguments.fit)
        closure = not fit_checks.is_library_fit(arguments.fit)
        probe, classes = build(arguments.model, arguments.optimizer, *given, closure=closure)
        # Otherwise step 4 would raise these errors after two trainings.
        warn_of_uncovered(probe, prunable(probe))
        cache = arguments.cache
        train = Kept(IndexedDataset(given[0]), device, cache, name="train_set").data
        test = Kept(given[1], device, cache, name="test_set").data
        num_classes = check_targets("train_set", train, classes)
        check_targets("test_set", test, classes)
        check_inputs("train_set", train)
        check_inputs("test_set", test)
    config = RunConfig(
        settings=settings,
        factory=arguments.model,
        optimizer=arguments.optimizer,
        train_set=train,
        test_set=test,
        device=device,
        fit=arguments.fit,
        cache=cache,
        progress=arguments.progress,
        num_classes=num_classes,
        experiment=describe_experiment(
            arguments.model,
            arguments.optimizer,
            arguments.fit,
            given=given,
            prepared=(train, test),
            device=device,
        ),
    )
    check_run(config)
    return config


def build(
    factory: Callable[[], object],
    optimizer: Callable[[Iterator[nn.Parameter]], object],
    train_set: Dataset[object],
    test_set: Dataset[object],
    *,
    closure: bool = False,
) -> tuple[nn.Module, int]:
    """Build a model and an optimizer and try them on the first samples.

    Returns the model and its number of classes.
    """
    samples: list[tuple[Any, ...]] = []
    for name, dataset in (("train_set", train_set), ("test_set", test_set)):
        samples.append(first_sample(name, dataset))
        if len(samples[-1]) != 2:
            raise ValueError(
                f"`{name}` must give samples (input, target), got {len(samples[-1])} parts. Pass "
                f"the dataset itself, not an IndexedDataset: the index is added by DropHot."
            )
    inputs, other = (torch.as_tensor(sample[0])[None] for sample in samples)
    if inputs.shape != other.shape or inputs.dtype != other.dtype:
        raise ValueError(
            f"`test_set` must have inputs like `train_set`, {tuple(inputs.shape[1:])} of "
            f"{inputs.dtype}, got {tuple(other.shape[1:])} of {other.dtype}. Give both the same "
            f"transform."
        )
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"`model` must be a factory that returns a new model when it is called without "
            f"arguments, got {type(factory).__name__}. Pass the class or function that makes the "
            f"model, or a lambda."
        )
    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must return an nn.Module, got {type(model).__name__}.")
    if factory() is model:
        raise ValueError(
            "`model` must return a new model each time, got the same object twice, so that its "
            "training would continue instead of starting over. Build the model inside the factory."
        )
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        raise TypeError(
            f"`optimizer` must be a factory that returns an optimizer when it is called with "
            f"parameters, got {type(optimizer).__name__}. Pass, for example, "
            f"functools.partial(torch.optim.Adam, lr=1e-3)."
        )
    if not isinstance(made := optimizer(model.parameters()), Optimizer):
        raise TypeError(f"`optimizer` must return an Optimizer, got {type(made).__name__}.")
    check_optimizer(model, made, closure=closure)
    model.eval()
    with torch.no_grad():
        try:
            device = _device_of(model)
            logits = model(torch.cat([inputs.to(device), other.to(device)]))
        except Exception as error:
            raise ValueError(
                f"`model` must accept inputs (B, {', '.join(map(str, inputs.shape[1:]))}), as the "
                f"data gives them. It raised {type(error).__name__}: {error}"
            ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"`model` must return logits (B, C) with C at least 2, got {found} for a batch of 2."
        )
    return model, logits.shape[1]


def _device_of(model: nn.Module) -> torch.device:
    """Where a factory builds its models; they go to the run's device later."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_targets(name: str, dataset: Dataset[object], num_classes: int) -> int:
    """Refuse targets that are no classes of the model, as far as they are known.

    Returns the number of classes that occur; 0 if that takes reading all samples.
    """
    known = known_targets(dataset)
    with random_state.preserved_rng():
        targets = torch.as_tensor(first_sample(name, dataset)[1])[None] if known is None else known
    if targets.dim() != 1 or targets.is_floating_point():
        raise ValueError(
            f"`{name}` must have one integer as target, got shape {tuple(targets.shape[1:])} of "
            f"{targets.dtype}."
        )
    wrong = ((targets < 0) | (targets >= num_classes)).nonzero()[:, 0]
    if len(wrong):
        raise ValueError(
            f"`{name}` must have targets in [0, {num_classes}), the classes of the model, got "
            f"{int(targets[wrong[0]])} at position {int(wrong[0])}."
        )
    return 0 if known is None else len(np.unique(targets.cpu().numpy()))


def check_inputs(name: str, dataset: Dataset[object]) -> None:
    """Refuse inputs that are not finite, as far as they are in memory."""
    tensors = tensors_of(dataset)
    if tensors is None or not tensors[0].is_floating_point() or tensors[0].is_meta:
        return
    for start, part in enumerate(torch.split(tensors[0], _CHUNK)):
        wrong = (~part.isfinite()).flatten(1).any(1) if part.dim() > 1 else ~part.isfinite()
        if bool(wrong.any()):
            position = start * _CHUNK + int(wrong.nonzero()[0])
            raise ValueError(
                f"`{name}` must have finite inputs, got NaN or infinity at position {position}. "
                f"Leave such samples out, or replace the values: they would make every weight NaN."
            )


def with_settings(config: RunConfig, **settings: object) -> RunConfig:
    """The run with other settings, checked against its model and data."""
    changed = config.replace(**settings)
    check_run(changed)
    return changed


def check_run(config: RunConfig) -> None:
    """Refuse settings that the model or the data do not allow."""
    pruning_steps.check_model(config)
    selection_steps.check_features(config)
    check_selects_again(config)
    settings, total, size = config.settings, config.num_samples, config.num_kept
    if size < config.num_classes:
        raise ValueError(
            f"`data_ratio` must keep a sample of each class, got {settings.data_ratio}, which "
            f"keeps {size} of {total} samples for {config.num_classes} classes. Raise it to at "
            f"least {config.num_classes / total:.3g}."
        )
    for count, found in (
        (size, f"`data_ratio={settings.data_ratio}` keeps {size} samples"),
        (total, f"`train_set` has {total} samples"),
    ):
        if (count % settings.batch_size or settings.batch_size) != 1:
            continue
        single = torch.as_tensor(first_sample("train_set", config.train_set)[0])[None]
        try:
            with random_state.preserved_rng(config.device, seed=settings.seed):
                model = config.factory().train()
                model(single.to(_device_of(model)))
        except ValueError as error:  # BatchNorm, of a single value
            raise ValueError(
                f"`batch_size` must not leave a last batch of one sample, on which this model "
                f"cannot train, got {settings.batch_size}, and {found}. Change `batch_size`. "
                f"({error})"
            ) from error
