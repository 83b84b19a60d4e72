"""Steps 1 to 3 of a run: following all samples, keeping some, and training on these."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler, Subset

from drophot import modes
from drophot._core import random_state
from drophot._core.ratios import num_kept
from drophot.coreset.feature_extraction import features
from drophot.coreset.greedy_facility_location import facility_location
from drophot.coreset.greedy_k_center import k_center
from drophot.coreset.score_selection import select
from drophot.data.batching import batches
from drophot.data.samples import targets_of
from drophot.pipeline import fit_checks, released_protocol
from drophot.sampling.crest import CrestLoader
from drophot.sampling.loss_sampling import LossSampling
from drophot.sampling.random_subset import FreshSubset
from drophot.tracking.dynamics import DynamicsTracker
from drophot.training.loaders import BatchLoader


def score(run: Any) -> Tensor:
    """Train on everything and follow every sample; the network and the tracker stay on the run.

    Args:
        run: With the settings and the data of a :class:`drophot.DropHot`.

    Returns:
        The scores that the run's mode goes by.
    """
    toneva, by_position = run.forgetting == "toneva", run.protocol == "released"
    total = len(run.train_set)
    run.scorer = model = run.factory().to(run.device)
    run.tracker = tracker = DynamicsTracker(total, device=run.device)
    counts = released_protocol.PositionCounts(total, seed=run.seed)

    def observe(_: int) -> None:
        if toneva:  # which sees the batches themselves
            fit_checks.check_presented(tracker, over=False)
            return
        observer = counts if by_position else tracker
        observer.observe(model, batches(run.train_set, 1024, run.device))

    run._fit(
        model,
        run.train_set,
        run.score_epochs,
        run.optimizer(model.parameters()),
        on_batch=tracker.update if toneva else None,
        on_epoch=observe,
    )
    if by_position:
        run.tracker = None
        return counts.scores
    fit_checks.check_presented(tracker)
    how = modes.scored(run.mode)
    return run.statistic("forgetting" if how is None else how.statistic)


def check(run: Any) -> None:
    """Refuse a mode that goes by features which the model does not give.

    Args:
        run: With the settings, the factory and the data of a :class:`drophot.DropHot`.

    Raises:
        ValueError: If it does not give them.
    """
    total = len(run.train_set)
    if run.mode not in modes.OF_FEATURES or num_kept(total, run.data_ratio) == total:
        return
    with random_state.preserved_rng(run.device, seed=run.seed):
        model = run.factory().to(run.device)
        try:
            _vectors(run.mode, model, Subset(run.train_set, [0]))
        except ValueError as error:
            error.add_note(f"`mode={run.mode!r}` needs these features of `model`.")
            raise


def choose(run: Any) -> Tensor:
    """Keep a share of a run's training samples.

    Args:
        run: With the settings, the data and what step 1 found of a :class:`drophot.DropHot`.

    Returns:
        The kept samples' positions; all of them for a mode that chooses while it trains.
    """
    mode, ratio, total = run.mode, run.data_ratio, len(run.train_set)
    if mode in modes.DYNAMIC or num_kept(total, ratio) == total:
        return torch.arange(total, device="cpu")
    if mode == "random":
        return select(torch.zeros(total, device="cpu"), ratio, "random", seed=run.seed)
    if run.protocol == "released":
        return released_protocol.select(run.scores, ratio, mode)
    if (how := modes.scored(mode)) is not None:
        targets = targets_of(run.train_set) if how.balanced else None
        scores = torch.zeros(total, device="cpu") if how.mode == "random" else run.scores
        return select(scores, ratio, how.mode, targets=targets, seed=run.seed)
    selector = k_center if mode == "k_center" else facility_location
    vectors = _vectors(mode, run.scorer, run.train_set)
    found = selector(vectors, ratio, targets=targets_of(run.train_set), seed=run.seed)
    return found.indices


def train(run: Any, model: nn.Module, optimizer: Optimizer) -> None:
    """Train on what was kept, for as many epochs or steps as were asked for.

    Args:
        run: A run that has chosen.
        model: What to train.
        optimizer: Holds its parameters.
    """
    epochs, steps = run.train_epochs, 0
    size = num_kept(len(run.train_set), run.data_ratio)
    if run.equal_steps:
        whole = epochs * ceil(len(run.train_set) / run.batch_size)
        epochs, steps = divmod(whole, ceil(size / run.batch_size))
    if run.mode in modes.DYNAMIC and size < len(run.train_set):  # everything is the baseline
        loader, on_batch = _loader(run, model)
        epoch_loader = BatchLoader(loader, ceil(size / run.batch_size))
        run._fit(model, epoch_loader, epochs, optimizer, on_batch=on_batch)
        if steps:
            run._fit(model, BatchLoader(loader, steps), 1, optimizer, on_batch=on_batch)
        if on_batch is not None and epochs + steps:
            fit_checks.check_losses_reported(loader.sampling.losses)
        return
    run._fit(model, _subset(run, run.indices), epochs, optimizer)
    if steps:  # of an epoch that is not whole: as many full batches
        part = torch.randperm(len(run.indices), device="cpu")[: steps * run.batch_size]
        run._fit(model, _subset(run, run.indices[part]), 1, optimizer)


def _vectors(mode: str, model: nn.Module, dataset: Dataset[Any]) -> Tensor:
    """The features of each sample that a mode goes by, `(N, D)`."""
    return features(model, dataset, "penultimate" if mode == "k_center" else "error")


def _subset(run: Any, indices: Tensor) -> Dataset[Any]:
    return Subset(run.train_set, indices.tolist())


def _loader(run: Any, model: nn.Module) -> tuple[Any, Any]:
    """What chooses while the model trains, and what it wants to see of each batch."""
    total, ratio, seed = len(run.train_set), run.data_ratio, run.seed
    if run.mode == "crest":
        options = {"batch_size": run.batch_size, "seed": seed, "cache": run.cache}
        return CrestLoader(run.train_set, model, ratio, **options), None
    if run.mode == "fresh_subset":
        return _Sampled(run, FreshSubset(total, ratio, seed=seed), None), None
    sampling = LossSampling(total, ratio, seed=seed, device=run.device)
    order = _Shuffled(total)

    def see(index: Tensor, logits: Tensor, targets: Tensor) -> None:
        sampling.update(index, F.cross_entropy(logits.float(), targets, reduction="none"))

    return _Sampled(run, sampling.sampler(order), sampling), see


class _Shuffled(Sampler[int]):
    """All positions in a fresh order, by torch's own generator."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.total, device="cpu").tolist()


class _Sampled:
    """A loader of the samples that a sampler gives, weighted where somebody weighs them."""

    def __init__(self, run: Any, sampler: Sampler[int], sampling: LossSampling | None) -> None:
        self.run, self.sampler, self.sampling = run, sampler, sampling

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        run, order = self.run, torch.tensor(list(self.sampler), dtype=torch.int64, device="cpu")
        for batch in batches(run.train_set, run.batch_size, run.device, shuffle=order):
            yield batch if self.sampling is None else (*batch, self.sampling.weights(batch[2]))
