"""Runs a network in a checked pass, and tells errors of its code from failed checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from drophot._core.interruptions import must_propagate
from drophot.structured.observations import PassResult, StopPass
from drophot.structured.recorded_call import RecordedCall
from drophot.structured.single_call import run, tensors_in
from drophot.structured.verification import PrunedPass, kept_shapes
from drophot.structured.zeroed_network import ZeroedPass


def run_pass(
    model: nn.Module,
    example_inputs: Any,
    calls: Sequence[RecordedCall],
    removed: Tensor,
    *,
    training: bool = False,
    zeroed: bool = False,
    fingerprints: bool = False,
    shapes: Sequence[list[tuple[int, ...]]] | None = None,
) -> PassResult:
    """Run a network and compare each call with the recorded one.

    Args:
        model: The network.
        example_inputs: The inputs to call it with.
        calls: The recorded calls.
        removed: Whether each entry is removed.
        training: Whether to run in training mode.
        zeroed: Whether the network still has all channels, to be set to zero.
        fingerprints: Whether to keep sums of the outputs of each call.
        shapes: The result of `kept_shapes`, if it is known already.
    """
    mode = (
        ZeroedPass(calls, removed, fingerprints)
        if zeroed
        else PrunedPass(calls, removed, fingerprints, shapes or kept_shapes(calls, removed))
    )
    result = mode.result
    try:
        result.outputs = tensors_in(run(model, example_inputs, mode, training=training))
    except StopPass:
        return result
    except Exception as error:
        if must_propagate(error):
            raise
        result.error = error
        result.failures[min(result.num_reached, len(calls) - 1)] = (
            f"code: fails with fewer channels ({type(error).__name__})"
        )
        return result
    while result.num_reached < len(calls) and calls[result.num_reached].name == "clone":
        result.num_reached += 1
    if result.num_reached < len(calls):
        result.failures[result.num_reached] = "code: returns earlier with fewer channels"
    return result
