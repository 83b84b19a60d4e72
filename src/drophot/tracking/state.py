"""What a tracker knows of each sample: columns of tensors, checked, merged between ranks, saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from drophot._core import distributed
from drophot.tracking import deferred_errors, packed_history
from drophot.tracking.deferred_errors import NO_FAULT
from drophot.tracking.validation import describe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Columns = dict[str, Tensor]
_ENOUGH = 8  # samples that ranks do not present alike by chance


def bring(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, without waiting for it where that is safe.

    A copy to a GPU is in order with what comes after it there. One to the CPU is not: whoever reads
    it before it has arrived reads what was in that memory before.

    Args:
        value: The tensor.
        device: Where to.
        dtype: And as what.

    Returns:
        The tensor there.
    """
    return value.to(device, dtype or value.dtype, non_blocking=device.type != "cpu")


def join_histories(before: Columns, base: Columns, after: Columns) -> Columns:
    """What one rank saw put after what others saw, where the columns are histories alone.

    Args:
        before: Columns that it comes after.
        base: Columns that all ranks started from.
        after: Columns of the rank.

    Returns:
        Columns of one process that saw both.
    """
    history = packed_history.join(before["history"], base["history"], after["history"])
    return {"history": history}


class State:
    """A column for each statistic, the targets, and the first fault that nobody has looked at.

    With several ranks it also keeps what all of them started from, the `base`: the state as it was
    after the last `sync` or when it was loaded.

    Args:
        num_samples: `N`.
        columns: The dtype of each column and what follows `N` in its shape. All begin as zeros,
            and one is the `"history"`.
        join: As `join_histories`, for these columns.
        device: Where they live.
    """

    def __init__(
        self,
        num_samples: int,
        columns: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        join: Callable[[Columns, Columns, Columns], Columns],
        device: torch.device | str | None,
    ) -> None:
        self.num_samples = num_samples
        with _plain_tensors():
            self.columns = {
                name: torch.zeros(num_samples, *shape, dtype=dtype, device=device)
                for name, (dtype, shape) in columns.items()
            }
            self.targets = torch.full((num_samples,), -1, dtype=torch.int32, device=device)
            self.fault = torch.tensor(NO_FAULT, device=device)
            self.steps = packed_history.steps(self.targets.device)
        self.base: Columns | None = None  # all zeros
        self.loaded_alone = False
        self._join = join

    def __getstate__(self) -> dict[str, Any]:
        # Not as tensors: those come to a process that is started in memory that it shares with who
        # started it, and all would write into one another's counts.
        return _replaced(self.__dict__, Tensor, _Sent.of)

    def __setstate__(self, state: dict[str, Any]) -> None:
        with _plain_tensors():
            self.__dict__.update(_replaced(state, _Sent, _Sent.tensor))

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.targets.device

    def move(self, device: torch.device) -> None:
        """Bring everything to another device.

        Args:
            device: The device.
        """
        with _plain_tensors():
            self.columns = {name: column.to(device) for name, column in self.columns.items()}
            if self.base is not None:
                self.base = {name: column.to(device) for name, column in self.base.items()}
            self.targets, self.fault = self.targets.to(device), self.fault.to(device)
            self.steps = self.steps.to(device)

    def read(self) -> Columns:
        """All columns, if nothing is wrong.

        Returns:
            The columns themselves, not copies.

        Raises:
            ValueError: If a fault was noted, or a sample presented too often.
        """
        self.check(int(self.fault))
        if bool((self.columns["history"] < 0).any()):
            raise ValueError(
                f"A sample should be presented at most {packed_history.MOST_PRESENTATIONS} times. "
                f"Found more; call `reset` before that and add the scores up."
            )
        return self.columns

    @property
    def looks(self) -> bool:
        """Whether looking at a value costs nothing: on a CPU, outside a compiled step."""
        return self.device.type == "cpu" and not torch.compiler.is_compiling()

    def expect(
        self, index: Tensor, *pairs: tuple[Tensor, Tensor], classes: tuple[Tensor, Tensor] | None
    ) -> None:
        """Expect equal pairs; otherwise raise, or keep the fault for whoever reads.

        Args:
            index: The samples, int64, shape `(B,)`, on the state's device.
            *pairs: As for `deferred_errors.found`.
            classes: The same.

        Raises:
            ValueError: If a pair differs, where looking costs nothing.
        """
        every = [*pairs, *([] if classes is None else [classes])]
        if self.looks and all(torch.equal(found, wanted) for found, wanted in every):
            return
        self.note(deferred_errors.found(index, list(pairs), classes))

    def note(self, fault: Tensor) -> None:
        """Raise a fault, or keep it for whoever reads.

        Args:
            fault: As `_faults` has it, int64, no dimension.

        Raises:
            ValueError: If there is one, where looking costs nothing.
        """
        if self.looks:
            self.check(int(fault))
        else:
            self.fault.copy_(torch.minimum(self.fault, bring(fault, self.device)))

    def check(self, fault: int) -> None:
        """Say what is wrong.

        Args:
            fault: As `_faults` has it.

        Raises:
            ValueError: If there is a fault.
        """
        if fault != NO_FAULT:
            raise ValueError(deferred_errors.explain(fault, self.num_samples, self.targets))

    def reset(self) -> None:
        """Forget everything."""
        for column in self.columns.values():
            column.zero_()
        self.base, self.loaded_alone = None, False
        self.targets.fill_(-1)
        self.fault.fill_(NO_FAULT)

    def dump(self) -> dict[str, Any]:
        """What `load` takes: copies of all columns, and a version.

        Returns:
            Tensors and an integer.

        Raises:
            RuntimeError: If other ranks have seen what is not merged yet.
            ValueError: As in `read`.
        """
        columns = self.read()
        if (ranks := distributed.count()) > 1 and (fresh := len(self._fresh())):
            raise RuntimeError(
                f"`sync` should be called on every rank before `state_dict`. Found {fresh} samples "
                f"that this one of {ranks} ranks was shown since the last time."
            )
        saved = {name: column.clone() for name, column in columns.items()}
        _settle(saved)
        return {"version": 1, **saved, "targets": self.targets.clone()}

    def load(self, saved: Mapping[str, Any], kind: str) -> None:
        """Take over what `dump` gave.

        Args:
            saved: That.
            kind: The tracker's class, for errors.

        Raises:
            ValueError: If it is of another version, kind or size.
        """
        mine = self.columns | {"targets": self.targets}
        if "tails" in mine and "tails" not in saved:  # as it was before means had tails
            saved = {**saved, "tails": torch.zeros_like(mine["tails"])}
        if (version := saved.get("version")) != 1:
            raise ValueError(
                f"`state_dict` should be of version 1. Found version {version!r}; it was not "
                f"written by this version of {kind}."
            )
        if (found := saved.keys() - {"version"}) != mine.keys():
            raise ValueError(
                f"`state_dict` should be that of a {kind}, with {', '.join(sorted(mine))}. Found "
                f"{', '.join(sorted(found))}; load it into a tracker of the kind that wrote it."
            )
        for name, column in mine.items():
            value = saved[name]
            if not isinstance(value, Tensor) or value.dtype != column.dtype:
                raise ValueError(
                    f'`state_dict["{name}"]` should be a tensor of {column.dtype}. Found '
                    f"{describe(value)}."
                )
            if value.shape != column.shape:
                raise ValueError(
                    f"`state_dict` should hold {self.num_samples} samples, {name} of shape "
                    f"{tuple(column.shape)}. Found {tuple(value.shape)}; make the tracker with the "
                    f"number of samples that it had when saved."
                )
        self.reset()
        for name, column in mine.items():
            column.copy_(saved[name])
        self.loaded_alone = distributed.count() == 1
        self._start_from_here()

    def sync(self, group: ProcessGroup | None) -> None:
        """Put what the ranks have seen one after the other, in the order of the ranks.

        Args:
            group: The ranks that take part.

        Raises:
            RuntimeError: If the state was loaded before there were ranks.
            ValueError: On all ranks, if one has a fault or two do not agree; or if this rank is
                not in the group.
        """
        if (ranks := distributed.count(group)) < 1:
            raise ValueError(
                "`group` should contain this rank. Found one that does not; call `sync` on the "
                "ranks of the group only."
            )
        if ranks > 1:
            whole = self._of_all_ranks(group)
            # In place: a captured graph goes on writing where it wrote before.
            for name, column in (self.columns | {"targets": self.targets}).items():
                column.copy_(whole[name])
        else:
            self.read()
        self._start_from_here()

    def _fresh(self) -> Tensor:
        return (self.columns["history"] & packed_history.SEEN).nonzero()[:, 0]

    def _start_from_here(self) -> None:
        if distributed.count() > 1:  # alone, nobody will ask what was new, nor need a second copy
            _settle(self.columns)
            self.base = {name: column.clone() for name, column in self.columns.items()}

    def _of_all_ranks(self, group: ProcessGroup | None) -> Columns:
        fresh = self._fresh()
        base = self.base or {n: torch.zeros_like(column) for n, column in self.columns.items()}
        numbers = {
            "kind": len(self.columns),
            "num_samples": self.num_samples,
            "what they started from": int(base["history"].sum()),
            "fault": int(self.fault),
            "alone": int(self.loaded_alone),
            "rows": len(fresh),
        }
        table = distributed.gather_numbers(list(numbers.values()), group, self.device)
        of = dict(zip(numbers, table.T.tolist(), strict=True))
        self.check(numbers["fault"])
        for name in ("kind", "num_samples", "what they started from"):
            if len(set(of[name])) > 1:
                raise ValueError(
                    f"The trackers of all ranks should agree before `sync`. Found, for {name}, "
                    f"{of[name]}. Create equal trackers and load the same state on every rank."
                )
        if any(of["alone"]):
            raise RuntimeError(
                "A state should be loaded after `init_process_group`, so that the tracker knows "
                "what all ranks started from. Found one loaded before; nothing was merged."
            )
        if wrong := [rank for rank, fault in enumerate(of["fault"]) if fault != NO_FAULT]:
            raise ValueError(
                f"Ranks {wrong} received invalid indices (see the error raised there). Nothing was "
                f"merged."
            )
        # Copies, so that an error below leaves everything as it was.
        whole, targets = {n: column.clone() for n, column in base.items()}, self.targets.clone()
        if not any(of["rows"]):
            return whole | {"targets": targets}
        mine = _select(self.columns | {"targets": targets}, fresh) | {"index": fresh}
        first, alike = None, min(of["rows"]) >= _ENOUGH
        for rows in distributed.gather_tables(mine, of["rows"], group, self.device):
            first = first or dict(rows)
            alike = alike and all(torch.equal(rows[name], first[name]) for name in rows)
            index = rows.pop("index")
            theirs, known = rows.pop("targets"), targets.index_select(0, index)
            clash = ((known >= 0) & (theirs >= 0) & (known != theirs)).nonzero()[:, 0]
            if len(clash):
                values = (int(column[clash[0]]) for column in (index, known, theirs))
                raise ValueError(deferred_errors.mismatch(*values))
            targets.index_copy_(0, index, torch.where(known < 0, theirs, known))
            # A sample that no rank before has seen is taken over as it is, bit for bit.
            before, start = (_select(part, index) for part in (whole, base))
            again = before["history"] & packed_history.SEEN > 0
            for name, joined in self._join(before, start, rows).items():
                column = rows[name]
                shape = (-1, *(1,) * (column.dim() - 1))
                whole[name].index_copy_(0, index, torch.where(again.view(shape), joined, column))
        if alike:
            warnings.warn(
                f"Each of {len(of['rows'])} ranks has presented the same samples with the same "
                f"outcome, and each is counted. Ranks that share their batches should not be in "
                f"one `group`, nor should each `observe` all of the data; for ranks that should "
                f"not share them, give the loader a DistributedSampler.",
                stacklevel=4,
            )
        return whole | {"targets": targets}


def _plain_tensors() -> AbstractContextManager[Any]:
    """Not tensors of inference mode, which no later training step could update."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class _Sent(NamedTuple):
    """A tensor on its way to a copy of the state."""

    values: np.ndarray | Tensor  # as it is, if it has no values
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Sent:
        return cls(tensor if tensor.is_meta else tensor.cpu().numpy(), tensor.device)

    def tensor(self) -> Tensor:
        return torch.as_tensor(self.values).to(self.device, copy=True)


def _replaced(value: Any, kind: type[Any], by: Callable[[Any], Any]) -> Any:
    """A dict of dicts with all values of a kind replaced."""
    if isinstance(value, dict):
        return {name: _replaced(part, kind, by) for name, part in value.items()}
    return by(value) if isinstance(value, kind) else value


def _settle(columns: Columns) -> None:
    """From here on every sample's next presentation is the first one since."""
    columns["history"].bitwise_and_(~(packed_history.SEEN | packed_history.FIRST))


def _select(columns: Columns, index: Tensor) -> Columns:
    return {name: column.index_select(0, index) for name, column in columns.items()}
