"""The samples of one epoch, with a state from which the epoch can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from drophot._core import distributed, scalars
from drophot.sampling.saved_state import SavedState


class Epochs(Protocol):
    """What an iterator needs of its sampler.

    `epoch` counts the epochs that were begun, and `_yielded` the samples of the last one that were
    handed out; it is 0 if that epoch is complete.
    """

    @property
    def epoch(self) -> int: ...
    @epoch.setter
    def epoch(self, value: int) -> None: ...

    @property
    def _yielded(self) -> int: ...
    @_yielded.setter
    def _yielded(self, value: int) -> None: ...

    def _next_order(self) -> list[int]:
        """Begin an epoch, and return this rank's samples."""
        ...

    def _current_order(self) -> list[int]:
        """This rank's samples of the epoch that was begun last."""
        ...


class EpochIterator(Iterator[int]):
    """Yields the samples of an epoch, which begins with the first of them.

    It has the two methods of torchdata's protocol, because its loader saves iterators as well.

    Args:
        sampler: The sampler.
        yielded: How many samples of the current epoch were yielded before; 0 begins a new epoch.
    """

    def __init__(self, sampler: Epochs, yielded: int) -> None:
        self._sampler, self._yielded = sampler, yielded
        self._order: list[int] | None = None

    def __next__(self) -> int:
        if self._order is None:
            sampler = self._sampler
            self._order = sampler._current_order() if self._yielded else sampler._next_order()
            if self._yielded > len(self._order):
                raise ValueError(
                    f'`state_dict["yielded"]` must be at most {len(self._order)}, the number of '
                    f"samples in the epoch, got {self._yielded}."
                )
        if self._yielded >= len(self._order):
            self._sampler._yielded = 0
            raise StopIteration
        self._yielded += 1
        # An epoch is complete with its last sample, since a loader that gets full batches only
        # does not ask for another one.
        self._sampler._yielded = self._yielded % len(self._order)
        return self._order[self._yielded - 1]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._sampler.epoch, "yielded": self._yielded}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        saved = SavedState(state_dict)
        saved.check_names({"epoch", "yielded"}, "sampler's iterator")
        yielded = saved.integer("yielded")
        self._sampler.epoch = saved.integer("epoch", least=int(yielded > 0))
        self._yielded = yielded
        self._order = None


def check_replicas(num_replicas: int, rank: int) -> tuple[int, int]:
    """The number of ranks and this one, checked."""
    num_replicas = scalars.integer("num_replicas", num_replicas, least=1)
    rank = scalars.integer("rank", rank)
    if not 0 <= rank < num_replicas:
        raise ValueError(
            f"`rank` must be in [0, num_replicas), got rank={rank} and "
            f"num_replicas={num_replicas}. Pass `dist.get_rank()` and `dist.get_world_size()`."
        )
    return num_replicas, rank


def check_num_processes(num_replicas: int) -> None:
    """Raise an error if the ranks are not the processes of a group of that size."""
    if (processes := distributed.count()) != num_replicas:
        raise RuntimeError(
            f"`num_replicas` must be the number of processes, {processes}, got {num_replicas}. "
            f"Call `torch.distributed.init_process_group` first."
        )


def share(order: list[int], num_replicas: int, rank: int) -> list[int]:
    """Every `num_replicas`-th sample; the first samples are repeated so that shares are equal."""
    total = num_per_rank(len(order), num_replicas) * num_replicas
    while len(order) < total:
        order = order + order[: total - len(order)]
    return order[rank::num_replicas]


def num_per_rank(total: int, num_replicas: int) -> int:
    """The number of samples that each rank gets."""
    return -(-total // num_replicas)
