"""Replaces tensors and attributes of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drophot.structured import width_attributes
from drophot.structured.dependency_graph import Axis
from drophot.structured.remaining_sizes import kept_part

# The path of a module, and the place of a width among its attributes.
Attribute = tuple[str, width_attributes.Key]


def replace(
    model: nn.Module, tensors: Mapping[str, Tensor], attributes: Mapping[Attribute, Any]
) -> None:
    """Replace parameters and buffers, by name, everywhere they are used, and attributes."""
    old = dict(model.named_parameters()) | dict(model.named_buffers())
    swap_tensors(model, {id(old[name]): tensor for name, tensor in tensors.items()})
    for (path, key), value in attributes.items():
        width_attributes.write(model.get_submodule(path), key, value)


def swap_tensors(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Replace parameters and buffers by the `id` of the old ones."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if id(tensor) in new:
                    held[name] = new[id(tensor)]  # pyright: ignore[reportArgumentType]
        if isinstance(module, nn.RNNBase):
            names = module._flat_weights_names
            module._flat_weights = [getattr(module, name, None) for name in names]


def shrunk(tensor: Tensor, axes: list[Axis], removed: Tensor) -> Tensor:
    """A parameter or buffer without the removed entries, in the same memory format."""
    part = kept_part(tensor, axes, removed)
    for dims, form in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims and not tensor.is_contiguous():
            part = part.contiguous(memory_format=form)
    return wrapped_like(tensor, part)


def wrapped_like(tensor: Tensor, values: Tensor) -> Tensor:
    """Values as a parameter or buffer with the attributes and gradient hooks of another."""
    if not isinstance(tensor, nn.Parameter):
        return values
    parameter = nn.Parameter(values, requires_grad=tensor.requires_grad)
    vars(parameter).update(vars(tensor))  # `no_decay` and similar
    for hook in (tensor._backward_hooks or {}).values():
        parameter.register_hook(hook)
    for hook in (getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values():
        parameter.register_post_accumulate_grad_hook(hook)
    return parameter
