"""The common part of passes whose calls are compared with recorded ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drophot.structured.dependency_graph import Axis
from drophot.structured.observations import PassResult, guarded
from drophot.structured.recorded_call import RecordedCall


class CheckedPass(TorchDispatchMode):
    """A pass of a network, in which `on_call` sees every operator.

    Args:
        calls: The recorded calls.
        removed: Whether each entry is removed.
        fingerprints: Whether to keep sums of the outputs of each call.
    """

    def __init__(self, calls: Sequence[RecordedCall], removed: Tensor, fingerprints: bool) -> None:
        super().__init__()
        self.calls = calls
        self.removed = removed
        self.fingerprints = fingerprints
        self.result = PassResult()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with guarded():
            return self.on_call(func, args, kwargs or {})

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def shrinking(self, axes: Sequence[Axis]) -> list[Axis]:
        """The axes along which entries are removed."""
        return [axis for axis in axes if self.removed[axis.ids].any()]


def axes_of_output(call: RecordedCall, position: int) -> list[Axis]:
    return call.output_axes[position] if position < len(call.output_axes) else []
