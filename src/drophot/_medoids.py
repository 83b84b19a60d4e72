"""Medoids of many small groups at once, by greedy facility location on all their distances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DISTANCES = 1 << 24  # held at a time


def medoids(
    groups: Sequence[Sequence[Tensor]], sizes: Sequence[int]
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The medoids of each class in each of several subsets, and how many samples each stands for.

    Args:
        groups: For each subset, for each class, vectors `(n, D)`, of a class always as many.
        sizes: How many medoids of each class, at most as many as it has vectors.

    Returns:
        For each subset and class, the places of the medoids in the order in which they were chosen,
        and their weights, float32, both on the CPU.
    """
    longest = max(len(part) for part in groups[0])
    at_once = max(1, _DISTANCES // (len(sizes) * longest**2))
    chosen: list[list[Tensor]] = []
    weights: list[list[Tensor]] = []
    for begin in range(0, len(groups), at_once):
        parts = [part for group in groups[begin : begin + at_once] for part in group]
        wanted = torch.tensor(sizes).repeat(len(parts) // len(sizes))
        places, counts = _greedy(parts, wanted, longest)
        found = [row[:size] for row, size in zip(places, wanted.tolist(), strict=True)]
        heavy = [row[:size] for row, size in zip(counts, wanted.tolist(), strict=True)]
        for first in range(0, len(parts), len(sizes)):
            chosen.append(found[first : first + len(sizes)])
            weights.append(heavy[first : first + len(sizes)])
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
    # Each vector belongs to the nearest of those that its group wanted.
    apart = away.gather(2, order[:, None, :].expand(-1, longest, -1))
    beyond = torch.arange(order.shape[1], device=device) >= wanted.to(device)[:, None]
    owner = apart.masked_fill_(beyond[:, None, :], torch.inf).argmin(2)
    counts = torch.zeros(order.shape, device=device)
    counts.scatter_add_(1, owner, there.float())
    return order.cpu(), counts.cpu()
