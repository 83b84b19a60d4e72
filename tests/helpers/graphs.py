"""A fixture: CUDA graphs, or their stand-in."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from helpers.stand_in import Graph, Stream
from torch import nn
from torch.optim import Optimizer

from drophot.training import step


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """All graphs, also those whose capture failed; `fit` takes the CPU for a GPU."""
    made: list[Graph] = []

    @contextmanager
    def graph(graph: Graph, capture_error_mode: str) -> Iterator[None]:
        made.append(graph)
        try:
            with graph:
                yield
        finally:
            graph.finish()

    def fast_step(
        model: nn.Module, optimizer: Optimizer, device: torch.device, **options: Any
    ) -> Any:
        return step.fast_step(model, optimizer, torch.device("cuda"), **options)

    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.current_stream", Stream)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", graph)
    monkeypatch.setattr("drophot.training.loop.fast_step", fast_step)
    return made
