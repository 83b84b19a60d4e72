"""The summary of a network that is in a file or that a factory builds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drophot._command_line import checkpoints
from drophot.prune.compressed_checkpoint import compressed_bytes, is_compressed, read_compressed
from drophot.prune.model_summary import LayerSummary, Summary, summary
from drophot.prune.operator_counts import count_nonzeros

# A file does not tell buffers from parameters. These are the buffers of BatchNorm.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def of(source: str, key: str | None) -> Summary:
    """Summarize `module:factory`, a checkpoint or a compressed checkpoint."""
    path = Path(source)
    compressed = path.is_file() and is_compressed(path)
    if path.exists() and not compressed:
        return _of_state(checkpoints.find(path, _is_state, key, "`state_dict` of a network"))
    if not path.exists() and ":" not in source:
        raise ValueError(
            f"There is no file {source}. Name a file, or a function that builds a network as "
            f"module:function, such as torchvision.models:resnet18."
        )
    if key is not None:
        raise ValueError(
            f"`--key` chooses an entry of a file of torch.save, got {key!r} for {source}, which is "
            f"one network. Leave `--key` out."
        )
    return _of_state(read_compressed(path)) if compressed else summary(_build(source))


def _build(source: str) -> nn.Module:
    module, _, name = source.partition(":")
    fix = "Name a file, or a function without arguments as module:function."
    if not module or not name:
        raise ValueError(f"{source} is neither a file nor a function. {fix}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as `python -m` has it
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if module.endswith(".py"):
            fix = "Name the module as in an import statement, without `.py`."
        raise ValueError(
            f"{source} needs the module {module!r}, which cannot be imported ({_describe(error)}). "
            f"{fix}"
        ) from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise ValueError(f"{source} does not exist: {module} has no {name!r}. {fix}") from None
    if not isinstance(found, nn.Module):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"{source} raised an error when called without arguments ({_describe(error)}). "
                f"{fix}"
            ) from error
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"{source} must return a torch.nn.Module, got an object of type "
            f"{type(found).__name__}. {fix}"
        )
    return found


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _is_state(found: Mapping[str, Any]) -> bool:
    """Whether this may be the `state_dict` of a network: tensors, with floats among them."""
    tensors = [value for value in found.values() if isinstance(value, Tensor)]
    others = [name for name, value in found.items() if not isinstance(value, Tensor)]
    return any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors) and all(
        name.endswith("_extra_state") for name in others
    )


def _of_state(state: Mapping[str, Any]) -> Summary:
    """The summary of a `state_dict`, whose names tell the layers."""
    tensors: dict[str, list[Tensor]] = {}
    seen = set[object]()
    for name, tensor in state.items():
        layer, _, own = name.rpartition(".")
        if not isinstance(tensor, Tensor) or own in (*_BUFFERS, "_extra_state"):
            continue
        kinds = {"quantized": tensor.is_quantized, "nested": tensor.is_nested}
        kinds |= {"meta": tensor.is_meta, str(tensor.layout): tensor.layout != torch.strided}
        if kind := next((kind for kind, applies in kinds.items() if applies), None):
            raise ValueError(
                f"`{name}` must be a dense tensor of numbers, got a {kind} one. Pass "
                f"module:function, which builds the network."
            )
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in seen:
            continue  # shared with an earlier layer
        seen.add(memory)
        tensors.setdefault(layer, []).append(tensor)
    layers = tuple(
        LayerSummary(
            name=name or "(model)",
            kind="",
            parameters=sum(tensor.numel() for tensor in own),
            nonzeros=sum(count_nonzeros(tensor) for tensor in own),
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in own),
            compressed_bytes=sum(compressed_bytes(tensor) for tensor in own),
            flops=None,
            effective_flops=None,
            latency=None,
        )
        for name, own in tensors.items()
    )
    return Summary(
        layers=layers,
        parameters=sum(layer.parameters for layer in layers),
        nonzeros=sum(layer.nonzeros for layer in layers),
        bytes=sum(layer.bytes for layer in layers),
        compressed_bytes=sum(layer.compressed_bytes for layer in layers),
        flops=None,
        effective_flops=None,
        latency=None,
    )
