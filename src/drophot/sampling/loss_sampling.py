"""Sampling by loss: easy samples are skipped at random and up-weighted, without bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from drophot._core import distributed, scalars
from drophot._core.exact_arithmetic import exact
from drophot._core.ratios import check_keep_ratio, num_kept
from drophot._core.seeded_draw import derive_seed, draw, splitmix64
from drophot.coreset.score_selection import select
from drophot.sampling.epoch_iterator import check_num_processes, check_replicas, num_per_rank
from drophot.sampling.saved_state import checked_state
from drophot.sampling.subset_of_epoch import SubsetOfEpoch

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

    On several ranks, pass `num_replicas` and `rank`. The losses of all ranks are merged when an
    epoch begins, all ranks draw the same samples, and each yields every `num_replicas`-th of them.
    The wrapped sampler must have the same order on all ranks; the simplest way is `sampler()`.

    `state_dict` and `load_state_dict` resume in the middle of an epoch. They are the protocol of
    torchdata's `StatefulDataLoader`, which calls them. In a DataLoader with worker processes, which
    requests samples in advance, set `state["yielded"]` to the number of samples that the loop has
    received.

    References:
        Qin et al., InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning,
        ICLR 2024, https://arxiv.org/abs/2303.04947.

    Args:
        num_samples: `N`, the length of the dataset.
        ratio: The fraction kept, in (0, 1].
        seed: Together with the attribute `epoch`, which counts the epochs begun so far, it
            determines which samples are drawn.
        device: Where losses and weights are stored, 8 bytes per sample.
        num_replicas: The number of ranks among which each epoch is divided.
        rank: Which of them this one is.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `ratio` is not in (0, 1], `num_samples` or `num_replicas` is less than 1, or
            `rank` is not in [0, `num_replicas`).
    """

    def __init__(
        self,
        num_samples: int,
        ratio: float,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.num_samples = scalars.integer("num_samples", num_samples, least=1)
        self.ratio = check_keep_ratio("ratio", ratio)
        self.seed = scalars.integer("seed", seed)
        self.num_replicas, self.rank = check_replicas(num_replicas, rank)
        self.epoch = 0
        self._yielded = 0  # samples of the epoch that was begun last; 0 if it is complete
        self._resume_at = 0
        self._order = torch.empty(0, dtype=torch.int64)  # of all ranks, in that epoch
        with torch.inference_mode(False):  # so that training can update them
            self.losses = torch.full(  # the last known losses
                (self.num_samples,), torch.nan, dtype=torch.float32, device=device
            )
            self._weights = torch.zeros_like(self.losses)  # of this epoch; 0 if skipped
            # Which losses the other ranks lack, if there are any.
            several = self.num_samples if self.num_replicas > 1 else 0
            self._unmerged = torch.zeros(several, dtype=torch.bool, device=self.losses.device)
            # The smallest out-of-range index that has not been reported yet.
            self._invalid_index = torch.tensor(_NO_INVALID_INDEX, device=self.losses.device)

    def sampler(self, sampler: Iterable[int] | None = None) -> Sampler[int]:
        """Wrap a sampler so that it leaves out the samples that are skipped in this epoch.

        Iterating over it begins an epoch. Its length is `K`, divided by the number of ranks and
        rounded up, which is correct for a sampler that yields each sample once.

        Args:
            sampler: Yields sample indices in any order, the same on all ranks. `None` yields them
                in a random order that `seed` and the epoch determine.

        Returns:
            The wrapped sampler. Its `state_dict` and `load_state_dict` are those of this object.
        """
        return SubsetOfEpoch(self, sampler)

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
        if len(self._unmerged):
            self._unmerged[inside] = True

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

    def sync(self) -> None:
        """Merge the losses of all ranks. `begin` does this; call it also before `state_dict`.

        Of several losses of a sample, that of the highest rank is kept. Without ranks, it does
        nothing.

        Raises:
            RuntimeError: If there are several ranks, but no process group of that size.
            ValueError: On all ranks, if their numbers of samples or epochs differ, or one of them
                received an index out of range.
        """
        if self.num_replicas == 1:
            return
        check_num_processes(self.num_replicas)
        device = self.losses.device
        rows = self._unmerged.nonzero()[:, 0]
        valid = int(self._invalid_index) == _NO_INVALID_INDEX
        numbers = [self.num_samples, self.epoch, int(valid), len(rows)]
        table = distributed.gather_numbers(numbers, None, device)
        if (table[:, :2] != table[0, :2]).any() or not table[:, 2].all():
            raise ValueError(
                f"All ranks must have the same number of samples, the same epoch and only valid "
                f"indices, got {table[:, 0].tolist()}, {table[:, 1].tolist()} and valid="
                f"{table[:, 2].bool().tolist()}. Load the same state on every rank."
            )
        lengths = table[:, 3].tolist()
        if any(lengths):
            mine = {"index": rows, "losses": self.losses[rows]}
            for part in distributed.gather_tables(mine, lengths, None, device):
                self.losses[part["index"]] = part["losses"]
        self._unmerged.zero_()

    def state_dict(self) -> dict[str, Any]:
        """A copy of the whole state, equal on all ranks, for `torch.save`.

        Returns:
            The settings, the losses, and the weights and order of the epoch that was begun last;
            `torch.load(weights_only=True)` reads them.

        Raises:
            RuntimeError: If this rank has recorded losses that the others lack. Call `sync` on
                every rank before.
        """
        if self._unmerged.any():
            raise RuntimeError(
                f"Call `sync` on every rank before `state_dict`: this one of {self.num_replicas} "
                f"ranks has recorded {int(self._unmerged.sum())} losses that the others lack."
            )
        return {
            **self._settings(),
            "epoch": self.epoch,
            "yielded": self._yielded,
            "losses": self.losses.clone(),
            "weights": self._weights.clone(),
            "order": self._order.clone(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume: the next iteration over a sampler yields the rest of the epoch.

        Args:
            state_dict: The state of an object with the same arguments, of any rank.

        Raises:
            ValueError: If it is of an object with other arguments, or not such a state.
        """
        others = ("epoch", "losses", "weights", "order")
        saved = checked_state(state_dict, self._settings(), "LossSampling", *others)
        losses = saved.tensor("losses", (self.num_samples,))
        weights = saved.weights("weights", (self.num_samples,))
        order = saved.indices("order", (None,), self.num_samples)
        size = num_per_rank(len(order), self.num_replicas)
        yielded = saved.integer("yielded", most=size)
        self.epoch = saved.integer("epoch", least=int(yielded > 0))
        self._yielded = self._resume_at = yielded % max(size, 1)
        self.losses.copy_(losses)
        self._weights.copy_(weights)
        self._order = order.cpu().clone()
        self._unmerged.zero_()

    def _settings(self) -> dict[str, Any]:
        names = ("num_samples", "ratio", "seed", "num_replicas")
        return {name: getattr(self, name) for name in names}

    def _check_order(self) -> None:
        """Refuse orders that differ between the ranks, whose shares would overlap."""
        if self.num_replicas == 1:
            return
        place = splitmix64(np.arange(len(self._order)), 0)
        value = splitmix64(self._order.numpy(), 1)
        digest = int(np.bitwise_xor.reduce(place * value, initial=0) >> np.uint64(1))
        found = distributed.gather_numbers([digest], None, self.losses.device)
        if (found != found[0]).any():
            raise ValueError(
                "`sampler` must yield the same order on every rank, but the orders differ. Use "
                "`sampling.sampler()` without a sampler, or give each rank's sampler a generator "
                "with the same seed. It must yield all samples, not this rank's share."
            )

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
        """Begin an epoch: draw the samples that are kept in it. Call it on every rank.

        Returns:
            Their indices, int64, ascending, shape `(K,)`, on the CPU, the same on all ranks.

        Raises:
            ValueError: If `update` or `weights` received an index out of range on a GPU; as in
                `sync`.
            RuntimeError: As in `sync`.
        """
        self.sync()
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
