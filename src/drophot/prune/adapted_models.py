"""Refuse models whose weights are not what their layers seem to hold: adapters and quantization."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from drophot.prune.linear_layers import packed_weights, weights_of

_NUM_SHOWN = 3


def check_no_adapters(names: Iterable[str]) -> None:
    """Refuse to prune the low-rank factors of LoRA, which are added to another layer's weights."""
    found = [name for name in names if any(part.startswith("lora_") for part in name.split("."))]
    if found:
        raise ValueError(
            f"`model` has LoRA adapters, got {_listed(found)} among the weights to prune. Merging "
            f"them later would bring removed weights back. Merge them first (in PEFT, "
            f"`model.merge_and_unload()`), prune before adding them, or name them in `skip`."
        )


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
