"""N of each M weights: the pattern that some GPUs compute faster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from math import ceil, floor
from typing import Any

import torch
from torch import Tensor, nn

from drophot._core.user_warnings import warn
from drophot.prune.linear_layers import input_dimension, is_conv1d

_BLOCK = 1 << 20  # weights looked at in one go


def parse(pattern: Any, ratio: float) -> tuple[int, int]:
    """What a pattern says.

    Args:
        pattern: `"N:M"`.
        ratio: The share removed that was asked for too. It may be rounded, as 2/3 is in 0.67.

    Returns:
        How many of how many stay.

    Raises:
        ValueError: If it is no pattern, or another share than `ratio`.
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    kept, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < kept < of:
        raise ValueError(
            f'`pattern` should be "N:M", N of each M weights kept, as "2:4". Found {pattern!r}.'
        )
    share = Fraction(of - kept, of)
    written = (floor(100 * share) / 100, ceil(100 * share) / 100)  # with two digits
    if abs(ratio - share) > 1e-3 and ratio not in written:
        raise ValueError(
            f"`ratio` should be the share that the pattern {pattern} removes, {1 - kept / of:g}. "
            f"Found {ratio}."
        )
    return kept, of


def fitting(
    model: nn.Module, weights: Mapping[str, nn.Parameter], of: int, pattern: str
) -> dict[str, int]:
    """The weights that a pattern fits, and along which dimension; the others are warned about.

    Args:
        model: The model.
        weights: By name.
        of: How many weights are a group.
        pattern: As it was given.

    Returns:
        The dimension of the inputs, by name.

    Raises:
        ValueError: If it fits none.
    """
    fits, others = {}, []
    for name, weight in weights.items():
        path, _, attribute = name.rpartition(".")
        dim = input_dimension(model.get_submodule(path), attribute)
        if dim is None:
            others.append(f"{name} (its input dimension is not known)")
        elif weight.shape[dim] % of:
            others.append(f"{name} ({weight.shape[dim]} inputs)")
        else:
            fits[name] = dim
    if not fits:
        raise ValueError(
            f"`pattern` should fit a layer, but {of} divides the number of inputs of none: "
            f"{', '.join(others)}."
        )
    if others:
        warn(
            f'`pattern="{pattern}"` leaves layers dense if {of} does not divide their inputs: '
            f"{', '.join(others)}."
        )
    return fits


def cut(weight: Tensor, kept: int, of: int, dim: int, older: Tensor | None = None) -> Tensor:
    """Keep the largest of each group, in place.

    Args:
        weight: Finite floats; `of` divides its size along `dim`.
        kept: How many of each group stay, the first of equal ones.
        of: The size of a group.
        dim: The groups are consecutive along this dimension.
        older: The mask of an earlier pruning. Zeros that it removed do not come back.

    Returns:
        The mask of what is kept, exactly `kept` of each group unless the older mask left fewer:
        bool, of its shape.
    """
    weight = weight.detach()
    moved = weight.movedim(dim, -1)
    mask = torch.empty(moved.shape, dtype=torch.bool, device=weight.device)
    before = None if older is None else older.movedim(dim, -1).reshape(-1, of)
    rows = max(_BLOCK // of, 1)
    for start, block, keep in zip(
        range(0, mask.numel() // of, rows),
        moved.reshape(-1, of).split(rows),
        mask.view(-1, of).split(rows),
        strict=True,
    ):
        sizes = block.abs()
        removed = None
        if before is not None:
            removed = ~before[start : start + len(block)] & (block == 0)
            sizes = sizes.masked_fill(removed, -1)
        best = sizes.argsort(dim=1, descending=True, stable=True)[:, :kept]
        keep.zero_().scatter_(1, best, True)
        if removed is not None:
            keep &= ~removed
    mask = mask.movedim(-1, dim).contiguous()
    weight.masked_fill_(~mask, 0)
    return mask


def to_semi_structured(model: nn.Module) -> tuple[str, ...]:
    """Turn Linear weights that are 2:4 into torch's accelerated form, in place, for inference.

    Two of four weights are stored, and NVIDIA's GPUs from Ampere on skip the others. Layers that
    torch cannot turn (their pattern, shape or dtype) stay dense and are warned about by name.

    References:
        Mishra et al., Accelerating Sparse Deep Neural Networks, 2021,
        https://arxiv.org/abs/2104.08378; `torch.sparse.to_sparse_semi_structured`.

    Args:
        model: On a GPU, in a dtype that it computes sparsely: float16 or bfloat16, most often.

    Returns:
        The names of the weights that were turned.

    Raises:
        RuntimeError: If the model is not on a GPU that can do it.
        ValueError: If no Linear weight is 2:4.

    Example:
        >>> model = nn.Sequential(nn.Linear(128, 64))
        >>> to_semi_structured(model)
        Traceback (most recent call last):
            ...
        RuntimeError: `model` should be on an NVIDIA GPU of compute capability 8.0 or more. ...
    """
    attention = {
        f"{path}.out_proj" if path else "out_proj"
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)  # reads that weight by itself
    }
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path not in attention
    }
    devices = {module.weight.device for module in layers.values()}
    if slow := [device for device in devices if not _capable(device)]:
        raise RuntimeError(
            f"`model` should be on an NVIDIA GPU of compute capability 8.0 or more. Found "
            f"{slow[0]}; the zeros are there as well, and make nothing faster here."
        )
    turned: dict[str, nn.Parameter] = {}
    others = []
    for path, module in layers.items():
        name = f"{path}.weight" if path else "weight"
        weight = module.weight.detach()
        if weight.shape[1] % 4 or (weight.reshape(-1, 4).count_nonzero(1) > 2).any():
            others.append(f"{name} (not 2:4)")
            continue
        try:
            turned[name] = nn.Parameter(_convert(weight), requires_grad=False)
        except (RuntimeError, ValueError) as error:
            others.append(f"{name} ({str(error).strip().splitlines()[0]})")
    others += [
        f"{path}.weight (Conv1D, which torch cannot turn)"
        for path, module in model.named_modules()
        if is_conv1d(module)
    ]
    if not turned:
        raise ValueError(
            f"`model` should have Linear weights that are 2:4 and of a shape and dtype that torch "
            f"can turn. Found {', '.join(others) or 'none'}; prune it first with "
            f'magnitude_prune(model, 0.5, pattern="2:4").'
        )
    for name, weight in turned.items():
        layers[name.rpartition(".")[0]].weight = weight
    if others:
        warn(f"These layers stay dense: {', '.join(others)}.")
    return tuple(turned)


def _capable(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _convert(weight: Tensor) -> Tensor:
    return torch.sparse.to_sparse_semi_structured(weight.contiguous())
