"""The batches that importances are computed from: inputs, targets and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from drophot.prune.latency import call

BatchLoss = Callable[[Any, Any], Tensor]


def loss_of(model: nn.Module, batch: object, loss: BatchLoss | None, device: torch.device) -> Any:
    """The loss of a batch, which is a pair of inputs and targets or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        moved = _moved(_keywords(batch), device)
        outputs = _called(model, moved)
        return _own_loss(outputs) if loss is None else loss(outputs, moved)
    inputs, targets = _pair(batch)
    outputs = _called(model, _moved(inputs, device))
    return (F.cross_entropy if loss is None else loss)(outputs, _moved(targets, device))


def call_on(model: nn.Module, batch: object, device: torch.device) -> None:
    """Call the model with the inputs of a batch: the first element of a tuple or list."""
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    _called(
        model, _moved(_arguments(first, "tensors of inputs, or tuples with them first"), device)
    )


def _called(model: nn.Module, inputs: Any) -> Any:
    with _noted(inputs):
        return call(model, inputs)


@contextmanager
def _noted(inputs: object) -> Iterator[None]:
    """Add a note to a TypeError of the model, which may not take these arguments."""
    try:
        yield
    except TypeError as error:
        how = "the inputs"
        if isinstance(inputs, tuple):
            how = f"{len(inputs)} positional arguments"
        elif isinstance(inputs, dict):
            how = f"the keyword arguments {', '.join(map(str, inputs))}, from a dict"
        error.add_note(
            f"The model was called with {how} of a batch of `batches`. For several inputs, yield a "
            f"tuple or a dict of them as the first element of each batch."
        )
        raise


def _moved(values: Any, device: torch.device) -> Any:
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)


def _keywords(batch: Mapping[Any, Any]) -> dict[Any, Any]:
    """A dict of keyword arguments, without the index that `IndexedDataset` adds."""
    return {name: value for name, value in batch.items() if name != "index"}


def _arguments(inputs: Any, wanted: str) -> Any:
    """Inputs as `call` takes them; a DataLoader makes lists of tuples."""
    if isinstance(inputs, Mapping):
        inputs = _keywords(inputs)
    elif isinstance(inputs, list):
        inputs = tuple(inputs)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise TypeError(
            f"`batches` must yield {wanted}, got {type(inputs).__name__} without a tensor. Wrap it "
            f"in a generator that yields the inputs: a tensor, a tuple of positional or a dict of "
            f"keyword arguments."
        )
    return inputs


def _pair(batch: object) -> tuple[Any, Any]:
    wanted = "tuples of inputs and targets"
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        got = type(batch).__name__
        if isinstance(batch, tuple | list):
            got += f" of length {len(batch)}"
        raise TypeError(
            f"`batches` must yield {wanted}, or dicts of keyword arguments, got {got}. Wrap it in "
            f"a generator that yields them."
        )
    inputs, targets = _arguments(batch[0], wanted), batch[1]
    others = [type(leaf).__name__ for leaf in tree_leaves(targets) if not isinstance(leaf, Tensor)]
    if others:
        raise TypeError(
            f"`batches` must yield tensors of targets, got {others[0]}. Wrap it in a generator "
            f"that yields tensors."
        )
    return inputs, targets


def _own_loss(outputs: Any) -> Any:
    """The loss that a model computed, as those of Transformers do if the batch has labels."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if found is None:
        raise ValueError(
            f"`batches` yields dicts, so the outputs must have their `loss`, but "
            f"{type(outputs).__name__} has none. Add the labels to each dict, pass `loss`, or "
            f"yield tuples of inputs and targets, in which the inputs may be a dict."
        )
    return found
