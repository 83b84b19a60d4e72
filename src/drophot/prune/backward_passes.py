"""What a hook on a parameter can ask and request of the backward pass that runs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def will_accumulate(weight: Tensor) -> bool:
    """Whether the current backward pass adds to `weight.grad`, unlike `torch.autograd.grad`."""
    node = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        # torch.autograd.graph.register_multi_grad_hook is built on these private functions.
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # autograd.grad does not support the question
        return False


def is_distributed() -> bool:
    """Whether gradients may be sent to other processes as soon as they are computed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def current_backward_pass() -> int:
    """A number of the backward pass that runs in this thread; -1 outside of one."""
    return torch._C._current_graph_task_id()


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call a function when all gradients of the current backward pass are computed."""
    torch.autograd.Variable._execution_engine.queue_callback(function)
