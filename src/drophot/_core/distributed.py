"""What the ranks of a process group tell each other: a few numbers, and the rows of a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def count(group: dist.ProcessGroup | None = None) -> int:
    """How many ranks there are: 1 if nobody has set up a process group.

    Args:
        group: The group meant, the default one if `None`.

    Returns:
        Its size.
    """
    together = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if together else 1


def numbers(mine: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Everybody's numbers.

    Args:
        mine: This rank's, as many as every other rank's.
        group: The ranks that take part.
        device: Where this rank's tensors are.

    Returns:
        int64 on the CPU, a row for each rank.
    """
    return torch.stack(_gather(torch.tensor(mine), group, device)).cpu()


def tables(
    mine: Mapping[str, Tensor],
    lengths: Sequence[int],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """Everybody's rows, in one gather: bytes as they are, so that no number is rounded.

    Args:
        mine: This rank's columns, each of as many rows as it has, of any dtype.
        lengths: How many rows each rank has.
        group: The ranks that take part.
        device: Where the columns are, and where those of the others are wanted.

    Yields:
        The columns of each rank, in the order of the ranks.
    """
    longest, words = max(lengths), []
    for column in mine.values():
        padded = column.new_zeros(longest, *column.shape[1:])
        padded[: len(column)] = column
        words.append(padded.view(longest, -1).view(torch.uint8))
    widths = [part.shape[1] for part in words]
    everybody = _gather(torch.cat(words, dim=1), group, device)
    for length, packed in zip(lengths, everybody, strict=True):
        parts = packed[:length].to(device).split(widths, dim=1)
        yield {  # copies, because a number must start at a multiple of its size
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
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, mine, group=group)
    return everybody
