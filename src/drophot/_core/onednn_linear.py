"""Large linear layers on a CPU, computed by oneDNN through private functions of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# For products with fewer multiplications, the overhead of Python dominates.
_LARGE = 1 << 22
_LARGE_WEIGHT = 1 << 16


def fast_linear(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The forward pass of a model with large linear layers computed by oneDNN where MKL is slower.

    On AMD processors MKL uses half the width of AVX-512. oneDNN, which is part of PyTorch and used
    for convolutions, uses all of it. Results differ in the last bits. The model does not change. It
    is returned itself if it has no large layers, the device is not a CPU with AVX-512, or PyTorch
    has no oneDNN.
    """
    large = any(
        isinstance(m, nn.Linear) and m.weight.numel() >= _LARGE_WEIGHT for m in model.modules()
    )
    if not (large and _is_faster(device)):
        return model

    def forward(inputs: Tensor) -> Tensor:
        with _Mode():
            return model(inputs)

    return forward


def _is_faster(device: torch.device) -> bool:
    """Whether oneDNN is available and may be faster."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and _fits(*args):
            inputs, weight = args[:2]
            rows = _Product.apply(inputs.flatten(0, -2), weight, args[2] if len(args) > 2 else None)
            return rows.view(*inputs.shape[:-1], len(weight))
        return func(*args, **(kwargs or {}))


def _fits(inputs: Any, weight: Any, bias: Any = None) -> bool:
    plain = all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.layout == torch.strided
        for t in (inputs, weight, *[bias] * (bias is not None))
    )
    return (
        plain
        and inputs.dim() > 1
        and weight.dim() == 2
        and inputs.numel() * len(weight) >= _LARGE
        and inputs.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not _is_intercepted()
    )


def _is_intercepted() -> bool:
    """Whether a function transform such as vmap is active, or hooks of saved tensors.

    Activation checkpointing sets such hooks, and recomputes in the backward pass, outside of the
    mode.
    """
    active_transform, saved_tensor_hooks = _private_functions()
    return active_transform() is not None or saved_tensor_hooks(True) is not None


@cache
def _private_functions() -> tuple[Callable[[], Any], Callable[[bool], Any]]:
    """The innermost active function transform, and the hooks of tensors saved for backward."""
    # Imported when they are used, so that nothing else depends on them.
    from torch._C import _autograd as autograd
    from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

    # torch before 2.8 does not have this function.
    hooks = getattr(autograd, "_top_saved_tensors_default_hooks", lambda _: None)
    return functorch.peek_interpreter_stack, hooks


class _Product(torch.autograd.Function):
    """`a @ b.T + bias` of matrices; the derivatives use the same function."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        a, b = ctx.saved_tensors
        for_a, for_b, for_bias = ctx.needs_input_grad
        return (
            _Product.apply(grad, b.t(), None) if for_a else None,
            _Product.apply(grad.t(), a.t(), None) if for_b else None,
            grad.sum(0) if for_bias else None,
        )
