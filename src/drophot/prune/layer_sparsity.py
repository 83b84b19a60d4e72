"""How many weights each layer loses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import ceil, floor, isclose, prod
from typing import Literal

import torch
from torch import Tensor

from drophot._core import order_statistics
from drophot._core.ratios import num_removed
from drophot.prune import lamp_sparsity

Scope = Literal["global", "layer", "erk", "lamp"]

# Layers that are ranked together, by name, and how many weights these lose together.
Groups = list[tuple[list[str], int]]

# How many of each layer go if some are ranked together and lose so many.
Divide = Callable[[Sequence[str], int], Mapping[str, int]]


def groups(
    weights: Mapping[str, Tensor],
    older: Mapping[str, Tensor],
    ratio: float,
    scope: Scope,
    min_kept: float = 0.0,
    blank: Collection[str] = (),
    late: Collection[str] = (),
) -> Groups:
    """How many weights go, and from which layers.

    Args:
        weights: Finite floats, by name.
        older: The masks of an earlier pruning, by name. What these removed goes in any case and
            counts among what goes.
        ratio: The share of all of them that goes, of `n` exactly `floor(ratio * n + 0.5)`.
        scope: How it is shared out: see `magnitude_prune`.
        min_kept: The share of each layer that stays at least, for "global" and "lamp".
        blank: Layers that a ranking of all of them should leave out: they lose nothing more.
        late: Layers that "global" should take no more than the share of.

    Returns:
        The groups, which hold each layer once.

    Raises:
        ValueError: If the share and the minimum cannot both be met, or the layers that are ranked
            have too few weights.
    """
    sizes = {name: weight.numel() for name, weight in weights.items()}
    removed = {name: int((~mask).count_nonzero()) for name, mask in older.items()}
    gone = {name: removed.get(name, 0) for name in weights}
    if scope == "layer":
        return [([n], max(gone[n], num_removed(size, ratio))) for n, size in sizes.items()]
    remove = num_removed(sum(sizes.values()), ratio)
    if scope == "erk":
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        return [([name], count) for name, count in erk(shapes, remove, gone).items()]
    ranked = [name for name in weights if name not in blank]
    left_out = [([name], gone[name]) for name in blank]
    remove -= sum(gone[name] for name in blank)
    most = {name: sizes[name] - _least(min_kept, sizes[name]) for name in ranked}
    capped = [name for name in ranked if name in late] if scope == "global" else []
    most |= {name: min(most[name], num_removed(sizes[name], ratio)) for name in capped}
    most = {name: max(gone[name], count) for name, count in most.items()}
    if remove > sum(most.values()):
        _refuse(remove, sum(most.values()), min_kept, blank)
    if scope == "lamp":
        scores = {name: lamp_sparsity.Scores(weights[name], older.get(name)) for name in ranked}

        def divide(names: Sequence[str], count: int) -> Mapping[str, int]:
            return lamp_sparsity.divide(scores, names, count)

    else:

        def divide(names: Sequence[str], count: int) -> Mapping[str, int]:
            tensors, masks = [weights[n] for n in names], [older.get(n) for n in names]
            edge = order_statistics.magnitude_threshold(tensors, count, masks)
            return dict(
                zip(names, order_statistics.count_removed(edge, tensors, masks), strict=True)
            )

    limited = divide if min_kept or capped else None
    held, free, rest = _with_minimum(ranked, most, remove, limited)
    found = [*left_out, *(([name], count) for name, count in held.items())]
    if scope == "lamp" and free:
        return [*found, *(([name], count) for name, count in divide(free, rest).items())]
    return [*found, (free, rest)] if free else found


def check_minimum(
    weights: Mapping[str, Tensor], older: Mapping[str, Tensor], ratio: float, min_kept: float
) -> None:
    """Refuse a share that a ranking of all layers cannot remove, before it is due.

    Args:
        weights: By name.
        older: The masks of an earlier pruning, as in `groups`.
        ratio: The share of all weights that is to go.
        min_kept: The share of each layer that stays at least.

    Raises:
        ValueError: If both cannot be met.
    """
    sizes = {name: weight.numel() for name, weight in weights.items()}
    gone = {name: int((~mask).sum()) for name, mask in older.items()}
    most = sum(max(gone.get(n, 0), size - _least(min_kept, size)) for n, size in sizes.items())
    if (remove := num_removed(sum(sizes.values()), ratio)) > most:
        _refuse(remove, most, min_kept, ())


def erk(
    shapes: Mapping[str, Sequence[int]], remove: int, gone: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The Erdős–Rényi kernel budget: a layer's density is its dimensions' sum over their product.

    Args:
        shapes: Of the weights, by name.
        remove: How many go of all layers together.
        gone: How many of each go in any case; where the budget is less, the others make up for it.

    Returns:
        How many go of each layer.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    room = {name: size - (gone or {}).get(name, 0) for name, size in sizes.items()}
    keep = min(sum(sizes.values()) - remove, sum(room.values()))
    raw = {name: float(sum(shape)) for name, shape in shapes.items()}  # density times size
    whole: set[str] = set()  # which keep all that they can
    while True:
        left = keep - sum(room[name] for name in whole)
        total = sum(value for name, value in raw.items() if name not in whole)
        scale = left / total if total else 0.0
        over = {n for n in raw if n not in whole and scale * raw[n] > room[n]}
        if not over:
            break
        whole |= over
    exact = {n: float(room[n]) if n in whole else scale * raw[n] for n in raw}
    counts = {name: floor(value) for name, value in exact.items()}
    order = sorted(raw, key=lambda name: counts[name] - exact[name])  # largest remainder first
    missing = keep - sum(counts.values())
    while missing:
        for name in order:
            if missing and counts[name] < room[name]:
                counts[name] += 1
                missing -= 1
    return {name: sizes[name] - counts[name] for name in raw}


def lamp(weight: Tensor) -> Tensor:
    """The LAMP scores of one layer's weights: the square over the sum of all that are not smaller.

    Args:
        weight: Finite floats, of any shape.

    Returns:
        float64, of its shape.
    """
    keys = order_statistics.magnitude_keys(weight)
    scores = torch.empty(weight.numel(), dtype=torch.float64)
    scores[keys.cpu().argsort(stable=True)] = torch.from_numpy(lamp_sparsity.Scores(weight).all())
    return scores.view(weight.shape)


def _with_minimum(
    ranked: Sequence[str], most: Mapping[str, int], remove: int, divide: Divide | None
) -> tuple[dict[str, int], list[str], int]:
    """The layers that a ranking takes too much of, with what they lose; the others, with theirs."""
    held: dict[str, int] = {}
    while True:
        free = [name for name in ranked if name not in held]
        left = max(remove - sum(held.values()), 0)
        if divide is None or not free:
            return held, free, left
        shares = divide(free, left)
        over = {name: most[name] for name, count in shares.items() if count > most[name]}
        if not over:
            return held, free, left
        held |= over


def _least(min_kept: float, size: int) -> int:
    """How many weights a layer keeps at least; 0.1 of 30 are 3, although 0.1 * 30 is more."""
    share = min_kept * size
    return round(share) if isclose(share, round(share), rel_tol=1e-12) else ceil(share)


def _refuse(remove: int, most: int, min_kept: float, blank: Collection[str]) -> None:
    left_out = ", ".join(f"`{name}`" for name in blank)
    zeros = f", as all weights of {left_out} are zero" if blank else ""
    if min_kept:
        raise ValueError(
            f"`ratio` should leave each layer the share `min_kept`. Found a ratio that removes "
            f"{remove:,} weights, and min_kept={min_kept}, which lets {most:,} go{zeros}; lower "
            f"one of them."
        )
    raise ValueError(
        f"`ratio` should be met by the weights that can be ranked. Found a ratio that removes "
        f"{remove:,} weights, and {most:,} to choose from{zeros}; lower it, name those layers in "
        f"`skip`, prune when they have trained, or, if an earlier pruning removed these weights, "
        f"call Masks.from_zeros(model).apply() first."
    )
