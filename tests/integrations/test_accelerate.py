"""The tracker under accelerate, in two processes and through its checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import processes
from helpers.one_process import assert_same, in_one_process
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from drophot import DynamicsTracker, IndexedDataset

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.slow
SIZE, EPOCHS = 30, 3


def train(folder: Path, stop: int = EPOCHS, resume: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = torch.randn(SIZE, 4)
    data = IndexedDataset(TensorDataset(inputs, (inputs[:, 0] > 0).long()))
    tracker, shown = DynamicsTracker(SIZE), []
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4))
    accelerator.register_for_checkpointing(tracker)
    if resume:
        accelerator.load_state(folder / "checkpoint")
    with tracker.attach(model):
        for epoch in range(int(tracker.presentations.min()), stop):
            for x, y in tracker.watch(loader):
                with accelerator.accumulate(model):
                    logits = model(x)
                    accelerator.backward(nn.functional.cross_entropy(logits, y))
                    optimizer.step()
                    optimizer.zero_grad()
                index = (x[:, None] == inputs).all(2).nonzero()[:, 1]
                shown.append((epoch, index, logits.detach(), y))
            tracker.sync()
    accelerator.save_state(folder / "checkpoint")
    return {"tracker": tracker.state_dict(), "shown": shown}


def test_two_processes_and_a_restart(tmp_path: Path) -> None:
    processes.ranks(2, main, tmp_path, folder=tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    shown = [rank["whole"]["shown"] for rank in ranks]
    assert sum(len(index) for rank in shown for _, index, *_ in rank) > EPOCHS * SIZE, "repeated"
    expected = in_one_process(SIZE, shown)
    for rank in ranks:
        assert_same(rank["whole"]["tracker"], expected, 1e-5)
        assert_same(rank["resumed"]["tracker"], rank["whole"]["tracker"], 0.0)


def main(folder: Path) -> None:
    """What a rank does."""
    (folder / "whole").mkdir(exist_ok=True)
    found = {"whole": train(folder / "whole")}
    train(folder / "parts", stop=1)
    found["resumed"] = train(folder / "parts", resume=True)
    torch.save(found, folder / f"{accelerate.PartialState().process_index}.pt")
