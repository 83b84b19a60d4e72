"""Medoids of many small groups at once, by greedy facility location on all their distances."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from drophot._core.exact_arithmetic import exact

_DISTANCES = 1 << 24  # held at a time


@exact()
def medoids(
    groups: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The medoids of each class in each of several subsets, and how many samples each stands for.

    Args:
        groups: For each subset, for each class, vectors `(n, D)`.
        sizes: How many medoids of each, at most as many as there are vectors.

    Returns:
        For each subset and class, the places of the medoids in the order in which they were chosen,
        and their weights, float32, both on the CPU.
    """
    chosen = [[torch.empty(0, dtype=torch.int64) for _ in group] for group in groups]
    weights = [[torch.empty(0, dtype=torch.float32) for _ in group] for group in groups]
    wanted = [
        (subset, number)
        for subset, of_classes in enumerate(sizes)
        for number, size in enumerate(of_classes)
        if size
    ]

    def about(where: tuple[int, int]) -> int:
        return (len(groups[where[0]][where[1]]) - 1).bit_length()

    # Those of like length go together, padded to the longest: at most to twice their own.
    for _, like in groupby(sorted(wanted, key=about), key=about):
        places = list(like)
        longest = max(len(groups[subset][number]) for subset, number in places)
        at_once = max(1, _DISTANCES // longest**2)
        for begin in range(0, len(places), at_once):
            part = places[begin : begin + at_once]
            numbers = [sizes[subset][number] for subset, number in part]
            rows, counts = _greedy(
                [groups[subset][number] for subset, number in part], torch.tensor(numbers), longest
            )
            for (subset, number), size, row, count in zip(part, numbers, rows, counts, strict=True):
                chosen[subset][number], weights[subset][number] = row[:size], count[:size]
    return chosen, weights


def _greedy(parts: list[Tensor], wanted: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Of groups of vectors (n, D), the places (G, most wanted) and their weights."""
    device = parts[0].device
    vectors = parts[0].new_zeros(len(parts), longest, parts[0].shape[1])
    lengths = torch.tensor([len(part) for part in parts], device=device)
    for row, part in zip(vectors, parts, strict=True):
        row[: len(part)] = part
    # Not by products: near vectors would be zero apart, or not.
    away = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    there = torch.arange(longest, device=device) < lengths[:, None]
    inside = there[:, :, None] & there[:, None, :]
    nearest = torch.where(there, away.where(inside, 0).amax((1, 2))[:, None], 0)
    free = there.clone()
    everyone = torch.arange(len(parts), device=device)
    places = []
    for _ in range(int(wanted.max())):
        gains = (nearest[:, :, None] - away).clamp_(min=0).sum(1)
        place = gains.masked_fill_(~free, -1).argmax(1)
        free[everyone, place] = False
        nearest = torch.minimum(nearest, away[everyone, :, place])
        places.append(place)
    order = torch.stack(places, 1)
    # Each vector belongs to the nearest of those that its group wanted, each of these to itself.
    apart = away.gather(2, order[:, None, :].expand(-1, longest, -1))
    beyond = torch.arange(order.shape[1], device=device) >= wanted.to(device)[:, None]
    owner = apart.masked_fill_(beyond[:, None, :], torch.inf).argmin(2)
    group, number = (~beyond).nonzero(as_tuple=True)
    owner[group, order[group, number]] = number
    counts = torch.zeros(order.shape, dtype=torch.float32, device=device)
    counts.scatter_add_(1, owner, there.float())
    return order.cpu(), counts.cpu()
