"""What a classifier, its logits and its optimiser have to be, and when it is right."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Which samples a classifier gets right; a row with a NaN in it never is.

    Args:
        logits: Shape `(B, C)`.
        targets: Classes, shape `(B,)`.

    Returns:
        Truth values, shape `(B,)`.
    """
    top = logits.max(dim=1)
    return (top.indices == targets) & (top.values == top.values)  # NaN is not NaN


def first_nonfinite(model: nn.Module) -> str:
    """Which of a model's trained weights is NaN or infinite; one wait for the device.

    Args:
        model: The model.

    Returns:
        The first one's name, or nothing.
    """
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
    """Refuse what is no model, such as two arguments that were swapped.

    Args:
        model: Should be one.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` should be an nn.Module. Found {type(model).__name__}; the model comes first "
            f"and the data second."
        )


def check_optimizer(model: nn.Module, optimizer: Any, *, closure: bool = False) -> None:
    """Refuse an optimiser that would not train a model, or could not.

    Args:
        model: The model.
        optimizer: Should hold some of its parameters.
        closure: Whether it may need one for its steps.

    Raises:
        TypeError: If it is no optimiser, or its steps need a closure.
        ValueError: If the model has nothing to train, or the optimiser holds nothing of it.
    """
    mine = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not mine:
        raise ValueError(
            f"`model` should have parameters to train. Found {type(model).__name__} without."
        )
    if isinstance(optimizer, type) or not hasattr(optimizer, "param_groups"):
        found = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(
            f"`optimizer` should be a torch.optim.Optimizer with the model's parameters. Found "
            f"{found}; give torch.optim.Adam(model.parameters()), say."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not mine & held:
        raise ValueError(
            f"`optimizer` should hold parameters that `model` trains. Found {len(held)} parameters "
            f"and none of the model's {len(mine)}; make it anew from this model's parameters()."
        )
    if not closure and _needs_closure(optimizer):
        raise TypeError(
            f"`optimizer` should take its steps without a closure. Found "
            f"{type(optimizer).__name__}; give another one, or write the loop yourself."
        )


def _needs_closure(optimizer: Any) -> bool:
    try:
        parameters = inspect.signature(optimizer.step).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(one.name == "closure" and one.default is one.empty for one in parameters)


def logits_of(model: nn.Module, forward: Callable[[Tensor], Any], inputs: Tensor) -> Tensor:
    """A model's logits.

    Args:
        model: The model.
        forward: Calls it.
        inputs: A batch.

    Returns:
        The logits.

    Raises:
        TypeError: If the model gives something else, or does not take inputs of this kind.
        RuntimeError: If it fails otherwise.
    """
    try:
        logits = forward(inputs)
    except RuntimeError as error:
        wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        if inputs.dtype in (wanted, torch.int64, torch.int32) or wanted is None:
            raise
        raise TypeError(
            f"`dataset` should give inputs that the model takes, of {wanted} as its weights. Found "
            f"{inputs.dtype}, for which {type(model).__name__} raised {type(error).__name__}: "
            f"{error}. Convert them in the data set: `inputs.float() / 255` for images of uint8."
        ) from error
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"`model` should give logits, a tensor of shape (B, C). Found {type(logits).__name__}; "
            f"wrap the model in one that returns the logits alone."
        )
    return logits


def check_loss(logits: Tensor, targets: Tensor) -> None:
    """Refuse logits and targets of which there is no cross-entropy.

    Args:
        logits: Of a batch.
        targets: Classes, or probabilities of the logits' shape.

    Raises:
        ValueError: If the two do not go together.
    """
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"`model` should give logits (B, C) with C at least 2. Found shape "
            f"{tuple(logits.shape)}; give a network with one output for each class."
        )
    classes = not targets.is_floating_point()
    wanted = (*logits.shape[:1], *logits.shape[2:]) if classes else tuple(logits.shape)
    if tuple(targets.shape) != wanted:
        raise ValueError(
            f"`dataset` should have one integer as target, so that a batch's have shape "
            f"{(len(logits), *logits.shape[2:])}. Found {targets.dtype} of shape "
            f"{tuple(targets.shape)}; take squeeze(1) of a column, argmax(1) of one-hot targets."
        )


@contextmanager
def require_logits(model: nn.Module, classes: int) -> Iterator[None]:
    """Refuse a model's first logits, before anything is made of them, if these are too few.

    Args:
        model: The model.
        classes: How many there are, by the targets of the whole data set.

    Yields:
        Nothing.
    """

    def check(module: nn.Module, given: Any, logits: Any) -> None:
        handle.remove()
        if isinstance(logits, Tensor) and logits.dim() > 1 and 1 < logits.shape[1] < classes:
            raise ValueError(
                f"`dataset` should have targets in [0, {logits.shape[1]}), the classes of the "
                f"model. Found {classes - 1}."
            )

    if getattr(model, "_compiled_call_impl", None) is not None:
        yield  # it would be compiled once with the hook and once without
        return
    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def check_classes(logits: Tensor, targets: Tensor) -> None:
    """Refuse logits and targets that cannot be compared.

    Args:
        logits: Of a batch.
        targets: Its classes.

    Raises:
        ValueError: If the logits are not of shape `(B, C)` with C at least 2, or the targets not
            integers `(B,)`.
    """
    fit = logits.dim() == 2 and logits.shape[1] > 1 and targets.shape == logits.shape[:1]
    if not fit or targets.is_floating_point():
        raise ValueError(
            f"`dataset` should have one integer as target for the model's logits (B, C), C at "
            f"least 2. Found logits of shape {tuple(logits.shape)} and targets of {targets.dtype} "
            f"and shape {tuple(targets.shape)}; take squeeze(1) of a column, argmax(1) of one-hot "
            f"targets."
        )
