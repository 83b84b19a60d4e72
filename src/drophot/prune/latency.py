"""Measure the time of a forward pass, of the whole network and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from drophot._core.model_contexts import call_hooks, evaluating
from drophot.prune.eager_mode import eagerly


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple):
        return model(*example_inputs)
    return model(example_inputs)


def of_batch(example_inputs: Any, size: int) -> Any:
    """Example inputs of another batch size, which repeat the first sample."""
    leaves = tree_leaves(example_inputs)
    tensors = [t for t in leaves if isinstance(t, Tensor) and t.dim()]
    if not tensors and leaves and all(type(n) is int for n in leaves):
        raise ValueError(
            f"`example_inputs` must be tensors, got {example_inputs!r}, which looks like a shape. "
            f"Pass torch.randn({', '.join(map(str, leaves))})."
        )
    sizes = {len(t) for t in tensors}
    if len(sizes) != 1 or 0 in sizes:
        found = f"first dimensions of {sorted(sizes)}" if sizes else "no tensor with dimensions"
        raise ValueError(
            f"`example_inputs` must have the batch as their first dimension, got {found}. Pass "
            f"inputs with a batch dimension, or batch_sizes=() to leave the time out."
        )

    def repeated(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        return value[:1].expand(size, *value.shape[1:]).clone()

    return tree_map(repeated, example_inputs)


@contextmanager
def noted(size: int) -> Iterator[None]:
    """Add a note to errors of the model: the batch size is not that of the example inputs."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"summary: this error was raised while the time was measured, with `example_inputs` "
            f"repeated to a batch size of {size}. Their first dimension must be the batch. Pass "
            f"batch_sizes=() to leave the time out."
        )
        raise


def latency(model: nn.Module, inputs: Any, seconds: float = 0.3) -> float:
    """Milliseconds of a call in evaluation mode: the median of three or more after a warm-up."""
    with evaluating(model) as device:
        wait = _waiting(device)

        def once() -> float:
            wait()
            start = perf_counter()
            call(model, inputs)
            wait()
            return perf_counter() - start

        first = once()
        if first < seconds:
            once()
        times: list[float] = []
        while len(times) < 3 or sum(times) < seconds:
            times.append(once())
    return 1e3 * median(times)


def layer_latencies(model: nn.Module, inputs: Any, runs: int = 3) -> dict[str, float]:
    """Milliseconds of each module's own part of a call, without its children, by path.

    These are medians over `runs` calls after a warm-up. The measurement slows small modules down. A
    compiled model is measured eagerly, since compiled layers cannot be told apart.
    """
    found: dict[str, list[float]] = {}
    with evaluating(model) as device, eagerly():
        wait = _waiting(device)
        stack: list[tuple[str, float, float]] = []  # path, start, time of the children
        total: dict[str, float] = {}

        def enter(path: str) -> None:
            wait()
            stack.append((path, perf_counter(), 0.0))

        def leave() -> None:
            wait()
            path, start, children = stack.pop()
            took = perf_counter() - start
            total[path] = total.get(path, 0.0) + took - children
            if stack:
                parent, begun, others = stack[-1]
                stack[-1] = parent, begun, others + took

        with call_hooks(model, enter, leave):
            for run in range(runs + 1):
                total.clear()
                call(model, inputs)
                if run:
                    for path, took in total.items():
                        found.setdefault(path, []).append(1e3 * took)
    return {path: median(times) for path, times in found.items()}


def _waiting(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device is idle."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None
