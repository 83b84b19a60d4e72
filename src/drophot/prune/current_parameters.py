"""The parameters that a model has now, by the names that its masks have."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")  # DDP, EMA; torch.compile; FSDP


def find(model: nn.Module, path: str) -> nn.Parameter | None:
    """The parameter at a path, or `None`."""
    *parents, last = path.split(".")
    module: nn.Module | None = model
    for name in parents:
        module = module._modules.get(name)
        if module is None:
            return None
    return module._parameters.get(last)


def paths(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, str]:
    """Where a model has the parameters that masks belong to.

    Names may differ by what a wrapper adds: `module.` of DistributedDataParallel, DataParallel and
    AveragedModel, `_orig_mod.` of `torch.compile`.

    Args:
        model: The model, wrapped or not.
        masks: By parameter name.

    Returns:
        For each name of the masks, the path of the parameter in the model.

    Raises:
        ValueError: If a parameter is missing, sharded or of another shape.
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
    """The parameters of a model that masks belong to, as they are now.

    Args:
        model: The model, wrapped or not.
        masks: By parameter name.

    Returns:
        The parameters, by the masks' names.

    Raises:
        ValueError: If one is missing, sharded or of another shape.
    """
    parameters = {name: find(model, path) for name, path in paths(model, masks).items()}
    return {name: weight for name, weight in parameters.items() if weight is not None}


def own_names(names: Collection[str], own: Collection[str]) -> dict[str, str]:
    """Names of the same parameters in two models, of which one may be wrapped.

    Args:
        names: Names of parameters.
        own: The names that are wanted, of all parameters.

    Returns:
        For each name the one that is wanted; a name that is none of them, or of several, stays.
    """
    plain: dict[str, list[str]] = {}
    for name in own:
        plain.setdefault(without_wrappers(name), []).append(name)
    found = {name: plain.get(without_wrappers(name), []) for name in names if name not in own}
    return {name: name for name in names} | {n: w[0] for n, w in found.items() if len(w) == 1}


def without_wrappers(path: str) -> str:
    """A parameter's name without what DataParallel, DDP, FSDP and torch.compile add to it."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _check(model: nn.Module, name: str, weight: nn.Parameter | None, mask: Tensor) -> None:
    if weight is None:
        raise ValueError(
            f"`model` must have the parameters that the masks belong to. Found no parameter "
            f"`{name}` in {type(model).__name__}: it is another model, or its layers were replaced "
            f"or parametrized. For the model as it is now, use Masks.from_zeros(model)."
        )
    if is_sharded(model, weight):
        raise ValueError(
            f"`model` must hold its weights whole. Found `{name}` sharded over processes "
            f"({type(weight.data).__name__}); masks cannot be applied to or held on a sharded "
            f"model. Train the pruned model with DistributedDataParallel."
        )
    if weight.shape != mask.shape:
        raise ValueError(
            f"`model` must have the shapes that the masks have. Found `{name}` of shape "
            f"{tuple(weight.shape)} and its mask of shape {tuple(mask.shape)}: it is another "
            f"model, or its channels were pruned after the masks were made. For the model as it "
            f"is now, use Masks.from_zeros(model)."
        )


def is_sharded(model: nn.Module, weight: Tensor) -> bool:
    """Whether a weight is a DTensor or, in FSDP's first version, a piece of one vector."""
    if hasattr(weight, "device_mesh") or getattr(weight, "_is_flat_param", False):
        return True
    return weight.dim() == 1 and any(
        hasattr(module, "_is_fsdp_managed_module") for module in model.modules()
    )
