"""Triton kernels of `device_pruning`: each processes all layers of a model in one launch."""

# No `from __future__ import annotations` here: Triton reads the annotations of a kernel.
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from drophot._core.radix_kernels import (
    FIELDS,
    GROUP,
    INNER,
    MASK,
    PREFIX,
    TIES,
    VALUES,
    WEIGHT,
    bits_of,
    chunk_of,
    keys_at,
    offsets_of,
    removed_earlier,
    ties_removed,
)

# A tally has these numbers for each chunk.
NONZERO = tl.constexpr(0)
NOT_FINITE = tl.constexpr(1)
NEGATIVE = tl.constexpr(2)
REVIVED = tl.constexpr(3)  # weights that an earlier mask removed and that are not zero
REMOVED = tl.constexpr(4)
KEPT_ZEROS = tl.constexpr(5)
TALLY = tl.constexpr(6)


@triton.jit
def count_values(
    table, chunks, chunk_size, dtype, tally, BLOCK: tl.constexpr,
    FLOAT: tl.constexpr, RAW: tl.constexpr, KEY: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr, STRIDED: tl.constexpr, EXPONENT: tl.constexpr,
):  # fmt: skip
    """Count what must be known of the values, and of the masks of an earlier pruning."""
    row, start, end = chunk_of(table, chunks, chunk_size, dtype)
    sign: tl.constexpr = 1 << (WIDTH - 1)
    nonzero = tl.zeros([BLOCK], tl.int32)
    not_finite = tl.zeros([BLOCK], tl.int32)
    negative = tl.zeros([BLOCK], tl.int32)
    revived = tl.zeros([BLOCK], tl.int32)
    removed = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        position = first + tl.arange(0, BLOCK)
        valid = position < end
        offsets = offsets_of(row, position, STRIDED)
        bits = bits_of(tl.load(row + VALUES), offsets, valid, FLOAT, RAW, KEY)
        is_nonzero = (bits & (sign - 1)) != 0  # positions past the end read zeros
        nonzero += is_nonzero.to(tl.int32)
        not_finite += ((bits & EXPONENT) == EXPONENT).to(tl.int32)
        negative += (is_nonzero & (bits >= sign)).to(tl.int32)
        if MASKED:
            is_removed = removed_earlier(row, position, valid)
            removed += is_removed.to(tl.int32)
            revived += (is_removed & is_nonzero).to(tl.int32)
    counted = tally + tl.program_id(0) * TALLY
    tl.store(counted + NONZERO, tl.sum(nonzero), mask=end > start)
    tl.store(counted + NOT_FINITE, tl.sum(not_finite), mask=end > start)
    tl.store(counted + NEGATIVE, tl.sum(negative), mask=end > start)
    tl.store(counted + REVIVED, tl.sum(revived), mask=end > start)
    tl.store(counted + REMOVED, tl.sum(removed), mask=end > start)


@triton.jit
def set_to_zero(
    row, position, chosen, valid, WEIGHT_RAW: tl.constexpr, WEIGHT_STRIDED: tl.constexpr
):
    """Set the chosen weights to zero, and return which weights were zero before."""
    weight = tl.load(row + WEIGHT).to(tl.pointer_type(WEIGHT_RAW))
    offsets = offsets_of(row, position, WEIGHT_STRIDED)
    bits = tl.load(weight + offsets, mask=valid, other=0)
    tl.store(weight + offsets, tl.zeros_like(bits), mask=chosen)
    return (bits << 1) == 0  # without the sign


@triton.jit
def prune_below(
    table, chunks, chunk_size, dtype, low, state, ties_before, tally, WEIGHT_RAW: tl.constexpr,
    WEIGHT_STRIDED: tl.constexpr, BLOCK: tl.constexpr,
    FLOAT: tl.constexpr, RAW: tl.constexpr, KEY: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, MASKED: tl.constexpr, STRIDED: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Remove what is below the threshold of the group, and some of what is equal to it."""
    row, start, end = chunk_of(table, chunks, chunk_size, dtype)
    found = state + tl.load(row + GROUP) * FIELDS
    threshold = tl.load(found + PREFIX)
    ties = tl.load(found + TIES)
    gone = ties_removed(found)
    seen = tl.load(ties_before + tl.program_id(0))
    mask = tl.load(row + MASK).to(tl.pointer_type(tl.uint8))
    removed = tl.zeros([BLOCK], tl.int32)
    kept_zeros = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        position = first + tl.arange(0, BLOCK)
        valid = position < end
        key = keys_at(
            row, position, valid, low,
            FLOAT, RAW, KEY, WIDTH, KIND, MASKED, STRIDED, REVERSED,
        )  # fmt: skip
        keep = key > threshold.to(key.dtype)
        if gone < ties:
            tied = (valid & (key == threshold.to(key.dtype))).to(tl.int32)
            # Of ties in this order, number + 1 lose (number + 1) * gone // ties: evenly spread.
            number = (seen + tl.cumsum(tied, 0) - tied) * gone
            keep = keep | ((tied != 0) & ((number + gone) // ties == number // ties))
            seen += tl.sum(tied)
        tl.store(mask + position, keep.to(tl.uint8), mask=valid)
        zero = set_to_zero(row, position, valid & (keep == 0), valid, WEIGHT_RAW, WEIGHT_STRIDED)
        removed += (valid & (keep == 0)).to(tl.int32)
        kept_zeros += (valid & keep & zero).to(tl.int32)
    counted = tally + tl.program_id(0) * TALLY
    tl.store(counted + REMOVED, tl.sum(removed), mask=end > start)
    tl.store(counted + KEPT_ZEROS, tl.sum(kept_zeros), mask=end > start)


@triton.jit
def keep_largest(
    table, chunks, chunk_size, dtype, low, n, m, BLOCK: tl.constexpr,
    FLOAT: tl.constexpr, RAW: tl.constexpr, KEY: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, MASKED: tl.constexpr, STRIDED: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Write masks that keep the `n` largest of each `m` neighbours, the first of equal ones."""
    row, start, end = chunk_of(table, chunks, chunk_size, dtype)
    inner = tl.load(row + INNER)
    mask = tl.load(row + MASK).to(tl.pointer_type(tl.uint8))
    for first in range(start, end, BLOCK):
        position = first + tl.arange(0, BLOCK)
        valid = position < end
        key = keys_at(
            row, position, valid, low,
            FLOAT, RAW, KEY, WIDTH, KIND, MASKED, STRIDED, REVERSED,
        )  # fmt: skip
        place = (position // inner) % m
        before = tl.zeros([BLOCK], tl.int32)
        for number in range(0, m):
            other = keys_at(
                row, position + (number - place) * inner, valid, low,
                FLOAT, RAW, KEY, WIDTH, KIND, MASKED, STRIDED, REVERSED,
            )  # fmt: skip
            before += ((other > key) | ((other == key) & (number < place))).to(tl.int32)
        keep = (before < n) & (key != 0)
        tl.store(mask + position, keep.to(tl.uint8), mask=valid)


@triton.jit
def apply_masks(
    table, chunks, chunk_size, dtype, tally, WEIGHT_RAW: tl.constexpr,
    WEIGHT_STRIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set what the masks of `keep_largest` remove to zero."""
    row, start, end = chunk_of(table, chunks, chunk_size, dtype)
    mask = tl.load(row + MASK).to(tl.pointer_type(tl.uint8))
    removed = tl.zeros([BLOCK], tl.int32)
    kept_zeros = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        position = first + tl.arange(0, BLOCK)
        valid = position < end
        keep = tl.load(mask + position, mask=valid, other=1) != 0
        zero = set_to_zero(row, position, valid & (keep == 0), valid, WEIGHT_RAW, WEIGHT_STRIDED)
        removed += (keep == 0).to(tl.int32)
        kept_zeros += (valid & keep & zero).to(tl.int32)
    counted = tally + tl.program_id(0) * TALLY
    tl.store(counted + REMOVED, tl.sum(removed), mask=end > start)
    tl.store(counted + KEPT_ZEROS, tl.sum(kept_zeros), mask=end > start)
