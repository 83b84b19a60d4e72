"""What a rank does in `tests/sampling/test_resume.py`: it samples, stops and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler, TensorDataset

from drophot import (
    Adaptive,
    AdaptiveSubset,
    CrestLoader,
    DropHot,
    FreshSubset,
    LossSampling,
)

N, EPOCHS = 41, 4


def data() -> TensorDataset:
    inputs = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def fresh(ranks: int, rank: int) -> list[list[int]]:
    sampler = FreshSubset(N, 0.4, num_replicas=ranks, rank=rank)
    return [list(sampler) for _ in range(EPOCHS)]


def losses_of(index: Tensor, epoch: int) -> Tensor:
    """Losses that depend on the sample and the epoch alone."""
    return ((index * 7 + epoch * 3) % 11).float()


def by_loss(ranks: int, rank: int, stop: int | None = None) -> dict[str, Any]:
    """Four epochs; after `stop` samples of the third one, another object goes on from the state."""
    options = {"num_replicas": ranks, "rank": rank}
    sampling = LossSampling(N, 0.4, **options)
    found: list[list[int]] = []
    for epoch in range(EPOCHS):
        part: list[int] = []
        for number, index in enumerate(sampling.sampler()):
            part.append(index)
            sampling.update(torch.tensor([index]), losses_of(torch.tensor([index]), epoch))
            if epoch == 2 and number + 1 == stop:
                break
        if epoch == 2 and stop is not None:
            sampling.sync()
            state = sampling.state_dict()
            sampling = LossSampling(N, 0.4, **options)
            sampling.load_state_dict(state)
            for index in sampling.sampler():
                part.append(index)
                sampling.update(torch.tensor([index]), losses_of(torch.tensor([index]), epoch))
        found.append(part)
    sampling.sync()
    return {"shown": found, "losses": sampling.losses}


def by_crest(ranks: int, rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = network()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    options: dict[str, Any] = {"batch_size": 6, "subset": 0.3, "threshold": 0.0}
    loader = CrestLoader(data(), wrapped, num_replicas=ranks, rank=rank, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    indices: list[list[int]] = []

    def train(count: int | None = None) -> None:
        for number, (inputs, targets, index, weights) in enumerate(loader):
            indices.append(index.tolist())
            losses = F.cross_entropy(wrapped(inputs), targets, reduction="none")
            optimizer.zero_grad()
            (losses * weights).mean().backward()
            optimizer.step()
            if number + 1 == count:
                return

    train()
    train(3)
    state = loader.state_dict()
    loader = CrestLoader(data(), wrapped, num_replicas=ranks, rank=rank, **options)
    loader.load_state_dict(state)
    train()
    return {"indices": indices, "selections": loader.selections, "state": loader.state_dict()}


def adaptive(ranks: int, rank: int, mode: str) -> dict[str, Any]:
    """Five epochs of training; in the fourth one, another object resumes from the state."""
    model = network()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    options: dict[str, Any] = {"every": 1, "num_replicas": ranks, "rank": rank}
    sampler = AdaptiveSubset(data(), wrapped, 0.4, mode, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    shown: list[list[int]] = []
    for epoch in range(5):
        shown.append([])
        for number, index in enumerate(sampler):
            shown[-1].append(index)
            inputs, targets = data()[torch.tensor([index, (index + 1) % N])]
            optimizer.zero_grad()
            F.cross_entropy(wrapped(inputs), targets).backward()
            optimizer.step()
            if epoch == 3 and number == 2:
                break
        if epoch == 3:
            state = sampler.state_dict()
            sampler = AdaptiveSubset(data(), wrapped, 0.4, mode, **options)
            sampler.load_state_dict(state)
            shown[-1] += list(sampler)
    return {"shown": shown, "state": sampler.state_dict()}


def a_run_of_its_own(seed: int) -> int:
    """A run in one process, whatever the other ranks do."""
    settings: dict[str, Any] = {"data_ratio": 0.4, "prune_ratio": 0.5, "train_epochs": 2 + seed}
    mode = Adaptive("high", every=1)
    run = DropHot(network, data(), data(), mode=mode, seed=seed, device="cpu", **settings)
    run.select()
    run.train()
    return len(run.seconds)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {
        "fresh": fresh(ranks, rank),
        "whole": by_loss(ranks, rank),
        "resumed": by_loss(ranks, rank, 5),
        "crest": by_crest(ranks, rank),
        "high": adaptive(ranks, rank, "high"),
        "k_center": adaptive(ranks, rank, "k_center"),
        "random": list(AdaptiveSubset(data(), network(), 0.4, "random", every=1)),
        "run": a_run_of_its_own(rank),
    }
    sampling = LossSampling(N, 0.4, num_replicas=ranks, rank=rank)
    order = SequentialSampler(range(N)) if rank else reversed(range(N))
    for name, work in (
        ("orders", lambda: list(sampling.sampler(order))),
        ("unmerged", lambda: _unmerged(sampling)),
        ("failed", lambda: _failing(ranks, rank)),
        ("failed crest", lambda: _failing_crest(ranks, rank)),
        ("without ranks", lambda: list(AdaptiveSubset(data(), network(), 0.4, every=1))),
    ):
        try:
            work()
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()  # no rank leaves while another one still communicates
    dist.destroy_process_group()


def _failing(ranks: int, rank: int) -> None:
    """A selection by a model that has NaN on rank 0, which selects."""
    model = network()
    if rank == 0:
        for weight in model.parameters():
            torch.nn.init.constant_(weight, torch.nan)
    options: dict[str, Any] = {"every": 1, "num_replicas": ranks, "rank": rank}
    sampler = AdaptiveSubset(data(), model, 0.4, "k_center", **options)
    list(sampler)  # the first selection is random
    list(sampler)


def _failing_crest(ranks: int, rank: int) -> None:
    """A selection by a model that cannot be called on rank 0."""

    def broken(_: Tensor) -> Tensor:
        raise ValueError("broken model")

    model = network()
    loader = CrestLoader(data(), model, batch_size=6, num_replicas=ranks, rank=rank)
    if rank == 0:
        model.forward = broken
    next(iter(loader))


def _unmerged(sampling: LossSampling) -> None:
    sampling.update(torch.tensor([3]), torch.tensor([1.0]))
    sampling.state_dict()
