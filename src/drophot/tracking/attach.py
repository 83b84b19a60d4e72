"""Tracking without a change inside the loop: a loader and a model that are listened to."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from torch.utils.hooks import RemovableHandle

from drophot.data.indexing import IndexedDataset
from drophot.data.named_tuples import without_index
from drophot.tracking.batch_matching import Batch, Call, Pass, Tracker, tensors
from drophot.tracking.validation import describe as describe
from drophot.tracking.validation import plain

_ATTACH = (
    "say how to get them from the model's output: "
    '`tracker.attach(model, logits=lambda output: output["logits"])`'
)
_TARGETS = ("targets", "target", "labels", "label")


Presented = tuple[Tensor, Tensor]  # the part of a batch that a tracker needs: index and targets


def split(batch: Any, targets: Callable[[Any], Tensor] | None) -> tuple[Any, Presented]:
    """Take the index off a batch.

    Args:
        batch: A tuple or list with the index last, or a mapping with the key `"index"`.
        targets: How to get the targets from the rest; `None` takes the second of a pair, or the
            one key of `targets`, `target`, `labels`, `label`.

    Returns:
        The batch as it would be without an index, and the index with the targets.

    Raises:
        TypeError: If the batch has no index, or its targets cannot be recognised.
    """
    if isinstance(batch, Mapping) and "index" in batch:
        rest: Any = copy.copy(batch)
        index = rest["index"]
        del rest["index"]
    elif "index" in getattr(batch, "_fields", ()):
        rest, index = without_index(batch), getattr(batch, "index")  # noqa: B009 - for the type
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        rest, index = batch[:-1], batch[-1]
    else:
        raise TypeError(
            f"A batch should hold its samples' index, last in a tuple or as `index` in a dict. "
            f"Found {describe(batch)}; wrap the dataset in IndexedDataset."
        )
    if not isinstance(index, Tensor) or index.is_floating_point():
        raise TypeError(
            f"A batch's index should be a tensor of integers. Found {describe(index)} in "
            f"{describe(batch)}; wrap the dataset in IndexedDataset."
        )
    if targets is not None:
        return rest, (index, targets(rest))
    if isinstance(rest, Mapping):
        found = [rest[name] for name in _TARGETS if name in rest]
    else:
        found = [rest[1]] if len(rest) == 2 else []
    if len(found) != 1:
        raise TypeError(
            f"A batch without its index should be a pair (inputs, targets) or a dict with one of "
            f"the keys {', '.join(_TARGETS)}. Found {describe(rest)}; say where the targets are: "
            f"`targets=lambda batch: ...`. If there is no index in it, wrap the dataset in "
            f"IndexedDataset."
        )
    return rest, (index, found[0])


class Watched:
    """A loader whose batches come without their index, which the tracker keeps until the logits.

    Args:
        tracker: Who awaits the logits of the last batch handed out.
        loader: Anything iterable; what else is asked of it (`sampler`, `dataset`) is passed on.
        targets: As in `split`.
    """

    def __init__(
        self, tracker: Tracker, loader: Iterable[Any], targets: Callable[[Any], Tensor] | None
    ) -> None:
        check_source(loader)
        self.loader = loader
        self._tracker = tracker
        self._find_targets = targets

    def __iter__(self) -> _Walk:
        return _Walk(self._tracker, self.loader, self._find_targets)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.loader, name)


class _Walk:
    """One pass over a watched loader: an error of the loader's does not end it."""

    def __init__(
        self, tracker: Tracker, loader: Iterable[Any], targets: Callable[[Any], Tensor] | None
    ) -> None:
        self._tracker, self._find_targets = tracker, targets
        self._pass = Pass(loader)
        self._batches = iter(loader)
        tracker._pairing.begin(self._pass)

    def __iter__(self) -> _Walk:
        return self

    def __next__(self) -> Any:
        tracker, mine = self._tracker, self._pass
        tracker._pairing.settle(tracker)
        try:
            batch = next(self._batches)
        except StopIteration:
            if not mine.ended:
                tracker._pairing.end(mine)
                mine.warn(2, stacklevel=2)
            raise
        rest, (index, targets) = split(batch, self._find_targets)
        tracker._pairing.hand_out(mine, Batch(index, targets, list(tensors(rest))))
        mine.warn(_MANY, stacklevel=2)
        return rest

    def __del__(self) -> None:
        if not hasattr(self, "_batches"):  # it never began
            return
        pairing = self._tracker._pairing
        try:
            pairing.settle(self._tracker)
        except Exception as error:  # would be lost here
            pairing.error = error
        pairing.leave(self._pass)
        self._pass.warn(0 if self._pass.ended else 1, stacklevel=2)


_MANY = 100
_HOOKS: weakref.WeakSet[Hook] = weakref.WeakSet()


def attach(
    tracker: Tracker, model: nn.Module, logits: Callable[[Any], Tensor] | None, *, changed: bool
) -> RemovableHandle:
    """Let a tracker hear of every forward of a model.

    Args:
        tracker: Who waits for logits.
        model: Whose they are.
        logits: As in `Hook`.
        changed: As in `Hook`.

    Returns:
        The hook's handle.
    """
    hook = Hook(tracker, logits, changed=changed)
    hook.module = weakref.ref(model)
    _HOOKS.add(hook)
    return model.register_forward_hook(hook, with_kwargs=True)


def check_source(loader: object) -> None:
    """Refuse a loader in whose data several samples have the same index.

    Args:
        loader: Anything.

    Raises:
        ValueError: If its data set joins several IndexedDatasets.
    """
    source = getattr(loader, "dataset", None)
    joined = {id(part) for part in _indexed(source, 8)}
    if len(joined) > 1:
        raise ValueError(
            f"A loader's samples should have an index each. Found a ConcatDataset of {len(joined)} "
            f"IndexedDatasets, which all begin at 0; join the data sets first and wrap the whole: "
            f"`IndexedDataset(ConcatDataset([a, b]))`."
        )


def _indexed(source: Any, depth: int) -> list[IndexedDataset]:
    """The IndexedDatasets that a data set reads from."""
    if isinstance(source, IndexedDataset):
        return [source]
    if not depth or source is None:
        return []
    if isinstance(source, ConcatDataset):
        return [found for part in source.datasets for found in _indexed(part, depth - 1)]
    return _indexed(getattr(source, "dataset", None), depth - 1)


class Hook:
    """Gives a model's forwards to a tracker that waits for logits.

    A copy or pickle of the model carries a hook that does nothing: it is not the model that is
    being trained.

    Args:
        tracker: Who waits.
        logits: How to get them from the model's output; `None` takes the output itself.
        changed: Whether the loop changes its batches before the forward.
    """

    def __init__(
        self,
        tracker: Tracker | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        *,
        changed: bool = False,
    ) -> None:
        self.tracker = tracker
        self.logits = logits
        self.changed = changed
        self.module: weakref.ref[nn.Module] | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tracker = self.tracker
        if tracker is None or not module.training:
            return
        pairing = tracker._pairing
        if torch.compiler.is_compiling():
            if pairing.waits:
                logits = find_logits(output, self.logits or _itself, module, _ATTACH).detach()
                call = (self, module, (args, kwargs), logits)
                if pairing.first is None:
                    pairing.first = call
                else:
                    pairing.latest = call
            return
        if _in_backward():
            return  # a forward that is computed again
        pairing.settle(tracker)
        if not pairing.waits and not pairing.doubts:
            if torch.is_grad_enabled():
                pairing.unclaimed()
            return
        logits = find_logits(output, self.logits or _itself, module, _ATTACH)
        plain("logits", logits)
        pairing.give(tracker, self, Call(module, list(tensors((args, kwargs))), logits))

    def others(self, module: nn.Module) -> list[Hook]:
        """Those of other trackers on the same model, or on one that is part of the other."""
        found = []
        for hook in list(_HOOKS):
            other = hook.module and hook.module()
            if other is None or hook.tracker is None or hook.tracker is self.tracker:
                continue
            if not hook.tracker._pairing.active:
                continue
            mine, theirs = module.modules(), other.modules()
            if other is module or any(m is other for m in mine) or any(m is module for m in theirs):
                found.append(hook)
        return found

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def _itself(output: Any) -> Any:
    return output


def _in_backward() -> bool:
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def find_logits(output: Any, how: Callable[[Any], Any] | None, source: object, cure: str) -> Tensor:
    """The logits in what a model, or a step, gave.

    Args:
        output: That.
        how: Gets them from it; `None` takes its `"logits"`.
        source: Who gave it.
        cure: What to do if they are not there.

    Returns:
        The logits.

    Raises:
        TypeError: If they are not there, or no tensor.
    """
    if how is None:
        logits = output.get("logits") if isinstance(output, Mapping) else None
    else:
        logits = how(output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"The logits should be a tensor. Found {describe(output)} from "
            f"{type(source).__name__}; {cure}."
        )
    return logits
