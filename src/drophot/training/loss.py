"""The loss of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from drophot._core.classifier import check_loss as check_cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]


def check_callable(name: str, function: Any) -> None:
    """Refuse an argument that cannot be called, or a class where an instance is needed."""
    if function is None:
        return
    if isinstance(function, type):
        raise TypeError(
            f"`{name}` must be a function, got the class {function.__name__}. Pass an instance: "
            f"{function.__name__}()."
        )
    if not callable(function):
        raise TypeError(f"`{name}` must be a function or None, got {type(function).__name__}.")


def training_loss(loss: Loss | None, logits: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
    """The scalar whose gradient a step follows; cross-entropy if `loss` is `None`."""
    if loss is not None:
        losses = loss(logits, targets)
        _check_losses(losses, len(targets), weighted=bool(weights))
    else:
        check_cross_entropy(logits, targets)
        if not weights:
            return F.cross_entropy(logits, targets)
        losses = F.cross_entropy(logits, targets, reduction="none")
        losses = losses.flatten(1).mean(1) if losses.dim() > 1 else losses  # a class per pixel
    if weights:
        return (losses * weights[0]).mean()
    return losses.mean() if losses.dim() else losses


def _check_losses(losses: Any, size: int, *, weighted: bool) -> None:
    if not isinstance(losses, Tensor):
        raise TypeError(f"`loss` must return a tensor, got {type(losses).__name__}.")
    if not losses.requires_grad:
        raise ValueError(
            "`loss` must return a tensor with a gradient, got one without. Compute it from the "
            "logits with torch's operations, and call neither detach() nor item()."
        )
    if losses.dim() == 0 and weighted:
        raise ValueError(
            f"`loss` must return one loss per sample, shape ({size},), because `dataset` yields "
            f'weights, got a scalar. Use reduction="none".'
        )
    if losses.dim() and tuple(losses.shape) != (size,):
        raise ValueError(
            f"`loss` must return a scalar or one loss per sample, shape ({size},), got shape "
            f"{tuple(losses.shape)}. Average the other dimensions: losses.flatten(1).mean(1)."
        )
