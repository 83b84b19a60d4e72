"""Exact order statistics on a GPU: radix selection over many tensors in a few launches.

A key is found by digits of 8 bits. One launch counts the next digit of all keys of all tensors, and
another one chooses the digit of each group of tensors, on the device. A float32 takes four pairs of
launches, whatever the number of tensors and their values. The kernels are written in Triton, which
torch brings on Linux. With the environment variable `TRITON_INTERPRET=1` they run on the CPU.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, reduce
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

logger = logging.getLogger("drophot")

_BLOCK = 2048  # elements per step of a program
_LEAST_CHUNK = 1 << 14  # elements per program, at least
_MOST_CHUNKS = 1 << 14
_LEAST_CAPABILITY = (7, 0)  # for Triton


class DTypes(NamedTuple):
    """The dtypes that one launch reads."""

    values: torch.dtype
    weight: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTable:
    """Tensors on one device, divided into chunks, one for each program of a kernel."""

    rows: Tensor
    """For each tensor what `radix_kernels` declares as columns, int64."""
    chunks: Tensor
    """The tensor that each chunk belongs to, int64. The chunks of a tensor are consecutive."""
    chunk_size: int
    """The number of elements of a chunk, except for the last one of each tensor."""
    num_groups: int
    dtypes: Sequence[DTypes]
    masked: bool
    """Whether any tensor has the mask of an earlier pruning."""
    strided: bool
    """Whether any tensor is not contiguous."""
    weight_strided: bool
    first_chunks: Tensor
    """The first chunk of each group, int64, on the device."""
    held: Sequence[Tensor]
    """Tensors whose addresses are in the table."""

    def by_tensor(self, of_chunks: Tensor) -> Tensor:
        """The sums over the chunks of each tensor."""
        sums = of_chunks.new_zeros(len(self.rows), *of_chunks.shape[1:])
        return sums.index_add_(0, self.chunks, of_chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """How unsigned keys are made from the values of a table."""

    kind: str
    """The name of a constant of `radix_kernels`."""
    width: int
    """The number of bits of the keys."""
    dtype: torch.dtype | None = None
    """The float in which values of several dtypes are compared."""
    largest: bool = False
    """Reverse the order, so that the largest values have the smallest keys."""
    low: Tensor | None = None
    """The smallest integer, on the device."""


def has_kernels(tensors: Iterable[Tensor]) -> bool:
    """Whether the tensors are on one device for which Triton compiles kernels."""
    devices = set()
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return False  # a subclass may have its values elsewhere
        devices.add(tensor.device)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if len(devices) != 1:
        return False
    device = devices.pop()
    return device.type == ("cpu" if interpreted else "cuda") and _works_on(device)


@cache
def _works_on(device: torch.device) -> bool:
    """Whether Triton compiles correct kernels here. It needs a C compiler and a recent GPU."""
    if find_spec("triton") is None:
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return False  # Triton may end the process there, instead of raising an error
    try:
        if _finds_a_threshold(device):
            return True
        reason = "its kernels count wrongly"
    except Exception as error:
        reason = f"it has failed: {error}"
    logger.info("selection and pruning use plain operations instead of Triton, as %s", reason)
    return False


def _finds_a_threshold(device: torch.device) -> bool:
    """Whether the kernels find a known order statistic: the number 5 among 0, 0, 0, 1, 1, 1, ..."""
    each = 3 * _LEAST_CHUNK // 256 + 1  # so that four programs add their counts
    values = torch.arange(256, dtype=torch.uint8).repeat_interleave(each).to(device)
    keys = Keys(kind="INTEGER", width=8, low=torch.zeros((), dtype=torch.int64).to(device))
    rows = find_thresholds(tensor_table([values], [0]), keys, [5 * each + 2]).tolist()
    return rows == [[5, 2, each, 0]]


def kernels(name: str = "drophot._core.radix_kernels") -> Any:
    """A module of kernels; it imports Triton, which takes time and may not be installed."""
    return importlib.import_module(name)


def float_keys(dtypes: Iterable[torch.dtype], *, signed: bool, largest: bool = False) -> Keys:
    """Keys in the order of floats, or of their magnitudes, in the dtype that they promote to."""
    dtype = reduce(torch.promote_types, dtypes)
    kind = "SIGNED" if signed else "MAGNITUDE"
    return Keys(kind=kind, width=8 * dtype.itemsize, dtype=dtype, largest=largest)


def integer_keys(values: Tensor, *, largest: bool) -> Keys:
    """Keys in the order of integers, of as few bits as their range needs."""
    low, high = (bound.long() for bound in values.aminmax())
    span = int(high) - int(low)
    width = max(8, -(-span.bit_length() // 8) * 8)
    return Keys(kind="INTEGER", width=width, largest=largest, low=low)


def tensor_table(
    values: Sequence[Tensor],
    groups: Sequence[int],
    *,
    earlier: Sequence[Tensor | None] = (),
    weights: Sequence[Tensor] = (),
    masks: Sequence[Tensor] = (),
    inner: Sequence[int] = (),
    offsets: Sequence[int] = (),
) -> TensorTable:
    """Make a table of tensors, in the order of their groups.

    Args:
        values: What is ranked, as `addressable` returns it.
        groups: The number of the group of each tensor, from 0, ascending.
        earlier: For each tensor the mask of an earlier pruning, or `None`.
        weights: What is pruned, if not the values themselves.
        masks: Contiguous tensors of booleans that receive the masks.
        inner: For an N:M pattern, the distance of neighbours in each tensor.
        offsets: Where each tensor begins in a larger one.
    """
    count = len(values)
    values = [value.detach() for value in values]
    weights = [weight.detach() for weight in weights] or values
    before = [None if mask is None else mask.contiguous() for mask in earlier or [None] * count]
    pairs = [DTypes(v.dtype, w.dtype) for v, w in zip(values, weights, strict=True)]
    dtypes = list(dict.fromkeys(pairs))
    sizes = [value.numel() for value in values]
    chunk_size = _chunk_size(sum(sizes))
    rows, first = [], 0
    first_chunks: list[int] = []
    for number in range(count):
        if groups[number] == len(first_chunks):
            first_chunks.append(first)
        mask = before[number]
        rows.append((
            values[number].data_ptr(),
            0 if mask is None else mask.data_ptr(),
            sizes[number],
            first,
            groups[number],
            dtypes.index(pairs[number]),
            *_three_dimensions(weights[number]),
            weights[number].data_ptr(),
            masks[number].data_ptr() if masks else 0,
            inner[number] if inner else 0,
            offsets[number] if offsets else 0,
        ))
        first += -(-sizes[number] // chunk_size)
    table = torch.tensor(rows)
    chunks_of = (table[:, 2] + chunk_size - 1) // chunk_size
    chunks = torch.arange(count).repeat_interleave(chunks_of)
    together = torch.cat([table.view(-1), chunks, torch.tensor(first_chunks)])
    together = together.to(values[0].device)
    parts = together.split([table.numel(), len(chunks), len(first_chunks)])
    return TensorTable(
        rows=parts[0].view(table.shape),
        chunks=parts[1],
        chunk_size=chunk_size,
        num_groups=len(first_chunks),
        dtypes=dtypes,
        masked=any(mask is not None for mask in before),
        strided=not all(value.is_contiguous() for value in values),
        weight_strided=not all(weight.is_contiguous() for weight in weights),
        first_chunks=parts[2],
        held=(*values, *(mask for mask in before if mask is not None)),
    )


def addressable(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy of one whose elements the kernels cannot address."""
    return tensor if len(_merged_dimensions(tensor)) <= 3 else tensor.contiguous()


def _three_dimensions(tensor: Tensor) -> tuple[int, ...]:
    """Three sizes and three strides that address the elements of a tensor in their order."""
    dimensions = _merged_dimensions(tensor)
    dimensions = [(1, 0)] * (3 - len(dimensions)) + dimensions
    return (*(size for size, _ in dimensions), *(stride for _, stride in dimensions))


def _merged_dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    """The sizes and strides of a tensor, with neighbouring dimensions merged where possible."""
    if tensor.is_contiguous():
        return [(tensor.numel(), 1)]
    found: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            size *= found.pop()[0]
        found.append((size, stride))
    return found


def _chunk_size(total: int) -> int:
    size = max(_LEAST_CHUNK, -(-total // _MOST_CHUNKS))
    return -(-size // _BLOCK) * _BLOCK


def find_thresholds(
    table: TensorTable, keys: Keys, ranks: Sequence[int], *, ends_early: bool = False
) -> Tensor:
    """The key at the rank (from 1) of each group, as rows of a state: see `radix_kernels`.

    `ends_early` allows a larger key up to which there are as many keys.
    """
    device = table.rows.device
    state = torch.tensor([[0, rank, 0, 0] for rank in ranks]).to(device)
    counts = torch.zeros(table.num_groups, 256, dtype=torch.int64, device=device)
    module = kernels()
    for shift in range(keys.width - 8, -1, -8):
        launch_keyed(module.count_digits, table, keys, state, counts, SHIFT=shift)
        choose_digit(state, counts, shift, ends_early=ends_early)
    return state


def choose_digit(state: Tensor, counts: Tensor, shift: int, *, ends_early: bool) -> None:
    with on_device(state):
        kernels().choose_digit[(len(state),)](state, counts, SHIFT=shift, ENDS_EARLY=ends_early)


def count_below(
    table: TensorTable, keys: Keys, state: Tensor, *, only_split: bool = False
) -> Tensor:
    """By chunk, how many keys are below the threshold and how many equal it, int64."""
    below = torch.zeros(len(table.chunks), 2, dtype=torch.int64, device=state.device)
    launch_keyed(kernels().count_below, table, keys, state, below, ONLY_SPLIT=only_split)
    return below


def launch_keyed(
    kernel: Any,
    table: TensorTable,
    keys: Keys,
    *arguments: Any,
    prunes: bool = False,
    **constants: Any,
) -> None:
    """Run a kernel that reads keys on all chunks of a table."""

    def constants_of(dtypes: DTypes) -> dict[str, Any]:
        found = key_constants(table, dtypes.values, keys)
        return found | weight_constants(table, dtypes) if prunes else found

    low = table.chunks if keys.low is None else keys.low  # an address that is not read
    launch(kernel, table, low, *arguments, constants_of=constants_of, **constants)


def launch(
    kernel: Any,
    table: TensorTable,
    *arguments: Any,
    constants_of: Callable[[DTypes], Mapping[str, Any]],
    **constants: Any,
) -> None:
    """Run a kernel on all chunks of a table, once for each combination of dtypes."""
    if not len(table.chunks):
        return
    with on_device(table.rows):
        for number, dtypes in enumerate(table.dtypes):
            kernel[(len(table.chunks),)](
                table.rows,
                table.chunks,
                table.chunk_size,
                number,
                *arguments,
                **constants,
                **constants_of(dtypes),
                BLOCK=_BLOCK,
            )


def key_constants(table: TensorTable, dtype: torch.dtype, keys: Keys) -> dict[str, Any]:
    """The constants by which a kernel reads keys from values of a dtype."""
    module = kernels()
    own = module.FLOATS.get(dtype)
    return {
        "FLOAT": own,
        "RAW": raw_type(dtype),
        "KEY": module.FLOATS.get(keys.dtype),
        "WIDTH": keys.width,
        "KIND": getattr(module, keys.kind).value,
        "MASKED": table.masked,
        "STRIDED": table.strided,
        "REVERSED": keys.largest,
    }


def weight_constants(table: TensorTable, dtypes: DTypes) -> dict[str, Any]:
    """The constants by which a kernel writes weights."""
    return {"WEIGHT_RAW": raw_type(dtypes.weight), "WEIGHT_STRIDED": table.weight_strided}


def raw_type(dtype: torch.dtype) -> Any:
    """The type of integers that a kernel reads: the bits of floats, or the integers themselves."""
    name = f"uint{8 * dtype.itemsize}" if dtype.is_floating_point else str(dtype).split(".")[1]
    return getattr(kernels().tl, name)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of a tensor the current one, on which kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
