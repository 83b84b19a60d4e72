"""Gives a new model the shapes of a pruned one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from drophot.structured import width_attributes
from drophot.structured.model_names import names_in
from drophot.structured.substitution import replace, wrapped_like


def rebuild(model: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Give a new model the shapes of a pruned one, in place, so that it can load its weights.

    Args:
        model: A model as it was before pruning, with any weights. It may be wrapped by
            `torch.compile`, `DataParallel` or `AveragedModel` or not, regardless of the pruned one.
        description: `Pruned.description`, which may have been stored as JSON.

    Returns:
        The model.

    Raises:
        ValueError: If the description does not fit the model. Nothing is changed then.

    Example:
        >>> import torch
        >>> from drophot.structured import prune_channels
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> pruned = prune_channels(model, 0.5, torch.ones(1, 4))
        >>> other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> rebuild(other, pruned.description).load_state_dict(model.state_dict())
        <All keys matched successfully>
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    modules = dict(model.named_modules())
    inside = description.get("inside", ())
    paths = [*description["attributes"], *(path for path, _, _ in inside)]
    named = names_in(model, description["shapes"], paths)
    new: dict[str, Tensor] = {}
    for stored, shape in description["shapes"].items():
        name = named[stored]
        old = tensors.get(name)
        sizes = () if old is None else tuple(old.shape)
        if (
            old is None
            or len(sizes) != len(shape)
            or any(not 0 < n <= size for n, size in zip(shape, sizes, strict=True))
        ):
            got = "has no such tensor" if old is None else f"has shape {sizes}"
            raise ValueError(
                f"`model` must have a tensor `{name}` that is at least as large as "
                f"{tuple(shape)}, but it {got}. Pass a new model, as it was before pruning."
            )
        if stored in description.get("kept_positions", ()):
            part = old.detach().flatten()[description["kept_positions"][stored]].reshape(shape)
        else:
            part = old.detach()[tuple(slice(n) for n in shape)].clone()
        new[name] = wrapped_like(old, part)
    attributes: dict[tuple[str, width_attributes.Key], Any] = {}
    changes: list[tuple[str, width_attributes.Key, Any]] = [
        (named[path], (name,), value)
        for path, values in description["attributes"].items()
        for name, value in values.items()
    ]
    changes += [(named[path], tuple(key), value) for path, key, value in inside]
    for path, key, value in changes:
        try:
            old = width_attributes.read(modules[path], key)
        except (AttributeError, IndexError, KeyError, TypeError):
            old = None
        if not width_attributes.is_integer(old) and not isinstance(old, tuple):
            raise ValueError(
                f"`model` must have an integer or a tuple in "
                f"`{path}.{width_attributes.as_code(key)}`, got {old!r}. Pass a new model, as it "
                f"was before pruning."
            )
        attributes[path, key] = tuple(value) if isinstance(old, tuple) else value
    replace(model, new, attributes)
    return model
