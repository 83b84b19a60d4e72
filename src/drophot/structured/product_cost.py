"""The operations of one matrix product, convolution or attention, for any number of channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from drophot.prune.flop_formulas import multiply_adds
from drophot.structured.dependency_graph import Shape


@dataclass(frozen=True, slots=True)
class Product:
    """An operator that consists of products, and its arguments without their data."""

    operator: Any
    arguments: list[Any]  # numbers, and the shape of each tensor as a `torch.Size`
    structure: TreeSpec

    @property
    def inputs(self) -> list[Shape]:
        """The shapes of the tensors among the arguments."""
        return [leaf for leaf in self.arguments if isinstance(leaf, torch.Size)]

    def flops(self, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
        """The operations for inputs and outputs of these shapes, by the formula of `summary`."""
        from torch.utils.flop_counter import flop_registry  # here, since the import is slow

        shapes = iter(inputs)
        leaves = [
            _without_data(next(shapes)) if isinstance(leaf, torch.Size) else leaf
            for leaf in self.arguments
        ]
        args, kwargs = tree_unflatten(leaves, self.structure)
        if self.operator in flop_registry:
            out = [_without_data(shape) for shape in outputs]
            formula = flop_registry[self.operator]
            return int(formula(*args, **kwargs, out_val=out[0] if len(out) == 1 else out))
        formula = multiply_adds(str(self.operator))
        return 0 if formula is None else 2 * formula(*args, **kwargs)


def product_of(func: Any, args: Any, kwargs: Any) -> Product | None:
    """The record of a call, if its operator has a formula."""
    from torch.utils.flop_counter import flop_registry

    operator = func.overloadpacket
    if operator not in flop_registry and multiply_adds(str(operator)) is None:
        return None
    leaves, structure = tree_flatten((args, kwargs))
    shapes = [leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return Product(operator, shapes, structure)


def _without_data(shape: Shape) -> Tensor:
    return torch.empty(tuple(shape), device="meta")
