"""The samples of one epoch, with a state from which the epoch can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from drophot._core import scalars


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
        if self._yielded >= len(self._order):
            self._sampler._yielded = 0
            raise StopIteration
        self._yielded += 1
        self._sampler._yielded = self._yielded
        return self._order[self._yielded - 1]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._sampler.epoch, "yielded": self._yielded}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self._sampler.epoch, self._yielded = state_dict["epoch"], state_dict["yielded"]
        self._order = None


def check_state(
    state_dict: Mapping[str, Any], own: Mapping[str, Any], kind: str, *others: str
) -> None:
    """Check that a state is one of a sampler with the same settings.

    Args:
        state_dict: The state.
        own: The settings of the sampler, which the state must have. `num_replicas` may differ
            between two epochs.
        kind: The name of the sampler's class, for errors.
        others: The names of everything else that the state has, besides `"yielded"`.
    """
    names = {*own, *others, "yielded"}
    if different := names ^ set(state_dict):
        word = "without" if names - set(state_dict) else "with"
        raise ValueError(
            f"`state_dict` must be that of a {kind}, got one {word} "
            f"{', '.join(sorted(names - set(state_dict) or different))}. Load it into an object of "
            f"the class that saved it."
        )
    for name, value in own.items():
        if state_dict[name] != value and (name != "num_replicas" or state_dict["yielded"]):
            raise ValueError(
                f"`state_dict` must be that of a {kind} with {name}={value}, got "
                f"{name}={state_dict[name]}. Create the {kind} with the same arguments."
            )


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


def share(order: list[int], num_replicas: int, rank: int) -> list[int]:
    """Every `num_replicas`-th sample; the first samples are repeated so that shares are equal."""
    total = num_per_rank(len(order), num_replicas) * num_replicas
    while len(order) < total:
        order = order + order[: total - len(order)]
    return order[rank::num_replicas]


def num_per_rank(total: int, num_replicas: int) -> int:
    """The number of samples that each rank gets."""
    return -(-total // num_replicas)
