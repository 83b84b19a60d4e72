"""Compares a pruned network with zeroed channels; the values tell which ones were removed."""

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drophot.structured import Pruned, prune_channels, rebuild


def distinct(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network in float64, with distinct values in each tensor."""
    model = model.double().eval()
    random = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=random, dtype=torch.float64)
            tensor.data.add_(noise.abs() if "var" in name else noise, alpha=0.05)
    return model


def kept_by_value(dense: Tensor, pruned: Tensor) -> Tensor:
    """Which entries of a tensor are kept, `(*dense.shape)`; their order must not change."""
    kept = torch.isin(dense, pruned)
    assert int(kept.sum()) == pruned.numel()
    assert torch.equal(dense[kept], pruned.reshape(-1))
    return kept


def with_zeros(dense: nn.Module, pruned: nn.Module) -> nn.Module:
    """The dense network with zeros for all values that the pruned one has lost.

    Norms over channels are those over the channels that are kept.
    """
    model = deepcopy(dense)
    left = dict(pruned.named_parameters()) | dict(pruned.named_buffers())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            kept = kept_by_value(tensor.detach(), left[name].detach())
            if "var" not in name:
                tensor.data.mul_(kept)
    for name, module in model.named_modules():
        norm = dense.get_submodule(name)
        weight = getattr(norm, "weight", None)
        if isinstance(weight, Tensor) and hasattr(norm, "eps") and weight.dim() == 1:
            kept = kept_by_value(weight.detach(), left[f"{name}.weight"].detach())
            module.forward = _over(module, kept)
    return model


def _over(norm: Any, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """A norm over the kept channels; the others are zero."""

    def layer_norm(x: Tensor) -> Tensor:
        if x.shape[-1] != len(kept):  # torchvision's LayerNorm2d
            return layer_norm(x.movedim(1, -1)).movedim(-1, 1)
        shape, weight = (int(kept.sum()),), norm.weight[kept]
        if isinstance(norm, nn.LayerNorm):
            return _put(
                x, kept, F.layer_norm(x[..., kept], shape, weight, norm.bias[kept], norm.eps)
            )
        return _put(x, kept, F.rms_norm(x[..., kept], shape, weight, norm.eps))

    def group_norm(x: Tensor) -> Tensor:
        groups = kept.view(norm.num_groups, -1)
        if torch.equal(groups.all(1), groups.any(1)):  # whole groups are what they were
            return (
                F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
                * kept[(..., *[None] * (x.dim() - 2))]
            )
        y = F.group_norm(x[:, kept], norm.num_groups, norm.weight[kept], norm.bias[kept], norm.eps)
        return _put(x.transpose(1, -1), kept, y.transpose(1, -1)).transpose(1, -1)

    if isinstance(norm, nn.GroupNorm):
        return group_norm
    return layer_norm if not hasattr(norm, "running_var") else norm.forward


def _put(x: Tensor, kept: Tensor, values: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[..., kept] = values
    return out


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in the output of a network."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    elif hasattr(output, "__dict__"):
        output = vars(output).values()
    return [t for one in output for t in tensors_of(one)] if output is not None else []


def assert_same_numbers(dense: nn.Module, pruned: nn.Module, *others: Any) -> None:
    """Check that the pruned network gives the values of the dense one with zeros."""
    zeros = with_zeros(dense, pruned)
    with torch.no_grad():
        for inputs in others:
            arguments = inputs if isinstance(inputs, tuple) else (inputs,)
            found, expected = tensors_of(pruned(*arguments)), tensors_of(zeros(*arguments))
            assert [t.shape for t in found] == [t.shape for t in expected]
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pruned_by_law(model: nn.Module, *inputs: Any, ratio: float = 0.5) -> Pruned:
    """Prune a network by the first inputs, check its values for all, and rebuild it."""
    new = deepcopy(model)
    model = distinct(model)
    dense = deepcopy(model)
    pruned = prune_channels(model, ratio, inputs[0])
    assert_same_numbers(dense, model, *inputs)
    again = rebuild(new.double().eval(), json.loads(json.dumps(pruned.description)))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        for one, other in zip(
            tensors_of(again(inputs[0])), tensors_of(model(inputs[0])), strict=True
        ):
            assert torch.equal(one, other)
    return pruned
