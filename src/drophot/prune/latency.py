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
        mark, between = _clock(device)

        def once() -> float:
            start = mark()
            call(model, inputs)
            return between(start, mark())

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
        mark, between = _clock(device)
        marks: list[tuple[str | None, Any]] = []  # a path where a module starts, None at its end
        with call_hooks(
            model, lambda path: marks.append((path, mark())), lambda: marks.append((None, mark()))
        ):
            for run in range(runs + 1):
                marks.clear()
                call(model, inputs)
                if run:
                    for path, took in _own_times(marks, between).items():
                        found.setdefault(path, []).append(1e3 * took)
    return {path: median(times) for path, times in found.items()}


def _own_times(
    marks: list[tuple[str | None, Any]], between: Callable[[Any, Any], float]
) -> dict[str, float]:
    """Seconds of each module without its children."""
    stack: list[tuple[str, Any, float]] = []  # path, start, time of the children
    total: dict[str, float] = {}
    for entered, now in marks:
        if entered is not None:
            stack.append((entered, now, 0.0))
            continue
        path, start, children = stack.pop()
        took = between(start, now)
        total[path] = total.get(path, 0.0) + took - children
        if stack:
            parent, begun, others = stack[-1]
            stack[-1] = parent, begun, others + took
    return total


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """A function that marks the current time of the device, and the seconds between two marks."""
    if device.type == "cuda":
        return lambda: _event(device), _between_events

    def now() -> float:
        if device.type == "mps":
            torch.mps.synchronize()
        return perf_counter()

    return now, lambda start, end: end - start


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between_events(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) / 1e3
