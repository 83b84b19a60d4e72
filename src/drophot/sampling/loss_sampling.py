"""Sampling by loss: easy samples are skipped at random and up-weighted, without bias."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from drophot._core import scalars
from drophot._core.exact_arithmetic import exact
from drophot._core.ratios import check_keep_ratio, num_kept
from drophot._core.seeded_draw import derive_seed, draw
from drophot.coreset.score_selection import select

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NO_INVALID_INDEX = torch.iinfo(torch.int64).max


class LossSampling:
    """Randomly skips easy samples and up-weights those kept; the expected gradient is unchanged.

    `ratio` is the fraction of the samples that is **kept** in each epoch,
    `K = max(1, floor(ratio * N + 0.5))` samples. Samples whose last known loss is above the mean
    are always kept; if there are more than `K / 2` of them, only those with the `K / 2` highest
    losses are. The rest of the `K` are drawn at random from the other samples, and their losses are
    multiplied by the inverse of their probability. Over an epoch, the expected sum of the weighted
    gradients equals the sum over all samples. This is InfoBatch with an exact ratio. To use it in
    your own training loop, add the three lines that use `sampling`:

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

    InfoBatch trains on all samples in the last epochs; for these, use a loader without the sampler
    and `losses.mean()`. A sample that has not been seen yet is drawn like the easy samples.
    Distributed training is not supported.

    References:
        Qin et al., InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning,
        ICLR 2024, https://arxiv.org/abs/2303.04947.

    Args:
        num_samples: `N`, the length of the dataset.
        ratio: The fraction kept, in (0, 1].
        seed: Together with the attribute `epoch`, which counts the epochs begun so far, it
            determines which samples are drawn.
        device: Where losses and weights are stored, 8 bytes per sample.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `ratio` is not in (0, 1] or `num_samples` is less than 1.
    """

    def __init__(
        self,
        num_samples: int,
        ratio: float,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.num_samples = scalars.integer("num_samples", num_samples, least=1)
        self.ratio = check_keep_ratio("ratio", ratio)
        self.seed = scalars.integer("seed", seed)
        self.epoch = 0
        with torch.inference_mode(False):  # so that training can update them
            self.losses = torch.full(  # the last known losses
                (self.num_samples,), torch.nan, dtype=torch.float32, device=device
            )
            self._weights = torch.zeros_like(self.losses)  # of this epoch; 0 if skipped
            # The smallest out-of-range index that has not been reported yet.
            self._invalid_index = torch.tensor(_NO_INVALID_INDEX, device=self.losses.device)

    def sampler(self, sampler: Iterable[int]) -> Sampler[int]:
        """Wrap a sampler so that it leaves out the samples that are skipped in this epoch.

        Iterating over it begins an epoch. Its length is `K`, which is correct for a sampler that
        yields each sample once.

        Args:
            sampler: Yields sample indices in any order.

        Returns:
            The wrapped sampler.
        """
        return _SubsetOfEpoch(self, sampler)

    def loss(self, index: Tensor, losses: Tensor) -> Tensor:
        """Record the losses of a batch and return the weighted loss for `backward`.

        Args:
            index: The samples' indices, shape `(B,)`.
            losses: Their losses, shape `(B,)`.

        Returns:
            The mean of the weighted losses.

        Raises:
            TypeError: If `index` does not hold integers.
            ValueError: If the shapes differ, or an index is out of range.
            RuntimeError: If no epoch has begun, so that no sample has a weight.
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
        """Record the losses of a batch.

        Args:
            index: The samples' indices, shape `(B,)`. If a sample occurs twice, one of its losses
                is recorded.
            losses: Their losses, shape `(B,)`.

        Raises:
            TypeError: If `index` does not hold integers.
            ValueError: If the shapes differ, or an index is out of range. On a GPU, where an
                immediate check would require a synchronization, `begin` raises it in the next
                epoch.
        """
        inside, _ = self._clamp(index)
        if index.dim() != 1 or index.shape != losses.shape:
            raise ValueError(
                f"`losses` must hold one loss per sample, shape {tuple(index.shape)}, got shape "
                f'{tuple(losses.shape)}. Compute them with reduction="none".'
            )
        self.losses[inside] = losses.detach().to(self.losses)

    def weights(self, index: Tensor) -> Tensor:
        """The weights of the samples' losses in this epoch.

        Args:
            index: The samples' indices, shape `(B,)`.

        Returns:
            Shape `(B,)`, float32: 1 for a sample that is always kept, `1 / probability` for one
            that was drawn, 0 for one that is skipped. On a GPU, NaN for an index out of range.

        Raises:
            TypeError: If `index` does not hold integers.
            ValueError: If an index is out of range; see `update`.
        """
        inside, invalid = self._clamp(index)
        return self._weights[inside].masked_fill_(invalid, torch.nan)

    def _clamp(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The indices clamped to the valid range, and which of them were out of range."""
        if not isinstance(index, Tensor) or index.dtype not in _INTEGERS:
            found = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"`index` must be a tensor of integers, got {found}.")
        device = self.losses.device
        index = index.detach().to(device, torch.int64, non_blocking=device.type != "cpu")
        inside = index.clamp(0, self.num_samples - 1)
        invalid = inside != index
        if device.type == "cpu" and not torch.compiler.is_compiling():
            if invalid.any():
                self._raise_invalid(int(index[invalid][0]))
        elif index.numel():  # not `where`, which copies a scalar to the device and synchronizes
            first = index.masked_fill(~invalid, _NO_INVALID_INDEX).amin()
            self._invalid_index.copy_(torch.minimum(self._invalid_index, first))
        return inside, invalid

    def _raise_invalid(self, index: int) -> None:
        raise ValueError(
            f"`index` must be in [0, {self.num_samples}), got {index}. Indices come from "
            f"IndexedDataset, and `num_samples` is the length of that dataset."
        )

    @exact()
    def begin(self) -> Tensor:
        """Begin an epoch: draw the samples that are kept in it.

        Returns:
            Their indices, int64, ascending, shape `(K,)`, on the CPU.

        Raises:
            ValueError: If `update` or `weights` received an index out of range on a GPU.
        """
        if (invalid := int(self._invalid_index)) != _NO_INVALID_INDEX:
            self._raise_invalid(invalid)
        seed, total = derive_seed(self.seed, self.epoch), self.num_samples
        self.epoch += 1
        size = num_kept(total, self.ratio)
        known = ~self.losses.isnan()
        mean = self.losses[self.losses.isfinite()].mean()  # NaN if none is known: then none is hard
        hard = (known & (self.losses > mean)).nonzero()[:, 0].cpu().numpy()
        if 2 * len(hard) > size:
            most = max(size // 2, 0)
            losses = self.losses[torch.from_numpy(hard).to(self.losses.device)]
            hard = hard[select(losses, most / len(hard), seed=seed).numpy()] if most else hard[:0]
        if size == total:
            hard = np.arange(total)
        easy = np.setdiff1d(np.arange(total), hard, assume_unique=True)
        drawn = draw(lambda: [easy], len(easy), size - len(hard), seed, stream=1)
        self._weights.zero_()
        self._weights[torch.from_numpy(hard).to(self.losses.device)] = 1
        self._weights[torch.from_numpy(drawn).to(self.losses.device)] = len(easy) / max(
            len(drawn), 1
        )
        return torch.from_numpy(np.sort(np.concatenate([hard, drawn])))


class _SubsetOfEpoch(Sampler[int]):
    def __init__(self, sampling: LossSampling, sampler: Iterable[int]) -> None:
        self.sampling, self.inner = sampling, sampler

    def __len__(self) -> int:
        return num_kept(self.sampling.num_samples, self.sampling.ratio)

    def __iter__(self) -> Iterator[int]:
        total = self.sampling.num_samples
        is_kept = np.zeros(total, dtype=bool)
        is_kept[self.sampling.begin().numpy()] = True
        for index in self.inner:
            if not (hasattr(index, "__index__") and 0 <= index < total):
                raise ValueError(
                    f"`sampler` must yield one index in [0, {total}) at a time, got {index!r}. "
                    f"`num_samples` is the length of the dataset that it samples from."
                )
            if is_kept[index]:
                yield index
