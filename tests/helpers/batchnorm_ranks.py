"""What a rank does in `tests/prune/test_batchnorm.py`, one of two.

Models and batches are functions, so that the test can show all batches to one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from drophot.prune import magnitude_prune, recalibrate_bn, repair

torch.set_num_threads(1)


def batches(*counts: int) -> Callable[[int], list[Tensor]]:
    """So many batches on each rank, of sizes and values that differ."""

    def of(rank: int) -> list[Tensor]:
        noise = torch.Generator().manual_seed(rank)
        return [
            torch.randn(5 + 3 * rank + n, 4, generator=noise) * (1 + rank) + rank
            for n in range(counts[rank])
        ]

    return of


BATCHES = {"even": batches(3, 3), "uneven": batches(2, 5), "none on one": batches(0, 2)}
MODELS = ["plain", "synchronised", "bfloat16", "half of it"]


class Sometimes(nn.Module):
    """A layer that sees large batches only, and so those of one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.some = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.some(self.always(x)) if len(x) > 7 else self.always(x)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "half of it":
        return Sometimes()
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3)
    )
    if name == "synchronised":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.Sequential(Cast(), model.bfloat16()) if name == "bfloat16" else model


def dense_and_pruned() -> tuple[nn.Module, nn.Module]:
    dense, model = network("plain"), network("plain")
    magnitude_prune(model, 0.5)
    return dense, model


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


def error(work: Callable[[], Any]) -> str:
    try:
        work()
    except (ValueError, OSError) as found:
        return f"{type(found).__name__}: {found}"
    return "none"


def stops() -> Iterator[Tensor]:
    yield torch.ones(4, 4)
    raise OSError("the disk is gone")


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for name in MODELS:
        for case, of in BATCHES.items():
            model = network(name)
            wrapped = DistributedDataParallel(model) if name == "plain" else model
            wrapped = torch.compile(wrapped, backend="eager") if case == "uneven" else wrapped
            recalibrate_bn(wrapped, of(rank))
            found[f"{name}, {case}"] = model.state_dict()
    model = network("plain")
    found["one fails"] = error(
        lambda: recalibrate_bn(model, stops() if rank else BATCHES["even"](0))
    )
    found["none"] = error(lambda: recalibrate_bn(model, []))
    found["left"] = model[4].running_mean.tolist()
    other = nn.BatchNorm1d(4) if rank else model
    found["other models"] = error(lambda: recalibrate_bn(other, BATCHES["even"](rank)))
    groups = [dist.new_group([n]) for n in range(2)]
    layer = nn.BatchNorm1d(1)
    recalibrate_bn(layer, [torch.tensor([[rank + 0.0], [rank + 1.0]])], group=groups[rank])
    found["alone"] = layer.running_mean.tolist()
    found["not a member"] = error(
        lambda: recalibrate_bn(layer, [torch.ones(2, 1)], group=groups[1 - rank])
    )
    for case in ("uneven", "none on one"):
        dense, model = dense_and_pruned()
        repair(DistributedDataParallel(model), dense, BATCHES[case](rank))
        found[f"repaired, {case}"] = model.state_dict()
    dense, model = dense_and_pruned()
    found["repair fails"] = error(
        lambda: repair(model, dense, stops() if rank else BATCHES["even"](0))
    )
    repair(model, dense, BATCHES["even"](rank), group=groups[rank])
    found["repaired alone"] = model.state_dict()
    found["repair by no member"] = error(
        lambda: repair(model, dense, BATCHES["even"](rank), group=groups[1 - rank])
    )
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()  # nobody leaves while another still listens
    dist.destroy_process_group()
