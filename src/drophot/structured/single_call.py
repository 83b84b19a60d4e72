"""One call of a network that leaves the network unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drophot._core.model_contexts import call_hooks, evaluating, preserved_state
from drophot.prune.eager_mode import eagerly
from drophot.prune.latency import call


def run(
    model: nn.Module,
    example_inputs: Any,
    mode: Any,
    path: list[str] | None = None,
    *,
    training: bool = False,
) -> Any:
    """Call a model in a dispatch mode, operator by operator, and leave it unchanged.

    A compiled model runs eagerly.

    Args:
        model: The model.
        example_inputs: The inputs to call it with.
        mode: A context in which it is called.
        path: A list to keep the paths of the modules that are being called, the innermost last.
        training: Whether to call it in training mode.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(eagerly())
            stack.enter_context(preserved_state(model))
            stack.enter_context(evaluating(model))
            if training:
                model.train()
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(isinstance(module, nn.RNNBase) for module in model.modules()):
                stack.enter_context(_decomposed_rnn())
            if path is not None:
                stack.enter_context(call_hooks(model, path.append, path.pop))
            stack.enter_context(mode)
            return call(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def _decomposed_rnn() -> Iterator[None]:
    """Disable libraries that run a recurrent layer as one operator."""
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [library.enabled for library in libraries]
    for library in libraries:
        library.enabled = False
    try:
        yield
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            library.enabled = enabled


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in the output of a network, in order, inside containers and objects too."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
            return
        if value is None or isinstance(value, (str, bytes, int, float, complex, type)):
            return
        if id(value) in seen or isinstance(value, nn.Module):
            return
        seen.add(id(value))
        if isinstance(value, dict):
            inside = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            inside = list(value)
        else:
            slots = [s for kind in type(value).__mro__ for s in getattr(kind, "__slots__", ())]
            inside = [getattr(value, name, None) for name in slots if isinstance(name, str)]
            inside += list(getattr(value, "__dict__", {}).values())
        for one in inside:
            collect(one)

    collect(value)
    return found
