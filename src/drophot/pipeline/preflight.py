"""Refuse a run that cannot work, before it starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from drophot import modes
from drophot._core import progress, random_state, scalars
from drophot._core.classifier import check_optimizer
from drophot._core.ratios import check_keep_ratio, check_prune_ratio, num_kept
from drophot.data.cache import Cache, Kept, check_cache
from drophot.data.indexing import IndexedDataset
from drophot.data.samples import first_sample, known_targets, tensors_of
from drophot.pipeline import pruning_steps, selection_steps
from drophot.prune import magnitude
from drophot.prune.prunable_weights import prunable
from drophot.prune.unpruned_weights import warn_of_uncovered

_CHUNK = 1024  # samples looked at in one go


def settle(run: Any) -> None:
    """Refuse a setting that is out of range, and make numbers Python's own, which JSON can hold.

    Args:
        run: What holds the settings, as attributes by their names.

    Raises:
        TypeError: If one is of the wrong kind.
        ValueError: If one is out of range, or two do not go together.
        ImportError: If `progress` is asked for and tqdm is not installed.
    """
    run.data_ratio = check_keep_ratio("data_ratio", run.data_ratio)
    modes.check(run)
    run.prune_ratio = check_prune_ratio("prune_ratio", run.prune_ratio)
    magnitude.check_scope("scope", run.scope)
    for name, choices in (("forgetting", ("paper", "toneva")), ("protocol", ("paper", "released"))):
        if (value := getattr(run, name)) not in choices:
            raise ValueError(
                f'`{name}` should be "{choices[0]}" or "{choices[1]}". Found {value!r}.'
            )
    if run.protocol == "released" and (run.forgetting, run.scope) != ("paper", "layer"):
        raise ValueError(
            f'`protocol="released"` cannot be combined with other settings: it counts '
            f"in its own way and prunes layer by layer. Found forgetting={run.forgetting!r} and "
            f"scope={run.scope!r}; leave them out."
        )
    flags = ("equal_steps", "reinitialize", "rewind", "recalibrate_bn", "structured", "progress")
    for name in flags:
        if not isinstance(value := getattr(run, name), bool):
            raise TypeError(f"`{name}` should be True or False. Found {value!r}.")
    pruning_steps.check(run)
    check_cache(run.cache)
    for name in ("score_epochs", "batch_size", "prunings"):
        setattr(run, name, scalars.integer(name, getattr(run, name), least=1))
    for name in ("train_epochs", "finetune_epochs", "seed"):
        setattr(run, name, scalars.integer(name, getattr(run, name), least=0))
    if run.progress:
        progress.import_tqdm()


def prepare(
    factory: Callable[[], nn.Module],
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
    train_set: Dataset[Any],
    test_set: Dataset[Any],
    *,
    device: torch.device,
    seed: int,
    cache: Cache = "auto",
    closure: bool = False,
) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Try a model on the data, and put the data where it is wanted.

    Args:
        factory: Makes models.
        optimizer: Makes optimisers.
        train_set: Samples `(input, target)`.
        test_set: Likewise.
        device: Where to run.
        seed: Of what the factory draws.
        cache: Whether the data is kept in memory.
        closure: Whether the optimiser's steps may need one, as a loop of the user's own can give.

    Returns:
        The training set with its index and the test set, both in memory where that is right; the
        number of classes that occur.

    Raises:
        TypeError: If a factory is none.
        ValueError: If the data and the model do not fit each other, or the model cannot be pruned.
    """
    with random_state.preserved_rng(device, seed=seed):
        probe, classes = build(factory, optimizer, train_set, test_set, closure=closure)
        warn_of_uncovered(
            probe, prunable(probe)
        )  # what it refuses, step 4 would refuse after two trainings
        train = Kept(IndexedDataset(train_set), device, cache, name="train_set").data
        test = Kept(test_set, device, cache, name="test_set").data
        occurring = check_targets("train_set", train, classes)
        check_targets("test_set", test, classes)
        check_inputs("train_set", train)
        check_inputs("test_set", test)
    return train, test, occurring


def build(
    factory: Callable[[], nn.Module],
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
    train_set: Dataset[Any],
    test_set: Dataset[Any],
    *,
    closure: bool = False,
) -> tuple[nn.Module, int]:
    """Build a model to throw away and try it on the data's first samples.

    Args:
        factory: Makes models.
        optimizer: Makes optimisers.
        train_set: Samples `(input, target)`.
        test_set: Likewise.
        closure: Whether the optimiser's steps may need one.

    Returns:
        The model and its number of classes.

    Raises:
        TypeError: If a factory is none, or the optimiser's steps need a closure.
        ValueError: If a data set is empty or has an index already, the inputs differ in shape, or
            the model cannot take them or gives no logits.
    """
    samples = []
    for name, dataset in (("train_set", train_set), ("test_set", test_set)):
        samples.append(first_sample(name, dataset))
        if len(samples[-1]) != 2:
            raise ValueError(
                f"`{name}` should give samples (input, target). Found {len(samples[-1])} parts; "
                f"give the data set itself, not in an IndexedDataset: the index is added here."
            )
    inputs, other = (torch.as_tensor(sample[0])[None] for sample in samples)
    if inputs.shape != other.shape or inputs.dtype != other.dtype:
        raise ValueError(
            f"`test_set` should have inputs like `train_set`, {tuple(inputs.shape[1:])} of "
            f"{inputs.dtype}. Found {tuple(other.shape[1:])} of {other.dtype}; give both the same "
            f"transform."
        )
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"`model` should be a factory: called without arguments it gives a new model. Found "
            f"{type(factory).__name__}; give the class or function that makes it, or a lambda."
        )
    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` should give an nn.Module. Found {type(model).__name__}.")
    if factory() is model:
        raise ValueError(
            "`model` should give a new model each time. Found the same object twice, whose "
            "training would continue instead of starting again; build the model inside the factory."
        )
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        raise TypeError(
            f"`optimizer` should be a factory: called with parameters it gives an optimiser. Found "
            f"{type(optimizer).__name__}; give functools.partial(torch.optim.Adam, lr=1e-3), say."
        )
    if not isinstance(made := optimizer(model.parameters()), Optimizer):
        raise TypeError(f"`optimizer` should give an Optimizer. Found {type(made).__name__}.")
    check_optimizer(model, made, closure=closure)
    model.eval()
    with torch.no_grad():
        try:
            logits = model(torch.cat([inputs, other]).to(_device_of(model)))
        except Exception as error:
            raise ValueError(
                f"`model` should take inputs (B, {', '.join(map(str, inputs.shape[1:]))}), as the "
                f"data gives them. Found {type(error).__name__}: {error}"
            ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"`model` should give logits (B, C) with C at least 2. Found {found} for a batch of 2."
        )
    return model, logits.shape[1]


def _device_of(model: nn.Module) -> torch.device:
    """Where a factory builds its models; they go to the run's device later."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_targets(name: str, dataset: Dataset[Any], num_classes: int) -> int:
    """Refuse targets that are no classes of the model, as far as they are known.

    Args:
        name: What the caller calls the data set.
        dataset: What `in_memory` gave.
        num_classes: `C`.

    Returns:
        The number of classes that occur; 0 if that takes reading all samples.

    Raises:
        ValueError: If a target is not in `[0, C)`.
    """
    known = known_targets(dataset)
    with random_state.preserved_rng():
        targets = torch.as_tensor(first_sample(name, dataset)[1])[None] if known is None else known
    if targets.dim() != 1 or targets.is_floating_point():
        raise ValueError(
            f"`{name}` should have one integer as target. Found shape {tuple(targets.shape[1:])} "
            f"of {targets.dtype}."
        )
    wrong = ((targets < 0) | (targets >= num_classes)).nonzero()[:, 0]
    if len(wrong):
        raise ValueError(
            f"`{name}` should have targets in [0, {num_classes}), the classes of the model. Found "
            f"{int(targets[wrong[0]])} at position {int(wrong[0])}."
        )
    return 0 if known is None else len(targets.unique())


def check_inputs(name: str, dataset: Dataset[Any]) -> None:
    """Refuse inputs that no network can learn from, as far as they are in memory.

    Args:
        name: What the caller calls the data set.
        dataset: What `in_memory` gave.

    Raises:
        ValueError: If one is not finite.
    """
    tensors = tensors_of(dataset)
    if tensors is None or not tensors[0].is_floating_point() or tensors[0].is_meta:
        return
    for start, part in enumerate(tensors[0].split(_CHUNK)):
        wrong = (~part.isfinite()).flatten(1).any(1) if part.dim() > 1 else ~part.isfinite()
        if bool(wrong.any()):
            place = start * _CHUNK + int(wrong.nonzero()[0])
            raise ValueError(
                f"`{name}` should have finite inputs: weights that see another number are none "
                f"after the first step. Found NaN or infinity at position {place}; leave such "
                f"samples out, or put numbers there."
            )


def check_sizes(run: Any, num_classes: int) -> None:
    """Refuse a coreset that leaves a class or a batch empty.

    Args:
        run: Has `factory`, `train_set`, `data_ratio`, `batch_size`, `seed` and `device`.
        num_classes: How many classes occur in the training set.

    Raises:
        ValueError: If fewer samples are kept than there are classes, or the last batch of an epoch
            is a single sample and the model cannot train on one.
    """
    pruning_steps.check_model(run)
    selection_steps.check(run)
    total = len(run.train_set)
    size = num_kept(total, run.data_ratio)
    if size < num_classes:
        raise ValueError(
            f"`data_ratio` should keep a sample of each class. Found {run.data_ratio}, which keeps "
            f"{size} of {total} samples for {num_classes} classes; raise it to at least "
            f"{num_classes / total:.3g}."
        )
    for count, what in (
        (size, f"`data_ratio={run.data_ratio}` keeps {size} samples"),
        (total, f"`train_set` has {total} samples"),
    ):
        if (count % run.batch_size or run.batch_size) != 1:
            continue
        single = torch.torch.as_tensor(first_sample("train_set", run.train_set)[0])[None]
        try:
            with random_state.preserved_rng(run.device, seed=run.seed):
                model = run.factory().train()
                model(single.to(_device_of(model)))
        except ValueError as error:  # BatchNorm, of a single value
            raise ValueError(
                f"`batch_size` should not leave a last batch of one sample, on which this model "
                f"cannot train. Found {run.batch_size}, and {what}; change `batch_size`. ({error})"
            ) from error


def warn_of_empty_classes(run: Any) -> None:
    """Warn if a coreset holds no sample of some class that the training set has.

    Args:
        run: Has `train_set`, `indices`, `data_ratio` and `mode`.
    """
    known = known_targets(run.train_set)
    if known is None:
        return
    targets = known.cpu()
    empty = sorted(set(targets.unique().tolist()) - set(targets[run.indices].unique().tolist()))
    if empty:
        warnings.warn(
            f"`data_ratio={run.data_ratio}` and `mode={modes.name(run.mode)!r}` leave no sample "
            f"of classes {empty}, which the model will not learn in `train`; raise data_ratio.",
            stacklevel=3,
        )
