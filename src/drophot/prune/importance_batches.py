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
        moved = _to_device(_keywords(batch), device)
        outputs = _call_with_note(model, moved)
        return _loss_of_outputs(outputs) if loss is None else loss(outputs, moved)
    inputs, targets = _inputs_and_targets(batch)
    outputs = _call_with_note(model, _to_device(inputs, device))
    return (F.cross_entropy if loss is None else loss)(outputs, _to_device(targets, device))


def call_on(model: nn.Module, batch: object, device: torch.device) -> None:
    """Call the model with the inputs of a batch: the first element of a tuple or list."""
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    _call_with_note(
        model, _to_device(_arguments(first, "tensors of inputs, or tuples with them first"), device)
    )


def _call_with_note(model: nn.Module, inputs: Any) -> Any:
    with _explain_type_errors(inputs):
        return call(model, inputs)


@contextmanager
def _explain_type_errors(inputs: object) -> Iterator[None]:
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


def _to_device(values: Any, device: torch.device) -> Any:
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)


def _keywords(batch: Mapping[Any, Any]) -> dict[Any, Any]:
    """A dict of keyword arguments, without the index that `IndexedDataset` adds."""
    return {name: value for name, value in batch.items() if name != "index"}


def _arguments(inputs: Any, expected: str) -> Any:
    """Inputs as `call` takes them; a DataLoader makes lists of tuples."""
    if isinstance(inputs, Mapping):
        inputs = _keywords(inputs)
    elif isinstance(inputs, list):
        inputs = tuple(inputs)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise TypeError(
            f"`batches` must yield {expected}, got {type(inputs).__name__} without a tensor. "
            f"Wrap the loader in a generator that yields the inputs first: a tensor, a tuple of "
            f"positional arguments or a dict of keyword arguments."
        )
    return inputs


def _inputs_and_targets(batch: object) -> tuple[Any, Any]:
    expected = "tuples of inputs and targets"
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        got = type(batch).__name__
        if isinstance(batch, tuple | list):
            got += f" of length {len(batch)}"
        raise TypeError(
            f"`batches` must yield {expected}, or dicts of keyword arguments, got {got}. "
            f"Wrap the loader in a generator that yields tuples `(inputs, targets)`."
        )
    inputs, targets = _arguments(batch[0], expected), batch[1]
    others = [type(leaf).__name__ for leaf in tree_leaves(targets) if not isinstance(leaf, Tensor)]
    if others:
        raise TypeError(
            f"`batches` must yield tensors of targets, got {others[0]}. Wrap the loader in a "
            f"generator that yields tuples `(inputs, targets)` with tensors as targets."
        )
    return inputs, targets


def _loss_of_outputs(outputs: Any) -> Any:
    """The loss that a model computed, as those of Transformers do if the batch has labels."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if found is None:
        raise ValueError(
            f"`batches` yields dicts, so the outputs must have their `loss`, but "
            f"{type(outputs).__name__} has none. Add the labels to each dict, pass `loss`, or "
            f"yield tuples of inputs and targets, in which the inputs may be a dict."
        )
    return found
