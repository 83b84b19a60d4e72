"""Which batch an attached model's logits are of: told by its tensors, their memory or values.

A loop takes a batch from a watched loader and calls the model; nothing else connects the two. So a
forward is compared with the batches that wait: on the same tensors, memory or values it is the
batch's. Any other forward is not counted, and if a batch is left without one of its own because of
that, it is an error. Only where the caller says that the loop changes its batches, an unknown
forward is taken for that of the batch, if it is the only one, of the only tracker that waits.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

UNPAIRED = (
    "An attached model should be called on the batches that `watch` handed out. Found forwards in "
    "training mode on other tensors and values, and a batch without a forward of its own. If the "
    "loop changes each batch before its forward (normalises or augments it) and keeps its rows in "
    "order, say so: `attach(model, changed=True)`. Otherwise (rows in another order, batches in "
    "parts, mixed or joined with other data) take the index from the loader and call "
    "`update(index, logits, targets)` with the batch's logits, without `watch` and `attach`."
)
_UNCOUNTED = (
    "No batch of this pass was counted while it lasted: no attached model was called in training "
    "mode on one of them. Attach the model that the loop calls, and after `model.compile()` before "
    "its first call."
)
_DEPTH = 32  # batches that may be read ahead


class Tracker(Protocol):
    """What stands between a watched loader and an attached model."""

    _pairing: Pairing

    def update(self, index: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Present a batch."""
        ...

    def _doubt(self, wrong: Tensor) -> None:
        """Note, on the device, that logits may be another batch's."""
        ...


@dataclass(frozen=True, eq=False)
class Batch:
    """What was handed out: for the tracker, and to be recognised by."""

    index: Tensor
    targets: Tensor
    tensors: list[Tensor]

    @property
    def inputs(self) -> list[Tensor]:
        """Its tensors but for the targets, which tell nothing of what the model was called on."""
        return [t for t in self.tensors if not _same(t, self.targets)] or self.tensors


class Pass:
    """Batches of one walk through a loader that wait for their logits."""

    def __init__(self, loader: object) -> None:
        self.loader = loader
        self.waiting: deque[Batch] = deque(maxlen=_DEPTH)
        self.handed_out = self.counted = self.dropped = 0
        self.ended = False  # it has no more batches
        self.left = False  # nobody asks for more
        self._warned = False

    def warn(self, more_than: int, stacklevel: int) -> None:
        """Say once that nothing was counted, if more batches than that were handed out."""
        if not self.counted and self.handed_out > more_than and not self._warned:
            self._warned = True
            warnings.warn(_UNCOUNTED, stacklevel=stacklevel + 1)


class Call(NamedTuple):
    """A forward of an attached model."""

    module: nn.Module
    inputs: list[Tensor]
    logits: Tensor


class _Doubt(NamedTuple):
    """A batch whose logits were taken without being recognised, and what they were of."""

    batch: Batch
    inputs: list[Tensor]
    probes: list[Tensor]


class Pairing:
    """The batches of one tracker that wait, and the forwards that came.

    A copy or pickle waits for nothing.
    """

    def __init__(self) -> None:
        self.waits = False
        self.first: Any = None  # forwards inside of compiled code: the first since `settle`,
        self.latest: Any = None  # and the last
        self.error: Exception | None = None  # for whoever reads
        self._passes: list[Pass] = []
        self._unknown = 0  # forwards of no batch, since the last that was counted
        self._last: Batch | None = None
        self._doubt: _Doubt | None = None
        self._round = self._unclaimed = 0

    def __reduce__(self) -> tuple[type[Pairing], tuple[()]]:
        return Pairing, ()

    @property
    def doubts(self) -> bool:
        """Whether the last logits were taken without being recognised."""
        return self._doubt is not None

    @property
    def active(self) -> bool:
        """Whether a batch waits, or the last one's forwards may still come again."""
        return self.waits or self._last is not None

    def begin(self, new: Pass) -> None:
        """A pass begins: what the one before over the same loader left behind is given up."""
        self.check()
        self._passes = [
            old for old in self._passes if not (old.ended or old.left or old.loader is new.loader)
        ]
        self._passes.append(new)
        self._last = self._doubt = None
        self._refresh()

    def hand_out(self, to: Pass, batch: Batch) -> None:
        """A batch goes to the loop."""
        self.check()
        if to not in self._passes:
            self._passes.append(to)
        to.dropped += len(to.waiting) == _DEPTH
        to.waiting.append(batch)
        to.handed_out += 1
        self._last = self._doubt = None
        self._unclaimed = 0
        self.waits = True

    def end(self, done: Pass) -> None:
        """A pass has no more batches."""
        done.ended, self._round = True, done.handed_out
        self._last = self._doubt = None
        self.check()

    def leave(self, gone: Pass) -> None:
        """A pass that nobody walks on; the batches that it handed out may still be trained on."""
        gone.left = True
        self._last = self._doubt = None
        if not gone.waiting and gone in self._passes:
            self._passes.remove(gone)
        self._refresh()

    def give_up(self) -> None:
        """Wait no more."""
        self._passes = []
        self._last = self._doubt = None
        self.first = self.latest = self.error = None
        self._refresh()

    def settle(self, tracker: Tracker) -> None:
        """Take in what compiled code could only note down."""
        if (error := self.error) is not None:
            self.error = None
            raise error
        calls, self.first, self.latest = (self.first, self.latest), None, None
        for call in calls:
            if call is not None:
                hook, module, inputs, logits = call
                self.give(tracker, hook, Call(module, list(tensors(inputs)), logits))

    def warn(self) -> None:
        """Say so if a pass is under way of which nothing was counted."""
        for one in self._passes:
            one.warn(1, stacklevel=4)

    def give(self, tracker: Tracker, hook: Any, call: Call) -> None:
        """A forward in training mode: count it, if it is a batch's that waits.

        Args:
            tracker: Who counts.
            hook: Who heard of it, with the other `hooks` that may wait on the same model.
            call: The forward.

        Raises:
            ValueError: If it cannot be told which batch it is of, or has other rows than that.
        """
        if self._doubt is not None:
            if any(_same(z, old) for z in call.inputs for old in self._doubt.inputs):
                return  # the same again
            if _is_of(self._doubt.batch, call.inputs):
                raise ValueError(UNPAIRED)  # here is the batch, and another forward was counted
        if self._last is not None and _is_of(self._last, call.inputs):
            return
        waiting = [(p, b) for p in self._passes for b in p.waiting]
        for one, batch in waiting:
            if _is_of(batch, call.inputs):
                return self._count(tracker, one, batch, call)
        others = [other.tracker._pairing for other in hook.others(call.module)]
        if any(_is_of(b, call.inputs) for other in others for b in other._known()):
            return None
        if not waiting:
            return self._second(tracker, call)
        for one, batch in waiting:
            if _has_values(batch, call.inputs):
                return self._count(tracker, one, batch, call)
        theirs = [b for other in others for p in other._passes for b in p.waiting]
        if any(_has_values(batch, call.inputs) for batch in theirs):
            return None
        waiting = [(p, b) for p, b in waiting if not (p.ended or p.left)]
        if not waiting:
            return None
        one, batch = waiting[-1]
        alone = not theirs and len({p for p, _ in waiting}) == 1
        if not hook.changed or len(waiting) > 1 or not alone:
            equal = _on_device(batch, call.inputs) if alone else None
            if equal is not None:
                self._count(tracker, one, batch, call)
                tracker._doubt(~equal)
            elif hook.changed:
                raise ValueError(UNPAIRED)
            elif torch.is_grad_enabled():
                if any(_is_part(z, t) for z in call.inputs for t in batch.inputs):
                    raise ValueError(_in_parts(call, batch))
                self._unknown += 1
            return None
        self._count(tracker, one, batch, call)
        probes = [_probe(z).clone() for z in call.inputs if z.device.type != "cpu" and z.dim() > 0]
        self._doubt = _Doubt(batch, call.inputs, probes)
        return None

    def check(self) -> None:
        """Refuse to go on where a batch has no forward and there are forwards of no batch.

        Raises:
            ValueError: If there are as many of these as of those.
        """
        waiting = sum(len(one.waiting) for one in self._passes if not one.left)
        if waiting and self._unknown >= waiting:
            self.give_up()
            raise ValueError(UNPAIRED)

    def unclaimed(self) -> None:
        """A forward that is trained on while nothing waits: `watch` was left out, or replayed."""
        if not self._round or any(not p.ended for p in self._passes):
            return
        self._unclaimed += 1
        if self._unclaimed == self._round:
            warnings.warn(
                f"The attached model was trained on {self._round} batches that no watched loader "
                f"handed out; they are not counted. Iterate over `watch(loader)` anew for each "
                f"epoch, which `itertools.cycle` does not, or remove the handle of `attach`.",
                stacklevel=2,
            )

    def _known(self) -> Iterator[Batch]:
        if self._last is not None:
            yield self._last
        for one in self._passes:
            yield from one.waiting

    def _refresh(self) -> None:
        self.waits = any(one.waiting for one in self._passes)
        if not self.waits:
            self._unknown = 0

    def _count(self, tracker: Tracker, one: Pass, batch: Batch, call: Call) -> None:
        logits = call.logits
        if logits.dim() > 0 and len(logits) != len(batch.index):
            raise ValueError(_in_parts(call, batch))
        if self._unknown and (one.dropped or one.waiting[0] is not batch):
            raise ValueError(UNPAIRED)  # one of those was of a batch that came before
        one.waiting.remove(batch)
        self._unknown = 0
        self._last, self._doubt = batch, None  # another forward on it is not another presentation
        one.counted += 1
        self._refresh()
        tracker.update(batch.index, logits, batch.targets)

    def _second(self, tracker: Tracker, call: Call) -> None:
        """A forward after one that was counted without being recognised."""
        doubt = self._doubt
        if doubt is None or len(call.logits) != len(doubt.batch.index):
            return
        if not doubt.probes:
            if not _equal_all(doubt.inputs, call.inputs):
                raise ValueError(UNPAIRED)
            return
        first = _on_device(doubt.batch, doubt.probes, probed=True)
        again = _on_device(replace(doubt.batch, tensors=doubt.probes), call.inputs, before=True)
        right = [equal for equal in (first, again) if equal is not None]
        if not right:
            raise ValueError(UNPAIRED)
        tracker._doubt(~torch.stack(right).any())


def tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """All tensors in a batch or in what a model is called with."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part, depth - 1)
    elif depth and isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part, depth - 1)


def _is_of(batch: Batch, inputs: list[Tensor]) -> bool:
    """Whether a model was called on a batch's own tensors, or on the same memory."""
    main = _main(batch, inputs)
    return bool(main) and all(any(_same(z, t) for t in batch.inputs) for z in main)


def _main(batch: Batch, inputs: list[Tensor]) -> list[Tensor]:
    """The largest of a model's inputs: a mask or a length may be that of another batch."""
    inputs = [z for z in inputs if not _same(z, batch.targets)]
    rows = [z for z in inputs if z.dim() and len(z) == len(batch.index)] or inputs
    most = max((z.numel() * z.element_size() for z in rows), default=0)
    return [z for z in rows if z.numel() * z.element_size() == most]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or views of all of the same memory."""
    if one is other:
        return True
    if one.device != other.device or one.numel() != other.numel() or not one.numel():
        return False
    try:
        return one.data_ptr() == other.data_ptr() != 0
    except RuntimeError:  # one without memory of its own
        return False


def _is_part(one: Tensor, whole: Tensor) -> bool:
    """Whether a tensor is a view of some rows of another."""
    return one._base is not None and (one._base is whole or one._base is whole._base)


def _in_parts(call: Call, batch: Batch) -> str:
    return (
        f"An attached model should be called on the whole batch. Found {len(call.logits)} rows of "
        f"logits for a batch of {len(batch.index)}; take the index from the loader yourself and "
        f"call `update` with the rows that were shown."
    )


def _has_values(batch: Batch, inputs: list[Tensor]) -> bool:
    """Whether a model was called on a batch's values, in any shape that keeps the rows."""
    main = _main(batch, inputs)
    return bool(main) and all(any(_equal(t, z) for t in batch.inputs) for z in main)


def _equal_all(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(_equal, some, others))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on the CPU have the same values, row by row."""
    if one.device.type != "cpu" or other.device.type != "cpu" or not other.numel():
        return False
    if one.shape != other.shape:
        if one.shape[:1] != other.shape[:1] or one.numel() != other.numel():
            return False
        one, other = one.flatten(1), other.flatten(1)
    try:
        return torch.equal(one.to(other.dtype), other)
    except RuntimeError:  # of a kind that has no such comparison
        return False


def _probe(tensor: Tensor) -> Tensor:
    """Some numbers of each row: the middle, of up to some thirty columns."""
    if tensor.dim() < 2:
        return tensor
    step = max(1, tensor.shape[1] // 16)
    return tensor[(slice(None), slice(None, None, step), *(n // 2 for n in tensor.shape[2:]))]


def _on_device(
    batch: Batch, inputs: list[Tensor], *, probed: bool = False, before: bool = False
) -> Tensor | None:
    """Whether inputs on a device have a batch's values, as far as some show: known there.

    Args:
        batch: With its tensors, or (`before`) with what was taken of them.
        inputs: Tensors on the device, or (`probed`) what was taken of them.
        probed: See `inputs`.
        before: See `batch`.

    Returns:
        A bool on the device; `None` if there is nothing to compare.
    """
    for z in inputs:
        if z.device.type == "cpu" or z.dim() == 0:
            continue
        mine = z if probed else _probe(z)
        for tensor in batch.tensors:
            theirs = tensor if before or tensor.dim() == 0 else _probe(tensor)
            if theirs.shape == mine.shape:
                moved = theirs.to(mine.device, non_blocking=True).to(mine.dtype)
                return (moved == mine).all()
    return None
