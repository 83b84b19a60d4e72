"""Triton kernels of `radix_select`: each reads a whole list of tensors in one launch."""

# No `from __future__ import annotations` here: Triton reads the annotations of a kernel.
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

FLOATS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# A table has one row of integers for each tensor, in these columns.
VALUES = tl.constexpr(0)  # address of the values that are ranked
EARLIER = tl.constexpr(1)  # address of the mask of an earlier pruning, or 0
SIZE = tl.constexpr(2)
FIRST_CHUNK = tl.constexpr(3)  # the number of the tensor's first chunk
GROUP = tl.constexpr(4)  # the tensors of one group are ranked together
DTYPE = tl.constexpr(5)  # the number of the dtype; a launch reads the tensors of one dtype
SHAPE = tl.constexpr(6)  # three sizes and three strides, to which all dimensions are reduced
STRIDE = tl.constexpr(9)
WEIGHT = tl.constexpr(12)  # address of the weights that are pruned
MASK = tl.constexpr(13)  # address of the mask that is written
INNER = tl.constexpr(14)  # elements between neighbours along the dimension of an N:M pattern
OFFSET = tl.constexpr(15)  # elements in earlier rows
COLUMNS = tl.constexpr(16)

# A state has one row for each group: the bits of the key found so far, the rank that remains among
# the keys that begin with them, the number of these keys, and whether the search has ended.
PREFIX = tl.constexpr(0)
RANK = tl.constexpr(1)
TIES = tl.constexpr(2)
ENDED = tl.constexpr(3)
FIELDS = tl.constexpr(4)

# How keys are made from values: the bits without the sign, bits in the order of the signed floats,
# or integers less the smallest one.
MAGNITUDE = tl.constexpr(0)
SIGNED = tl.constexpr(1)
INTEGER = tl.constexpr(2)

DIGITS = tl.constexpr(256)  # a key is found by digits of 8 bits


@triton.jit
def chunk_of(table, chunks, chunk_size, dtype):
    """The table's row for the tensor of this program, and the positions that it processes."""
    program = tl.program_id(0)
    row = table + tl.load(chunks + program) * COLUMNS
    start = (program - tl.load(row + FIRST_CHUNK)) * chunk_size
    end = tl.minimum(start + chunk_size, tl.load(row + SIZE))
    return row, start, tl.where(tl.load(row + DTYPE) == dtype, end, start)


@triton.jit
def offsets_of(row, position, STRIDED: tl.constexpr):
    """Where the elements at these positions are, in units of elements."""
    offsets = position
    if STRIDED:
        size1 = tl.load(row + SHAPE + 1)
        size2 = tl.load(row + SHAPE + 2)
        outer = position // size2
        offsets = (outer // size1) * tl.load(row + STRIDE)
        offsets += (outer % size1) * tl.load(row + STRIDE + 1)
        offsets += (position % size2) * tl.load(row + STRIDE + 2)
    return offsets


@triton.jit
def bits_of(address, offsets, valid, FLOAT: tl.constexpr, RAW: tl.constexpr, KEY: tl.constexpr):
    """The bits of floats of one dtype, exactly converted to the dtype `KEY`."""
    bits = tl.load(address.to(tl.pointer_type(RAW)) + offsets, mask=valid, other=0)
    # Triton 3.2 compares a constexpr with a dtype only if the constexpr is on the left.
    if KEY != FLOAT:
        if FLOAT == tl.bfloat16:  # noqa: SIM300
            values = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            values = bits.to(FLOAT, bitcast=True)
        if KEY == tl.float64:  # noqa: SIM300
            bits = values.to(KEY).to(tl.uint64, bitcast=True)
        else:
            bits = values.to(KEY).to(tl.uint32, bitcast=True)
    if bits.dtype == tl.uint16:
        bits = bits.to(tl.uint32)
    return bits


@triton.jit
def key_of(bits, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Unsigned keys in the order of the floats or of their magnitudes, above 0."""
    sign: tl.constexpr = 1 << (WIDTH - 1)
    mask: tl.constexpr = (1 << WIDTH) - 1
    if KIND == MAGNITUDE:
        key = (bits & (sign - 1)) + 1
    else:
        bits = tl.where(bits == sign, 0, bits)  # -0 equals 0
        key = tl.where(bits >= sign, bits ^ mask, bits | sign)
    return key.to(bits.dtype)


@triton.jit
def keys_at(
    row,
    position,
    valid,
    low,
    FLOAT: tl.constexpr,
    RAW: tl.constexpr,
    KEY: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDED: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """The keys at these positions; 0 for a weight that an earlier mask removed."""
    address = tl.load(row + VALUES)
    offsets = offsets_of(row, position, STRIDED)
    if KIND == INTEGER:
        integers = tl.load(address.to(tl.pointer_type(RAW)) + offsets, mask=valid, other=0)
        key = (integers.to(tl.int64) - tl.load(low)).to(tl.uint64, bitcast=True)
        if WIDTH <= 32:
            key = key.to(tl.uint32)
    else:
        bits = bits_of(address, offsets, valid, FLOAT, RAW, KEY)
        key = key_of(bits, WIDTH, KIND)
        if MASKED:
            removed = removed_earlier(row, position, valid)
            sign: tl.constexpr = 1 << (WIDTH - 1)
            key = tl.where(removed & ((bits & (sign - 1)) == 0), 0, key).to(bits.dtype)
    if REVERSED:
        mask: tl.constexpr = (1 << WIDTH) - 1
        key = (mask - key).to(key.dtype)
    return key


@triton.jit
def removed_earlier(row, position, valid):
    """Whether the mask of an earlier pruning, if there is one, removed these weights."""
    address = tl.load(row + EARLIER)
    masked = valid & (address != 0)
    return tl.load(address.to(tl.pointer_type(tl.uint8)) + position, mask=masked, other=1) == 0


@triton.jit
def count_digits(
    table, chunks, chunk_size, dtype, low, state, counts,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
    FLOAT: tl.constexpr, RAW: tl.constexpr, KEY: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, MASKED: tl.constexpr, STRIDED: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Count by group how many of the keys that begin with its prefix have each next digit."""
    row, start, end = chunk_of(table, chunks, chunk_size, dtype)
    group = tl.load(row + GROUP)
    prefix = tl.load(state + group * FIELDS + PREFIX)
    if tl.load(state + group * FIELDS + ENDED) != 0:
        end = start
    found = tl.zeros([DIGITS], tl.int32)
    others = 0
    for first in range(start, end, BLOCK):
        position = first + tl.arange(0, BLOCK)
        valid = position < end
        key = keys_at(
            row, position, valid, low,
            FLOAT, RAW, KEY, WIDTH, KIND, MASKED, STRIDED, REVERSED,
        )  # fmt: skip
        if SHIFT + 8 < WIDTH:
            matching = valid & ((key >> (SHIFT + 8)) == prefix.to(key.dtype))
        else:
            matching = valid
        digit = tl.where(matching, (key >> SHIFT) & 255, 0).to(tl.int32)
        found += tl.histogram(digit, DIGITS)
        others += BLOCK - tl.sum(matching.to(tl.int32))
    digits = tl.arange(0, DIGITS)
    found = tl.where(digits == 0, found - others, found)
    tl.atomic_add(counts + group * DIGITS + digits, found.to(tl.int64), mask=found > 0)


@triton.jit
def choose_digit(state, counts, SHIFT: tl.constexpr, ENDS_EARLY: tl.constexpr):
    """Append the digit at the rank of each group to its prefix, and clear the counts.

    `ENDS_EARLY` ends a search where all keys of the chosen digit are within the rank: the other
    bits of the prefix are set, so that it is the largest of these keys or above it.
    """
    row = state + tl.program_id(0) * FIELDS
    digits = tl.arange(0, DIGITS)
    counted = counts + tl.program_id(0) * DIGITS + digits
    if tl.load(row + ENDED) == 0:
        found = tl.load(counted)
        reached = tl.cumsum(found, 0)
        rank = tl.load(row + RANK)
        below = reached < tl.maximum(rank, 1)
        digit = tl.minimum(tl.sum(below.to(tl.int64)), DIGITS - 1)
        ties = tl.sum(tl.where(digits == digit, found, 0))
        rank -= tl.sum(tl.where(below, found, 0))
        prefix = (tl.load(row + PREFIX) << 8) | digit
        if ENDS_EARLY:
            ended = rank == ties
            prefix = tl.where(ended, (prefix << SHIFT) | ((1 << SHIFT) - 1), prefix)
            tl.store(row + ENDED, ended.to(tl.int64))
        tl.store(row + PREFIX, prefix)
        tl.store(row + RANK, tl.maximum(rank, 0))
        tl.store(row + TIES, ties)
        tl.store(counted, tl.zeros([DIGITS], tl.int64))


@triton.jit
def ties_removed(found):
    """How many of the keys at the threshold are removed: all that an earlier mask removed."""
    ties = tl.load(found + TIES)
    return tl.where(tl.load(found + PREFIX) == 0, ties, tl.load(found + RANK))


@triton.jit
def count_below(
    table, chunks, chunk_size, dtype, low, state, below,
    ONLY_SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    FLOAT: tl.constexpr, RAW: tl.constexpr, KEY: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, MASKED: tl.constexpr, STRIDED: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Count by chunk the keys below the threshold of the group and those equal to it.

    `ONLY_SPLIT` counts only in groups of which some but not all of the equal keys are removed.
    """
    row, start, end = chunk_of(table, chunks, chunk_size, dtype)
    found = state + tl.load(row + GROUP) * FIELDS
    threshold = tl.load(found + PREFIX)
    if ONLY_SPLIT:
        end = tl.where(ties_removed(found) % tl.load(found + TIES) == 0, start, end)
    less = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        position = first + tl.arange(0, BLOCK)
        valid = position < end
        key = keys_at(
            row, position, valid, low,
            FLOAT, RAW, KEY, WIDTH, KIND, MASKED, STRIDED, REVERSED,
        )  # fmt: skip
        less += (valid & (key < threshold.to(key.dtype))).to(tl.int32)
        equal += (valid & (key == threshold.to(key.dtype))).to(tl.int32)
    counted = below + tl.program_id(0) * 2
    tl.store(counted, tl.sum(less).to(tl.int64), mask=end > start)
    tl.store(counted + 1, tl.sum(equal).to(tl.int64), mask=end > start)
