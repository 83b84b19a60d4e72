"""Gradients on a GPU that are masked together, at the end of the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from functools import partial
from itertools import starmap
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import get_gradient_edge

# What the engine says of the backward pass that it runs. If a version of torch does not have these
# functions, no gradient waits.
_pass_number: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)
_executes: Callable[[Any], bool] | None = getattr(torch._C, "_will_engine_execute_node", None)


class WaitingGradients:
    """The gradients that wait for the end of a backward pass.

    On a GPU, a hook that masks the gradient of one parameter launches an operation for each of
    them. If nothing reads the gradients during the pass, they can all be masked at its end, by one
    fused operation. Gradients do not wait in these cases:

    - There are other hooks on the parameters, which may read gradients during the pass.
    - There is a process group, since the hooks of DistributedDataParallel are not visible.
    - `torch.autograd.grad` returns the gradients, or they are differentiated themselves.
    """

    def __init__(self) -> None:
        self._pass: int | None = None
        self._wait = False
        self._names: dict[str, bool] = {}

    def add(
        self,
        name: str,
        weight: Tensor,
        hooks: Iterable[tuple[Tensor, Sized]],
        mask: Callable[[Mapping[str, bool]], None],
    ) -> bool:
        """Whether the gradient that a weight is about to receive waits.

        Args:
            name: Of the weight.
            weight: A parameter.
            hooks: All weights, and the handles of the hooks on each that allow waiting.
            mask: Called at the end of the pass with the names of the weights, and for each whether
                it had no gradient before the pass.
        """
        if not _is_gpu(weight) or _pass_number is None or torch.compiler.is_compiling():
            return False
        if self._pass != (number := _pass_number()):
            self._pass = number
            self._wait = _is_read_later(weight) and not any(starmap(_has_others, hooks))
            if self._wait:
                Variable._execution_engine.queue_callback(partial(self._end, mask))
        if self._wait:
            self._names.setdefault(name, weight.grad is None)
        return self._wait

    def _end(self, mask: Callable[[Mapping[str, bool]], None]) -> None:
        # If a pass ended with an error, there are also the names that waited in it.
        names, self._names = self._names, {}
        mask(names)


def _is_read_later(weight: Tensor) -> bool:
    """Whether the gradient is stored in the weight, and read after the pass."""
    if torch.is_grad_enabled() or _executes is None:
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    try:
        return _executes(get_gradient_edge(weight).node)
    except RuntimeError:  # `torch.autograd.grad` stores nothing
        return False


def _has_others(weight: Any, own: Sized) -> bool:
    """Whether there are other hooks on a weight."""
    found = [*(weight._backward_hooks or ()), *(weight._post_accumulate_grad_hooks or ())]
    return len(found) > len(own)


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
