"""Greedy facility location on a GPU whose memory holds the distances of all pairs."""

from __future__ import annotations

from math import frexp

import torch
from torch import Tensor

from drophot._core import memory
from drophot._core.radix_select import has_kernels, on_device
from drophot.coreset.greedy import squared_norms
from drophot.coreset.held_facility_location import all_distances

_MAX_SHARE = 0.5  # of the free memory that the distances may take
_ROWS = 4096  # rows of a block of distances: large, since each block takes several launches
_BLOCK = 1 << 24  # gains that are computed at a time


def is_possible(values: Tensor) -> bool:
    """Whether there are kernels for the device, and memory for all distances."""
    if not has_kernels([values]):
        return False
    needed = (values.element_size() + 1) * len(values) ** 2 + 32 * _BLOCK
    return needed <= _MAX_SHARE * memory.available(values.device)


def choose_on_device(values: Tensor, size: int, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Select medoids: the result of a greedy `Algorithm`.

    Gains are exact sums of distances that are rounded to multiples of `2**-bits` of the largest
    possible one. Of equal gains the first sample is selected.
    """
    from drophot.coreset.facility_location_kernel import add_medoids

    total, device = len(values), values.device
    exponent = frexp(2.001 * float(squared_norms(values).amax().sqrt()))[1]
    distances, _ = all_distances(values * 2.0**-exponent, _ROWS)  # at most 1
    bits = 62 - total.bit_length()
    scale = 2.0**bits
    owner = torch.zeros(total, dtype=torch.int64, device=device)
    start = start.to(device)
    if len(start):
        nearest, owner = distances[start].min(0)
        owner[start] = torch.arange(len(start), device=device)
    else:
        nearest = distances.amax().expand(total).clone()
    gains = torch.zeros(total, dtype=torch.int64, device=device)
    for rows, near in zip(
        distances.split(max(1, _BLOCK // total)),
        nearest.split(max(1, _BLOCK // total)),
        strict=True,
    ):
        gains += ((near * scale).long()[:, None] - (rows * scale).long()).clamp_(min=0).sum(0)
    gains[start] = -1
    count = size - len(start)
    if not count:
        return start.new_empty(0).cpu(), torch.empty(0, dtype=torch.float64), owner
    with on_device(values):
        ranking, ranked = add_medoids(distances, nearest, owner, gains, bits, len(start), count)
    return ranking.cpu(), ranked.cpu().double() * 2.0 ** (exponent - bits), owner
