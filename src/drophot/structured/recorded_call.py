"""The record of one call of an operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from drophot.structured.dependency_graph import Axis, Shape
from drophot.structured.product_cost import Product

# Operators whose integer arguments are sizes, which follow from the number of channels.
SIZED = frozenset([
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "expand",
    "repeat",
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "chunk",
    "native_layer_norm",
    "native_group_norm",
    "_fused_rms_norm",
    "as_strided",
    "as_strided_",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "new_empty_strided",
    "empty_strided",
])


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call of an operator in a recorded forward pass."""

    name: str
    path: tuple[str, ...]  # of the modules that it is called in, the innermost last
    input_axes: list[list[Axis]]  # of each tensor among the arguments
    numbers: list[Any] | None  # arguments that must not follow from a width
    shapes: Sequence[Shape]  # of the tensors it returned
    output_axes: list[list[Axis]]
    leaves: list[Any]  # what it returned: numbers, integer tensors, (dtype, device) of others
    spec: TreeSpec
    computed: bool  # from parameters, so that pruning may change its values
    product: Product | None = None  # its cost, if it consists of products

    @property
    def inputs(self) -> list[Axis]:
        """The axes of all tensors among the arguments."""
        return [axis for axes in self.input_axes for axis in axes]

    @property
    def axes(self) -> list[Axis]:
        """The axes of all inputs and outputs."""
        return self.inputs + [axis for axes in self.output_axes for axis in axes]


def numbers(name: str, args: Any, kwargs: Any, axes: list[Axis]) -> list[Any] | None:
    """The numbers among an operator's arguments that are not sizes; `None` if all may be sizes.

    `axes` are those of its first tensor.
    """
    if name == "slice":
        dim = (args[1] if len(args) > 1 else 0) % max(args[0].dim(), 1)
        if any(axis.dim == dim for axis in axes):
            return None
    if name == "convolution":
        args = args[:8]  # the number of groups can change
    return [
        value
        for value in flat((args, kwargs))
        if isinstance(value, float) or (isinstance(value, int) and name not in SIZED)
    ]


def flat(value: Any) -> Iterator[Any]:
    """The arguments of an operator, with lists, tuples and dicts flattened."""
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from flat(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from flat(one)
    else:
        yield value


def is_view(out: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether an output shares its memory with an input of its operator."""
    storage = out.untyped_storage()._cdata if out.layout == torch.strided else None
    return storage is not None and any(
        t.layout == torch.strided and t.untyped_storage()._cdata == storage for t in inputs
    )


def recorded_leaf(name: str, leaf: Any, inputs: Sequence[Tensor]) -> Any:
    """A number, a copy of an integer tensor, or the dtype and device of another tensor."""
    if not isinstance(leaf, Tensor):
        return leaf
    if (
        leaf.is_floating_point()
        or leaf.is_complex()
        or "pool" in name
        or "empty" in name  # uninitialized memory
        or (is_view(leaf, inputs) and not name.endswith("_"))
    ):
        return leaf.dtype, leaf.device
    return leaf.detach().clone()
