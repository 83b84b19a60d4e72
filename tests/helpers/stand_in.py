"""Stands in for CUDA graphs where there is no GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


def tensors_of(*tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Graph(TorchDispatchMode):
    """Writes operations down, which change nothing until they are replayed, as a CUDA graph does.

    While it is captured a graph computes nothing at all, and numbers from it are as good as random.
    This one computes, to know the shapes, and then undoes that: what was there before gets its
    values back, and what is new becomes NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.new: dict[int, Tensor] = {}
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in tensors_of(args, kwargs):
            self._save(tensor)
        out = func(*args, **kwargs)
        there = {place(tensor) for tensor in tensors_of(args, kwargs)}
        results = [t for t in tensors_of(out) if place(t) not in there]  # neither views nor inputs
        results = [tensor.detach() for tensor in results]
        self.new |= {place(tensor): tensor for tensor in results}
        # A recorded operation knows memory and keeps no autograd graph in use.
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        self.calls.append((func, args, kwargs, results))
        return out

    def _save(self, tensor: Tensor) -> None:
        if place(tensor) not in self.new and place(tensor) not in self.before:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self.before[place(tensor)] = whole, whole.clone()

    def finish(self) -> None:
        with torch.no_grad():
            for whole, values in self.before.values():
                whole.copy_(values)
            for tensor in self.new.values():
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                out = func(*args, **kwargs)
                given = {place(tensor) for tensor in tensors_of(args, kwargs)}
                fresh = [t for t in tensors_of(out) if place(t) not in given]
                for old, new in zip(results, fresh, strict=True):
                    old.copy_(new)


class Stream:
    """A stream of a device, in which operations are not delayed."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None:
        assert isinstance(other, Stream)
