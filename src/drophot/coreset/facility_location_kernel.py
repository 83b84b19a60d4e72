"""Triton kernels for greedy facility location: two launches per medoid, and no wait for the GPU.

All distances are in memory. The first launch selects the sample of the largest gain among those
that the programs of the second one found, and lists the samples to which it is nearer than all
medoids before it. The second launch lowers the gains by what these samples no longer contribute.

Gains are integers: a distance, at most 1, is multiplied by `2**bits` and rounded down. Sums of
integers do not depend on the order of their terms, so that gains are what a new computation of all
of them would give, and a run gives the same result each time.
"""

# No `from __future__ import annotations` here: Triton reads the annotations of a kernel.
# pyright: reportMissingImports=false, reportCallIssue=false, reportInvalidTypeForm=false
# pyright: reportArgumentType=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_SAMPLES = 256  # that a program of the first launch compares
_CANDIDATES = 64  # whose gains a program of the second launch lowers
_ROWS = 32  # distances to each candidate that it reads at a time


def add_medoids(
    distances: Tensor,
    nearest: Tensor,
    owner: Tensor,
    gains: Tensor,
    bits: int,
    first_owner: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Select `count` medoids, each the sample of the largest gain, the first of equal ones.

    Args:
        distances: Of all pairs of samples `(N, N)`, contiguous.
        nearest: The distance `(N,)` of each sample to its nearest medoid. Updated in place, as are
            the next two.
        owner: The number `(N,)` of that medoid, int64.
        gains: The gain `(N,)` of each sample, int64, in units of `2**-bits`; -1 for medoids.
        bits: So few that no sum of `N` distances overflows.
        first_owner: The number of the first new medoid.
        count: How many to add, at least 1.

    Returns:
        The medoids `(count,)` and their gains, int64.
    """
    total, device = len(nearest), distances.device
    programs = triton.cdiv(total, _CANDIDATES)
    slots = triton.next_power_of_2(programs)
    ranking = torch.empty(count, dtype=torch.int64, device=device)
    ranked_gains = torch.empty_like(ranking)
    # The best candidate of each program and its gain.
    best = torch.empty(2, programs, dtype=torch.int64, device=device)
    # The samples of which a new medoid is the nearest, and their distances before it was.
    changed = torch.empty(total, dtype=torch.int32, device=device)
    before = torch.empty_like(nearest)
    num_changed = torch.zeros(count + 1, dtype=torch.int32, device=device)
    shared = (distances, nearest, changed, before, num_changed)
    _lower_gains[(programs,)](
        *shared, gains, ranking, best, -1, total, programs, bits, _CANDIDATES, _ROWS
    )
    for step in range(count):
        _take_best[(triton.cdiv(total, _SAMPLES),)](
            *shared, owner, ranking, ranked_gains, best,
            step, first_owner + step, total, programs, _SAMPLES, slots,
        )  # fmt: skip
        _lower_gains[(programs,)](
            *shared, gains, ranking, best, step, total, programs, bits, _CANDIDATES, _ROWS
        )
    return ranking, ranked_gains


@triton.jit(do_not_specialize=["step", "number", "total", "programs"])
def _take_best(
    distances, nearest, changed, before, num_changed, owner, ranking, ranked_gains, best,
    step, number, total, programs, block: tl.constexpr, slots: tl.constexpr,
):  # fmt: skip
    """Select a medoid, and list the samples that are nearer to it than to all others."""
    program = tl.program_id(0)
    others = tl.arange(0, slots)
    found = tl.load(best + others, mask=others < programs, other=-2)
    gain = tl.max(found, 0)
    samples = tl.load(best + programs + others, mask=others < programs, other=total)
    medoid = tl.min(tl.where(found == gain, samples, total), 0)
    if program == 0:
        tl.store(ranking + step, medoid)
        tl.store(ranked_gains + step, gain)
    sample = program * block + tl.arange(0, block)
    exists = sample < total
    away = tl.load(distances + medoid * total + sample, mask=exists, other=0)
    far = tl.load(nearest + sample, mask=exists, other=0)
    closer = exists & (away < far)
    tl.store(nearest + sample, away, mask=closer)
    owned = sample * 0 + number
    tl.store(owner + sample, owned.to(tl.int64), mask=closer | (exists & (sample == medoid)))
    each = closer.to(tl.int32)
    # The order of the list differs from run to run, and the sums of integers do not.
    begin = tl.atomic_add(num_changed + step, tl.sum(each, 0))
    place = begin + tl.cumsum(each, 0) - each
    tl.store(changed + place, sample.to(tl.int32), mask=closer)
    tl.store(before + place, far, mask=closer)


@triton.jit(do_not_specialize=["step", "total", "programs"])
def _lower_gains(
    distances, nearest, changed, before, num_changed, gains, ranking, best,
    step, total, programs, bits: tl.constexpr, block: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Lower the gains by what the listed samples no longer contribute, and find the largest."""
    candidate = tl.program_id(0) * block + tl.arange(0, block)
    exists = candidate < total
    before_step = tl.load(gains + candidate, mask=exists, other=-2)
    gain = before_step
    if step >= 0:
        size = tl.load(num_changed + step)
        for begin in range(0, size, rows):
            place = begin + tl.arange(0, rows)
            listed = place < size
            sample = tl.load(changed + place, mask=listed, other=0)
            far = tl.load(before + place, mask=listed, other=0)
            near = tl.load(nearest + sample, mask=listed, other=0)
            away = tl.load(
                distances + sample.to(tl.int64)[:, None] * total + candidate[None, :],
                mask=listed[:, None] & exists[None, :],
                other=0,
            )
            away = tl.maximum(away, near[:, None])
            lost = _whole(far, bits)[:, None] - _whole(away, bits)
            gain -= tl.sum(tl.maximum(lost, 0), 0)
        is_medoid = (before_step < 0) | (candidate == tl.load(ranking + step))
        gain = tl.where(is_medoid, -1, gain)
        tl.store(gains + candidate, gain, mask=exists)
    gain = tl.where(exists, gain, -2)
    largest = tl.max(gain, 0)
    first = tl.min(tl.where(gain == largest, candidate, total), 0)
    tl.store(best + tl.program_id(0), largest)
    index = best + programs + tl.program_id(0)
    tl.store(index, first.to(tl.int64))  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def _whole(distance, bits: tl.constexpr):
    """A distance in units of `2**-bits`, rounded down."""
    scale: tl.constexpr = 1 << bits  # pyright: ignore[reportOperatorIssue]
    return (distance * scale).to(tl.int64)
