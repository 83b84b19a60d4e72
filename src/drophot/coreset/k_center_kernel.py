"""A Triton kernel for greedy k-center: one launch per center, and no wait for the GPU.

Each launch finds the farthest sample among the candidates that the programs of the previous launch
found, and lowers the distances of all samples to those to it.
"""

# No `from __future__ import annotations` here: Triton reads the annotations of a kernel.
# pyright: reportMissingImports=false, reportCallIssue=false, reportInvalidTypeForm=false
# pyright: reportArgumentType=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64  # samples that a program reads at a time
_COLUMNS = 128
_MAX_PROGRAMS = 1024


def add_centers(values: Tensor, nearest: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Select `count` centers, each the farthest sample from all before it.

    Args:
        values: The features `(N, D)`, contiguous.
        nearest: The squared distance `(N,)` of each sample to the nearest center, infinity if there
            is none, and -1 for centers. It is updated in place.
        first: The first center to add.
        count: The number of centers to add, at least 1.

    Returns:
        The centers and the squared distances at which they were selected. Of equal distances the
        first sample is selected.
    """
    total, width = values.shape
    pieces = triton.cdiv(total, _ROWS)
    per_program = triton.cdiv(pieces, _MAX_PROGRAMS)
    programs = triton.cdiv(pieces, per_program)
    ranking = torch.empty(count, dtype=torch.int64, device=values.device)
    squares = values.new_empty(count)
    # The farthest sample of each program and its distance, read by one launch and written for the
    # next.
    farthest = torch.zeros(2, programs, dtype=torch.int64, device=values.device)
    away = values.new_full((2, programs), -2)
    farthest[0, 0], away[0, 0] = first, nearest[first]
    for step in range(count):
        now, then = step % 2, (step + 1) % 2
        _add_center[(programs,)](
            values,
            nearest,
            farthest[now],
            away[now],
            farthest[then],
            away[then],
            ranking,
            squares,
            step,
            total,
            width,
            programs,
            per_program,
            block_rows=_ROWS,
            block_columns=_COLUMNS,
            num_slots=triton.next_power_of_2(programs),
        )
    return ranking, squares


@triton.jit(do_not_specialize=["step", "total", "programs", "per_program"])
def _add_center(
    values,
    nearest,
    farthest,
    away,
    next_farthest,
    next_away,
    ranking,
    squares,
    step,
    total,
    width,
    programs,
    per_program,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    num_slots: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # so that the numbers of samples do not overflow
    others = tl.arange(0, num_slots)
    found = tl.load(away + others, mask=others < programs, other=-2)
    distance = tl.max(found, 0)
    samples = tl.load(farthest + others, mask=others < programs, other=0)
    center = tl.min(tl.where((found == distance) & (others < programs), samples, total), 0)
    if program == 0:
        tl.store(ranking + step, center)
        tl.store(squares + step, distance)
    best = tl.full([], -2, dtype=values.dtype.element_ty)
    best_sample = center * 0
    for piece in range(per_program):
        rows = (program * per_program + piece) * block_rows + tl.arange(0, block_rows)
        inside = rows < total
        begins = rows * width
        near = tl.zeros([block_rows], dtype=values.dtype.element_ty)
        for begin in range(0, width, block_columns):
            columns = begin + tl.arange(0, block_columns)
            exists = columns < width
            own = tl.load(values + center * width + columns, mask=exists, other=0)
            block = tl.load(
                values + begins[:, None] + columns[None, :],
                mask=inside[:, None] & exists[None, :],
                other=0,
            )
            difference = block - own[None, :]
            near += tl.sum(difference * difference, 1)
        before = tl.load(nearest + rows, mask=inside, other=-2)
        near = tl.where(rows == center, -1, tl.minimum(before, near))
        tl.store(nearest + rows, near, mask=inside)
        largest = tl.max(near, 0)
        sample = tl.min(tl.where(near == largest, rows, total), 0)
        best_sample = tl.where(largest > best, sample, best_sample)
        best = tl.maximum(largest, best)
    tl.store(next_away + program, best)
    tl.store(next_farthest + program, best_sample)
