"""How important the channels of a weight are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from drophot._core.importance import Importance
from drophot._core.interruptions import must_propagate
from drophot.structured.dependency_graph import Axis
from drophot.structured.observations import UserError


def squared_magnitude(name: str, weight: Tensor) -> Tensor:
    """The built-in importance: the square of each weight."""
    return weight.detach().cpu().float().square()


def entry_values(
    importance: Importance, name: str, weight: nn.Parameter, dim: int, axes: list[Axis]
) -> list[Tensor]:
    """The importance of each entry of each axis of a weight, `(axis.ids.numel(),)` each, float64.

    Values per output channel count along the weight's output dimension `dim` only.
    """
    try:
        with torch.no_grad():
            values = importance(name, weight)
    except Exception as error:
        if must_propagate(error):
            raise
        raise UserError(error) from error
    values = _checked(values, name, weight, dim)
    found = []
    for axis in axes:
        ids = axis.ids
        if values.dim() < weight.dim():
            own = values.reshape([-1 if d == dim else 1 for d in range(weight.dim())])
            own = own.expand(ids.shape) if axis.dim == dim else torch.zeros(ids.shape, device="cpu")
        elif ids.numel() < values.numel():
            own = values.sum([d for d in range(weight.dim()) if ids.size(d) == 1], keepdim=True)
        else:
            own = values
        found.append(own.reshape(-1).double())
    return found


def _checked(values: Tensor, name: str, weight: Tensor, dim: int) -> Tensor:
    shapes = (weight.shape[dim],), tuple(weight.shape)
    if not isinstance(values, Tensor) or tuple(values.shape) not in shapes:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"`importance` must return a tensor of shape {shapes[0]}, one value per output channel "
            f"(dimension {dim} of the weight), or {shapes[1]}, one value per weight, got {got} for "
            f"`{name}`."
        )
    if values.layout != torch.strided or values.is_meta:
        raise ValueError(
            f"`importance` must return a dense tensor with data, got {values.layout} on "
            f"{values.device} for `{name}`. Call to_dense() on a sparse tensor."
        )
    real = not values.is_complex() and not values.is_quantized
    if not real or (values.is_floating_point() and values.dtype.itemsize < 2):
        raise TypeError(
            f"`importance` must return floats of 16 bits or more, got {values.dtype} for "
            f"`{name}`. Convert it with .float(), or .abs() if it is complex."
        )
    values = values.detach().cpu()
    if values.is_floating_point() and values.dtype.itemsize < 4:
        values = values.float()  # a sum may exceed float16
    if not bool((values >= 0).all() & values.isfinite().all()):
        wrong = values[~(values >= 0) | ~values.isfinite()]
        raise ValueError(
            f"`importance` must return finite values of at least 0, because they are divided by "
            f"their mean, got {float(wrong.flatten()[0])} for `{name}`."
        )
    return values
