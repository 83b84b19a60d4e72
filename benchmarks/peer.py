"""How Torch-Pruning is used: as in its examples for timm and Transformers."""

from __future__ import annotations

from importlib import import_module
from math import prod
from typing import Any

import zoo
from oracle import call, tensors_of
from torch import nn
from torch.nn.modules.conv import _ConvNd

# The names of attention's projections in Transformers.
SPLIT = (("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))


def by_torch_pruning(model: nn.Module, ratio: float, example: Any) -> dict[str, str]:
    """Prune as Torch-Pruning's examples for timm and Transformers do."""
    tp: Any = import_module("torch_pruning")
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        number = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
        number = number or getattr(module, "n_heads", None)
        number = number or getattr(getattr(module, "config", None), "num_attention_heads", None)
        fewer: Any = getattr(getattr(module, "config", None), "num_key_value_heads", number)
        if not isinstance(number, int):
            continue
        for names in (("qkv",), ("query", "key", "value"), *SPLIT):
            layers = [getattr(module, name, None) for name in names]
            for layer, n in zip(layers, (number, fewer, fewer), strict=False):
                if isinstance(layer, nn.Linear) and None not in layers:
                    heads[layer] = n
    pruner = tp.pruner.BasePruner(
        model,
        example,
        tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=last(model, example),
        num_heads=heads,
        output_transform=lambda out: [t for t in tensors_of(out) if t.grad_fn is not None],
    )
    pruner.step()
    for module in model.modules():
        for name in ("qkv", "query", *(names[0] for names in SPLIT)):
            layer = getattr(module, name, None)
            if layer not in heads:
                continue
            wide = layer.out_features // (3 if name == "qkv" else 1)
            number = pruner.num_heads[layer]
            repaired = {"head_dim": wide // number, "attention_head_size": wide // number}
            repaired |= {"attn_dim": wide, "all_head_size": wide, "num_attention_heads": number}
            repaired |= {"key_value_proj_dim": wide // number, "inner_dim": wide, "n_heads": number}
            for attribute, value in (repaired | {"num_heads": number}).items():
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, value)
    return {}


def last(model: nn.Module, example: Any) -> list[nn.Module]:
    """The layers that produce the network's outputs, or have one output per class."""
    made: list[tuple[nn.Module, int]] = []

    def keep(module: nn.Module, _: Any, out: Any) -> None:
        made.extend((module, t.untyped_storage().data_ptr()) for t in tensors_of(out))

    layers = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(keep) for module in layers]
    outputs = call(model, example)
    for hook in hooks:
        hook.remove()
    storages = {t.untyped_storage().data_ptr() for t in outputs}
    found = {module for module, storage in made if storage in storages}
    sizes = {prod(t.shape[1:2]) for t in outputs} | {zoo.CLASSES}
    found |= {
        module
        for module in layers
        if isinstance(module, (nn.Linear, _ConvNd))
        and len(module.weight) in sizes
        and (isinstance(module, nn.Linear) or len(module.weight) == zoo.CLASSES)
    }
    return [module for module in layers if module in found]
