"""Refuse models whose weights are not what their layers seem to hold: adapters and quantization."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.parameter import is_lazy

from drophot.prune.linear_layers import packed_weights, weights_of

_NUM_SHOWN = 3


def check_no_adapters(model: nn.Module, without: Collection[int | str]) -> None:
    """Refuse adapters of LoRA and of PEFT's other methods, which change the weights under them.

    `without` has the parameters and modules to leave out, from `left_out`.
    """
    lora = [
        name
        for name, parameter in model.named_parameters()
        if _is_lora(name)
        and id(parameter) not in without
        and (is_lazy(parameter) or parameter.dim() > 1)
    ]
    if lora:
        raise ValueError(
            f"`model` has LoRA adapters, got {_listed(lora)}. Merging them later would bring "
            f"removed weights back. {_MERGE_FIRST}"
        )
    if others := [*_adapters(model, without)]:
        raise ValueError(
            f"`model` has adapters, got {_listed(others)}. Merging them later, or turning "
            f"them off, may bring removed weights back. {_MERGE_FIRST}"
        )


_MERGE_FIRST = (
    "Merge them first (in PEFT, `model.merge_and_unload()`), prune before adding them, or name "
    "them in `skip`."
)


def _is_lora(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _adapters(model: nn.Module, without: Collection[int | str]) -> Iterator[str]:
    """The parameters of adapters that wrap a layer as PEFT's do, which is not imported.

    An adapter that adds no parameters is named by its module.
    """
    for path, module in model.named_modules():
        base = dict(module.named_children()).get("base_layer")
        if base is None or path in without or not hasattr(type(module), "adapter_layer_names"):
            continue
        under = {id(parameter) for parameter in base.parameters()}
        named = dict(module.named_parameters(prefix=path))
        own = {name: id(p) for name, p in named.items() if id(p) not in under}
        if not own:
            yield path
        yield from (name for name, key in own.items() if key not in without)


def check_not_prepared(model: nn.Module) -> None:
    """Refuse models whose quantizers have a scale for each channel."""
    found = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if type(module).__module__.startswith(("torch.ao.quantization", "torchao.quantization"))
    ]
    if found:
        raise ValueError(
            f"`model` is prepared for quantization, got {_listed(found)}, which may have a scale "
            f"for each channel. Remove the channels first, and prepare the smaller model."
        )


def check_not_quantized(model: nn.Module, left_out: Collection[int | str]) -> None:
    """Refuse models with quantized layers, whose channels cannot be removed."""
    found = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if name not in left_out and packed_weights(module) and not weights_of(module)
    ]
    if found:
        raise ValueError(
            f"`model` has layers that are already quantized, got {_listed(found)}: their channels "
            f"cannot be removed. Remove the channels first, and quantize the smaller model; or "
            f"name these layers in `skip` to prune the others."
        )


def _listed(found: list[str]) -> str:
    more = f" and {len(found) - _NUM_SHOWN:,} more" if len(found) > _NUM_SHOWN else ""
    return f"{', '.join(found[:_NUM_SHOWN])}{more}"
