"""What a rank does in `tests/tracking/test_sync.py`; `main` gets a folder.

Every case is a function of the rank, so that the test can replay in one process what all saw.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from drophot import DynamicsTracker, ForgettingTracker, IndexedDataset

torch.set_num_threads(1)
C = 3
TRACKERS = {"forgetting": ForgettingTracker, "dynamics": DynamicsTracker}
Batch = tuple[Tensor, Tensor, Tensor]  # index, logits, targets


def batch(index: Any, moment: int) -> Batch:
    """Logits that differ from moment to moment, targets that do not."""
    index = torch.as_tensor(index, dtype=torch.int64)
    noise = torch.Generator().manual_seed(moment)
    return index, 2 * torch.randn(len(index), C, generator=noise), index % C


def sampled(size: int) -> Callable[[int, int], Iterator[list[Batch]]]:
    """Epochs of a DistributedSampler, which repeats samples where ranks do not divide the size."""

    def epochs(rank: int, ranks: int) -> Iterator[list[Batch]]:
        sampler = DistributedSampler(range(size), ranks, rank, shuffle=True, seed=3)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            loader = DataLoader(range(size), batch_size=8, sampler=sampler)
            yield [batch(b, 1000 * epoch + 10 * step + rank) for step, b in enumerate(loader)]

    return epochs


def by_chance(rank: int, ranks: int) -> Iterator[list[Batch]]:
    """Any samples any number of times, on any ranks; one rank sees nothing, then nobody does."""
    for part in range(6):
        chance = random.Random(100 * part + rank)
        if part == 4 or (part == 2 and rank == ranks - 1):
            yield []
            continue
        sizes = [chance.randrange(1, 9) for _ in range(chance.randrange(1, 6))]
        yield [
            batch([chance.randrange(20) for _ in range(size)], 1000 * part + 10 * step + rank)
            for step, size in enumerate(sizes)
        ]


def beyond_float(rank: int, ranks: int) -> Iterator[list[Batch]]:
    """Indices that neither float32 nor bfloat16 can tell apart."""
    for part in range(2):
        yield [batch((1 << 24) + 1 + rank + ranks * torch.arange(5), 10 * part + rank)]


CASES: dict[str, tuple[int, Callable[[int, int], Iterator[list[Batch]]]]] = {
    "even": (96, sampled(96)),
    "padded": (103, sampled(103)),
    "fewer samples than ranks": (3, sampled(3)),
    "chance": (20, by_chance),
    "beyond float": ((1 << 24) + 40, beyond_float),
}
RUNS = [(kind, name) for kind in TRACKERS for name in CASES]
RUNS.remove(("dynamics", "beyond float"))  # the same way, and half a gigabyte a rank


def last(state: dict[str, Any]) -> dict[str, Any]:
    """The last 200 samples, which are all but where there are millions."""
    return {k: v[-200:].clone() if torch.is_tensor(v) else v for k, v in state.items()}


def follow(tracker: ForgettingTracker, parts: Iterator[list[Batch]]) -> ForgettingTracker:
    for seen in parts:
        for index, logits, targets in seen:
            tracker.update(index, logits, targets)
        tracker.sync()
    return tracker


def restarted(kind: type[ForgettingTracker], rank: int, ranks: int) -> ForgettingTracker:
    """The padded case, killed after each epoch: a new tracker loads what rank 0 had."""
    size, parts = CASES["padded"]
    tracker = kind(size)
    for seen in parts(rank, ranks):
        saved = [tracker.state_dict()]
        dist.broadcast_object_list(saved, src=0)
        tracker = kind(size)
        tracker.load_state_dict(saved[0])
        follow(tracker, iter([seen]))
    return tracker


def error(work: Callable[[], Any]) -> str:
    try:
        work()
    except (ValueError, RuntimeError) as found:
        return f"{type(found).__name__}: {found}"
    return "none"


def errors(rank: int) -> dict[str, str]:
    """Each is met on every rank, at once, and nothing is changed by it."""
    found: dict[str, str] = {}
    tracker = ForgettingTracker(10)
    tracker.update(torch.tensor([rank]), torch.eye(C)[[0]], torch.tensor([0]))
    found["unsynced"] = error(tracker.state_dict)
    found["scores"] = str(tracker.presentations.tolist())

    other = ForgettingTracker(10)
    other.update(torch.tensor([4]), torch.eye(C)[[0]], torch.tensor([min(rank, 1)]))
    found["targets"] = error(other.sync)
    found["targets left"] = str(other.presentations.tolist())

    loss = DynamicsTracker(10, statistics=["loss"])
    if rank == 0:
        loss.update_loss(torch.tensor([4]), torch.ones(1))
    else:
        loss.update(torch.tensor([4]), torch.eye(C)[[0]], torch.tensor([1]))
    found["loss and logits"] = error(loss.sync)

    found["sizes"] = error(ForgettingTracker(10 + rank).sync)
    found["kinds"] = error((ForgettingTracker if rank else DynamicsTracker)(10).sync)

    faulty = ForgettingTracker(10)
    if rank == 1:  # compiled, it does not look at the index
        unchecked = torch.compile(faulty.update, fullgraph=True, backend="eager")
        unchecked(torch.tensor([50]), torch.eye(C)[[0]], torch.tensor([0]))
    else:
        faulty.update(torch.tensor([5]), torch.eye(C)[[0]], torch.tensor([0]))
    found["fault"] = error(faulty.sync)

    past = ForgettingTracker(10)
    second = dist.new_group([1])
    if rank == 1:
        only = ForgettingTracker(10)
        only.update(torch.tensor([2]), torch.eye(C)[[0]], torch.tensor([0]))
        only.sync(second)
        past.load_state_dict(only.state_dict())
    else:
        found["not a member"] = error(lambda: past.sync(second))
    found["past"] = error(past.sync)

    ALONE.sync()
    found["alone before"] = str(ALONE.presentations.tolist())
    found["loaded before"] = error(LOADED_BEFORE.sync)
    columns = tracker._state.columns | {"targets": tracker._state.targets}
    places = {name: column.data_ptr() for name, column in columns.items()}
    tracker.sync()
    columns = tracker._state.columns | {"targets": tracker._state.targets}
    found["in place"] = str(places == {name: c.data_ptr() for name, c in columns.items()})
    found["afterwards"] = str(tracker.presentations.tolist())
    return found


ALONE = ForgettingTracker(10)  # what each process had seen by itself, before there were ranks
ALONE.update(torch.tensor([6]), torch.eye(C)[[0]], torch.tensor([0]))
ALONE.sync()
LOADED_BEFORE = ForgettingTracker(10)
LOADED_BEFORE.load_state_dict(ForgettingTracker(10).state_dict())


def trained(rank: int, ranks: int, watched: bool) -> dict[str, Any]:
    """DDP on one's own loop, with `update` written in it or without."""
    torch.manual_seed(0)
    inputs = torch.randn(53, 4)
    data = IndexedDataset(TensorDataset(inputs, (inputs[:, 0] > 0).long()))
    model = DistributedDataParallel(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    tracker = DynamicsTracker(len(data))
    sampler = DistributedSampler(data, ranks, rank)
    loader = DataLoader(data, batch_size=5, sampler=sampler)

    def step(x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, y).backward()
        optimizer.step()
        return logits

    handle = tracker.attach(model) if watched else None
    for epoch in range(3):
        sampler.set_epoch(epoch)
        if watched:
            for x, y in tracker.watch(loader):
                step(x, y)
        else:
            for x, y, index in loader:
                tracker.update(index, step(x, y), y)
        tracker.sync()
    if handle is not None:
        handle.remove()
    return {"weights": list(model.parameters()), "tracker": tracker.state_dict()}


def shared(rank: int, ranks: int) -> dict[str, Any]:
    """Tensor parallel: two ranks see one batch, and each is merged with those that see others."""
    groups = [dist.new_group(list(range(first, ranks, 2))) for first in range(2)]
    tracker = DynamicsTracker(8)
    for epoch in range(3):
        tracker.update(*batch(range(rank // 2, 8, ranks // 2), 10 * epoch + rank // 2))
        tracker.sync(groups[rank % 2])
    return tracker.state_dict()


def checkpointed(folder: Path, rank: int) -> dict[str, Any]:
    """torch.distributed.checkpoint takes the tracker itself."""
    tracker = DynamicsTracker(20)
    follow(tracker, iter([[batch([rank, 7, 19 - rank], rank)]]))
    save({"tracker": tracker}, checkpoint_id=folder / "dcp")
    again = DynamicsTracker(20)
    load({"tracker": again}, checkpoint_id=folder / "dcp")
    return {"saved": tracker.state_dict(), "loaded": again.state_dict()}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for kind, name in RUNS:
        size, parts = CASES[name]
        state = follow(TRACKERS[kind](size), parts(rank, ranks)).state_dict()
        found[f"{kind}, {name}"] = last(state)
    for kind, make in TRACKERS.items():
        found[f"{kind}, restarted"] = restarted(make, rank, ranks).state_dict()
    found["errors"] = errors(rank)
    found["trained"] = trained(rank, ranks, watched=False)
    found["watched"] = trained(rank, ranks, watched=True)
    found["shared"] = shared(rank, ranks)
    found["checkpointed"] = checkpointed(folder, rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()  # nobody leaves while another still listens
    dist.destroy_process_group()
