"""Find out whether layers that override `forward` multiply by their weight unchanged.

A layer may standardize its weight before it multiplies, so that a zero in the parameter is not a
zero in the kernel. drophot therefore runs a copy of the layer once on a small input, with weights
of which half are zero, and inspects the operands of its products and convolutions.
"""

from __future__ import annotations

import copy
import re
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drophot._core import random_state
from drophot.prune.linear_layers import is_conv1d, weights_of

_PRODUCTS = re.compile(
    r"(add|badd)?b?m[mv]|matmul|_?linear|dot|_scaled_mm|_grouped_mm|_?trilinear|_?convolution\w*|"
    r"conv\w*|_conv\w*|(mkldnn|cudnn|miopen)_(conv\w*|linear)|lstm|gru|rnn_(tanh|relu)|"
    r"(_thnn|mkldnn|_cudnn|miopen)\w*rnn\w*"
)
_FORWARDS = ("forward", "_conv_forward")

Verdicts = dict[Any, bool | None]


def keeps_zeros(module: nn.Module, verdicts: Verdicts) -> bool | None:
    """Whether a zero in a layer's weight is a zero in the kernel that the layer multiplies by.

    `None` means that this cannot be observed. Layers of one class with equal settings are tried
    once; `verdicts` caches the results.
    """
    if not _has_own_forward(module):
        return True
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        return None  # a copy would call what belongs to the layer itself
    key = _key(module)
    if key not in verdicts:
        verdicts[key] = _probe(module)
    return verdicts[key]


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a layer overrides the forward of the torch or Transformers class it derives from."""
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        return True
    homes = {getattr(getattr(type(module), n, None), "__module__", "torch.") for n in _FORWARDS}
    home = "transformers." if is_conv1d(module) else "torch."
    return not all(one and f"{one}.".startswith((home, "torch.")) for one in homes)


def _key(module: nn.Module) -> tuple[Any, ...]:
    """A key that layers share if they compute alike: class, shapes, settings and submodules."""
    shapes = [(name, p.shape) for name, p in module._parameters.items() if p is not None]
    settings = [
        (name, id(value) if callable(value) else repr(value))
        for name, value in module.__dict__.items()
        if callable(value) or isinstance(value, bool | int | float | str | tuple | None)
    ]
    submodules = [(name, repr(child)) for name, child in module._modules.items()]
    return type(module), *shapes, *settings, *module._buffers, *submodules


def _probe(module: nn.Module) -> bool | None:
    weights = {
        name: weight
        for name in weights_of(module)
        if (weight := module._parameters.get(name)) is not None
    }
    for dtype, other_layout in product((torch.float32, None), (False, True)):
        probes = {name: _half_zero(weight, dtype) for name, weight in weights.items()}
        try:
            layer = copy.deepcopy(module, {id(weights[name]): probes[name] for name in probes})
            layer.eval()
            layer = layer if dtype is None else layer.to(dtype)
            observer = _OperandObserver(layer, probes)
            first = next(iter(probes.values()))
            with random_state.preserved_rng(first.device), torch.no_grad():
                inputs = _inputs(layer, first, other_layout)
                with observer:
                    layer.forward(*inputs)
        except Exception:  # the layer is not ours, so it may raise anything
            continue
        return observer.verdict()
    return None


def _half_zero(weight: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    """Random positive values of a weight's shape, about half of them zero."""
    order = torch.Generator().manual_seed(0)
    values = torch.rand(weight.shape, generator=order) + 0.5
    values *= torch.rand(weight.shape, generator=order) < 0.5
    values.view(-1)[0] = 0
    values = values.to(weight.device, dtype or weight.dtype)
    return nn.Parameter(values, requires_grad=weight.requires_grad)


def _inputs(layer: nn.Module, weight: Tensor, other_layout: bool) -> tuple[Tensor, ...]:
    """A small batch of inputs; `other_layout` means channels last, or a batch of sequences."""
    # A batch size that does not divide the weight's size, so that no activation has that size.
    batch = next(n for n in (5, 7, 11, 13, 17, 19, 23) if weight.numel() % n or n == 23)
    shapes: list[tuple[int, ...]]
    if isinstance(layer, _ConvNd):
        kernels = zip(layer.kernel_size, layer.dilation, strict=True)
        sizes = [1 if isinstance(layer, _ConvTransposeNd) else (k - 1) * d + 1 for k, d in kernels]
        space, channels = tuple(size + 1 for size in sizes), layer.in_channels
        shapes = [(batch, *space, channels) if other_layout else (batch, channels, *space)]
    elif isinstance(layer, nn.MultiheadAttention):
        shapes = [(batch, batch, n) for n in (layer.embed_dim, layer.kdim, layer.vdim)]
    elif isinstance(layer, nn.RNNBase):
        shapes = [(batch, batch, layer.input_size)]
    elif isinstance(layer, nn.Bilinear):
        shapes = [(batch, layer.in1_features), (batch, layer.in2_features)]
    else:
        features = weight.shape[0 if is_conv1d(layer) else 1]
        shapes = [(batch, batch, features) if other_layout else (batch, features)]
    return tuple(torch.ones(shape, device=weight.device, dtype=weight.dtype) for shape in shapes)


class _OperandObserver(TorchDispatchMode):
    """Inspects the operands of products and convolutions while a layer runs with probe weights."""

    def __init__(self, layer: nn.Module, probes: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._probes = probes
        self._zeros = {name: probe.detach() == 0 for name, probe in probes.items()}
        self._seen: dict[str, bool] = {}  # by weight, whether all its kernels had its zeros
        own = {id(probe) for probe in probes.values()}
        tensors = (*layer.parameters(), *layer.buffers())
        self._others = {_memory(tensor) for tensor in tensors if id(tensor) not in own}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if _PRODUCTS.fullmatch(name):
            for operand in tree_leaves((args, kwargs or {})):
                if isinstance(operand, Tensor):
                    self._inspect(operand)
        return func(*args, **(kwargs or {}))

    def verdict(self) -> bool | None:
        """Whether all observed kernels had the zeros; `None` if a weight was in none of them."""
        if not all(self._seen.values()):
            return False
        return True if self._seen.keys() == self._probes.keys() else None

    def _inspect(self, operand: Tensor) -> None:
        memory = _memory(operand)
        if memory in self._others:
            return
        for name, probe in self._probes.items():
            if memory == _memory(probe):  # the layer may have changed it in place
                zeros = bool((probe.detach()[self._zeros[name]] == 0).all())
                self._seen[name] = self._seen.get(name, True) and zeros
                return
        alike = [name for name, zeros in self._zeros.items() if zeros.numel() == operand.numel()]
        matching = [name for name in alike if _has_zeros(operand, self._zeros[name])]
        for name in matching or alike:
            self._seen[name] = self._seen.get(name, True) and bool(matching)


def _has_zeros(operand: Tensor, zeros: Tensor) -> bool:
    """Whether a kernel or its transpose is zero where the weight is."""
    layouts = (operand, operand.transpose(-1, -2)) if operand.dim() > 1 else (operand,)
    return any(not one.reshape(zeros.shape)[zeros].any() for one in layouts)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
