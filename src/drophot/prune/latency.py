"""How long a network takes, as a whole and layer by layer."""

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
    """Call a model with its example inputs.

    Args:
        model: The model.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        What it gives.
    """
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple):
        return model(*example_inputs)
    return model(example_inputs)


def of_batch(example_inputs: Any, size: int) -> Any:
    """Example inputs of another batch size, which repeat the first sample.

    Args:
        example_inputs: Tensors, nested or not, whose first dimension is the batch.
        size: How many samples.

    Returns:
        The same structure.

    Raises:
        ValueError: If the tensors have no first dimension in common.
    """
    leaves = tree_leaves(example_inputs)
    tensors = [t for t in leaves if isinstance(t, Tensor) and t.dim()]
    if not tensors and leaves and all(type(n) is int for n in leaves):
        raise ValueError(
            f"`example_inputs` must be tensors. Found {example_inputs!r}, which looks like a "
            f"shape; pass torch.randn({', '.join(map(str, leaves))})."
        )
    sizes = {len(t) for t in tensors}
    if len(sizes) != 1 or 0 in sizes:
        found = f"first dimensions of {sorted(sizes)}" if sizes else "no tensor with dimensions"
        raise ValueError(
            f"`example_inputs` must have the batch as their first dimension. Found {found}: pass "
            f"inputs with one, or batch_sizes=() to leave the time out."
        )

    def repeated(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        return value[:1].expand(size, *value.shape[1:]).clone()

    return tree_map(repeated, example_inputs)


@contextmanager
def noted(size: int) -> Iterator[None]:
    """Note in errors of the model that its inputs have another batch size than the example.

    Args:
        size: The batch size.

    Yields:
        Nothing.
    """
    try:
        yield
    except Exception as error:
        error.add_note(
            f"summary: this was raised while the time was measured, with `example_inputs` repeated "
            f"to a batch size of {size}. Their first dimension must be the batch; pass "
            f"batch_sizes=() to leave the time out."
        )
        raise


def latency(model: nn.Module, inputs: Any, seconds: float = 0.3) -> float:
    """How long one call takes, in evaluation mode.

    Args:
        model: On any device, from which it comes back as it was.
        inputs: What it is called with.
        seconds: How long to measure, at least three calls.

    Returns:
        Milliseconds, the median after a warm-up; on a GPU until it is done.
    """
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
    """How long each module's own part of a call takes, without its children's.

    Args:
        model: On any device, from which it comes back as it was.
        inputs: What it is called with.
        runs: How many calls, after one to warm up.

    Returns:
        Milliseconds by module path, the medians. Measuring slows small modules down. Those of a
        compiled model are of the model as it is written, as compiled layers cannot be told apart.
    """
    found: dict[str, list[float]] = {}
    with evaluating(model) as device, eagerly():
        wait = _waiting(device)
        stack: list[tuple[str, float, float]] = []  # path, start, what its children took
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
    """Waits until a device has done what it was asked."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None
