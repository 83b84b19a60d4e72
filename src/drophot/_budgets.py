"""How many weights each layer loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor
from typing import Literal

import torch
from torch import Tensor

from drophot import _radix

Scope = Literal["global", "layer", "erk", "lamp"]

# Layers that are ranked together, by name, and how many weights these lose together.
Groups = list[tuple[list[str], int]]


def groups(
    weights: Mapping[str, Tensor], ratio: float, scope: Scope, min_kept: float = 0.0
) -> Groups:
    """How many weights go, and from which layers.

    Args:
        weights: Finite floats, by name.
        ratio: The share of all of them that goes, of `n` exactly `floor(ratio * n + 0.5)`.
        scope: How it is shared out: see `magnitude_prune`.
        min_kept: The share of each layer that stays at least, for "global" and "lamp".

    Returns:
        The groups, which hold each layer once.

    Raises:
        ValueError: If the share and the minimum cannot both be met.
    """
    sizes = {name: weight.numel() for name, weight in weights.items()}
    if scope == "layer":
        return [([name], floor(ratio * size + 0.5)) for name, size in sizes.items()]
    remove = floor(ratio * sum(sizes.values()) + 0.5)
    if scope == "erk":
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        return [([name], count) for name, count in erk(shapes, remove).items()]
    if scope == "global":
        return _with_minimum(weights, remove, min_kept, lambda weight: weight)
    found = _with_minimum(weights, remove, min_kept, lamp)
    return [
        ([name], count)
        for names, together in found
        for name, count in _shares(weights, names, together, lamp).items()
    ]


def erk(shapes: Mapping[str, Sequence[int]], remove: int) -> dict[str, int]:
    """The Erdős–Rényi kernel budget: a layer's density is its dimensions' sum over their product.

    Args:
        shapes: Of the weights, by name.
        remove: How many go of all layers together.

    Returns:
        How many go of each layer.
    """
    sizes = {name: _product(shape) for name, shape in shapes.items()}
    keep = sum(sizes.values()) - remove
    raw = {name: float(sum(shape)) for name, shape in shapes.items()}  # density times size
    whole: set[str] = set()
    while True:
        left = keep - sum(sizes[name] for name in whole)
        total = sum(value for name, value in raw.items() if name not in whole)
        scale = left / total if total else 0.0
        over = {n for n in raw if n not in whole and scale * raw[n] > sizes[n]}
        if not over:
            break
        whole |= over
    exact = {n: float(sizes[n]) if n in whole else scale * raw[n] for n in raw}
    counts = {name: floor(value) for name, value in exact.items()}
    order = sorted(raw, key=lambda name: counts[name] - exact[name])  # largest remainder first
    missing = keep - sum(counts.values())
    while missing:
        for name in order:
            if missing and counts[name] < sizes[name]:
                counts[name] += 1
                missing -= 1
    return {name: sizes[name] - counts[name] for name in raw}


def lamp(weight: Tensor) -> Tensor:
    """The LAMP scores of one layer's weights.

    Args:
        weight: Finite floats, of any shape.

    Returns:
        float32, of its shape: the square over the sum of all squares that are not smaller.
    """
    flat = weight.detach().reshape(-1).double().abs()
    flat /= flat.max().clamp_min(torch.finfo(torch.float64).tiny)  # else squares could overflow
    order = flat.argsort(stable=True)
    squares = flat[order].square_()
    rest = squares.flip(0).cumsum(0).flip(0)
    scores = torch.where(rest > 0, squares / rest, 0)
    # Equal magnitudes have equal scores: that of the first in order, who has the largest sum.
    _, inverse, counts = torch.unique_consecutive(squares, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    result = torch.empty_like(flat, dtype=torch.float32)
    result[order] = scores[first][inverse].float()
    return result.view(weight.shape)


def _with_minimum(
    weights: Mapping[str, Tensor],
    remove: int,
    min_kept: float,
    score: Callable[[Tensor], Tensor],
) -> Groups:
    """One ranking of all layers, but for those that would be left with less than the minimum."""
    if not min_kept:
        return [(list(weights), remove)]
    most = {}
    for name, weight in weights.items():
        size = weight.numel()
        most[name] = size - floor(min_kept * size + 0.5)
    if remove > sum(most.values()):
        raise ValueError(
            f"`ratio` should leave each layer the share `min_kept`. Found a ratio that removes "
            f"{remove:,} weights, and min_kept={min_kept}, which lets {sum(most.values()):,} go; "
            f"lower one of them."
        )
    held: dict[str, int] = {}
    while True:
        free = [name for name in weights if name not in held]
        left = remove - sum(held.values())
        over = {
            name: max(most[name], weights[name].numel() - int(weights[name].count_nonzero()))
            for name, count in _shares(weights, free, max(left, 0), score).items()
            if count > most[name]
        }
        if not over:
            return [([name], count) for name, count in held.items()] + [(free, max(left, 0))]
        held |= over


def _shares(
    weights: Mapping[str, Tensor],
    names: Sequence[str],
    remove: int,
    score: Callable[[Tensor], Tensor],
) -> dict[str, int]:
    """How many of each layer go if layers are ranked together."""
    if not names:
        return {}
    scores = [score(weights[name].detach()) for name in names]
    cut = _radix.cutter(_radix.edge(scores, remove))
    return {
        name: one.numel()
        - int(cut(one.clone() if one.data_ptr() == weights[name].data_ptr() else one).sum())
        for name, one in zip(names, scores, strict=True)
    }


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
