"""Which weights produce channels, and the width attributes of torch's own modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from drophot.structured.dependency_graph import DependencyGraph


def module_widths(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: int | None, whole_heads: bool
) -> Iterator[tuple[str, Any]]:
    """The width attributes of one of torch's own modules, given the shapes of its parameters."""
    weight = shapes.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        first = shapes.get("in_proj_weight") or shapes.get("q_proj_weight")
        if first:
            yield "embed_dim", first[1]
            rows = first[0] // (3 if shapes.get("in_proj_weight") else 1)
            if whole_heads:
                yield "num_heads", rows // module.head_dim
            else:
                yield "head_dim", rows // module.num_heads
            for name in ("k", "v"):
                own = shapes.get(f"{name}_proj_weight")
                yield f"{name}dim", own[1] if own else first[1]
    elif isinstance(module, _NormBase):
        if per_channel := weight or shapes.get("running_mean"):
            yield "num_features", per_channel[0]
    elif isinstance(module, nn.RNNBase):
        if input_weight := shapes.get("weight_ih_l0"):
            yield "input_size", input_weight[1]
        if hidden_weight := shapes.get("weight_hh_l0"):
            gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
            yield "hidden_size", hidden_weight[0] // gates
            if module.proj_size:
                yield "proj_size", hidden_weight[1]
    elif weight is None:
        return
    elif isinstance(module, nn.Linear):
        yield from zip(("out_features", "in_features"), weight, strict=True)
    elif isinstance(module, _ConvNd):
        own = groups or module.groups
        first, second = weight[0], weight[1] * own
        transposed = isinstance(module, _ConvTransposeNd)
        yield "in_channels", first if transposed else second
        yield "out_channels", second if transposed else first
    elif isinstance(module, nn.GroupNorm):
        yield "num_channels", weight[0]
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        yield "embedding_dim", weight[1]
    elif hasattr(module, "normalized_shape"):
        yield "normalized_shape", weight


def producing_weights(
    model: nn.Module, graph: DependencyGraph, weights: Mapping[str, nn.Parameter]
) -> tuple[dict[str, nn.Parameter], dict[str, int]]:
    """The weights that produce channels, by name, and the dimension that their outputs are in.

    These are `weights`, of Conv and Linear layers, and all parameters that a matrix product is
    computed with.
    """
    found, dims = dict(weights), {}
    produced = torch.zeros(graph.num_entries, dtype=torch.bool, device="cpu")
    dimension = torch.zeros(graph.num_entries, dtype=torch.int64, device="cpu")
    for number, ids in enumerate(graph.dimensions):
        dimension[ids] = number
    for ids in graph.matrix_outputs:
        # Entries of several dimensions are samples or tokens, of which a parameter is a part.
        if len(dimension[ids].unique()) == 1:
            produced[ids] = True
    known = {id(weight) for weight in weights.values()}
    for name in weights:
        module = model.get_submodule(name.rpartition(".")[0])
        dims[name] = int(isinstance(module, _ConvTransposeNd))
    for name, parameter in model.named_parameters():
        if id(parameter) in known or parameter.dim() < 2:
            continue
        for axis in graph.axes.get(parameter) or ():
            if axis.dim >= parameter.dim() - 2 and bool(produced[axis.ids].all()):
                found[name], dims[name] = parameter, axis.dim
    return found, dims
