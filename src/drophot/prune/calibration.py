"""Runs a model on batches of a loader, and adds up over ranks what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from drophot._core import distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Keys of a batch that are not inputs of the model.
_NOT_INPUTS = frozenset(["labels", "label", "label_ids", "targets", "target", "index"])


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel, DataParallel and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original  # torch.compile: this pass is eager
        else:
            return model


def inputs_of(batch: Any, model: nn.Module) -> Tensor:
    """The inputs in a batch of a loader."""
    first = batch
    if isinstance(batch, Mapping):
        named = getattr(model, "main_input_name", None)
        if isinstance(named, str) and named in batch:
            first = batch[named]
        else:
            first = next((v for name, v in batch.items() if name not in _NOT_INPUTS), None)
    elif isinstance(batch, tuple | list):
        first = batch[0] if batch else None
    if not isinstance(first, Tensor):
        keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise TypeError(
            f"`loader` must yield batches with a tensor of inputs first, got "
            f"{type(first).__name__} in a batch of type {type(batch).__name__}{keys}. Wrap the "
            f"loader in a generator that yields the inputs."
        )
    return first


def merged(
    caller: str,
    kind: str,
    channels: Mapping[str, int],
    mine: Mapping[str, Tensor],
    per_channel: int,
    failure: Exception | None,
    group: ProcessGroup | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """The sums over all ranks of a float64 row for each layer, with identical bits on each rank.

    Args:
        caller: The public function, for errors.
        kind: What the layers are, for errors.
        channels: The number of channels of each layer.
        mine: The rows of this rank, each with `per_channel` numbers per channel and two more.
        per_channel: Numbers per channel.
        failure: The error of this rank, which is raised after the others know of it.
        group: The ranks.
        device: The device of the model.
    """
    widths = list(channels.values())
    shape = [len(widths), sum(widths), sum(i * width for i, width in enumerate(widths, 1))]
    table = distributed.gather_numbers([failure is not None, *shape], group, device)
    if failure is not None:
        raise failure
    if failed := table[:, 0].nonzero()[:, 0].tolist():
        raise ValueError(
            f"`{caller}` failed on ranks {failed} (see the error raised there). Nothing was merged."
        )
    if len(table.unique(dim=0)) > 1:
        raise ValueError(
            f"`model` must have the same {kind} layers on every rank, got "
            f"{table[:, 1:3].tolist()} as [layers, channels] of each rank."
        )
    sizes = [per_channel * width + 2 for width in widths]
    rows = [
        mine[path] if path in mine else torch.zeros(size, dtype=torch.float64, device="cpu")
        for path, size in zip(channels, sizes, strict=True)
    ]
    packed = torch.cat(rows)[None]
    total = torch.zeros_like(packed[0])
    cpu = packed.device
    for columns in distributed.gather_tables({"sums": packed}, [1] * len(table), group, cpu):
        total += columns["sums"][0]  # in the order of the ranks, so that all get equal bits
    return dict(zip(channels, total.split(sizes), strict=True))
