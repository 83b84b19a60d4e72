"""The batches of step 3 where `fit` receives a loader instead of a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, Subset

from drophot.data.batching import batches, num_batches
from drophot.pipeline.config import RunConfig
from drophot.pipeline.modes import Adaptive
from drophot.sampling.adaptive_subset import AdaptiveSubset
from drophot.sampling.crest import CrestLoader
from drophot.sampling.loss_sampling import LossSampling
from drophot.sampling.random_subset import FreshSubset

Batch = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledBatches:
    """The batches of a mode that selects while the model trains."""

    loader: Iterable[Batch]
    sampling: LossSampling | None = None
    """Needs the losses of each batch, if it is given."""


def sampled_batches(config: RunConfig, model: nn.Module) -> SampledBatches:
    """The batches that the run's mode selects while `model` trains on them."""
    settings, total = config.settings, config.num_samples
    ratio, seed = settings.data_ratio, settings.seed
    if settings.mode == "crest":
        size, cache = settings.batch_size, config.cache
        crest = CrestLoader(config.train_set, model, ratio, batch_size=size, seed=seed, cache=cache)
        return SampledBatches(loader=crest)
    if settings.mode == "fresh_subset":
        fresh = FreshSubset(total, ratio, seed=seed)
        return SampledBatches(loader=_SampledLoader(config, fresh, None))
    if isinstance(mode := settings.mode, Adaptive):
        every, data = mode.every, config.train_set
        adaptive = AdaptiveSubset(data, model, ratio, mode.selector, every=every, seed=seed)
        # Each process has a separate run.
        adaptive._is_independent = True  # pyright: ignore[reportPrivateUsage]
        return SampledBatches(loader=_SampledLoader(config, adaptive, None))
    sampling = LossSampling(total, ratio, seed=seed, device=config.device)
    sampler = sampling.sampler(_Shuffled(total))
    return SampledBatches(loader=_SampledLoader(config, sampler, sampling), sampling=sampling)


def selection_passes(config: RunConfig) -> int:
    """How often step 3 evaluates the network on all training samples to select again."""
    mode = config.settings.mode
    if not isinstance(mode, Adaptive) or config.keeps_all:
        return 0
    needs = set(mode.selector.needs)
    each = bool(needs & {"scores", "confidence"}) + ("model" in needs)
    # The first selection is random.
    return each * max(0, ceil(_coreset_epochs(config) / mode.every) - 1)


def selects_again(config: RunConfig) -> bool:
    """Whether step 3 is long enough for an `Adaptive` mode to be used; true for other modes."""
    mode = config.settings.mode
    if not isinstance(mode, Adaptive) or config.keeps_all:
        return True
    return _coreset_epochs(config) > mode.every or not config.train_steps


def check_selects_again(config: RunConfig) -> None:
    """Refuse an `Adaptive` mode whose second selection would come after the end of step 3."""
    if selects_again(config):
        return
    settings, epochs = config.settings, _coreset_epochs(config)
    mode = cast("Adaptive", settings.mode)
    fixes = [f"lower `every` to at most {epochs - 1}"] if epochs > 1 else []
    fixes.append("raise `train_epochs`")
    if not settings.equal_steps and selects_again(config.replace(equal_steps=True)):
        fixes.append('set `equal_steps=True` (in a grid, `controls=["equal_steps"]`)')
    fix = " or ".join(fixes)
    raise ValueError(
        f"`every` of mode {mode.name!r} must be less than the epochs that step 3 takes on the "
        f"coreset, {epochs}, got {mode.every}. The first selection is random, and there would be "
        f"no second one. {fix[0].upper()}{fix[1:]}."
    )


def _coreset_epochs(config: RunConfig) -> int:
    """How many passes over the coreset step 3 begins."""
    return ceil(config.train_steps / num_batches(config.num_kept, config.settings.batch_size))


def successive_epochs(
    loader: Iterable[Batch], epochs: int, num_batches: int, last: int
) -> Iterator[Batch]:
    """The batches of some epochs of a loader, and the first `last` batches of one more."""
    for size in [num_batches] * epochs + [last]:
        yield from islice(loader, size)


def successive_epochs_of_coreset(
    config: RunConfig, indices: Tensor, epochs: int, last: int, seed: int
) -> Iterator[Batch]:
    """The batches that `fit` draws from a coreset in some epochs, and `last` more full batches."""
    size, order = config.settings.batch_size, torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from batches(subset(config, indices), size, config.device, shuffle=order)
    some, order = subset(config, random_part(config, indices, last)), order.manual_seed(seed)
    yield from batches(some, size, config.device, shuffle=order)


def random_part(config: RunConfig, indices: Tensor, num_batches: int) -> Tensor:
    """As many random ones of the indices as full batches have."""
    order = torch.randperm(len(indices), device="cpu")
    return indices[order[: num_batches * config.settings.batch_size]]


def subset(config: RunConfig, indices: Tensor) -> Dataset[object]:
    """The training samples at some positions."""
    return Subset(config.train_set, indices.cpu().numpy().tolist())


class _Shuffled(Sampler[int]):
    """All positions in a new random order, drawn by torch's global generator."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.total, device="cpu").numpy().tolist()


class _SampledLoader:
    """A loader of the samples that a sampler gives, with weights if there are any."""

    def __init__(
        self, config: RunConfig, sampler: Sampler[int], sampling: LossSampling | None
    ) -> None:
        self.config, self.sampler, self.sampling = config, sampler, sampling

    def __iter__(self) -> Iterator[Batch]:
        config = self.config
        order = torch.tensor(list(self.sampler), dtype=torch.int64, device="cpu")
        size = config.settings.batch_size
        for batch in batches(config.train_set, size, config.device, shuffle=order):
            yield batch if self.sampling is None else (*batch, self.sampling.weights(batch[2]))
