"""Find the current parameters of a model by the names of its masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")  # DDP, EMA; torch.compile; FSDP


def find(model: nn.Module, path: str) -> nn.Parameter | None:
    """The parameter at a path, or `None`."""
    *parents, last = path.split(".")
    module: nn.Module | None = model
    for name in parents:  # the dictionaries of a scripted module have no `get`
        if module is None or name not in module._modules:
            return None
        module = module._modules[name]
    if module is None or last not in module._parameters:
        return None
    return module._parameters[last]


def paths(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name of the masks, the path of that parameter in the model, which may be wrapped.

    Wrappers add parts to names: `module.` (DistributedDataParallel, DataParallel, AveragedModel) or
    `_orig_mod.` (`torch.compile`). An error is raised if a parameter is missing, sharded or of
    another shape.
    """
    found = {name: name for name in masks if find(model, name) is not None}
    if len(found) < len(masks):
        plain: dict[str, list[str]] = {}
        for path, _ in model.named_parameters(remove_duplicate=False):
            plain.setdefault(without_wrappers(path), []).append(path)
        for name in masks:
            candidates = plain.get(without_wrappers(name), [])
            if name not in found and len(candidates) == 1:
                found[name] = candidates[0]
    for name, mask in masks.items():
        _check(model, name, find(model, found[name]) if name in found else None, mask)
    return {name: found[name] for name in masks}


def current(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The model's current parameters, by the names of the masks."""
    parameters = {name: find(model, path) for name, path in paths(model, masks).items()}
    return {name: weight for name, weight in parameters.items() if weight is not None}


def own_names(names: Collection[str], own: Collection[str]) -> dict[str, str]:
    """For each name, the one in `own` for the same parameter, whether the model is wrapped or not.

    A name that matches none of them, or several, stays as it is.
    """
    plain: dict[str, list[str]] = {}
    for name in own:
        plain.setdefault(without_wrappers(name), []).append(name)
    found = {name: plain.get(without_wrappers(name), []) for name in names if name not in own}
    return {name: name for name in names} | {n: w[0] for n, w in found.items() if len(w) == 1}


def without_wrappers(path: str) -> str:
    """The name of a parameter without the parts that wrappers add."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _check(model: nn.Module, name: str, weight: nn.Parameter | None, mask: Tensor) -> None:
    if weight is None:
        raise ValueError(
            f"`model` must have the parameters that the masks belong to, but "
            f"{type(model).__name__} has no parameter `{name}`. It is another model, or its layers "
            f"were replaced or parametrized. For the model as it is now, use "
            f"Masks.from_zeros(model)."
        )
    if is_sharded(model, weight):
        raise ValueError(
            f"`model` must not be sharded, but `{name}` is sharded over processes "
            f"({type(weight.data).__name__}). Masks cannot be applied to or held on a sharded "
            f"model. Train the pruned model with DistributedDataParallel."
        )
    if weight.shape != mask.shape:
        raise ValueError(
            f"`model` must have weights of the masks' shapes, but `{name}` has shape "
            f"{tuple(weight.shape)} and its mask {tuple(mask.shape)}. It is another model, or its "
            f"channels were pruned after the masks were made. For the model as it is now, use "
            f"Masks.from_zeros(model)."
        )


def is_sharded(model: nn.Module, weight: Tensor) -> bool:
    """Whether a weight is a DTensor or, in the first version of FSDP, part of a flat vector."""
    if hasattr(weight, "device_mesh") or getattr(weight, "_is_flat_param", False):
        return True
    return weight.dim() == 1 and any(
        hasattr(module, "_is_fsdp_managed_module") for module in model.modules()
    )
