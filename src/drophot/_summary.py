"""What a network is made of: parameters, zeros, bytes, operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from drophot._untouched import untouched


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """One layer: the parameters that belong to a module itself, not to its children."""

    name: str
    kind: str
    parameters: int
    nonzeros: int
    bytes: int
    flops: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A network's layers and their sums; `print` shows it as a table.

    `bytes` is the dense storage of the parameters, which zeros do not reduce, and `flops` the
    floating-point operations of the dense computation for the example inputs, two for each
    multiply-add, which zeros do not reduce either on dense kernels.
    """

    layers: tuple[LayerSummary, ...]
    parameters: int
    nonzeros: int
    bytes: int
    flops: int | None

    @property
    def sparsity(self) -> float:
        """The share of all parameters, biases and norms included, that is zero."""
        return 1 - self.nonzeros / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        head = ("layer", "kind", "parameters", "non-zero", "sparsity", "bytes", "FLOPs")
        total = LayerSummary(
            name="total",
            kind="",
            parameters=self.parameters,
            nonzeros=self.nonzeros,
            bytes=self.bytes,
            flops=self.flops,
        )
        rows = [head, *(_row(layer) for layer in (*self.layers, total))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def summary(model: nn.Module, example_inputs: Any = None) -> Summary:
    """Count a network's parameters, zeros, bytes and, given inputs, operations, layer by layer.

    A parameter shared between layers counts once, in the first. Operations are those that
    `torch.utils.flop_counter` counts: matrix products, convolutions and attention; they stand at
    the layer that calls them, shared or not.

    Args:
        model: Any module. It comes back as it was, mode and random state included.
        example_inputs: A tensor, or a tuple of the model's positional arguments, on the model's
            device. `None` leaves the operations out.

    Returns:
        The summary.

    Example:
        >>> print(summary(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.ones(1, 4)))
        layer  kind    parameters  non-zero  sparsity  bytes  FLOPs
        -----------------------------------------------------------
        0      Linear          10        10    0.0000     40     16
        -----------------------------------------------------------
        total                  10        10    0.0000     40     16
    """
    flops = None if example_inputs is None else _flops(model, example_inputs)
    layers = []
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        operations = None if flops is None else flops.get(name, 0)
        if own or operations:
            layers.append(
                LayerSummary(
                    name=name or "(model)",
                    kind=type(module).__name__,
                    parameters=sum(p.numel() for p in own),
                    nonzeros=sum(int(p.detach().count_nonzero()) for p in own),
                    bytes=sum(p.numel() * p.element_size() for p in own),
                    flops=operations,
                )
            )
    return Summary(
        layers=tuple(layers),
        parameters=sum(layer.parameters for layer in layers),
        nonzeros=sum(layer.nonzeros for layer in layers),
        bytes=sum(layer.bytes for layer in layers),
        flops=None if flops is None else sum(layer.flops or 0 for layer in layers),
    )


def _flops(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Operations by module path, without those of its children."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    fused = torch.backends.mha.get_fastpath_enabled()
    # Fused attention is one operator of a cost that the counter may not know; apart it is products.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            untouched(model),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(*arguments)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    root = type(model).__name__
    counts = {
        path.removeprefix(root).removeprefix("."): sum(operations.values())
        for path, operations in counter.get_flop_counts().items()
        if path != "Global"
    }
    own = dict(counts)
    for path, count in counts.items():
        parent = path
        while parent:
            parent = parent.rpartition(".")[0]
            if parent in own:
                own[parent] -= count
                break
    return own


def _row(layer: LayerSummary) -> tuple[str, ...]:
    sparsity = 1 - layer.nonzeros / layer.parameters if layer.parameters else 0.0
    return (
        layer.name,
        layer.kind,
        f"{layer.parameters:,}",
        f"{layer.nonzeros:,}",
        f"{sparsity:.4f}",
        f"{layer.bytes:,}",
        "" if layer.flops is None else f"{layer.flops:,}",
    )
