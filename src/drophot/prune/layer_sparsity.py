"""How many weights each layer loses: uniform, Erdős–Rényi kernel, or ranked with the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import ceil, floor, isclose, prod
from typing import Literal

from torch import Tensor

from drophot._core.radix_select import has_kernels
from drophot._core.ratios import num_removed
from drophot.prune import device_lamp
from drophot.prune.device_pruning import count_values
from drophot.prune.importance import Ranking
from drophot.prune.lamp import LampScores, lamp_counts

Scope = Literal["global", "layer", "erk", "lamp"]

# Layers with one threshold, by name, and the number of weights that they lose together.
Groups = list[tuple[list[str], int]]

# The number of weights that each of these layers loses if they lose `count` together.
CountByLayer = Callable[[Sequence[str], int], dict[str, int]]


def removal_groups(
    ranking: Ranking,
    ratio: float,
    scope: Scope,
    min_kept: float = 0.0,
    zero_layers: Collection[str] = (),
    formerly_zero: Collection[str] = (),
) -> Groups:
    """Divide the weights to remove among the layers; each layer is in one group.

    A ranking of all layers leaves out the `zero_layers`, which lose nothing more. With "global" the
    `formerly_zero` lose no more than the share `ratio`.
    """
    sizes = {name: value.numel() for name, value in ranking.values.items()}
    removed = _removed_earlier(ranking.values, ranking.earlier)
    if scope == "layer":
        return [([n], max(removed[n], num_removed(size, ratio))) for n, size in sizes.items()]
    total = num_removed(sum(sizes.values()), ratio)
    if scope == "erk":
        shapes = {name: tuple(value.shape) for name, value in ranking.values.items()}
        return [([name], count) for name, count in erk_counts(shapes, total, removed).items()]
    ranked = [name for name in sizes if name not in zero_layers]
    total -= sum(removed[name] for name in zero_layers)
    most = {name: sizes[name] - _least_kept(min_kept, sizes[name]) for name in ranked}
    limited = [name for name in ranked if name in formerly_zero] if scope == "global" else []
    most |= {name: min(most[name], num_removed(sizes[name], ratio)) for name in limited}
    most = {name: max(removed[name], count) for name, count in most.items()}
    if total > sum(most.values()):
        _raise_too_many(total, sum(most.values()), min_kept, zero_layers)
    count_by_layer = _lamp_ranking(ranking, ranked) if scope == "lamp" else ranking.counts
    at_limit: dict[str, int] = {}
    if min_kept or limited:
        at_limit = _layers_at_limit(ranked, most, total, count_by_layer)
    free = [name for name in ranked if name not in at_limit]
    rest = max(total - sum(at_limit.values()), 0)
    groups = [([name], removed[name]) for name in zero_layers]
    groups += [([name], count) for name, count in at_limit.items()]
    if scope == "lamp" and free:
        return groups + [([name], count) for name, count in count_by_layer(free, rest).items()]
    return [*groups, (free, rest)] if free else groups


def check_minimum(
    weights: Mapping[str, Tensor], earlier: Mapping[str, Tensor], ratio: float, min_kept: float
) -> None:
    """Refuse a ratio that a ranking of all layers cannot reach, before it is due."""
    removed = _removed_earlier(weights, earlier)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    most = sum(max(removed[n], size - _least_kept(min_kept, size)) for n, size in sizes.items())
    if (total := num_removed(sum(sizes.values()), ratio)) > most:
        _raise_too_many(total, most, min_kept, ())


def erk_counts(
    shapes: Mapping[str, Sequence[int]], remove: int, removed: Mapping[str, int] | None = None
) -> dict[str, int]:
    """How many of the `remove` weights each layer loses under the Erdős–Rényi kernel.

    The density of a layer is proportional to the sum of its dimensions over their product. A layer
    loses at least what an earlier pruning `removed`; the others then lose less.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    room = {name: size - (removed or {}).get(name, 0) for name, size in sizes.items()}
    keep = min(sum(sizes.values()) - remove, sum(room.values()))
    raw = {name: float(sum(shape)) for name, shape in shapes.items()}  # density times size
    full: set[str] = set()  # layers that keep all that they can
    while True:
        left = keep - sum(room[name] for name in full)
        total = sum(value for name, value in raw.items() if name not in full)
        scale = left / total if total else 0.0
        over = {n for n in raw if n not in full and scale * raw[n] > room[n]}
        if not over:
            break
        full |= over
    exact = {n: float(room[n]) if n in full else scale * raw[n] for n in raw}
    counts = {name: floor(value) for name, value in exact.items()}
    order = sorted(raw, key=lambda name: counts[name] - exact[name])  # largest remainder first
    missing = keep - sum(counts.values())
    while missing:
        for name in order:
            if missing and counts[name] < room[name]:
                counts[name] += 1
                missing -= 1
    return {name: sizes[name] - counts[name] for name in raw}


def _removed_earlier(
    weights: Mapping[str, Tensor], earlier: Mapping[str, Tensor]
) -> dict[str, int]:
    masked = [name for name in weights if name in earlier]
    if has_kernels([weights[name] for name in masked]):
        counts = count_values([weights[n] for n in masked], [earlier[n] for n in masked])
        found = {name: count.removed for name, count in zip(masked, counts, strict=True)}
    else:
        found = {name: int((~earlier[name]).count_nonzero()) for name in masked}
    return {name: found.get(name, 0) for name in weights}


def _lamp_ranking(ranking: Ranking, names: Sequence[str]) -> CountByLayer:
    values = {name: ranking.values[name] for name in names}
    if names and device_lamp.is_used(values.values()):
        return device_lamp.DeviceRanking(values, ranking.earlier).counts
    scores = {name: LampScores(ranking.values[name], ranking.earlier.get(name)) for name in names}

    def counts(names: Sequence[str], count: int) -> dict[str, int]:
        return lamp_counts({name: scores[name] for name in names}, count)

    return counts


def _layers_at_limit(
    ranked: Sequence[str], most: Mapping[str, int], total: int, count_by_layer: CountByLayer
) -> dict[str, int]:
    """The layers of which a ranking would remove more than `most`, and that number."""
    at_limit: dict[str, int] = {}
    while free := [name for name in ranked if name not in at_limit]:
        counts = count_by_layer(free, max(total - sum(at_limit.values()), 0))
        over = {name: most[name] for name, count in counts.items() if count > most[name]}
        if not over:
            break
        at_limit |= over
    return at_limit


def _least_kept(min_kept: float, size: int) -> int:
    """The number of weights that a layer keeps; 0.1 of 30 is 3, although 0.1 * 30 is more."""
    share = min_kept * size
    return round(share) if isclose(share, round(share), rel_tol=1e-12) else ceil(share)


def _raise_too_many(total: int, most: int, min_kept: float, zero_layers: Collection[str]) -> None:
    names = ", ".join(f"`{name}`" for name in zero_layers)
    zeros = f", since all weights of {names} are zero" if zero_layers else ""
    if min_kept:
        raise ValueError(
            f"`ratio` and `min_kept` cannot both be met: the ratio removes {total:,} weights, but "
            f"only {most:,} can be removed with min_kept={min_kept}{zeros}. Lower one of them."
        )
    raise ValueError(
        f"`ratio` removes {total:,} weights, but only {most:,} can be ranked{zeros}. Lower it, "
        f"name those layers in `skip`, or prune after they have been trained. If an earlier "
        f"pruning removed these weights, call Masks.from_zeros(model).apply() first."
    )
