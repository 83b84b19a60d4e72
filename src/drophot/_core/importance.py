"""The interface of importances: functions that rank weights or channels."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from drophot._core.signatures import signature_error


class Importance(Protocol):
    """A function that gives each weight an importance; the least important weights are removed.

    Pass one to `magnitude_prune`, `Schedule`, `prune_channels`, `DropHot` or `Grid` as
    `importance=`. Each pruning calls it once for each prunable parameter, before anything is
    changed, without gradients and autocast. It gets the parameter itself, so that it can read
    `weight.grad`, and must not change it.

    Importances are compared with their signs, in the dtype that is returned; if dtypes differ
    between layers, in the one that these promote to. Importances of weights that an earlier
    pruning removed are ignored, even if they are NaN.

    Args:
        name: The name of the parameter, as in `model.named_parameters()`.
        weight: The parameter, of any shape.

    Returns:
        Finite floats of 16 bits or more, of the weight's shape, on any device. A higher one is
        kept longer. For `prune_channels`, none is negative, and one value per output channel,
        `(C_out,)`, is enough.

    Example:
        >>> import torch
        >>> from drophot import magnitude_prune
        >>> def saliency(name: str, weight: Tensor) -> Tensor:
        ...     return (weight * weight.grad).abs()
        >>> model = nn.Linear(3, 1)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -2.0, 1.0]]))
        >>> model(torch.tensor([[0.0, 1.0, 1.0]])).sum().backward()
        >>> magnitude_prune(model, 1 / 3, importance=saliency)["weight"]
        tensor([[False,  True,  True]])
    """

    def __call__(self, name: str, weight: nn.Parameter, /) -> Tensor: ...


def check_importance(name: str, value: object) -> object:
    if value is None:
        return value
    if isinstance(value, type) or not callable(value):
        got = f"the class {value.__qualname__}" if isinstance(value, type) else repr(value)
        raise TypeError(
            f"`{name}` must be a function of a parameter's name and the parameter, got {got}. To "
            f"rank by magnitude, leave it out."
        )
    if wrong := signature_error(value, "weight", None):
        raise TypeError(
            f"`{name}` must take two arguments, a parameter's name and the parameter, got {wrong}."
        )
    return value


def importance_name(importance: Importance | None) -> str:
    if importance is None:
        return "magnitude"
    return getattr(importance, "__qualname__", type(importance).__qualname__)
