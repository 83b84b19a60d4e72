"""Run a network under a look, and tell its own errors from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from drophot._core.interruptions import must_propagate
from drophot.structured.observations import Seen, Stop
from drophot.structured.single_call import run, tensors_in
from drophot.structured.tracer import Call
from drophot.structured.verification import Check, shapes_left
from drophot.structured.zeroed_network import Zeroed


def look(
    model: nn.Module,
    example_inputs: Any,
    calls: Sequence[Call],
    gone: Tensor,
    *,
    training: bool = False,
    zeroed: bool = False,
    prints: bool = False,
    shapes: Sequence[list[tuple[int, ...]]] | None = None,
) -> Seen:
    """Run a network and see whether it does what it did.

    Args:
        model: The network.
        example_inputs: What it is called with.
        calls: What it did.
        gone: The entries that are gone.
        training: Whether to call it in training mode.
        zeroed: Whether it has all channels still, to be zero instead of gone.
        prints: Whether to keep sums of what each call gives.
        shapes: What `shapes_left` gave, if there is more than one look.

    Returns:
        What was seen.
    """
    mode = (
        Zeroed(calls, gone, prints)
        if zeroed
        else Check(calls, gone, prints, shapes or shapes_left(calls, gone))
    )
    seen = mode.seen
    try:
        seen.outputs = tensors_in(run(model, example_inputs, mode, training=training))
    except Stop:
        return seen
    except Exception as error:
        if must_propagate(error):
            raise
        seen.error = error
        seen.failures[min(seen.end, len(calls) - 1)] = (
            f"code: fails with fewer channels ({type(error).__name__})"
        )
        return seen
    while seen.end < len(calls) and calls[seen.end].name == "clone":
        seen.end += 1
    if seen.end < len(calls):
        seen.failures[seen.end] = "code: ends earlier with fewer channels"
    return seen
