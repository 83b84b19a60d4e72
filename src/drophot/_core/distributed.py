"""Gathering of numbers and table rows from all ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def count(group: dist.ProcessGroup | None = None) -> int:
    """The number of ranks in a group, the default one if `None`; 1 without a process group."""
    initialized = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if initialized else 1


def from_rank_0(work: Callable[[], T], num_ranks: int, rank: int) -> T:
    """The result of `work`, which rank 0 does for all ranks. If it fails there, all of them raise.

    Raises:
        RuntimeError: On the other ranks, if it fails on rank 0.
    """
    if num_ranks == 1:
        return work()
    sent: list[tuple[T | None, str]] = [(None, "")]
    failed: Exception | None = None
    if rank == 0:
        try:
            sent = [(work(), "")]
        except Exception as error:  # the other ranks wait for a result
            failed, sent = error, [(None, f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(sent, src=0)
    if failed is not None:
        raise failed
    result, why = sent[0]
    if why:
        raise RuntimeError(f"Rank 0 could not select samples: {why}")
    return cast("T", result)


def gather_numbers(
    mine: Sequence[int], group: dist.ProcessGroup | None, device: torch.device
) -> Tensor:
    """Gather the same number of integers from every rank: int64 on the CPU, one row per rank.

    `device` is where the tensors of this rank are.
    """
    return torch.stack(_gather(torch.tensor(mine), group, device)).cpu()


def gather_tables(
    mine: Mapping[str, Tensor],
    lengths: Sequence[int],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """Gather the rows of every rank in one collective call, bit by bit.

    Args:
        mine: The columns of this rank, with the same number of rows each, of any dtype.
        lengths: The number of rows of each rank.
        group: The process group.
        device: Where the columns are, and where those of the other ranks are wanted.

    Yields:
        The columns of each rank, in the order of the ranks.
    """
    longest, words = max(lengths), []
    for column in mine.values():
        padded = column.new_zeros(longest, *column.shape[1:])
        padded[: len(column)] = column
        words.append(padded.view(longest, -1).view(torch.uint8))
    widths = [part.shape[1] for part in words]
    gathered = _gather(torch.cat(words, dim=1), group, device)
    for length, packed in zip(lengths, gathered, strict=True):
        parts = packed[:length].to(device).split(widths, dim=1)
        yield {  # copied, because numbers must be aligned to their size
            name: part
            .clone(memory_format=torch.contiguous_format)
            .view(-1)
            .view(column.dtype)
            .view(length, *column.shape[1:])
            for (name, column), part in zip(mine.items(), parts, strict=True)
        }


def _gather(mine: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> list[Tensor]:
    backend = dist.get_backend(group)
    if backend == "nccl" and device.type == "cpu":
        device = torch.device("cuda", torch.cuda.current_device())
    elif backend in ("gloo", "mpi"):
        device = torch.device("cpu")
    mine = mine.to(device).contiguous()
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    return gathered
