"""Stands in for a second device: tensors that may not be mixed with those of the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("lazy:0")
"""Of a type for which drophot does nothing special, and which torch can select anywhere."""

_ACROSS = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class Held(torch.Tensor):
    """A tensor that says it is on the device, and is computed with on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Held":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()


class _Factories(TorchDispatchMode):
    """Makes tensors on the device where one is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """Makes tensors from Python's numbers, which no operation does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None:
            made = func(*args, **kwargs | {"device": None})
            return made.to(device)
        return func(*args, **kwargs)


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Held)]
    there = len(here) < len(tensors)
    mixed = there and any(tensor.dim() for tensor in here)
    if mixed and func not in _ACROSS and func is not torch.ops.aten.index.Tensor:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and cpu! ({func})"
        )
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu") if there else device}
    elif func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], Held)
    plain_args, plain = tree_map_only(Held, lambda tensor: tensor.held, (args, kwargs))
    found = func(*plain_args, **plain)
    if not there:
        return found
    known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Held)}
    return tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else Held(t), found)


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Inside the block, tensors can be made on the device and moved to it."""
    with _Numbers(), _Factories():
        yield DEVICE
