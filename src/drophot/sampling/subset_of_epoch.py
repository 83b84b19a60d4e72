"""A sampler of the samples that a `LossSampling` keeps in an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Sampler

from drophot._core.ratios import num_kept
from drophot._core.seeded_draw import cpu_generator, derive_seed
from drophot.sampling.epoch_iterator import EpochIterator, num_per_rank, share

if TYPE_CHECKING:
    from drophot.sampling.loss_sampling import LossSampling


class SubsetOfEpoch(Sampler[int]):
    """The samples of an epoch that are not skipped, in the order of another sampler."""

    def __init__(self, sampling: LossSampling, sampler: Iterable[int] | None) -> None:
        self.sampling, self.inner = sampling, sampler

    @property
    def epoch(self) -> int:
        return self.sampling.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.sampling.epoch = value

    @property
    def _yielded(self) -> int:
        return self.sampling._yielded

    @_yielded.setter
    def _yielded(self, value: int) -> None:
        self.sampling._yielded = value

    def __len__(self) -> int:
        sampling = self.sampling
        return num_per_rank(num_kept(sampling.num_samples, sampling.ratio), sampling.num_replicas)

    def __iter__(self) -> EpochIterator:
        start, self.sampling._resume_at = self.sampling._resume_at, 0
        return EpochIterator(self, start)

    def _next_order(self) -> list[int]:
        sampling = self.sampling
        kept, total = sampling.begin(), sampling.num_samples
        if self.inner is None:
            seed = derive_seed(sampling.seed, sampling.epoch - 1)
            order = torch.randperm(len(kept), generator=cpu_generator(seed), device="cpu")
            sampling._order = kept[order]
        else:
            is_kept = np.zeros(total, dtype=bool)
            is_kept[kept.numpy()] = True
            chosen: list[int] = []
            for index in self.inner:
                if not (hasattr(index, "__index__") and 0 <= index < total):
                    raise ValueError(
                        f"`sampler` must yield one index in [0, {total}) at a time, got {index!r}. "
                        f"`num_samples` is the length of the dataset that it samples from."
                    )
                if is_kept[index]:
                    chosen.append(int(index))
            sampling._order = torch.tensor(chosen, dtype=torch.int64, device="cpu")
        sampling._check_order()
        return self._current_order()

    def _current_order(self) -> list[int]:
        sampling = self.sampling
        return share(sampling._order.tolist(), sampling.num_replicas, sampling.rank)

    def state_dict(self) -> dict[str, Any]:
        return self.sampling.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.sampling.load_state_dict(state_dict)
