"""What a network is made of, and what that is worth: weights, zeros, bytes, operations, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from drophot import _numbers
from drophot._compressed import compressed_bytes
from drophot._latency import call, latency, layer_latencies, of_batch
from drophot._layers import weights_of
from drophot._untouched import untouched


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """One layer: the parameters that belong to a module itself, not to its children."""

    name: str
    """The module's name, as `named_modules` gives it."""
    kind: str
    """The name of its class."""
    parameters: int
    """The number of them, zeros included."""
    nonzeros: int
    """The number of those that are not zero."""
    bytes: int
    """Of the dense parameters."""
    compressed_bytes: int
    """Of a bit mask and the values that are not zero, where that is less."""
    flops: int | None
    """Of the dense computation, two for each multiply-add."""
    effective_flops: int | None
    """These times the share of the layer's weights that is not zero."""
    latency: Mapping[int, float] | None
    """Milliseconds by batch size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A network's layers and their sums; `print` shows it as a table.

    Zeros do not reduce `bytes`, `flops` and `latency`, which are those of dense tensors on dense
    kernels. `compressed_bytes` is what `save_compressed` writes of the parameters, and
    `effective_flops` what a kernel that skips every zero could do with at best.
    """

    layers: tuple[LayerSummary, ...]
    """Those with parameters or operations, in the order of `named_modules`."""
    parameters: int
    """The number of them in all layers, zeros included; shared ones once."""
    nonzeros: int
    """The number of those that are not zero."""
    bytes: int
    compressed_bytes: int
    flops: int | None
    effective_flops: int | None
    latency: Mapping[int, float] | None
    """Milliseconds by batch size, of the whole network; its layers' were measured by themselves."""

    @property
    def sparsity(self) -> float:
        """The share of all parameters, biases and norms included, that is zero."""
        return 1 - self.nonzeros / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        rows = [_row(layer, layer.name, layer.kind) for layer in self.layers]
        rows.append(_row(self, "total", ""))
        head = list(rows[0])
        cells = [head, *([row.get(name, "") for name in head] for row in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def summary(
    model: nn.Module, example_inputs: Any = None, *, batch_sizes: Sequence[int] = (1, 32)
) -> Summary:
    """Say what a network is worth: parameters, zeros, bytes, operations and time, layer by layer.

    A parameter shared between layers counts once, in the first. Operations are those that
    `torch.utils.flop_counter` counts for the example inputs: matrix products, convolutions and
    attention; they stand at the layer that calls them, shared or not. Latency is measured, in
    evaluation mode, on the device and with the threads that there are.

    Args:
        model: Any module. It comes back as it was, mode and random state included.
        example_inputs: A tensor, a tuple of the model's positional arguments or a dict of its
            keyword arguments, on the model's device. `None` leaves operations and time out.
        batch_sizes: For how many samples to measure the time, the first sample again and again.

    Returns:
        The summary.

    Raises:
        TypeError: If a batch size is not an integer.
        ValueError: If one is less than 1, or time is to be measured and the inputs have no batch
            dimension.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
        >>> print(summary(model, torch.ones(1, 4), batch_sizes=()))
        layer  kind    parameters  non-zero  sparsity  bytes  compressed  FLOPs  effective
        ----------------------------------------------------------------------------------
        0      Linear          10        10    0.0000     40          40     16         16
        ----------------------------------------------------------------------------------
        total                  10        10    0.0000     40          40     16         16
        >>> sorted(summary(model, torch.ones(1, 4)).latency)
        [1, 32]
    """
    flops: dict[str, int] | None = None
    times: dict[int, dict[str, float]] = {}
    whole: dict[int, float] | None = None
    if example_inputs is not None:
        sizes = [
            _numbers.integer(f"batch_sizes[{number}]", size, least=1)
            for number, size in enumerate(batch_sizes)
        ]
        batches = {size: of_batch(example_inputs, size) for size in sizes}
        flops = _flops(model, example_inputs)
        if batches:
            times = {size: layer_latencies(model, inputs) for size, inputs in batches.items()}
            whole = {size: latency(model, inputs) for size, inputs in batches.items()}
    layers = []
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        operations = None if flops is None else flops.get(name, 0)
        if not own and not operations:
            continue
        took = {size: found.get(name, 0.0) for size, found in times.items()}
        layers.append(
            LayerSummary(
                name=name or "(model)",
                kind=type(module).__name__,
                parameters=sum(p.numel() for p in own),
                nonzeros=sum(int(p.detach().count_nonzero()) for p in own),
                bytes=sum(p.numel() * p.element_size() for p in own),
                compressed_bytes=sum(compressed_bytes(p) for p in own),
                flops=operations,
                effective_flops=None if operations is None else _effective(module, operations),
                latency=took or None,
            )
        )
    return Summary(
        layers=tuple(layers),
        parameters=sum(layer.parameters for layer in layers),
        nonzeros=sum(layer.nonzeros for layer in layers),
        bytes=sum(layer.bytes for layer in layers),
        compressed_bytes=sum(layer.compressed_bytes for layer in layers),
        flops=None if flops is None else sum(layer.flops or 0 for layer in layers),
        effective_flops=None if flops is None else sum(x.effective_flops or 0 for x in layers),
        latency=whole,
    )


def _effective(module: nn.Module, operations: int) -> int:
    """Operations, in proportion to the weights that are not zero."""
    weights = [
        weight for name in weights_of(module) if (weight := getattr(module, name, None)) is not None
    ]
    if isinstance(module, nn.MultiheadAttention):
        weights.append(module.out_proj.weight)  # called by it, not by its layer
    total = sum(weight.numel() for weight in weights)
    if not total:
        return operations
    return round(operations * sum(int(w.detach().count_nonzero()) for w in weights) / total)


def _flops(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Operations by module path, without those of its children."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    fused = torch.backends.mha.get_fastpath_enabled()
    # Fused attention is one operator of a cost that the counter may not know; apart it is products.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            untouched(model),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            call(model, example_inputs)
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


def _row(layer: LayerSummary | Summary, name: str, kind: str) -> dict[str, str]:
    sparsity = 1 - layer.nonzeros / layer.parameters if layer.parameters else 0.0
    row = {
        "layer": name,
        "kind": kind,
        "parameters": f"{layer.parameters:,}",
        "non-zero": f"{layer.nonzeros:,}",
        "sparsity": f"{sparsity:.4f}",
        "bytes": f"{layer.bytes:,}",
        "compressed": f"{layer.compressed_bytes:,}",
    }
    if layer.flops is not None:
        row |= {"FLOPs": f"{layer.flops:,}", "effective": f"{layer.effective_flops:,}"}
    for size, took in (layer.latency or {}).items():
        row[f"ms at {size}"] = f"{took:.3g}"
    return row
