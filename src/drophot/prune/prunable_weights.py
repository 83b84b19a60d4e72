"""The weights that pruning is about, and those that it cannot do."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from drophot.prune.custom_forward import Verdicts, keeps_zeros
from drophot.prune.linear_layers import is_matrix, weights_of


def prunable(
    model: nn.Module, skip: Iterable[str] = (), include: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """The weights that pruning is about, by name, shared ones once.

    Args:
        model: Any module.
        skip: Names of modules or parameters to leave out.
        include: Names of parameters to prune too, or of modules whose matrices are.

    Returns:
        The parameters, none of them empty.

    Raises:
        TypeError: If `model` is no module, `skip` or `include` no collection of names, or a weight
            not of plain floats.
        ValueError: If a name is unknown or adds nothing, there are no weights, or one has no data,
            is sharded, sparse or computed by something else.
    """
    check_module("model", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "`model` should be a plain module. Found one of TorchScript; give the module that it "
            "was made from, and script that afterwards."
        )
    skip, include = names_of("skip", skip), names_of("include", include)
    without = left_out(model, skip)
    added = _included(model, include, without)
    verdicts: Verdicts = {}
    found: dict[str, nn.Parameter] = {}
    others: list[str] = []
    for name, module, weight in _checked(model, without, added):
        if id(weight) in added or keeps_zeros(module, verdicts):
            found[name] = weight
        else:
            others.append(f"`{name}` ({type(module).__name__})")
    if not found and others:
        raise ValueError(
            f"`model` should have layers that multiply by their weights. All of its layers "
            f"override `forward` in a way that may not keep zeros: {', '.join(others[:3])}"
            f"{', …' * (len(others) > 3)}. If they do keep zeros, name them in `include`."
        )
    unknown = [
        name
        for name, parameter in ({} if found else dict(model.named_parameters())).items()
        if id(parameter) not in without and is_matrix(model, name, parameter)
    ]
    _require(found, model, bool(skip), unknown)
    return found


def with_channels(model: nn.Module, without: Collection[int | str] = ()) -> dict[str, nn.Parameter]:
    """The weights of layers whose outputs are channels, by name, shared ones once.

    Those of recurrent layers and of Conv1D are not among them: the trace finds their channels.

    Args:
        model: Any module.
        without: What `left_out` gave: in these modules something else may compute weights.

    Returns:
        The parameters, none of them empty.

    Raises:
        TypeError: As `prunable`.
        ValueError: As `prunable`.
    """
    check_module("model", model)
    paths: set[int | str] = {one for one in without if isinstance(one, str)}
    found = list(_checked(model, paths, set()))
    _require(found, model)
    return {
        name: weight
        for name, module, weight in found
        if isinstance(module, nn.Linear | _ConvNd | nn.MultiheadAttention)
    }


def _require(
    found: Sized, model: nn.Module, skipped: bool = False, unknown: Sequence[str] = ()
) -> None:
    if found:
        return
    own = f", or name its parameters in `include`: {', '.join(unknown[:3])}" if unknown else ""
    raise ValueError(
        f"`model` should have weights to prune, in Linear, Conv, MultiheadAttention or recurrent "
        f"layers. {type(model).__name__} has none{' besides those in `skip`' * skipped}: pass the "
        f"module that contains them{own}."
    )


def _checked(
    model: nn.Module, without: set[int | str], added: set[int]
) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """The weights of known layers, and those that are added, each once, with its module."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                f"`model` should hold its weights whole. Found `{path or 'the model'}` sharded by "
                f"FullyShardedDataParallel; prune before wrapping it."
            )
        known = weights_of(module)
        for attribute in known:
            if attribute not in module._parameters and path not in without:
                raise ValueError(
                    f"`model` should have plain parameters. Found `{joined(path, attribute)}` "
                    f"computed by a parametrization or an older pruning hook; remove that first "
                    f"(torch.nn.utils.parametrize.remove_parametrizations, "
                    f"torch.nn.utils.prune.remove){f', or give skip=({path!r},)' * bool(path)}."
                )
        for attribute, weight in module._parameters.items():
            if weight is None or id(weight) in seen:
                continue
            if id(weight) not in added and (attribute not in known or id(weight) in without):
                continue
            name = joined(path, attribute)
            _check_weight(name, weight)
            seen.add(id(weight))
            if weight.numel():
                yield name, module, weight


def joined(path: str, attribute: str) -> str:
    """The name of a parameter of a module.

    Args:
        path: The module's.
        attribute: Its name there.

    Returns:
        As `named_parameters` has it.
    """
    return f"{path}.{attribute}" if path else attribute


def check_module(name: str, model: Any) -> None:
    """Refuse what is no module.

    Args:
        name: What the caller calls it.
        model: The value.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(model, nn.Module):
        cure = ": load it into a model and pass the model" if isinstance(model, Mapping) else ""
        raise TypeError(f"`{name}` must be a torch.nn.Module. Found {_kind(model)}{cure}.")


def check_mapping(name: str, value: Any) -> None:
    """Refuse what holds nothing by name.

    Args:
        name: What the caller calls it.
        value: The value.

    Raises:
        TypeError: If it is no mapping.
    """
    if not isinstance(value, Mapping):
        cure = "; give its state_dict()" if hasattr(value, "state_dict") else ""
        cure = "; load the file, and give what is in it" if isinstance(value, str) else cure
        raise TypeError(f"`{name}` should be a dict of tensors. Found {_kind(value)}{cure}.")


def check_changeable(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be set to zero in place.

    Args:
        name: Its name.
        weight: The weight.

    Raises:
        ValueError: If it was made in inference mode, which is over.
    """
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"`model` should have weights that can be changed. Found `{name}`, which was made in "
            f"torch.inference_mode(); make or load the model outside of it."
        )


def _kind(value: Any) -> str:
    """What a value is, as a user would recognise it."""
    shown = isinstance(value, str | float | int | PurePath)
    name = type(value).__name__
    article = "an" if name[0] in "AEIOaeio" else "a"
    return f"{value!r}" if shown else f"{article} {name}"


def names_of(argument: str, value: Any) -> tuple[str, ...]:
    """Read a collection of names once, so that a generator will do.

    Args:
        argument: What the caller calls it.
        value: The collection.

    Returns:
        The names.

    Raises:
        TypeError: If it is no collection of strings.
    """
    if isinstance(value, str):
        raise TypeError(
            f"`{argument}` should be a collection of names. Found {value!r}; give ({value!r},)."
        )
    if not isinstance(value, Iterable):
        raise TypeError(f"`{argument}` should be a collection of names. Found {_kind(value)}.")
    names = tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"`{argument}` should have names, as in model.named_modules(). Found {_kind(name)}."
            )
    return names


def left_out(model: nn.Module, skip: Iterable[str], argument: str = "skip") -> set[int | str]:
    """The parameters (by identity) and the modules (by path) that `skip` names.

    Args:
        model: Any module.
        skip: The names.
        argument: What the caller calls them.

    Returns:
        Identities and paths.

    Raises:
        TypeError: If it is no collection.
        ValueError: If a name is unknown.
    """
    skip = names_of(argument, skip)
    if not skip:
        return set()
    modules = {path for path, _ in model.named_modules(remove_duplicate=False) if path}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = modules | parameters.keys()
    for name in skip:
        if name not in known:
            near = get_close_matches(name, known, n=3)
            raise ValueError(
                f"`{argument}` should name modules or parameters of the model. Found {name!r}"
                f"{', near to ' + ', '.join(map(repr, near)) if near else ''}; see "
                f"model.named_modules()."
            )

    def named(path: str) -> bool:
        return any(path == name or path.startswith(f"{name}.") for name in skip)

    return {id(parameter) for path, parameter in parameters.items() if named(path)} | {
        path for path in modules if named(path)
    }


def _included(model: nn.Module, include: Collection[str], without: set[int | str]) -> set[int]:
    """The parameters, by identity, that `include` names: of a module those that are matrices."""
    if not include:
        return set()
    left_out(model, include, "include")  # which knows the names
    parameters = dict(model.named_parameters(remove_duplicate=False))
    added: set[int] = set()
    for name in include:
        chosen = {
            path: parameter
            for path, parameter in parameters.items()
            if path == name or (path.startswith(f"{name}.") and is_matrix(model, path, parameter))
        }
        if not chosen:
            raise ValueError(
                f"`include` should name parameters, or modules that have matrices. Found {name!r}, "
                f"in which there is none (biases, norms, embeddings and positions count only if "
                f"they are named themselves); leave it out."
            )
        if all(id(parameter) in without for parameter in chosen.values()):
            raise ValueError(
                f"`include` and `skip` should not name the same. Found {name!r}, which `skip` "
                f"leaves dense; take it out of one of them."
            )
        for path in chosen:
            if isinstance(model.get_submodule(path.rpartition(".")[0]), ParametrizationList):
                raise ValueError(
                    f"`include` should name plain parameters. Found `{path}`, of a "
                    f"parametrization, which computes other weights from it; remove that first "
                    f"(torch.nn.utils.parametrize.remove_parametrizations)."
                )
        added |= {id(parameter) for parameter in chosen.values()} - without
    return added


def _check_weight(name: str, weight: nn.Parameter) -> None:
    if is_lazy(weight) or weight.is_meta:
        raise ValueError(
            f"`model` should have its weights. Found `{name}` without data; run one batch through "
            f"a lazy module, or load the weights of one on the meta device, before pruning."
        )
    if (
        hasattr(weight, "device_mesh")
        or hasattr(weight, "ds_tensor")  # of DeepSpeed's third stage: empty until it is needed
        or getattr(weight, "_is_flat_param", False)
    ):
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
        bad = int((~weight.isfinite()).count_nonzero())
        raise ValueError(
            f"`model` should have finite weights only. Found {bad} that are NaN or infinite in "
            f"`{name}`; a network that diverged has nothing to rank."
        )
    return bool(least) or bool(most)
