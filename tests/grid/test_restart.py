"""A training that is killed, `kill -9`, wherever it happens to be, and started again."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.one_process import assert_same
from helpers.processes import begin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from drophot import DynamicsTracker, IndexedDataset

pytestmark = pytest.mark.slow
SIZE, EPOCHS, BATCH = 60, 6, 8


def train(folder: Path, pause: float = 0.0) -> dict[str, Any]:
    """Writes a checkpoint after every step, and goes on from the one it finds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = torch.randn(SIZE, 5)
    data = IndexedDataset(TensorDataset(inputs, inputs[:, :3].argmax(1)))
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    tracker = DynamicsTracker(SIZE)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "tracker": tracker}
    file, done = folder / "checkpoint.pt", 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
        done = saved["done"]

    step = 0
    with tracker.attach(model):
        for epoch in range(EPOCHS):
            order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(epoch))
            loader = DataLoader(data, BATCH, sampler=order.tolist(), generator=torch.Generator())
            for x, y in tracker.watch(loader):
                step += 1
                if step <= done:
                    continue
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save(states | {"random": torch.get_rng_state(), "done": step}, f"{file}.part")
                Path(f"{file}.part").replace(file)
                time.sleep(pause)
    return {"model": model.state_dict(), "tracker": tracker.state_dict(), "done": step}


def test_killed_again_and_again(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = train(tmp_path / "whole")
    chance, ends = random.Random(0), []
    file = tmp_path / "killed" / "checkpoint.pt"
    for _ in range(40):
        output = tmp_path / "output"
        process = begin(train, tmp_path / "killed", 0.03, folder=tmp_path, output=output)
        before = file.stat().st_mtime_ns if file.exists() else 0
        while process.exitcode is None and (
            not file.exists() or file.stat().st_mtime_ns == before
        ):  # then somewhere within the next steps
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.4))
        if len(ends) < 4:
            process.kill()
        process.join()
        ends.append(process.exitcode)
        if ends[-1] == 0:
            break
    assert ends.count(-signal.SIGKILL) >= 3, ends
    assert ends[-1] == 0, ends
    killed = torch.load(file, weights_only=True)
    assert killed["done"] == whole["done"] == EPOCHS * 8
    assert_same(killed["tracker"], whole["tracker"], 0.0)
    assert killed["tracker"]["history"].count_nonzero() == SIZE
    for name, value in whole["model"].items():
        assert torch.equal(killed["model"][name], value), name
