"""The weights that pruning is about, and those that it cannot do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

# Where the weights of a layer's linear maps are. An attention layer keeps those of its input
# projections in parameters of its own; its output projection is a Linear.
PRUNABLE: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    _ConvNd: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


def prunable(model: nn.Module, skip: Collection[str]) -> dict[str, nn.Parameter]:
    """The weights that pruning is about, by name, shared ones once.

    Args:
        model: Any module.
        skip: Names of modules or parameters to leave out.

    Returns:
        The parameters, none of them empty.

    Raises:
        TypeError: If `model` is no module, `skip` no collection, or a weight not of plain floats.
        ValueError: If a name is unknown, there are none, or one has no data, is sharded, sparse or
            computed by something else.
    """
    check_module("model", model)
    for path, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                f"`model` should hold its weights whole. Found `{path or 'the model'}` sharded by "
                f"FullyShardedDataParallel; prune before wrapping it."
            )
    without = left_out(model, skip)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        names = [
            name for kind, names in PRUNABLE.items() if isinstance(module, kind) for name in names
        ]
        for attribute in names:
            name = f"{path}.{attribute}" if path else attribute
            if attribute not in module._parameters:
                if path in without:
                    continue
                raise ValueError(
                    f"`model` should have plain parameters. Found `{name}` computed by a "
                    f"parametrization or an older pruning hook; remove that first "
                    f"(torch.nn.utils.parametrize.remove_parametrizations, "
                    f"torch.nn.utils.prune.remove), or give skip=({path!r},)."
                )
            weight = module._parameters[attribute]
            if weight is None or id(weight) in without or id(weight) in seen:
                continue
            _check_weight(name, weight)
            if weight.numel() == 0:
                continue
            seen.add(id(weight))
            found[name] = weight
    if not found:
        raise ValueError(
            f"`model` should have weights to prune, in Linear, Conv or MultiheadAttention layers. "
            f"Found none in {type(model).__name__}"
            f"{' besides those in `skip`' if skip else ''}; prune the module that holds them."
        )
    return found


def check_module(name: str, model: Any) -> None:
    """Refuse what is no module.

    Args:
        name: What the caller calls it.
        model: The value.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(model, nn.Module):
        cure = "; load it into a model, and give that" if isinstance(model, Mapping) else ""
        raise TypeError(f"`{name}` should be a torch.nn.Module. Found {_kind(model)}{cure}.")


def _kind(value: Any) -> str:
    """What a value is, as a user would recognise it."""
    shown = isinstance(value, str | float | int | PurePath)
    return f"{value!r}" if shown else f"a {type(value).__name__}"


def left_out(model: nn.Module, skip: Collection[str]) -> set[int | str]:
    """The parameters (by identity) and the modules (by path) that `skip` names.

    Args:
        model: Any module.
        skip: The names.

    Returns:
        Identities and paths.

    Raises:
        TypeError: If it is no collection.
        ValueError: If a name is unknown.
    """
    if isinstance(skip, str):
        raise TypeError(
            f"`skip` should be a collection of names. Found {skip!r}; give ({skip!r},)."
        )
    modules = {path for path, _ in model.named_modules(remove_duplicate=False) if path}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = modules | parameters.keys()
    for name in skip:
        if name not in known:
            near = get_close_matches(str(name), known, n=3)
            raise ValueError(
                f"`skip` should name modules or parameters of the model. Found {name!r}"
                f"{', near to ' + ', '.join(map(repr, near)) if near else ''}; see "
                f"model.named_modules()."
            )

    def named(path: str) -> bool:
        return any(path == name or path.startswith(f"{name}.") for name in skip)

    return {id(parameter) for path, parameter in parameters.items() if named(path)} | {
        path for path in modules if named(path)
    }


def _check_weight(name: str, weight: nn.Parameter) -> None:
    if is_lazy(weight) or weight.is_meta:
        raise ValueError(
            f"`model` should have its weights. Found `{name}` without data; run one batch through "
            f"a lazy module, or load the weights of one on the meta device, before pruning."
        )
    if hasattr(weight, "device_mesh") or getattr(weight, "_is_flat_param", False):
        raise ValueError(
            f"`model` should hold its weights whole. Found `{name}` sharded over processes "
            f"({type(weight.data).__name__}); prune before sharding it."
        )
    if type(weight.data) is not Tensor or weight.is_quantized:
        raise TypeError(
            f"`model` should have plain float weights. Found `{name}` as a "
            f"{type(weight.data).__name__} of {weight.dtype}; prune before quantising or "
            f"converting it."
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TypeError(
            f"`model` should have float weights of 16 bits or more. Found `{name}` of "
            f"{weight.dtype}; prune before quantising."
        )
    if weight.layout != torch.strided:
        raise ValueError(
            f"`model` should have dense weights. Found `{name}` of {weight.layout}; call "
            f"to_dense() on it first."
        )


def check_finite(name: str, weight: nn.Parameter) -> bool:
    """Refuse a weight that cannot be ranked.

    Args:
        name: Its name.
        weight: The weight.

    Returns:
        Whether it holds anything but zeros.

    Raises:
        ValueError: If it holds NaN or infinity.
    """
    least, most = weight.detach().aminmax()  # the quickest look at all of them; NaN comes through
    if not (least.isfinite() and most.isfinite()):
        bad = int((~weight.isfinite()).sum())
        raise ValueError(
            f"`model` should have finite weights only. Found {bad} that are NaN or infinite in "
            f"`{name}`; a network that diverged has nothing to rank."
        )
    return bool(least) or bool(most)
