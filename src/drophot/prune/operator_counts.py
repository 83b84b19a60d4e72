"""Count the operations of a forward pass, operator by operator, in the module that calls them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drophot._core.interruptions import must_propagate
from drophot._core.model_contexts import call_hooks, evaluating
from drophot.prune.eager_mode import eagerly, uncached
from drophot.prune.flop_formulas import is_free, multiply_adds
from drophot.prune.latency import call

# The positions of an operator's factors, beginning with the one that is usually a weight.
_FACTORS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), (2, 1)),
    **dict.fromkeys(("mm", "bmm", "_scaled_mm", "_int_mm", "mv", "dot", "vdot"), (1, 0)),
    **dict.fromkeys(("convolution", "_convolution", "cudnn_convolution"), (1,)),
    **dict.fromkeys(("convolution_overrideable", "_slow_conv2d_forward"), (1,)),
    "_trilinear": (1, 0, 2),
}
_RECURRENT = {"mkldnn_rnn_layer": slice(1, 3), "_cudnn_rnn": slice(1, 2), "miopen_rnn": slice(1, 2)}


@dataclass(slots=True)
class Operations:
    """The operations that one module calls itself, without its children."""

    flops: int = 0
    """The operations of known cost, two for each multiply-add."""
    effective: int = 0
    """The `flops` that remain if products with zero weights are skipped."""
    uncounted: dict[str, None] = field(default_factory=dict)
    """The operators of unknown cost, as an ordered set."""


def operations(model: nn.Module, example_inputs: Any) -> dict[str, Operations]:
    """The operations of one call in evaluation mode, by the path of the module that calls them.

    A module with several paths is listed under the first. The model is restored.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    # The fast path is one operator of unknown cost; the slow path consists of products.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model) as device, eagerly(), uncached(device):
            counter = _Counter(model, example_inputs)
            with call_hooks(model, counter.enter, counter.leave), counter:
                call(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.found


class _Counter(TorchDispatchMode):
    """Counts operators at the module that calls them.

    For each storage it tracks whether it holds weights (parameters, and casts, slices or masked
    versions of them) or activations (whatever depends on the inputs).
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        from torch.utils.flop_counter import flop_registry  # here, since the import is slow

        super().__init__()
        self._formulas = flop_registry
        self.found: dict[str, Operations] = {}
        self._stack: list[str] = []
        self._weight: dict[int, tuple[StorageWeakRef, bool]] = {}
        self._density: dict[tuple[Any, ...], tuple[int, int]] = {}
        for parameter in model.parameters():
            self._remember(parameter, True)
        for tensor in _tensors(example_inputs):
            self._remember(tensor, False)

    def enter(self, path: str) -> None:
        self._stack.append(path)

    def leave(self) -> None:
        self._stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.higher_order.cond:
            predicate, if_true, if_false, operands = args
            with self:
                return (if_true if predicate else if_false)(*operands)
        if isinstance(func, HigherOrderOperator):
            out = func(*args, **kwargs)
            self._count(func, func, str(func.name()), args, kwargs, out)
            return out
        packet = func.overloadpacket
        name = str(packet)
        if packet not in self._formulas and multiply_adds(name) is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        given = [self._is_weight(tensor) for tensor in _tensors((args, kwargs))]
        out = func(*args, **kwargs)
        counted = self._count(func, packet, name, args, kwargs, out)
        for tensor in _tensors(out) if given else ():
            if False in given or (counted and tensor.numel() > 1):
                self._remember(tensor, False)
            elif True in given and not counted:
                self._remember(tensor, True)  # a scalar, such as a norm, is a constant
        return out

    def _count(
        self, func: Any, packet: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any
    ) -> bool:
        """Count an operator at the module that calls it; whether it consists of products."""
        flops: int | None = None
        own = multiply_adds(name)
        try:
            if packet in self._formulas:
                flops = int(self._formulas[packet](*args, **kwargs, out_val=out))
            elif own is not None:
                flops = 2 * own(*args, **kwargs)
        except Exception as error:  # the formula does not support these arguments
            if must_propagate(error):
                raise
            flops = None
        has_formula = packet in self._formulas or own is not None
        if not has_formula and (is_free(name) and not isinstance(func, HigherOrderOperator)):
            return False
        at = self.found.setdefault(self._stack[-1] if self._stack else "", Operations())
        if flops is None:
            at.uncounted[name] = None
            return True
        at.flops += flops
        at.effective += self._effective(name.removeprefix("aten."), args, kwargs, flops)
        return True

    def _effective(self, name: str, args: Any, kwargs: dict[str, Any], flops: int) -> int:
        """The operations that remain if products with zero weights are skipped."""
        if name == "_grouped_mm":
            return self._grouped_effective(flops, *args, **kwargs)
        if name in _RECURRENT:
            weights = [t for t in _tensors(args[_RECURRENT[name]]) if t.dim() == 2]
            counts = [self._nonzeros(t) if self._is_weight(t) else (1, 1) for t in weights]
            total = sum(t.numel() for t in weights)
            remaining = sum(
                t.numel() * nonzero // size
                for t, (nonzero, size) in zip(weights, counts, strict=True)
            )
            return flops * remaining // total if total else flops
        for position in _FACTORS.get(name, ()):
            if position < len(args) and self._is_weight(args[position]):
                nonzero, size = self._nonzeros(args[position])
                return flops * nonzero // size if size else flops
        return flops

    def _grouped_effective(
        self, flops: int, a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any
    ) -> int:
        """Each group of rows is multiplied by the weights of one expert."""
        if not self._is_weight(b):
            return flops
        if a.dim() == 2 and b.dim() == 3 and offs is not None:
            ends = [0, *offs.tolist()]
            rows = [end - start for start, end in pairwise(ends)]
            return 2 * sum(n * self._nonzeros(w)[0] for n, w in zip(rows, b, strict=True))
        nonzero, size = self._nonzeros(b)
        return flops * nonzero // size if size else flops

    def _nonzeros(self, tensor: Tensor) -> tuple[int, int]:
        """The numbers of nonzero and of all elements; expanded dimensions count once."""
        version = None if tensor.is_inference() else tensor._version
        key = (_address(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), version)
        if key not in self._density:
            once = tensor[tuple(slice(None) if step else slice(1) for step in tensor.stride())]
            self._density[key] = count_nonzeros(once), once.numel()
        return self._density[key]

    def _is_weight(self, tensor: Any) -> bool | None:
        """Whether a tensor holds weights; `None` for a constant."""
        address = _address(tensor)
        if address in self._weight:
            return self._weight[address][1]
        return True if isinstance(tensor, nn.Parameter) else None  # of an unregistered module

    def _remember(self, tensor: Tensor, weight: bool) -> None:
        address = _address(tensor)
        if address is not None:  # a weak reference, so that no other storage gets this address
            self._weight[address] = StorageWeakRef(tensor.untyped_storage()), weight


def count_nonzeros(tensor: Tensor) -> int:
    tensor = tensor.detach()
    if tensor.is_floating_point() and tensor.element_size() == 1:  # torch cannot count float8
        tensor = tensor.float()
    return int(tensor.count_nonzero())


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _address(tensor: Any) -> int | None:
    """The identity of a tensor's storage, if it has one."""
    if not isinstance(tensor, Tensor):
        return None
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors
        return None
