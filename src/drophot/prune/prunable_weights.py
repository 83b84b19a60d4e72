"""Find the prunable weights of a model, and refuse weights that cannot be pruned."""

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

from drophot._core.float_keys import infinite_key
from drophot._core.order_statistics import largest_keys
from drophot._core.radix_select import has_kernels
from drophot.prune.custom_forward import Verdicts, keeps_zeros
from drophot.prune.device_pruning import count_values
from drophot.prune.linear_layers import is_matrix, packed_weights, weights_of
from drophot.prune.masked_products import is_expanded


def prunable(
    model: nn.Module, skip: Iterable[str] = (), include: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """The prunable weights of a model by name, shared ones once, empty ones not at all."""
    check_module("model", model)
    check_not_program("model", model)
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
            f"`model` must have layers that multiply by their weights, but all of its layers "
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

    Recurrent layers and Conv1D are not included: their channels are found by tracing. In the
    modules of `without`, from `left_out`, something else may compute the weights.
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
    if packed := not skipped and [
        f"{path} ({type(module).__name__})".removeprefix(" ")
        for path, module in model.named_modules()
        if packed_weights(module)
    ]:
        raise ValueError(
            f"`model` must have weights to prune, but its layers are already quantized: "
            f"{', '.join(packed[:3])}{', …' * (len(packed) > 3)}. Prune first, and quantize the "
            f"pruned model."
        )
    own = f", or name its parameters in `include`: {', '.join(unknown[:3])}" if unknown else ""
    raise ValueError(
        f"`model` must have weights to prune, in Linear, Conv, MultiheadAttention or recurrent "
        f"layers, but {type(model).__name__} has none{' that is not in `skip`' * skipped}. Pass "
        f"the module that contains them{own}."
    )


def _checked(
    model: nn.Module, without: set[int | str], added: set[int]
) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield the weights of known layers and the `added` ones, each once, with its module."""
    seen: set[int] = set()
    at_start: dict[tuple[torch.device, int], dict[int, str]] = {}
    for name, parameter in model.named_parameters():
        plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided
        if plain and parameter.numel() and not parameter.is_meta:
            start = (parameter.device, parameter.data_ptr())
            at_start.setdefault(start, {})[id(parameter)] = name
    for path, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                f"`model` must not be sharded, but `{path or 'the model'}` is wrapped by "
                f"FullyShardedDataParallel. Prune before wrapping it."
            )
        known = weights_of(module)
        for attribute in known:
            if attribute not in module._parameters and path not in without:
                raise ValueError(
                    f"`model` must have plain parameters, but `{joined(path, attribute)}` is "
                    f"computed by a parametrization or by a hook of torch.nn.utils.prune. Remove "
                    f"it first (torch.nn.utils.parametrize.remove_parametrizations, "
                    f"torch.nn.utils.prune.remove){f', or pass skip=({path!r},)' * bool(path)}."
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
                found = at_start.get((weight.device, weight.data_ptr()), {})
                if others := [other for key, other in found.items() if key != id(weight)]:
                    raise ValueError(
                        f"`model` must have one parameter for each weight, but `{name}` and "
                        f"`{others[0]}` are two over the same memory. Assign the parameter itself "
                        f"instead of its `data`, so that both layers share it."
                    )
                yield name, module, weight


def joined(path: str, attribute: str) -> str:
    """The name of a module's parameter, as in `named_parameters`."""
    return f"{path}.{attribute}" if path else attribute


def check_module(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        fix = ". Load it into a model and pass the model" if isinstance(model, Mapping) else ""
        if type(model).__module__.startswith("torch.export."):
            fix = ". Prune the module that it was made from, and export that afterwards"
        raise TypeError(f"`{name}` must be a torch.nn.Module, got {_shown(model)}{fix}.")


def check_not_program(name: str, model: nn.Module, *, inside: bool = False) -> None:
    """Refuse the result of torch.jit or torch.export, and also such modules `inside` if asked."""
    for path, module in model.named_modules() if inside else [("", model)]:
        found = f"`{name}`" if not path else f"`{path}` in `{name}`"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{found} must not be a TorchScript module, got a {type(module).__name__}. Prune "
                f"the module that it was made from, and script that afterwards."
            )
        if any(kind.__module__.startswith("torch.export.") for kind in type(module).__mro__):
            raise ValueError(
                f"{found} must not be the result of torch.export, got a {type(module).__name__}. "
                f"Prune the module that it was made from, and export that afterwards."
            )


def check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        fix = ". Pass its state_dict()" if hasattr(value, "state_dict") else ""
        fix = (
            ". Load the file with torch.load and pass the result" if isinstance(value, str) else fix
        )
        raise TypeError(f"`{name}` must be a dict of tensors, got {_shown(value)}{fix}.")


def check_changeable(name: str, weight: Tensor) -> None:
    """Refuse a weight whose elements cannot be changed one by one.

    One made in inference mode cannot be changed outside of it.
    """
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"`model` must have weights that can be changed, but `{name}` was made in "
            f"torch.inference_mode(). Create or load the model outside of it."
        )
    if weight.is_neg() or is_expanded(weight):
        kind = "a negated" if weight.is_neg() else "an expanded"
        raise ValueError(
            f"`model` must have weights with memory for each element, but `{name}` of shape "
            f"{tuple(weight.shape)} is {kind} view of another tensor. Replace the parameter by "
            f"nn.Parameter(weight.detach().clone())."
        )


def _shown(value: Any) -> str:
    """A short value itself, or the type of another one."""
    is_short = isinstance(value, str | float | int | PurePath)
    name = type(value).__name__
    article = "an" if name[0] in "AEIOaeio" else "a"
    return f"{value!r}" if is_short else f"{article} {name}"


def names_of(argument: str, value: Any) -> tuple[str, ...]:
    """Read a collection of names, which may be a generator."""
    if isinstance(value, str):
        raise TypeError(
            f"`{argument}` must be a collection of names, got {value!r}. Pass ({value!r},)."
        )
    if not isinstance(value, Iterable):
        raise TypeError(f"`{argument}` must be a collection of names, got {_shown(value)}.")
    names = tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"`{argument}` must contain names, as in model.named_modules(), got {_shown(name)}."
            )
    return names


def left_out(model: nn.Module, skip: Iterable[str], argument: str = "skip") -> set[int | str]:
    """The parameters (by identity) and modules (by path) that `skip` names."""
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
                f"`{argument}` must name modules or parameters of the model, got {name!r}. "
                f"{'Did you mean ' + ' or '.join(map(repr, near)) + '? ' if near else ''}See "
                f"model.named_modules()."
            )

    def named(path: str) -> bool:
        return any(path == name or path.startswith(f"{name}.") for name in skip)

    return {id(parameter) for path, parameter in parameters.items() if named(path)} | {
        path for path in modules if named(path)
    }


def _included(model: nn.Module, include: Collection[str], without: set[int | str]) -> set[int]:
    """The identities of the parameters that `include` names, directly or as a module's matrices."""
    if not include:
        return set()
    left_out(model, include, "include")  # to check the names
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
                f"`include` must name parameters, or modules that have matrices, got {name!r}, "
                f"which has none. Biases, norms, embeddings and positions count only if you name "
                f"them directly; otherwise leave {name!r} out."
            )
        if all(id(parameter) in without for parameter in chosen.values()):
            raise ValueError(
                f"`include` and `skip` must not name the same parameters, but {name!r} in "
                f"`include` is also in `skip`. Remove it from one of them."
            )
        for path in chosen:
            if isinstance(model.get_submodule(path.rpartition(".")[0]), ParametrizationList):
                raise ValueError(
                    f"`include` must name plain parameters, but `{path}` belongs to a "
                    f"parametrization, which computes other weights from it. Remove that first "
                    f"(torch.nn.utils.parametrize.remove_parametrizations)."
                )
        added |= {id(parameter) for parameter in chosen.values()} - without
    return added


def _check_weight(name: str, weight: nn.Parameter) -> None:
    if is_lazy(weight) or weight.is_meta:
        raise ValueError(
            f"`model` must have its weights, but `{name}` has no data. Before pruning, run one "
            f"batch through a lazy module, or load the weights of a model on the meta device."
        )
    if (
        hasattr(weight, "device_mesh")
        or hasattr(weight, "ds_tensor")  # DeepSpeed stage 3: empty until it is needed
        or getattr(weight, "_is_flat_param", False)
    ):
        raise ValueError(
            f"`model` must not be sharded, but `{name}` is sharded over processes "
            f"({type(weight.data).__name__}). Prune before sharding it."
        )
    if type(weight.data) is not Tensor or weight.is_quantized:
        raise TypeError(
            f"`model` must have plain float weights, but `{name}` is a "
            f"{type(weight.data).__name__} of {weight.dtype}. Prune before quantizing or "
            f"converting it."
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TypeError(
            f"`model` must have float weights of 16 bits or more, but `{name}` is of "
            f"{weight.dtype}. Prune before quantizing."
        )
    if weight.layout != torch.strided:
        raise ValueError(
            f"`model` must have dense weights, but `{name}` is of {weight.layout}. Call to_dense() "
            f"on it first."
        )


def check_finite(weights: Mapping[str, nn.Parameter]) -> set[str]:
    """The names of the weights that are not all zero; NaN and infinity are an error."""
    if has_kernels(weights.values()):
        counts = dict(zip(weights, count_values([*weights.values()]), strict=True))
        for name, count in counts.items():
            if count.not_finite:
                _raise_not_finite(name, count.not_finite)
        return {name for name, count in counts.items() if count.nonzero}
    largest = dict(zip(weights, largest_keys([*weights.values()]), strict=True))
    for name, weight in weights.items():
        if largest[name] >= infinite_key(weight.dtype):
            _raise_not_finite(name, int((~weight.isfinite()).count_nonzero()))
    return {name for name, key in largest.items() if key}


def _raise_not_finite(name: str, count: int) -> None:
    raise ValueError(
        f"`model` must have finite weights, but {count} are NaN or infinite in `{name}`. The "
        f"weights of a network that diverged cannot be ranked."
    )
