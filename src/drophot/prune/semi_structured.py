"""N:M sparsity: N of each M consecutive weights are kept, which some GPUs compute faster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from math import ceil, floor
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from drophot._core import scalars
from drophot._core.user_warnings import warn
from drophot.prune.linear_layers import input_dimension, is_conv1d

_BLOCK = 1 << 20  # weights per block, to save memory


def parse_pattern(pattern: Any, ratio: float) -> tuple[int, int]:
    """The numbers N and M of "N:M", which must agree with `ratio` (0.67 agrees with "1:3")."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < n < m:
        raise ValueError(
            f'`pattern` must be "N:M" with 0 < N < M, which keeps N of each M weights, got '
            f'{pattern!r}. A common one is "2:4".'
        )
    removed = Fraction(m - n, m)
    two_digits = (floor(100 * removed) / 100, ceil(100 * removed) / 100)
    if abs(ratio - removed) > 1e-3 and ratio not in two_digits:
        raise ValueError(
            f"`ratio` must agree with the pattern {pattern}, which removes {1 - n / m:g}, got "
            f"{ratio}."
        )
    return n, m


def input_dimensions(
    model: nn.Module, weights: Mapping[str, nn.Parameter], m: int, pattern: str
) -> dict[str, int]:
    """The input dimension of each weight that the pattern fits; a warning names the others."""
    fits, others = {}, []
    for name, weight in weights.items():
        path, _, attribute = name.rpartition(".")
        dim = input_dimension(model.get_submodule(path), attribute)
        if dim is None:
            others.append(f"{name} (its input dimension is not known)")
        elif weight.shape[dim] % m:
            others.append(f"{name} ({weight.shape[dim]} inputs)")
        else:
            fits[name] = dim
    if not fits:
        raise ValueError(
            f"`pattern` {pattern} fits no layer, since {m} divides the number of inputs of none: "
            f"{', '.join(others)}."
        )
    if others:
        warn(
            f'`pattern="{pattern}"` leaves these layers dense, since {m} does not divide their '
            f"number of inputs: {', '.join(others)}."
        )
    return fits


def prune_groups(
    weight: Tensor,
    n: int,
    m: int,
    dim: int,
    earlier: Tensor | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """Keep the `n` largest of each `m` consecutive weights along `dim`, in place; the mask.

    Of equal weights the first are kept. Without an `importance` the largest are those of largest
    magnitude. A group keeps fewer than `n` if the mask of an `earlier` pruning left it fewer.
    """
    weight = weight.detach()
    moved = weight.movedim(dim, -1)
    mask = torch.empty(moved.shape, dtype=torch.bool, device=weight.device)
    before = None if earlier is None else earlier.movedim(dim, -1).reshape(-1, m)
    ranked = moved if importance is None else importance.movedim(dim, -1)
    rows = max(_BLOCK // m, 1)
    for start, block, values, keep in zip(
        range(0, mask.numel() // m, rows),
        moved.reshape(-1, m).split(rows),
        ranked.reshape(-1, m).split(rows),
        mask.view(-1, m).split(rows),
        strict=True,
    ):
        sizes = values.abs() if importance is None else values
        removed = None
        if before is not None:
            removed = ~before[start : start + len(block)] & (block == 0)
            sizes = sizes.masked_fill(removed, -torch.inf)
        largest = sizes.argsort(dim=1, descending=True, stable=True)[:, :n]
        keep.zero_().scatter_(1, largest, True)
        if removed is not None:
            keep &= ~removed
    mask = mask.movedim(-1, dim).contiguous()
    weight.masked_fill_(~mask, 0)
    return mask


def to_semi_structured(model: nn.Module, *, rows: int = 4096) -> tuple[str, ...]:
    """Convert 2:4 weights of Linear layers to torch's semi-structured format, for inference.

    The model is changed in place. Two of each four weights are stored, and NVIDIA GPUs from Ampere
    on skip the others. Whether this is faster depends on the shape, the dtype, the number of rows
    and the GPU, so each layer is measured both ways with random inputs. Layers that are not faster
    stay dense, as do those that torch cannot convert because of their pattern, shape or dtype. A
    warning names them, with the reason.

    References:
        Mishra et al., Accelerating Sparse Deep Neural Networks, 2021,
        https://arxiv.org/abs/2104.08378; `torch.sparse.to_sparse_semi_structured`.

    Args:
        model: On a GPU, in a dtype that torch supports for this format, such as float16 or
            bfloat16.
        rows: The number of rows `(rows, in_features)` to measure with: samples in a batch, times
            tokens in a sample.

    Returns:
        The names of the converted weights.

    Raises:
        TypeError: If `rows` is not an integer.
        RuntimeError: If the model is not on a GPU that supports the format.
        ValueError: If no weight of a Linear layer can be converted, or `rows` is less than 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(128, 64))
        >>> to_semi_structured(model)
        Traceback (most recent call last):
            ...
        RuntimeError: `model` must be on an NVIDIA GPU of compute capability 8.0 or higher...
    """
    rows = scalars.integer("rows", rows)
    if rows < 1:
        raise ValueError(f"`rows` must be at least 1, got {rows}.")
    attention = {
        f"{path}.out_proj" if path else "out_proj"
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)  # does not call this layer
    }
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path not in attention
    }
    devices = {module.weight.device for module in layers.values()}
    if slow := [device for device in devices if not _capable(device)]:
        raise RuntimeError(
            f"`model` must be on an NVIDIA GPU of compute capability 8.0 or higher, got "
            f"{slow[0]}. Other devices do not compute 2:4 weights faster; use the dense model."
        )
    converted: dict[str, nn.Parameter] = {}
    others, slower = [], []
    for path, module in layers.items():
        name = f"{path}.weight" if path else "weight"
        weight = module.weight.detach()
        if weight.shape[1] % 4 or (weight.reshape(-1, 4).count_nonzero(1) > 2).any():
            others.append(f"{name} (not 2:4)")
            continue
        try:
            sparse = nn.Parameter(_convert(weight), requires_grad=False)
            before, after = _milliseconds(weight, sparse, rows)
            if after < before:
                converted[name] = sparse
            else:
                slower.append(f"{name} (dense {before:.3g} ms, 2:4 {after:.3g} ms)")
        except (RuntimeError, ValueError) as error:
            others.append(f"{name} ({str(error).strip().splitlines()[0]})")
    others += [
        f"{path}.weight (Conv1D, which torch cannot convert)"
        for path, module in model.named_modules()
        if is_conv1d(module)
    ]
    if not converted and not slower:
        raise ValueError(
            f"`model` must have Linear layers with 2:4 weights of a shape and dtype that torch can "
            f"convert, got {', '.join(others) or 'none'}. Prune it first with "
            f'magnitude_prune(model, 0.5, pattern="2:4").'
        )
    for name, weight in converted.items():
        layers[name.rpartition(".")[0]].weight = weight
    if others := slower + others:
        warn(f"These layers stay dense: {', '.join(others)}.")
    return tuple(converted)


def _capable(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _convert(weight: Tensor) -> Tensor:
    return torch.sparse.to_sparse_semi_structured(weight.contiguous())


@torch.no_grad()
def _milliseconds(dense: Tensor, sparse: Tensor, rows: int) -> tuple[float, float]:
    """The time of a product with a dense weight and with the same weight in the 2:4 format."""
    inputs = torch.randn(rows, dense.shape[1], device=dense.device, dtype=dense.dtype)
    times: tuple[list[float], list[float]] = [], []
    for turn in range(6):
        for weight, found in zip((dense, sparse), times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(dense.device)
            start.record(stream)
            for _ in range(10):
                nn.functional.linear(inputs, weight)
            end.record(stream)
            end.synchronize()
            if turn:  # the first one is a warm-up
                found.append(start.elapsed_time(end) / 10)
    return median(times[0]), median(times[1])
