"""Tracking without a change inside the loop: a loader and a model that are listened to."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

_ATTACH = (
    "say how to get them from the model's output: "
    '`tracker.attach(model, logits=lambda output: output["logits"])`'
)
_TARGETS = ("targets", "target", "labels", "label")


Presented = tuple[Tensor, Tensor]  # the part of a batch that a tracker needs: index and targets


class Tracker(Protocol):
    """What stands between a watched loader and an attached model."""

    _awaited: Presented | None

    def update(self, index: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Present a batch."""
        ...


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
        self.loader = loader
        self._tracker = tracker
        self._find_targets = targets

    def __iter__(self) -> Iterator[Any]:
        tracker, handed_out, counted = self._tracker, False, False
        try:
            for batch in self.loader:
                rest, tracker._awaited = split(batch, self._find_targets)
                handed_out = True
                yield rest
                counted = counted or tracker._awaited is None
        finally:  # a break in the loop comes here as well
            tracker._awaited = None
        if handed_out and not counted:
            warnings.warn(
                "No batch of this pass was counted: no attached model was called in training mode. "
                "Attach the model that the loop calls, and after `model.compile()` before its "
                "first call.",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.loader, name)


class Hook:
    """presents the awaited batch when the model it is registered on gives its output.

    A copy or pickle of the model carries a hook that does nothing: it is not the model that is
    being trained.

    Args:
        tracker: Who awaits logits.
        logits: How to get them from the model's output; `None` takes the output itself.
    """

    def __init__(
        self, tracker: Tracker | None = None, logits: Callable[[Any], Tensor] | None = None
    ) -> None:
        self.tracker = tracker
        self.logits = logits

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        tracker = self.tracker
        if tracker is None or tracker._awaited is None or not module.training:
            return
        logits = find_logits(output, self.logits or (lambda output: output), module, _ATTACH)
        index, targets = tracker._awaited
        if logits.dim() > 0 and len(logits) != len(index):
            raise ValueError(
                f"An attached model should be called on the whole batch. Found {len(logits)} rows "
                f"of logits for a batch of {len(index)}; take the index from the loader yourself "
                f"and call `update` with the rows that were shown."
            )
        tracker._awaited = None  # another forward on this batch is not another presentation
        tracker.update(index, logits, targets)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


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


def describe(value: Any) -> str:
    """What a value is, for an error.

    Args:
        value: Anything.

    Returns:
        Its kind, and of what.
    """
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(str, value)) or 'none'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
