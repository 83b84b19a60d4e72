"""Triton kernels of `device_selection`, for ties that hashes break."""

# No `from __future__ import annotations` here: Triton reads the annotations of a kernel.
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from drophot._core.radix_kernels import (
    DIGITS,
    ENDED,
    FIELDS,
    GROUP,
    OFFSET,
    PREFIX,
    chunk_of,
    keys_at,
)


@triton.jit
def mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def hashes_at(row, position, valid, start, positions, PLACED: tl.constexpr, REVERSED: tl.constexpr):
    """The SplitMix64 hashes of the samples' positions, as in `seeded_draw.splitmix64`."""
    place = position_in_dataset(row, position, valid, positions, PLACED)
    hashes = mix(
        tl.load(start).to(tl.uint64, bitcast=True) + (place.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    )
    if REVERSED:
        hashes = hashes ^ 0xFFFFFFFFFFFFFFFF
    return hashes


@triton.jit
def position_in_dataset(row, position, valid, positions, PLACED: tl.constexpr):
    place = position.to(tl.int64)
    if PLACED:
        place = tl.load(positions + tl.load(row + OFFSET) + position, mask=valid, other=0)
    return place


@triton.jit
def count_hash_digits(
    table, chunks, chunk_size, dtype, low, state, hash_state, counts, start_hash, positions,
    SHIFT: tl.constexpr, KEYED: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr,
    FLOAT: tl.constexpr, RAW: tl.constexpr, KEY: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, MASKED: tl.constexpr, STRIDED: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """As `count_digits`, for the digits of the hashes of those whose key is the threshold."""
    row, start, end = chunk_of(table, chunks, chunk_size, dtype)
    group = tl.load(row + GROUP)
    threshold = tl.load(state + group * FIELDS + PREFIX)
    prefix = tl.load(hash_state + group * FIELDS + PREFIX)
    if tl.load(hash_state + group * FIELDS + ENDED) != 0:
        end = start
    found = tl.zeros([DIGITS], tl.int32)
    others = 0
    for first in range(start, end, BLOCK):
        position = first + tl.arange(0, BLOCK)
        matching = position < end
        if KEYED:
            key = keys_at(
                row, position, matching, low,
                FLOAT, RAW, KEY, WIDTH, KIND, MASKED, STRIDED, REVERSED,
            )  # fmt: skip
            matching = matching & (key == threshold.to(key.dtype))
        hashes = hashes_at(row, position, matching, start_hash, positions, PLACED, REVERSED)
        if SHIFT + 8 < 64:
            prefixes = hashes >> (SHIFT + 8)
            matching = matching & (prefixes == prefix.to(tl.uint64, bitcast=True))
        digit = tl.where(matching, (hashes >> SHIFT) & 255, 0).to(tl.int32)
        found += tl.histogram(digit, DIGITS)
        others += BLOCK - tl.sum(matching.to(tl.int32))
    digits = tl.arange(0, DIGITS)
    found = tl.where(digits == 0, found - others, found)
    tl.atomic_add(counts + group * DIGITS + digits, found.to(tl.int64), mask=found > 0)


@triton.jit
def write_selected(
    table, chunks, chunk_size, dtype, low, state, hash_state, before, out, start_hash, positions,
    WRITES: tl.constexpr, HASHED: tl.constexpr, KEYED: tl.constexpr, PLACED: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT: tl.constexpr, RAW: tl.constexpr, KEY: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, MASKED: tl.constexpr, STRIDED: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Write the positions of the selected samples to `out`; count them first, without `WRITES`.

    `before` has the number of selected samples in the chunks before each chunk, or receives that
    of each chunk.
    """
    row, start, end = chunk_of(table, chunks, chunk_size, dtype)
    group = tl.load(row + GROUP)
    threshold = tl.load(state + group * FIELDS + PREFIX)
    # Without hashes, all keys up to the threshold are selected.
    all_ties = tl.load(state + group * FIELDS + ENDED) != 0
    last_hash = tl.load(hash_state + group * FIELDS + PREFIX).to(tl.uint64, bitcast=True)
    seen = tl.zeros([], tl.int64)
    if WRITES:
        seen += tl.load(before + tl.program_id(0))
    for first in range(start, end, BLOCK):
        position = first + tl.arange(0, BLOCK)
        valid = position < end
        selected = valid
        if HASHED:
            hashes = hashes_at(row, position, valid, start_hash, positions, PLACED, REVERSED)
            selected = valid & (all_ties | (hashes <= last_hash))
        if KEYED:
            key = keys_at(
                row, position, valid, low,
                FLOAT, RAW, KEY, WIDTH, KIND, MASKED, STRIDED, REVERSED,
            )  # fmt: skip
            least = threshold.to(key.dtype)
            selected = (key < least) | ((key == least) & selected)
        selected = (valid & selected).to(tl.int32)
        if WRITES:
            place = position_in_dataset(row, position, valid, positions, PLACED)
            tl.store(out + seen + tl.cumsum(selected, 0) - 1, place, mask=selected != 0)
        seen += tl.sum(selected)
    if not WRITES:
        tl.store(before + tl.program_id(0), seen, mask=end > start)
