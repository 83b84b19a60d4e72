"""A fresh random subset in each epoch: the control for methods that select during training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from drophot._core import scalars
from drophot._core.ratios import check_keep_ratio, num_kept
from drophot._core.seeded_draw import cpu_generator, derive_seed, draw, position_blocks


class FreshSubset(Sampler[int]):
    """A sampler that yields a different random subset in each epoch.

    `ratio` is the fraction of the samples that is **kept** in each epoch: it yields
    `K = max(1, floor(ratio * N + 0.5))` samples, each once, in random order. It uses no information
    about the samples and is therefore the control for every method that reselects during training.
    Published as RS2, it matched or outperformed most coreset methods at equal cost.

    References:
        Okanovic et al., Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning,
        ICLR 2024, https://arxiv.org/abs/2305.18424.

    Args:
        num_samples: `N`, the length of the dataset.
        ratio: The fraction kept, in (0, 1].
        seed: Together with the attribute `epoch` it determines the subset. `epoch` counts the
            epochs yielded so far; set it to resume training.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `ratio` is not in (0, 1] or `num_samples` is less than 1.

    Example:
        >>> sampler = FreshSubset(10, 0.3)
        >>> len(sampler), len(set(sampler)), sampler.epoch
        (3, 3, 1)
    """

    def __init__(self, num_samples: int, ratio: float, *, seed: int = 0) -> None:
        self.num_samples = scalars.integer("num_samples", num_samples, least=1)
        self.ratio = check_keep_ratio("ratio", ratio)
        self.seed = scalars.integer("seed", seed)
        self.epoch = 0

    def __len__(self) -> int:
        return num_kept(self.num_samples, self.ratio)

    def __iter__(self) -> Iterator[int]:
        seed, total = derive_seed(self.seed, self.epoch), self.num_samples
        self.epoch += 1
        found = draw(position_blocks(total), total, len(self), seed, stream=1)
        order = torch.randperm(len(found), generator=cpu_generator(seed), device="cpu")
        yield from found[order.numpy()].tolist()
