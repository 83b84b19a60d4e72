"""The gradients and activations that importances are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from drophot._core.model_contexts import evaluating
from drophot.prune import prunable_weights
from drophot.prune.eager_mode import eagerly, uncached
from drophot.prune.latency import call

BatchLoss = Callable[[Any, Any], Tensor]

# What one batch contributes, from a weight's name, the weight and its gradient.
Estimate = Callable[[str, Tensor, Tensor], Tensor]


def mean_over_batches(
    model: nn.Module, batches: Iterable[object], loss: BatchLoss, estimate: Estimate
) -> dict[str, Tensor]:
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
                inputs, targets = _pair(batch)
                with torch.enable_grad():
                    found = loss(model(inputs.to(device)), targets.to(device))
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
    return {name: value / count for name, value in total.items()}


def input_norms(model: nn.Module, batches: Iterable[object]) -> dict[str, Tensor]:
    """The L2 norm of each input of each Linear layer over all batches, by the weight's name."""
    prunable_weights.check_module("model", model)
    squares: dict[str, Tensor] = {}
    count = 0

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            (inputs,) = (*args, *kwargs.values())
            rows = inputs.detach().reshape(-1, inputs.shape[-1])
            own = rows.float().square().sum(0)
            squares[name] = squares[name] + own if name in squares else own

        return add

    with ExitStack() as stack:
        device = stack.enter_context(evaluating(model))
        stack.enter_context(eagerly())
        for name, module in weight_layers(model):
            if isinstance(module, nn.Linear):
                hook = module.register_forward_pre_hook(observe(name), with_kwargs=True)
                stack.callback(hook.remove)
        for batch in batches:
            first = batch[0] if isinstance(batch, tuple | list) and batch else batch
            if not isinstance(first, Tensor):
                raise TypeError(
                    f"`batches` must yield tensors of inputs, or tuples with the inputs first, got "
                    f"{type(first).__name__}. Wrap it in a generator that yields the inputs."
                )
            model(first.to(device))
            count += 1
    _require_batches(count)
    if not squares:
        raise ValueError(
            f"`model` must call Linear layers, but {type(model).__name__} calls none with these "
            f"batches. Use another importance."
        )
    return {name: value.sqrt() for name, value in squares.items()}


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
    """The Conv and Linear layers, with the name of the weight; tied weights have one name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd):
            own = f"{path}.weight".removeprefix(".")
            yield names.get(id(module._parameters.get("weight")), own), module


def widened(tensor: Tensor) -> Tensor:
    """The tensor, as float32 if its dtype has 16 bits, in which squares are zero or infinite."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def stored(values: Mapping[str, Tensor], name: str, weight: Tensor | None = None) -> Tensor:
    """The values of a parameter; `weight` has to have their shape."""
    value = values.get(name)
    if value is None or (weight is not None and value.shape != weight.shape):
        has = "is unknown" if value is None else f"had shape {tuple(value.shape)}"
        now = "" if weight is None else f" and has shape {tuple(weight.shape)} now"
        raise ValueError(
            f"`importance` must be computed from the model that is pruned, but `{name}` {has} when "
            f"it was computed{now}. Compute it again."
        )
    return value


def _pair(batch: object) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        got = type(batch).__name__
        if isinstance(batch, tuple | list):
            got += f" of length {len(batch)}"
        raise TypeError(
            f"`batches` must yield tuples of inputs and targets, got {got}. Wrap it in a generator "
            f"that yields them."
        )
    for value in batch[:2]:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"`batches` must yield tensors, got {type(value).__name__}. Wrap it in a generator "
                f"that yields tensors of inputs and targets."
            )
    return batch[0], batch[1]


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
