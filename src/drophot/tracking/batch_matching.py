"""Matches the forwards of attached models with the batches of watched loaders.

A loop takes a batch from a watched loader and calls the model; nothing else connects the two.
Therefore a forward is compared with the batches that wait for their logits: if it has the tensors,
the memory or the values of a batch, it belongs to that batch. Any other forward is not counted. If
a batch is then left without a forward, that is an error. If the caller says that the loop changes
its batches, a forward that cannot be recognized is assigned to the waiting batch, provided that it
is the only one and no other tracker waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from drophot._core.user_warnings import warn
from drophot.tracking.tensor_matching import (
    Batch,
    equal_on_device,
    equal_pairwise,
    has_memory_of,
    has_values_of,
    is_view_of_rows,
    probe,
    same_memory,
    tensors,
)

UNPAIRED = (
    "An attached model must be called on the batches that `watch` handed out, but it was called in "
    "training mode on other tensors, and a batch was left without a forward. If the loop changes "
    "each batch before its forward (normalizes or augments it) and keeps the order of the rows, "
    "pass `attach(model, changed=True)`. Otherwise (it reorders or splits batches, or mixes them "
    "with other data) do not use `watch` and `attach`: take the index from the loader and call "
    "`update(index, logits, targets)` with the batch's logits."
)
_NOTHING_COUNTED = (
    "No batch of this pass had been counted when it ended, because no attached model was called in "
    "training mode on one of them. Attach the model that the loop calls. If you use "
    "`model.compile()`, attach after it and before the first call."
)
_MAX_WAITING = 32  # batches that may be read ahead


class Tracker(Protocol):
    """A tracker as seen by watched loaders and attached models."""

    _pairing: Pairing

    def update(self, index: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Present a batch."""
        ...

    def _note_unpaired(self, wrong: Tensor) -> None:
        """Note, on the device, whether logits belong to another batch."""
        ...


class Pass:
    """One pass over a watched loader, with its batches that wait for their logits."""

    def __init__(self, loader: object) -> None:
        self.loader = loader
        self.waiting: deque[Batch] = deque(maxlen=_MAX_WAITING)
        self.handed_out = self.counted = self.dropped = 0
        self.exhausted = False  # the loader has no more batches
        self.abandoned = False  # the iterator was deleted
        self._warned = False

    def warn(self, more_than: int) -> None:
        """Warn once if more than so many batches were handed out and none was counted."""
        if not self.counted and self.handed_out > more_than and not self._warned:
            self._warned = True
            warn(_NOTHING_COUNTED)


class Call(NamedTuple):
    """A forward of an attached model."""

    module: nn.Module
    inputs: list[Tensor]
    logits: Tensor


class _Unconfirmed(NamedTuple):
    """A batch that was counted by an unrecognized forward, and the inputs of that forward."""

    batch: Batch
    inputs: list[Tensor]
    probes: list[Tensor]


class Pairing:
    """The batches of one tracker that wait for logits, and the forwards so far.

    A copy or pickle is empty.
    """

    def __init__(self) -> None:
        self.waits = False
        # Forwards in compiled code since `process_pending`: only the first and the latest.
        self.first: Any = None
        self.latest: Any = None
        self.error: Exception | None = None  # raised by the next call that reads
        self._passes: list[Pass] = []
        self._unrecognised = 0  # forwards since the last that was counted
        self._last: Batch | None = None
        self._unconfirmed: _Unconfirmed | None = None
        self._last_pass_length = self._unclaimed = 0

    def __reduce__(self) -> tuple[type[Pairing], tuple[()]]:
        return Pairing, ()

    @property
    def unconfirmed(self) -> bool:
        """Whether the last batch was counted by a forward that was not recognized."""
        return self._unconfirmed is not None

    @property
    def active(self) -> bool:
        """Whether a batch waits, or a forward of the last one may come again."""
        return self.waits or self._last is not None

    def begin(self, new: Pass) -> None:
        """Start a pass, and drop finished passes and earlier ones over the same loader."""
        self.check()
        self._passes = [
            old
            for old in self._passes
            if not (old.exhausted or old.abandoned or old.loader is new.loader)
        ]
        self._passes.append(new)
        self._forget_last()
        self._refresh()

    def hand_out(self, to: Pass, batch: Batch) -> None:
        """Let a batch wait for its logits."""
        self.check()
        if to not in self._passes:
            self._passes.append(to)
        to.dropped += len(to.waiting) == _MAX_WAITING
        to.waiting.append(batch)
        to.handed_out += 1
        self._forget_last()
        self._unclaimed = 0
        self.waits = True

    def end(self, done: Pass) -> None:
        """End a pass whose loader has no more batches."""
        done.exhausted, self._last_pass_length = True, done.handed_out
        self._forget_last()
        self.check()

    def abandon(self, gone: Pass) -> None:
        """End a pass whose iterator was deleted. Its batches may still be trained on."""
        gone.abandoned = True
        self._forget_last()
        if not gone.waiting and gone in self._passes:
            self._passes.remove(gone)
        self._refresh()

    def clear(self) -> None:
        """Drop all batches and forwards."""
        self._passes = []
        self._forget_last()
        self.first = self.latest = self.error = None
        self._refresh()

    def process_pending(self, tracker: Tracker) -> None:
        """Process the forwards that compiled code has noted."""
        if (error := self.error) is not None:
            self.error = None
            raise error
        calls, self.first, self.latest = (self.first, self.latest), None, None
        for call in calls:
            if call is not None:
                hook, module, inputs, logits = call
                self.match(tracker, hook, Call(module, list(tensors(inputs)), logits))

    def warn(self) -> None:
        """Warn of each current pass if none of its batches was counted."""
        for one in self._passes:
            one.warn(1)

    def match(self, tracker: Tracker, hook: Any, call: Call) -> None:
        """Count a forward in training mode if it belongs to a batch that waits.

        Args:
            tracker: The tracker that counts.
            hook: The hook that was called. It knows the `others` on the same model.
            call: The forward.

        Raises:
            ValueError: If the batch of the forward cannot be determined, or has another number of
                rows.
        """
        if self._unconfirmed is not None:
            if any(same_memory(z, old) for z in call.inputs for old in self._unconfirmed.inputs):
                return  # the same forward again
            if has_memory_of(self._unconfirmed.batch, call.inputs):
                raise ValueError(UNPAIRED)  # the batch's forward, after another was counted
        if self._last is not None and has_memory_of(self._last, call.inputs):
            return
        waiting = [(p, b) for p in self._passes for b in p.waiting]
        for one, batch in waiting:
            if has_memory_of(batch, call.inputs):
                return self._count(tracker, one, batch, call)
        others = [other.tracker._pairing for other in hook.others(call.module)]
        if any(has_memory_of(b, call.inputs) for other in others for b in other._known()):
            return None
        if not waiting:
            return self._confirm(tracker, call)
        for one, batch in waiting:
            if has_values_of(batch, call.inputs):
                return self._count(tracker, one, batch, call)
        theirs = [b for other in others for p in other._passes for b in p.waiting]
        if any(has_values_of(batch, call.inputs) for batch in theirs):
            return None
        waiting = [(p, b) for p, b in waiting if not (p.exhausted or p.abandoned)]
        if not waiting:
            return None
        one, batch = waiting[-1]
        alone = not theirs and len({p for p, _ in waiting}) == 1
        if not hook.changed or len(waiting) > 1 or not alone:
            equal = equal_on_device(batch, call.inputs) if alone else None
            if equal is not None:
                self._count(tracker, one, batch, call)
                tracker._note_unpaired(~equal)
            elif hook.changed:
                raise ValueError(UNPAIRED)
            elif torch.is_grad_enabled():
                if any(is_view_of_rows(z, t) for z in call.inputs for t in batch.inputs):
                    raise ValueError(_in_parts(call, batch))
                self._unrecognised += 1
            return None
        self._count(tracker, one, batch, call)
        probes = [probe(z).clone() for z in call.inputs if z.device.type != "cpu" and z.dim() > 0]
        self._unconfirmed = _Unconfirmed(batch, call.inputs, probes)
        return None

    def check(self) -> None:
        """Raise an error if batches wait and at least as many forwards were not recognized."""
        waiting = sum(len(one.waiting) for one in self._passes if not one.abandoned)
        if waiting and self._unrecognised >= waiting:
            self.clear()
            raise ValueError(UNPAIRED)

    def count_unclaimed(self) -> None:
        """Warn if the model trained without watched batches: `watch` was left out or replayed."""
        if not self._last_pass_length or any(not p.exhausted for p in self._passes):
            return
        self._unclaimed += 1
        if self._unclaimed == self._last_pass_length:
            warn(
                f"The attached model was trained on {self._last_pass_length} batches that no "
                f"watched loader handed out. They are not counted. Iterate over `watch(loader)` "
                f"again in each epoch (`itertools.cycle` does not), or remove the handle of "
                f"`attach`."
            )

    def _known(self) -> Iterator[Batch]:
        if self._last is not None:
            yield self._last
        for one in self._passes:
            yield from one.waiting

    def _forget_last(self) -> None:
        self._last = self._unconfirmed = None

    def _refresh(self) -> None:
        self.waits = any(one.waiting for one in self._passes)
        if not self.waits:
            self._unrecognised = 0

    def _count(self, tracker: Tracker, one: Pass, batch: Batch, call: Call) -> None:
        logits = call.logits
        if logits.dim() > 0 and len(logits) != len(batch.index):
            raise ValueError(_in_parts(call, batch))
        if self._unrecognised and (one.dropped or one.waiting[0] is not batch):
            raise ValueError(UNPAIRED)  # one of those belonged to an earlier batch
        one.waiting.remove(batch)
        self._unrecognised = 0
        self._last, self._unconfirmed = batch, None  # further forwards on it are not counted
        one.counted += 1
        self._refresh()
        tracker.update(batch.index, logits, batch.targets)

    def _confirm(self, tracker: Tracker, call: Call) -> None:
        """Check a forward after a batch that was counted without being recognized."""
        last = self._unconfirmed
        if last is None or len(call.logits) != len(last.batch.index):
            return
        if not last.probes:
            if not equal_pairwise(last.inputs, call.inputs):
                raise ValueError(UNPAIRED)
            return
        first = equal_on_device(last.batch, last.probes, inputs_probed=True)
        again = equal_on_device(
            replace(last.batch, tensors=last.probes), call.inputs, batch_probed=True
        )
        equal = [one for one in (first, again) if one is not None]
        if not equal:
            raise ValueError(UNPAIRED)
        tracker._note_unpaired(~torch.stack(equal).any())


def _in_parts(call: Call, batch: Batch) -> str:
    return (
        f"An attached model must be called on whole batches, got {len(call.logits)} rows of logits "
        f"for a batch of {len(batch.index)}. Do not use `watch` and `attach` here: take the index "
        f"from the loader and call `update` with the rows that the model was given."
    )
