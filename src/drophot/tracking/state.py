"""The state of a tracker: columns of per-sample tensors, checked, saved and restored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from drophot._core import distributed
from drophot.tracking import deferred_errors, packed_history
from drophot.tracking.deferred_errors import NO_FAULT, NO_TARGET
from drophot.tracking.validation import check_labels, describe

Columns = dict[str, Tensor]


def to_device(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, copied asynchronously where that is safe.

    A copy to a GPU is ordered before the GPU's later work. A copy to the CPU is not ordered: code
    that reads it too early would read uninitialized memory.
    """
    return value.to(device, dtype or value.dtype, non_blocking=device.type != "cpu")


def join_histories(before: Columns, base: Columns, after: Columns) -> Columns:
    """The columns of one process that saw the batches of the others, then those of a rank.

    This function is for trackers whose only column is the history. `before` is the state of the
    others, `after` that of the rank. Both include the `base`, which all ranks started from.
    """
    history = packed_history.join(before["history"], base["history"], after["history"])
    return {"history": history}


class State:
    """The columns of a tracker, the targets, and the first fault that was not raised yet.

    With several ranks it also keeps the `base` that all of them started from: the state after the
    last `sync`, or as it was loaded.

    Args:
        num_samples: `N`.
        columns: The dtype of each column and what follows `N` in its shape. All columns start as
            zeros, and one is the `"history"`.
        join: Like `join_histories`, for these columns.
        device: Where the columns are kept; `None` means the device of the first batch.
        statistics: The labels of the statistics in the columns; empty for the default ones.
        own_scores: The names of those that a user wrote.
    """

    follows_batch = False  # of the states in older pickles

    def __init__(
        self,
        num_samples: int,
        columns: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        join: Callable[[Columns, Columns, Columns], Columns],
        device: torch.device | str | None,
        *,
        statistics: tuple[str, ...] = (),
        own_scores: tuple[str, ...] = (),
    ) -> None:
        self.num_samples = num_samples
        self.statistics = statistics
        self.own_scores = own_scores
        self.follows_batch = device is None
        with _plain_tensors():
            self.columns = {
                name: torch.zeros(num_samples, *shape, dtype=dtype, device=device)
                for name, (dtype, shape) in columns.items()
            }
            self.targets = torch.full((num_samples,), NO_TARGET, dtype=torch.int32, device=device)
            self.fault = torch.tensor(NO_FAULT, device=device)
            self.steps = packed_history.steps(self.targets.device)
        self.base: Columns | None = None  # all zeros
        self.loaded_alone = False
        self._join = join

    def __getstate__(self) -> dict[str, Any]:
        # Not as tensors: a spawned process would get those in memory shared with its parent, and
        # both would write into the same counts.
        return _replaced(self.__dict__, Tensor, _Pickled.of)

    def __setstate__(self, state: dict[str, Any]) -> None:
        with _plain_tensors():
            self.__dict__.update(_replaced(state, _Pickled, _Pickled.tensor))

    @property
    def device(self) -> torch.device:
        """The device of all columns."""
        return self.targets.device

    def follow(self, device: torch.device) -> None:
        """Move to the device of the first batch, if the user did not choose one."""
        if self.follows_batch and self.device != device:
            self.move(device)
        self.follows_batch = False

    def move(self, device: torch.device) -> None:
        """Move all columns to another device."""
        with _plain_tensors():
            self.columns = {name: column.to(device) for name, column in self.columns.items()}
            if self.base is not None:
                self.base = {name: column.to(device) for name, column in self.base.items()}
            self.targets, self.fault = self.targets.to(device), self.fault.to(device)
            self.steps = self.steps.to(device)

    def read(self) -> Columns:
        """All columns, not copied.

        Raises:
            ValueError: If a fault was noted, or a sample was presented too often.
        """
        self.check(int(self.fault))
        if bool((self.columns["history"] < 0).any()):
            raise ValueError(
                f"A sample can be presented at most {packed_history.MAX_PRESENTATIONS} times, and "
                f"one was presented more often. Call `reset` earlier and add up the scores."
            )
        return self.columns

    @property
    def can_sync(self) -> bool:
        """Whether reading a value is free: on a CPU, outside a compiled step."""
        return self.device.type == "cpu" and not torch.compiler.is_compiling()

    def check_equal(
        self, index: Tensor, *pairs: tuple[Tensor, Tensor], classes: tuple[Tensor, Tensor] | None
    ) -> None:
        """Check a batch by values that should be equal; see `deferred_errors.find_fault`."""
        every = [*pairs, *([] if classes is None else [classes])]
        if self.can_sync and all(torch.equal(found, wanted) for found, wanted in every):
            return
        self.note(deferred_errors.find_fault(index, list(pairs), classes))

    def check_finite(self, index: Tensor, values: Tensor) -> None:
        """Check the values `(B, K)` that the user's `K` scores gave to the samples `(B,)`."""
        finite = values.isfinite()
        if self.can_sync and bool(finite.all()):
            return
        index = to_device(index, values.device, torch.int64)
        self.note(deferred_errors.not_finite(index, finite))

    def check_only_loss(self, index: Tensor, targets: Tensor) -> None:
        """Check that samples presented by their losses `(B,)` were never presented otherwise."""
        known = targets >= 0
        if self.can_sync and not bool(known.any()):
            return
        self.note(deferred_errors.loss_later(index, known))

    def note(self, fault: Tensor) -> None:
        """Raise a fault if reading it is free; otherwise keep it until the state is read."""
        if self.can_sync:
            self.check(int(fault))
        else:
            self.fault.copy_(torch.minimum(self.fault, to_device(fault, self.device)))

    def check(self, fault: int) -> None:
        """Raise the ValueError of a fault, unless it is `NO_FAULT`."""
        if fault != NO_FAULT:
            raise ValueError(
                deferred_errors.explain(fault, self.num_samples, self.targets, self.own_scores)
            )

    def reset(self) -> None:
        """Return to the initial state, in place."""
        for column in self.columns.values():
            column.zero_()
        self.base, self.loaded_alone = None, False
        self.targets.fill_(NO_TARGET)
        self.fault.fill_(NO_FAULT)

    def dump(self) -> dict[str, Any]:
        """Copies of all columns, a version and the labels of the statistics, if there are any.

        Raises:
            RuntimeError: If this rank has seen samples that are not merged yet.
            ValueError: As in `read`.
        """
        columns = self.read()
        if (ranks := distributed.count()) > 1 and (unmerged := len(self.unmerged())):
            raise RuntimeError(
                f"Call `sync` on every rank before `state_dict`: this one of {ranks} ranks has "
                f"seen {unmerged} samples since the last `sync`, which the others lack."
            )
        saved: dict[str, Any] = {name: column.clone() for name, column in columns.items()}
        _mark_merged(saved)
        labels = {"statistics": list(self.statistics)} if self.statistics else {}
        return {"version": 1, **saved, "targets": self.targets.clone(), **labels}

    def load(self, saved: Mapping[str, Any], kind: str) -> None:
        """Copy the result of `dump` into this state.

        Args:
            saved: A state.
            kind: The tracker's class, for errors.

        Raises:
            ValueError: If it is of another version, kind or size, or has other statistics.
        """
        mine = self.columns | {"targets": self.targets}
        if "tails" in mine and "tails" not in saved:  # an older state, whose means had no tails
            saved = {**saved, "tails": torch.zeros_like(mine["tails"])}
        if (version := saved.get("version")) != 1:
            raise ValueError(
                f"`state_dict` must have version 1, got version {version!r}. It was not written by "
                f"this version of {kind}."
            )
        labels = tuple(saved.get("statistics", ()))
        if (labels or "means" in saved) and (self.statistics or "means" in mine):
            check_labels(labels, self.statistics)
        if (found := saved.keys() - {"version", "statistics"}) != mine.keys():
            raise ValueError(
                f"`state_dict` must be that of a {kind}, with {', '.join(sorted(mine))}, got one "
                f"with {', '.join(sorted(found))}. Load it into a tracker of the class that saved "
                f"it."
            )
        for name, column in mine.items():
            value = saved[name]
            if not isinstance(value, Tensor) or value.dtype != column.dtype:
                raise ValueError(
                    f'`state_dict["{name}"]` must be a tensor of {column.dtype}, got '
                    f"{describe(value)}."
                )
            if value.shape[:1] == column.shape[:1] and value.shape != column.shape:
                raise ValueError(
                    f'`state_dict["{name}"]` must have shape {tuple(column.shape)}, got '
                    f"{tuple(value.shape)}. Create the tracker with the arguments of "
                    f"{name.partition('.')[0]!r} that it had when the state was saved, such as "
                    f"`window`."
                )
            if value.shape != column.shape:
                raise ValueError(
                    f"`state_dict` must hold {self.num_samples} samples, with {name} of shape "
                    f"{tuple(column.shape)}, got {tuple(value.shape)}. Create the tracker with the "
                    f"number of samples that it had when the state was saved."
                )
        self.reset()
        for name, column in mine.items():
            column.copy_(saved[name])
        self.loaded_alone = distributed.count() == 1
        self.save_base()

    def join(self, before: Columns, base: Columns, after: Columns) -> Columns:
        """As `join_histories`, for the columns of this state."""
        return self._join(before, base, after)

    def unmerged(self) -> Tensor:
        """The samples that were presented since the last `sync`."""
        return (self.columns["history"] & packed_history.SEEN).nonzero()[:, 0]

    def save_base(self) -> None:
        """Remember these columns as those that all ranks have, if there are several."""
        if distributed.count() > 1:  # a single process needs neither the marks nor a second copy
            _mark_merged(self.columns)
            self.base = {name: column.clone() for name, column in self.columns.items()}


def _plain_tensors() -> AbstractContextManager[Any]:
    """Create no inference-mode tensors, which a later training step could not update."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class _Pickled(NamedTuple):
    """A tensor as it is pickled."""

    values: np.ndarray | Tensor  # a tensor if it is on the meta device
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Pickled:
        return cls(tensor if tensor.is_meta else tensor.cpu().numpy(), tensor.device)

    def tensor(self) -> Tensor:
        return torch.as_tensor(self.values).to(self.device, copy=True)


def _replaced(value: Any, kind: type[Any], by: Callable[[Any], Any]) -> Any:
    """A dict of dicts with all values of a class replaced."""
    if isinstance(value, dict):
        return {name: _replaced(part, kind, by) for name, part in value.items()}
    return by(value) if isinstance(value, kind) else value


def _mark_merged(columns: Columns) -> None:
    """Clear the marks of samples presented since the last merge."""
    columns["history"].bitwise_and_(~(packed_history.SEEN | packed_history.FIRST))
