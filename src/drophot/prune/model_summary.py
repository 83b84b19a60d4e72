"""Summarize a network layer by layer: parameters, zeros, bytes, operations and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from drophot._core import scalars
from drophot._core.model_contexts import preserved_state
from drophot.prune.compressed_checkpoint import compressed_bytes
from drophot.prune.latency import latency, layer_latencies, noted, of_batch
from drophot.prune.operator_counts import Operations, count_nonzeros, operations
from drophot.prune.prunable_weights import check_module


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """One layer: the parameters and operations of a module itself, without its children."""

    name: str
    """The module's name, as `named_modules` gives it."""
    kind: str
    """The name of its class."""
    parameters: int
    """The number of its parameters, zeros included."""
    nonzeros: int
    """The number of those that are not zero."""
    bytes: int
    """The size of the dense parameters in bytes."""
    compressed_bytes: int
    """Their size in `save_compressed`: a bit mask and the nonzero values, where that is less."""
    flops: int | None
    """Operations of the dense computation, two for each multiply-add; `None` if unknown."""
    effective_flops: int | None
    """The `flops` that remain if products with zero weights are skipped."""
    latency: Mapping[int, float] | None
    """Milliseconds by batch size; layers of a compiled model are measured eagerly."""
    counted_flops: int | None = None
    """Of the operators of known cost: all of `flops`, or the part that could be counted."""
    uncounted: tuple[str, ...] = ()
    """The operators of unknown cost that the layer calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A network's layers and their sums; `print` shows it as a table.

    Zeros do not reduce `bytes`, `flops` and `latency`, which are those of dense tensors on dense
    kernels. `compressed_bytes` is the size of the parameters in a file of `save_compressed`, and
    `effective_flops` the lower limit for a kernel that skips every zero weight. Both counts of
    operations are `None` if the network calls an operator of unknown cost.
    """

    layers: tuple[LayerSummary, ...]
    """The layers with parameters or operations, in the order of `named_modules`."""
    parameters: int
    """The number of parameters in all layers, zeros included; shared ones count once."""
    nonzeros: int
    """The number of those that are not zero."""
    bytes: int
    compressed_bytes: int
    flops: int | None
    effective_flops: int | None
    latency: Mapping[int, float] | None
    """Milliseconds by batch size, of the whole network; layers are measured in separate calls."""
    counted_flops: int | None = None
    """Of the operators of known cost: all of `flops`, or the part that could be counted."""
    uncounted: tuple[str, ...] = ()
    """The operators of unknown cost, of all layers."""

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
        notes = [f"? not counted: {', '.join(self.uncounted)}"] if self.uncounted else []
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *notes])


def summary(
    model: nn.Module, example_inputs: Any = None, *, batch_sizes: Sequence[int] = (1, 32)
) -> Summary:
    """Count parameters, zeros, bytes and operations of a network and measure its time, by layer.

    A parameter shared between layers counts once, in the first. Operations are those of matrix
    products, convolutions, attention and recurrent layers on the example inputs, counted by the
    formulas of `torch.utils.flop_counter` and, where it has none, by formulas of drophot. They are
    counted at the module that calls the operator, whichever of its parents called it and whichever
    module owns the weight. The cost of an operator of another library, or of one that consists of
    products but has no formula, is unknown: `uncounted` names it, and no total is given. Register a
    formula with `torch.utils.flop_counter.register_flop_formula` to have it counted. Latency is
    measured in evaluation mode, on the model's device and with the current number of threads.

    Effective operations are those that remain when every product with a zero weight is skipped,
    operator by operator. The zeros are those of the weight that the operator uses, or of a cast, a
    slice or a masked version of it. Products of activations, such as those of attention, are not
    reduced.

    Args:
        model: Any module. Its mode, its buffers and attributes and the random state are restored.
        example_inputs: A tensor, a tuple of the model's positional arguments or a dict of its
            keyword arguments, on the model's device. `None` leaves operations and time out.
        batch_sizes: The batch sizes to measure the time of; each batch repeats the first sample.

    Returns:
        The summary.

    Raises:
        TypeError: If `model` is not a module, or a batch size is not an integer.
        ValueError: If a batch size is less than 1, if time is to be measured and the inputs have no
            batch dimension in common, if a parameter has no data yet (lazy, or on the meta device)
            or is sharded, or if `example_inputs` are given for a TorchScript model. An error that
            the model raises for a batch of another size has a note that says so.

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
    _check_parameters(model)
    counts: dict[str, Operations] | None = None
    times: dict[int, dict[str, float]] = {}
    whole: dict[int, float] = {}
    if example_inputs is not None:
        _check_not_scripted(model)
        sizes = [
            scalars.integer(f"batch_sizes[{number}]", size, least=1)
            for number, size in enumerate(batch_sizes)
        ]
        batches = {size: of_batch(example_inputs, size) for size in sizes}
        with preserved_state(model):  # caches and counters too, after every call
            counts = operations(model, example_inputs)
            for size, inputs in batches.items():
                with noted(size):
                    times[size] = layer_latencies(model, inputs)
            for size, inputs in batches.items():
                with noted(size):
                    whole[size] = latency(model, inputs)
    layers = []
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        count = None if counts is None else counts.get(name, Operations())
        if not own and (count is None or not (count.flops or count.uncounted)):
            continue
        took = {size: found.get(name, 0.0) for size, found in times.items()}
        known = count is not None and not count.uncounted
        layers.append(
            LayerSummary(
                name=name or "(model)",
                kind=type(module).__name__,
                parameters=sum(p.numel() for p in own),
                nonzeros=sum(count_nonzeros(p) for p in own),
                bytes=sum(p.numel() * p.element_size() for p in own),
                compressed_bytes=sum(compressed_bytes(p) for p in own),
                flops=count.flops if count and known else None,
                effective_flops=count.effective if count and known else None,
                counted_flops=count.flops if count else None,
                uncounted=tuple(count.uncounted) if count else (),
                latency=took or None,
            )
        )
    uncounted = tuple(dict.fromkeys(name for layer in layers for name in layer.uncounted))
    known = counts is not None and not uncounted
    return Summary(
        layers=tuple(layers),
        parameters=sum(layer.parameters for layer in layers),
        nonzeros=sum(layer.nonzeros for layer in layers),
        bytes=sum(layer.bytes for layer in layers),
        compressed_bytes=sum(layer.compressed_bytes for layer in layers),
        flops=sum(layer.flops or 0 for layer in layers) if known else None,
        effective_flops=sum(layer.effective_flops or 0 for layer in layers) if known else None,
        counted_flops=None if counts is None else sum(x.counted_flops or 0 for x in layers),
        uncounted=uncounted,
        latency=whole or None,
    )


def _check_not_scripted(model: nn.Module) -> None:
    """Refuse TorchScript modules, whose layers cannot be told apart."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"`model` must consist of plain modules for operations to be counted, but "
                f"`{name or 'the model'}` is a TorchScript module. Pass the module that it was "
                f"made from, or leave `example_inputs` out."
            )


def _check_parameters(model: nn.Module) -> None:
    """Refuse parameters without data, and sharded ones."""
    check_module("model", model)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ValueError(
                f"`model` must have its weights, but `{name}` has no data. First run one batch "
                f"through a lazy module, or load the weights of a model on the meta device."
            )
        if hasattr(parameter, "device_mesh") or getattr(parameter, "_is_flat_param", False):
            raise ValueError(
                f"`model` must not be sharded, but `{name}` is sharded over processes. Summarize "
                f"the model before sharding it."
            )


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
    elif layer.counted_flops is not None:
        row |= {
            "FLOPs": f"≥ {layer.counted_flops:,}" if layer.counted_flops else "?",
            "effective": "?",
        }
    for size, took in (layer.latency or {}).items():
        row[f"ms at {size}"] = f"{took:.3g}"
    return row
