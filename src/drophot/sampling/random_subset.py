"""A fresh random subset in each epoch: the control for methods that select during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Sampler

from drophot._core import scalars
from drophot._core.ratios import check_keep_ratio, num_kept
from drophot._core.seeded_draw import cpu_generator, derive_seed, draw, position_blocks
from drophot.sampling.epoch_iterator import (
    EpochIterator,
    check_replicas,
    num_per_rank,
    share,
)
from drophot.sampling.saved_state import checked_state


class FreshSubset(Sampler[int]):
    """A sampler that yields a different random subset in each epoch.

    `ratio` is the fraction of the samples that is **kept** in each epoch: it yields
    `K = max(1, floor(ratio * N + 0.5))` samples, each once, in random order. It uses no information
    about the samples and is therefore the control for every method that reselects during training.
    Published as RS2, it matched or outperformed most coreset methods at equal cost.

    On several ranks, pass `num_replicas` and `rank`: all ranks draw the same subset in the same
    order, and each yields every `num_replicas`-th sample of it. As in `DistributedSampler`, the
    first samples are repeated if the ranks do not divide `K`. Leave both out if something else
    divides the batches among the ranks, as accelerate does.

    `state_dict` and `load_state_dict` resume in the middle of an epoch. They are the protocol of
    torchdata's `StatefulDataLoader`, which calls them. In a DataLoader with worker processes, which
    requests samples in advance, set `state["yielded"]` to the number of samples that the loop has
    received.

    References:
        Okanovic et al., Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning,
        ICLR 2024, https://arxiv.org/abs/2305.18424.

    Args:
        num_samples: `N`, the length of the dataset.
        ratio: The fraction kept, in (0, 1].
        seed: Together with the attribute `epoch` it determines the subset. `epoch` counts the
            epochs begun so far; set it to resume training between two epochs.
        num_replicas: The number of ranks among which each subset is divided.
        rank: Which of them this one is.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `ratio` is not in (0, 1], `num_samples` or `num_replicas` is less than 1, or
            `rank` is not in [0, `num_replicas`).

    Example:
        >>> sampler = FreshSubset(10, 0.3)
        >>> len(sampler), len(set(sampler)), sampler.epoch
        (3, 3, 1)
        >>> epoch = iter(sampler)
        >>> first = next(epoch)
        >>> again = FreshSubset(10, 0.3)
        >>> again.load_state_dict(sampler.state_dict())
        >>> list(again) == list(epoch)
        True
    """

    def __init__(
        self,
        num_samples: int,
        ratio: float,
        *,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.num_samples = scalars.integer("num_samples", num_samples, least=1)
        self.ratio = check_keep_ratio("ratio", ratio)
        self.seed = scalars.integer("seed", seed)
        self.num_replicas, self.rank = check_replicas(num_replicas, rank)
        self.epoch = 0
        self._yielded = 0  # of the epoch that was begun last; 0 if it is complete
        self._resume_at = 0

    def __len__(self) -> int:
        return num_per_rank(num_kept(self.num_samples, self.ratio), self.num_replicas)

    def __iter__(self) -> EpochIterator:
        start, self._resume_at = self._resume_at, 0
        return EpochIterator(self, start)

    def _next_order(self) -> list[int]:
        """Begin an epoch, and return this rank's samples."""
        self.epoch += 1
        return self._current_order()

    def _current_order(self) -> list[int]:
        """This rank's samples of the epoch that was begun last."""
        seed, total = derive_seed(self.seed, self.epoch - 1), self.num_samples
        size = num_kept(total, self.ratio)
        found = draw(position_blocks(total), total, size, seed, stream=1)
        order = torch.randperm(len(found), generator=cpu_generator(seed), device="cpu")
        return share(found[order.numpy()].tolist(), self.num_replicas, self.rank)

    def state_dict(self) -> dict[str, Any]:
        """The state, equal on all ranks.

        Returns:
            Numbers: the settings, the epochs begun, and the samples yielded of the last one if it
            is not complete.
        """
        return {**self._settings(), "epoch": self.epoch, "yielded": self._yielded}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume: the next iteration yields the rest of the epoch.

        Args:
            state_dict: The state of a sampler with the same arguments, of any rank.

        Raises:
            ValueError: If it is of a sampler with other arguments, or not such a state.
        """
        saved = checked_state(state_dict, self._settings(), "FreshSubset", "epoch")
        yielded = saved.integer("yielded", most=len(self))
        self.epoch = saved.integer("epoch", least=int(yielded > 0))
        self._yielded = self._resume_at = yielded % len(self)

    def _settings(self) -> dict[str, Any]:
        names = ("num_samples", "ratio", "seed", "num_replicas")
        return {name: getattr(self, name) for name in names}
