"""Checks of a classifier, its logits, its targets and its optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each sample is classified correctly, bool `(B,)`.

    A sample whose logits contain NaN or are all minus infinity is never correct.
    """
    top = logits.max(dim=1)
    return (top.indices == targets) & (top.values > -torch.inf)  # NaN is not greater


def first_nonfinite(model: nn.Module) -> str:
    """The name of the first trainable weight that is NaN or infinite, or ""; synchronizes once."""
    found = {
        name: weight.detach().isfinite().all()
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.is_floating_point() and weight.dtype.itemsize > 1
    }
    if not found:
        return ""
    device = next(iter(found.values())).device
    finite = torch.stack([one.to(device) for one in found.values()]).tolist()
    return "" if all(finite) else list(found)[finite.index(False)]


def check_model(model: Any) -> None:
    """Raise a TypeError if `model` is not a module, for example because arguments were swapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be an nn.Module, got {type(model).__name__}. The model is the first "
            f"argument and the data the second."
        )


def check_optimizer(model: nn.Module, optimizer: Any, *, closure: bool = False) -> None:
    """Raise an error if an optimizer cannot train a model, or steps only with a closure."""
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(
            f"`model` must have trainable parameters, but this {type(model).__name__} has none."
        )
    if isinstance(optimizer, type) or not hasattr(optimizer, "param_groups"):
        found = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer of the model's parameters, got {found}. "
            f"Pass torch.optim.Adam(model.parameters()), for example."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not trainable & held:
        raise ValueError(
            f"`optimizer` must hold parameters of `model`, but none of its {len(held)} parameters "
            f"is among the model's {len(trainable)}. Create it from this model's parameters()."
        )
    if not closure and _needs_closure(optimizer):
        raise TypeError(
            f"`optimizer` must support steps without a closure, got {type(optimizer).__name__}, "
            f"which needs one. Use another optimizer or your own training loop."
        )


def _needs_closure(optimizer: Any) -> bool:
    try:
        parameters = inspect.signature(optimizer.step).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(one.name == "closure" and one.default is one.empty for one in parameters)


def logits_of(model: nn.Module, forward: Callable[[Tensor], Any], inputs: Tensor) -> Tensor:
    """The logits of a batch, with a clear error if the inputs or the logits have a wrong type.

    `forward` calls `model`.
    """
    try:
        logits = forward(inputs)
    except RuntimeError as error:
        wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        if inputs.dtype in (wanted, torch.int64, torch.int32) or wanted is None:
            raise
        raise TypeError(
            f"`dataset` must yield inputs that the model accepts, {wanted} like its weights, got "
            f"{inputs.dtype}, for which {type(model).__name__} raised {type(error).__name__}: "
            f"{error}. Convert them in the dataset: `inputs.float() / 255` for uint8 images."
        ) from error
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"`model` must return logits, a tensor of shape (B, C), got {type(logits).__name__}. "
            f"Wrap the model in one that returns only the logits."
        )
    return logits


def check_loss(logits: Tensor, targets: Tensor) -> None:
    """Raise a ValueError if there is no cross-entropy between logits and targets.

    Targets are classes, or probabilities of the shape of the logits.
    """
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"`model` must return logits (B, C) with C at least 2, got shape "
            f"{tuple(logits.shape)}. Use a network with one output per class."
        )
    classes = not targets.is_floating_point()
    wanted = (*logits.shape[:1], *logits.shape[2:]) if classes else tuple(logits.shape)
    if tuple(targets.shape) != wanted:
        raise ValueError(
            f"`dataset` must have integer targets whose batches have shape "
            f"{(len(logits), *logits.shape[2:])}, got {targets.dtype} of shape "
            f"{tuple(targets.shape)}. Use squeeze(1) for a column, argmax(1) for one-hot targets."
        )


@contextmanager
def require_outputs(model: nn.Module, classes: int) -> Iterator[None]:
    """Raise a ValueError at the model's first call in the block if it has too few outputs.

    `classes` is the number of classes in the targets of the whole dataset.
    """

    def check(module: nn.Module, args: Any, logits: Any) -> None:
        handle.remove()
        if isinstance(logits, Tensor) and logits.dim() > 1 and 1 < logits.shape[1] < classes:
            raise ValueError(
                f"`dataset` must have targets in [0, {logits.shape[1]}), the classes of the "
                f"model, got {classes - 1}."
            )

    if getattr(model, "_compiled_call_impl", None) is not None:
        yield  # the hook would cause a second compilation
        return
    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def check_classes(logits: Tensor, targets: Tensor) -> None:
    """Raise a ValueError unless logits are `(B, C)`, C at least 2, and targets integers `(B,)`."""
    valid = logits.dim() == 2 and logits.shape[1] > 1 and targets.shape == logits.shape[:1]
    if not valid or targets.is_floating_point():
        raise ValueError(
            f"`dataset` must have one integer target per sample for logits (B, C) with C at least "
            f"2, got logits of shape {tuple(logits.shape)} and targets of {targets.dtype} and "
            f"shape {tuple(targets.shape)}. Use squeeze(1) for a column and argmax(1) for one-hot "
            f"targets."
        )
