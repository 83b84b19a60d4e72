"""The gradients and activations that importances are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from drophot._core.model_contexts import evaluating
from drophot.prune import prunable_weights
from drophot.prune.eager_mode import eagerly, uncached
from drophot.prune.importance_batches import BatchLoss, call_on, loss_of
from drophot.prune.latency import call
from drophot.prune.linear_layers import input_dimension, is_conv1d
from drophot.prune.parameter_values import ParameterValues

T = TypeVar("T")

# What one batch contributes, from a weight's name, the weight and its gradient.
Estimate = Callable[[str, Tensor, Tensor], Tensor]


def mean_over_batches(
    model: nn.Module, batches: Iterable[object], loss: BatchLoss | None, estimate: Estimate
) -> ParameterValues[Tensor]:
    """The mean of an estimate over the batches, for each parameter of two or more dimensions.

    A parameter that the loss does not depend on has zeros. The gradients of the model, and which
    parameters require them, are unchanged. The estimate gets float32 for dtypes of 16 bits.
    """
    prunable_weights.check_module("model", model)
    weights = {
        name: p for name, p in model.named_parameters() if p.dim() > 1 and p.is_floating_point()
    }
    if not weights:
        raise ValueError(
            f"`model` must have floating-point parameters of two or more dimensions, but "
            f"{type(model).__name__} has none. Pass the model that is pruned."
        )
    frozen = [p for p in weights.values() if not p.requires_grad]
    total: dict[str, Tensor] = {}
    count = 0
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with evaluating(model) as device, eagerly(), uncached(device):
            for batch in batches:
                with torch.enable_grad():
                    found = loss_of(model, batch, loss, device)
                _check_loss(found)
                gradients = torch.autograd.grad(found, [*weights.values()], allow_unused=True)
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                    if gradient is None:
                        gradient = torch.zeros_like(weight)
                    value = estimate(name, widened(weight.detach()), widened(gradient))
                    total[name] = total[name] + value if name in total else value
                count += 1
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    _require_batches(count)
    return ParameterValues(model, {name: value / count for name, value in total.items()})


def input_norms(model: nn.Module, batches: Iterable[object]) -> ParameterValues[Tensor]:
    """The L2 norm of each input of each Linear and Conv1D layer over all batches.

    Their shape is that of the weight, with 1 instead of the number of outputs.
    """
    prunable_weights.check_module("model", model)
    squares: dict[str, Tensor] = {}
    count = 0

    def observe(
        name: str, dim: int
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            (inputs,) = (*args, *kwargs.values())
            rows = inputs.detach().reshape(-1, inputs.shape[-1])
            own = rows.float().square().sum(0).unsqueeze(1 - dim)
            squares[name] = squares[name] + own if name in squares else own

        return add

    with ExitStack() as stack:
        device = stack.enter_context(evaluating(model))
        stack.enter_context(eagerly())
        for name, module in weight_layers(model):
            dim = input_dimension(module, "weight")
            if dim is not None and not isinstance(module, _ConvNd):
                hook = module.register_forward_pre_hook(observe(name, dim), with_kwargs=True)
                stack.callback(hook.remove)
        for batch in batches:
            call_on(model, batch, device)
            count += 1
    _require_batches(count)
    if not squares:
        raise ValueError(
            f"`model` must call Linear layers, but {type(model).__name__} calls none with these "
            f"batches. Use another importance."
        )
    return ParameterValues(model, {name: value.sqrt() for name, value in squares.items()})


def batch_norms(model: nn.Module, example_inputs: object) -> dict[str, _BatchNorm]:
    """The BatchNorm layer that reads the output of each Conv and Linear layer, by weight's name."""
    prunable_weights.check_module("model", model)
    outputs: list[tuple[str, Tensor]] = []  # kept, so that no other tensor is the same object
    found: dict[str, _BatchNorm] = {}

    def produced(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, out: outputs.append((name, out))

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        for name, out in outputs:
            if args and args[0] is out and isinstance(module, _BatchNorm) and module.affine:
                found[name] = module

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(eagerly())
        for name, module in weight_layers(model):
            stack.callback(module.register_forward_hook(produced(name)).remove)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                stack.callback(module.register_forward_pre_hook(read).remove)
        call(model, example_inputs)
    if not found:
        raise ValueError(
            f"`model` must have BatchNorm layers with a scale that read the outputs of Conv or "
            f"Linear layers, but {type(model).__name__} has none. Use another importance."
        )
    return found


def weight_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The Conv, Linear and Conv1D layers and their weights' names; tied weights have one name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd) or is_conv1d(module):
            own = f"{path}.weight".removeprefix(".")
            yield names.get(id(module._parameters.get("weight")), own), module


def widened(tensor: Tensor) -> Tensor:
    """The tensor, as float32 if its dtype has 16 bits, in which squares are zero or infinite."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def stored(values: ParameterValues[T], name: str, weight: Tensor | None = None) -> T:
    """The values of a parameter; `weight` has to have their shape, if it is given."""
    value = values.get(name)
    if value is None:
        raise computed_otherwise(name, "is unknown", weight)
    if weight is not None and isinstance(value, Tensor) and value.shape != weight.shape:
        raise computed_otherwise(name, f"had shape {tuple(value.shape)}", weight)
    return value


def computed_otherwise(name: str, had: str, weight: Tensor | None) -> ValueError:
    """The error for an importance that belongs to another model, or to one that has changed."""
    now = "" if weight is None else f" and has shape {tuple(weight.shape)} now"
    return ValueError(
        f"`importance` must be computed from the model that is pruned, but `{name}` {had} when it "
        f"was computed{now}. Compute it again."
    )


def _check_loss(found: object) -> None:
    if not isinstance(found, Tensor):
        raise TypeError(f"`loss` must return a tensor, got {type(found).__name__}.")
    if found.numel() != 1:
        raise ValueError(
            f"`loss` must return a scalar, got shape {tuple(found.shape)}. Return the mean over "
            f"the batch."
        )
    if not found.requires_grad:
        raise ValueError(
            "`loss` must depend on the weights of `model`, got a tensor that does not require a "
            "gradient. Do not detach the outputs or convert them to numbers."
        )


def _require_batches(count: int) -> None:
    if not count:
        raise ValueError(
            "`batches` must yield at least one batch, got none. Is it a used iterator?"
        )
