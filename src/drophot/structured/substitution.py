"""Put tensors and numbers into a network in the place of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drophot.structured import width_attributes
from drophot.structured.dependency_graph import Axis
from drophot.structured.remaining_sizes import taken

Names = tuple[str, width_attributes.Key]  # of a module, and where in it


def replace(
    model: nn.Module, tensors: Mapping[str, Tensor], attributes: Mapping[Names, Any]
) -> None:
    """Put tensors and attributes into a model, everywhere where the old ones are.

    Args:
        model: The model, changed in place.
        tensors: By the name of the parameter or buffer that they take the place of.
        attributes: By the names of the module and where in it.
    """
    old = dict(model.named_parameters()) | dict(model.named_buffers())
    swap(model, {id(old[name]): tensor for name, tensor in tensors.items()})
    for (path, key), value in attributes.items():
        width_attributes.write(model.get_submodule(path), key, value)


def swap(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Put tensors in the place of others, by identity."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if id(tensor) in new:
                    held[name] = new[id(tensor)]  # pyright: ignore[reportArgumentType]
        if isinstance(module, nn.RNNBase):
            names = module._flat_weights_names
            module._flat_weights = [getattr(module, name, None) for name in names]


def small(tensor: Tensor, axes: list[Axis], gone: Tensor) -> Tensor:
    """What is left of a parameter or buffer, with the memory format and hooks that it had."""
    left = taken(tensor, axes, gone)
    for dims, form in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims and not tensor.is_contiguous():
            left = left.contiguous(memory_format=form)
    return like(tensor, left)


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """Values as a parameter or buffer like another: its attributes, gradient hooks and flags."""
    if not isinstance(tensor, nn.Parameter):
        return values
    parameter = nn.Parameter(values, requires_grad=tensor.requires_grad)
    vars(parameter).update(vars(tensor))  # no_decay and the like
    for hook in (tensor._backward_hooks or {}).values():
        parameter.register_hook(hook)
    for hook in (getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values():
        parameter.register_post_accumulate_grad_hook(hook)
    return parameter
