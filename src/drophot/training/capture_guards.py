"""What a capture must not leave behind, and what must not be in use when it begins."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer

_EARLIER, _OWN = "drophot: of an earlier forward pass", "drophot: of a step"


_replaced_generators = 0


def num_replaced_generators() -> int:
    """How often a failed capture has replaced the state of a generator.

    A graph that was captured before draws from the state that it was captured with, which no longer
    is that of the generator. This happens if one `fit` calls another.
    """
    return _replaced_generators


def mark_earlier_nodes(parameters: Iterable[Tensor]) -> None:
    """Mark the autograd nodes of the parameters that are in use by tensors of the user."""
    for node in _metadata(parameters):
        if _OWN not in node:
            node[_EARLIER] = True  # is lost at once if nothing refers to the node


def mark_own_nodes(parameters: Iterable[Tensor]) -> None:
    """Mark the nodes that a step has created, which a model may keep in use."""
    for node in _metadata(parameters):
        if _EARLIER not in node:
            node[_OWN] = True


def has_earlier_nodes(parameters: Iterable[Tensor]) -> bool:
    """Whether nodes of an earlier forward pass are still in use.

    They belong to the stream on which they were created, so that a gradient that is added by one of
    them would leave the stream that is captured.
    """
    return any(_EARLIER in node for node in _metadata(parameters))


def _metadata(parameters: Iterable[Tensor]) -> Iterator[dict[str, Any]]:
    """A dictionary for each parameter, which lives as long as its node."""
    for parameter in parameters:
        if parameter.requires_grad:
            node: Any = get_gradient_edge(parameter).node
            yield node.metadata


@contextmanager
def noticed_hooks() -> Iterator[list[str]]:
    """List the hooks that are put on tensors inside the block, if no graph can repeat them."""
    found: list[str] = []
    original = torch.Tensor.register_hook

    def register_hook(self: Tensor, hook: Callable[..., Any]) -> Any:
        if not self.is_leaf:  # those of leaves stay there, where `Conditions` finds them
            found.append(repr(hook))
        return original(self, hook)

    torch.Tensor.register_hook = register_hook
    try:
        yield found
    finally:
        torch.Tensor.register_hook = original


@contextmanager
def empty_graph_refused() -> Iterator[None]:
    """Turn torch's warning about a graph without operations into an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA Graph is empty")
        yield


@contextmanager
def unchanged_on_error(optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Restore what an interrupted capture leaves behind.

    No operation of it ran. Gradients are computed again by the next step.
    """
    states = [(state, dict(state)) for state in optimizer.state.values() if isinstance(state, dict)]
    generators = torch.cuda.default_generators
    generator = generators[device.index or 0] if generators else None
    random_numbers = None if generator is None else generator.clone_state()
    try:
        yield
    except BaseException:
        for state, before in states:
            state.clear()
            state.update(before)
        if generator is not None and random_numbers is not None:
            # An interrupted capture leaves the state in a mode in which it refuses to draw.
            generator.graphsafe_set_state(random_numbers)
            global _replaced_generators
            _replaced_generators += 1
        raise
