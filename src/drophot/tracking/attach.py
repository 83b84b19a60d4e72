"""Tracking without changes inside the loop: watched loaders and attached models."""

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
from drophot.tracking.batch_matching import Call, Pass, Tracker
from drophot.tracking.tensor_matching import Batch, tensors
from drophot.tracking.validation import check_plain, describe

_HOW_TO_ATTACH = (
    "Say how to get them from the model's output: "
    '`tracker.attach(model, logits=lambda output: output["logits"])`'
)
_TARGETS = ("targets", "target", "labels", "label")


Presented = tuple[Tensor, Tensor]  # the index and the targets of a batch


def split(batch: Any, targets: Callable[[Any], Tensor] | None) -> tuple[Any, Presented]:
    """Split a batch into the batch without its index, and the index with the targets.

    Args:
        batch: A tuple or list with the index last, or a mapping with the key `"index"`.
        targets: Gets the targets from the batch without its index. `None` takes the second of a
            pair, or the only entry among `targets`, `target`, `labels`, `label`.

    Raises:
        TypeError: If the batch has no index, or its targets cannot be recognized.
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
            f"A batch must contain its samples' index, last in a tuple or as `index` in a dict, "
            f"got {describe(batch)}. Wrap the dataset in IndexedDataset."
        )
    if not isinstance(index, Tensor) or index.is_floating_point():
        raise TypeError(
            f"The index of a batch must be a tensor of integers, got {describe(index)} in "
            f"{describe(batch)}. Wrap the dataset in IndexedDataset."
        )
    if targets is not None:
        return rest, (index, targets(rest))
    if isinstance(rest, Mapping):
        found = [rest[name] for name in _TARGETS if name in rest]
    else:
        found = [rest[1]] if len(rest) == 2 else []
    if len(found) != 1:
        raise TypeError(
            f"A batch without its index must be a pair (inputs, targets) or a dict with one of the "
            f"keys {', '.join(_TARGETS)}, got {describe(rest)}. Say where the targets are: "
            f"`targets=lambda batch: ...`. If the batch has no index, wrap the dataset in "
            f"IndexedDataset."
        )
    return rest, (index, found[0])


class Watched:
    """A loader that yields batches without their index and tells the tracker about them.

    Its other attributes (`sampler`, `dataset`) are those of the loader.
    """

    def __init__(
        self, tracker: Tracker, loader: Iterable[Any], targets: Callable[[Any], Tensor] | None
    ) -> None:
        check_source(loader)
        self.loader = loader
        self._tracker = tracker
        self._get_targets = targets

    def __iter__(self) -> _Iterator:
        return _Iterator(self._tracker, self.loader, self._get_targets)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.loader, name)


class _Iterator:
    """One pass over a watched loader. An error of the loader does not end it."""

    def __init__(
        self, tracker: Tracker, loader: Iterable[Any], targets: Callable[[Any], Tensor] | None
    ) -> None:
        self._tracker, self._get_targets = tracker, targets
        self._pass = Pass(loader)
        self._batches = iter(loader)
        tracker._pairing.begin(self._pass)

    def __iter__(self) -> _Iterator:
        return self

    def __next__(self) -> Any:
        tracker, current = self._tracker, self._pass
        tracker._pairing.process_pending(tracker)
        try:
            batch = next(self._batches)
        except StopIteration:
            if not current.exhausted:
                tracker._pairing.end(current)
                current.warn(2)
            raise
        rest, (index, targets) = split(batch, self._get_targets)
        tracker._pairing.hand_out(current, Batch(index, targets, list(tensors(rest))))
        current.warn(_WARN_AFTER)
        return rest

    def __del__(self) -> None:
        if not hasattr(self, "_batches"):  # the constructor failed
            return
        pairing = self._tracker._pairing
        try:
            pairing.process_pending(self._tracker)
        except Exception as error:  # would be lost in `__del__`
            pairing.error = error
        pairing.abandon(self._pass)
        self._pass.warn(0 if self._pass.exhausted else 1)


_WARN_AFTER = 100  # batches of which none was counted
_HOOKS: weakref.WeakSet[Hook] = weakref.WeakSet()


def attach(
    tracker: Tracker, model: nn.Module, logits: Callable[[Any], Tensor] | None, *, changed: bool
) -> RemovableHandle:
    """Register a `Hook` on a model."""
    hook = Hook(tracker, logits, changed=changed)
    hook.module = weakref.ref(model)
    _HOOKS.add(hook)
    return model.register_forward_hook(hook, with_kwargs=True)


def check_source(loader: object) -> None:
    """Refuse a loader whose dataset joins several IndexedDatasets, which share their indices."""
    source = getattr(loader, "dataset", None)
    joined = {id(part) for part in _indexed(source, 8)}
    if len(joined) > 1:
        raise ValueError(
            f"The samples of a loader must have different indices, got a ConcatDataset of "
            f"{len(joined)} IndexedDatasets, whose indices all start at 0. Join the datasets "
            f"before you wrap them: `IndexedDataset(ConcatDataset([a, b]))`."
        )


def _indexed(source: Any, depth: int) -> list[IndexedDataset]:
    """The IndexedDatasets that a dataset reads from."""
    if isinstance(source, IndexedDataset):
        return [source]
    if not depth or source is None:
        return []
    if isinstance(source, ConcatDataset):
        return [found for part in source.datasets for found in _indexed(part, depth - 1)]
    return _indexed(getattr(source, "dataset", None), depth - 1)


class Hook:
    """A forward hook that passes the logits of a model to a tracker.

    A copy or pickle of the model has a hook without effect, because the copy is not the model that
    is trained.

    Args:
        tracker: The tracker that waits for logits.
        logits: Gets the logits from the model's output; `None` takes the output itself.
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
                logits = find_logits(
                    output, self.logits or _identity, module, _HOW_TO_ATTACH
                ).detach()
                call = (self, module, (args, kwargs), logits)
                if pairing.first is None:
                    pairing.first = call
                else:
                    pairing.latest = call
            return
        if _in_backward():
            return  # recomputed by activation checkpointing
        pairing.process_pending(tracker)
        if not pairing.waits and not pairing.unconfirmed:
            if torch.is_grad_enabled():
                pairing.count_unclaimed()
            return
        logits = find_logits(output, self.logits or _identity, module, _HOW_TO_ATTACH)
        check_plain("logits", logits)
        pairing.match(tracker, self, Call(module, list(tensors((args, kwargs))), logits))

    def others(self, module: nn.Module) -> list[Hook]:
        """The hooks of other trackers on this model, on a part of it or on a model around it."""
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


def _identity(output: Any) -> Any:
    return output


def _in_backward() -> bool:
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def find_logits(
    output: Any, get_logits: Callable[[Any], Any] | None, source: object, fix: str
) -> Tensor:
    """The logits in the output of a model or a step.

    Args:
        output: The output.
        get_logits: Gets the logits from it; `None` takes its entry `"logits"`.
        source: The model or the trainer, for the error.
        fix: The sentence at the end of the error, without a full stop.

    Raises:
        TypeError: If there are no logits, or they are not a tensor.
    """
    if get_logits is None:
        logits = output.get("logits") if isinstance(output, Mapping) else None
    else:
        logits = get_logits(output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"The logits must be a tensor, got {describe(output)} from {type(source).__name__}. "
            f"{fix}."
        )
    return logits
