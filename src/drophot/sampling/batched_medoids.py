"""Medoids of many small groups at once, by greedy facility location on all distances."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from drophot._core.exact_arithmetic import exact

_MAX_DISTANCES = 1 << 24  # held at a time


@exact()
def medoids(
    groups: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The medoids of each class in several subsets, and how many samples each represents.

    Args:
        groups: For each subset and class, vectors `(n, D)`.
        sizes: The number of medoids for each, at most `n`.

    Returns:
        For each subset and class, the positions of the medoids in the order of selection and their
        float32 weights, both on the CPU.
    """
    chosen = [[torch.empty(0, dtype=torch.int64) for _ in group] for group in groups]
    weights = [[torch.empty(0, dtype=torch.float32) for _ in group] for group in groups]
    wanted = [
        (subset, number)
        for subset, of_classes in enumerate(sizes)
        for number, size in enumerate(of_classes)
        if size
    ]

    def length_bits(where: tuple[int, int]) -> int:
        return (len(groups[where[0]][where[1]]) - 1).bit_length()

    # Groups of similar length are batched and padded to the longest, at most twice their length.
    for _, similar in groupby(sorted(wanted, key=length_bits), key=length_bits):
        group_keys = list(similar)
        longest = max(len(groups[subset][number]) for subset, number in group_keys)
        at_once = max(1, _MAX_DISTANCES // longest**2)
        for begin in range(0, len(group_keys), at_once):
            part = group_keys[begin : begin + at_once]
            numbers = [sizes[subset][number] for subset, number in part]
            rows, counts = _greedy(
                [groups[subset][number] for subset, number in part], torch.tensor(numbers), longest
            )
            for (subset, number), size, row, count in zip(part, numbers, rows, counts, strict=True):
                chosen[subset][number], weights[subset][number] = row[:size], count[:size]
    return chosen, weights


def _greedy(parts: list[Tensor], wanted: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The positions (G, max(wanted)) of the medoids of groups of vectors, and their weights."""
    device = parts[0].device
    vectors = parts[0].new_zeros(len(parts), longest, parts[0].shape[1])
    lengths = torch.tensor([len(part) for part in parts], device=device)
    for row, part in zip(vectors, parts, strict=True):
        row[: len(part)] = part
    # Matrix products would make the distances of close vectors inaccurate.
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    exists = torch.arange(longest, device=device) < lengths[:, None]
    inside = exists[:, :, None] & exists[:, None, :]
    nearest = torch.where(exists, distances.where(inside, 0).amax((1, 2))[:, None], 0)
    free = exists.clone()
    group_index = torch.arange(len(parts), device=device)
    medoid_positions = []
    for _ in range(int(wanted.max())):
        gains = (nearest[:, :, None] - distances).clamp_(min=0).sum(1)
        position = gains.masked_fill_(~free, -1).argmax(1)
        free[group_index, position] = False
        nearest = torch.minimum(nearest, distances[group_index, :, position])
        medoid_positions.append(position)
    order = torch.stack(medoid_positions, 1)
    # Each vector belongs to the nearest medoid of its group, and each medoid to itself.
    to_medoids = distances.gather(2, order[:, None, :].expand(-1, longest, -1))
    unused = torch.arange(order.shape[1], device=device) >= wanted.to(device)[:, None]
    owner = to_medoids.masked_fill_(unused[:, None, :], torch.inf).argmin(2)
    group, number = (~unused).nonzero(as_tuple=True)
    owner[group, order[group, number]] = number
    counts = torch.zeros(order.shape, dtype=torch.float32, device=device)
    counts.scatter_add_(1, owner, exists.float())
    return order.cpu(), counts.cpu()
