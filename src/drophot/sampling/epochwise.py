"""What dynamic methods have to beat: other samples in each epoch, at random or by their losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from drophot._core import scalars
from drophot._core.exact_arithmetic import exact
from drophot._core.ratios import check_ratio, drawn, every, fresh, generator, kept
from drophot.coreset.score_selection import select

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NO_FAULT = torch.iinfo(torch.int64).max


class FreshSubset(Sampler[int]):
    """A sampler that gives another random subset in each epoch, a share `ratio` of all samples.

    `ratio` is the share **kept**, `K = max(1, floor(ratio * N + 0.5))` samples, each once an epoch
    and in random order. Nothing is known of the samples, so that this is the control for all that
    choose anew while they train; published as RS2, which beat most coresets at equal cost.

    References:
        Okanovic et al., Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning,
        ICLR 2024, https://arxiv.org/abs/2305.18424.

    Args:
        num_samples: `N`.
        ratio: The share kept, in (0, 1].
        seed: Draws; with `epoch`, an attribute that counts the epochs given and that may be set
            where training goes on, it says what an epoch has.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If `ratio` is not in (0, 1] or `num_samples` below 1.

    Example:
        >>> sampler = FreshSubset(10, 0.3)
        >>> len(sampler), len(set(sampler)), sampler.epoch
        (3, 3, 1)
    """

    def __init__(self, num_samples: int, ratio: float, *, seed: int = 0) -> None:
        self.num_samples, self.ratio, self.seed = _checked(num_samples, ratio, seed)
        self.epoch = 0

    def __len__(self) -> int:
        return kept(self.num_samples, self.ratio)

    def __iter__(self) -> Iterator[int]:
        seed, total = fresh(self.seed, self.epoch), self.num_samples
        self.epoch += 1
        found = drawn(every(total), total, len(self), seed, stream=1)
        order = torch.randperm(len(found), generator=generator(seed), device="cpu")
        yield from found[order.numpy()].tolist()


class LossSampling:
    """Gives easy samples a rest in some epochs, and counts them more in the others: unbiased.

    `ratio` is the share **kept** in each epoch, `K = max(1, floor(ratio * N + 0.5))` samples. Those
    whose last known loss is above the mean are always kept (if these are more than `K / 2`, the
    `K / 2` highest). Of the others as many as there is room for are drawn at random, and their
    losses are multiplied by the inverse of their chance, so that over an epoch the sum of the
    weighted gradients is, in expectation, that of all samples: InfoBatch's idea, with a share that
    is exact. Three lines in a loop of one's own, whose sampler stays:

        >>> from torch.utils.data import DataLoader, RandomSampler, TensorDataset
        >>> from drophot import IndexedDataset
        >>> data = IndexedDataset(TensorDataset(torch.randn(40, 4), torch.arange(40) % 2))
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sampling = LossSampling(len(data), 0.5)
        >>> loader = DataLoader(data, batch_size=8, sampler=sampling.sampler(RandomSampler(data)))
        >>> for epoch in range(3):
        ...     for inputs, targets, index in loader:
        ...         losses = torch.nn.functional.cross_entropy(
        ...             model(inputs), targets, reduction="none"
        ...         )
        ...         loss = sampling.loss(index, losses)  # instead of losses.mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> len(loader), len(index)
        (3, 4)

    InfoBatch ends with some epochs on everything; for these take a loader without the sampler, and
    `losses.mean()`. A sample
    that has not been seen yet is drawn like the easy ones. One process.

    References:
        Qin et al., InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning,
        ICLR 2024, https://arxiv.org/abs/2303.04947.

    Args:
        num_samples: `N`.
        ratio: The share kept, in (0, 1].
        seed: Draws; with `epoch`, which counts the epochs begun.
        device: Where the losses are kept, 8 bytes a sample with the weights.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If `ratio` is not in (0, 1] or `num_samples` below 1.
    """

    def __init__(
        self,
        num_samples: int,
        ratio: float,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.num_samples, self.ratio, self.seed = _checked(num_samples, ratio, seed)
        self.epoch = 0
        with torch.inference_mode(False):  # so that training can update them
            self.losses = torch.full(  # the last known ones
                (self.num_samples,), torch.nan, dtype=torch.float32, device=device
            )
            self._weights = torch.zeros_like(self.losses)  # of this epoch; 0 rests
            # The first position out of range that nobody has been told of.
            self._fault = torch.tensor(_NO_FAULT, device=self.losses.device)

    def sampler(self, sampler: Iterable[int]) -> Sampler[int]:
        """A sampler that leaves out who rests, and is otherwise the given one.

        Each time it is iterated, an epoch begins. Its length is `K`, which is right for a sampler
        that gives each sample once.

        Args:
            sampler: Gives positions, by any rule, in any order.

        Returns:
            The sampler.
        """
        return _Awake(self, sampler)

    def loss(self, index: Tensor, losses: Tensor) -> Tensor:
        """The batch's loss, for `backward`; what the samples' losses are is remembered.

        Args:
            index: The samples' positions, shape `(B,)`.
            losses: Their losses, shape `(B,)`.

        Returns:
            The mean of the weighted losses.

        Raises:
            TypeError: If `index` is not of integers.
            ValueError: If the shapes differ, or a position is out of range.
            RuntimeError: If no epoch was begun, so that nobody knows who rests.
        """
        self.update(index, losses)
        if self.epoch == 0:
            raise RuntimeError(
                "`loss` needs an epoch of `sampler(...)`, and none has begun: pass it to the "
                "loader, DataLoader(dataset, sampler=sampling.sampler(RandomSampler(dataset))), or "
                "use losses.mean() if no samples are skipped."
            )
        return (losses * self.weights(index).to(losses.device)).mean()

    def update(self, index: Tensor, losses: Tensor) -> None:
        """Remember the samples' losses.

        Args:
            index: The samples' positions, shape `(B,)`. Of a sample that is there twice, one of
                its losses is remembered.
            losses: Their losses, shape `(B,)`.

        Raises:
            TypeError: If `index` is not of integers.
            ValueError: If the shapes differ, or a position is out of range. On a GPU, where looking
                would mean to wait, `begin` raises it: at the next epoch.
        """
        inside, _ = self._checked(index)
        if index.dim() != 1 or index.shape != losses.shape:
            raise ValueError(
                f"`losses` should be one number for each sample, shape {tuple(index.shape)}. Found "
                f'{tuple(losses.shape)}; compute them with reduction="none".'
            )
        self.losses[inside] = losses.detach().to(self.losses)

    def weights(self, index: Tensor) -> Tensor:
        """What the samples' losses count in this epoch.

        Args:
            index: The samples' positions, shape `(B,)`.

        Returns:
            Shape `(B,)`, float32: 1 for who is always kept, `1 / chance` for who was drawn, 0 for
            who rests. On a GPU NaN for a position out of range.

        Raises:
            TypeError: If `index` is not of integers.
            ValueError: If a position is out of range; see `update`.
        """
        inside, wrong = self._checked(index)
        return self._weights[inside].masked_fill_(wrong, torch.nan)

    def _checked(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Positions that are safe to look at, and which were not before."""
        if not isinstance(index, Tensor) or index.dtype not in _INTEGERS:
            found = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"`index` should be a tensor of integers. Found {found}.")
        here = self.losses.device
        index = index.detach().to(here, torch.int64, non_blocking=here.type != "cpu")
        inside = index.clamp(0, self.num_samples - 1)
        wrong = inside != index
        if here.type == "cpu" and not torch.compiler.is_compiling():
            if wrong.any():
                self._refuse(int(index[wrong][0]))
        elif index.numel():  # not `where`, which brings a number to the device and waits for it
            first = index.masked_fill(~wrong, _NO_FAULT).amin()
            self._fault.copy_(torch.minimum(self._fault, first))
        return inside, wrong

    def _refuse(self, position: int) -> None:
        raise ValueError(
            f"`index` should be in [0, {self.num_samples}). Found {position}; indices come from "
            f"IndexedDataset, and `num_samples` is the length of that dataset."
        )

    @exact()
    def begin(self) -> Tensor:
        """Begin an epoch: decide who rests.

        Returns:
            The positions of those who do not, int64, ascending, shape `(K,)`, on the CPU.

        Raises:
            ValueError: If `update` or `weights` was given a position out of range on a GPU.
        """
        if (fault := int(self._fault)) != _NO_FAULT:
            self._refuse(fault)
        seed, total = fresh(self.seed, self.epoch), self.num_samples
        self.epoch += 1
        size = kept(total, self.ratio)
        known = ~self.losses.isnan()
        mean = self.losses[self.losses.isfinite()].mean()  # of none NaN, above which is nobody
        hard = (known & (self.losses > mean)).nonzero()[:, 0].cpu().numpy()
        if 2 * len(hard) > size:
            most = max(size // 2, 0)
            losses = self.losses[torch.from_numpy(hard).to(self.losses.device)]
            hard = hard[select(losses, most / len(hard), seed=seed).numpy()] if most else hard[:0]
        if size == total:
            hard = np.arange(total)
        rest = np.setdiff1d(np.arange(total), hard, assume_unique=True)
        found = drawn(lambda: [rest], len(rest), size - len(hard), seed, stream=1)
        self._weights.zero_()
        self._weights[torch.from_numpy(hard).to(self.losses.device)] = 1
        self._weights[torch.from_numpy(found).to(self.losses.device)] = len(rest) / max(
            len(found), 1
        )
        return torch.from_numpy(np.sort(np.concatenate([hard, found])))


class _Awake(Sampler[int]):
    def __init__(self, sampling: LossSampling, sampler: Iterable[int]) -> None:
        self.sampling, self.inner = sampling, sampler

    def __len__(self) -> int:
        return kept(self.sampling.num_samples, self.sampling.ratio)

    def __iter__(self) -> Iterator[int]:
        total = self.sampling.num_samples
        awake = np.zeros(total, dtype=bool)
        awake[self.sampling.begin().numpy()] = True
        for position in self.inner:
            if not (hasattr(position, "__index__") and 0 <= position < total):
                raise ValueError(
                    f"`sampler` should give one position in [0, {total}) after the other. Found "
                    f"{position!r}; `num_samples` is the length of the dataset that it samples."
                )
            if awake[position]:
                yield position


def _checked(num_samples: int, ratio: float, seed: int) -> tuple[int, float, int]:
    total = scalars.integer("num_samples", num_samples, least=1)
    return total, check_ratio("ratio", ratio), scalars.integer("seed", seed)
