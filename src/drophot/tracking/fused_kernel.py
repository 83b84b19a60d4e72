"""The Triton kernel of `fused_update`, which presents a whole batch in one launch.

Each program takes one row of the batch. The rows of a sample that occurs more than once must be
presented in order, so the program of its first row handles all of them and the programs of the
others return at once. A sample therefore belongs to one program, and programs need no locks.

The running means rely on the exact rounding of each operation (see `running_means`). The kernel is
compiled without fused multiply-adds, divides by `div_rn`, and keeps the order of the plain code.
"""

# No `from __future__ import annotations` here: Triton reads the annotations of a kernel.
# pyright: reportMissingImports=false, reportCallIssue=false, reportInvalidTypeForm=false
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from drophot.tracking import deferred_errors, packed_history

_LAST = tl.constexpr(packed_history.LAST)
_SEEN = tl.constexpr(packed_history.SEEN)
_FIRST = tl.constexpr(packed_history.FIRST)
_EVENT = tl.constexpr(packed_history.EVENT)
_CORRECT = tl.constexpr(packed_history.CORRECT)
_PRESENTED = tl.constexpr(packed_history.PRESENTED)
_PRESENTED_BITS = tl.constexpr(packed_history.PRESENTED_BITS)
_NO_CLASS = tl.constexpr(deferred_errors.NO_CLASS)
_HALF = tl.constexpr(deferred_errors.HALF)
_MAX_SAMPLES = tl.constexpr(deferred_errors.MAX_SAMPLES)

_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_ROUNDING = tl.constexpr(1.5 * 2.0**23)  # adding and subtracting it rounds a float32 half to even

# A value of an argument must not lead to another compilation, which could happen inside a capture.
_SIZES = ["num_samples", "num_rows", "num_classes"]
_STRIDES = ["index_stride", "row_stride", "class_stride", "targets_stride"]
_SQUARES = ["margin_squares", "error_squares", "confidence_squares", "loss_squares"]
_TENSORS = ["index", "logits", "targets", "history", "first_targets", "fault", "means", "tails"]


def launch(
    index: Tensor,
    logits: Tensor,
    targets: Tensor,
    history: Tensor,
    first_targets: Tensor,
    fault: Tensor,
    statistics: list[Tensor],
    values: int,
    squares: int,
    *,
    index_block: int = 256,
    class_block: int = 2048,
) -> None:
    """Present a batch of at least one row. `fused_update.Layout` explains the last three arguments.

    Each program compares `index_block` indices and reads at most `class_block` logits at a time.
    """
    means, tails, *rest = statistics or (None, None)
    columns = iter(rest)
    sums = [next(columns) if squares >> value & 1 else None for value in range(4)]
    num_rows, num_classes = logits.shape
    block = min(max(triton.next_power_of_2(num_classes), 32), class_block)
    _present[num_rows,](
        index,
        logits,
        targets,
        history,
        first_targets,
        fault,
        means,
        tails,
        *sums,
        len(history),
        num_rows,
        num_classes,
        index.stride(0),
        *logits.stride(),
        targets.stride(0),
        dtype=tl.float64 if logits.dtype == torch.float64 else tl.float32,
        value_bits=values,
        square_bits=squares,
        class_block=block,
        index_block=index_block,
        num_warps=max(1, block // 256),
        enable_fp_fusion=False,
    )


@triton.jit(
    do_not_specialize=[*_SIZES, *_STRIDES],
    do_not_specialize_on_alignment=[*_TENSORS, *_SQUARES],
)
def _present(
    index,
    logits,
    targets,
    history,
    first_targets,
    fault,
    means,
    tails,
    margin_squares,
    error_squares,
    confidence_squares,
    loss_squares,
    num_samples: tl.int64,
    num_rows: tl.int32,
    num_classes: tl.int32,
    index_stride: tl.int64,
    row_stride: tl.int64,
    class_stride: tl.int64,
    targets_stride: tl.int64,
    dtype: tl.constexpr,  # the dtype that holds the logits without rounding
    value_bits: tl.constexpr,  # a bit for each built-in value that has a column in `means`
    square_bits: tl.constexpr,  # a bit for each built-in value that has sums of squares
    class_block: tl.constexpr,
    index_block: tl.constexpr,
):
    row = tl.program_id(0)
    position = _position(tl.load(index + row * index_stride), num_samples)
    first = _next_row(index, index_stride, num_rows, num_samples, position, -1, index_block)
    if first < row:
        return

    before = tl.load(history + position)
    first_target = tl.load(first_targets + position)
    bits = before & (_SEEN | _LAST)
    added = before * 0
    known = first_target
    lanes = tl.arange(0, 4)  # the four values of `statistics.built_in_values`
    total = lanes * 0.0
    size = 0.0
    latest = lanes * 0.0
    while row < num_rows:
        sample = tl.load(index + row * index_stride).to(tl.int64)
        target = tl.load(targets + row * targets_stride).to(tl.int64)
        line = logits + row * row_stride
        correct, own, nearest, has_nan = _find_largest(
            line, class_stride, num_classes, target, dtype, class_block
        )

        # -1 is `NO_TARGET`. As in `record.record` and `deferred_errors.find_fault`.
        short = target.to(tl.int32)
        known = tl.where(first_target == -1, short, first_target)
        is_class = (target >= 0) & (target < num_classes)
        wrong = (sample != position) | (known != short)
        value = tl.minimum(tl.maximum(target, -_HALF), _HALF - 1) + _HALF
        code = _NO_CLASS - value - tl.minimum(tl.maximum(sample, 0), _MAX_SAMPLES - 1) * 2 * _HALF
        code = tl.where(is_class, sample, code)
        tl.atomic_min(fault, code, mask=wrong | (is_class == 0))

        # As the table of `packed_history.steps`.
        was_correct = bits & _LAST
        unseen = (bits & _SEEN) == 0
        added += _PRESENTED + correct * (_CORRECT + _LAST) - was_correct * _LAST
        added += was_correct * (1 - correct) * _EVENT
        added += tl.where(unseen, _SEEN + correct * _FIRST, 0)
        bits = _SEEN + correct * _LAST

        if value_bits:
            latest = _values(
                line, class_stride, num_classes, target, own, nearest, has_nan, class_block
            )
            total += latest
            size += 1.0
        row = _next_row(index, index_stride, num_rows, num_samples, position, row, index_block)

    after = before + tl.where(before < 0, 0, added)  # an overflow stays
    tl.store(history + position, after)
    tl.store(first_targets + position, known)

    if value_bits:
        # As in `RunningMeans.add`: the mean of the sample's rows, and their squared distances.
        row_mean = tl.div_rn(total, lanes * 0.0 + size)
        row_squares = (latest - row_mean) * (latest - row_mean)
        if square_bits:  # noqa: SIM102 - known when the kernel is compiled
            if size > 1:
                row_squares = lanes * 0.0
                row = first
                while row < num_rows:
                    target = tl.load(targets + row * targets_stride).to(tl.int64)
                    line = logits + row * row_stride
                    _, own, nearest, has_nan = _find_largest(
                        line, class_stride, num_classes, target, dtype, class_block
                    )
                    latest = _values(
                        line, class_stride, num_classes, target, own, nearest, has_nan, class_block
                    )
                    row_squares += (latest - row_mean) * (latest - row_mean)
                    row = _next_row(
                        index, index_stride, num_rows, num_samples, position, row, index_block
                    )
        size_before = (after >> _PRESENTED_BITS).to(tl.float32) - size
        share = tl.div_rn(size, size_before + size)
        apart = _pool_means(means, tails, position, row_mean, size_before, share, value_bits)
        more = row_squares + apart * apart * size_before * share
        if square_bits & 1:
            _add_squares(margin_squares + position, more, 0)
        if square_bits & 2:
            _add_squares(error_squares + position, more, 1)
        if square_bits & 4:
            _add_squares(confidence_squares + position, more, 2)
        if square_bits & 8:
            _add_squares(loss_squares + position, more, 3)


@triton.jit
def _pool_means(means, tails, position, row_mean, size_before, share, value_bits: tl.constexpr):
    """Add a mean to that of a sample, as `RunningMeans._pool` does. Returns how far they differ."""
    lanes = tl.arange(0, 4)
    kept = ((value_bits >> lanes) & 1) != 0
    column = tl.where(lanes > 0, value_bits & 1, 0) + tl.where(lanes > 1, (value_bits >> 1) & 1, 0)
    column += tl.where(lanes > 2, (value_bits >> 2) & 1, 0)
    num_values: tl.constexpr = (
        (value_bits & 1)
        + ((value_bits >> 1) & 1)
        + ((value_bits >> 2) & 1)
        + ((value_bits >> 3) & 1)
    )
    cell = position * num_values + column
    mean = tl.load(means + cell, mask=kept, other=0.0)
    packed = tl.load(tails + cell, mask=kept, other=0).to(tl.float32)
    tail = tl.where(packed != 0, packed * (tl.abs(mean) * 2.0**-31), 0.0)

    apart = (row_mean - mean) + (0.0 - tail)
    step = apart * share
    rough = mean + step
    lost = rough - mean
    lost = (mean - (rough - lost)) + (step - lost)
    tail += lost
    moved = rough + tail
    tail -= moved - rough
    beyond = tl.where(size_before > 0, mean + row_mean, row_mean)
    moved = tl.where(tl.abs(beyond) < float("inf"), moved, beyond)
    tl.store(means + cell, moved, mask=kept)

    # As `running_means._packed`. The quotient is not finite where the mean is 0 or infinite.
    digits = tl.div_rn(tail, tl.abs(moved) * 2.0**-31)
    digits = tl.where(tl.abs(digits) < float("inf"), digits, 0.0)
    digits = tl.minimum(tl.maximum(digits, -127.0), 127.0)
    digits = (digits + _ROUNDING) - _ROUNDING
    tl.store(tails + cell, digits.to(tl.int8), mask=kept)
    return apart


@triton.jit
def _position(index, num_samples):
    """Indices clamped to the samples."""
    return tl.minimum(tl.maximum(index.to(tl.int64), 0), num_samples - 1)


@triton.jit
def _next_row(index, stride, num_rows, num_samples, position, row, index_block: tl.constexpr):
    """The next row after `row` that presents the sample at `position`, or `num_rows`."""
    found = num_rows
    start = row + 1
    while (start < num_rows) & (found == num_rows):
        rows = start + tl.arange(0, index_block)
        inside = rows < num_rows
        others = _position(tl.load(index + rows * stride, mask=inside, other=0), num_samples)
        found = tl.min(tl.where(inside & (others == position), rows, num_rows), 0)
        start += index_block
    return found


@triton.jit
def _find_largest(
    line, stride, num_classes, target, dtype: tl.constexpr, class_block: tl.constexpr
):
    """Whether a row is correct, the logit of its target, the largest other one, and if one is NaN.

    A row is correct if the first of its largest logits is that of the target, as in `is_correct`.
    """
    label = tl.minimum(tl.maximum(target, 0), num_classes - 1)
    own = tl.load(line + label * stride).to(dtype)
    nearest = tl.full((class_block,), float("-inf"), tl.float32)
    flaw = tl.zeros((class_block,), tl.int32)  # 1 if a logit takes precedence over `own`, 2 if NaN
    for start in range(0, num_classes, class_block):
        classes = start + tl.arange(0, class_block)
        logits = tl.load(
            line + classes * stride, mask=classes < num_classes, other=float("-inf")
        ).to(dtype)
        precedes = (logits > own) | ((logits == own) & (classes < label))
        flaw = tl.maximum(flaw, tl.where(logits != logits, 2, tl.where(precedes, 1, 0)))
        others = tl.where(classes != label, logits.to(tl.float32), float("-inf"))
        nearest = tl.maximum(nearest, others)
    worst = tl.max(flaw, 0)
    correct = (worst == 0) & (own > float("-inf")) & (target == label)
    return correct.to(tl.int64), own.to(tl.float32), tl.max(nearest, 0), worst == 2


@triton.jit
def _values(line, stride, num_classes, target, own, nearest, has_nan, class_block: tl.constexpr):
    """The four values of `statistics.built_in_values`."""
    label = tl.minimum(tl.maximum(target, 0), num_classes - 1)
    margin = own - nearest
    largest = tl.minimum(tl.maximum(own, nearest), _LARGEST)
    own = (tl.minimum(own, _LARGEST) - largest).to(tl.float64)
    total = tl.zeros((class_block,), tl.float32)
    squares = tl.zeros((class_block,), tl.float32)
    for start in range(0, num_classes, class_block):
        classes = start + tl.arange(0, class_block)
        others = (classes < num_classes) & (classes != label)
        logits = tl.load(line + classes * stride, mask=others, other=0.0).to(tl.float32)
        powers = tl.where(others, _exp(tl.minimum(logits, _LARGEST) - largest), 0.0)
        total += powers
        squares += powers * powers
    # One number each from here on: float64 is cheap, and 1 - p keeps the digits of a small `rest`.
    rest = tl.sum(total, 0).to(tl.float64)
    power = tl.exp(own)
    beyond = rest + (power - 1.0)  # if `own` is not 0, `rest` is at least 1
    error = tl.sqrt(tl.sum(squares, 0).to(tl.float64) + rest * rest) / (beyond + 1.0)
    logarithm = tl.where(beyond < 1e-5, beyond - 0.5 * beyond * beyond, tl.log(1.0 + beyond))
    lanes = tl.arange(0, 4)
    values = tl.where(lanes == 2, power / (beyond + 1.0), logarithm - own)
    values = tl.where(lanes == 1, error, values).to(tl.float32)
    values = tl.where(lanes == 0, margin, values)
    undefined = has_nan | (largest == float("-inf"))
    return tl.where(undefined, float("nan"), values)


@triton.jit
def _exp(x):
    """`exp(x)` of float32 numbers of at most 0, with the digits that `tl.exp` lacks for large ones.

    Cody and Waite's reduction: `x` is a multiple of `log(2)`, in two parts, plus a small rest.
    """
    x = tl.maximum(x, -104.0)  # below, the result is 0
    power = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - power * 0.693359375) + power * 2.12194440e-4
    return tl.exp(rest) * tl.exp2(power)


@triton.jit
def _add_squares(squares, more, lane: tl.constexpr):
    """Add one lane of `more` to a sum of squares."""
    lanes = tl.arange(0, 4)
    tl.store(squares, tl.load(squares) + tl.sum(tl.where(lanes == lane, more, 0.0), 0))
