"""A fixture: CUDA graphs, or their stand-in."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.stand_in import Graph, Stream
from torch import nn
from torch.optim import Optimizer

from drophot.training import step

DEVICE = torch.device("cuda:1")
"""Where `fit` takes the model to be; the current device is another one."""


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graph]]:
    """All graphs, also those whose capture failed; `fit` takes the CPU for a GPU."""
    made: list[Graph] = []
    other = Stream(torch.device("cuda:0"))
    selected = [other]

    @contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        before, selected[0] = selected[0], stream
        try:
            yield
        finally:
            selected[0] = before

    @contextmanager
    def graph(
        graph: Graph, capture_error_mode: str, stream: Stream | None = None
    ) -> Iterator[None]:
        made.append(graph)
        before, selected[0] = selected[0], stream or other
        if selected[0].device != DEVICE:  # operations on the model's device are not recorded
            yield
        else:
            try:
                with graph:
                    yield
            finally:
                graph.finish()
        if not graph.calls:
            warnings.warn("The CUDA Graph is empty. This usually means ...", stacklevel=1)
        selected[0] = before  # after an error the stream stays selected, as in torch

    def fast_step(
        model: nn.Module, optimizer: Optimizer, device: torch.device, **options: Any
    ) -> Any:
        return step.fast_step(model, optimizer, DEVICE, **options)

    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.current_stream", Stream)
    monkeypatch.setattr("torch.cuda.stream", stream)
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", graph)
    monkeypatch.setattr("drophot.training.loop.fast_step", fast_step)
    yield made
    assert selected == [other], "a failed capture does not leave its stream selected"
